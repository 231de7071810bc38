"""The look-ahead from inside: what a client may cause, how much at once, and that it ends.

Clients are names here; what they do over HTTP is in `tests.test_look_ahead`.
"""

from __future__ import annotations

import asyncio
import bisect
import itertools
import random
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy import prefetch
from proxy.known import KnownPath
from proxy.nix.hashes import Hash
from proxy.nix.nar_name import NarName
from proxy.nix.store_path import parse_hash_part
from proxy.prefetch import Client, LookAhead
from tests.closures import SigningKey, StoreEntry, closure
from tests.conftest import RunSimulator, StartSimulator
from tests.faults import Gate
from tests.inside import InsideProxy

NARS_ONLY = LookAhead(narinfos=False)
NARINFOS_ONLY = LookAhead(nars=False)

ENDLESS = 2**50
"""Bytes of room or budget that no test uses up."""

SIZES = st.integers(0, 1_000)


def entry(name: str, size: int = 100, *references: StoreEntry) -> StoreEntry:
    """Make a path with a file of that size and a little more."""
    return StoreEntry.make(
        name,
        random.Random(name).randbytes(size),
        compression="none",
        references=tuple(reference.base_name for reference in references),
    )


def a_nar(number: int) -> NarName:
    """Make the name of the NAR of a path that is like no other."""
    return NarName(parse_hash_part(f"{number:032}"), Hash.sha256(b""), "none")


def want(
    client: Client,
    sizes: Iterable[int],
    first: int = 0,
    references: Mapping[int, Iterable[int]] = MappingProxyType({}),
) -> None:
    """Let a client ask for NARs of these sizes; the first one is number ``first``."""
    for number, size in enumerate(sizes, start=first):
        name = a_nar(number)
        below = references.get(number, ())
        client.asked[name.hash_part] = tuple(a_nar(each).hash_part for each in below)
        bisect.insort(client.wanted, (size, number, name))


def take_all(client: Client, room: int = ENDLESS) -> list[tuple[int, NarName]]:
    """Take as long as something may be taken."""
    taken = []
    while wish := client.take(room):
        taken.append(wish)
    return taken


async def known(proxy: InsideProxy, path: StoreEntry) -> KnownPath:
    """Return what the proxy knows, or finds out, of a path."""
    return (await proxy.cache.narinfo(parse_hash_part(path.hash_part))).known


async def known_all(proxy: InsideProxy, paths: Sequence[StoreEntry]) -> list[KnownPath]:
    """Return what the proxy knows, or finds out, of paths."""
    return [await known(proxy, path) for path in paths]


# --- what a client may have ---------------------------------------------------------------------


@given(sizes=st.lists(SIZES), budget=st.integers(0, 5_000), room=st.integers(0, 1_500))
def test_before_a_nar_request(sizes: list[int], budget: int, room: int) -> None:
    """Small ones first, as many as the budget pays for and nothing that finds no room."""
    client = Client(budget)
    want(client, sizes)
    costs = itertools.accumulate(sorted(sizes))
    allowed = [
        size
        for size, cost in zip(sorted(sizes), costs, strict=True)
        if cost <= budget and size <= room
    ]

    assert [size for size, _ in take_all(client, room)] == allowed


@given(sizes=st.lists(SIZES), budget=st.integers(0, 5_000), room=st.integers(0, 1_500))
def test_after_a_nar_request(sizes: list[int], budget: int, room: int) -> None:
    """All that finds room, for nothing, in the order in which it was asked for; the rest once it does."""
    client = Client(budget, fetches=True)
    want(client, sizes)
    wishes = [(size, a_nar(number)) for number, size in enumerate(sizes)]

    assert take_all(client, room) == [wish for wish in wishes if wish[0] <= room]
    assert take_all(client) == [wish for wish in wishes if wish[0] > room]
    assert (client.wishes, client.budget) == (0, budget)


