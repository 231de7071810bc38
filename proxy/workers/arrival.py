"""A file that the core is fetching, as a worker sees it: the same file, and news of how far it is.

All clients of a worker that want it share one `Arrival`, and so one descriptor passed by the core and one
stream of news. Each has a `Reader` with a position of its own, as those of `proxy.fetch` have.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable

from proxy.errors import StoreError
from proxy.store.files import disk
from proxy.workers.channel import NONE
from proxy.workers.messages import Given


class Arrival:
    """One file on its way.

    Args:
        number: How the core calls it.
        on_unread: Called when its last reader has left.
    """

    def __init__(self, number: int, on_unread: Callable[[Arrival], None]) -> None:
        self.number = number
        self.size: int | None = None
        self.whole = False
        self._on_unread = on_unread
        self._released = 0
        self._given: Given | None = None
        self._fd = NONE
        self._error: Exception | None = None
        self._readers = 0
        self._changed = asyncio.Event()

    @property
    def is_over(self) -> bool:
        """Whether there will be no more news."""
        return self.whole or self._error is not None

    def attach(self) -> Reader:
        """Make a reader; it has a descriptor once `Reader.open` has been waited for."""
        self._readers += 1
        return Reader(self)

    def give(self, given: Given, fd: int) -> None:
        """The core has the file, and this descriptor of it; ours from now on."""
        if self._readers == 0:
            _close(fd)
            return
        if fd == NONE:
            self.fail(StoreError("there are no descriptors left"))
            return
        self._given, self._fd = given, fd
        self.progress(given.released, given.size)
        self.whole = self.whole or given.whole

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

    def leave(self) -> None:
        """A reader has left."""
        self._readers -= 1
        if self._readers == 0:
            _close(self._fd)
            self._fd = NONE
            self._on_unread(self)

    async def opened(self) -> Given:
        """Wait until the core has the file.

        Raises:
            ProxyError: It has not.
        """
        while self._given is None:
            await self._change()
        return self._given

    def descriptor(self) -> int:
        """Return a new descriptor, which the caller closes.

        Raises:
            StoreError: There are no descriptors left.
        """
        with disk("cannot read"):
            return os.dup(self._fd)

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
    """One reader: a descriptor of its own, for positional reads. Whoever has it closes it.

    Args:
        arrival: What it reads, where it counts as a reader already.
    """

    __slots__ = ("_arrival", "_is_open", "fd")

    def __init__(self, arrival: Arrival) -> None:
        self._arrival = arrival
        self._is_open = True
        self.fd = NONE

    async def open(self) -> Given:
        """Wait for the file, and take a descriptor of it.

        Raises:
            ProxyError: It does not come.
        """
        given = await self._arrival.opened()
        self.fd = self._arrival.descriptor()
        return given

    @property
    def size(self) -> int | None:
        """Bytes of the whole file; None until somebody says."""
        return self._arrival.size

    async def wait_beyond(self, position: int) -> int:
        """Wait until bytes behind ``position`` may be read.

        Raises:
            ProxyError: The fetch failed.
        """
        return await self._arrival.wait_beyond(position)

    async def size_known(self) -> int:
        """Wait until the size is known.

        Raises:
            ProxyError: The fetch failed.
        """
        return await self._arrival.size_known()

    def close(self) -> None:
        """Close the descriptor, and leave; safe to repeat."""
        _close(self.fd)
        self.fd = NONE
        if self._is_open:
            self._is_open = False
            self._arrival.leave()


def _close(fd: int) -> None:
    if fd != NONE:
        os.close(fd)
