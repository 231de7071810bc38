"""A file that arrives: on the disk as long as the disk takes it, then through a window of memory.

A disk that is full, read-only, broken or gone must not end a transfer that clients wait for. So the
bytes that it refused, and all that follow, go into segments of memory, and each segment is forgotten when
the last reader has passed it. Such a file is not kept, and what it takes is bounded: whoever writes asks
`Incoming.crowded`, and waits for the readers.

Segments are anonymous files (memfd_create(2)) in which every byte has the offset that it has in the whole
file, so readers use the same system calls wherever a byte is.
"""

from __future__ import annotations

import contextlib
import functools
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

from proxy.errors import StoreError
from proxy.store.files import OpenFile, Partial, disk
from proxy.store.leftovers import Origin

SEGMENT = 2**20
"""Bytes after which a new segment of memory begins."""

WINDOW = 4 * 2**20
"""Bytes of memory for one file that the disk refuses: enough to keep a connection busy."""


class Lasting(Protocol):
    """One download that can be left unfinished: `proxy.store.folder.Store` makes them."""

    def take(self) -> tuple[Partial, Origin] | None:
        """Return what was left of it."""

    def start(self, origin: Origin) -> Partial:
        """Start it; raise `StoreError`."""
        ...

    def left(self, partial: Partial) -> None:
        """Take note that it is left."""


@dataclass(frozen=True, slots=True)
class Leftover:
    """What was left of a download: where it came from, and how many bytes."""

    origin: Origin
    size: int


@dataclass(slots=True)
class _Segment:
    """A part of the file: ``stop`` is None while it is the last one, and grows."""

    fd: int
    start: int
    in_memory: bool
    stop: int | None = None