@given(
    rooms=st.lists(SIZES, min_size=1),
    sizes=st.lists(SIZES, min_size=1, max_size=30),
    late=st.integers(0, 30),
)
def test_when_room_changes(rooms: list[int], sizes: list[int], late: int) -> None:
    """Nothing is taken that finds no room, or twice, and nothing is lost, whenever it was asked for."""
    client = Client(0, fetches=True)
    want(client, sizes[:late])
    taken = []
    for step, room in enumerate(rooms):
        if step == 1:
            want(client, sizes[late:], first=len(sizes[:late]))
        wish = client.take(room)
        assert wish is None or wish[0] <= room
        assert wish is not None or all(size > room for size, *_ in client.wanted)
        taken += [] if wish is None else [wish]
    if len(rooms) == 1:
        want(client, sizes[late:], first=len(sizes[:late]))

    assert sorted(taken + take_all(client), key=str) == sorted(
        ((size, a_nar(number)) for number, size in enumerate(sizes)), key=str
    )


@given(data=st.data(), sizes=st.lists(SIZES, min_size=1, max_size=30))
def test_what_others_refer_to_comes_first(data: st.DataObject, sizes: list[int]) -> None:
    """A path is taken after all that it needs: Nix does not ask for its NAR before it has those."""
    numbers = list(range(len(sizes)))
    references = {
        number: data.draw(st.sets(st.sampled_from(numbers[:number]), max_size=3)) | {number}
        for number in numbers[1:]
    }
    order = data.draw(st.permutations(numbers))
    renamed = {
        order[number]: {order[each] for each in below} for number, below in references.items()
    }
    client = Client(0, fetches=True)
    want(client, sizes, references=renamed)
    taken = [name.hash_part for _, name in take_all(client)]

    assert len(taken) == len(sizes)
    for number, below in renamed.items():
        at = taken.index(a_nar(number).hash_part)
        assert all(taken.index(a_nar(each).hash_part) <= at for each in below)


def test_references_in_circles() -> None:
    """Paths that refer to each other, which those of Nix do not, are taken like others; so is a long way."""
    client = Client(0, fetches=True)
    most = 20_000
    references = {number: [number - 1] for number in range(1, most)} | {0: [most - 1], 5: [5, 3, 9]}
    want(client, [1] * most, references=references)
    assert len(take_all(client)) == most


@given(steps=st.lists(st.none() | SIZES), budget=st.integers(0, 3_000))
def test_the_budget_is_never_exceeded(steps: list[int | None], budget: int) -> None:
    """In whatever order a client asks and NARs are taken, they cost no more than the budget."""
    client = Client(budget)
    spent = 0
    for number, size in enumerate(steps):
        if size is not None:
            want(client, [size], first=number)
        elif wish := client.take(ENDLESS):
            spent += wish[0]
        assert spent <= budget
        assert client.budget == budget - spent


# --- who has come and gone ----------------------------------------------------------------------


async def test_many_clients_at_once(sim: StartSimulator, key: SigningKey, tmp_path: Path) -> None:
    """200 clients that ask for one closure cost one question and one download for each path."""
    paths = closure(30, compressions=("none",))
    cache = await sim(*paths)
    rules = LookAhead()
    async with InsideProxy(tmp_path, cache.url, keys=[key.public], look_ahead=rules) as proxy:
        await proxy.eventually(lambda: proxy.store.room)
        told = await known_all(proxy, paths[:10])
        names = [f"10.0.0.{number}" for number in range(200)]
        for name in names:
            proxy.prefetch.connected(name)
        for name, path in itertools.product(names, told):
            proxy.prefetch.asked_narinfo(name, path)
        await proxy.idle()

        assert sorted(request.raw_path for request in cache.requests) == sorted(
            [*(path.narinfo_path for path in paths), *(path.nar_path for path in paths[:10])]
        )
        for name in names:
            proxy.prefetch.disconnected(name)
        assert proxy.prefetch._clients == {}


