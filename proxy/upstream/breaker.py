"""When to leave an upstream alone: a circuit breaker, pure, with the clock passed in.

Rules:

- It opens after `THRESHOLD` failures in a row. What an upstream answers, "I do not have it" included, is a
  success; what a failure is, the caller says.
- Open, it admits nobody, for a pause that doubles from one outage's attempt to the next, up to a bound, and
  is jittered, so that many proxies do not come back at the same instant.
- Then it is half open: it admits one question, the probe, and decides by that one's outcome.
- A question that was asked before the state changed has no say in the new state.
"""

from __future__ import annotations

import enum
import random
from collections.abc import Callable
from dataclasses import dataclass

THRESHOLD = 3
"""Failures in a row."""

FIRST_PAUSE = 1.0
"""Seconds: most outages are a restart, or a moment without network."""

LONGEST_PAUSE = 60.0
"""Seconds: the longest that a recovered upstream is still left alone."""

LONGEST_RETRY_AFTER = 120.0
"""Seconds of an upstream's own ``Retry-After`` that are honoured."""


class State(enum.Enum):
    """What a breaker does with a question."""

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half-open"


@dataclass(frozen=True, slots=True)
class Ticket:
    """Leave to ask one question; given back with its outcome.

    Attributes:
        era: How often the breaker had changed its state.
        answers: How many answers there had been.
        probe: Whether the breaker's state hangs on this question.
    """

    era: int
    answers: int
    probe: bool


class Breaker:
    """Decides whether one upstream may be asked.

    Args:
        jitter: Returns a number from 0 to 1.
    """

    def __init__(self, jitter: Callable[[], float] = random.random) -> None:
        self.state = State.CLOSED
        self._jitter = jitter
        self._era = 0
        self._answers = 0
        self._failures = 0
        self._openings = 0
        self._until = 0.0
        self._probing = False

    def __repr__(self) -> str:
        return f"<Breaker {self.state.value}>"

    @property
    def probing(self) -> bool:
        """Whether a probe is under way, so that more will be known soon."""
        return self._probing

    def pause(self, now: float) -> float:
        """Return the seconds for which nobody will be admitted."""
        return max(0.0, self._until - now) if self.state is State.OPEN else 0.0

    def admit(self, now: float) -> Ticket | None:
        """Return a ticket when the upstream may be asked."""
        if self.state is State.OPEN and now >= self._until:
            self._change(State.HALF_OPEN)
        if self.state is State.OPEN or self._probing:
            return None
        self._probing = self.state is State.HALF_OPEN
        return Ticket(self._era, self._answers, self._probing)

    def answered(self, ticket: Ticket) -> bool:
        """Count a success; return whether that closed the breaker."""
        if ticket.era != self._era:
            return False
        self._answers += 1
        self._failures = 0
        return ticket.probe and self._close()

    def reached(self, ticket: Ticket) -> bool:
        """Note that an answer has begun, and may still break off; return whether that closed the breaker.

        It closes a half-open one, but does not undo failures: an upstream that begins every answer and
        ends none has failed.
        """
        return ticket.probe and ticket.era == self._era and self._close()

    def failed(self, ticket: Ticket, now: float, retry_after: float = 0.0) -> float | None:
        """Count a failure.

        Args:
            ticket: Of the question that failed.
            now: Seconds on a monotonic clock.
            retry_after: Seconds for which the upstream itself asks to be left alone.

        Returns:
            The seconds of the pause, if that opened the breaker.
        """
        if ticket.era != self._era:
            return None
        self._failures += 1
        if not ticket.probe and self._failures < THRESHOLD:
            return None
        backoff = min(LONGEST_PAUSE, FIRST_PAUSE * 2.0 ** min(self._openings, 30))
        jittered = backoff * (1 + self._jitter()) / 2
        pause = max(jittered, min(retry_after, LONGEST_RETRY_AFTER))
        self._openings += 1
        self._until = now + pause
        self._change(State.OPEN)
        return pause

    def overdue(self, ticket: Ticket, now: float) -> float | None:
        """Count a question that nobody waits for any longer as failed, unless others were answered since.

        Where others were answered, it may have waited for a connection, or its turn.
        """
        return self.failed(ticket, now) if ticket.answers == self._answers else None

    def withdrawn(self, ticket: Ticket) -> None:
        """A question's outcome will not be known; if it was the probe, the next question is."""
        if ticket.probe and ticket.era == self._era:
            self._probing = False

    def _close(self) -> bool:
        self._failures = 0
        self._openings = 0
        self._change(State.CLOSED)
        return True

    def _change(self, state: State) -> None:
        self.state = state
        self._era += 1
        self._probing = False
