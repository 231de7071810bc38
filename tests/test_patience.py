"""How often and how long a broken transfer is taken up again."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from proxy.patience import (
    ATTEMPTS,
    FIRST_ATTEMPTS,
    FIRST_SILENCE,
    LONGEST_PAUSE,
    LONGEST_RETRY_AFTER,
    LONGEST_SILENCE,
    MUCH,
    SOMETHING,
    Patience,
)


def test_full_jitter() -> None:
    """Pauses are anything from nothing to twice the last bound, which has a bound itself."""
    most = Patience(0.0, lambda: 1.0)
    pauses = [most.failed(0.0, committed=True) for _ in range(8)]
    assert pauses == [0.25, 0.5, 1.0, 2.0, 4.0, *[LONGEST_PAUSE] * 3]
    least = Patience(0.0, lambda: 0.0)
    assert {least.failed(0.0, committed=True) for _ in range(8)} == {0.0}


def test_a_byte_begins_anew() -> None:
    """After something has come the next pause is short again."""
    patience = Patience(0.0, lambda: 1.0)
    for _ in range(5):
        patience.failed(0.0, committed=True)
    patience.heard(0.0, 1)
    assert patience.failed(0.0, committed=True) == 0.25


def test_attempts_are_bounded() -> None:
    """Attempts that bring little are counted, and those that bring much are not."""
    patience = Patience(0.0, lambda: 0.0)
    for _ in range(3 * ATTEMPTS):
        patience.heard(0.0, MUCH)
        assert patience.failed(0.0, committed=True) is not None
    outcomes = []
    for _ in range(ATTEMPTS):
        patience.heard(0.0, 1)
        outcomes.append(patience.failed(0.0, committed=True))
    assert None in outcomes


def test_silence_is_bounded() -> None:
    """Nobody waits for ever for the next byte."""
    patience = Patience(0.0, lambda: 0.0)
    assert patience.failed(LONGEST_SILENCE, committed=True) == 0.0
    assert patience.failed(LONGEST_SILENCE + 1, committed=True) is None
    patience.heard(LONGEST_SILENCE + 1, 1)
    assert patience.failed(2 * LONGEST_SILENCE, committed=True) == 0.0


def test_whoever_has_nothing_does_not_wait_long() -> None:
    """As long as readers have nothing, they can go elsewhere, and are soon told to."""
    patience = Patience(0.0, lambda: 0.0)
    outcomes = [patience.failed(0.0, committed=False) for _ in range(FIRST_ATTEMPTS)]
    assert outcomes == [0.0] * (FIRST_ATTEMPTS - 1) + [None]
    patience.heard(0.0, SOMETHING - 1)
    assert patience.failed(0.0, committed=False) is None
    patience.heard(0.0, SOMETHING)
    assert patience.failed(0.0, committed=False) == 0.0  # it gets somewhere
    assert Patience(0.0).failed(FIRST_SILENCE + 1, committed=False) is None
    assert Patience(0.0).failed(0.0, committed=False, wish=FIRST_SILENCE + 1) is None


def test_wishes() -> None:
    """What an upstream asks for is respected, up to a bound."""
    patience = Patience(0.0, lambda: 0.0)
    assert patience.failed(0.0, committed=True, wish=7.0) == 7.0
    assert patience.failed(0.0, committed=True, wish=1e9) == LONGEST_RETRY_AFTER


@given(
    st.lists(
        st.tuples(st.floats(0, 30), st.integers(0, MUCH // 4), st.floats(0, 1e6), st.booleans())
    )
)
def test_it_ends(steps: list[tuple[float, int, float, bool]]) -> None:
    """Whatever happens, a pause keeps within the longest silence."""
    patience, now, heard = Patience(0.0), 0.0, 0.0
    for seconds, count, wish, committed in steps:
        now += seconds
        if count:
            patience.heard(now, count)
            heard = now
        pause = patience.failed(now, committed=committed, wish=wish)
        assert pause is None or 0 <= now + pause - heard <= LONGEST_SILENCE
