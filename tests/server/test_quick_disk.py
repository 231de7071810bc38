"""Small files that are not in memory: a quick disk is waited for in the fast lane, for a moment."""

from __future__ import annotations

import asyncio
import errno
import mmap
import os
import random
import threading
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from proxy.events import Fault
from proxy.server.connection import DISK_TURNS, REGULAR
from proxy.server.listening import listening
from proxy.store import files, pages
from proxy.store.files import BEGINNING, OpenFile
from proxy.store.pages import LITTLE
from tests.closures import StoreEntry
from tests.conftest import StartSimulator
from tests.memory import drop_pages, pages_in_memory
from tests.server.hot import ABSENT, KEY, InMemoryProxy
from tests.server.piecewise import through_the_lane
from tests.wire import Wire

pytestmark = pytest.mark.timeout(60)

ENTRIES = [
    StoreEntry.make(f"one-{size}", random.Random(size).randbytes(size), compression="none")
    for size in (BEGINNING // 2, 3 * BEGINNING, LITTLE + 1)
]
NARINFO = ENTRIES[0].narinfo_path
TINY, SMALL, MEDIUM = (f"/nar/{each.hash_part}-{each.nar_hash}.nar" for each in ENTRIES)
FROM_THE_DISK = [
    pytest.param(NARINFO, id="narinfo"),
    pytest.param(TINY, id="tiny NAR"),
    pytest.param(SMALL, id="small NAR"),
]


@pytest.fixture
async def proxy(sim: StartSimulator, tmp_path: Path) -> AsyncIterator[InMemoryProxy]:
    """Return a proxy that has all of them in its store, and knows their narinfos."""
    cache = await sim(*ENTRIES)
    async with InMemoryProxy(tmp_path, cache.url, keys=[KEY.public], negative_ttl=60) as running:
        for each in ENTRIES:
            assert (await running.pull(await running.nar_url(each.hash_part))).complete
        await running.idle()
        yield running


class Disk:
    """A disk that has a file in memory when it was asked a number of times."""

    def __init__(self, proxy: InMemoryProxy, monkeypatch: pytest.MonkeyPatch) -> None:
        self._proxy = proxy
        self._looks = 0
        self.late = 0
        self.asked = asyncio.Event()
        self._look_at, self._read = pages.look_at, pages.read_in_memory
        for module in (pages, files):
            monkeypatch.setattr(module, "look_at", self.look_at)
        monkeypatch.setattr(files, "read_in_memory", self.read_in_memory)

    def forget(self, target: str, late: int) -> None:
        """Have a target on the disk, and in memory after ``late`` looks."""
        if target == NARINFO:
            self._proxy.cache.use(self._proxy.failover, negative_ttl=60.0)
        self._proxy.server.lane.forget_nars()
        self._looks = 0
        self.late = late

    def look_at(self, fd: int, start: int, stop: int) -> None:
        """As `pages.look_at`."""
        self._turn()
        self._look_at(fd, start, stop)

    def read_in_memory(self, fd: int, start: int, count: int) -> bytearray:
        """As `pages.read_in_memory`."""
        self._turn()
        return self._read(fd, start, count)

    def _turn(self) -> None:
        self._looks += 1
        if self._looks <= self.late:
            self.asked.set()
            raise BlockingIOError


@pytest.fixture
def disk(proxy: InMemoryProxy, monkeypatch: pytest.MonkeyPatch) -> Disk:
    """Return a disk that is quick until it is told otherwise."""
    return Disk(proxy, monkeypatch)


@pytest.mark.parametrize("before", [1, REGULAR + 1], ids=["idle", "hot"])
@pytest.mark.parametrize("late", [0, 1, DISK_TURNS, DISK_TURNS + 1])
@pytest.mark.parametrize("target", FROM_THE_DISK)
async def test_a_disk_that_is_quick(
    proxy: InMemoryProxy, disk: Disk, target: str, late: int, before: int
) -> None:
    """What the disk gives within a few turns of the event loop is answered past aiohttp."""
    async with Wire(proxy.url) as reader:
        answers = [await reader.ask(target) for _ in range(before)]
        expected = answers[0].body
        through = through_the_lane(proxy)
        disk.forget(target, late)
        assert (await reader.ask(target)).body == expected
        assert through_the_lane(proxy) - through == (late <= DISK_TURNS)
        for _ in range(REGULAR + 1):
            assert (await reader.ask(target)).body == expected
    assert not proxy.observed(Fault)


@pytest.mark.parametrize("before", [1, REGULAR + 1], ids=["idle", "hot"])
@pytest.mark.parametrize("late", [1, DISK_TURNS, DISK_TURNS + 1])
@pytest.mark.parametrize("target", FROM_THE_DISK)
async def test_nothing_overtakes_what_waits_for_the_disk(
    proxy: InMemoryProxy, disk: Disk, target: str, late: int, before: int
) -> None:
    """A request that comes while another one on its connection waits is answered after it."""
    async with Wire(proxy.url) as reader:
        for _ in range(before):
            assert (await reader.ask(target)).status == 200
        disk.forget(target, late)
        await reader.send(reader.request(target))
        await asyncio.sleep(0)  # so that it is looked at
        await reader.send(reader.request(ABSENT))
        assert [(await reader.answer()).status for _ in range(2)] == [200, 404]
    assert not proxy.observed(Fault)


@pytest.mark.parametrize("target", FROM_THE_DISK)
async def test_a_client_that_does_not_wait(proxy: InMemoryProxy, disk: Disk, target: str) -> None:
    """A client that leaves between two looks leaves nothing behind."""
    async with Wire(proxy.url) as reader:
        assert (await reader.ask(target)).status == 200
        disk.forget(target, late=10_000)
        await reader.send(reader.request(target))
    disk.late = 0
    assert (await proxy.pull(target)).status == 200
    assert not proxy.observed(Fault)


@pytest.mark.parametrize("target", FROM_THE_DISK)
async def test_a_proxy_that_stops_meanwhile(proxy: InMemoryProxy, disk: Disk, target: str) -> None:
    """Who waits for the disk while the proxy stops has the whole answer, and is told not to come again."""
    serving = listening(proxy.server, [("127.0.0.1", 0)], shutdown_timeout=5)
    (address,) = await serving.__aenter__()
    async with Wire(f"http://{address}") as wire:
        answers = [await wire.ask(target) for _ in range(REGULAR + 1)]
        disk.forget(target, late=10_000)
        await wire.send(wire.request(target))
        await disk.asked.wait()
        disk.late = 0
        await serving.__aexit__(None, None, None)
        answer = await wire.answer()
        assert (answer.body, answer.headers.get("connection")) == (answers[0].body, "close")


async def test_what_the_loop_asks_for(
    proxy: InMemoryProxy, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The event loop asks for small files only: for more it might have to wait."""
    asked: list[tuple[int, str]] = []

    def fadvise(_fd: int, _start: int, count: int, _advice: int) -> None:
        asked.append((count, threading.current_thread().name))

    monkeypatch.setattr(os, "posix_fadvise", fadvise)
    async with Wire(proxy.url) as reader:
        assert (await reader.ask("/healthz")).status == 200
        for entry, target in zip(ENTRIES[1:], (SMALL, MEDIUM), strict=True):
            disk.forget(target, late=1)
            assert (await reader.ask(target)).body == bytes(entry.file)
    loop = threading.main_thread().name
    assert [count for count, thread in asked if thread == loop] == [len(ENTRIES[1].file)]


async def test_waiting_is_not_asking_again(proxy: InMemoryProxy, disk: Disk) -> None:
    """A NAR that was waited for has been asked for once, and is not kept in memory."""
    async with Wire(proxy.url) as reader:
        assert (await reader.ask("/healthz")).status == 200
        disk.forget(SMALL, late=3)
        assert (await reader.ask(SMALL)).body == bytes(ENTRIES[1].file)
    assert len(proxy.server.lane._nars) == 0


async def test_a_file_system_that_cannot_tell(
    proxy: InMemoryProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the kernel does not say what is in memory, a NAR takes the long way at once."""
    looks = []

    def read_in_memory(fd: int, *_: int) -> bytearray:
        looks.append(fd)
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    monkeypatch.setattr(files, "read_in_memory", read_in_memory)
    async with Wire(proxy.url) as reader:
        assert (await reader.ask("/healthz")).status == 200
        assert (await reader.ask(SMALL)).body == bytes(ENTRIES[1].file)
    assert len(looks) == 2  # and then to keep what was read the long way


async def test_what_was_asked_for_arrives(proxy: InMemoryProxy) -> None:
    """A look at a NAR on the disk brings it into memory, without anybody waiting."""
    path = proxy.folder / SMALL[1:]
    size = path.stat().st_size
    proxy.memory.let_go(path)
    drop_pages(path)
    with pytest.raises(BlockingIOError):
        OpenFile.at_hand(str(path), size, 0)

    def arrived() -> bool:
        fd = os.open(path, os.O_RDONLY)
        try:
            return pages_in_memory(fd) * mmap.PAGESIZE >= size
        finally:
            os.close(fd)

    await proxy.eventually(arrived)
