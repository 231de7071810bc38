"""When a worker that has ended is started again."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from proxy.workers.restarts import FIRST_PAUSE, LONGEST_PAUSE, SETTLED, Restarts

LIVES = st.lists(st.floats(0, 10 * SETTLED), min_size=1, max_size=2_000)
CHANCES = st.floats(0, 1)


@given(LIVES, CHANCES)
def test_pauses_are_bounded(lives: list[float], chance: float) -> None:
    """Whatever becomes of a worker, the next one comes soon, but never at once."""
    restarts = Restarts()
    for lived in lives:
        restarts = restarts.after(lived)
        assert FIRST_PAUSE / 2 <= restarts.pause(chance) <= LONGEST_PAUSE


@given(st.integers(1, 2_000), CHANCES)
def test_pauses_grow(failures: int, chance: float) -> None:
    """One failed start after the other, pauses get no shorter, and double until they are longest."""
    pause, following = Restarts(failures).pause(chance), Restarts(failures).after(0).pause(chance)
    assert following >= pause
    assert following == 2 * pause or Restarts(failures + 1).pause(1) == LONGEST_PAUSE


@given(LIVES, CHANCES)
def test_a_long_life_forgives(lives: list[float], chance: float) -> None:
    """A worker that has lived a while is replaced as quickly as the first one that failed."""
    restarts = Restarts()
    for lived in (*lives, SETTLED):
        restarts = restarts.after(lived)
    assert restarts.pause(chance) <= FIRST_PAUSE


def test_chance_spreads() -> None:
    """Workers that end together are not started together."""
    assert Restarts(3).pause(0) == Restarts(3).pause(1) / 2
