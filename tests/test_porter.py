"""Small NARs are carried by a process of its own; clients notice nothing, and the store is the same."""

from __future__ import annotations

import asyncio
import functools
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing

import pytest

from proxy.events import FetchEnded, Published, Rejected
from proxy.porter.porter import MANY
from proxy.prefetch import LookAhead
from proxy.store.eviction import Limits
from proxy.supplier import CARRIED, UNPACKED
from proxy.supply import WHOLE
from tests.closures import COMPRESSIONS, SigningKey, StoreEntry, closure
from tests.conftest import StartProxy, StartSimulator
from tests.faults import Corrupt, Gate, Status
from tests.folder_oracle import complete_paths
from tests.inside import InsideProxy
from tests.porters import WatchedPorter
from tests.simulator import BinaryCacheSimulator

SMALL = StoreEntry.make("small-1.0", random.Random(5).randbytes(50_000), compression="none")
FILE = bytes(SMALL.file)
MIDDLE = len(FILE) // 2


@pytest.fixture
async def unused() -> AsyncIterator[WatchedPorter]:
    """Return a porter that nobody has needed yet."""
    async with aclosing(WatchedPorter()) as made:
        yield made


@pytest.fixture
async def porter(unused: WatchedPorter) -> WatchedPorter:
    """Return a porter that is at hand."""
    await unused.ready()
    return unused


@pytest.fixture
def start(unused: WatchedPorter, start: StartProxy) -> StartProxy:
    """Return a function that starts proxies, as everywhere, which have the porter."""
    return functools.partial(start, porter=unused)


Crowd = Callable[..., Awaitable[tuple[InsideProxy, BinaryCacheSimulator]]]
"""Starts a cache with some paths, and a proxy that fetches NARs ahead."""


@pytest.fixture
def crowd(sim: StartSimulator, start: StartProxy) -> Crowd:
    """Return a function that does so."""

    async def run(*entries: StoreEntry) -> tuple[InsideProxy, BinaryCacheSimulator]:
        cache = await sim(*entries)
        proxy = await start(cache, look_ahead=LookAhead(narinfos=False), limits=Limits())
        await proxy.eventually(lambda: proxy.store.room)
        return proxy, cache

    return run


def sized(size: int) -> StoreEntry:
    """Make a path whose file has exactly so many bytes."""
    padding = len(StoreEntry.make(f"sized-{size}", b"", compression="none").file)
    entry = StoreEntry.make(f"sized-{size}", bytes(size - padding), compression="none")
    assert len(entry.file) == size
    return entry


async def pulled(proxy: InsideProxy, entry: StoreEntry) -> bytes:
    """Return a NAR as a client gets it, whole, and wait until it is in the store."""
    answer = await proxy.pull(await proxy.nar_url(entry.hash_part))
    assert (answer.status, answer.complete) == (200, True)
    await proxy.idle()
    return answer.body


# --- who does it --------------------------------------------------------------------------------


async def test_it_is_carried(
    sim: StartSimulator, start: StartProxy, porter: WatchedPorter, key: SigningKey
) -> None:
    """The upstream is asked once, by the porter, which writes and publishes what is right."""
    cache = await sim(SMALL)
    proxy = await start(cache)
    assert await pulled(proxy, SMALL) == FILE
    assert cache.gets(SMALL.nar_path) == 1
    assert [heading.status for heading in porter.headings] == [200]
    (publication,) = porter.publications
    assert [rename.target.exists() for rename in publication.renames] == [True, True]
    assert complete_paths(proxy.folder, [key]) == {SMALL.hash_part}
    assert proxy.partials == []
    assert [event.error for event in proxy.observed(FetchEnded)] == [None]
    assert [event.origin for event in proxy.observed(Published)] == ["up0"]


async def test_a_closure_is_carried(
    sim: StartSimulator, start: StartProxy, porter: WatchedPorter, key: SigningKey
) -> None:
    """Many at once, in every compression there is: each is asked for once, carried, and kept."""
    entries = closure(4 * len(COMPRESSIONS), sizes=(100, 20_000))
    cache = await sim(*entries)
    proxy = await start(cache)
    bodies = await asyncio.gather(*(pulled(proxy, entry) for entry in entries))
    assert bodies == [bytes(entry.file) for entry in entries]
    assert {cache.gets(entry.nar_path) for entry in entries} == {1}
    assert len(porter.headings) == len(porter.publications) == len(entries)
    assert complete_paths(proxy.folder, [key]) == {entry.hash_part for entry in entries}
    assert proxy.partials == []


