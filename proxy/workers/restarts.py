"""When to start a worker again that has ended by itself. Pure: no clock, no chance of its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

FIRST_PAUSE: Final = 0.1
"""Seconds before the first new start: a worker's clients wait for it."""

LONGEST_PAUSE: Final = 10.0
"""Seconds before any new start, at most."""

SETTLED: Final = 60.0
"""Seconds after which a worker that ends is no failed start any more."""


@dataclass(frozen=True, slots=True)
class Restarts:
    """How often in a row a worker has ended soon after its start."""

    failures: int = 0

    def after(self, lived: float) -> Restarts:
        """Return what holds after a worker has ended that lived so many seconds."""
        return Restarts(1 if lived >= SETTLED else self.failures + 1)

    def pause(self, chance: float) -> float:
        """Return the seconds to wait: twice as many each time, up to a limit, and half of them by chance.

        Args:
            chance: From 0 to 1, so that not all workers start in the same moment.
        """
        doublings = min(self.failures - 1, 30)  # beyond, floats are no more exact
        longest = min(FIRST_PAUSE * 2.0**doublings, LONGEST_PAUSE)
        return longest * (1 + chance) / 2
