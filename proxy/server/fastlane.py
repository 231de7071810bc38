"""The fast lane: hot answers, finished before any HTTP machinery runs.

`proxy.server.connection` decides which requests may take it; this module knows the answers. A target is the
exact name of a narinfo or a NAR, by the same grammar as in the long way, or it is not for this lane.

An answer is written once, and kept with what it is made of. Once a second its date is written anew, in place,
and a note is made that it is used; what is left for each request is to look it up and to count it. A NAR is
sent from its file, if that takes no waiting; a small one that is asked for again soon is taken into memory.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from email.utils import formatdate
from http import HTTPStatus
from typing import Final, Literal, Protocol

from proxy.answers import Content, NarAtHand
from proxy.errors import NotFoundError, RequestError, StoreError
from proxy.events import HIT, PREFETCHED, FastlaneServed, Observer, Result
from proxy.nix import resource
from proxy.nix.nar_name import NarName
from proxy.nix.resource import NarFile
from proxy.nix.store_path import HASH_PART, HashPart
from proxy.recent import Recent
from proxy.server.backend import Audience, Cache, HotNarinfo
from proxy.server.headers import NAR_TYPE, error_headers, file_headers, narinfo_headers, tail
from proxy.server.sending import Answer, FileAnswer
from proxy.server.shared import OFTEN, SharedAnswers
from proxy.store.files import OpenFile


class Asker(Protocol):
    """Who asks: `proxy.server.connection.Connection`."""

    client: str
    """The client's name."""

    fetches: bool
    """Whether the look-ahead has been told on this connection that its client asks for NARs."""


Lookup = Callable[[Asker], Answer | None]
"""Looks up what a request asked for; None where this lane has no answer. What it returns is to be sent before
the event loop turns: the date in it is brought up to date in place, and files of answers are closed."""

LARGEST_NAR: Final = 2**20
"""Bytes up to which a NAR is answered here: what others wait for meanwhile, and what a slow client leaves to
the transport."""

SMALL_NAR: Final = 256 * 2**10
"""Bytes up to which it is taken into memory when it is asked for again `SOON`: a few write(2) from there take
less time than a few open(2) and sendfile(2)."""

SOON: Final = 1.0
"""Seconds. Who pulls a closure asks for each of its NARs once. If all were taken in for those who pull it
right afterwards, which are more than `NAR_BYTES`, each would be pushed out before it is asked for again."""

MOST_HELD: Final = 32 * 2**20
"""Bytes that slow clients may leave in our memory, all together, until NARs take the long way, which holds
nothing."""

NAR_BYTES: Final = 32 * 2**20
"""Bytes of small NARs in memory, the ones asked for last. Out of memory one costs a third less than with
sendfile(2) from a file that is kept open, and the disk cannot make anybody wait."""

_NARINFO: Final = b".narinfo"
_NAR: Final = b"/nar/"
_NO_DATE: Final = b"Thu, 01 Jan 1970 00:00:00 GMT"


class _Status:
    """What an answer begins with, up to the date."""

    __slots__ = ("_line", "date")

    def __init__(self, line: bytes) -> None:
        self._line = line + b"\r\nDate: "
        self.date = slice(len(self._line), len(self._line) + len(_NO_DATE))
        """Where the date goes."""

    def answer(self, rest: bytes, body: bytes | bytearray) -> bytearray:
        """Write an answer: status, room for the date, other headers, body."""
        whole = bytearray(b"%b%b\r\n%b" % (self._line, _NO_DATE, rest))
        whole += body
        return whole


_FOUND: Final = _Status(b"HTTP/1.1 200 OK")
_NOT_FOUND: Final = _Status(b"HTTP/1.1 404 Not Found")


class _Count:
    """Answers of one kind, since they were told last."""

    __slots__ = ("body_bytes", "code", "requests", "result", "route")

    def __init__(self, route: str, code: int, result: Result | Literal[""]) -> None:
        self.route = route
        self.code = code
        self.result = result
        self.requests = 0
        self.body_bytes = 0


class _Nar:
    """A NAR of the store as the answer to a request for it: a small one in memory, else from its file."""

    __slots__ = ("answer", "answered_in", "count", "name", "requests", "size", "used", "whole")

    def __init__(self, name: NarName, whole: bytearray, size: int, count: _Count) -> None:
        self.name = name
        self.count = count
        self.whole = whole
        self.answer: Answer = whole
        """What is sent: all of it, in this second perhaps from a file."""
        self.answered_in = -1.0
        self.requests = 0
        """How often it was asked for in this second."""
        self.size = size
        self.used = False


