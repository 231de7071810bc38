"""The fast lane: hot answers, finished before any HTTP machinery runs.

`proxy.server.connection` decides which requests may take it; this module knows the answers. A target is
looked up and never interpreted: whatever is not the exact name of something hot is not hot.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from email.utils import formatdate
from functools import partial
from http import HTTPStatus
from typing import Final, Literal

from proxy.answers import Content
from proxy.errors import StoreError
from proxy.events import HIT, FastlaneServed, Observer, Result
from proxy.nix.nar_name import NarName
from proxy.nix.store_path import HASH_PART_LENGTH, HashPart
from proxy.recent import Recent
from proxy.server.backend import Audience, Cache
from proxy.server.headers import NAR_TYPE, error_headers, file_headers, narinfo_headers, tail
from proxy.store.files import OpenFile

Answer = tuple[bytes, bytes]
"""A whole answer: status and date, and everything else."""

Lookup = Callable[[str], Answer | None]
"""Looks up what a request asked for, given who asks; None where this lane has no answer."""

SMALL_NAR: Final = 128 * 2**10
"""Bytes up to which a NAR is answered here: one write, and nothing left for the transport."""

NAR_BYTES: Final = 32 * 2**20
"""Bytes of small NARs in memory, the ones asked for last. Out of memory one costs a third less than with
sendfile(2) from a file that is kept open, and the disk cannot make anybody wait."""

_NARINFO: Final = b".narinfo"
_NARINFO_TARGET: Final = 1 + HASH_PART_LENGTH + len(_NARINFO)
_NAR: Final = b"/nar/"


def _absence(name: str) -> bytes:
    body = f"no upstream has {name}\n".encode()
    return tail(error_headers(), len(body)) + body


class _Narinfo:
    """A narinfo that is asked for, and what is said when there is none."""

    __slots__ = ("absence", "hash_part", "name")

    def __init__(self, name: str) -> None:
        self.name = name
        self.hash_part = HashPart(name[:HASH_PART_LENGTH])
        self.absence = _absence(name)


class _SmallNar:
    """A small NAR of the store, in memory with the headers of its answer."""

    __slots__ = ("answer", "name", "size", "used")

    def __init__(self, name: NarName, headers: bytes, body: bytes) -> None:
        self.name = name
        self.size = len(body)
        self.answer = headers + body
        self.used = False


class _Count:
    """Answers of one kind, since they were told last."""

    __slots__ = ("body_bytes", "code", "requests", "result", "route")

    def __init__(self, route: str, code: int, result: Result | Literal[""]) -> None:
        self.route = route
        self.code = code
        self.result = result
        self.requests = 0
        self.body_bytes = 0


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
        self._hot_narinfo = cache.hot_narinfo
        self._prefetch = prefetch
        self._observer = observer
        self._nars: Recent[bytes, _SmallNar] = Recent(NAR_BYTES, weigh=lambda nar: len(nar.answer))
        self.open = True
        """Whether anything is answered here; not while the daemon stops, since that has to be told."""
        self._dates = (0.0, 0.0)
        self._found = b""
        self._not_found = b""
        self._narinfos = _Count("narinfo", HTTPStatus.OK, HIT)
        self._absences = _Count("narinfo", HTTPStatus.NOT_FOUND, "")
        self._nars_sent = _Count("nar", HTTPStatus.OK, HIT)
        self._removals = cache.removals

    def lookup(self, target: bytes) -> Lookup | None:
        """Return what looks up a target, now and whenever it is asked for, or None if this lane cannot.

        Args:
            target: The request target as it came, with its leading slash.
        """
        if len(target) == _NARINFO_TARGET and target.endswith(_NARINFO) and target.isascii():
            return partial(self._narinfo, _Narinfo(target[1:].decode("ascii")))
        if target.startswith(_NAR):
            return partial(self._nar, target)
        return None

    def keep(self, target: str, name: NarName, content: Content) -> None:
        """Take in a NAR that was just served from the store, if it is small."""
        file = content.file
        if not isinstance(file, OpenFile) or file.size > SMALL_NAR:
            return
        try:
            body = file.read_at_once()
        except StoreError:
            return  # whoever serves it finds out
        if len(body) == file.size:
            headers = tail(file_headers(NAR_TYPE, content.etag, HIT, content.upstream), file.size)
            self._nars.put(target.encode("latin-1", "replace"), _SmallNar(name, headers, body))

    def flush(self) -> None:
        """Tell what was answered since the last time, and which NARs were used; forget what is gone."""
        for count in (self._narinfos, self._absences, self._nars_sent):
            if count.requests:
                told = (count.route, int(count.code), count.result)
                self._observer(FastlaneServed(*told, count.requests, count.body_bytes))
                count.requests = count.body_bytes = 0
        for target, nar in self._nars.items():
            if nar.used:
                nar.used = False
                if self._cache.keeps_nar(nar.name):
                    self._cache.used(nar.name)
                else:  # somebody has removed it, perhaps for a reason
                    self._nars.drop(target)

    def forget_nars(self) -> None:
        """Forget the NARs in memory; what was said of them may have changed."""
        self._nars.clear()

    def close(self) -> None:
        """Tell the rest, and forget everything."""
        self.flush()
        self.forget_nars()

    def _narinfo(self, asked: _Narinfo, client: str) -> Answer | None:
        if not self.open:
            return None
        known = self._hot_narinfo(asked.hash_part)
        if known is None:
            if not self._cache.is_absent(asked.name):
                return None
            self._absences.requests += 1
            self._renew_dates()
            return self._not_found, asked.absence
        if not known.kept:
            self._prefetch.asked_path(client, asked.hash_part)
        rest = known.answer
        if rest is None:
            rest = tail(narinfo_headers(HIT, known.origin), len(known.body)) + known.body
            known.answer = rest
        count = self._narinfos
        count.requests += 1
        count.body_bytes += len(known.body)
        self._renew_dates()
        return self._found, rest

    def _nar(self, target: bytes, client: str) -> Answer | None:
        if self._removals != self._cache.removals:  # and one of those that are kept may be gone
            self._removals = self._cache.removals
            self.forget_nars()
        nar = self._nars.get(target)
        if nar is None or not self.open:
            return None
        nar.used = True
        self._prefetch.asked_nar(client)
        count = self._nars_sent
        count.requests += 1
        count.body_bytes += nar.size
        self._renew_dates()
        return self._found, nar.answer

    def _renew_dates(self) -> None:
        """Write the date anew when it is another second, also when the clock was put back."""
        now = time.time()
        begin, end = self._dates
        if not begin <= now < end:
            self._dates = (int(now), int(now) + 1.0)
            date = f"Date: {formatdate(now, usegmt=True)}\r\n".encode()
            self._found = b"HTTP/1.1 200 OK\r\n" + date
            self._not_found = b"HTTP/1.1 404 Not Found\r\n" + date
