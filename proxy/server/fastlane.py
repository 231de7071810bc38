"""The fast lane: hot answers, finished before any HTTP machinery runs.

`proxy.server.connection` decides which requests may take it; this module knows the answers. A target is
looked up and never interpreted: whatever is not the exact name of something hot is not hot.
"""

from __future__ import annotations

import re
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
from proxy.nix.store_path import HASH_PART, HASH_PART_LENGTH, HashPart
from proxy.recent import Recent
from proxy.server.backend import Audience, Cache, HotNarinfo
from proxy.server.headers import NAR_TYPE, error_headers, file_headers, narinfo_headers, tail
from proxy.store.files import OpenFile

Answer = bytes | tuple[bytes, bytes]
"""A whole answer; a large one in two parts, since joining them would copy it."""

Lookup = Callable[[str], Answer | None]
"""Looks up what a request asked for, given who asks; None where this lane has no answer."""

SMALL_NAR: Final = 128 * 2**10
"""Bytes up to which a NAR is answered here: one write, and nothing left for the transport."""

NAR_BYTES: Final = 32 * 2**20
"""Bytes of small NARs in memory, the ones asked for last. Out of memory one costs a third less than with
sendfile(2) from a file that is kept open, and the disk cannot make anybody wait."""

_NARINFO: Final = re.compile(rf"/{HASH_PART.pattern}\.narinfo".encode())
"""No other text is taken for a hash part: it becomes the name of a file."""

_NAR: Final = b"/nar/"


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


class _Narinfo:
    """A narinfo that is asked for. What is said is written once a second, for as long as it is asked for."""

    __slots__ = ("_absence", "_absent", "_hash_part", "_lane", "_name", "_second")

    def __init__(self, lane: FastLane, name: str) -> None:
        self._lane = lane
        self._name = name
        self._hash_part = HashPart(name[:HASH_PART_LENGTH])
        body = f"no upstream has {name}\n".encode()
        self._absence = tail(error_headers(), len(body)) + body
        self._absent = b""
        self._second = -1.0

    def __call__(self, client: str) -> bytes | None:
        """Return the answer. Every call in here is one that all hits pay for."""
        lane = self._lane
        if not lane.second <= time.time() < lane.next_second:
            lane.renew_dates()
        known = lane.hot(self._hash_part)
        if known is None:
            return self._answer_cold(client)
        if not lane.open:
            return None
        if known.answered_in != lane.second:
            self._write(known)
        if not known.kept:
            lane.prefetch.asked_path(client, self._hash_part)
        count = lane.narinfos
        count.requests += 1
        count.body_bytes += len(known.body)
        return known.answer

    def _write(self, known: HotNarinfo) -> None:
        lane = self._lane
        lane.cache.touch_narinfo(self._hash_part)
        lane.used_path(self._hash_part)
        about = tail(narinfo_headers(HIT, known.origin), len(known.body))
        known.answer = lane.found + about + known.body
        known.answered_in = lane.second

    def _answer_cold(self, client: str) -> bytes | None:
        """Answer what is not in memory: absent, or on the disk, which takes a small read."""
        lane = self._lane
        expires = lane.cache.absent_until(self._name)
        if not lane.open:
            return None
        if expires is None or lane.cache.clock() >= expires:
            return self(client) if lane.cache.recall(self._hash_part) else None
        if self._second != lane.second:
            if not lane.cache.is_absent(self._name):
                return None
            self._absent = lane.not_found + self._absence
            self._second = lane.second
        lane.absences.requests += 1
        return self._absent


class FastLane:
    """What can be answered at once.

    It counts what it answers, and tells in bulk (`flush`): an event for each would cost more than the answer.

    Args:
        cache: What is hot.
        observer: Told of what was answered.
        prefetch: Told who was given a narinfo whose NAR is not here.
    """

    def __init__(self, cache: Cache, observer: Observer, prefetch: Audience) -> None:
        self.cache = cache
        self.hot = cache.hot_narinfo
        self.prefetch = prefetch
        self._observer = observer
        self._nars: Recent[bytes, _SmallNar] = Recent(NAR_BYTES, weigh=lambda nar: len(nar.answer))
        self.open = True
        """Whether anything is answered here; not while the daemon stops, since that has to be told."""
        self.second = self.next_second = 0.0
        """The second, by the clock on the wall, that the dates below are for."""
        self.found = self.not_found = b""
        """Status line and date."""
        self.narinfos = _Count("narinfo", HTTPStatus.OK, HIT)
        self.absences = _Count("narinfo", HTTPStatus.NOT_FOUND, "")
        self.nars = _Count("nar", HTTPStatus.OK, HIT)
        self._removals = cache.removals
        self._used_paths: set[HashPart] = set()

    def lookup(self, target: bytes) -> Lookup | None:
        """Return what looks up a target, now and whenever it is asked for, or None if this lane cannot.

        Args:
            target: The request target as it came, with its leading slash.
        """
        if _NARINFO.fullmatch(target):
            return _Narinfo(self, target[1:].decode("ascii"))
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

    def used_path(self, hash_part: HashPart) -> None:
        """Note that somebody was given a narinfo, here or in the other lane."""
        self._used_paths.add(hash_part)

    def flush(self) -> None:
        """Tell what was answered since the last time, and which paths were used; forget what is gone."""
        for count in (self.narinfos, self.absences, self.nars):
            if count.requests:
                told = (count.route, int(count.code), count.result)
                self._observer(FastlaneServed(*told, count.requests, count.body_bytes))
                count.requests = count.body_bytes = 0
        if self._used_paths:
            self.cache.used_paths(self._used_paths)
            self._used_paths = set()
        for target, nar in self._nars.items():
            if nar.used:
                nar.used = False
                if self.cache.keeps_nar(nar.name):
                    self.cache.used(nar.name)
                else:  # somebody has removed it, perhaps for a reason
                    self._nars.drop(target)

    def forget_nars(self) -> None:
        """Forget the NARs in memory; what was said of them may have changed."""
        self._nars.clear()

    def close(self) -> None:
        """Tell the rest, and forget everything."""
        self.flush()
        self.forget_nars()

    def _nar(self, target: bytes, client: str) -> Answer | None:
        if self._removals != self.cache.removals:  # and one of those that are kept may be gone
            self._removals = self.cache.removals
            self.forget_nars()
        nar = self._nars.get(target)
        if nar is None or not self.open:
            return None
        if not self.second <= time.time() < self.next_second:
            self.renew_dates()
        nar.used = True
        self.prefetch.asked_nar(client)
        count = self.nars
        count.requests += 1
        count.body_bytes += nar.size
        return self.found, nar.answer

    def renew_dates(self) -> None:
        """Write the date anew: it is another second, or the clock was set."""
        now = time.time()
        self.second = float(int(now))
        self.next_second = self.second + 1.0
        date = f"Date: {formatdate(now, usegmt=True)}\r\n".encode()
        self.found = b"HTTP/1.1 200 OK\r\n" + date
        self.not_found = b"HTTP/1.1 404 Not Found\r\n" + date
