"""A file that the core is fetching, as a worker sees it: the same file, and news of how far it is.

All clients of a worker that want it share one `Arrival`, and so the descriptors passed by the core and one
stream of news. Each has a `Reader` with a position of its own, as those of `proxy.fetch` have.

The file is one partial file on the disk; what the disk refuses of it comes as segments of memory, in which
every byte has the offset that it has in the file (`proxy.store.incoming`). A segment that all readers have
passed is closed, and the core told, which does not send more before.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from dataclasses import dataclass

from proxy.channel import NONE, close
from proxy.errors import StoreError
from proxy.store.files import disk
from proxy.workers.messages import Given


@dataclass(slots=True)
class _Segment:
    """A part of the file: ``stop`` is None while it is the last one, and grows."""

    fd: int
    start: int
    stop: int | None = None


class Arrival:
    """One file on its way.

    Args:
        number: How the core calls it.
        on_unread: Called when its last reader has left.
        on_passed: Called when all readers have passed a segment.
    """

    def __init__(
        self,
        number: int,
        *,
        on_unread: Callable[[Arrival], None],
        on_passed: Callable[[], None],
    ) -> None:
        self.number = number
        self.size: int | None = None
        self.whole = False
        self._on_unread = on_unread
        self._on_passed = on_passed
        self._released = 0
        self._given: Given | None = None
        self._segments: list[_Segment] = []
        self._error: Exception | None = None
        self._readers: set[Reader] = set()
        self._changed = asyncio.Event()

    @property
    def is_over(self) -> bool:
        """Whether there will be no more news."""
        return self.whole or self._error is not None

    @property
    def can_be_joined(self) -> bool:
        """Whether the beginning is still there."""
        return not self._segments or self._segments[0].start == 0

    def attach(self) -> Reader:
        """Make a reader; it can read once `Reader.open` has been waited for."""
        reader = Reader(self)
        self._readers.add(reader)
        return reader

    def give(self, given: Given, fd: int) -> None:
        """The core has the file, and this descriptor of it; ours from now on."""
        self._given = given
        self.extend(0, fd)
        self.progress(given.released, given.size)
        self.whole = self.whole or given.whole

    def extend(self, start: int, fd: int) -> None:
        """From ``start`` on, the file is to be read from this descriptor; ours from now on."""
        if not self._readers:
            close(fd)
        elif fd == NONE:
            self.fail(StoreError("there are no descriptors left"))
        else:
            if self._segments:
                self._segments[-1].stop = start
            self._segments.append(_Segment(fd, start))

    def progress(self, released: int, size: int | None) -> None:
        """So many bytes may be read."""
        self._released = max(self._released, released)
        self.size = self.size if size is None else size
        self._wake()

    def finish(self, size: int) -> None:
        """It has arrived."""
        self.whole = True
        self.progress(size, size)

    def fail(self, error: Exception) -> None:
        """It will not arrive."""
        self._error = error
        self._wake()

    def leave(self, reader: Reader) -> None:
        """A reader has left."""
        self._readers.discard(reader)
        if self._readers:
            self.moved()
            return
        for segment in self._segments:
            close(segment.fd)
        self._segments.clear()
        self._on_unread(self)

    def moved(self) -> None:
        """A reader has got further, or has left: let go of what nobody needs any more."""
        if len(self._segments) == 1:
            return
        lowest = min((reader.position for reader in self._readers), default=0)
        while self._segments and (stop := self._segments[0].stop) is not None and stop <= lowest:
            close(self._segments.pop(0).fd)
            self._on_passed()

    async def opened(self) -> Given:
        """Wait until the core has the file.

        Raises:
            ProxyError: It has not.
        """
        while self._given is None:
            await self._change()
        return self._given

    def open_at(self, position: int) -> tuple[int, _Segment]:
        """Return a new descriptor for reading at ``position``, and what part of the file it is for.

        Raises:
            StoreError: It is not here any more, or there are no descriptors left.
        """
        for segment in self._segments:
            if segment.start <= position and (segment.stop is None or position < segment.stop):
                with disk("cannot read"):
                    return os.dup(segment.fd), segment
        raise StoreError("this part of a transfer is not there any more")

    async def wait_beyond(self, position: int) -> int:
        """Wait as `proxy.fetch.Fetch.wait_beyond` does.

        Raises:
            ProxyError: The fetch failed.
        """
        while self._released <= position and not self.whole:
            await self._change()
        return self._released

    async def size_known(self) -> int:
        """Wait until the size is known.

        Raises:
            ProxyError: The fetch failed before that.
        """
        while self.size is None:
            await self._change()
        return self.size

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def _change(self) -> None:
        if self._error is not None:
            raise self._error
        await self._changed.wait()


class Reader:
    """One reader: a position, and a descriptor of its own for what is there. Whoever has it closes it.

    Args:
        arrival: What it reads, where it counts as a reader already.

    Attributes:
        fd: For positional reads of what `wait_beyond` has returned last.
        position: What came before it is not needed any more.
    """

    __slots__ = ("_arrival", "_is_open", "_segment", "fd", "position")

    def __init__(self, arrival: Arrival) -> None:
        self._arrival = arrival
        self._is_open = True
        self._segment: _Segment | None = None
        self.fd = NONE
        self.position = 0

    async def open(self) -> Given:
        """Wait for the file.

        Raises:
            ProxyError: It does not come.
        """
        return await self._arrival.opened()

    @property
    def size(self) -> int | None:
        """Bytes of the whole file; None until somebody says."""
        return self._arrival.size

    async def wait_beyond(self, position: int) -> int:
        """Wait until bytes behind ``position`` may be read.

        Raises:
            ProxyError: The fetch failed.
        """
        self.position = position
        self._arrival.moved()
        end = await self._arrival.wait_beyond(position)
        return self._advance(position, end) if end > position else end

    async def size_known(self) -> int:
        """Wait until the size is known.

        Raises:
            ProxyError: The fetch failed.
        """
        return await self._arrival.size_known()

    def close(self) -> None:
        """Close the descriptor, and leave; safe to repeat."""
        close(self.fd)
        self.fd = NONE
        if self._is_open:
            self._is_open = False
            self._arrival.leave(self)

    def _advance(self, position: int, end: int) -> int:
        """Get ready to read at ``position``, and return how far: to ``end`` or less."""
        segment = self._segment
        if (
            segment is None
            or position < segment.start
            or (segment.stop is not None and position >= segment.stop)
        ):
            fd, self._segment = self._arrival.open_at(position)
            close(self.fd)
            self.fd, segment = fd, self._segment
        return end if segment.stop is None else min(end, segment.stop)