class _NarRequest:
    """A request for a NAR."""

    __slots__ = ("_asked", "_lane", "_name", "_target")

    def __init__(self, lane: FastLane, target: bytes, name: NarName) -> None:
        self._lane = lane
        self._target = target
        self._name = name
        self._asked = -SOON

    def answer(self, asker: Asker) -> Answer | None:
        """Return the answer. Every line in here is one that all hits pay for."""
        lane = self._lane
        if not lane.open or lane.held >= MOST_HELD:
            return None
        nar = lane.nar(self._target)
        if nar is not None:
            nar.used = True
        else:
            soon = lane.now < self._asked + SOON
            # The store notes the use.
            nar = lane.bring_in(self._target, self._name, SMALL_NAR if soon else 0)
            if nar is None:
                return None
            self._asked = lane.now
        if nar.answered_in != lane.second:
            self._refresh(nar)
        nar.requests += 1
        if nar.requests == OFTEN:
            nar.answer = lane.shared.share(nar.whole)
        if not asker.fetches:
            asker.fetches = True
            lane.prefetch.asked_nar(asker.client)
        count = nar.count
        count.requests += 1
        count.body_bytes += nar.size
        return nar.answer

    def _refresh(self, nar: _Nar) -> None:
        """Write the date anew, and note that this NAR was used last: once a second, for as long as it is."""
        lane = self._lane
        nar.answer = nar.whole
        nar.whole[_FOUND.date] = lane.date
        nar.answered_in = lane.second
        nar.requests = 0
        lane.touch_nar(self._target)


