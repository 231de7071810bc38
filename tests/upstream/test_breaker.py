"""When an upstream is left alone: examples, and the rules whatever happens."""

from __future__ import annotations

from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from proxy.upstream.breaker import (
    FIRST_PAUSE,
    LONGEST_PAUSE,
    LONGEST_RETRY_AFTER,
    THRESHOLD,
    Breaker,
    State,
    Ticket,
)


def ticket(breaker: Breaker, now: float = 0.0) -> Ticket:
    """Ask, and be let."""
    admitted = breaker.admit(now)
    assert admitted is not None
    return admitted


def state_of(breaker: Breaker) -> State:
    """Return a breaker's state, which changes with every call."""
    return breaker.state


def opened(jitter: float = 1.0, retry_after: float = 0.0) -> tuple[Breaker, float]:
    """Return a breaker that has just opened at 0, and its pause."""
    breaker = Breaker(lambda: jitter)
    pauses = [breaker.failed(ticket(breaker), 0.0, retry_after) for _ in range(THRESHOLD)]
    assert pauses[:-1] == [None] * (THRESHOLD - 1)
    assert pauses[-1] is not None
    return breaker, pauses[-1]


def test_failures_in_a_row() -> None:
    """It opens after three failures in a row, and one success in between starts the count again."""
    breaker = Breaker()
    for _ in range(3):
        for _ in range(THRESHOLD - 1):
            assert breaker.failed(ticket(breaker), 0.0) is None
        assert not breaker.answered(ticket(breaker))
    assert state_of(breaker) is State.CLOSED


def test_open() -> None:
    """Open, it lets nobody through until the pause is over, and then exactly one."""
    breaker, pause = opened()
    assert breaker.admit(0.0) is None
    assert breaker.admit(pause - 0.001) is None
    assert breaker.pause(pause - 0.25) == 0.25
    assert ticket(breaker, pause).probe
    assert breaker.probing
    assert breaker.admit(pause + 1_000.0) is None


def test_probe_succeeds() -> None:
    """An answer to the probe lets everybody in again, and the next outage starts with a short pause."""
    breaker, pause = opened()
    assert breaker.answered(ticket(breaker, pause))
    assert state_of(breaker) is State.CLOSED
    for _ in range(THRESHOLD - 1):
        assert breaker.failed(ticket(breaker), pause) is None
    assert breaker.failed(ticket(breaker), pause) == FIRST_PAUSE


def test_probe_fails() -> None:
    """Each probe that fails doubles the pause, up to a bound."""
    breaker, pause = opened()
    now, pauses = 0.0, [pause]
    for _ in range(8):
        now += pauses[-1]
        again = breaker.failed(ticket(breaker, now), now)
        assert again is not None
        pauses.append(again)
    assert pauses == [1, 2, 4, 8, 16, 32, *[LONGEST_PAUSE] * 3]


def test_probe_withdrawn() -> None:
    """Where the probe's outcome will not be known, the next question is the probe."""
    breaker, pause = opened()
    probe = ticket(breaker, pause)
    breaker.withdrawn(probe)
    assert not breaker.probing
    again = ticket(breaker, pause)
    assert again.probe
    breaker.withdrawn(again)
    breaker.withdrawn(again)
    assert ticket(breaker, pause).probe


def test_reached() -> None:
    """The beginning of an answer closes it, and is no success as long as the answer may break off."""
    breaker, pause = opened()
    assert breaker.reached(ticket(breaker, pause))
    assert state_of(breaker) is State.CLOSED
    for _ in range(THRESHOLD):
        begun = ticket(breaker, pause)
        assert not breaker.reached(begun)
        breaker.failed(begun, pause)
    assert state_of(breaker) is State.OPEN


def test_what_was_asked_before() -> None:
    """What was asked before it opened neither closes it nor makes the pause longer."""
    breaker = Breaker(lambda: 1.0)
    early = [ticket(breaker) for _ in range(10)]
    for each in early[:THRESHOLD]:
        breaker.failed(each, 0.0)
    assert not breaker.answered(early[4])
    assert breaker.failed(early[5], 0.5) is None
    breaker.withdrawn(early[6])
    assert breaker.pause(0.5) == FIRST_PAUSE - 0.5