async def test_who_comes_meanwhile_gets_all_of_it(
    sim: StartSimulator, start: StartProxy, porter: WatchedPorter
) -> None:
    """Clients of every kind that come while it is carried get what they asked for, of one request."""
    cache = await sim(SMALL)
    gate = Gate(MIDDLE)
    cache.fault(SMALL.nar_path, gate)
    proxy = await start(cache)
    url = await proxy.nar_url(SMALL.hash_part)
    first = asyncio.create_task(proxy.pull(url))
    await gate.reached.wait()
    whole = [asyncio.create_task(proxy.pull(url)) for _ in range(20)]
    wishes = {"bytes=0-9": slice(10), "bytes=-5": slice(-5, None), "bytes=7-": slice(7, None)}
    parts = {wish: asyncio.create_task(proxy.pull(url, {"Range": wish})) for wish in wishes}
    head = asyncio.create_task(proxy.pull(url, method="HEAD"))
    leaver = asyncio.create_task(proxy.pull(url))
    await asyncio.sleep(0)
    leaver.cancel()
    gate.open()
    answers = await asyncio.gather(first, *whole)
    assert {(answer.status, answer.complete, answer.body) for answer in answers} == {
        (200, True, FILE)
    }
    assert (await first).headers["X-Cache"] == "MISS"
    for wish, part in wishes.items():
        answer = await parts[wish]
        assert (answer.status, answer.body) == (206, FILE[part])
    assert (await head).headers["Content-Length"] == str(len(FILE))
    assert cache.gets(SMALL.nar_path) == len(porter.headings) == 1


@pytest.mark.parametrize(
    ("entry", "carried"),
    [
        pytest.param(sized(WHOLE), True, id="just small enough"),
        pytest.param(sized(WHOLE + 8), False, id="too large for who waits"),
        pytest.param(
            StoreEntry.make("unpacked-1.0", bytes(UNPACKED), compression="zstd"),
            False,
            id="too large unpacked",
        ),
        pytest.param(SMALL.but(fields={"FileSize": None}), False, id="of unknown size"),
        pytest.param(SMALL.but(fields={"FileHash": None}), True, id="of unknown hash"),
    ],
)
async def test_only_what_is_small(
    entry: StoreEntry,
    carried: bool,  # noqa: FBT001
    sim: StartSimulator,
    start: StartProxy,
    porter: WatchedPorter,
) -> None:
    """What clients would wait for, or what would keep the porter busy, is streamed by the daemon."""
    cache = await sim(entry)
    proxy = await start(cache)
    assert await pulled(proxy, entry) == bytes(entry.file)
    assert len(porter.orders) == carried
    assert len(porter.publications) == 1
    assert cache.gets(entry.nar_path) == 1


