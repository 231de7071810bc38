"""The look-ahead as clients and upstreams see it: what is asked for before anybody asks.

Upstreams wait at gates until the test opens them, so every order of events is one that the test chose.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Self

import aiohttp
import pytest

from proxy.events import AskedAhead, Evicted, FastlaneServed, FetchedAhead, RequestServed
from proxy.nix.nar_name import NarName
from proxy.nix.store_path import parse_hash_part
from proxy.prefetch import LookAhead
from proxy.store import index, room
from proxy.store.eviction import UNLIMITED, Limits
from tests.closures import SigningKey, StoreEntry, closure
from tests.conftest import RunDaemon, RunSimulator, StartSimulator
from tests.daemon import DaemonProcess
from tests.faults import Corrupt, Cut, Fault, Gate, Html, Request, Shorter, Status
from tests.inside import InsideProxy, Received
from tests.nix_client import NixClient
from tests.simulator import BinaryCacheSimulator
from tests.test_reload import reload
from tests.waiting import eventually

ALL = LookAhead()
NARINFOS_ONLY = LookAhead(nars=False)
NARS_ONLY = LookAhead(narinfos=False)
LIFTED_ONLY = LookAhead(budget=0)
"""NARs are fetched ahead from a client's first NAR request on, and not before."""

SOON = 6.0
"""Seconds for what must not wait for anything; a lookup that is held up is given up only after 8."""


def entry(name: str, size: int = 100, *references: StoreEntry) -> StoreEntry:
    """Make a path with a file of that size and a little more."""
    return StoreEntry.make(
        name,
        random.Random(name).randbytes(size),
        compression="none",
        references=tuple(reference.base_name for reference in references),
    )


def entries(name: str, count: int, size: int = 100) -> list[StoreEntry]:
    """Make paths that differ by their number."""
    return [entry(f"{name}-{number}", size) for number in range(count)]


def nar_url(path: StoreEntry) -> str:
    """Return where the proxy has the NAR of an uncompressed path."""
    return f"/nar/{path.hash_part}-{path.nar_hash}.nar"


class Visitor:
    """A client with connections and an address of its own, gone when its block ends.

    Args:
        proxy: What it visits.
        address: Where it comes from.
    """

    def __init__(self, proxy: InsideProxy, address: str = "127.0.0.1") -> None:
        self._proxy = proxy
        self._address = address

    async def __aenter__(self) -> Self:
        connector = aiohttp.TCPConnector(local_addr=(self._address, 0))
        self._session = aiohttp.ClientSession(connector=connector)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.leave()

    async def leave(self) -> None:
        """Close all connections, and wait until the proxy has seen it."""
        await self._session.close()
        await self._proxy.eventually(lambda: self._address not in self._proxy.prefetch._clients)

    async def pull(self, path: str, method: str = "GET") -> Received:
        """Ask for something."""
        async with self._session.request(method, self._proxy.url + path) as answer:
            body = bytearray()
            complete = True
            try:
                async for piece in answer.content.iter_any():
                    body += piece
            except (aiohttp.ClientError, ConnectionError):
                complete = False
            return Received(answer.status, answer.headers, bytes(body), complete)

    async def narinfos(self, *paths: StoreEntry) -> None:
        """Ask for narinfos that are there, one after the other."""
        for path in paths:
            assert (await self.pull(path.narinfo_path)).status == 200

    async def nar(self, path: StoreEntry) -> str:
        """Ask for a NAR, and look at every byte; return what X-Cache says."""
        received = await self.pull(nar_url(path))
        assert (received.status, received.complete) == (200, True)
        assert received.body == bytes(path.file)
        return received.headers["X-Cache"]


class Start:
    """Start proxies that look ahead."""

    def __init__(self, folder: Path, key: SigningKey) -> None:
        self.folder = folder
        self._key = key
        self._started: list[InsideProxy] = []

    async def __call__(
        self,
        cache: BinaryCacheSimulator,
        look_ahead: LookAhead = ALL,
        *,
        limits: Limits | None = None,
    ) -> InsideProxy:
        """Start a proxy with as many connections to its upstream as the look-ahead goes by."""
        proxy = InsideProxy(
            self.folder / f"store{len(self._started)}",
            cache.url,
            keys=[self._key.public],
            look_ahead=look_ahead,
            limits=limits or Limits(),
            max_connections=look_ahead.connections,
        )
        self._started.append(await proxy.start())
        await proxy.eventually(lambda: proxy.store.room)  # which its thread has to find out first
        return proxy

    async def stop(self) -> None:
        """Stop them all."""
        for proxy in self._started:
            await proxy.stop()


@pytest.fixture
async def start(tmp_path: Path, key: SigningKey) -> AsyncIterator[Start]:
    """Return what starts proxies, which stop when the test ends."""
    starting = Start(tmp_path, key)
    yield starting
    await starting.stop()


def asked(cache: BinaryCacheSimulator, under: str = "/") -> list[str]:
    """Return what was asked of an upstream, in order."""
    paths = [request.raw_path for request in cache.requests]
    return [path for path in paths if path.startswith(under)]


def narinfos_asked(cache: BinaryCacheSimulator) -> list[str]:
    """Return what narinfos an upstream was asked for, sorted."""
    return sorted(path for path in asked(cache) if path.endswith(".narinfo"))


def narinfo_paths(*paths: StoreEntry) -> list[str]:
    """Return where narinfos are, sorted."""
    return sorted(path.narinfo_path for path in paths)


def nar_paths(*paths: StoreEntry) -> list[str]:
    """Return where an upstream has NARs, in the same order."""
    return [path.nar_path for path in paths]