class Incoming:
    """A growing file, with one writer and many readers.

    The writer may be on another thread than the readers.

    Args:
        start: Starts the partial file on the disk, when the first byte is there; None where the disk is
            known to take nothing.
        on_failure: Called on the writer's thread when the disk refuses; from then on it is not asked.
        lasting: What makes it a file that can be left unfinished, and continued later.
        new_path: Names a partial file that somebody else writes.
    """

    def __init__(
        self,
        start: Callable[[], Partial] | None,
        on_failure: Callable[[StoreError], None],
        lasting: Lasting | None = None,
        new_path: Callable[[], str] | None = None,
    ) -> None:
        self.size = 0
        """Bytes that have arrived."""
        self._start = start
        self._lasting = lasting
        self._new_path = new_path
        self.leftover: Leftover | None = None
        """What was left of the file earlier, as long as nothing else has arrived."""
        self._on_failure = on_failure
        self._partial: Partial | None = None
        self._segments: tuple[_Segment, ...] = ()
        self._begin = 0
        self._cursors: set[Cursor] = set()
        self._ended = False
        self._lock = (
            threading.Lock()
        )  # of the segments: no descriptor is closed while it is duplicated
        if start is not None and lasting is not None and (found := lasting.take()) is not None:
            self._partial, origin = found
            self.leftover = Leftover(origin, self._partial.size)
            self._add(self._partial.reader(), in_memory=False)

    @property
    def kept(self) -> Partial | None:
        """The partial file, if all that has arrived is in it."""
        return self._partial if self._start is not None else None

    @property
    def keeps(self) -> bool:
        """Whether the disk takes what arrives, as far as is known."""
        return self._start is not None

    @property
    def begin(self) -> int:
        """Where the file begins to be readable: behind what was forgotten."""
        return self._begin

    @property
    def is_read(self) -> bool:
        """Whether anybody reads, and has not been left behind."""
        return any(cursor.position >= self._begin for cursor in self._cursors)

    def is_awaited(self, released: int) -> bool:
        """Tell whether some reader has read all that is released."""
        return any(cursor.position >= released for cursor in self._cursors)

    @property
    def crowded(self) -> bool:
        """Whether memory is full of what readers have not passed yet."""
        if self._start is not None:
            return False
        readers = [each.position for each in self._cursors if each.position >= self._begin]
        self._forget(min(readers, default=self._begin))
        return self._in_memory >= WINDOW

    @property
    def _in_memory(self) -> int:
        on_disk = 0 if self._partial is None else self._partial.size
        return self.size - max(self._begin, on_disk)

    def append(self, data: bytes) -> None:
        """Take the next bytes.

        Raises:
            StoreError: Neither disk nor memory takes them.
        """
        if self._start is not None:
            try:
                self._append_to_disk(self._start, data)
            except StoreError as error:
                self._start = None
                self._on_failure(error)
        if self._start is None:
            self._append_to_memory(data)
        self.size += len(data)

    @property
    def landing(self) -> str | None:
        """Where somebody else may put the whole file, for `adopt`; None where that is no way to get it."""
        if self._start is None or self._partial is not None or self._new_path is None:
            return None
        return self._new_path()

    def adopt(self, path: str) -> None:
        """Take the whole file from where somebody else has put it.

        Raises:
            StoreError: It is not there, or there are no descriptors left.
        """
        file = OpenFile.at(path)
        if file is None:
            raise StoreError("what was put there is gone")
        self._partial = Partial.closed(path, file.size)
        self._add(file.fd, in_memory=False)
        self.size = file.size

    def recall(self, count: int) -> bytes:
        """Take the next bytes from what was left; return them, to be verified.

        Raises:
            StoreError: The disk failed.
        """
        data = self.read_back(self.size, count)
        self.size += len(data)
        return data

    def keep(self, origin: Origin) -> None:
        """Let the file be left unfinished; as long as nothing has arrived."""
        lasting = self._lasting
        if self._start is not None and self._partial is None and lasting is not None:
            self._start = functools.partial(lasting.start, origin)

    def leave(self) -> None:
        """Stop, and let somebody continue later, if the file allows it."""
        if self._lasting is None or self.kept is None or self.kept.note is None:
            self.discard()
            return
        self._lasting.left(self.kept)
        self._close()

    def start_over(self) -> None:
        """Forget what has arrived, of which nobody has read anything; what follows goes into a new file."""
        if self._partial is not None:
            self._partial.discard()
            self._partial = None
        with self._lock:
            for segment in self._segments:
                os.close(segment.fd)
            self._segments = ()
        self.leftover = None
        self._begin = self.size = 0

    def read_back(self, position: int, count: int) -> bytes:
        """Return some of what is on the disk; less where it is not.

        Raises:
            StoreError: The disk failed.
        """
        return b"" if self._partial is None else self._partial.read(position, count)

    def cursor(self) -> Cursor:
        """Make a reader, which whoever asked for it closes.

        Raises:
            StoreError: The beginning has been forgotten already.
        """
        if self._begin > 0:
            raise StoreError("the beginning of this transfer is not there any more")
        cursor = Cursor(self)
        self._cursors.add(cursor)
        return cursor

    def read_all(self) -> bytes:
        """Return what has arrived, if that is little.

        Raises:
            StoreError: It is more than memory may hold, or cannot be read.
        """
        if self.size > 2 * WINDOW:
            raise StoreError("the disk does not take it, and memory holds no more")
        pieces: list[bytes] = []
        position = 0
        with contextlib.closing(self.cursor()) as cursor, disk("cannot read"):
            while position < self.size:
                end = cursor.advance(position, self.size)
                pieces.append(os.pread(cursor.fd, end - position, position))
                position = end
        return b"".join(pieces)

    def pieces(self, size: int, stop: int) -> Iterator[bytes]:
        """Yield once more what came before ``stop``, in pieces of ``size`` bytes.

        Raises:
            StoreError: The disk failed, or has not taken all of it.
        """
        position = 0
        while piece := self.read_back(position, min(size, stop - position)):
            yield piece
            position += len(piece)
        if position < stop:
            raise StoreError("the disk has not taken all of it")

    def leave_behind(self) -> None:
        """Forget the older half of what is in memory, and with it the readers that are still there."""
        self._forget(self.size - WINDOW // 2)

    def close(self) -> None:
        """Let go of the file, once nobody reads it any more; the partial file stays."""
        if self._partial is not None:
            self._partial.drop_note()
        self._close()

    def discard(self) -> None:
        """Remove the file; those who read it can read on."""
        if self._partial is not None:
            self._partial.discard()
        self.close()

    def open_at(self, position: int) -> tuple[int, _Segment]:
        """Return a new descriptor for reading at ``position``, and what part of the file it is for.

        Raises:
            StoreError: It is not here any more, or there are no descriptors left.
        """
        with self._lock:
            for segment in self._segments:
                if segment.start <= position and (segment.stop is None or position < segment.stop):
                    with disk("cannot read"):
                        return os.dup(segment.fd), segment
        raise StoreError("too slow for a transfer that the disk does not take")

    def closed(self, cursor: Cursor) -> None:
        """A reader has left."""
        self._cursors.discard(cursor)
        self._let_go()

    def _close(self) -> None:
        if self._partial is not None:
            self._partial.close()
        self._ended = True
        self._let_go()

    def _append_to_disk(self, start: Callable[[], Partial], data: bytes) -> None:
        if self._partial is None:
            partial = start()
            self._partial = partial
            self._add(partial.reader(), in_memory=False)
        self._partial.append(data)

    def _append_to_memory(self, data: bytes) -> None:
        if self._in_memory >= 2 * WINDOW:
            raise StoreError("the disk does not take it, and memory holds no more")
        last = self._segments[-1] if self._segments else None
        if last is None or not last.in_memory or self.size - last.start >= SEGMENT:
            with disk("cannot use memory"):
                self._add(os.memfd_create("incoming", os.MFD_CLOEXEC), in_memory=True)
        view, position = memoryview(data), self.size
        with disk("cannot use memory"):
            while view:
                count = os.pwrite(self._segments[-1].fd, view, position)
                view, position = view[count:], position + count

    def _add(self, fd: int, *, in_memory: bool) -> None:
        with self._lock:
            if self._segments:
                self._segments[-1].stop = self.size
            self._segments = (*self._segments, _Segment(fd, self.size, in_memory))

    def _forget(self, before: int) -> None:
        """Close the segments that end there or earlier."""
        with self._lock:
            while self._segments and (stop := self._segments[0].stop) is not None:
                if stop > before:
                    break
                os.close(self._segments[0].fd)
                self._begin = stop
                self._segments = self._segments[1:]

    def _let_go(self) -> None:
        if not self._ended or self._cursors:
            return
        with self._lock:
            for segment in self._segments:
                os.close(segment.fd)
            self._segments = ()


class Cursor:
    """One reader: a position, and a descriptor for what is there. Made by `Incoming.cursor`.

    Attributes:
        fd: For positional reads; another one after each `advance`.
        position: What came before it is not needed any more.
    """

    __slots__ = ("_incoming", "_segment", "fd", "position")

    def __init__(self, incoming: Incoming) -> None:
        self.fd = -1
        self.position = 0
        self._incoming = incoming
        self._segment: _Segment | None = None

    def advance(self, position: int, end: int) -> int:
        """Get ready to read at ``position``, and return how far: to ``end`` or less.

        Raises:
            StoreError: It is not here any more, or there are no descriptors left.
        """
        segment = self._segment
        if (
            segment is None
            or position < segment.start
            or (segment.stop is not None and position >= segment.stop)
        ):
            fd, segment = self._incoming.open_at(position)
            self._close()
            self.fd, self._segment = fd, segment
        return end if segment.stop is None else min(end, segment.stop)

    def close(self) -> None:
        """Stop reading; safe to repeat."""
        self._close()
        self._incoming.closed(self)

    def _close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
