"""Store paths: ``/nix/store/<hash part>-<name>``.

The rules for names are those of current Nix (``checkName`` in ``src/libstore/path.cc``). Nix 2.4 to
2.18 also refused every name with a leading dot, which is why such paths are rare; they are accepted
here because a client that refuses them never asks for one.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final, NewType, Self

from proxy.errors import ParseError
from proxy.nix.hashes import NIX32_ALPHABET

STORE_DIR: Final = "/nix/store"
"""The only store directory that this package knows; paths of another one are refused."""

MAX_NAME_LENGTH: Final = 211
"""Characters of a name: 255 of a file name, less hash part, dash and Nix's ``.lock`` and such."""

HASH_PART: Final = re.compile(f"[{NIX32_ALPHABET}]{{32}}")
"""The hash part of a store path: 20 bytes in nix32, with no bit to spare."""

HashPart = NewType("HashPart", str)
"""A text that `HASH_PART` matches."""

HASH_PART_LENGTH: Final = 32
_ILLEGAL_IN_NAME: Final = re.compile(r"[^0-9A-Za-z+\-._?=]")
_ILLEGAL_START: Final = re.compile(r"\.\.?(?:-|\Z)")


def parse_hash_part(text: str) -> HashPart:
    """Read the hash part of a store path.

    Raises:
        ParseError: If it is not 32 digits of nix32.
    """
    if not HASH_PART.fullmatch(text):
        raise ParseError("store path", "the hash part is not 32 digits of nix32")
    return HashPart(text)


@dataclass(frozen=True, slots=True, order=True)
class StorePath:
    """One path of the store; sorts as the full path does, byte by byte.

    Attributes:
        hash_part: The 32 digits that binary caches find it by.
        name: What follows the dash.
    """

    hash_part: HashPart
    name: str

    @classmethod
    def parse(cls, full_path: str) -> Self:
        """Read ``/nix/store/<hash part>-<name>``.

        Raises:
            ParseError: If it lies in another directory, or has no valid base name.
        """
        directory, _, base_name = full_path.rpartition("/")
        if directory != STORE_DIR:
            raise ParseError("store path", f"not directly in {STORE_DIR}")
        return cls.parse_base_name(base_name)

    @classmethod
    def parse_base_name(cls, text: str) -> Self:
        """Read ``<hash part>-<name>``.

        Raises:
            ParseError: If the hash part or the name is not valid.
        """
        hash_part = parse_hash_part(text[:HASH_PART_LENGTH])
        if text[HASH_PART_LENGTH : HASH_PART_LENGTH + 1] != "-":
            raise ParseError("store path", "no dash after the hash part")
        name = text[HASH_PART_LENGTH + 1 :]
        _check_name(name)
        return cls(hash_part, name)

    @property
    def base_name(self) -> str:
        """The last component: ``<hash part>-<name>``."""
        return f"{self.hash_part}-{self.name}"

    def __str__(self) -> str:
        """Write the full path."""
        return f"{STORE_DIR}/{self.hash_part}-{self.name}"


def _check_name(name: str) -> None:
    if not name:
        raise ParseError("store path", "the name is empty")
    if len(name) > MAX_NAME_LENGTH:
        raise ParseError("store path", f"the name is longer than {MAX_NAME_LENGTH} characters")
    if illegal := _ILLEGAL_IN_NAME.search(name):
        raise ParseError("store path", f"illegal character {illegal.group()!r} in the name")
    if _ILLEGAL_START.match(name):
        raise ParseError("store path", "the name starts with the component '.' or '..'")
