"""What the cache gives to whoever asks it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, Self

from proxy.events import Result
from proxy.known import KnownPath
from proxy.store.files import OpenFile


class File(Protocol):
    """A file to be read at any position: `proxy.store.files.OpenFile`, `proxy.reader.Reader`."""

    @property
    def fd(self) -> int:
        """The descriptor for what `wait_beyond` has returned last."""

    @property
    def size(self) -> int | None:
        """Bytes of the whole file; None while nobody knows."""

    async def wait_beyond(self, position: int) -> int:
        """Wait until bytes behind ``position`` may be read; the file's last one once all of it is verified.

        Returns:
            How far the file may be read; ``position`` or less at its end.

        Raises:
            ProxyError: It does not arrive.
        """

    async def size_known(self) -> int:
        """Wait until the size is known, and return it.

        Raises:
            ProxyError: It does not arrive.
        """

    def close(self) -> None:
        """Close the descriptor; safe to repeat."""


@dataclass(frozen=True, slots=True)
class Text:
    """A narinfo as it goes to a client, and where it came from."""

    known: KnownPath
    result: Result

    @property
    def body(self) -> bytes:
        """The text."""
        return self.known.body

    @property
    def upstream(self) -> str:
        """The upstream's name, or an empty text when nobody remembers."""
        return self.known.origin


@dataclass(slots=True)
class NarAtHand:
    """A NAR of the store that can be sent without waiting, and where it came from.

    ``content`` is all of it, or its beginning, and then ``file`` has the rest; whoever has that closes it.
    """

    content: bytes | bytearray
    file: OpenFile | None
    etag: str | None
    result: Result
    upstream: str


@dataclass(frozen=True, slots=True)
class Content:
    """A file that is here, on its way, or (``file`` is None) only announced by an upstream.

    A context manager: what is open is closed at its end.
    """

    file: File | None
    announced: int | None
    etag: str | None
    result: Result
    upstream: str

    @property
    def size(self) -> int | None:
        """Bytes of the whole file; None while nobody knows."""
        return self.announced if self.file is None else self.file.size

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.file is not None:
            self.file.close()