async def test_work_at_once_is_bounded(
    sim: StartSimulator, key: SigningKey, tmp_path: Path
) -> None:
    """However many clients ask for however much, lookups and downloads have their share."""
    leaves = [entry(f"leaf{number}") for number in range(40)]
    roots = [entry(f"root{number}", 100, *leaves[number::4]) for number in range(4)]
    cache = await sim(*leaves, *roots)
    narinfos, nars = Gate(None), Gate(None)
    rules = LookAhead(connections=16)
    async with InsideProxy(tmp_path, cache.url, keys=[key.public], look_ahead=rules) as proxy:
        await proxy.eventually(lambda: proxy.store.room)
        told = [*await known_all(proxy, roots), *await known_all(proxy, leaves[:20])]
        cache.fault("*.narinfo", narinfos)
        cache.fault("/nar/", nars)
        for number, path in enumerate(told):
            proxy.prefetch.connected(f"10.0.0.{number}")
            proxy.prefetch.asked_narinfo(f"10.0.0.{number}", path)
        assert len(proxy.prefetch._lookups) == len(proxy.prefetch._downloads) == rules.most == 6
        narinfos.open()
        nars.open()
        await proxy.idle()

    assert cache.gets("/nar/") == 24
    assert {cache.gets(leaf.narinfo_path) for leaf in leaves} == {1}
    assert cache.peak("/nar/") <= 6
    assert cache.peak() <= 12


