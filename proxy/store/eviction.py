"""What to remove when the disk gets full, or an operator says so. Decides; touches nothing.

Eviction begins before a limit is reached and goes on below that mark, so that it comes in batches and
not with every file that is added. What was used least recently goes first; what is pinned, or being read
or written, does not go at all.
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
    """A file that can be evicted, with the narinfo that goes with it: ``size`` is that of both.

    ``used`` is when it was used last, in seconds since the epoch.
    """

    name: str
    size: int
    used: int = 0


def excess(limits: Limits, *, used: int, free: int) -> int:
    """Return how many bytes are to be evicted; 0 while there is room.

    Args:
        limits: What is allowed.
        used: Bytes in the store.
        free: Bytes free on its file system.
    """
    if limits.max_size and used > limits.max_size * HIGH:
        return beyond(limits, used=used, free=free)
    return max(0, limits.min_free - free)


def beyond(limits: Limits, *, used: int, free: int) -> int:
    """Return how many bytes are beyond the marks at which eviction ends."""
    over_size = used - int(limits.max_size * LOW) if limits.max_size else 0
    return max(0, over_size, limits.min_free - free)


def room(limits: Limits, *, used: int, free: int) -> int:
    """Return how many bytes can be kept before `excess` wants anything back."""
    over_size = int(limits.max_size * HIGH) - used if limits.max_size else free
    return max(0, min(over_size, free - limits.min_free))


def most_to_pin(limits: Limits) -> int | None:
    """Return how many bytes can be pinned so that eviction can still reach its mark; None for any number."""
    return int(limits.max_size * LOW) if limits.max_size else None


def choose(
    oldest_first: Iterable[Candidate], wanted: int, unused_since: int | None = None
) -> list[Candidate]:
    """Return the first candidates: those whose sizes reach ``wanted`` bytes, and those not used since."""
    chosen: list[Candidate] = []
    for candidate in oldest_first:
        if wanted <= 0 and (unused_since is None or candidate.used >= unused_since):
            break
        chosen.append(candidate)
        wanted -= candidate.size
    return chosen