# --- References are walked ----------------------------------------------------------------------


async def test_a_closure_is_walked_before_the_client_asks(
    sim: StartSimulator, start: Start
) -> None:
    """One narinfo that a client asks for brings in all others, each asked for once."""
    paths = closure(40, depth=8)
    cache = await sim(*paths)
    proxy = await start(cache, NARINFOS_ONLY)
    async with Visitor(proxy) as visitor:
        await visitor.narinfos(paths[0])
        await proxy.idle()
        assert narinfos_asked(cache) == narinfo_paths(*paths)
        for path in paths:
            answer = await visitor.pull(path.narinfo_path)
            assert (answer.status, answer.headers["X-Cache"]) == (200, "HIT")

    assert narinfos_asked(cache) == narinfo_paths(*paths)
    assert cache.peak() <= NARINFOS_ONLY.most


async def test_the_client_catches_up_with_the_walk(sim: StartSimulator, start: Start) -> None:
    """A narinfo that is being looked up ahead is not asked for again when its client comes."""
    leaf = entry("leaf")
    root = entry("root", 100, leaf)
    cache = await sim(root, leaf)
    gate = Gate(None)
    cache.fault(leaf.narinfo_path, gate)
    proxy = await start(cache, NARINFOS_ONLY)
    async with Visitor(proxy) as visitor:
        await visitor.narinfos(root)
        await gate.reached.wait()
        answer = asyncio.create_task(proxy.cache.narinfo(parse_hash_part(leaf.hash_part)))
        await asyncio.sleep(0)  # it has asked now
        gate.open()
        assert (await answer).result == "COALESCED"

    assert cache.gets(leaf.narinfo_path) == 1


async def test_references_in_circles(sim: StartSimulator, start: Start) -> None:
    """Paths that refer to themselves and to each other are asked for once, and the walk ends."""
    ring = entries("ring", 5)
    names = [path.base_name for path in ring]
    paths = [
        path.but(references=tuple(sorted({names[number], names[(number + 1) % 5], names[0]})))
        for number, path in enumerate(ring)
    ]
    cache = await sim(*paths)
    proxy = await start(cache, NARINFOS_ONLY)
    async with Visitor(proxy) as visitor:
        await visitor.narinfos(paths[2])
        await proxy.idle()

    assert narinfos_asked(cache) == narinfo_paths(*paths)


async def test_references_to_what_cannot_be_had(sim: StartSimulator, start: Start) -> None:
    """Absent, unsigned, garbled and failing references disturb neither the walk nor the client."""
    deep = entry("deep")
    good = entry("good", 100, deep)
    absent, failing = entry("absent"), entry("failing")
    unsigned = entry("unsigned", 100, entry("behind-unsigned")).but(signers=())
    garbled = entry("garbled").but(tamper=lambda text: text.replace(b"NarSize", b"Size"))
    root = entry("root", 100, absent, failing, unsigned, garbled, good)
    cache = await sim(root, good, deep, failing, unsigned, garbled)
    cache.fault(failing.narinfo_path, Status(500))
    proxy = await start(cache)
    async with Visitor(proxy) as visitor:
        await visitor.narinfos(root)
        await proxy.idle()
        looked_up = narinfo_paths(root, absent, failing, unsigned, garbled, good, deep)
        assert narinfos_asked(cache) == looked_up
        for path in (absent, failing, unsigned, garbled):
            assert (await visitor.pull(path.narinfo_path)).status == 404
        assert (await visitor.pull(deep.narinfo_path)).headers["X-Cache"] == "HIT"
        assert cache.gets(absent.narinfo_path) == 1
        cache.heal()
        proxy.clock.now += 3_600  # after so much that was wrong it had been left alone
        await visitor.narinfos(failing)


async def test_what_failed_ahead_is_walked_for_the_next(sim: StartSimulator, start: Start) -> None:
    """A reference that could not be looked up is looked up again for the next client."""
    leaf = entry("leaf")
    root = entry("root", 100, leaf)
    cache = await sim(root, leaf)
    failure = cache.fault(leaf.narinfo_path, Status(500))
    proxy = await start(cache, NARINFOS_ONLY)
    for healthy in (False, True):
        if healthy:
            failure.lift()
        async with Visitor(proxy) as visitor:
            await visitor.narinfos(root)
            await proxy.idle()

    assert cache.gets(leaf.narinfo_path) == 2
    assert not proxy.cache.is_absent(leaf.narinfo_path[1:])


# --- a client's own requests go first -----------------------------------------------------------


async def test_own_downloads_leave_connections_for_narinfos(
    sim: StartSimulator, start: Start
) -> None:
    """Clients' own downloads and the look-ahead together keep nobody from a narinfo."""
    mine, leaves = entries("mine", 40), entries("leaf", 40)
    root, own = entry("root", 100, *leaves), entry("own")
    cache = await sim(root, own, *mine, *leaves)
    proxy = await start(cache, NARINFOS_ONLY)
    gate = Gate(None)
    cache.fault(one_of(nar_paths(*mine), narinfo_paths(*leaves)), gate)
    lookups = cache.expect(one_of(narinfo_paths(*leaves)), NARINFOS_ONLY.most)
    downloads = cache.expect("/nar/", 16)
    async with Visitor(proxy) as visitor:
        async with asyncio.timeout(SOON):
            await visitor.narinfos(*mine)
            downloading = [asyncio.create_task(visitor.nar(path)) for path in mine]
            await downloads.wait()
            await visitor.narinfos(root)
            await lookups.wait()
            await visitor.narinfos(own)
        gate.open()
        assert await asyncio.gather(*downloading) == ["MISS"] * 40


