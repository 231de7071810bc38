"""A larger NAR of the store takes the fast lane, too, and is sent from its file."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from proxy.answers import NarAtHand
from proxy.events import FastlaneServed, Fault
from proxy.nix.nar_name import NarName
from proxy.prefetch import LookAhead
from proxy.server import fastlane
from proxy.server.fastlane import SMALL_NAR, SOON
from proxy.store.eviction import Limits
from proxy.store.files import BEGINNING
from proxy.store.pages import STRIDE
from tests.closures import StoreEntry
from tests.conftest import StartSimulator
from tests.inside import InsideProxy
from tests.server.hot import KEY, InMemoryProxy, hot_proxy
from tests.server.lane import HARMS, Lane, is_made_good, the_long_way
from tests.server.piecewise import (
    Piecewise,
    answers,
    connections,
    plain,
    through_the_lane,
    turns,
)
from tests.simulator import BinaryCacheSimulator
from tests.wire import Wire

pytestmark = pytest.mark.timeout(60)

ENTRY = StoreEntry.make("medium-1.0", random.Random(4).randbytes(600_000), compression="none")
FILE = bytes(ENTRY.file)
NARINFO = ENTRY.narinfo_path
NAR = f"/nar/{ENTRY.hash_part}-{ENTRY.nar_hash}.nar"
LITTLE = 4_096
"""Bytes: the kernel's buffer for a client that is far behind."""


@pytest.fixture
async def cache(sim: StartSimulator) -> BinaryCacheSimulator:
    """Return an upstream."""
    return await sim(ENTRY)


@pytest.fixture
async def proxy(cache: BinaryCacheSimulator, tmp_path: Path) -> AsyncIterator[InsideProxy]:
    """Return a proxy that has the NAR in its store, and knows its narinfo."""
    async with hot_proxy(tmp_path, cache) as running:
        assert (await running.pull(await running.nar_url(ENTRY.hash_part))).body == FILE
        await running.idle()
        yield running


@asynccontextmanager
async def client_of(
    proxy: InsideProxy, *, send_buffer: int | None = None
) -> AsyncIterator[Piecewise]:
    """Connect a client that has sent a plain request before."""
    server = connections(proxy.server)
    async with Piecewise(server, send_buffer=send_buffer) as client:
        await client.ask(plain("/healthz"))
        yield client
    await server.shutdown(1)


def open_files(proxy: InsideProxy) -> int:
    """Return how many descriptors this process has of the NAR."""
    nar = str(proxy.folder / NAR[1:])
    count = 0
    for each in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):  # another thread's, closed since
            count += str(each.readlink()) == nar
    return count


def bodies(received: bytes) -> list[bytes]:
    """Return the bodies of what a server sent."""
    return [answer.body for answer in answers(received)]


async def test_each_request(proxy: InsideProxy) -> None:
    """Each answer is the same as the long way's, byte by byte, and nothing is kept in memory or left open."""
    right = await the_long_way(proxy, NAR)
    assert right.body == FILE
    async with Lane(proxy) as lane:
        for _ in range(5):
            assert await lane.ask(NAR) == (right, True)
        assert open_files(proxy) == 0
    assert len(proxy.server.lane._nars) == 0


