"""Numbers as people read them."""

from __future__ import annotations

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")
_BITS = 10
"""Of a factor of 1024 between two units."""


def readable(count: int) -> str:
    """Write a number of bytes with one decimal, in the largest unit that is not larger than it."""
    power = min(max(0, count.bit_length() - 1) // _BITS, len(_UNITS) - 1)
    return f"{count} B" if power == 0 else f"{count / (1 << _BITS * power):.1f} {_UNITS[power]}"


def paths(count: int) -> str:
    """Write a number of store paths."""
    return "1 path" if count == 1 else f"{count} paths"


def files(count: int) -> str:
    """Write a number of files."""
    return "1 file" if count == 1 else f"{count} files"
