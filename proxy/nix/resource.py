"""What a URL of a binary cache names.

The grammar is closed: a request target that is not one of these forms is refused before any upstream, and
any file, is touched. It is matched as it came over the wire, before anything is decoded, so ``%2e%2e``,
``//`` and absolute-form targets have no second reading.

Source: the list of URLs that Nix and Lix request (nix ``src/libstore/http-binary-cache-store.cc``,
``binary-cache-store.cc``), and what other clients of binary caches ask for.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from proxy.errors import NotFoundError, ParseError, RequestError
from proxy.nix.nar_name import NarName
from proxy.nix.store_path import HashPart, parse_hash_part

T = TypeVar("T")

MAX_TARGET = 1024
"""Characters; the longest target that Nix sends (a build log's) has about 260."""


@dataclass(frozen=True, slots=True)
class CacheInfoFile:
    """``nix-cache-info``."""


@dataclass(frozen=True, slots=True)
class NarinfoFile:
    """``{hash part}.narinfo``."""

    hash_part: HashPart


@dataclass(frozen=True, slots=True)
class NarFile:
    """A NAR by the name that this proxy gives it: ``nar/{hash part}-{NarHash}.nar[.ext]``."""

    name: NarName


@dataclass(frozen=True, slots=True)
class ForeignNar:
    """A NAR by a name that somebody else gave it, with its query: ``nar/…``."""

    reference: str


@dataclass(frozen=True, slots=True)
class SideFile:
    """A listing, log, realisation or debug info; ``path`` is relative and safe as a file name."""

    path: str
    content_type: str


Resource = CacheInfoFile | NarinfoFile | NarFile | ForeignNar | SideFile

_NAME = r"[0-9a-zA-Z+\-._?=]{1,211}"
_OUTPUT = r"[0-9a-zA-Z+\-_?=][0-9a-zA-Z+\-._?=]{0,159}"
# An output's name: with what stands around it, a file name of at most 255 bytes, and not a hidden one.
_STORE_BASE_NAME = rf"[0-9abcdfghijklmnpqrsvwxyz]{{32}}-{_NAME}"
_JSON = "application/json"

_SIDE_FILES: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"[0-9abcdfghijklmnpqrsvwxyz]{32}\.ls"), _JSON),
    (re.compile(rf"log/{_STORE_BASE_NAME}"), "text/plain; charset=utf-8"),
    (re.compile(rf"realisations/sha256:[0-9a-f]{{64}}!{_OUTPUT}\.doi"), _JSON),
    (re.compile(rf"build-trace-v2/{_STORE_BASE_NAME}/{_OUTPUT}\.doi"), _JSON),
    (re.compile(r"debuginfo/[0-9a-f]{40}(\.debug)?"), _JSON),
)

_NARINFO = re.compile(r"([^/?]*)\.narinfo")
_NAR = re.compile(r"nar/([^/?]+)")
_OURS = re.compile(r"nar/[0-9A-Za-z]{20,44}-[0-9A-Za-z]{40,64}\.nar(\.[0-9A-Za-z]+)?")
_HASH_NAMED = re.compile(r"([0-9A-Za-z]{51,53}|[0-9A-Za-z]{63,65})\.nar(\.[0-9A-Za-z]+)?")
_HASH = re.compile(r"([0-9abcdfghijklmnpqrsvwxyz]{52}|[0-9a-fA-F]{64})\.nar.*")
_SAFE = re.compile(r"(?:[A-Za-z0-9\-._~!$&'()*+,;=:@/]|%[0-9A-Fa-f]{2})+(\?(?:[!-\"$-~])*)?")
_SMUGGLED = re.compile(r"%(?:2[eEfF]|5[cC]|[01][0-9A-Fa-f]|7[fF]|[89A-Fa-f][0-9A-Fa-f])")


def parse(target: str) -> Resource:
    """Parse a request target as it came over the wire, with its leading slash.

    Raises:
        RequestError: It cannot be the URL of anything, or a hash in it is none.
        NotFoundError: It is the URL of nothing that a binary cache has.
    """
    if len(target) > MAX_TARGET:
        raise RequestError(f"the request target is longer than {MAX_TARGET} characters")
    if not target.startswith("/"):
        raise RequestError("the request target is not a path")
    path = target[1:]
    if path == "nix-cache-info":
        return CacheInfoFile()
    if match := _NARINFO.fullmatch(path):
        return NarinfoFile(_refuse_if_malformed(parse_hash_part, match[1]))
    if path.startswith("nar/"):
        return _parse_nar(path)
    for pattern, content_type in _SIDE_FILES:
        if pattern.fullmatch(path):
            return SideFile(path, content_type)
    raise NotFoundError("no such file in a binary cache")


def _parse_nar(path: str) -> Resource:
    if _OURS.fullmatch(path):
        return NarFile(_refuse_if_malformed(NarName.parse, path.removeprefix("nar/")))
    plain, _, _query = path.partition("?")
    if not _SAFE.fullmatch(path) or _SMUGGLED.search(plain):
        raise RequestError("the request target has characters that no NAR's URL has")
    if any(part in ("", ".", "..") for part in plain.split("/")):
        raise RequestError("the request target has empty or dotted parts")
    name = plain.removeprefix("nar/")
    if _HASH_NAMED.fullmatch(name) and not _HASH.fullmatch(name):
        raise RequestError("the hash in the request target is malformed")
    return ForeignNar(path)


def _refuse_if_malformed(parse_text: Callable[[str], T], text: str) -> T:
    try:
        return parse_text(text)
    except ParseError as error:
        raise RequestError(str(error)) from error
