"""Which store paths an upstream is asked for, by their names. Pure."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Sequence

_WILDCARDS = "*?[]!^"
_GLOB = re.compile(rf"[0-9A-Za-z+\-._?={re.escape(_WILDCARDS)}]+")
_OPEN = re.compile(r"\[[^\]]*\Z")


def check_glob(text: str) -> str:
    """Return a glob over the names of store paths, such as ``hello-*``.

    Raises:
        ValueError: No name could ever match it.
    """
    if not text:
        raise ValueError("is empty: no store path has such a name")
    if not _GLOB.fullmatch(text):
        raise ValueError(
            'matches no store path: a name, as in "hello-2.12", has only letters, digits and "+-._?="'
        )
    if _OPEN.search(text):
        raise ValueError('has a "[" without "]"')
    return text


class NameFilter:
    """Decides by the name of a store path, the part behind the hash.

    Args:
        allow: Globs, one of which has to match; None lets every name in.
        deny: Globs, none of which may match.
    """

    def __init__(self, allow: Sequence[str] | None = None, deny: Sequence[str] = ()) -> None:
        self._allow = None if allow is None else _any_of(allow)
        self._deny = _any_of(deny)
        self.is_open = allow is None and not deny
        """Whether every name passes."""

    def passes(self, name: str) -> bool:
        """Tell whether a path of this name is wanted."""
        if self.is_open:
            return True
        allowed = self._allow is None or self._allow.fullmatch(name) is not None
        return allowed and self._deny.fullmatch(name) is None


def _any_of(globs: Sequence[str]) -> re.Pattern[str]:
    """Compile globs; of none of them, what never matches."""
    return re.compile("|".join(map(fnmatch.translate, globs)) or r"(?!)")
