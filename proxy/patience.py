"""How often, and for how long, a transfer that broke is taken up again. Pure: the clock is passed in."""

from __future__ import annotations

import random
from collections.abc import Callable

ATTEMPTS = 20
"""Attempts that fail without having brought much."""

FIRST_ATTEMPTS = 3
"""Attempts in a row that bring hardly anything, as long as readers have nothing: they can go elsewhere."""

SOMETHING = 2**14
"""Bytes that are more than hardly anything."""

MUCH = 2**20
"""Bytes after which a failed attempt does not count: whoever brings so much gets somewhere."""

LONGEST_SILENCE = 120.0
"""Seconds without a byte. Nix gives up after 300 (``stalled-download-timeout``)."""

FIRST_SILENCE = 5.0
"""Seconds without a byte after which nothing is tried again as long as readers have nothing."""

FIRST_PAUSE = 0.25
LONGEST_PAUSE = 5.0

LONGEST_RETRY_AFTER = 30.0
"""Seconds of an upstream's ``Retry-After`` that are honoured while readers wait."""


class Patience:
    """Decides when to try again.

    Args:
        now: Seconds on a monotonic clock.
        jitter: Returns a number from 0 to 1.
    """

    def __init__(self, now: float, jitter: Callable[[], float] = random.random) -> None:
        self._jitter = jitter
        self._heard = now
        self._brought = 0
        self._attempts = 0
        self._in_vain = 0
        self._fruitless = 0

    def heard(self, now: float, count: int) -> None:
        """Note that bytes arrived."""
        self._heard = now
        self._in_vain = 0
        self._brought += count
        if self._brought >= MUCH:
            self._attempts = 0

    def failed(self, now: float, *, committed: bool, wish: float = 0.0) -> float | None:
        """Note that an attempt failed.

        Args:
            now: Seconds on a monotonic clock.
            committed: Whether readers have something already.
            wish: Seconds that the upstream, or its breaker, asks for.

        Returns:
            Seconds until the next attempt; None to give up.
        """
        self._attempts += 1
        self._fruitless = 0 if self._brought >= SOMETHING else self._fruitless + 1
        self._brought = 0
        spread = min(LONGEST_PAUSE, FIRST_PAUSE * 2.0 ** min(self._in_vain, 10)) * self._jitter()
        self._in_vain += 1
        pause = max(spread, min(wish, LONGEST_RETRY_AFTER))
        silence = LONGEST_SILENCE if committed else FIRST_SILENCE
        enough = self._attempts >= ATTEMPTS or (not committed and self._fruitless >= FIRST_ATTEMPTS)
        return None if enough or now + pause - self._heard > silence else pause