def one_of(*paths: Sequence[str]) -> Callable[[Request], bool]:
    """Return what is true of requests for these paths."""
    wanted = {path for some in paths for path in some}
    return lambda request: request.raw_path in wanted


# --- NARs before the first NAR request ----------------------------------------------------------


async def test_small_ones_first(sim: StartSimulator, start: Start) -> None:
    """What waits for a connection is fetched in the order of size, whatever the order of asking."""
    sizes = [5_000, 300, 70_000, 1_000, 200, 90_000, 40]
    paths = [entry(f"path-{size}", size) for size in sizes]
    first = entry("first", 20_000)
    cache = await sim(first, *paths)
    gate = Gate(None)
    cache.fault(first.nar_path, gate)
    proxy = await start(cache, LookAhead(connections=4))
    async with Visitor(proxy) as visitor:
        await visitor.narinfos(first, *paths)
        await gate.reached.wait()
        gate.open()
        await proxy.idle()

    in_order = sorted(paths, key=lambda path: len(path.file))
    assert asked(cache, "/nar/") == nar_paths(first, *in_order)


@pytest.mark.parametrize("seed", range(3))
async def test_the_budget_is_kept(seed: int, sim: StartSimulator, start: Start) -> None:
    """NARs of at most the budget are fetched, and nothing that was left out would have fitted."""
    paths = closure(40, seed=seed, sizes=(100, 20_000))
    budget = sum(len(path.file) for path in paths) // 3
    cache = await sim(*paths)
    proxy = await start(cache, LookAhead(budget=budget))
    async with Visitor(proxy) as visitor:
        await visitor.narinfos(*random.Random(seed).sample(paths, 40))
        await proxy.idle()

    fetched = [path for path in paths if cache.gets(path.nar_path)]
    spent = sum(len(path.file) for path in fetched)
    assert spent <= budget
    assert min(len(path.file) for path in paths if path not in fetched) > budget - spent
    assert cache.peak("/nar/") <= ALL.most


async def test_what_was_only_walked_is_not_fetched(sim: StartSimulator, start: Start) -> None:
    """No NAR comes of a path whose narinfo no client has asked for, not even later."""
    leaves = entries("leaf", 3)
    root = entry("root", 100, *leaves)
    cache = await sim(root, *leaves)
    proxy = await start(cache)
    async with Visitor(proxy) as visitor:
        await visitor.narinfos(root)
        await proxy.idle()
        assert await visitor.nar(root) == "PREFETCHED"
        await proxy.idle()

    assert narinfos_asked(cache) == narinfo_paths(root, *leaves)
    assert asked(cache, "/nar/") == nar_paths(root)


# --- the first NAR request ----------------------------------------------------------------------


async def test_the_first_nar_request_lifts_the_budget(sim: StartSimulator, start: Start) -> None:
    """A client that asks for one NAR gets all ahead whose narinfo it has asked, or will ask, for."""
    walked = entry("walked")
    before = [entry(f"before-{number}", 1_000 * (10 - number), walked) for number in range(10)]
    after = entries("after", 5)
    cache = await sim(walked, *before, *after)
    proxy = await start(cache, LIFTED_ONLY)
    async with Visitor(proxy) as visitor:
        await visitor.narinfos(*before)
        await proxy.idle()
        assert asked(cache, "/nar/") == []
        assert await visitor.nar(before[-1]) == "MISS"
        await proxy.idle()
        assert sorted(asked(cache, "/nar/")) == sorted(nar_paths(*before))
        await visitor.narinfos(*after)
        await proxy.idle()
        for path in before[:-1] + after:
            assert await visitor.nar(path) == "PREFETCHED"

    assert sorted(asked(cache, "/nar/")) == sorted(nar_paths(*before, *after))


async def test_a_hot_nar_lifts_the_budget(sim: StartSimulator, start: Start) -> None:
    """The first NAR request counts also when it is answered by the fast lane."""
    hot, other = entry("hot"), entry("other")
    cache = await sim(hot, other)
    proxy = await start(cache, LIFTED_ONLY)
    async with Visitor(proxy, "127.0.0.2") as somebody:
        await somebody.narinfos(hot)
        for _ in range(2):
            await somebody.nar(hot)
            await proxy.idle()
    async with Visitor(proxy) as visitor:
        await visitor.narinfos(other)
        assert asked(cache, "/nar/") == nar_paths(hot)
        _ = fast_answers(proxy)
        await visitor.nar(hot)
        assert fast_answers(proxy) == ["nar"]
        await proxy.idle()

    assert asked(cache, "/nar/") == nar_paths(hot, other)


async def test_a_head_request_is_no_nar_request(sim: StartSimulator, start: Start) -> None:
    """Asking how large a NAR is does not mean to fetch any."""
    paths = entries("path", 3)
    cache = await sim(*paths)
    proxy = await start(cache, LIFTED_ONLY)
    async with Visitor(proxy) as visitor:
        await visitor.narinfos(*paths)
        assert (await visitor.pull(nar_url(paths[0]), "HEAD")).status == 200
        await proxy.idle()

    assert cache.gets("/nar/") == 0


def fast_answers(proxy: InsideProxy) -> list[str]:
    """Return the routes that the fast lane has answered on since the last time."""
    proxy.server.lane.flush()
    answers = [event for event in proxy.events if isinstance(event, FastlaneServed)]
    proxy.events[:] = [event for event in proxy.events if event not in answers]
    return [answer.route for answer in answers for _ in range(answer.requests)]


# --- clients that only ask ----------------------------------------------------------------------


