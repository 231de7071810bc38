"""What to evict, and how much room there is before anything has to be: the two agree."""

from __future__ import annotations

from hypothesis import assume, example, given
from hypothesis import strategies as st

from proxy.store.eviction import Candidate, Limits, choose, excess, room

BYTES = st.integers(0, 2**50)
LIMITS = st.builds(Limits, max_size=BYTES, min_free=BYTES)


@given(limits=LIMITS, used=BYTES, free=BYTES)
@example(limits=Limits(max_size=1), used=0, free=10)
@example(limits=Limits(), used=5, free=10)
def test_what_finds_room_evicts_nothing(limits: Limits, used: int, free: int) -> None:
    """Where nothing is to be evicted, nothing is either once the room is taken."""
    assume(excess(limits, used=used, free=free) == 0)
    left = room(limits, used=used, free=free)

    assert excess(limits, used=used + left, free=free - left) == 0


@given(limits=LIMITS, used=BYTES, free=BYTES)
@example(limits=Limits(max_size=1), used=0, free=10)
def test_the_room_is_not_smaller_than_it_is(limits: Limits, used: int, free: int) -> None:
    """One byte more than the room has to evict something, or does not fit on the disk."""
    assume(excess(limits, used=used, free=free) == 0)
    more = room(limits, used=used, free=free) + 1

    assert more > free or excess(limits, used=used + more, free=free - more) > 0


@given(limits=LIMITS, used=BYTES, free=BYTES)
def test_there_is_no_room_while_something_is_to_be_evicted(
    limits: Limits, used: int, free: int
) -> None:
    """Room is never negative, never more than the disk has, and none beyond a limit."""
    left = room(limits, used=used, free=free)

    assert 0 <= left <= free
    assert left == 0 or excess(limits, used=used, free=free) == 0


@given(sizes=st.lists(st.integers(0, 1_000)), wanted=st.integers(-10, 20_000))
def test_the_oldest_are_chosen(sizes: list[int], wanted: int) -> None:
    """No more candidates than are needed, the first ones, and enough if there are enough."""
    candidates = [Candidate(str(number), size) for number, size in enumerate(sizes)]
    chosen = choose(candidates, wanted)

    assert chosen == candidates[: len(chosen)]
    assert len(chosen) == len(candidates) or sum(each.size for each in chosen) >= wanted
    assert sum(each.size for each in chosen[:-1]) < wanted or chosen == []
