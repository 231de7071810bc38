"""What nobody has, as far as every upstream said, and for how long that is believed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from proxy.errors import NotFoundError
from proxy.recent import Recent

ABSENT = 100_000
"""Remembered absences, of about 200 bytes each."""

LONGEST = 300
"""Characters of a name whose absence is remembered; only names that others made up are longer."""


class Absences:
    """Names of things that are absent: ``{hash part}.narinfo``, NARs, other files.

    Args:
        ttl: Seconds that an absence is believed.
        clock: Seconds on a monotonic clock.
    """

    def __init__(self, ttl: float, clock: Callable[[], float]) -> None:
        self.ttl = ttl
        self._clock = clock
        self._until: Recent[str, float] = Recent(ABSENT)
        self.until = self._until.peek
        """Returns until when a thing counts as absent, by the clock; this counts as no use."""

    def __contains__(self, name: str) -> bool:
        return self.remaining(name) > 0.0

    def remaining(self, name: str) -> float:
        """Return the seconds for which an absence is still believed; 0 if it is not."""
        return max(0.0, (self._until.get(name) or 0.0) - self._clock())

    def add(self, name: str) -> None:
        """Remember that something is absent."""
        if len(name) <= LONGEST:
            self._until.put(name, self._clock() + self.ttl)

    def drop(self, name: str) -> None:
        """Something is there after all."""
        self._until.drop(name)

    def clear(self) -> None:
        """Believe nothing any more."""
        self._until.clear()

    def refuse(self, name: str) -> None:
        """Do not ask for what is absent.

        Raises:
            NotFoundError: It is.
        """
        if name in self:
            raise NotFoundError(f"no upstream has {name}")

    @contextlib.contextmanager
    def noted(self, name: str) -> Iterator[None]:
        """Do not ask for what is absent, and remember when it turns out to be.

        Raises:
            NotFoundError: It is.
        """
        self.refuse(name)
        try:
            yield
        except NotFoundError:
            self.add(name)
            raise