def test_overdue() -> None:
    """Silence is a failure, unless others were answered meanwhile: then it was a queue."""
    breaker = Breaker()
    waiting = [ticket(breaker) for _ in range(2 * THRESHOLD)]
    breaker.answered(ticket(breaker))
    for each in waiting:
        assert breaker.overdue(each, 0.0) is None
    assert state_of(breaker) is State.CLOSED
    for _ in range(THRESHOLD):
        breaker.overdue(ticket(breaker), 0.0)
    assert state_of(breaker) is State.OPEN


def test_retry_after() -> None:
    """The upstream's own wish makes the pause longer, up to a bound, and never shorter."""
    assert opened(retry_after=30.0)[1] == 30.0
    assert opened(retry_after=1e9)[1] == LONGEST_RETRY_AFTER
    assert opened(retry_after=0.1)[1] == FIRST_PAUSE


def test_jitter() -> None:
    """The pause is spread over half of its length."""
    assert opened(jitter=0.0)[1] == FIRST_PAUSE / 2
    assert opened(jitter=0.5)[1] == FIRST_PAUSE * 3 / 4


class AnyOrder(RuleBasedStateMachine):
    """Questions that are asked and end in any order, at any time."""

    tickets = Bundle("tickets")

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.breaker = Breaker()
        self.opened_at = 0.0
        self.pause = 0.0
        self.probes: list[Ticket] = []
        self.in_a_row = 0

    @rule(seconds=st.floats(0.0, 200.0))
    def wait(self, seconds: float) -> None:
        """Let time pass."""
        self.now += seconds

    @rule(target=tickets)
    def ask(self) -> Ticket | None:
        """Nobody is admitted during the pause, everybody when closed, and one at a time in between."""
        before = self.breaker.state
        admitted = self.breaker.admit(self.now)
        if before is State.CLOSED:
            assert admitted is not None
            assert not admitted.probe
        elif before is State.OPEN and self.now < self.opened_at + self.pause:
            assert admitted is None
        else:
            assert (admitted is None) == bool(self.probes)
            if admitted is not None:
                self.probes.append(admitted)
        return admitted

    @rule(asked=consumes(tickets), retry_after=st.floats(0.0, 1e6))
    def fail(self, asked: Ticket | None, retry_after: float) -> None:
        """A failure opens it when it is the probe's, or one too many in a row; for a bounded pause."""
        if asked is None:
            return
        before, is_probe = self.breaker.state, asked in self.probes
        pause = self.breaker.failed(asked, self.now, retry_after)
        if pause is None:
            assert not is_probe
            assert self.breaker.state is before
            return
        assert is_probe or before is State.CLOSED
        assert FIRST_PAUSE / 2 <= pause <= max(LONGEST_PAUSE, LONGEST_RETRY_AFTER)
        assert self.breaker.state is State.OPEN
        self.opened_at, self.pause = self.now, pause
        self.probes.clear()

    @rule(asked=consumes(tickets))
    def answer(self, asked: Ticket | None) -> None:
        """A success closes it when it is the probe's."""
        if asked is None:
            return
        before, is_probe = self.breaker.state, asked in self.probes
        assert self.breaker.answered(asked) == is_probe
        assert self.breaker.state is (State.CLOSED if is_probe else before)
        if is_probe:
            self.probes.clear()

    @rule(asked=consumes(tickets))
    def withdraw(self, asked: Ticket | None) -> None:
        """No outcome changes nothing, but makes room for another probe."""
        if asked is None:
            return
        before = self.breaker.state
        self.breaker.withdrawn(asked)
        assert self.breaker.state is before
        if asked in self.probes:
            self.probes.remove(asked)

    @invariant()
    def one_probe(self) -> None:
        """There is at most one probe, and only while it is half open."""
        assert len(self.probes) <= 1
        assert self.breaker.probing == bool(self.probes)
        assert not self.probes or self.breaker.state is State.HALF_OPEN

    @invariant()
    def comes_back(self) -> None:
        """The pause ends."""
        assert self.breaker.pause(self.now + LONGEST_RETRY_AFTER) == 0.0


TestAnyOrder = AnyOrder.TestCase
