"""Tests of `proxy.nix.store_path`."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.errors import ParseError
from proxy.nix.store_path import HASH_PART, StorePath, parse_hash_part
from tests.nix.strategies import hash_parts, store_paths

HASH = "w9yy7v61ipb5rx6i35zq1mvc2iqfmps1"


@given(store_paths)
def test_round_trip(path: StorePath) -> None:
    """A path reads back from its text and from its base name."""
    assert StorePath.parse(str(path)) == path
    assert StorePath.parse_base_name(path.base_name) == path
    assert str(path) == f"/nix/store/{path.base_name}"


@given(st.lists(store_paths))
def test_paths_sort_as_their_bytes(paths: list[StorePath]) -> None:
    """Sorting paths is sorting their full texts byte by byte, which is what gets signed."""
    texts = [str(path).encode() for path in sorted(paths)]
    assert texts == sorted(texts)


@given(st.text())
def test_parsers_survive_anything(text: str) -> None:
    """Any text is read or refused, never a crash."""
    for candidate in (text, f"/nix/store/{text}", f"/nix/store/{HASH}-{text}"):
        try:
            path = StorePath.parse(candidate)
        except ParseError:
            continue
        assert str(path) == candidate


@given(hash_parts)
def test_hash_part_round_trip(text: str) -> None:
    """A hash part is taken as it is."""
    assert parse_hash_part(text) == text
    assert HASH_PART.fullmatch(text)


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("", id="empty"),
        pytest.param(HASH[:-1], id="31 digits"),
        pytest.param(HASH + "0", id="33 digits"),
        pytest.param(HASH.upper(), id="upper case"),
        pytest.param(HASH[:-1] + "e", id="e"),
        pytest.param(HASH[:-1] + "o", id="o"),
        pytest.param(HASH[:-1] + "u", id="u"),
        pytest.param(HASH[:-1] + "t", id="t"),
        pytest.param(HASH + "\n", id="line break"),
        pytest.param(HASH[:-1] + "\0", id="null byte"),
        pytest.param("../" + HASH[3:], id="way out of the folder"),
        pytest.param(HASH[:-1] + "٣", id="digit of another script"),
    ],
)
def test_hash_part_refuses(text: str) -> None:
    """What is not 32 digits of nix32 is refused."""
    with pytest.raises(ParseError, match="32 digits"):
        parse_hash_part(text)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("a" * 211, id="longest"),
        pytest.param("0+-._?=Z", id="every kind of character"),
        pytest.param(".bashrc", id="leading dot"),
        pytest.param("...", id="three dots"),
        pytest.param(".a-b", id="leading dot before a dash"),
        pytest.param("-", id="a dash"),
    ],
)
def test_names_that_nix_takes(name: str) -> None:
    """Names that current Nix takes are taken."""
    assert StorePath.parse(f"/nix/store/{HASH}-{name}").name == name


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        pytest.param("", "directly in", id="empty"),
        pytest.param(f"{HASH}-hello", "directly in", id="base name"),
        pytest.param(f"/gnu/store/{HASH}-hello", "directly in", id="another store"),
        pytest.param(f"/nix/store//{HASH}-hello", "directly in", id="double slash"),
        pytest.param(f"/nix/store/{HASH}-hello/bin", "directly in", id="below a path"),
        pytest.param(f"/nix/store/{HASH}-hello/", "directly in", id="trailing slash"),
        pytest.param("/nix/store/", "32 digits", id="the store itself"),
        pytest.param(f"/nix/store/{HASH}", "no dash", id="no name"),
        pytest.param(f"/nix/store/{HASH}_hello", "no dash", id="no dash"),
        pytest.param(f"/nix/store/{HASH}-", "empty", id="empty name"),
        pytest.param(f"/nix/store/{HASH}-" + "a" * 212, "longer", id="name too long"),
        pytest.param(f"/nix/store/{HASH}-hello\r", "'\\\\r'", id="carriage return"),
        pytest.param(f"/nix/store/{HASH}-hello\n", "'\\\\n'", id="line break"),
        pytest.param(f"/nix/store/{HASH}-hello world", "' '", id="space"),
        pytest.param(f"/nix/store/{HASH}-héllo", "'é'", id="beyond ASCII"),
        pytest.param(f"/nix/store/{HASH}-.", "component", id="dot"),
        pytest.param(f"/nix/store/{HASH}-..", "component", id="two dots"),
        pytest.param(f"/nix/store/{HASH}-.-a", "component", id="dot before a dash"),
        pytest.param(f"/nix/store/{HASH}-..-a", "component", id="two dots before a dash"),
    ],
)
def test_store_path_refuses(text: str, reason: str) -> None:
    """What is no store path is refused, with the reason."""
    with pytest.raises(ParseError, match=reason):
        StorePath.parse(text)