async def test_a_client_that_only_asks_costs_the_budget_once(
    sim: StartSimulator, start: Start
) -> None:
    """It gets nothing ahead when it comes back with new questions; another client does."""
    paths = entries("path", 12, 1_000)
    cache = await sim(*paths)
    budget = 3 * len(paths[0].file)
    proxy = await start(cache, LookAhead(budget=budget))
    counts = []
    for visit in range(3):
        async with Visitor(proxy) as visitor:
            await visitor.narinfos(*paths[4 * visit : 4 * visit + 4])
            await proxy.idle()
        counts.append(cache.gets("/nar/"))
    assert counts == [3, 3, 3]
    async with Visitor(proxy, "127.0.0.2") as visitor:
        await visitor.narinfos(*paths)
        await proxy.idle()

    assert cache.gets("/nar/") == 6
    assert len(set(asked(cache, "/nar/"))) == 6


async def test_a_client_that_left_with_wishes_is_in_nobodys_way(
    sim: StartSimulator, start: Start
) -> None:
    """What a client wanted and could not have is over when it leaves; the next one is served."""
    large, small = entry("large", 50_000), entry("small", 1_000)
    cache = await sim(large, small)
    proxy = await start(cache, LookAhead(budget=10_000))
    for path in (large, small):
        async with Visitor(proxy) as visitor:
            await visitor.narinfos(path)
            await proxy.idle()

    assert asked(cache, "/nar/") == nar_paths(small)


async def test_a_client_that_fetched_has_a_whole_budget_again(
    sim: StartSimulator, start: Start
) -> None:
    """Who has fetched a NAR pays nothing for what was fetched ahead, however much it was."""
    paths = entries("path", 14, 1_000)
    cache = await sim(*paths)
    proxy = await start(cache, LookAhead(budget=3 * len(paths[0].file)))
    async with Visitor(proxy) as visitor:
        await visitor.narinfos(*paths[:10])
        await visitor.nar(paths[0])
        await proxy.idle()
    assert cache.gets("/nar/") == 10
    async with Visitor(proxy) as visitor:
        await visitor.narinfos(*paths[10:])
        await proxy.idle()

    assert cache.gets("/nar/") == 13


# --- a client that has left ---------------------------------------------------------------------


async def test_what_is_queued_ends_with_its_client(sim: StartSimulator, start: Start) -> None:
    """When a client leaves, lookups and downloads under way end, and no others begin."""
    leaves, wanted = entries("leaf", 20), entries("wanted", 20)
    root = entry("root", 100, *leaves)
    cache = await sim(root, *leaves, *wanted)
    lookups, downloads = Gate(None), Gate(None)
    cache.fault(one_of(narinfo_paths(*leaves)), lookups)
    cache.fault("/nar/", downloads)
    rules = LookAhead(connections=8)
    looked_up = cache.expect(one_of(narinfo_paths(*leaves)), rules.most)
    downloaded = cache.expect("/nar/", rules.most)
    proxy = await start(cache, rules)
    async with Visitor(proxy) as visitor:
        await visitor.narinfos(*wanted, root)
        await looked_up.wait()
        await downloaded.wait()
    lookups.open()
    downloads.open()
    await proxy.idle()

    assert (lookups.arrivals, downloads.arrivals) == (rules.most, rules.most)
    fetched = [path for path in wanted if cache.gets(path.nar_path)]
    assert {path.narinfo_path[1:] for path in fetched} <= proxy.kept
    assert proxy.partials == []


async def test_a_client_that_does_not_wait(sim: StartSimulator, start: Start) -> None:
    """A narinfo that comes when its client has left causes nothing."""
    leaf = entry("leaf")
    root = entry("root", 100, leaf)
    cache = await sim(root, leaf)
    gate = Gate(None)
    cache.fault(root.narinfo_path, gate)
    proxy = await start(cache)
    async with Visitor(proxy) as visitor:
        question = asyncio.create_task(visitor.pull(root.narinfo_path))
        await gate.reached.wait()
        question.cancel()
    gate.open()
    await proxy.until(lambda: proxy.observed(RequestServed))
    await proxy.idle()

    assert asked(cache) == [root.narinfo_path]


# --- the room in the store ----------------------------------------------------------------------


