"""Tests of `proxy.nix.cache_info`."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.errors import ParseError
from proxy.nix.cache_info import CacheInfo


def test_what_this_proxy_says() -> None:
    """By default: the usual store, mass queries welcome, before cache.nixos.org (40)."""
    assert CacheInfo().format() == b"StoreDir: /nix/store\nWantMassQuery: 1\nPriority: 30\n"


@given(st.builds(CacheInfo, want_mass_query=st.booleans(), priority=st.integers(0, 2**31 - 1)))
def test_round_trip(info: CacheInfo) -> None:
    """What is written reads back."""
    assert CacheInfo.parse(info.format()) == info


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        pytest.param(b"", CacheInfo(want_mass_query=False, priority=0), id="empty"),
        pytest.param(
            b"StoreDir: /nix/store\nWantMassQuery: 1\nPriority: 40\n",
            CacheInfo(want_mass_query=True, priority=40),
            id="cache.nixos.org",
        ),
        pytest.param(
            b"StoreDir: /gnu/store",
            CacheInfo(store_dir="/gnu/store", want_mass_query=False, priority=0),
            id="another store",
        ),
        pytest.param(
            b"StoreDir:/nix/store\r\nWantMassQuery:\t1 \r\nPriority:41\r\n",
            CacheInfo(want_mass_query=True, priority=41),
            id="CRLF and other white space",
        ),
        pytest.param(
            b"WantMassQuery: yes\n", CacheInfo(want_mass_query=False, priority=0), id="yes"
        ),
        pytest.param(
            b"Priority: 40 (high)\n", CacheInfo(want_mass_query=False, priority=40), id="stoi"
        ),
        pytest.param(
            b"Priority: -1\n", CacheInfo(want_mass_query=False, priority=-1), id="negative"
        ),
        pytest.param(
            b"<html>\nGetNarInfosV1: /x\nstoredir: /x\nStoreDir\nPriority\n\n",
            CacheInfo(want_mass_query=False, priority=0),
            id="unknown keys and lines without colon",
        ),
        pytest.param(
            b"Priority: 1\nPriority: 2\n",
            CacheInfo(want_mass_query=False, priority=2),
            id="last wins",
        ),
    ],
)
def test_read_as_nix_does(text: bytes, expected: CacheInfo) -> None:
    """Everything that Nix tolerates is tolerated, with the same result."""
    assert CacheInfo.parse(text) == expected


@pytest.mark.parametrize("value", [b"", b"x", b"high 40", b"2147483648", b"1" * 5000, "٣".encode()])
def test_priority_must_be_a_number(value: bytes) -> None:
    """Nix aborts on such a priority ("stoi"); the line is named."""
    with pytest.raises(ParseError) as caught:
        CacheInfo.parse(b"StoreDir: /nix/store\nPriority: " + value + b"\n")
    assert (caught.value.line, caught.value.field) == (2, "Priority")


@given(st.binary())
def test_parser_survives_anything(text: bytes) -> None:
    """Any bytes are read or refused, never a crash."""
    try:
        info = CacheInfo.parse(text)
    except ParseError:
        return
    assert isinstance(info.priority, int)
