"""Files that arrive: on the disk, and past it."""

from __future__ import annotations

import os
import random
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.errors import StoreError
from proxy.store.files import Partial
from proxy.store.incoming import SEGMENT, WINDOW, Cursor, Incoming

PIECE = 2**18
CONTENT = random.Random("incoming").randbytes(6 * WINDOW)


class Disk:
    """Starts partial files in a folder, of which each takes so many bytes."""

    def __init__(self, folder: Path, room: int) -> None:
        self.path = folder / "partial"
        self.room = room
        self.failures: list[StoreError] = []

    def start(self) -> Partial:
        """Start a partial file."""
        if self.room < 0:
            raise StoreError("cannot start a file: Read-only file system")
        return _Limited(self.path, self.room)

    def incoming(self) -> Incoming:
        """Make a file that arrives."""
        return Incoming(self.start, self.failures.append)


class _Limited(Partial):
    """A partial file on a disk that gets full: a part of the last piece is written, as disks do."""

    __slots__ = ("_room",)

    def __init__(self, path: Path, room: int) -> None:
        super().__init__(path)
        self._room = room

    def append(self, data: bytes | bytearray) -> None:
        if self.size + len(data) > self._room:
            os.write(self._fd, data[: self._room - self.size])
            raise StoreError("cannot write: No space left on device")
        super().append(data)


def _read(cursor: Cursor, position: int, end: int) -> bytes:
    got = bytearray()
    while position + len(got) < end:
        start = position + len(got)
        stop = cursor.advance(start, end)
        got += os.pread(cursor.fd, stop - start, start)
    cursor.position = end
    return bytes(got)


def _fill(incoming: Incoming, end: int) -> None:
    while incoming.size < end:
        incoming.append(CONTENT[incoming.size : incoming.size + PIECE])


def _is_crowded(incoming: Incoming) -> bool:
    return incoming.crowded  # asked again: mypy believes that a property stays as it is


def _descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_a_disk_that_takes_all(tmp_path: Path) -> None:
    """Where the disk works the file is on it, and memory takes nothing."""
    disk = Disk(tmp_path, room=len(CONTENT))
    incoming = disk.incoming()
    with closing(incoming.cursor()) as cursor:
        for start in range(0, len(CONTENT), PIECE):
            incoming.append(CONTENT[start : start + PIECE])
            assert not incoming.crowded
        assert _read(cursor, 0, len(CONTENT)) == CONTENT
    assert (incoming.kept and Path(incoming.kept.path).read_bytes()) == CONTENT
    incoming.discard()
    assert (disk.failures, list(tmp_path.iterdir())) == ([], [])


@pytest.mark.parametrize("room", [-1, 0, 1, PIECE, PIECE + 1, 3 * PIECE + 7])
def test_a_disk_that_gets_full(tmp_path: Path, room: int) -> None:
    """What the disk refuses goes through memory: the reader gets every byte, and nothing is kept."""
    disk = Disk(tmp_path, room)
    incoming = disk.incoming()
    got = bytearray()
    with closing(incoming.cursor()) as cursor:
        for start in range(0, len(CONTENT), PIECE):
            incoming.append(CONTENT[start : start + PIECE])
            if incoming.crowded:
                got += _read(cursor, len(got), incoming.size)
                assert not incoming.crowded
        got += _read(cursor, len(got), incoming.size)
    assert bytes(got) == CONTENT
    assert (incoming.kept, len(disk.failures)) == (None, 1)
    incoming.discard()
    assert list(tmp_path.iterdir()) == []


def test_memory_is_bounded(tmp_path: Path) -> None:
    """A writer that waits for nobody is stopped, and what readers have passed is given back."""
    incoming = Disk(tmp_path, room=-1).incoming()
    before = _descriptors()
    with closing(incoming.cursor()), pytest.raises(StoreError, match="memory holds no more"):
        _fill(incoming, len(CONTENT))
    assert incoming.size <= 2 * WINDOW + PIECE
    assert incoming.crowded
    incoming.discard()
    assert _descriptors() == before


