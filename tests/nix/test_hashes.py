"""Tests of `proxy.nix.hashes`."""

from __future__ import annotations

import base64

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.errors import ParseError
from proxy.nix.hashes import (
    DIGEST_SIZES,
    NIX32_ALPHABET,
    Hash,
    base64_decode,
    nix32_decode,
    nix32_encode,
    nix32_length,
)
from tests.nix.strategies import hashes, single_file_nar

EMPTY = "0mdqa9w1p6cmli6976v4wi0sw9r4p5prkj7lzfd1877wk11c9c73"
"""SHA-256 of nothing, in nix32."""


def nix32_as_nix_does(data: bytes) -> str:
    """Encode digit by digit, as ``printHash32`` does: an independent second opinion."""
    digits = []
    for position in reversed(range((len(data) * 8 + 4) // 5)):
        byte, shift = divmod(position * 5, 8)
        bits = data[byte] >> shift
        if byte + 1 < len(data):
            bits |= data[byte + 1] << (8 - shift)
        digits.append(NIX32_ALPHABET[bits & 31])
    return "".join(digits)


def test_nix32_of_the_empty_sha256() -> None:
    """The published vector comes out."""
    assert Hash.sha256(b"").nix32 == EMPTY


def test_nar_vector() -> None:
    """The NAR of a file with "hello" in it has the hash that Nix gives it."""
    nar = single_file_nar(b"hello\n")
    assert len(nar) == 120
    assert str(Hash.sha256(nar)) == "sha256:04zwf782yjwnh3q6hz5izfd6jyip8kgw6g6yj43fiqhbyhdd0dqw"
    assert Hash.sha256(nar).sri == "sha256-HDfQGvQL4ugGkd48w99EN3ppmvuxfGjwgJZLL9Bx/BM="


@given(st.binary(max_size=70))
def test_nix32_is_what_nix_writes(data: bytes) -> None:
    """The fast encoding agrees with Nix's, and decodes to what it came from."""
    text = nix32_encode(data)
    assert text == nix32_as_nix_does(data)
    assert len(text) == nix32_length(len(data))
    assert nix32_decode(text) == data


@given(st.text(NIX32_ALPHABET, max_size=70))
def test_nix32_has_one_spelling(text: str) -> None:
    """What decodes at all is the encoding of what it decodes to."""
    try:
        data = nix32_decode(text)
    except ParseError:
        return
    assert nix32_encode(data) == text


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        pytest.param("e" + EMPTY[1:], "character", id="e is no digit"),
        pytest.param(EMPTY.upper(), "character", id="upper case"),
        pytest.param("٣" * 52, "character", id="digits of another script"),
        pytest.param(EMPTY + "\n", "character", id="line break"),
        pytest.param(EMPTY[:-1], "whole number", id="a digit short"),
        pytest.param("z" + EMPTY[1:], "spare bits", id="spare bits set"),
        pytest.param("2" + EMPTY[1:], "spare bits", id="lowest spare bit set"),
    ],
)
def test_nix32_refuses(text: str, reason: str) -> None:
    """What is not nix32 is refused, with the reason."""
    with pytest.raises(ParseError, match=reason):
        nix32_decode(text)


@given(hashes)
def test_every_spelling_is_read(value: Hash) -> None:
    """Hexadecimal, nix32, base64 and SRI of a hash all read as that hash."""
    for encoded in (value.hex, value.hex.upper(), value.nix32, value.base64):
        assert Hash.parse(f"{value.algorithm}:{encoded}") == value
    assert Hash.parse(str(value)) == value
    assert Hash.parse(value.sri) == value
    assert Hash.parse(value.sri.rstrip("=")) == value


@given(hashes)
def test_encodings_are_told_by_length(value: Hash) -> None:
    """No two encodings of an algorithm have the same length."""
    assert len({len(value.hex), len(value.nix32), len(value.base64)}) == 3


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("", id="empty"),
        pytest.param(EMPTY, id="no prefix"),
        pytest.param(f"sha256:{EMPTY}0", id="too long"),
        pytest.param("sha256:", id="no digest"),
        pytest.param(f"SHA256:{EMPTY}", id="upper-case algorithm"),
        pytest.param(f"blake3:{EMPTY}", id="algorithm behind an experimental feature"),
        pytest.param(f" sha256:{EMPTY}", id="leading space"),
        pytest.param(f"sha256:{EMPTY}\r", id="carriage return"),
        pytest.param("sha256:" + "0 " * 32, id="hexadecimal with spaces"),
        pytest.param("sha256:" + "00" * 31 + "  ", id="hexadecimal with spaces at the end"),
        pytest.param("sha256:" + "0g" * 32, id="hexadecimal with a letter too far"),
        pytest.param("sha256:" + "é" * 64, id="hexadecimal beyond ASCII"),
        pytest.param("sha256:" + "*" * 44, id="base64 with a foreign character"),
        pytest.param("sha256-" + "A" * 40, id="SRI too short"),
        pytest.param("sha1-" + "A" * 43 + "=", id="SRI of another algorithm's length"),
    ],
)
def test_hash_refuses(text: str) -> None:
    """What is no hash is refused."""
    with pytest.raises(ParseError):
        Hash.parse(text)


@given(st.text())
def test_hash_parser_survives_anything(text: str) -> None:
    """Any text is read or refused, never a crash."""
    for candidate in (text, f"sha256:{text}", f"sha256-{text}"):
        try:
            value = Hash.parse(candidate)
        except ParseError:
            continue
        assert Hash.parse(str(value)) == value


@pytest.mark.parametrize("algorithm", sorted(DIGEST_SIZES))
def test_a_digest_has_its_length(algorithm: str) -> None:
    """A hash with a digest of the wrong length cannot be made."""
    size = DIGEST_SIZES[algorithm]
    for wrong in (0, size - 1, size + 1):
        with pytest.raises(ParseError, match=f"has {size} bytes, not {wrong}"):
            Hash(algorithm, bytes(wrong))


@given(st.binary(max_size=70))
def test_base64_with_and_without_padding(data: bytes) -> None:
    """Padding may be missing, as in Nix."""
    text = base64.b64encode(data).decode()
    assert base64_decode(text) == data
    assert base64_decode(text.rstrip("=")) == data


@pytest.mark.parametrize(
    "text", ["A", "AAAAA", "A===", "AA=A", "AA-_", "AA A", "AAé=", "====", "\n"]
)
def test_base64_refuses(text: str) -> None:
    """What is no base64 is refused."""
    with pytest.raises(ParseError):
        base64_decode(text)