@pytest.mark.parametrize(
    ("entry", "others", "carried"),
    [
        pytest.param(sized(WHOLE + 8), MANY, True, id="among many"),
        pytest.param(sized(WHOLE + 8), MANY - 1, False, id="among a few"),
        pytest.param(sized(CARRIED - 8), MANY, True, id="just small enough"),
        pytest.param(sized(CARRIED), MANY, False, id="too large"),
        pytest.param(SMALL, 0, True, id="small, and the only one"),
    ],
)
async def test_ahead_of_clients_it_may_be_larger(
    entry: StoreEntry,
    others: int,
    carried: bool,  # noqa: FBT001
    crowd: Crowd,
    porter: WatchedPorter,
) -> None:
    """One of many, for which nobody waits yet, is carried up to 1 MiB; who comes meanwhile gets all of it."""
    many = [sized(1_000 + 8 * number) for number in range(others)]
    proxy, cache = await crowd(entry, *many)
    gates = []
    for each in (*many, entry):
        gates.append(Gate(len(each.file) // 2))
        cache.fault(each.nar_path, gates[-1])
        await proxy.nar_url(each.hash_part)
        await gates[-1].reached.wait()
    assert len(porter.orders) == others + carried
    client = asyncio.create_task(pulled(proxy, entry))
    for gate in gates:
        gate.open()
    assert await client == bytes(entry.file)
    assert cache.gets(entry.nar_path) == 1
    assert len(porter.orders) == others + carried
    assert entry.narinfo_path[1:] in proxy.kept


async def test_the_first_ones_do_not_wait_for_it(
    sim: StartSimulator, start: StartProxy, unused: WatchedPorter
) -> None:
    """What is asked for before the process runs is fetched by the daemon, and starts the process."""
    cache = await sim(SMALL)
    proxy = await start(cache)
    assert unused.pid is None
    assert await pulled(proxy, SMALL) == FILE
    assert unused.orders == []
    await unused.ready()


# --- what goes wrong ----------------------------------------------------------------------------


async def test_damage_is_held_against_who_sent_it(
    sim: StartSimulator, start: StartProxy, porter: WatchedPorter, key: SigningKey
) -> None:
    """Who sends other bytes than were signed is told of, asked last for this NAR, and nothing is kept."""
    ill, well = await sim(SMALL), await sim(SMALL)
    ill.fault(SMALL.nar_path, Corrupt(MIDDLE))
    well.fault(SMALL.nar_path, Corrupt(MIDDLE), times=1)
    proxy = await start(ill, well, strict=True)
    url = await proxy.nar_url(SMALL.hash_part)
    assert (await proxy.pull(url)).status == 502
    await proxy.idle()
    assert (proxy.kept, proxy.partials) == (set(), [])
    assert await pulled(proxy, SMALL) == FILE
    assert {event.upstream for event in proxy.observed(Rejected)} == {"up0", "up1"}
    assert {event.kind for event in proxy.observed(Rejected)} == {"hash"}
    assert ill.gets(SMALL.nar_path) <= 2
    assert complete_paths(proxy.folder, [key]) == {SMALL.hash_part}
    assert len(porter.orders) == 2


async def test_who_sent_it_is_told_right(
    sim: StartSimulator, start: StartProxy, porter: WatchedPorter
) -> None:
    """Where the porter was turned away, and another upstream sent damage, that one is named."""
    poor, ill, well = await sim(SMALL), await sim(SMALL), await sim(SMALL)
    poor.fault(SMALL.nar_path, Status(404))
    ill.fault(SMALL.nar_path, Corrupt(MIDDLE))
    proxy = await start(poor, ill, well)
    assert await pulled(proxy, SMALL) == FILE
    assert [event.upstream for event in proxy.observed(Rejected)] == ["up1"]
    assert len(porter.orders) == 1


async def test_a_path_that_is_gone(
    sim: StartSimulator, start: StartProxy, porter: WatchedPorter
) -> None:
    """What no upstream has is absent for the client, too, and is not an error of the porter's."""
    cache = await sim(SMALL)
    proxy = await start(cache)
    url = await proxy.nar_url(SMALL.hash_part)
    cache.withdraw(SMALL)
    assert (await proxy.pull(url)).status == 404
    assert [heading.status for heading in porter.headings] == [404]
    assert (proxy.partials, porter.events) == ([], [])


async def test_who_leaves_takes_nothing_with_him(
    sim: StartSimulator, start: StartProxy, porter: WatchedPorter, key: SigningKey
) -> None:
    """The only client leaves while it is carried; it is kept all the same."""
    cache = await sim(SMALL)
    gate = Gate(MIDDLE)
    cache.fault(SMALL.nar_path, gate)
    proxy = await start(cache)
    url = await proxy.nar_url(SMALL.hash_part)
    leaver = asyncio.create_task(proxy.pull(url))
    await gate.reached.wait()
    leaver.cancel()
    await asyncio.gather(leaver, return_exceptions=True)
    gate.open()
    await proxy.idle()
    assert complete_paths(proxy.folder, [key]) == {SMALL.hash_part}
    assert cache.gets(SMALL.nar_path) == len(porter.headings) == 1