async def test_spent_budgets_are_remembered(
    sim: StartSimulator, key: SigningKey, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What clients have spent is remembered after they left, of a bounded number of them."""
    monkeypatch.setattr(prefetch, "CLIENTS", 10)
    paths = [entry(f"path{number}") for number in range(3)]
    cache = await sim(*paths)
    rules = LookAhead(budget=len(paths[0].file))
    async with InsideProxy(tmp_path, cache.url, keys=[key.public], look_ahead=rules) as proxy:
        await proxy.eventually(lambda: proxy.store.room)
        for path in paths[:2]:
            proxy.prefetch.connected("10.1.0.0")
            proxy.prefetch.asked_narinfo("10.1.0.0", await known(proxy, path))
            await proxy.idle()
            proxy.prefetch.disconnected("10.1.0.0")
            for number in range(9):
                proxy.prefetch.connected(f"10.2.0.{number}")
                proxy.prefetch.disconnected(f"10.2.0.{number}")
        assert [cache.gets(path.nar_path) for path in paths] == [1, 0, 0]
        for number in range(10_000):
            proxy.prefetch.connected(f"client {number}")
            proxy.prefetch.disconnected(f"client {number}")
        assert len(proxy.prefetch._left) == 10
        assert proxy.prefetch._clients == {}


async def test_a_client_is_here_while_it_has_a_connection(
    sim: StartSimulator, key: SigningKey, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Others that come and go, and its own connections that close, do not make a client leave."""
    monkeypatch.setattr(prefetch, "CLIENTS", 3)
    path = entry("path")
    cache = await sim(path)
    async with InsideProxy(tmp_path, cache.url, keys=[key.public], look_ahead=NARS_ONLY) as proxy:
        await proxy.eventually(lambda: proxy.store.room)
        for _ in range(3):
            proxy.prefetch.connected("10.0.0.1")
        for number in range(20):
            proxy.prefetch.connected(f"10.0.1.{number}")
        for _ in range(2):
            proxy.prefetch.disconnected("10.0.0.1")
        proxy.prefetch.asked_narinfo("10.0.0.1", await known(proxy, path))
        await proxy.idle()

    assert cache.gets(path.nar_path) == 1


@pytest.mark.parametrize("asked", ["narinfo", "nar"])
async def test_who_has_left_causes_nothing(
    asked: str, sim: StartSimulator, key: SigningKey, tmp_path: Path
) -> None:
    """An answer that comes when its client is gone, and a name never seen, start nothing."""
    leaf = entry("leaf")
    root = entry("root", 100, leaf)
    cache = await sim(root, leaf)
    rules = LookAhead(budget=0 if asked == "nar" else ENDLESS)
    async with InsideProxy(tmp_path, cache.url, keys=[key.public], look_ahead=rules) as proxy:
        await proxy.eventually(lambda: proxy.store.room)
        told = await known(proxy, root)
        proxy.prefetch.connected("10.0.0.1")
        if asked == "nar":
            proxy.prefetch.asked_narinfo("10.0.0.1", told)
            await proxy.idle()
        cache.reset_counts()
        proxy.prefetch.disconnected("10.0.0.1")
        for name in ("10.0.0.1", "10.0.0.2"):
            if asked == "nar":
                proxy.prefetch.asked_nar(name)
            else:
                proxy.prefetch.asked_narinfo(name, told)
            proxy.prefetch.disconnected(name)
        await proxy.idle()

    assert cache.requests == []


# --- memory -------------------------------------------------------------------------------------


# --- rules that change --------------------------------------------------------------------------


async def test_other_upstreams_are_walked_again(
    sim: StartSimulator, key: SigningKey, tmp_path: Path
) -> None:
    """After the upstreams have changed, references are looked up at the new ones."""
    leaf = entry("leaf")
    root = entry("root", 100, leaf)
    old, new = await sim(root), await sim(root, leaf)
    async with InsideProxy(tmp_path, old.url, keys=[key.public], look_ahead=NARINFOS_ONLY) as proxy:
        await ask_once(proxy, root)
        changed = proxy.make_failover(new.url)
        proxy.cache.use(changed, negative_ttl=60)
        proxy.prefetch.configure(NARINFOS_ONLY)
        await ask_once(proxy, root)
        await changed.close()

    assert (old.gets(leaf.narinfo_path), new.gets(leaf.narinfo_path)) == (1, 1)


async def ask_once(proxy: InsideProxy, path: StoreEntry) -> None:
    """Be a client that comes, asks for a narinfo, and leaves when all that caused is done."""
    proxy.prefetch.connected("10.0.0.1")
    proxy.prefetch.asked_narinfo("10.0.0.1", await known(proxy, path))
    await proxy.idle()
    proxy.prefetch.disconnected("10.0.0.1")


# --- the end ------------------------------------------------------------------------------------


def files_open_below(folder: Path) -> list[str]:
    """Return the open files of this process that are in a folder."""
    links = Path("/proc/self/fd").iterdir()
    targets = [str(link.readlink()) for link in links if link.is_symlink()]
    return [target for target in targets if target.startswith(str(folder))]


async def test_close_ends_everything(
    threaded_sim: RunSimulator, key: SigningKey, tmp_path: Path
) -> None:
    """With all in flight and more queued, the end leaves no task, no descriptor and no file."""
    leaves = [entry(f"leaf{number}", 300_000) for number in range(60)]
    root = entry("root", 100, *leaves[:30])
    cache = threaded_sim(root, *leaves)
    before = asyncio.all_tasks()
    narinfos, nars = Gate(None), Gate(200_000)
    rules = LookAhead(connections=16)
    proxy = InsideProxy(tmp_path, cache.url, keys=[key.public], look_ahead=rules)
    await proxy.start()
    try:
        await proxy.eventually(lambda: proxy.store.room)
        told = [*await known_all(proxy, leaves[30:]), await known(proxy, root)]
        cache.reset_counts()
        cache.fault("*.narinfo", narinfos)
        cache.fault("/nar/", nars)
        started = cache.expect("/", 12)
        proxy.prefetch.connected("10.0.0.1")
        for path in told:
            proxy.prefetch.asked_narinfo("10.0.0.1", path)
        await started.wait()
        await proxy.prefetch.close()
        assert proxy.prefetch._lookups | proxy.prefetch._downloads == set()
        assert len(cache.requests) == 12
    finally:
        await proxy.stop()

    assert asyncio.all_tasks() == before
    assert files_open_below(tmp_path) == []
    assert proxy.partials == []
    assert len(cache.requests) == 12


@given(connections=st.integers(2, 1_000))
def test_connections_are_left_to_clients(connections: int) -> None:
    """Lookups and downloads together never take all connections, however few there are."""
    assert 2 * LookAhead(connections=connections).most < connections


async def test_memory_of_walked_paths(
    sim: StartSimulator, key: SigningKey, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However much there is to walk, it ends, nothing is asked for twice, and little is remembered."""
    monkeypatch.setattr(prefetch, "WALKED", 5)
    paths = closure(30, compressions=("none",))
    cache = await sim(*paths)
    async with InsideProxy(
        tmp_path, cache.url, keys=[key.public], look_ahead=NARINFOS_ONLY
    ) as proxy:
        proxy.prefetch.connected("10.0.0.1")
        proxy.prefetch.asked_narinfo("10.0.0.1", await known(proxy, paths[0]))
        await proxy.idle()
        assert len(proxy.prefetch._clients["10.0.0.1"].walked) <= 5

    assert {cache.gets(path.narinfo_path) for path in paths} <= {0, 1}
    assert len(cache.requests) >= 5


async def test_memory_of_what_is_asked_for(
    sim: StartSimulator, key: SigningKey, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client that asks for ever, and may have nothing, does not fill the memory."""
    monkeypatch.setattr(prefetch, "WALKED", 5)
    paths = [entry(f"path{number}") for number in range(20)]
    cache = await sim(*paths)
    rules = LookAhead(budget=0)
    async with InsideProxy(tmp_path, cache.url, keys=[key.public], look_ahead=rules) as proxy:
        told = await known_all(proxy, paths)
        proxy.prefetch.connected("10.0.0.1")
        for _ in range(10):
            for path in told:
                proxy.prefetch.asked_narinfo("10.0.0.1", path)
        client = proxy.prefetch._clients["10.0.0.1"]
        assert len(client.asked) <= 5
        assert len(client.wanted) <= 5


async def test_turned_off_with_work_queued(
    sim: StartSimulator, key: SigningKey, tmp_path: Path
) -> None:
    """What is only queued when the look-ahead is turned off is not done any more."""
    leaves = [entry(f"leaf{number}") for number in range(4)]
    root = entry("root", 100, *leaves)
    wanted = [entry(f"wanted{number}") for number in range(4)]
    cache = await sim(root, *leaves, *wanted)
    gate = Gate(None)
    rules = LookAhead(connections=4)
    async with InsideProxy(tmp_path, cache.url, keys=[key.public], look_ahead=rules) as proxy:
        await proxy.eventually(lambda: proxy.store.room)
        told = await known_all(proxy, [*wanted, root])
        cache.reset_counts()
        cache.fault("/", gate)
        started = cache.expect("/", 2)
        proxy.prefetch.connected("10.0.0.1")
        for path in told:
            proxy.prefetch.asked_narinfo("10.0.0.1", path)
        await started.wait()
        proxy.prefetch.configure(LookAhead(narinfos=False, nars=False, connections=4))
        gate.open()
        await proxy.idle()

    assert (cache.gets("*.narinfo"), cache.gets("/nar/")) == (1, 1)


async def test_close_before_anything_has_begun(
    sim: StartSimulator, key: SigningKey, tmp_path: Path
) -> None:
    """What was started a moment ago, and has not run yet, ends without a word."""
    leaf = entry("leaf")
    root = entry("root", 100, leaf)
    cache = await sim(root, leaf)
    async with InsideProxy(tmp_path, cache.url, keys=[key.public], look_ahead=LookAhead()) as proxy:
        await proxy.eventually(lambda: proxy.store.room)
        told = await known(proxy, root)
        proxy.prefetch.connected("10.0.0.1")
        proxy.prefetch.asked_narinfo("10.0.0.1", told)
        assert (len(proxy.prefetch._lookups), len(proxy.prefetch._downloads)) == (1, 1)
        await proxy.prefetch.close()

    assert cache.gets("/nar/") == cache.gets(leaf.narinfo_path) == 0
