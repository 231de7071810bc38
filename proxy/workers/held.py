"""What a worker keeps in memory of a path."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from proxy.events import Result

COPIES: Final = 3
"""Times that a narinfo takes its own size: as text, as an answer, and in what is known of it."""


@dataclass(slots=True)
class HeldNarinfo:
    """A verified narinfo, as far as a worker needs it."""

    body: bytes
    nar_name: str
    etag: str
    origin: str
    kept: bool
    size: int | None
    answer: bytearray | None = None
    answered_in: float = -1.0


@dataclass(frozen=True, slots=True)
class HeldText:
    """A narinfo as it goes to a client, and where it came from."""

    held: HeldNarinfo
    result: Result

    @property
    def body(self) -> bytes:
        """The text."""
        return self.held.body

    @property
    def upstream(self) -> str:
        """The upstream's name, or an empty text."""
        return self.held.origin