def test_the_beginning_that_was_passed(tmp_path: Path) -> None:
    """Who comes when the beginning is forgotten is told so, and not given anything else."""
    incoming = Disk(tmp_path, room=-1).incoming()
    with closing(incoming.cursor()) as cursor:
        _fill(incoming, WINDOW)
        assert (_is_crowded(incoming), incoming.begin) == (True, 0)
        _read(cursor, 0, WINDOW)
        assert (_is_crowded(incoming), incoming.begin) == (False, WINDOW - SEGMENT)
        with pytest.raises(StoreError, match="beginning"):
            incoming.cursor()
    incoming.discard()


def test_who_is_left_behind(tmp_path: Path) -> None:
    """A reader that is left behind reads what it has, correctly, and is then refused."""
    incoming = Disk(tmp_path, room=-1).incoming()
    with closing(incoming.cursor()) as slow, closing(incoming.cursor()) as fast:
        incoming.append(CONTENT[:PIECE])
        assert _read(slow, 0, 10) == CONTENT[:10]
        _fill(incoming, WINDOW)
        _read(fast, 0, WINDOW)
        assert _is_crowded(incoming)
        assert incoming.is_awaited(WINDOW)
        incoming.leave_behind()
        assert not _is_crowded(incoming)
        assert _read(slow, 10, SEGMENT) == CONTENT[10:SEGMENT]
        with pytest.raises(StoreError, match="too slow"):
            slow.advance(SEGMENT, WINDOW)
        incoming.append(CONTENT[WINDOW : WINDOW + PIECE])
        assert _read(fast, WINDOW, WINDOW + PIECE) == CONTENT[WINDOW : WINDOW + PIECE]
    incoming.discard()


def test_readers_outlive_the_writer(tmp_path: Path) -> None:
    """Who reads when the file is discarded reads to its end, also what it has not opened yet."""
    incoming = Disk(tmp_path, room=PIECE).incoming()
    before = _descriptors()
    with closing(incoming.cursor()) as cursor:
        _fill(incoming, WINDOW)
        incoming.discard()
        assert _read(cursor, 0, WINDOW) == CONTENT[:WINDOW]
    assert _descriptors() == before


def test_little_can_be_read_at_once(tmp_path: Path) -> None:
    """A small file that the disk does not take is read whole, a large one is refused."""
    incoming = Disk(tmp_path, room=5).incoming()
    incoming.append(b"12345")
    incoming.append(b"6789")
    assert incoming.read_all() == b"123456789"
    incoming.discard()
    large = Disk(tmp_path, room=len(CONTENT)).incoming()
    large.append(CONTENT)
    with pytest.raises(StoreError, match="memory"):
        large.read_all()
    large.discard()


@given(
    room=st.integers(-1, 3 * SEGMENT),
    pieces=st.lists(st.integers(1, SEGMENT), min_size=1, max_size=20),
    source=st.randoms(use_true_random=False),
)
def test_any_reader_anywhere(
    tmp_path_factory: pytest.TempPathFactory, room: int, pieces: list[int], source: random.Random
) -> None:
    """Whatever the disk takes and however readers take turns, each reads what was written."""
    incoming = Disk(tmp_path_factory.mktemp("incoming"), room).incoming()
    readers = [incoming.cursor() for _ in range(3)]
    try:
        for piece in pieces:
            incoming.append(CONTENT[incoming.size : incoming.size + piece])
            for cursor in readers:
                crowded = incoming.crowded
                if crowded or source.random() < 1 / 2:
                    start = cursor.position
                    end = incoming.size if crowded else source.randint(start, incoming.size)
                    assert _read(cursor, start, end) == CONTENT[start:end]
        for cursor in readers:
            start = cursor.position
            assert _read(cursor, start, incoming.size) == CONTENT[start : incoming.size]
    finally:
        for cursor in readers:
            cursor.close()
        incoming.discard()
