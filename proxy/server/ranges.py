"""Byte ranges of a request (RFC 9110 §14), as far as one range goes."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Self

from proxy.errors import RangeError, RequestError

_SPEC = re.compile(r"(\d{0,18})-(\d{0,18})", re.ASCII)


@dataclass(frozen=True, slots=True)
class Span:
    """Bytes ``start`` to ``stop``, the last not included."""

    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class ByteRange:
    """One range as the client wrote it: ``first-last``, ``first-`` or ``-last`` (the last so many)."""

    first: int | None
    last: int | None

    @classmethod
    def parse(cls, header: str) -> Self | None:
        """Parse a Range header; None when the whole file is as good an answer.

        That is the case for units other than bytes and for several ranges at once, which a server may
        ignore (§14.2); Nix sends neither.

        Raises:
            RequestError: It claims to be a byte range and is none.
        """
        unit, equals, specs = header.partition("=")
        if unit.strip().lower() != "bytes":
            return None
        parsed = [_SPEC.fullmatch(spec.strip()) for spec in specs.split(",")]
        if not equals or None in parsed:
            raise RequestError(f"malformed Range header: {header[:100]!r}")
        ranges = [
            cls(*(int(text) if text else None for text in match.groups()))
            for match in parsed
            if match
        ]
        if any(item.is_backward for item in ranges):
            raise RequestError(f"malformed Range header: {header[:100]!r}")
        return ranges[0] if len(ranges) == 1 else None

    @property
    def is_backward(self) -> bool:
        """Neither end is given, or the last lies before the first."""
        if self.first is None:
            return self.last is None
        return self.last is not None and self.last < self.first

    def of(self, size: int) -> Span:
        """Place the range in a file of ``size`` bytes.

        Raises:
            RangeError: No byte of the file is in it.
        """
        if self.first is None:
            start, stop = max(0, size - (self.last or 0)), size
        else:
            start, stop = self.first, size if self.last is None else min(size, self.last + 1)
        if start >= stop:
            raise RangeError(size)
        return Span(start, stop)
