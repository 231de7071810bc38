"""A small NAR of the store takes the fast lane also when nobody has asked for it yet, if that is safe."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from proxy.events import AskedAhead, FastlaneServed
from proxy.prefetch import LookAhead
from proxy.store import index
from proxy.store.eviction import Limits
from tests.closures import StoreEntry
from tests.conftest import RunDaemon, RunSimulator
from tests.daemon import DaemonProcess
from tests.inside import InsideProxy
from tests.memory import InMemory
from tests.server.hot import KEY, NAR, NARINFO, SMALL, InMemoryProxy, hot_proxy
from tests.server.lane import HARMS, Lane, is_made_good, the_long_way
from tests.server.piecewise import through_the_lane
from tests.simulator import BinaryCacheSimulator
from tests.wire import Wire

pytestmark = pytest.mark.timeout(60)

FILE = bytes(SMALL.file)


@pytest.fixture
async def proxy(cache: BinaryCacheSimulator, tmp_path: Path) -> AsyncIterator[InsideProxy]:
    """Return a proxy that has a NAR in its store, and knows its narinfo; nobody has asked it for the NAR."""
    async with hot_proxy(tmp_path, cache) as before:
        assert (await before.pull(await before.nar_url(SMALL.hash_part))).body == FILE
        await before.idle()
    async with hot_proxy(tmp_path, cache) as running:
        await running.nar_url(SMALL.hash_part)
        yield running


async def test_the_first_request(proxy: InsideProxy) -> None:
    """The first answer is the same as the long way's, byte by byte, and so is the next one."""
    async with Lane(proxy) as lane:
        first, took_it = await lane.ask(NAR)
        assert took_it
        assert (first.body, b"X-Cache: HIT" in first.headers) == (FILE, True)
        assert await lane.ask(NAR) == (first, True)
        assert await the_long_way(proxy, NAR) == first


async def test_an_unknown_narinfo(proxy: InsideProxy) -> None:
    """Where the narinfo is not in memory, the long way verifies it first."""
    proxy.cache._known.use(proxy.failover)
    async with Lane(proxy) as lane:
        answer, took_it = await lane.ask(NAR)
        assert (answer.body, took_it) == (FILE, False)


@pytest.mark.parametrize("harm", HARMS)
async def test_what_is_not_as_it_should_be(
    proxy: InsideProxy, harm: Callable[[Path], None]
) -> None:
    """A NAR of another length, or that is gone, takes the long way, which makes it good."""
    await is_made_good(proxy, NAR, harm)


async def test_half_a_path(proxy: InsideProxy) -> None:
    """A NAR whose narinfo is gone takes the long way."""
    (proxy.folder / NARINFO[1:]).unlink()
    async with Lane(proxy) as lane:
        answer, took_it = await lane.ask(NAR)
        assert (answer.body, took_it) == (FILE, False)


async def test_what_is_condemned(proxy: InsideProxy) -> None:
    """A damaged NAR that could not be moved away is nowhere to be had, though it lies there."""
    proxy.store._quarantine._condemned.add(proxy.folder / NAR[1:])
    async with Lane(proxy) as lane:
        answer, took_it = await lane.ask(NAR)
        assert (answer.body, b"X-Cache: MISS" in answer.headers, took_it) == (FILE, True, False)


async def test_a_closed_lane(proxy: InsideProxy) -> None:
    """While the daemon stops, nothing is answered here, which has to be told."""
    proxy.server.lane.open = False
    async with Lane(proxy) as lane:
        answer, took_it = await lane.ask(NAR)
        assert (answer.body, took_it) == (FILE, False)


async def test_use_is_noted(proxy: InsideProxy, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first request counts as use, also when the NAR is in memory no longer at the end of the second."""
    later = int(time.time()) + 10_000
    async with Lane(proxy) as lane:
        proxy.server.lane.flush()  # or its narinfo counts as use
        monkeypatch.setattr(
            index, "time", SimpleNamespace(time=lambda: later, monotonic=time.monotonic)
        )
        assert (await lane.ask(NAR))[1]
        proxy.server.lane.forget_nars()
        proxy.server.lane.flush()
    uses = await index_says(proxy, "SELECT at FROM used WHERE name = ?", NAR[1:])
    assert uses == [later]


async def index_says(proxy: InsideProxy, query: str, *values: str) -> list[object]:
    """Return what the index answers once it has written what was noted."""
    rows: list[object] = []

    def answered() -> bool:
        asked = proxy.store.index.ask(
            lambda database: [row[0] for row in database._connection.execute(query, values)]
        )
        rows[:] = asked.result(20)
        return bool(rows)

    await proxy.eventually(answered)
    return rows


async def test_what_was_fetched_ahead(cache: BinaryCacheSimulator, tmp_path: Path) -> None:
    """The first client to come for what was fetched ahead is told so, and counted; the next one has a hit."""
    ahead = LookAhead(narinfos=False)
    async with (
        InMemoryProxy(
            tmp_path, cache.url, keys=[KEY.public], look_ahead=ahead, limits=Limits()
        ) as proxy,
        Wire(proxy.url) as wire,
    ):
        await proxy.eventually(lambda: proxy.store.room)
        assert (await wire.ask(NARINFO)).status == 200
        await proxy.idle()
        assert proxy.cache.ahead.unasked_bytes == len(FILE)
        before = through_the_lane(proxy)
        results = [(await wire.ask(NAR)).headers["x-cache"] for _ in range(3)]
        assert results == ["PREFETCHED", "HIT", "HIT"]
        assert through_the_lane(proxy) == before + 3
        assert proxy.cache.ahead.unasked_bytes == 0
        assert [event.size for event in proxy.observed(AskedAhead)] == [len(FILE)]
        told = {event.result: event for event in proxy.observed(FastlaneServed)}
        assert (told["PREFETCHED"].requests, told["PREFETCHED"].body_bytes) == (1, len(FILE))
        assert told["HIT"].body_bytes == 2 * len(FILE)
    assert cache.gets("/nar/*") == 1


@pytest.mark.parametrize("workers", [1, 2])
async def test_after_a_restart(threaded_sim: RunSimulator, daemon: RunDaemon, workers: int) -> None:
    """A daemon that has just been started gives its NARs away like that, with workers as well."""
    many = [
        StoreEntry.make(f"one-of-many-{number}", bytes(size), compression="none")
        for number, size in enumerate((3_000, 300_000) * 8)
    ]
    targets = [f"/nar/{each.hash_part}-{each.nar_hash}.nar" for each in many]
    proxy = daemon(threaded_sim(*many).url, workers=workers)
    async with Wire(proxy.url) as wire:
        for each, target in zip(many, targets, strict=True):
            await wire.ask(each.narinfo_path)
            assert (await wire.ask(target)).body == bytes(each.file)
    proxy.wait_for_log("stored", len(many))
    proxy.stop()
    assert not nars_served(proxy)
    proxy.start()
    with InMemory((proxy.store / "nar").iterdir()):
        async with Wire(proxy.url) as wire:
            await wire.ask("/healthz")  # teaches a worker what plain requests are
            for each, target in zip(many, targets, strict=True):
                assert (await wire.ask(each.narinfo_path)).headers["x-cache"] == "HIT"
                assert (await wire.ask(target)).body == bytes(each.file)
    proxy.stop()
    assert nars_served(proxy) == len(many)


def nars_served(proxy: DaemonProcess) -> int:
    """Return how many requests for NARs a log says that took the fast lane."""
    return sum(line["requests"] for line in proxy.logged("requests") if line["route"] == "nar")