async def test_a_full_store(
    sim: StartSimulator, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without room nothing is fetched ahead, and narinfos are walked all the same."""
    monkeypatch.setattr(room, "overhead", lambda _layout: 0)
    leaf = entry("leaf")
    root = entry("root", 100_000, leaf)
    cache = await sim(root, leaf)
    proxy = await start(cache, limits=Limits(max_size=80_000))
    async with Visitor(proxy) as visitor:
        await visitor.narinfos(root)
        await proxy.idle()
        assert asked(cache, "/nar/") == []
        assert cache.gets(leaf.narinfo_path) == 1
        assert await visitor.nar(root) == "MISS"


# --- what clients see of it ---------------------------------------------------------------------


async def test_the_first_request_says_prefetched(sim: StartSimulator, start: Start) -> None:
    """X-Cache says PREFETCHED to the first who asks for what was fetched ahead, then HIT."""
    path = entry("path", 300_000)
    cache = await sim(path)
    proxy = await start(cache)
    async with Visitor(proxy) as visitor, Visitor(proxy, "127.0.0.2") as other:
        await visitor.narinfos(path)
        await proxy.idle()
        assert proxy.cache.ahead.unasked_bytes == len(path.file)
        assert await visitor.nar(path) == "PREFETCHED"
        assert proxy.cache.ahead.unasked_bytes == 0
        assert [await each.nar(path) for each in (visitor, other)] == ["HIT", "HIT"]

    assert cache.gets("/nar/") == 1


async def test_prefetched_while_it_arrives(sim: StartSimulator, start: Start) -> None:
    """The first who asks for what is still arriving reads along; then it is as any other NAR."""
    path = entry("path", 300_000)
    cache = await sim(path)
    gate = Gate(200_000)
    cache.fault("/nar/", gate)
    proxy = await start(cache)
    async with Visitor(proxy) as visitor:
        await visitor.narinfos(path)
        await gate.reached.wait()
        name = nar_url(path).removeprefix("/nar/")
        assert proxy.cache.ahead.is_unasked(name)
        first = asyncio.create_task(visitor.nar(path))
        await proxy.eventually(lambda: not proxy.cache.ahead.is_unasked(name))
        with await proxy.cache.nar(NarName.parse(name)) as second:
            assert second.result == "COALESCED"
        gate.open()
        assert await first == "PREFETCHED"
        await proxy.idle()
        assert await visitor.nar(path) == "HIT"

    assert proxy.cache.ahead.unasked_bytes == 0
    assert cache.gets("/nar/") == 1


LIES: dict[str, Fault] = {
    "corrupt": Corrupt(),
    "corrupt-early": Corrupt(0),
    "shorter": Shorter(),
    "cut": Cut(),
    "absent": Status(404),
    "denied": Status(403),
    "failing": Status(500),
    "page": Html(),
}


@pytest.mark.parametrize("lie", LIES)
async def test_what_fails_ahead(lie: str, sim: StartSimulator, start: Start) -> None:
    """It leaves nothing behind, and its client is answered as it would be without look-ahead."""
    path = entry("path", 200_000)
    cache = await sim(path)
    cache.fault("/nar/", LIES[lie])
    answers = []
    for rules in (ALL, LookAhead(narinfos=False, nars=False)):
        proxy = await start(cache, rules)
        async with Visitor(proxy) as visitor:
            await visitor.narinfos(path)
            await proxy.idle()
            assert cache.gets("/nar/") > 0
            assert (proxy.kept, proxy.partials) == (set(), [])
            assert proxy.cache.ahead.unasked_bytes == 0
            answers.append(await visitor.pull(nar_url(path)))
            await proxy.idle()
            assert (proxy.kept, proxy.partials) == (set(), [])

    with_it, without = answers
    assert (with_it.status, with_it.complete) == (without.status, without.complete)
    assert "X-Cache" not in with_it.headers or with_it.headers["X-Cache"] == "MISS"


@pytest.mark.parametrize("lie", [lie for lie in LIES if lie != "absent"])
async def test_what_failed_ahead_and_is_right_again(
    lie: str, sim: StartSimulator, start: Start
) -> None:
    """An upstream that has recovered when the client asks is asked again."""
    path = entry("path", 300_000)
    cache = await sim(path)
    fault = cache.fault("/nar/", LIES[lie])
    proxy = await start(cache)
    async with Visitor(proxy) as visitor:
        await visitor.narinfos(path)
        await proxy.idle()
        assert fault.hits > 0
        fault.lift()
        proxy.clock.now += 3_600
        assert await visitor.nar(path) == "MISS"


# --- hot narinfos -------------------------------------------------------------------------------


async def test_a_hot_narinfo_makes_its_nar_wanted(sim: StartSimulator, start: Start) -> None:
    """The fast lane tells the look-ahead, as long as the NAR is not here."""
    path = entry("path")
    cache = await sim(path)
    proxy = await start(cache, NARINFOS_ONLY)
    async with Visitor(proxy, "127.0.0.2") as somebody:
        await somebody.narinfos(path)
    assert cache.gets("/nar/") == 0
    proxy.prefetch.configure(NARS_ONLY)
    async with Visitor(proxy) as visitor:
        _ = fast_answers(proxy)
        await visitor.narinfos(path)
        assert fast_answers(proxy) == ["narinfo"]
        await proxy.idle()
        assert cache.gets("/nar/") == 1
        assert await visitor.nar(path) == "PREFETCHED"


async def test_a_narinfo_whose_nar_is_here_costs_nothing(sim: StartSimulator, start: Start) -> None:
    """What is in the store already is not taken from a client's budget, in the fast lane or not."""
    here, there = entry("here", 1_000), entry("there", 1_000)
    cache = await sim(here, there)
    proxy = await start(cache, LookAhead(budget=len(there.file)))
    async with Visitor(proxy, "127.0.0.2") as somebody:
        await somebody.narinfos(here)
        await somebody.nar(here)
        await proxy.idle()
    async with Visitor(proxy) as visitor:
        await visitor.narinfos(here, here, there)
        assert "narinfo" in fast_answers(proxy)
        await proxy.idle()

    assert asked(cache, "/nar/") == nar_paths(here, there)


# --- turned off ---------------------------------------------------------------------------------


@pytest.mark.parametrize("narinfos", [False, True])
@pytest.mark.parametrize("nars", [False, True])
async def test_each_part_can_be_turned_off(
    narinfos: bool,  # noqa: FBT001 - pytest gives it by name
    nars: bool,  # noqa: FBT001 - pytest gives it by name
    sim: StartSimulator,
    start: Start,
) -> None:
    """Walking and fetching do not need each other."""
    leaf = entry("leaf")
    root = entry("root", 100, leaf)
    cache = await sim(root, leaf)
    proxy = await start(cache, LookAhead(narinfos=narinfos, nars=nars))
    async with Visitor(proxy) as visitor:
        await visitor.narinfos(root)
        await proxy.idle()

    assert narinfos_asked(cache) == narinfo_paths(root, *([leaf] if narinfos else []))
    assert asked(cache, "/nar/") == nar_paths(*([root] if nars else []))


# --- the daemon ---------------------------------------------------------------------------------


def prefetch_table(*, narinfos: bool = True, nars: bool = True, budget: str = "64MiB") -> str:
    """Write a table that says all that can be said, whatever the defaults are."""
    return (
        f"[prefetch]\nnarinfos = {str(narinfos).lower()}\n"
        f'nars = "{"wanted" if nars else "off"}"\nbudget = "{budget}"'
    )


def measured(proxy: DaemonProcess) -> DaemonProcess:
    """Return a daemon once it knows how much room there is: until then it fetches no NAR ahead."""
    eventually(lambda: proxy.metric("store_scanned") == 1)
    return proxy


def test_unasked_bytes_are_a_metric(threaded_sim: RunSimulator, daemon: RunDaemon) -> None:
    """``prefetched_unasked_bytes`` is what was fetched ahead, less what was asked for since."""
    paths = [entry(f"path-{size}", size) for size in (1_000, 20_000, 300_000)]
    proxy = measured(daemon(threaded_sim(*paths).url, config=prefetch_table()))
    assert proxy.metric("prefetched_unasked_bytes") == 0
    unasked = 0
    for path in paths:
        unasked += len(path.file)
        proxy.get(path.narinfo_path)
        eventually(lambda: proxy.metric("prefetched_unasked_bytes") == unasked)  # noqa: B023
    for path in paths:
        assert proxy.get(nar_url(path)) == bytes(path.file)
        unasked -= len(path.file)
        assert proxy.metric("prefetched_unasked_bytes") == unasked
    everything = sum(len(path.file) for path in paths)
    assert proxy.metric("response_bytes_total", result="PREFETCHED") == everything


def test_a_reload_changes_it(
    threaded_sim: RunSimulator, daemon: RunDaemon, key: SigningKey
) -> None:
    """SIGHUP turns each part of the look-ahead on and off."""
    leaves = entries("leaf", 4)
    roots = [entry(f"root-{number}", 100, leaf) for number, leaf in enumerate(leaves)]
    upstream = threaded_sim(*leaves, *roots)
    proxy = measured(daemon(upstream.url))
    rules = [(False, False), (True, False), (False, True), (True, True)]
    for (narinfos, nars), root, leaf in zip(rules, roots, leaves, strict=True):
        config = prefetch_table(narinfos=narinfos, nars=nars)
        proxy.configure(upstreams=[upstream.url], keys=[key.public], config=config)
        reload(proxy)
        proxy.get(root.narinfo_path)
        if narinfos:
            upstream.expect(leaf.narinfo_path).block()
        if nars:
            upstream.expect(root.nar_path).block()

    assert [upstream.gets(leaf.narinfo_path) for leaf in leaves] == [0, 1, 0, 1]
    assert [upstream.gets(root.nar_path) for root in roots] == [0, 0, 1, 1]


CLOSURE = closure(60, sizes=(1_000, 200_000))


@pytest.mark.needs("nix", "nix-store")
@pytest.mark.parametrize("budget", ["0B", "1MB", "64MiB"])
@pytest.mark.parametrize("command", ["copy", "realise"])
def test_a_closure_pulled_by_nix(
    command: str, budget: str, nix: NixClient, threaded_sim: RunSimulator, daemon: RunDaemon
) -> None:
    """Through a cold proxy it costs one narinfo and one NAR for each path, and nothing is wasted."""
    upstream = threaded_sim(*CLOSURE)
    proxy = measured(daemon(upstream.url, config=prefetch_table(budget=budget)))
    root = CLOSURE[0].store_path
    done = (
        nix.copy_from(proxy.url, root)
        if command == "copy"
        else nix.realise(root, substituters=[proxy.url])
    )
    assert done.returncode == 0, done.stderr
    assert nix.installed() == {path.base_name for path in CLOSURE}
    for path in CLOSURE:
        assert nix.dump(path.store_path) == bytes(path.nar), path.name

    assert sorted(asked(upstream)) == sorted([*narinfo_paths(*CLOSURE), *nar_paths(*CLOSURE)])
    assert proxy.metric("prefetched_unasked_bytes") == 0
    assert budget == "0B" or proxy.metric("response_bytes_total", result="PREFETCHED") > 0
    assert proxy.metric("faults_total") == proxy.metric("verification_failures_total") == 0


@pytest.mark.needs("nix", "nix-store")
def test_what_nix_has_already_is_not_fetched(
    nix: NixClient, threaded_sim: RunSimulator, daemon: RunDaemon
) -> None:
    """Of a closure of which a part is installed, only the rest is fetched."""
    upstream = threaded_sim(*CLOSURE)
    half, root = CLOSURE[5], CLOSURE[0]
    proxy = daemon(upstream.url)
    assert nix.copy_from(proxy.url, half.store_path).returncode == 0
    proxy.stop()
    upstream.reset_counts()
    cold = daemon(upstream.url, config=prefetch_table())
    had = nix.installed()
    done = nix.realise(root.store_path, substituters=[cold.url])
    assert done.returncode == 0, done.stderr
    rest = [path for path in CLOSURE if path.base_name not in had]
    assert nix.installed() - had == {path.base_name for path in rest}
    assert sorted(asked(upstream, "/nar/")) == sorted(nar_paths(*rest))
    assert len(set(narinfos_asked(upstream))) == len(narinfos_asked(upstream))
    assert cold.metric("prefetched_unasked_bytes") == 0


@pytest.mark.parametrize("connections", [2, 3, 4, 32])
async def test_own_requests_find_a_connection(
    connections: int, sim: StartSimulator, start: Start
) -> None:
    """With all its connections busy, the look-ahead keeps nobody from a narinfo or a NAR."""
    wanted, leaves = entries("wanted", 40), entries("leaf", 40)
    root, own = entry("root", 100, *leaves), entry("own")
    cache = await sim(root, own, *wanted, *leaves)
    rules = LookAhead(connections=connections)
    proxy = await start(cache, rules)
    gate = Gate(None)
    cache.fault(one_of(nar_paths(root, *wanted), narinfo_paths(*leaves)), gate)
    busy = cache.expect(one_of(nar_paths(root, *wanted), narinfo_paths(*leaves)), 2 * rules.most)
    async with Visitor(proxy) as visitor:
        async with asyncio.timeout(SOON):
            await visitor.narinfos(*wanted, root)
            await busy.wait()
            await visitor.narinfos(own)
            assert await visitor.nar(own) == "MISS"
        assert gate.arrivals == 2 * rules.most
        gate.open()


async def test_sizes_that_nobody_says(sim: StartSimulator, start: Start) -> None:
    """Without FileSize a NAR counts as what is signed, so a large one does not slip through."""
    small, large = (
        entry(f"path-{size}", size).but(fields={"FileSize": None}) for size in (1_000, 3_000_000)
    )
    cache = await sim(small, large)
    proxy = await start(cache, LookAhead(budget=2_000_000))
    async with Visitor(proxy) as visitor:
        await visitor.narinfos(large, small)
        await proxy.idle()

    assert asked(cache, "/nar/") == nar_paths(small)


async def test_what_was_not_walked_is_walked_for_the_next(
    sim: StartSimulator, start: Start
) -> None:
    """What a client left unwalked is walked when the next one asks for the same root."""
    third = entry("third")
    second = entry("second", 100, third)
    first = entry("first", 100, second)
    root = entry("root", 100, first)
    cache = await sim(root, first, second, third)
    gate = Gate(None)
    cache.fault(second.narinfo_path, gate)
    proxy = await start(cache, NARINFOS_ONLY)
    async with Visitor(proxy) as visitor:
        await visitor.narinfos(root)
        await gate.reached.wait()
    gate.open()
    await proxy.idle()
    assert cache.gets(third.narinfo_path) == 0
    async with Visitor(proxy) as visitor:
        await visitor.narinfos(root)
        await proxy.idle()

    assert narinfos_asked(cache) == narinfo_paths(root, first, second, third)


async def test_one_that_leaves_takes_nothing_from_another(
    sim: StartSimulator, start: Start
) -> None:
    """Two clients want the same; what one has queued is done for the other."""
    leaves = entries("leaf", 12)
    root = entry("root", 100, *leaves)
    cache = await sim(root, *leaves)
    gate = Gate(None)
    held_up = cache.fault(one_of(narinfo_paths(*leaves)), gate)
    rules = LookAhead(connections=8)
    busy = cache.expect(one_of(narinfo_paths(*leaves)), rules.most)
    proxy = await start(cache, rules)
    async with Visitor(proxy, "127.0.0.2") as stays:
        async with Visitor(proxy) as leaves_early:
            await leaves_early.narinfos(root)
            await busy.wait()
            await stays.narinfos(root)
        held_up.lift()
        gate.open()
        await proxy.idle()

    assert narinfos_asked(cache) == narinfo_paths(root, *leaves)


async def test_nothing_is_evicted_for_it(
    sim: StartSimulator, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was asked for stays; what is fetched ahead takes only the room that is left."""
    monkeypatch.setattr(room, "overhead", lambda _layout: 0)
    monkeypatch.setattr(index, "COMMIT_INTERVAL", 0.2)
    asked_for, ahead = entry("asked-for", 7_000_000), entries("ahead", 10, 1_000_000)
    cache = await sim(asked_for, *ahead)
    proxy = await start(
        cache, LookAhead(narinfos=False, nars=False), limits=Limits(max_size=10_000_000)
    )
    async with Visitor(proxy, "127.0.0.2") as visitor:
        await visitor.narinfos(asked_for)
        await visitor.nar(asked_for)
        await proxy.idle()
    await proxy.eventually(lambda: proxy.store.room < 3_000_000)
    proxy.prefetch.configure(NARS_ONLY)
    async with Visitor(proxy) as visitor:
        await visitor.narinfos(*ahead)
        await proxy.idle()
        fetched = [path for path in ahead if cache.gets(path.nar_path)]
        await proxy.eventually(lambda: proxy.store.totals.paths == 1 + len(fetched))
        assert await visitor.nar(asked_for) == "HIT"

    assert 1 <= len(fetched) <= 2
    assert proxy.observed(Evicted) == []
    assert proxy.store.totals.bytes <= 9_500_000


# --- who goes first, and what counts ------------------------------------------------------------


async def test_what_was_evicted_is_fetched_ahead_again(
    sim: StartSimulator, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That a NAR was here once keeps nobody from fetching it ahead, now that it is gone."""
    monkeypatch.setattr(index, "COMMIT_INTERVAL", 0.05)
    first = entry("first", 300_000)
    cache = await sim(first)
    proxy = await start(cache, NARS_ONLY)
    async with Visitor(proxy) as visitor:
        await visitor.narinfos(first)
        assert await visitor.nar(first) == "PREFETCHED"
        await proxy.idle()
    proxy.store.index._room._limits = Limits(max_size=1)
    await proxy.until(lambda: proxy.observed(Evicted))
    proxy.store.index._room._limits = UNLIMITED
    await proxy.eventually(lambda: proxy.cache.room > 300_000)
    async with Visitor(proxy, "127.0.0.2") as visitor:
        await visitor.narinfos(first)
        await proxy.idle()
        assert cache.gets(first.nar_path) == 2
        assert await visitor.nar(first) == "PREFETCHED"


async def test_room_counts_what_is_on_its_way(sim: StartSimulator, start: Start) -> None:
    """What a client is downloading itself leaves that much less room for what is fetched ahead."""
    own, ahead = entry("own", 700_000), entry("ahead", 500_000)
    cache = await sim(own, ahead)
    gate = Gate(100_000)
    cache.fault(own.nar_path, gate)
    off = LookAhead(narinfos=False, nars=False)
    proxy = await start(cache, off, limits=Limits(max_size=1_000_000))
    async with Visitor(proxy) as visitor:
        await visitor.narinfos(own)
        download = asyncio.create_task(visitor.nar(own))
        await gate.reached.wait()
        proxy.prefetch.configure(NARS_ONLY)
        await visitor.narinfos(ahead)
        assert proxy.prefetch._downloads == set()
        gate.open()
        await download
        await proxy.idle()
    assert cache.gets(ahead.nar_path) == 0


async def test_on_its_way_already_costs_no_budget(sim: StartSimulator, start: Start) -> None:
    """A NAR that somebody is downloading is not charged to another who asks for its narinfo."""
    busy, cheap = entry("busy", 300_000), entry("cheap", 300_000)
    cache = await sim(busy, cheap)
    gate = Gate(100_000)
    cache.fault(busy.nar_path, gate)
    proxy = await start(cache, replace(NARS_ONLY, budget=len(cheap.file)))
    async with Visitor(proxy, "127.0.0.2") as other, Visitor(proxy) as visitor:
        download = asyncio.create_task(other.pull(nar_url(busy)))
        await gate.reached.wait()
        await visitor.narinfos(busy, cheap)
        await cache.expect(cheap.nar_path).wait()
        gate.open()
        assert (await download).complete
        await proxy.idle()


async def test_a_client_comes_for_what_waits(sim: StartSimulator, start: Start) -> None:
    """What is queued ahead of clients for a connection goes first once its client has come."""
    paths = [entry(f"path{number}", 300_000 + number) for number in range(6)]
    cache = await sim(*paths)
    proxy = await start(cache, replace(NARS_ONLY, connections=16))
    slots = proxy.failover.sources[0].upstream._nar_slots
    while slots.take_free():
        pass  # by somebody else
    async with Visitor(proxy) as visitor:
        await visitor.narinfos(*paths)
        await proxy.eventually(lambda: len(slots._waiting) == len(paths))
        wanted = asyncio.create_task(visitor.nar(paths[5]))
        name = nar_url(paths[5]).removeprefix("/nar/")
        await proxy.eventually(lambda: not proxy.cache.ahead.is_unasked(name))
        slots.give_back()
        assert await wanted == "PREFETCHED"
        await proxy.idle()
    assert asked(cache, "/nar/")[0] == paths[5].nar_path
    assert sorted(asked(cache, "/nar/")) == sorted(nar_paths(*paths))


async def test_clients_take_turns(sim: StartSimulator, start: Start) -> None:
    """Who comes while another one's closure is being fetched does not wait for the end of that."""
    many, few = entries("many", 30, 1_000), entries("few", 3, 300_000)
    cache = await sim(*many, *few)
    gate = Gate(None)
    cache.fault("/nar/", gate)
    proxy = await start(cache, replace(NARS_ONLY, connections=8))
    async with Visitor(proxy) as early, Visitor(proxy, "127.0.0.2") as late:
        await early.narinfos(*many)
        await late.narinfos(*few)
        gate.open()
        await proxy.idle()
    order = asked(cache, "/nar/")
    assert len(order) == len(many) + len(few)
    assert max(order.index(path.nar_path) for path in few) < 15


async def test_what_was_asked_leads_to_what_is_asked_next(
    sim: StartSimulator, start: Start
) -> None:
    """What a client's latest question refers to is looked up before what older ones refer to."""
    old, new = entries("old", 40), entries("new", 3)
    first, second = entry("first", 100, *old), entry("second", 100, *new)
    cache = await sim(first, second, *old, *new)
    gate = Gate(None)
    for path in (*old, *new):
        cache.fault(path.narinfo_path, gate)
    proxy = await start(cache, replace(NARINFOS_ONLY, connections=8))
    async with Visitor(proxy) as visitor:
        await visitor.narinfos(first, second)
        gate.open()
        await proxy.idle()
    order = [path for path in asked(cache) if path.endswith(".narinfo")]
    assert max(order.index(path.narinfo_path) for path in new) < 12


async def test_how_large_it_is_counts_for_nothing(sim: StartSimulator, start: Start) -> None:
    """A HEAD request has not come for what was fetched ahead; the first GET has, and is counted."""
    path = entry("path", 300_000)
    cache = await sim(path)
    proxy = await start(cache)
    async with Visitor(proxy) as visitor:
        await visitor.narinfos(path)
        await proxy.idle()
        await visitor.pull(nar_url(path), "HEAD")
        assert proxy.cache.ahead.unasked_bytes == len(path.file)
        assert await visitor.nar(path) == "PREFETCHED"
    assert [each.size for each in proxy.observed(FetchedAhead)] == [len(path.file)]
    assert [each.size for each in proxy.observed(AskedAhead)] == [len(path.file)]
