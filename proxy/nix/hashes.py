"""Hashes, and the three alphabets Nix writes them in: nix32, hexadecimal and base64.

Rules:

- a hash carries its algorithm, and its digest has that algorithm's length;
- the encoding of a prefixed hash is told by its length alone, as in Nix's
  ``Hash::parseAnyPrefixed`` (``src/libutil/hash.cc``);
- one digest has one spelling in nix32: spare bits that are not zero are refused.

BLAKE3 is refused: Nix reads it only behind an experimental feature, and the standard library not.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import re
from dataclasses import dataclass
from typing import Final, Self

from proxy.errors import ParseError

NIX32_ALPHABET: Final = "0123456789abcdfghijklmnpqrsvwxyz"
"""The digits of nix32: no ``e``, ``o``, ``u``, ``t``, so that no hash spells a swear word."""

DIGEST_SIZES: Final = {"md5": 16, "sha1": 20, "sha256": 32, "sha512": 64}
"""Bytes of a digest, by algorithm."""

_BITS_PER_DIGIT: Final = 5

# Python reads base 32 by itself, a hundred times faster than a loop, but with other digits.
_PYTHON_DIGITS: Final = "0123456789abcdefghijklmnopqrstuv"
_TO_PYTHON: Final = str.maketrans(NIX32_ALPHABET, _PYTHON_DIGITS)
_NIX32: Final = re.compile(f"[{NIX32_ALPHABET}]*")
_DIGIT_PAIRS: Final = tuple(high + low for high in NIX32_ALPHABET for low in NIX32_ALPHABET)

_BASE64: Final = re.compile(r"[A-Za-z0-9+/]*={0,2}")


@functools.lru_cache(4096)  # of a path that is being fetched the same one is written ten times
def nix32_encode(data: bytes) -> str:
    """Write bytes in nix32: the bits of the little-endian number, most significant digit first."""
    length = nix32_length(len(data))
    number = int.from_bytes(data, "little")
    # Two digits a step: half the steps of a loop that is otherwise the cost of this function.
    pairs = []
    for _ in range((length + 1) // 2):
        pairs.append(_DIGIT_PAIRS[number & 0x3FF])
        number >>= 2 * _BITS_PER_DIGIT
    text = "".join(reversed(pairs))
    return text[-length:] if length else ""


def nix32_decode(text: str) -> bytes:
    """Read bytes written in nix32.

    Raises:
        ParseError: For a foreign digit, a length no whole number of bytes has, or spare bits set.
    """
    if not _NIX32.fullmatch(text):
        raise ParseError("nix32", "a character that is not one of the 32 digits")
    size = len(text) * _BITS_PER_DIGIT // 8
    if nix32_length(size) != len(text):
        raise ParseError("nix32", f"{len(text)} digits are no whole number of bytes")
    number = int(text.translate(_TO_PYTHON), 32) if text else 0
    if number >> (8 * size):
        raise ParseError("nix32", "the spare bits of the first digit are not zero")
    return number.to_bytes(size, "little")


def nix32_length(size: int) -> int:
    """Return how many nix32 digits ``size`` bytes take."""
    return (size * 8 + _BITS_PER_DIGIT - 1) // _BITS_PER_DIGIT


def base64_decode(text: str) -> bytes:
    """Read base64 as strictly as Nix does: no foreign character, but the padding may be missing.

    Raises:
        ParseError: If it is not base64.
    """
    digits = text.rstrip("=")
    if not _BASE64.fullmatch(text) or len(digits) % 4 == 1:
        raise ParseError("base64", "not base64")
    return base64.b64decode(digits + "=" * (-len(digits) % 4))


@dataclass(frozen=True, slots=True)
class Hash:
    """A digest and the algorithm that made it.

    Attributes:
        algorithm: A key of `DIGEST_SIZES`.
        digest: The raw bytes.

    Raises:
        ParseError: If the algorithm is unknown, or the digest has not its length.
    """

    algorithm: str
    digest: bytes

    def __post_init__(self) -> None:
        """Refuse a hash that cannot be."""
        size = _digest_size(self.algorithm)
        if len(self.digest) != size:
            reason = f"{self.algorithm} has {size} bytes, not {len(self.digest)}"
            raise ParseError("hash", reason)

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read ``algorithm:`` + hexadecimal, nix32 or base64, or SRI ``algorithm-`` + base64.

        Raises:
            ParseError: If it is none of these.
        """
        algorithm, colon, rest = text.partition(":")
        if colon:
            return cls(algorithm, _decode_by_length(rest, _digest_size(algorithm)))
        algorithm, dash, rest = text.partition("-")
        if dash:
            return cls(algorithm, base64_decode(rest))
        raise ParseError("hash", "no algorithm in front")

    @classmethod
    def sha256(cls, data: bytes) -> Self:
        """Hash ``data`` with SHA-256."""
        return cls("sha256", hashlib.sha256(data).digest())

    @property
    def nix32(self) -> str:
        """The digest in nix32, without prefix."""
        return nix32_encode(self.digest)

    @property
    def hex(self) -> str:
        """The digest in lower-case hexadecimal, without prefix."""
        return self.digest.hex()

    @property
    def base64(self) -> str:
        """The digest in padded base64, without prefix."""
        return base64.b64encode(self.digest).decode()

    @property
    def sri(self) -> str:
        """The hash as web browsers write it: ``sha256-<base64>``."""
        return f"{self.algorithm}-{self.base64}"

    def __str__(self) -> str:
        """Write the hash as narinfos do: ``sha256:<nix32>``."""
        return f"{self.algorithm}:{self.nix32}"


def _digest_size(algorithm: str) -> int:
    try:
        return DIGEST_SIZES[algorithm]
    except KeyError:
        raise ParseError("hash", f"unknown algorithm {algorithm[:20]!r}") from None


def _decode_by_length(text: str, size: int) -> bytes:
    """Decode ``text`` in the one encoding in which ``size`` bytes have its length."""
    if len(text) == 2 * size:
        return _hex_decode(text)
    if len(text) == nix32_length(size):
        return nix32_decode(text)
    if len(text) == 4 * ((size + 2) // 3):
        return base64_decode(text)
    raise ParseError("hash", f"{len(text)} characters fit no encoding of {size} bytes")


def _hex_decode(text: str) -> bytes:
    # It skips white space, but then the digest is too short.
    try:
        return bytes.fromhex(text)
    except ValueError:
        raise ParseError("hash", "not hexadecimal") from None
