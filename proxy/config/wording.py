"""How messages name things."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection

Key = tuple[str | int, ...]
"""Where a value stands in the document: ``("upstream", 1, "url")``."""

_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")


def quote(text: str) -> str:
    """The text in double quotes, on one line whatever it holds."""
    shown = (c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return f'"{"".join(shown)}"'


def dotted(key: Key) -> str:
    """The key as an operator reads it: ``upstream[1].url``."""
    parts = (f"[{part}]" if isinstance(part, int) else f".{_key_part(part)}" for part in key)
    return "".join(parts).removeprefix(".")


def did_you_mean(word: str, names: Collection[str]) -> str:
    """``; did you mean "…"?`` with the nearest of the names, or nothing when none is near."""
    nearest = difflib.get_close_matches(word, names, n=1)
    return f"; did you mean {quote(nearest[0])}?" if nearest else ""


def alternatives(names: Collection[str]) -> str:
    """The names, quoted: ``"a", "b" or "c"``."""
    *most, last = map(quote, names)
    return f"{', '.join(most)} or {last}" if most else last


def _key_part(name: str) -> str:
    return name if _BARE_KEY.fullmatch(name) else quote(name)
