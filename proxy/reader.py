"""One reader of a file that arrives."""

from __future__ import annotations

from typing import Protocol

from proxy.store.incoming import Cursor


class Arrival(Protocol):
    """What arrives: `proxy.fetch.Fetch`."""

    upstream: str
    """Where it comes from; empty until that is known."""

    size: int | None
    """Bytes of the whole file; None until somebody says."""

    async def wait_beyond(self, position: int) -> int:
        """Wait until bytes behind ``position`` may be read, and return how far; or less at the end."""
        ...

    async def size_known(self) -> int:
        """Wait until the size is known."""
        ...

    async def over(self) -> None:
        """Wait until the file is in the store, or never will be."""

    def moved(self) -> None:
        """A reader has got further, or has left."""


class Reader:
    """A descriptor of its own, for positional reads. Whoever has it closes it.

    Args:
        fetch: What it reads.
        cursor: Where it is.
    """

    __slots__ = ("_cursor", "fetch")

    def __init__(self, fetch: Arrival, cursor: Cursor) -> None:
        self.fetch = fetch
        self._cursor = cursor

    @property
    def fd(self) -> int:
        """The descriptor for what `wait_beyond` has returned last."""
        return self._cursor.fd

    @property
    def size(self) -> int | None:
        """Bytes of the whole file; None until somebody says."""
        return self.fetch.size

    async def wait_beyond(self, position: int) -> int:
        """Wait until bytes behind ``position`` may be read: `Arrival.wait_beyond`. `fd` is then for them.

        Raises:
            ProxyError: The fetch failed.
            StoreError: The disk does not take the file, and this reader was too slow.
        """
        self._cursor.position = position
        self.fetch.moved()
        end = await self.fetch.wait_beyond(position)
        return self._cursor.advance(position, end) if end > position else end

    async def size_known(self) -> int:
        """Wait until the size is known.

        Raises:
            ProxyError: The fetch failed.
        """
        return await self.fetch.size_known()

    def close(self) -> None:
        """Close the descriptor; safe to repeat."""
        self._cursor.close()
        self.fetch.moved()
