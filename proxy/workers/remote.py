"""The cache as a worker has it: what is in the store is served from there, the core is asked for the rest.

Rules:

- A narinfo read from the store is verified here, as the core does; what the core says has been.
- What cannot be read or verified here is the core's to report, and to replace: it is asked.
- A file that arrives is asked for once, however many clients of this worker want it. The fetch is the
  core's: a client that leaves takes nothing away from the others, here or at another worker.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import time
from collections.abc import Callable, Collection, Sequence
from typing import Final, Literal

from proxy.answers import Content, File, NarAtHand
from proxy.channel import NONE, close
from proxy.errors import NotFoundError, ParseError, StoreError, TrustError
from proxy.events import COALESCED, HIT, Result
from proxy.nix import narinfo
from proxy.nix.nar_name import NarName
from proxy.nix.signature import Keyring
from proxy.nix.store_path import HASH_PART_LENGTH, HashPart
from proxy.recent import Recent
from proxy.store.files import OpenFile, closed_on_failure, disk
from proxy.store.reader import StoreReader
from proxy.workers.arrival import Arrival
from proxy.workers.held import COPIES, HeldNarinfo, HeldText
from proxy.workers.link import Link
from proxy.workers.messages import (
    Absent,
    Announced,
    AskFile,
    AskNarinfo,
    Broken,
    Damaged,
    Given,
    Narinfo,
    Passed,
    PathsUsed,
    Progress,
    Release,
    Segment,
    Used,
    Whole,
    expect,
)

HOT_BYTES: Final = 32 * 2**20
"""Bytes of narinfos in the memory of each worker."""

ABSENT_PATHS: Final = 100_000
"""Remembered absences."""

USES: Final = 1_000
"""Paths in one message."""

AHEAD: Final = 100_000
"""NARs that were fetched ahead of clients, and that none has asked this worker for."""


class RemoteCache:
    """A worker's cache.

    Args:
        store: The store folder.
        link: To the core.
        keyrings: Whose signatures count.
        clock: Seconds on a monotonic clock.
    """

    def __init__(
        self,
        store: StoreReader,
        link: Link,
        keyrings: Sequence[Keyring | None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store = store
        self._link = link
        self._keyrings = keyrings
        self.clock = clock
        self._hot: Recent[HashPart, HeldNarinfo] = Recent(
            HOT_BYTES, weigh=lambda held: COPIES * len(held.body)
        )
        self.hot_narinfo = self._hot.peek
        """Returns a path's narinfo if it is in memory; this counts as no use."""
        self._absent: Recent[str, float] = Recent(ABSENT_PATHS)
        self.absent_until = self._absent.peek
        """Returns until when a narinfo (``{hash part}.narinfo``) counts as absent, by the clock."""
        self._ahead: Recent[str, bool] = Recent(AHEAD)
        self._changes = 0
        self.removals = 0
        """How often files were taken from the store that somebody may have open."""
        self._numbers = itertools.count(1)
        self._arrivals: dict[str, Arrival] = {}
        self._by_number: dict[int, Arrival] = {}
        self._asking: set[asyncio.Task[None]] = set()

    def use(self, keyrings: Sequence[Keyring | None]) -> None:
        """Trust other keys from now on, and forget what was concluded before."""
        self._keyrings = keyrings
        self._changes += 1
        self._hot.clear()
        self._absent.clear()

    def forget(self, hash_part: HashPart) -> None:
        """A narinfo is known no longer."""
        self._changes += 1
        self.removals += 1
        self._hot.drop(hash_part)

    def ahead(self, name: str) -> None:
        """A NAR is fetched ahead of clients: the core is to hear of the first that asks."""
        self._ahead.put(name, True)  # noqa: FBT003  # only the key counts

    def recall(self, hash_part: HashPart) -> bool | None:
        """Take a narinfo into memory if the disk can be spared; tell whether it is there, None for soon."""
        if not self._store.has_at_hand(hash_part):
            return None
        return self._held(hash_part) is not None and self.hot_narinfo(hash_part) is not None

    def touch_narinfo(self, hash_part: HashPart) -> None:
        """Note that a narinfo in memory is used."""
        self._hot.get(hash_part)

    def keeps(self, hash_part: HashPart) -> bool:
        """Tell whether a path is in the store."""
        return self._store.has_narinfo(hash_part)

    def keeps_nar(self, name: NarName) -> bool:
        """Tell whether a NAR is in the store."""
        return self._store.has_nar(name)

    def is_absent(self, key: str) -> bool:
        """Tell whether a narinfo is known to be absent, and no other worker has brought it since."""
        expires = self._absent.get(key)
        return (
            expires is not None
            and self.clock() < expires
            and not self.keeps(HashPart(key[:HASH_PART_LENGTH]))
        )

    def damaged(self, name: NarName, reason: str) -> None:
        """A NAR of the store turned out to be damaged: have the core see to it."""
        self._link.tell(Damaged(str(name), reason))

    def used(self, name: NarName) -> None:
        """Note that a NAR of the store was given to a client."""
        self._link.tell(Used(str(name)))

    def used_paths(self, hash_parts: Collection[HashPart]) -> None:
        """Note that the narinfos of paths were given to clients."""
        remaining = iter(hash_parts)
        while some := tuple(itertools.islice(remaining, USES)):
            self._link.tell(PathsUsed(some))

    async def narinfo(self, hash_part: HashPart) -> HeldText:
        """Return a path's narinfo: `proxy.cache.Cache.narinfo`.

        Raises:
            NotFoundError: No upstream has the path.
            UpstreamError: Nobody has it, as far as could be found out.
        """
        if self.hot_narinfo(hash_part) is None:
            await self._store.bring_in_narinfo(hash_part)
        held = self._held(hash_part)
        if held is not None:
            return HeldText(held, HIT)
        key = f"{hash_part}.narinfo"
        if self.is_absent(key):
            raise NotFoundError(f"no upstream has {key}")
        changes = self._changes
        answer, _ = await self._link.ask(AskNarinfo(hash_part))
        up_to_date = changes == self._changes
        if isinstance(answer, Absent):
            if up_to_date and answer.seconds > 0:
                self._absent.put(key, self.clock() + answer.seconds)
            raise NotFoundError(answer.reason)
        told = expect(Narinfo, answer)
        held = HeldNarinfo(told.body, told.nar_name, told.etag, told.origin, told.kept, told.size)
        if up_to_date:
            self._hot.put(hash_part, held)
        return HeldText(held, told.result)

    async def nar(self, name: NarName) -> Content:
        """Return a NAR: from the store, or as it arrives: `proxy.cache.Cache.nar`.

        Raises:
            ProxyError: As there.
        """
        return await self._stored_nar(name) or await self._arriving("nar", str(name))

    def nar_at_hand(self, name: NarName, most: int, whole: int) -> NarAtHand | None:
        """Return a NAR of the store, if that takes no waiting; raise as `proxy.cache.Cache.nar_at_hand`."""
        held = self.hot_narinfo(name.hash_part)
        if (
            held is None
            or not held.kept
            or held.nar_name != str(name)
            or self._ahead.get(str(name))
        ):
            return None
        if held.size is None or held.size > most or not self.keeps(name.hash_part):
            return None
        found = self._store.nar_at_hand(name, held.size, whole)
        if found is None:
            return None
        self.used(name)
        return NarAtHand(*found, held.etag, HIT, held.origin)

    async def nar_head(self, name: NarName) -> Content:
        """Return what `nar` would, without fetching it: `proxy.cache.Cache.nar_head`.

        Raises:
            ProxyError: As there.
        """
        return await self._stored_nar(name) or await self._announced("nar", str(name))

    async def foreign_nar(self, reference: str) -> Content:
        """Pass on a NAR by a URL that is not ours: `proxy.cache.Cache.foreign_nar`.

        Raises:
            ProxyError: As there.
        """
        return await self._arriving("foreign", reference)

    async def foreign_nar_head(self, reference: str) -> Content:
        """Return what `foreign_nar` would: `proxy.cache.Cache.foreign_nar_head`.

        Raises:
            ProxyError: As there.
        """
        return await self._announced("foreign", reference)

    async def file(self, path: str) -> Content:
        """Return a listing, log, realisation or debug info: `proxy.cache.Cache.file`.

        Raises:
            ProxyError: As there.
        """
        answer, fd = await self._link.ask(AskFile("side", path))
        given = expect(Given, answer)
        return _content(_open(fd), given, given.result)

    def hear(self, news: Progress | Segment | Whole | Broken, fd: int) -> None:
        """Take news of a file that arrives, and the descriptor that came along."""
        arrival = self._by_number.get(news.number)
        if arrival is None:
            close(fd)
            return  # its last reader left before the core knew
        match news:
            case Segment(_, start):
                arrival.extend(start, fd)
            case Progress(_, released, size):
                arrival.progress(released, size)
            case Whole(_, size):
                arrival.finish(size)
            case Broken(_, failure):
                arrival.fail(failure.error())

    def _held(self, hash_part: HashPart) -> HeldNarinfo | None:
        """Return what is known here of a path; what is not sound is the core's to report."""
        held = self._hot.get(hash_part)
        if held is not None:
            return held
        try:
            text = self._store.narinfo(hash_part)
            if text is None:
                return None
            info = narinfo.verify_by_any(
                narinfo.parse(text), hash_part=hash_part, keyrings=self._keyrings
            )
        except (ParseError, TrustError, StoreError):
            return None
        name = str(info.nar_name)
        etag = name if info.file_hash is None else info.file_hash.nix32
        text = narinfo.format(info, f"nar/{name}")
        origin = self._store.origin(hash_part)
        held = HeldNarinfo(text, name, f'"{etag}"', origin, kept=True, size=info.size_on_disk)
        self._hot.put(hash_part, held)
        return held

    async def _stored_nar(self, name: NarName) -> Content | None:
        """Open a NAR of the store, if there is nothing about it that the core has to see to."""
        if self._ahead.get(str(name)):
            self._ahead.drop(str(name))
            return None
        held = self._held(name.hash_part)
        if held is None or held.nar_name != str(name) or not self.keeps(name.hash_part):
            return None
        try:
            file = self._store.open_nar(name)
            if file is None:
                return None
            with closed_on_failure(file):
                await file.check(held.size)
        except StoreError:
            return None
        held.kept = True
        self.used(name)
        return Content(file, None, held.etag, HIT, held.origin)

    async def _announced(self, kind: Literal["nar", "foreign"], name: str) -> Content:
        answer, _ = await self._link.ask(AskFile(kind, name, head=True))
        told = expect(Announced, answer)
        return Content(None, told.size, told.etag, told.result, told.upstream)

    async def _arriving(self, kind: Literal["nar", "foreign"], name: str) -> Content:
        """Join those who read a file that arrives, or ask the core for it."""
        key = f"{kind} {name}"
        arrival = self._arrivals.get(key)
        joined = arrival is not None and arrival.can_be_joined
        if arrival is None or not joined:
            arrival = self._start(key, AskFile(kind, name, number=next(self._numbers)))
        reader = arrival.attach()
        try:
            given = await reader.open()
            await reader.wait_beyond(0)
        except BaseException:
            reader.close()
            raise
        result = given.result
        if joined:
            result = HIT if given.whole else COALESCED
        return _content(reader, given, result)

    def _start(self, key: str, question: AskFile) -> Arrival:
        def unread(arrival: Arrival) -> None:
            del self._by_number[arrival.number]
            if self._arrivals.get(key) is arrival:
                del self._arrivals[key]
            if not arrival.is_over:
                self._link.tell(Release(arrival.number))

        async def ask() -> None:
            try:
                answer, fd = await self._link.ask(question)
                arrival.give(expect(Given, answer), fd)
            except Exception as error:  # noqa: BLE001  # whatever it is, the readers raise it
                if self._arrivals.get(key) is arrival:
                    del self._arrivals[key]  # who comes later asks again
                arrival.fail(error)

        arrival = Arrival(
            question.number,
            on_unread=unread,
            on_passed=lambda: self._link.tell(Passed(question.number)),
        )
        self._by_number[question.number] = self._arrivals[key] = arrival
        task = asyncio.create_task(ask())
        self._asking.add(task)
        task.add_done_callback(self._asking.discard)
        return arrival


def _content(file: File, given: Given, result: Result) -> Content:
    return Content(file, None, given.etag, result, given.upstream)


def _open(fd: int) -> OpenFile:
    if fd == NONE:
        raise StoreError("there are no descriptors left")
    with disk("cannot read"):
        return OpenFile(fd, os.fstat(fd).st_size)
