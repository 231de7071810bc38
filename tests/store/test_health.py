"""When a disk is looked at again."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from proxy.store.health import FIRST_PAUSE, LONGEST_PAUSE, Health


def test_a_disk_that_works() -> None:
    """A disk that works is no news."""
    health = Health()
    assert not health.probed(0.0, "")
    assert health.reason == ""


def test_a_change_is_news_once() -> None:
    """The first failure and the first success after it are news; what repeats them is not."""
    health = Health()
    assert [health.probed(now, reason) for now, reason in enumerate(["full", "full", "", ""])] == [
        *(True, False),
        *(True, False),
    ]


def test_pauses_grow_to_a_bound() -> None:
    """A disk that stays broken is looked at less and less often, but always again."""
    health = Health()
    pauses = []
    for now in range(10):
        health.probed(now, "full")
        pauses.append(health.pause)
    assert pauses == [FIRST_PAUSE * 2**n if n < 6 else LONGEST_PAUSE for n in range(10)]


def test_a_disk_that_comes_and_goes() -> None:
    """Recovering for a moment does not shorten the pauses; recovering for good does."""
    health = Health()
    for now in (0.0, 1.0):
        health.probed(now, "full")
        health.probed(now, "")
    assert health.pause == 2 * FIRST_PAUSE
    health.probed(1.0 + LONGEST_PAUSE, "full")
    assert health.pause == FIRST_PAUSE


@given(st.lists(st.tuples(st.floats(0, 1e4), st.sampled_from(["", "full", "broken"]))))
def test_pauses_are_bounded(probes: list[tuple[float, str]]) -> None:
    """Whatever is found, the next look is neither at once nor never, and the last word counts."""
    health, now = Health(), 0.0
    for elapsed, reason in probes:
        now += elapsed
        before = health.reason
        assert health.probed(now, reason) == (bool(before) != bool(reason))
        assert health.reason == reason
        assert FIRST_PAUSE <= health.pause <= LONGEST_PAUSE
