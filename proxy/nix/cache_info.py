"""``nix-cache-info``: what a binary cache says about itself.

Read as Nix does (``src/libstore/binary-cache-store.cc``): lines without colon and unknown keys are
ignored, values trimmed. This proxy's own is made from the configuration and never passed through,
because some clients keep unknown fields of it for a week.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final, Self

from proxy.errors import ParseError
from proxy.nix.store_path import STORE_DIR

_WHITE_SPACE: Final = " \n\r\t"
_LEADING_NUMBER: Final = re.compile(r"[+-]?[0-9]{1,10}(?![0-9])")
_INT_MAX: Final = 2**31 - 1


@dataclass(frozen=True, slots=True)
class CacheInfo:
    """What a binary cache says about itself; the defaults are what this proxy says.

    Attributes:
        store_dir: Where the paths live.
        want_mass_query: Whether clients may ask for many paths they do not need.
        priority: Lower is asked first; cache.nixos.org says 40, Cachix 41.
    """

    store_dir: str = STORE_DIR
    want_mass_query: bool = True
    priority: int = 30

    @classmethod
    def parse(cls, text: bytes) -> Self:
        """Read what a cache serves, with Nix's defaults (0) for what it does not say.

        Raises:
            ParseError: If it is not UTF-8, or its priority is no number: Nix gives up on both.
        """
        store_dir, want_mass_query, priority = STORE_DIR, False, 0
        for number, line in enumerate(_decode(text).split("\n"), start=1):
            key, colon, value = line.partition(":")
            value = value.strip(_WHITE_SPACE)
            match key + colon:
                case "StoreDir:":
                    store_dir = value
                case "WantMassQuery:":
                    want_mass_query = value == "1"
                case "Priority:":
                    priority = _parse_priority(value, number)
                case _:
                    pass
        return cls(store_dir, want_mass_query, priority)

    def format(self) -> bytes:
        """Write it, every field, ending in one line break."""
        return (
            f"StoreDir: {self.store_dir}\n"
            f"WantMassQuery: {int(self.want_mass_query)}\n"
            f"Priority: {self.priority}\n"
        ).encode()


def _decode(text: bytes) -> str:
    try:
        return text.decode()
    except UnicodeDecodeError:
        raise ParseError("nix-cache-info", "not UTF-8") from None


def _parse_priority(value: str, line: int) -> int:
    """Read a number as ``std::stoi`` does: what follows the digits does not matter."""
    match = _LEADING_NUMBER.match(value)
    if match is None or abs(priority := int(match.group())) > _INT_MAX:
        raise ParseError("nix-cache-info", "not a number", line=line, field="Priority")
    return priority