class _NarinfoRequest:
    """A request for a narinfo."""

    __slots__ = ("_absence", "_absence_second", "_hash_part", "_lane", "_name")

    def __init__(self, lane: FastLane, hash_part: HashPart) -> None:
        self._lane = lane
        self._name = f"{hash_part}.narinfo"
        self._hash_part = hash_part
        self._absence: bytearray | None = None
        self._absence_second = -1.0

    def answer(self, asker: Asker) -> bytearray | None:
        """Return the answer. Every line in here is one that all hits pay for."""
        lane = self._lane
        known = lane.narinfo(self._hash_part)
        if known is None:
            return self._answer_cold(asker)
        if not lane.open:
            return None
        if known.answered_in != lane.second:
            self._refresh(known)
        if not known.kept:
            lane.prefetch.asked_path(asker.client, self._hash_part)
        count = lane.narinfos
        count.requests += 1
        count.body_bytes += len(known.body)
        return known.answer

    def _refresh(self, known: HotNarinfo) -> None:
        """Write the date anew, and note that the path is used: once a second, for as long as it is."""
        lane = self._lane
        if known.answer is None:
            rest = tail(narinfo_headers(HIT, known.origin), len(known.body))
            known.answer = _FOUND.answer(rest, known.body)
        known.answer[_FOUND.date] = lane.date
        known.answered_in = lane.second
        lane.cache.touch_narinfo(self._hash_part)
        lane.used_path(self._hash_part)

    def _answer_cold(self, asker: Asker) -> bytearray | None:
        """Answer what is not in memory: absent, or on the disk, which takes a small read."""
        lane = self._lane
        expires = lane.absent_until(self._name)
        if not lane.open:
            return None
        if expires is None or lane.now >= expires:
            recalled = lane.cache.recall(self._hash_part)
            lane.disk_asked = recalled is None
            return self.answer(asker) if recalled else None
        if self._absence_second != lane.second and not self._is_absent():
            return None
        lane.absences.requests += 1
        return self._absence

    def _is_absent(self) -> bool:
        """Look again whether nobody has it, once a second, and write the date anew."""
        lane = self._lane
        if not lane.cache.is_absent(self._name):
            return False
        if self._absence is None:
            body = f"no upstream has {self._name}\n".encode()
            self._absence = _NOT_FOUND.answer(tail(error_headers(), len(body)), body)
        self._absence[_NOT_FOUND.date] = lane.date
        self._absence_second = lane.second
        return True


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
        self.narinfo = cache.hot_narinfo
        self.absent_until = cache.absent_until
        self.prefetch = prefetch
        self._observer = observer
        self._nars: Recent[bytes, _Nar] = Recent(NAR_BYTES, weigh=lambda nar: len(nar.whole))
        self.nar = self._nars.peek
        """Returns what is in memory of a NAR, by the target of requests; this counts as no use."""
        self.shared = SharedAnswers()
        """NARs that many ask for in this second."""
        self.open = True
        """Whether anything is answered here; not while the daemon stops, since that has to be told."""
        self.held = 0
        """Bytes that slow clients have left in our memory."""
        self.disk_asked = False
        self.now = 0.0
        """The time, by the cache's clock."""
        self.second = self._next_second = 0.0
        """The second, by the clock on the wall, that the date is for."""
        self.date = _NO_DATE
        """What time it is, for headers."""
        self.narinfos = _Count("narinfo", HTTPStatus.OK, HIT)
        self.absences = _Count("narinfo", HTTPStatus.NOT_FOUND, "")
        self.nars = _Count("nar", HTTPStatus.OK, HIT)
        self.nars_ahead = _Count("nar", HTTPStatus.OK, PREFETCHED)
        self._removals = cache.removals
        self._used_paths: set[HashPart] = set()

    def begin(self) -> None:
        """Look at what does not change between requests that came together: clocks, and what was removed."""
        now = time.time()
        if not self.second <= now < self._next_second:  # another second, or the clock was set
            self.second = float(int(now))
            self._next_second = self.second + 1.0
            self.date = formatdate(now, usegmt=True).encode()
            self.shared.close()
        self.now = self.cache.clock()
        if self._removals != self.cache.removals:  # and one of those that are kept may be gone
            self._removals = self.cache.removals
            self.forget_nars()

    def disk_was_asked(self) -> bool:
        """Tell, once, whether what was looked up last is on its way from the disk."""
        asked, self.disk_asked = self.disk_asked, False
        return asked

    def lookup(self, target: bytes) -> Lookup | None:
        """Return what looks up a target, now and whenever it is asked for, or None if this lane cannot.

        Args:
            target: The request target as it came, with its leading slash.
        """
        if target.endswith(_NARINFO):
            hash_part = target[1 : -len(_NARINFO)].decode("latin-1")
            if HASH_PART.fullmatch(hash_part):  # it becomes the name of a file
                return _NarinfoRequest(self, HashPart(hash_part)).answer
        if target.startswith(_NAR):
            with contextlib.suppress(NotFoundError, RequestError):
                wanted = resource.parse(target.decode("latin-1"))
                if isinstance(wanted, NarFile):
                    return _NarRequest(self, target, wanted.name).answer
        return None

    def bring_in(self, target: bytes, name: NarName, whole: int) -> _Nar | None:
        """Have a NAR answered, if the disk has it at hand; what was read whole is taken into memory.

        That is one of up to ``whole`` bytes, or a tiny one, where reading takes no longer. What was fetched
        ahead is not kept, since most of it is asked for once.
        """
        try:
            nar = self.cache.nar_at_hand(name, LARGEST_NAR, whole)
        except BlockingIOError:
            self.disk_asked = True
            return None
        if nar is None:
            return None
        made = self._make(name, nar)
        if nar.file is None:
            if nar.result == HIT:
                self._nars.put(target, made)
        else:
            made.whole[_FOUND.date] = self.date
            made.answered_in = self.second
            made.answer = FileAnswer(made.whole, nar.file, len(nar.content))
        return made

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
            nar = NarAtHand(body, None, content.etag, HIT, content.upstream)
            self._nars.put(target.encode("latin-1", "replace"), self._make(name, nar))

    def _make(self, name: NarName, nar: NarAtHand) -> _Nar:
        size = len(nar.content) if nar.file is None else nar.file.size
        rest = tail(file_headers(NAR_TYPE, nar.etag, nar.result, nar.upstream), size)
        count = self.nars if nar.result == HIT else self.nars_ahead
        return _Nar(name, _FOUND.answer(rest, nar.content), size, count)

    def touch_nar(self, target: bytes) -> None:
        """Note that a NAR in memory is used."""
        self._nars.get(target)

    def used_path(self, hash_part: HashPart) -> None:
        """Note that somebody was given a narinfo, here or in the other lane."""
        self._used_paths.add(hash_part)

    def flush(self) -> None:
        """Tell what was answered since the last time, and which paths were used; forget what is gone."""
        for count in (self.narinfos, self.absences, self.nars, self.nars_ahead):
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
        self.shared.close()

    def close(self) -> None:
        """Tell the rest, and forget everything."""
        self.flush()
        self.forget_nars()
