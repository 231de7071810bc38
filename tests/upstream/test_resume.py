"""How the rest of a file is asked for, and which answers are that rest."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.upstream.resume import Beginning, Fit, Received, beginning, fit, headers

DATE = "Sun, 22 Nov 2026 10:00:00 GMT"
LATER = "Sun, 22 Nov 2026 10:00:05 GMT"


@pytest.mark.parametrize(
    ("received", "vouched", "expected"),
    [
        (Received(0, 100, '"a"'), True, {}),
        (Received(40, 100, None), False, {}),
        (Received(40, 100, None), True, {"Range": "bytes=40-"}),
        (Received(40, None, '"a"'), False, {"Range": "bytes=40-", "If-Range": '"a"'}),
        (Received(40, 100, DATE), True, {"Range": "bytes=40-", "If-Range": DATE}),
    ],
)
def test_asking(received: Received, vouched: object, expected: dict[str, str]) -> None:
    """A part is asked for only where something says that the rest is of the same file."""
    assert headers(received, vouched=bool(vouched)) == expected


@pytest.mark.parametrize(
    ("received", "answer", "expected"),
    [
        (Received(0, None, None), Beginning(0, 100, None), Fit.CONTINUES),
        (Received(0, 100, None), Beginning(0, 99, None), Fit.CHANGED),
        (Received(40, 100, '"a"'), Beginning(40, 100, '"a"', whole=False), Fit.CONTINUES),
        (Received(40, 100, '"a"'), Beginning(40, 100, None, whole=False), Fit.CONTINUES),
        (Received(40, 100, None), Beginning(40, None, '"b"', whole=False), Fit.CONTINUES),
        (Received(40, 100, '"a"'), Beginning(40, 100, '"b"', whole=False), Fit.CHANGED),
        (Received(40, 100, '"a"'), Beginning(41, 100, '"a"', whole=False), Fit.CHANGED),
        (Received(40, 100, '"a"'), Beginning(39, 100, '"a"', whole=False), Fit.CHANGED),
        (Received(40, 100, '"a"'), Beginning(40, 101, '"a"', whole=False), Fit.CHANGED),
        (Received(40, 100, '"a"'), Beginning(0, 100, '"b"'), Fit.COMPARE),
        (Received(40, 100, '"a"'), Beginning(0, 100, '"a"', whole=False), Fit.CHANGED),
        (Received(40, 100, '"a"'), Beginning(0, 101, '"a"'), Fit.CHANGED),
        (Received(40, None, None), Beginning(0, None, None), Fit.COMPARE),
    ],
)
def test_fitting(received: Received, answer: Beginning, expected: Fit) -> None:
    """What begins elsewhere, is of another size, or says that it is another one, does not fit."""
    assert fit(received, answer) is expected


_sizes = st.none() | st.integers(0, 9)
_validators = st.none() | st.sampled_from(['"a"', '"b"'])


@given(
    received=st.builds(Received, st.integers(0, 9), _sizes, _validators),
    answer=st.builds(Beginning, st.integers(0, 9), _sizes, _validators, st.just(value=False))
    | st.builds(Beginning, st.just(0), _sizes, _validators),
)
def test_never_a_gap(received: Received, answer: Beginning) -> None:
    """Whatever comes, only what begins where we are is taken unseen."""
    verdict = fit(received, answer)
    if verdict is Fit.CONTINUES:
        assert answer.start == received.offset
    if verdict is Fit.COMPARE:
        assert answer.start == 0
    if None not in (received.size, answer.size) and received.size != answer.size:
        assert verdict is Fit.CHANGED


@pytest.mark.parametrize(
    ("status", "fields", "length", "expected"),
    [
        (200, {}, None, Beginning(0, None, None)),
        (200, {"ETag": '"a"'}, 5, Beginning(0, 5, '"a"')),
        (200, {"ETag": 'W/"a"'}, 5, Beginning(0, 5, None)),
        (200, {"ETag": "a"}, 5, Beginning(0, 5, None)),
        (200, {"Last-Modified": DATE, "Date": LATER}, 5, Beginning(0, 5, DATE)),
        (200, {"Last-Modified": DATE, "Date": DATE}, 5, Beginning(0, 5, None)),
        (200, {"Last-Modified": DATE}, 5, Beginning(0, 5, None)),
        (200, {"Last-Modified": "yesterday", "Date": LATER}, 5, Beginning(0, 5, None)),
        (200, {"ETag": '"a"', "Last-Modified": DATE, "Date": LATER}, 5, Beginning(0, 5, '"a"')),
        (200, {"Content-Range": "bytes 2-4/5"}, 5, Beginning(0, 5, None)),
        (206, {"Content-Range": "bytes 2-4/5"}, 3, Beginning(2, 5, None, whole=False)),
        (206, {"Content-Range": "bytes 2-3/5"}, None, Beginning(2, 5, None, whole=False)),
        (206, {"Content-Range": "bytes 2-4/*"}, 3, Beginning(2, None, None, whole=False)),
    ],
)
def test_beginnings(
    status: int, fields: dict[str, str], length: int | None, expected: Beginning
) -> None:
    """Where an answer begins, how long the whole is, and which validator is one."""
    assert beginning(status, fields, length) == expected


@pytest.mark.parametrize(
    ("text", "length"),
    [
        ("", 3),
        ("bytes */5", 3),
        ("bytes 2-4/5", 2),
        ("bytes 4-2/5", None),
        ("items 2-4/5", 3),
        ("bytes 2-4/5, 6-7/8", 3),
        ("bytes -2-4/5", 3),
        ("bytes ²-4/5", 3),
        (f"bytes {'9' * 5000}-4/5", 3),
    ],
)
def test_parts_of_nothing(text: str, length: int | None) -> None:
    """A part that does not say which part it is, is none."""
    with pytest.raises(ValueError, match="part"):
        beginning(206, {"Content-Range": text}, length)


@given(st.text())
def test_any_header(text: str) -> None:
    """Whatever an upstream writes into its headers, nothing but ValueError comes of it."""
    fields = {"ETag": text, "Last-Modified": text, "Date": text, "Content-Range": text}
    beginning(200, fields, None)
    with pytest.raises(ValueError, match="part"):
        beginning(206, fields, None)
