"""What to remove when the disk gets full. Decides; touches nothing.

Eviction begins before a limit is reached and goes on below that mark, so that it comes in batches and
not with every file that is added. What was used least recently goes first.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

HIGH = 0.95
"""Part of ``max_size`` at which eviction begins: what arrives meanwhile has to fit above it."""

LOW = 0.90
"""Part of ``max_size`` at which eviction ends."""


@dataclass(frozen=True, slots=True)
class Limits:
    """``max_size``: bytes that the store may take; ``min_free``: bytes of the file system to leave free.

    0 is no limit.
    """

    max_size: int = 0
    min_free: int = 0


UNLIMITED = Limits()


@dataclass(frozen=True, slots=True)
class Candidate:
    """A file that can be evicted, with the narinfo that goes with it: ``size`` is that of both."""

    name: str
    size: int


def excess(limits: Limits, *, used: int, free: int) -> int:
    """Return how many bytes are to be evicted; 0 while there is room.

    Args:
        limits: What is allowed.
        used: Bytes in the store.
        free: Bytes free on its file system.
    """
    too_large = used - int(limits.max_size * LOW) if used > limits.max_size * HIGH else 0
    over_size = too_large if limits.max_size else 0
    return max(0, over_size, limits.min_free - free)


def room(limits: Limits, *, used: int, free: int) -> int:
    """Return how many bytes can be kept before `excess` wants anything back."""
    over_size = int(limits.max_size * HIGH) - used if limits.max_size else free
    return max(0, min(over_size, free - limits.min_free))


def choose(oldest_first: Iterable[Candidate], wanted: int) -> list[Candidate]:
    """Return the first candidates whose sizes together reach ``wanted`` bytes."""
    chosen: list[Candidate] = []
    for candidate in oldest_first:
        if wanted <= 0:
            break
        chosen.append(candidate)
        wanted -= candidate.size
    return chosen
