"""A mapping that keeps what was used most recently."""

from __future__ import annotations

from collections import OrderedDict

from hypothesis import given
from hypothesis import strategies as st

from proxy.recent import Recent

KEYS = st.integers(0, 8)
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("put"), KEYS),
        st.tuples(st.just("get"), KEYS),
        st.tuples(st.just("drop"), KEYS),
        st.tuples(st.just("clear"), st.just(0)),
    ),
    max_size=60,
)


def test_the_least_recent_goes() -> None:
    """When there are too many things, the one that was not used for longest is dropped."""
    recent: Recent[str, int] = Recent(2)
    recent.put("a", 1)
    recent.put("b", 2)
    recent.put("c", 3)
    assert [recent.get(key) for key in "abc"] == [None, 2, 3]


def test_looking_is_using() -> None:
    """What was looked up stays, and what was only put earlier goes."""
    recent: Recent[str, int] = Recent(2)
    recent.put("a", 1)
    recent.put("b", 2)
    assert recent.get("a") == 1
    recent.put("c", 3)
    assert [recent.get(key) for key in "abc"] == [1, None, 3]


def test_putting_again_is_using() -> None:
    """A thing put again is the newest, and replaces the old one without a second place."""
    recent: Recent[str, int] = Recent(2)
    recent.put("a", 1)
    recent.put("b", 2)
    recent.put("a", 3)
    recent.put("c", 4)
    assert [recent.get(key) for key in "abc"] == [3, None, 4]


def test_what_is_false_is_kept() -> None:
    """A thing that counts as false is a thing."""
    recent: Recent[str, float] = Recent(2)
    recent.put("a", 0.0)
    assert recent.get("a") == 0.0


def test_dropping_what_is_not_there() -> None:
    """What is not there can be dropped."""
    recent: Recent[str, int] = Recent(2)
    recent.drop("a")
    assert len(recent) == 0


def test_what_is_dropped_is_told() -> None:
    """Whoever holds something for a thing learns when it is kept no longer, for whatever reason."""
    told: list[str] = []
    recent: Recent[str, str] = Recent(2, told.append)
    recent.put("a", "first")
    recent.put("b", "second")
    assert told == []
    recent.put("c", "third")
    assert told == ["first"]
    recent.put("b", "fourth")
    assert told == ["first", "second"]
    recent.drop("c")
    recent.drop("c")
    assert told == ["first", "second", "third"]
    recent.clear()
    recent.clear()
    assert told == ["first", "second", "third", "fourth"]


def test_looking_at_all_is_no_use() -> None:
    """Who looks at everything does not change what is the least recent."""
    recent: Recent[str, int] = Recent(2)
    recent.put("a", 1)
    recent.put("b", 2)
    assert recent.get("a") == 1
    assert sorted(recent.values()) == [1, 2]
    recent.put("c", 3)
    assert sorted(recent.values()) == [1, 3]


def test_weights() -> None:
    """Things can count for more than one, and what is dropped counts no longer."""
    told: list[str] = []
    recent: Recent[str, str] = Recent(10, told.append, weigh=len)
    recent.put("a", "xxxx")
    recent.put("b", "yyyy")
    recent.put("c", "zz")
    assert told == []
    recent.put("d", "wwwww")
    assert told == ["xxxx", "yyyy"]
    recent.put("d", "w")
    recent.put("e", "v" * 7)
    assert sorted(recent.values()) == ["v" * 7, "w", "zz"]


def test_too_heavy() -> None:
    """What is heavier than all that may be kept is not kept."""
    told: list[str] = []
    recent: Recent[str, str] = Recent(3, told.append, weigh=len)
    recent.put("a", "xxxx")
    assert (len(recent), told) == (0, ["xxxx"])
    recent.put("b", "yyy")
    assert recent.get("b") == "yyy"


@given(most=st.integers(1, 5), steps=STEPS)
def test_against_a_model(most: int, steps: list[tuple[str, int]]) -> None:
    """Whatever is done, it holds the things used last, never more than allowed, and tells what goes."""
    told: list[int] = []
    put: list[int] = []
    recent: Recent[int, int] = Recent(most, told.append)
    model: OrderedDict[int, int] = OrderedDict()
    for number, (step, key) in enumerate(steps):
        match step:
            case "put":
                recent.put(key, number)
                put.append(number)
                model.pop(key, None)
                model[key] = number
                while len(model) > most:
                    model.popitem(last=False)
            case "get":
                assert recent.get(key) == model.get(key)
                if key in model:
                    model.move_to_end(key)
            case "drop":
                recent.drop(key)
                model.pop(key, None)
            case _:
                recent.clear()
                model.clear()
        assert len(recent) == len(model) <= most
        assert sorted(recent.values()) == sorted(model.values())
        assert sorted([*told, *model.values()]) == put  # each thing once
    assert {key: recent.get(key) for key in range(9) if recent.get(key) is not None} == model
