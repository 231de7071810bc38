"""Small NARs are carried by a process of its own; clients notice nothing, and the store is the same."""

from __future__ import annotations

import asyncio
import functools
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing

import pytest

from proxy.events import BreakerOpened, FetchEnded, Published, Rejected
from proxy.porter.porter import MANY
from proxy.prefetch import LookAhead
from proxy.store.eviction import Limits
from proxy.store.reader import is_there
from proxy.supplier import CARRIED, UNPACKED
from proxy.supply import WHOLE
from tests.closures import COMPRESSIONS, SigningKey, StoreEntry, closure
from tests.conftest import StartProxy, StartSimulator
from tests.faults import Corrupt, Cut, Gate, Status
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

    async def run(*entries: StoreEntry, **options: int) -> tuple[InsideProxy, BinaryCacheSimulator]:
        cache = await sim(*entries)
        look_ahead = LookAhead(narinfos=False)
        proxy = await start(cache, look_ahead=look_ahead, limits=Limits(), **options)
        await proxy.eventually(lambda: proxy.store.room)
        return proxy, cache

    return run


async def begun(proxy: InsideProxy, cache: BinaryCacheSimulator, entry: StoreEntry) -> Gate:
    """Have a NAR fetched ahead, and return the gate that holds it up half way."""
    gate = Gate(len(entry.file) // 2)
    cache.fault(entry.nar_path, gate)
    await proxy.nar_url(entry.hash_part)
    await gate.reached.wait()
    return gate


async def crowded(
    crowd: Crowd, *entries: StoreEntry, others: int = MANY, **options: int
) -> tuple[tuple[InsideProxy, BinaryCacheSimulator], list[Gate]]:
    """Start both with ``others`` small NARs under way, and return the gates that hold these up."""
    many = [sized(1_000 + 8 * number) for number in range(others)]
    proxy, cache = await crowd(*entries, *many, **options)
    return (proxy, cache), [await begun(proxy, cache, each) for each in many]


async def pulled_at_once(proxy: InsideProxy, entry: StoreEntry) -> bytes:
    """Return a NAR as a client gets it whose narinfo it has asked for."""
    answer = await proxy.pull(nar_target(entry))
    assert (answer.status, answer.complete) == (200, True)
    return answer.body


def nar_target(entry: StoreEntry) -> str:
    """Return the URL that the proxy gives the NAR of an uncompressed path."""
    return f"/nar/{entry.hash_part}-{entry.nar_hash}.nar"


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
    assert [is_there(rename.target) for rename in publication.renames] == [True, True]
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
    (proxy, cache), gates = await crowded(crowd, entry, others=others)
    gates.append(await begun(proxy, cache, entry))
    assert len(porter.orders) == others + carried
    client = asyncio.create_task(pulled(proxy, entry))
    for gate in gates:
        gate.open()
    assert await client == bytes(entry.file)
    assert cache.gets(entry.nar_path) == 1
    assert len(porter.orders) == others + carried
    assert entry.narinfo_path[1:] in proxy.kept


async def test_who_waits_sees_it_arrive(crowd: Crowd, porter: WatchedPorter) -> None:
    """Among many, too, a larger NAR for which a client waits is streamed by the daemon."""
    large = sized(CARRIED - 8)
    (proxy, cache), gates = await crowded(crowd, large)
    gate = Gate(len(large.file) // 2)
    cache.fault(large.nar_path, gate)
    async with proxy.session.get(f"{proxy.url}{nar_target(large)}") as answer:
        assert await answer.content.readexactly(1_000) == bytes(large.file)[:1_000]
        assert len(porter.orders) == MANY
        for each in (gate, *gates):
            each.open()
        assert await answer.read() == bytes(large.file)[1_000:]
    await proxy.idle()


async def test_who_comes_before_it_is_asked_for_sees_it_arrive(
    crowd: Crowd, porter: WatchedPorter
) -> None:
    """As long as a larger NAR waits for a connection, a client may still come and have it streamed."""
    large = sized(CARRIED - 8)
    (proxy, cache), gates = await crowded(crowd, large, max_connections=2 * MANY)
    gate = Gate(len(large.file) // 2)
    cache.fault(large.nar_path, gate)
    url = await proxy.nar_url(large.hash_part)
    await proxy.eventually(lambda: proxy.cache.fetches_in_flight == MANY + 1)
    assert cache.gets(large.nar_path) == 0
    client = asyncio.create_task(pulled(proxy, large))
    fetch = proxy.cache._fetches[url.removeprefix("/nar/")]
    await proxy.eventually(lambda: fetch.are_waiting)
    gates[0].open()
    await gate.reached.wait()
    assert len(porter.orders) == MANY
    for each in (gate, *gates):
        each.open()
    assert await client == bytes(large.file)
    assert len(porter.orders) == MANY


async def test_a_larger_one_that_breaks_off(crowd: Crowd, porter: WatchedPorter) -> None:
    """Large NARs that break off far behind their beginning are read again, and close no upstream."""
    larges = [sized(CARRIED - 8 * number) for number in range(1, 7)]
    (proxy, cache), gates = await crowded(crowd, *larges)
    for each in larges:
        cache.fault(each.nar_path, Cut(900_000), times=1)
        await proxy.nar_url(each.hash_part)
    # Who comes before an order has gone out has the NAR streamed.
    await proxy.eventually(lambda: len(porter.orders) == MANY + len(larges))
    bodies = await asyncio.gather(*(pulled_at_once(proxy, each) for each in larges))
    assert bodies == [bytes(each.file) for each in larges]
    for gate in gates:
        gate.open()
    await proxy.idle()
    assert len(porter.orders) == MANY + len(larges)
    assert not proxy.observed(BreakerOpened)
    assert {cache.gets(each.nar_path) for each in larges} == {2}


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