@pytest.mark.parametrize(
    ("size", "pause", "is_kept"),
    [
        pytest.param(BEGINNING // 2, SOON, True, id="tiny"),
        pytest.param(BEGINNING * 2, 0.99 * SOON, True, id="asked for again soon"),
        pytest.param(BEGINNING * 2, SOON, False, id="asked for again later"),
        pytest.param(SMALL_NAR * 2, 0.0, False, id="not small"),
    ],
)
async def test_what_is_taken_into_memory(
    sim: StartSimulator, tmp_path: Path, size: int, pause: float, *, is_kept: bool
) -> None:
    """A small NAR is, when it is asked for twice in a second: who pulls a closure asks once for each."""
    entry = StoreEntry.make("some-1.0", random.Random(5).randbytes(size), compression="none")
    nar = f"/nar/{entry.hash_part}-{entry.nar_hash}.nar"
    cache = await sim(entry)
    async with hot_proxy(tmp_path, cache) as proxy:
        assert (await proxy.pull(await proxy.nar_url(entry.hash_part))).complete
        await proxy.idle()
        right = await the_long_way(proxy, nar)
        proxy.server.lane.forget_nars()
        async with Lane(proxy) as lane:
            assert await lane.ask(nar) == (right, True)
            assert len(proxy.server.lane._nars) == (size < BEGINNING)
            proxy.clock.now += pause
            assert await lane.ask(nar) == (right, True)
            assert len(proxy.server.lane._nars) == is_kept


async def test_a_client_that_is_behind(proxy: InsideProxy) -> None:
    """What the kernel does not take at once follows, and only then what was asked for meanwhile."""
    before = through_the_lane(proxy)
    async with client_of(proxy, send_buffer=LITTLE) as client:
        client.feed(plain(NAR))
        assert 0 < proxy.server.lane.held < len(FILE)
        assert through_the_lane(proxy) == before + 1
        client.feed(plain(NARINFO))
        await client.settled()
        nar, narinfo = bodies(client.received())
        assert (nar, narinfo[:10]) == (FILE, b"StorePath:")
        assert proxy.server.lane.held == 0
        assert open_files(proxy) == 0


async def test_what_is_held_is_bounded(proxy: InsideProxy, monkeypatch: pytest.MonkeyPatch) -> None:
    """While slow clients have left too much in memory, NARs take the long way, which holds nothing."""
    monkeypatch.setattr(fastlane, "MOST_HELD", len(FILE) // 2)
    async with (
        client_of(proxy, send_buffer=LITTLE) as slow,
        client_of(proxy, send_buffer=LITTLE) as leaving,
        client_of(proxy) as other,
    ):
        slow.feed(plain(NAR))
        before = through_the_lane(proxy)
        assert bodies(await other.ask(plain(NAR))) == [FILE]
        assert through_the_lane(proxy) == before

        await slow.settled()
        assert bodies(slow.received()) == [FILE]
        assert bodies(await other.ask(plain(NAR))) == [FILE]
        assert through_the_lane(proxy) == before + 1

        leaving.feed(plain(NAR))
        assert proxy.server.lane.held > len(FILE) // 2
        leaving.transport.abort()
        await leaving.settled()
        assert proxy.server.lane.held == 0


async def test_a_daemon_that_stops(proxy: InsideProxy) -> None:
    """What a slow client has not got yet is under way, and is given to it before the connection ends."""
    server = connections(proxy.server)
    async with Piecewise(server, send_buffer=LITTLE) as client:
        await client.ask(plain("/healthz"))
        client.feed(plain(NAR))
        server.pre_shutdown()
        stopping = asyncio.create_task(server.shutdown(20))
        await turns(100)
        assert not stopping.done()
        await client.settled()
        await stopping
        assert bodies(client.received()) == [FILE]
        assert not client.open


async def test_a_daemon_that_stops_has_other_things_to_do(proxy: InsideProxy) -> None:
    """A client that does not read holds a daemon up for as long as it may, and no longer."""
    server = connections(proxy.server)
    async with Piecewise(server, send_buffer=LITTLE) as client:
        await client.ask(plain("/healthz"))
        client.feed(plain(NAR))
        server.pre_shutdown()
        async with asyncio.timeout(20):
            await server.shutdown(0.1)
        assert not client.open


@pytest.mark.parametrize("harm", HARMS)
async def test_what_is_not_as_it_should_be(
    proxy: InsideProxy, harm: Callable[[Path], None]
) -> None:
    """A NAR of another length, or that is gone, takes the long way, which makes it good."""
    await is_made_good(proxy, NAR, harm)


async def test_what_is_not_in_memory(proxy: InsideProxy, monkeypatch: pytest.MonkeyPatch) -> None:
    """A NAR of which a page is on the disk takes the long way, and nobody waits for that."""
    looked_at = []

    def last_page_is_missing(_: int, start: int, stop: int) -> None:
        looked_at.append((start, stop))
        raise BlockingIOError

    monkeypatch.setattr("proxy.store.files.look_at", last_page_is_missing)
    async with Lane(proxy) as lane:
        answer, took_it = await lane.ask(NAR)
        assert (answer.body, took_it) == (FILE, False)
        assert open_files(proxy) == 0
    assert looked_at == [(STRIDE, len(FILE))]


@pytest.mark.parametrize("send_buffer", [None, LITTLE])
async def test_a_file_that_becomes_shorter(
    proxy: InsideProxy, monkeypatch: pytest.MonkeyPatch, send_buffer: int | None
) -> None:
    """A NAR that is cut short while it is sent is never taken for whole: the connection ends."""
    at_hand = proxy.cache.nar_at_hand

    def then_shorter(name: NarName, most: int, read: int) -> NarAtHand | None:
        nar = at_hand(name, most, read)
        os.truncate(proxy.folder / NAR[1:], len(FILE) // 2)
        return nar

    monkeypatch.setattr(proxy.cache, "nar_at_hand", then_shorter)
    async with client_of(proxy, send_buffer=send_buffer) as client:
        received = await client.ask(plain(NAR))
        assert not client.open
    assert len(received) < len(FILE)
    assert not proxy.observed(Fault)


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
        before = through_the_lane(proxy)
        results = [(await wire.ask(NAR)).headers["x-cache"] for _ in range(3)]
        assert results == ["PREFETCHED", "HIT", "HIT"]
        assert through_the_lane(proxy) == before + 3
        told = {event.result: event for event in proxy.observed(FastlaneServed)}
        assert (told["PREFETCHED"].requests, told["PREFETCHED"].body_bytes) == (1, len(FILE))
        assert told["HIT"].body_bytes == 2 * len(FILE)
    assert cache.gets("/nar/*") == 1
