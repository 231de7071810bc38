"""Files that are not in memory: whoever wants them waits for the disk, and nobody else does."""

from __future__ import annotations

import asyncio
import errno
import os
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from proxy.events import Fault
from proxy.store import pages
from tests.memory import drop_pages
from tests.server.hot import LARGE, LARGE_NAR, NAR, NARINFO, SMALL, InMemoryProxy
from tests.server.piecewise import through_the_lane
from tests.wire import Wire

pytestmark = pytest.mark.timeout(60)


def forget(proxy: InMemoryProxy, target: str) -> Path:
    """Have a NAR on the disk, and not in memory; return where it is."""
    path = proxy.folder / target[1:]
    proxy.memory.let_go(path)
    drop_pages(path)
    return path


class SlowDisk:
    """A disk on which reads of cold pages by threads wait until a test lets them go on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.threads: list[str] = []
        self.asked = asyncio.Event()
        self._go_on = threading.Event()
        self._real: Callable[[int, int, int], bytes] = os.pread
        self._loop = asyncio.get_running_loop()
        monkeypatch.setattr(os, "pread", self._pread)

    def stop(self) -> None:
        """Let none go on from now on."""
        self._go_on.clear()
        self.asked.clear()

    def answer(self) -> None:
        """Let all reads go on."""
        self._go_on.set()

    @property
    def has_answered(self) -> bool:
        """Whether reads go on."""
        return self._go_on.is_set()

    def _pread(self, fd: int, count: int, offset: int) -> bytes:
        thread = threading.current_thread()
        if thread.name.startswith("read-ahead"):
            self.threads.append(thread.name)
            self._loop.call_soon_threadsafe(self.asked.set)
            self._go_on.wait(20)
        return self._real(fd, count, offset)


@pytest.fixture
async def slow_disk(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[SlowDisk]:
    """Return a disk that answers when it is told to, and at the end of the test."""
    disk = SlowDisk(monkeypatch)
    yield disk
    disk.answer()


async def test_others_do_not_wait(proxy: InMemoryProxy, slow_disk: SlowDisk) -> None:
    """While one client waits for pages of a NAR, others are answered; then it gets every byte."""
    forget(proxy, LARGE_NAR)
    async with Wire(proxy.url) as reader, Wire(proxy.url) as other:
        waiting = asyncio.create_task(reader.ask(LARGE_NAR))
        await slow_disk.asked.wait()
        assert (await other.ask(NARINFO)).status == 200
        assert (await other.ask("/healthz")).status == 200
        assert not waiting.done()
        slow_disk.answer()
        assert (await waiting).body == bytes(LARGE.file)
    assert slow_disk.threads
    assert not proxy.observed(Fault)


async def test_a_narinfo_that_is_not_in_memory(
    proxy: InMemoryProxy, slow_disk: SlowDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A narinfo that the disk takes long to give is waited for by nobody but who asked, in either lane."""
    async with Wire(proxy.url) as reader, Wire(proxy.url) as other:
        assert (await reader.ask(NARINFO)).status == 200
        # To ask the kernel about a page makes it fetch the page.
        monkeypatch.setattr(pages, "are_in_memory", lambda *_: False)
        for _ in range(2):
            proxy.cache.use(proxy.failover, negative_ttl=60.0)  # forgets what is in memory
            slow_disk.stop()
            waiting = asyncio.create_task(reader.ask(NARINFO))
            await slow_disk.asked.wait()
            assert (await other.ask("/healthz")).status == 200
            assert not waiting.done()
            slow_disk.answer()
            assert (await waiting).status == 200
    assert not proxy.observed(Fault)


async def test_a_small_nar_that_is_not_in_memory(
    proxy: InMemoryProxy, slow_disk: SlowDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A NAR whose bytes are on the disk is not read by the loop, but brought in first; then it is hot."""
    proxy.server.lane.forget_nars()
    kept, real = proxy.folder / NAR[1:], os.preadv

    def preadv(fd: int, buffers: list[bytearray], offset: int, flags: int = 0) -> int:
        if Path(f"/proc/self/fd/{fd}").readlink() == kept and not slow_disk.has_answered:
            assert flags & os.RWF_NOWAIT
            raise BlockingIOError
        return real(fd, buffers, offset, flags)

    monkeypatch.setattr(os, "preadv", preadv)
    async with Wire(proxy.url) as reader, Wire(proxy.url) as other:
        assert (await other.ask("/healthz")).status == 200
        before = through_the_lane(proxy)
        waiting = asyncio.create_task(reader.ask(NAR))
        await slow_disk.asked.wait()
        assert (await other.ask("/healthz")).status == 200
        assert not waiting.done()
        slow_disk.answer()
        assert (await waiting).body == bytes(SMALL.file)
        assert through_the_lane(proxy) == before
        assert (await other.ask(NAR)).body == bytes(SMALL.file)
        assert through_the_lane(proxy) == before + 1


async def test_in_memory_nothing_is_read_ahead(proxy: InMemoryProxy, slow_disk: SlowDisk) -> None:
    """What is in memory is sent at once, by the loop itself."""
    assert (await proxy.pull(LARGE_NAR)).body == bytes(LARGE.file)
    assert slow_disk.threads == []


async def test_a_client_that_leaves_while_the_disk_is_asked(
    proxy: InMemoryProxy, slow_disk: SlowDisk
) -> None:
    """A client that leaves is forgotten, the read ends on a descriptor of its own, and none is left."""
    path = forget(proxy, LARGE_NAR)
    async with Wire(proxy.url) as reader:
        asking = asyncio.create_task(reader.ask(LARGE_NAR))
        await slow_disk.asked.wait()
        asking.cancel()
    slow_disk.answer()

    def open_files() -> list[str]:
        links = Path("/proc/self/fd").iterdir()
        return [link for link in map(_target, links) if link == str(path)]

    await proxy.until(lambda: not open_files())
    assert (await proxy.pull(LARGE_NAR)).body == bytes(LARGE.file)


def _target(link: Path) -> str:
    try:
        return str(link.readlink())
    except OSError:
        return ""


async def test_a_disk_that_never_answers(
    proxy: InMemoryProxy, slow_disk: SlowDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that does not answer in time is as good as none: the client is told to ask elsewhere."""
    monkeypatch.setattr(pages, "DEADLINE", 0.05)
    forget(proxy, LARGE_NAR)
    assert (await proxy.pull(LARGE_NAR)).status == 404
    assert slow_disk.threads
    assert not proxy.observed(Fault)


@pytest.mark.parametrize("error", [errno.EOPNOTSUPP, errno.EAGAIN, errno.EIO])
async def test_a_file_system_that_cannot_tell(
    proxy: InMemoryProxy, monkeypatch: pytest.MonkeyPatch, error: int
) -> None:
    """Whatever the kernel says of what is in memory, the bytes are right."""

    def preadv(*_: object) -> int:
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(os, "preadv", preadv)
    for _ in range(2):
        assert (await proxy.pull(LARGE_NAR)).body == bytes(LARGE.file)
    assert not proxy.observed(Fault)


def test_missing_pages_are_seen(tmp_path: Path) -> None:
    """A part of a file is in memory when it was read, and not when its pages were dropped."""
    path = tmp_path / "file"
    path.write_bytes(os.urandom(3 * pages.STRIDE))
    drop_pages(path)
    fd = os.open(path, os.O_RDONLY)
    try:
        size = 3 * pages.STRIDE
        assert not pages.are_in_memory(fd, 0, size)
        asyncio.run(pages.bring_in(fd, 0, size))
        assert pages.are_in_memory(fd, 0, size)
    finally:
        os.close(fd)
