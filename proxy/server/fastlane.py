"""The fast lane: hot answers, finished before any HTTP machinery runs.

`proxy.server.connection` decides which requests may take it; this module knows the answers. A target is
looked up and never interpreted: whatever is not the exact name of something hot is not hot.
"""

from __future__ import annotations

import os
import time
from email.utils import formatdate
from typing import Final, Literal

from proxy.answers import Content
from proxy.events import HIT, FastlaneServed, Observer, Result
from proxy.nix.nar_name import NarName
from proxy.nix.store_path import HASH_PART_LENGTH, HashPart
from proxy.recent import Recent
from proxy.server.backend import Audience, Cache
from proxy.server.headers import NAR_TYPE, error_headers, file_headers, head, narinfo_headers
from proxy.store.files import OpenFile

_Kind = tuple[str, int, Result | Literal[""]]

SMALL_NAR: Final = 128 * 2**10
"""Bytes up to which a NAR is answered here: one read, one write, and nothing left for the transport."""

OPEN_NARS: Final = 512
"""Small NARs kept open: to open one for every request would cost more than to send it."""

_NARINFO: Final = b".narinfo"
_NARINFO_TARGET: Final = 1 + HASH_PART_LENGTH + len(_NARINFO)
_NAR: Final = b"/nar/"

_HOT_NARINFO: Final[_Kind] = ("narinfo", 200, HIT)
_ABSENT_NARINFO: Final[_Kind] = ("narinfo", 404, "")
_HOT_NAR: Final[_Kind] = ("nar", 200, HIT)


def _absence(name: str) -> bytes:
    return f"no upstream has {name}\n".encode()


_ABSENT_HEAD: Final = head(404, error_headers(), len(_absence("_" * (_NARINFO_TARGET - 1))))


class OpenNar:
    """A small NAR in the store, open, with the headers of its answer."""

    __slots__ = ("file", "head", "name", "used")

    def __init__(self, name: NarName, file: OpenFile, answer_head: bytes) -> None:
        self.name = name
        self.file = file
        self.head = answer_head
        self.used = False


class FastLane:
    """What can be answered at once.

    It counts what it answers, and tells in bulk (`flush`): an event for each would cost more than the answer.

    Args:
        cache: What is hot.
        observer: Told of what was answered.
        prefetch: Told who was given a narinfo whose NAR is not here.
    """

    def __init__(self, cache: Cache, observer: Observer, prefetch: Audience) -> None:
        self._cache = cache
        self._prefetch = prefetch
        self._observer = observer
        self._nars: Recent[bytes, OpenNar] = Recent(OPEN_NARS, lambda nar: nar.file.close())
        self.open = True
        """Whether anything is answered here; not while the daemon stops, since that has to be told."""
        self._date = b""
        self._date_expires = 0.0
        self._counts: dict[_Kind, list[int]] = {}

    def answer(self, target: bytes, client: str) -> bytes | None:
        """Return a whole answer, or None where this lane has none.

        Args:
            target: The request target as it came, with its leading slash.
            client: Who asks.
        """
        if not self.open:
            return None
        if len(target) == _NARINFO_TARGET and target.endswith(_NARINFO):
            return self._narinfo(target[1:].decode("latin-1"), client)
        if target.startswith(_NAR):
            return self._nar(target, client)
        return None

    def keep_open(self, target: str, name: NarName, content: Content) -> None:
        """Take in a NAR that was just served from the store, if it is small."""
        if isinstance(content.file, OpenFile) and content.file.size <= SMALL_NAR:
            try:
                file = OpenFile(os.dup(content.file.fd), content.file.size)
            except OSError:  # out of descriptors: then this one is not worth one
                return
            headers = file_headers(NAR_TYPE, content.etag, HIT, content.upstream)
            nar = OpenNar(name, file, head(200, headers, file.size))
            self._nars.put(target.encode("latin-1"), nar)

    def flush(self) -> None:
        """Tell what was answered since the last time, and which NARs were used."""
        counts, self._counts = self._counts, {}
        for (route, code, result), (requests, body_bytes) in counts.items():
            self._observer(FastlaneServed(route, code, result, requests, body_bytes))
        for nar in self._nars.values():
            if nar.used:
                nar.used = False
                self._cache.used(nar.name)

    def forget_nars(self) -> None:
        """Close what is kept open; what was said of it may have changed."""
        self._nars.clear()

    def close(self) -> None:
        """Tell the rest, and close what is kept open."""
        self.flush()
        self.forget_nars()

    def _narinfo(self, name: str, client: str) -> bytes | None:
        hash_part = HashPart(name[:HASH_PART_LENGTH])
        known = self._cache.hot_narinfo(hash_part)
        if known is not None:
            if not known.kept:
                self._prefetch.asked_path(client, hash_part)
            if known.answer is None:
                known.answer = head(200, narinfo_headers(HIT, known.origin), len(known.body))
            self._count(_HOT_NARINFO, len(known.body))
            return b"".join((known.answer, self._dated(), known.body))
        if self._cache.is_absent(name) and not self._cache.keeps(hash_part):
            self._count(_ABSENT_NARINFO, 0)
            return b"".join((_ABSENT_HEAD, self._dated(), _absence(name)))
        return None

    def _nar(self, target: bytes, client: str) -> bytes | None:
        nar = self._nars.get(target)
        if nar is None:
            return None
        try:
            body = os.pread(nar.file.fd, nar.file.size, 0)
        except OSError:
            body = b""
        if len(body) != nar.file.size:
            self._nars.drop(target)  # cut short, or unreadable: the other lane finds out
            return None
        nar.used = True
        self._prefetch.asked_nar(client)
        self._count(_HOT_NAR, len(body))
        return b"".join((nar.head, self._dated(), body))

    def _count(self, what: _Kind, body_bytes: int) -> None:
        counts = self._counts.get(what)
        if counts is None:
            counts = self._counts[what] = [0, 0]
        counts[0] += 1
        counts[1] += body_bytes

    def _dated(self) -> bytes:
        """The end of the headers; the date is written once a second."""
        now = time.time()
        if not self._date_expires - 1 <= now < self._date_expires:
            self._date = f"Date: {formatdate(now, usegmt=True)}\r\n\r\n".encode()
            self._date_expires = int(now) + 1.0
        return self._date
