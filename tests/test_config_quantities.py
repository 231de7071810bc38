"""Sizes and durations: what units mean, and that nothing else gets through."""

from __future__ import annotations

import re
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.config.quantities import (
    DURATION_UNITS,
    MAX_DURATION,
    MAX_SIZE,
    SIZE_UNITS,
    parse_duration,
    parse_size,
    parse_timeout,
)

BLANKS = st.sampled_from(["", " "])
CASES = st.sampled_from([str.lower, str.upper, str])
ANYTHING = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | st.from_regex(r"-?[0-9]*\.?[0-9]* ?[kKMGTP]?i?[Bsmhd]*", fullmatch=True)
    | st.lists(st.integers())
)


@pytest.mark.parametrize(
    ("written", "size"),
    [
        (0, 0),
        (1024, 1024),
        (MAX_SIZE, MAX_SIZE),
        ("0B", 0),
        ("512 b", 512),
        ("1kB", 1000),
        ("1KiB", 1024),
        ("10GB", 10_000_000_000),
        ("64MiB", 67_108_864),
        ("50GiB", 53_687_091_200),
        ("1.5TiB", 1_649_267_441_664),
        ("0.3B", 0),
        ("8191.999PiB", 9_223_370_910_954_868_965),
    ],
)
def test_size(written: object, size: int) -> None:
    """A size is a number of bytes, or has a unit."""
    assert parse_size(written) == size


@pytest.mark.parametrize(
    ("written", "seconds"),
    [
        (0, 0),
        (90, 90),
        (0.25, 0.25),
        ("0s", 0),
        ("500ms", 0.5),
        ("60s", 60),
        ("1.5 m", 90),
        ("5M", 300),
        ("1h", 3600),
        ("2d", 172_800),
        ("3650d", MAX_DURATION),
    ],
)
def test_duration(written: object, seconds: float) -> None:
    """A duration is a number of seconds, or has a unit."""
    duration = parse_duration(written)

    assert duration == seconds
    assert isinstance(duration, float)


@given(st.integers(0, 8000), st.sampled_from(list(SIZE_UNITS)), BLANKS, CASES)
def test_size_is_number_times_unit(number: int, unit: str, blank: str, case: type[str]) -> None:
    """Every unit of sizes counts exactly, in upper and lower case."""
    assert parse_size(f"{number}{blank}{case(unit)}") == number * SIZE_UNITS[unit]


@given(st.decimals(0, 8000, places=6), st.sampled_from(list(SIZE_UNITS)))
def test_fraction_of_a_byte_is_dropped(number: object, unit: str) -> None:
    """A fraction of a unit counts to the byte."""
    assert parse_size(f"{number}{unit}") == int(Fraction(str(number)) * SIZE_UNITS[unit])


@given(st.integers(0, 3650), st.sampled_from(list(DURATION_UNITS)), BLANKS, CASES)
def test_duration_is_number_times_unit(number: int, unit: str, blank: str, case: type[str]) -> None:
    """Every unit of durations counts exactly, in upper and lower case."""
    assert parse_duration(f"{number}{blank}{case(unit)}") == float(number * DURATION_UNITS[unit])


@given(ANYTHING)
def test_size_is_in_range_or_refused(written: object) -> None:
    """Nothing becomes a size that is negative, too large or no whole number."""
    try:
        size = parse_size(written)
    except ValueError:
        return
    assert type(size) is int
    assert 0 <= size <= MAX_SIZE


@given(ANYTHING)
def test_duration_is_in_range_or_refused(written: object) -> None:
    """Nothing becomes a duration that is negative, endless or no number."""
    try:
        seconds = parse_duration(written)
    except ValueError:
        return
    assert type(seconds) is float
    assert 0 <= seconds <= MAX_DURATION


SIZE = 'expected a size like "50GiB", or a whole number of bytes'
DURATION = 'expected a duration like "60s", or a number of seconds'


@pytest.mark.parametrize(
    ("written", "reason"),
    [
        (True, SIZE),
        (1.0, SIZE),
        (["1B"], SIZE),
        ("", '"" is not a size like "50GiB"'),
        ("GiB", '"GiB" is not a size like "50GiB"'),
        ("1,5GiB", '"1,5GiB" is not a size like "50GiB"'),
        ("1.GiB", '"1.GiB" is not a size like "50GiB"'),
        ("1e3B", '"1e3B" is not a size like "50GiB"'),
        ("٣GiB", '"٣GiB" is not a size like "50GiB"'),
        ("1GiB\n", r'"1GiB\n" is not a size like "50GiB"'),
        ("1" * 31 + "B", f'"{"1" * 31}B" is not a size like "50GiB"'),
        (
            "500",
            '"500" has no unit: expected a size like "50GiB", or a number without quotes',
        ),
        ("-1GiB", "must not be negative"),
        (-1, "must not be negative"),
        (2**63, f"must be at most {MAX_SIZE} bytes, as file systems count no further"),
        ("8192PiB", f"must be at most {MAX_SIZE} bytes, as file systems count no further"),
    ],
)
def test_wrong_size(written: object, reason: str) -> None:
    """What is not a size is told with what would be one."""
    with pytest.raises(ValueError, match=rf"^{re.escape(reason)}\Z"):
        parse_size(written)


@pytest.mark.parametrize(
    ("written", "reason"),
    [
        (False, DURATION),
        ({}, DURATION),
        ("60", '"60" has no unit: expected a duration like "60s", or a number without quotes'),
        ("1h30m", '"1h30m" is not a duration like "60s"'),
        ("-1s", "must not be negative"),
        (-0.5, "must not be negative"),
        (float("nan"), "must be at most ten years"),
        (float("inf"), "must be at most ten years"),
        (10**400, "must be at most ten years"),
        ("3651d", "must be at most ten years"),
        ("5 min", '"5 min" has an unknown unit: expected "ms", "s", "m", "h" or "d"'),
    ],
)
def test_wrong_duration(written: object, reason: str) -> None:
    """What is not a duration is told with what would be one."""
    with pytest.raises(ValueError, match=rf"^{re.escape(reason)}\Z"):
        parse_duration(written)


def test_timeout_is_a_duration_of_more_than_nothing() -> None:
    """A wait of no time is refused, because it would make everything time out."""
    assert parse_timeout("1ms") == 0.001
    for nothing in (0, 0.0, "0s"):
        with pytest.raises(ValueError, match=r"^must be more than 0"):
            parse_timeout(nothing)
