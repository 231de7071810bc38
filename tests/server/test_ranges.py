"""Tests of `proxy.server.ranges`."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.errors import RangeError, RequestError
from proxy.server.ranges import ByteRange, Span


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        ("bytes=0-0", ByteRange(0, 0)),
        ("bytes=0-", ByteRange(0, None)),
        ("bytes=100-", ByteRange(100, None)),
        ("bytes=5-10", ByteRange(5, 10)),
        ("bytes=-1", ByteRange(None, 1)),
        ("bytes=-0", ByteRange(None, 0)),
        ("bytes=007-010", ByteRange(7, 10)),
        ("BYTES=0-1", ByteRange(0, 1)),
        ("bytes= 0-1 ", ByteRange(0, 1)),
        ("bytes=0-999999999999999999", ByteRange(0, 999_999_999_999_999_999)),
    ],
)
def test_one_range(header: str, expected: ByteRange) -> None:
    """Each of the three forms of RFC 9110 §14.1.2 is read."""
    assert ByteRange.parse(header) == expected


@pytest.mark.parametrize(
    "header",
    [
        "",
        "none",
        "items=0-1",
        "lines=1",
        "bytes=0-1,3-4",
        "bytes=0-0, -1",
        "bytes=0-1,0-1,0-1",
    ],
)
def test_whole_file_instead(header: str) -> None:
    """Other units and several ranges may be ignored (§14.2): the whole file is as good."""
    assert ByteRange.parse(header) is None


@pytest.mark.parametrize(
    "header",
    [
        "bytes",
        "bytes=",
        "bytes=-",
        "bytes=5",
        "bytes=5-2",
        "bytes=a-b",
        "bytes=0x0-0x1",
        "bytes=1.5-2",
        "bytes=1e3-",
        "bytes=+1-2",
        "bytes=0--1",
        "bytes=--1",
        "bytes=0-1-2",
        "bytes=0 - 1",
        "bytes=1_0-20",
        "bytes==0-1",
        "bytes=0-1;",
        "bytes=0-1,5-2",
        "bytes=0-1,x",
        "bytes=-,-",
        "bytes=\u0661-\u0662",
        "bytes=\N{SUPERSCRIPT TWO}-",
        "bytes=0-1\0",
        "bytes=0-" + "9" * 10_000,
    ],
)
def test_malformed(header: str) -> None:
    """What claims to be a byte range and is none is refused, in a message of bounded length."""
    with pytest.raises(RequestError) as refusal:
        ByteRange.parse(header)
    assert not isinstance(refusal.value, RangeError)
    assert len(str(refusal.value)) < 500


@pytest.mark.parametrize(
    ("header", "size", "expected"),
    [
        ("bytes=0-0", 10, Span(0, 1)),
        ("bytes=0-9", 10, Span(0, 10)),
        ("bytes=0-10", 10, Span(0, 10)),
        ("bytes=9-", 10, Span(9, 10)),
        ("bytes=9-9", 10, Span(9, 10)),
        ("bytes=-1", 10, Span(9, 10)),
        ("bytes=-10", 10, Span(0, 10)),
        ("bytes=-11", 10, Span(0, 10)),
        ("bytes=3-999999999999999999", 10, Span(3, 10)),
    ],
)
def test_placed(header: str, size: int, expected: Span) -> None:
    """A range is cut at the end of the file, and never before its beginning."""
    wanted = ByteRange.parse(header)
    assert wanted is not None
    assert wanted.of(size) == expected


@pytest.mark.parametrize(
    ("header", "size"),
    [
        ("bytes=10-", 10),
        ("bytes=10-10", 10),
        ("bytes=999999999999999999-", 10),
        ("bytes=-0", 10),
        ("bytes=0-", 0),
        ("bytes=0-0", 0),
        ("bytes=-1", 0),
    ],
)
def test_unsatisfiable(header: str, size: int) -> None:
    """A range with no byte of the file in it is refused, and the refusal says the size."""
    wanted = ByteRange.parse(header)
    assert wanted is not None
    with pytest.raises(RangeError) as refusal:
        wanted.of(size)
    assert refusal.value.size == size


numbers = st.integers(0, 30) | st.integers(0, 10**18 - 1)


@given(first=st.none() | numbers, last=st.none() | numbers, size=st.integers(0, 40))
def test_against_a_list_of_positions(first: int | None, last: int | None, size: int) -> None:
    """A range means the positions that RFC 9110 says, counted one by one."""
    header = f"bytes={'' if first is None else first}-{'' if last is None else last}"
    if (first is None and last is None) or (
        first is not None and last is not None and last < first
    ):
        with pytest.raises(RequestError):
            ByteRange.parse(header)
        return
    positions = range(size)
    if first is None:
        chosen = [at for at in positions if size - at <= (last or 0)]
    else:
        chosen = [at for at in positions if first <= at and (last is None or at <= last)]
    wanted = ByteRange.parse(header)
    assert wanted is not None
    if not chosen:
        with pytest.raises(RangeError):
            wanted.of(size)
        return
    span = wanted.of(size)
    assert list(range(span.start, span.stop)) == chosen


@given(st.text() | st.text("bytes=0123456789-, ").map(lambda text: f"bytes={text}"))
def test_any_header_is_understood_or_refused(header: str) -> None:
    """No header raises anything but a refusal, and none makes a range that runs backwards."""
    try:
        wanted = ByteRange.parse(header)
    except RequestError:
        return
    if wanted is not None:
        assert not wanted.is_backward
