"""Tests of `proxy.nix.nar_name`."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.errors import ParseError
from proxy.nix.hashes import Hash
from proxy.nix.nar_name import EXTENSIONS, NarName
from proxy.nix.store_path import parse_hash_part
from tests.nix.strategies import nar_names

HASH_PART = parse_hash_part("w9yy7v61ipb5rx6i35zq1mvc2iqfmps1")
NAR_HASH = Hash.sha256(b"")
STEM = f"{HASH_PART}-{NAR_HASH.nix32}.nar"


@given(nar_names)
def test_round_trip(name: NarName) -> None:
    """A name says everything it was made from, in characters that no URL library touches."""
    text = str(name)
    read = NarName.parse(text)
    assert (read.hash_part, read.nar_hash, read.compression) == (
        name.hash_part,
        name.nar_hash,
        name.compression,
    )
    assert re.fullmatch(r"[A-Za-z0-9.-]+", text)


@given(nar_names, nar_names)
def test_sameness(one: NarName, other: NarName) -> None:
    """Names are the same, also as keys, exactly when they read the same; and never the same as their text."""
    assert (one == other) == (str(one) == str(other))
    assert {one, NarName.parse(str(one))} == {one}
    assert one != str(one)


@pytest.mark.parametrize(
    ("compression", "extension"),
    [
        ("none", ""),
        ("xz", ".xz"),
        ("bzip2", ".bz2"),
        ("gzip", ".gz"),
        ("zstd", ".zst"),
        ("br", ".br"),
        ("lz4", ".lz4"),
        ("lzip", ".lzip"),
        ("lzma", ".lzma"),
        ("compress", ".Z"),
        ("grzip", ".grz"),
        ("lrzip", ".lrz"),
        ("lzop", ".lzo"),
    ],
)
def test_extensions_never_change(compression: str, extension: str) -> None:
    """Clients remember issued names for 30 days: each compression keeps its extension."""
    assert str(NarName(HASH_PART, NAR_HASH, compression)) == STEM + extension
    assert NarName.parse(STEM + extension).compression == compression


def test_extensions_tell_compressions_apart() -> None:
    """No two compressions share an extension."""
    assert len(set(EXTENSIONS.values())) == len(EXTENSIONS)


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("", id="empty"),
        pytest.param(STEM + ".", id="empty extension"),
        pytest.param(STEM + ".zip", id="unknown extension"),
        pytest.param(STEM + ".xz.xz", id="two extensions"),
        pytest.param(STEM + ".XZ", id="upper-case extension"),
        pytest.param(STEM + "\n", id="line break"),
        pytest.param("nar/" + STEM, id="folder in front"),
        pytest.param(STEM + "?x=1", id="query"),
        pytest.param(STEM[:-4], id="no .nar"),
        pytest.param(f"{NAR_HASH.nix32}.nar", id="one hash"),
        pytest.param(f"{HASH_PART}-{NAR_HASH.hex}.nar", id="hexadecimal NarHash"),
        pytest.param(f"{HASH_PART[1:]}-{NAR_HASH.nix32}.nar", id="hash part too short"),
        pytest.param(f"{HASH_PART}-z{NAR_HASH.nix32[1:]}.nar", id="spare bits set"),
        pytest.param(STEM.upper(), id="upper case"),
    ],
)
def test_refuses(text: str) -> None:
    """What is not a name of ours is refused."""
    with pytest.raises(ParseError):
        NarName.parse(text)


@given(st.text())
def test_parser_survives_anything(text: str) -> None:
    """Any text is read or refused, never a crash."""
    for candidate in (text, STEM + text):
        try:
            name = NarName.parse(candidate)
        except ParseError:
            continue
        assert str(name) == candidate
