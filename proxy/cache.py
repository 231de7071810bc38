"""The pull-through: the store, else the upstreams; keep only what verifies.

Rules:

- Only a `VerifiedNarInfo` is rendered, remembered or stored (`proxy.known`).
- A thing is asked for once, however many ask for it (`proxy.tasks`), and by a task of the daemon, so that a
  client which leaves takes nothing away from the others.
- A NAR's URL needs no memory: it names the path and the NarHash, and a narinfo that says the same leads to
  wherever the upstream keeps the file today.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from proxy.absences import Absences
from proxy.ahead import Ahead
from proxy.answers import Content, NarAtHand, Text
from proxy.errors import NotFoundError
from proxy.events import COALESCED, HIT, MISS, PREFETCHED, Observer, Result
from proxy.failover import Failover
from proxy.fetch import Fetch, OpenSupply
from proxy.known import KnownPath, KnownPaths
from proxy.nix.nar_name import NarName
from proxy.nix.store_path import HashPart
from proxy.reader import Reader
from proxy.store.files import OpenFile
from proxy.store.folder import Store
from proxy.supplier import Supplier
from proxy.tasks import Tasks
from proxy.upstream.slots import urgent_when

WORKERS = min(8, max(2, len(os.sched_getaffinity(0))))
"""Threads that write and verify; they release the interpreter for nearly all of their work. More of them than
cores cost a tenth more, because they take each other's caches; a single one would wait for the disk."""


class Cache:
    """The pull-through cache. Made inside of a running event loop; closed with `close`.

    Args:
        store: What is here.
        failover: What is elsewhere.
        negative_ttl: Seconds that an absence is remembered.
        observer: Told of what happens.
        clock: Seconds on a monotonic clock.
    """

    def __init__(
        self,
        store: Store,
        failover: Failover,
        *,
        negative_ttl: float,
        observer: Observer,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store = store
        self._failover = failover
        self._observer = observer
        self.clock = clock
        self._known = KnownPaths(store, failover, observer, on_learnt=self._is_present)
        self._tasks = Tasks(observer)
        self._supplier = Supplier(
            store, failover, self._known, observer, tasks=self._tasks, clock=clock
        )
        self.hot_narinfo = self._known.hot
        """Returns a path's narinfo if it is in memory; this counts as no use."""
        self._absences = Absences(negative_ttl, clock)
        self.absent_until = self._absences.until
        """Returns until when a narinfo (``{hash part}.narinfo``) counts as absent, by the clock."""
        self._fetches: dict[str, Fetch] = {}
        self._claims: dict[str, int] = {}
        self.ahead = Ahead(observer)
        """What was done ahead of clients."""
        store.on_evicted = self._known.evicted
        self._workers = ThreadPoolExecutor(WORKERS, thread_name_prefix="verify")

    @property
    def fetches_in_flight(self) -> int:
        """Downloads that have not ended, or whose file is not in the store yet."""
        return len(self._fetches)

    @property
    def tasks(self) -> set[asyncio.Task[Any]]:
        """Everything that is under way."""
        return self._tasks.running

    def use(self, failover: Failover, *, negative_ttl: float) -> None:
        """Ask other upstreams from now on, and forget what was concluded from the old ones.

        What is under way goes on with the old ones.
        """
        self._failover = failover
        self._absences.ttl = negative_ttl
        self._known.use(failover)
        self._supplier.use(failover)
        self._absences.clear()

    async def close(self) -> None:
        """End everything that is under way; what is verified is still published by the store."""
        await self._tasks.close()
        await asyncio.to_thread(self._workers.shutdown)

    def recall(self, hash_part: HashPart) -> bool | None:
        """Take a narinfo into memory if the disk can be spared; tell whether it is there, None for soon."""
        if not self._store.has_at_hand(hash_part):
            return None
        return self._known.get(hash_part) is not None and self.hot_narinfo(hash_part) is not None

    def touch_narinfo(self, hash_part: HashPart) -> None:
        """Note that a narinfo in memory is used."""
        self._known.touch(hash_part)

    def keeps_nar(self, name: NarName) -> bool:
        """Tell whether a NAR is in the store."""
        return self._store.has_nar(name)

    def is_absent(self, key: str) -> bool:
        """Tell whether a narinfo (``{hash part}.narinfo``) or another file is known to be absent."""
        return key in self._absences

    def absent_for(self, key: str) -> float:
        """Return the seconds for which an absence is still remembered; 0 if it is not."""
        return self._absences.remaining(key)

    @property
    def room(self) -> int:
        """Bytes that can be kept before anything has to be evicted, all that arrives being counted."""
        arriving = sum(
            fetch.size or self._claims.get(key, 0) for key, fetch in self._fetches.items()
        )
        return self._store.room - arriving

    def lacks(self, name: NarName) -> bool:
        """Tell whether a NAR is neither here nor on its way."""
        return str(name) not in self._fetches and not self._store.has_nar(name)

    async def look_ahead(self, hash_part: HashPart) -> KnownPath:
        """Find out what there is to know of a path before a client asks.

        Raises:
            NotFoundError: No upstream has the path.
            UpstreamError: Nobody has it, as far as could be found out.
        """
        key = f"{hash_part}.narinfo"
        if key not in self._tasks:
            self.ahead.begin_lookup(key)
        try:
            with urgent_when(lambda: not self.ahead.is_unasked_lookup(key)):
                return (await self._narinfo(hash_part)).known
        finally:
            self.ahead.end_lookup(key)

    async def fetch_ahead(self, name: NarName, size: int) -> None:
        """Fetch a NAR that is not here before a client asks, and wait until it is whole.

        Args:
            name: The NAR.
            size: Bytes that it will take.

        Raises:
            ProxyError: It cannot be fetched.
        """
        key = str(name)
        if key in self._fetches:
            return
        self._absences.refuse(key)
        self._claims[key] = size
        self.ahead.begin(key)
        with urgent_when(lambda: not self.ahead.is_unasked(key)):
            fetch = self._start(key, lambda fetch: self._supplier.nar(name, fetch), name)
        try:
            await fetch.ended()
        except BaseException:
            self.ahead.failed(key)
            raise
        self.ahead.landed(key, fetch.size or size)

    async def settled(self, name: NarName) -> None:
        """Wait until the narinfo of a NAR that is here, if a crash withheld it, has been made good."""
        await self._tasks.over(f"publish {name}")

    def used_paths(self, hash_parts: Collection[HashPart]) -> None:
        """Note that the narinfos of paths were given to somebody: their NARs are not the next to go."""
        self._store.index.used_paths(hash_parts)

    def used(self, name: NarName) -> None:
        """Note that a NAR of the store was given to somebody past this cache."""
        self.ahead.asked(str(name))
        self._store.used(name)

    async def narinfo(self, hash_part: HashPart) -> Text:
        """Return a path's narinfo, with the URL by which `nar` knows its NAR.

        Raises:
            NotFoundError: No upstream has the path.
            UpstreamError: Nobody has it, as far as could be found out.
        """
        self.ahead.end_lookup(f"{hash_part}.narinfo")
        return await self._narinfo(hash_part)

    async def _narinfo(self, hash_part: HashPart) -> Text:
        if self._known.hot(hash_part) is None:
            await self._store.bring_in_narinfo(hash_part)
        known = self._known.get(hash_part)
        if known is not None:
            return Text(known, HIT)
        key = f"{hash_part}.narinfo"
        joined = key in self._tasks
        try:
            with self._absences.noted(key):
                learnt = await self._supplier.look_up(hash_part)
        except NotFoundError:
            known = self._known.hot(hash_part)
            if known is None:
                raise
            self._is_present(hash_part)  # it was learnt meanwhile, by somebody who wanted its NAR
            return Text(known, HIT)
        self._absences.drop(str(learnt.info.nar_name))
        return Text(learnt, COALESCED if joined else MISS)

    async def nar(self, name: NarName) -> Content:
        """Return a NAR: from the store, or as it arrives.

        Raises:
            NotFoundError: No upstream has this path with these contents.
            UpstreamError: Nobody has it, as far as could be found out.
            TrustError: What was fetched is not what was signed, and nothing of it was released.
            StoreError: The disk failed.
        """
        self.ahead.end_lookup(f"{name.hash_part}.narinfo")
        was_ahead = self.ahead.asked(str(name))
        return await self._nar(name, PREFETCHED if was_ahead else None)

    def nar_at_hand(self, name: NarName, most: int, whole: int) -> NarAtHand | None:
        """Return a NAR of the store that has at most so many bytes, as `Supplier.nar_at_hand` does."""
        found = self._supplier.nar_at_hand(name, most, whole)
        if found is None:
            return None
        content, rest, known = found
        result = PREFETCHED if self.ahead.asked(name.text) else HIT
        return NarAtHand(content, rest, known.etag, result, known.origin)

    async def _nar(self, name: NarName, result: Result | None = None) -> Content:
        key = str(name)
        file = await self._supplier.kept_nar(name)
        if file is not None:
            upstream = self._published_by(name)
            return Content(file, None, self._known.etag(name), result or HIT, upstream)
        reader, joined = await self._joined(
            key, lambda fetch: self._supplier.nar(name, fetch), name
        )
        if result is None or joined is MISS:
            result = joined  # what was fetched ahead may have failed, or be gone again
        return Content(reader, None, self._known.etag(name), result, reader.fetch.upstream)

    async def nar_head(self, name: NarName) -> Content:
        """Return what `nar` would, without fetching what is neither here nor on its way.

        Raises:
            NotFoundError: No upstream has this path with these contents.
            UpstreamError: Nobody has it, as far as could be found out.
        """
        if str(name) in self._fetches or self._store.has_nar(name):
            return await self._nar(name)
        with self._absences.noted(str(name)):
            upstream, size = await self._tasks.once(
                f"size of {name}", lambda: self._supplier.announced_size(name)
            )
        return Content(None, size, self._known.etag(name), MISS, upstream)

    async def foreign_nar(self, reference: str) -> Content:
        """Pass on a NAR by a URL that is not ours: somebody remembers it from another proxy.

        There is no narinfo to judge it by, so it is not kept; Nix judges it.

        Raises:
            NotFoundError: No upstream has it.
            UpstreamError: Nobody has it, as far as could be found out.
        """
        reader, result = await self._joined(
            reference, lambda _fetch: self._supplier.foreign_nar(reference)
        )
        return Content(reader, None, None, result, reader.fetch.upstream)

    async def foreign_nar_head(self, reference: str) -> Content:
        """Return what `foreign_nar` would, without fetching it.

        Raises:
            NotFoundError: No upstream has it.
            UpstreamError: Nobody has it, as far as could be found out.
        """
        with self._absences.noted(reference):
            offer = await self._tasks.once(
                f"size of {reference}",
                lambda: self._failover.first(
                    lambda source: source.upstream.nar_size(reference), "nar", reference
                ),
            )
        return Content(None, offer.value, None, MISS, offer.upstream.name)

    async def file(self, path: str) -> Content:
        """Return a listing, log, realisation or debug info, kept as the upstream keeps it.

        Raises:
            NotFoundError: No upstream has it.
            UpstreamError: Nobody has it, as far as could be found out.
            StoreError: The disk failed.
        """
        result: Result = HIT
        file = self._supplier.kept_file(path)
        if file is None:
            result = COALESCED if path in self._tasks else MISS
            with self._absences.noted(path):
                unkept = await self._tasks.once(path, lambda: self._supplier.keep_file(path))
            file = self._store.open_file(path) if unkept is None else OpenFile.holding(unkept)
        if file is None:
            raise NotFoundError(f"{path} is gone again")
        return Content(file, None, None, result, "")

    @property
    def removals(self) -> int:
        """How often files were taken from the store that somebody may have open: whoever has looks again."""
        return self._known.damages + self._store.renewals

    def taken_out(self, hash_part: HashPart) -> None:
        """Something damaged has been taken out of the store: believe nothing that was said of it."""
        self._known.taken_out(hash_part)

    def damaged(self, name: NarName, reason: str) -> None:
        """A NAR of the store turned out to be damaged: see that it is taken out."""
        self._tasks.ensure(f"take out {name}", lambda: self._supplier.take_out(name, reason))

    async def take_out(self, name: NarName, reason: str) -> None:
        """A NAR of the store is damaged: have it no longer, and fetch it afresh for whoever asks next."""
        await self._supplier.take_out(name, reason)

    def _published_by(self, name: NarName) -> str:
        """Return the upstream of a NAR in the store, and make good a narinfo that is not there, or wrong."""
        known = self._known.get(name.hash_part)
        if known is None:
            return ""
        kept = known.kept and self._store.has_narinfo(name.hash_part)
        if known.upstream is not None and not kept and known.info.nar_name == name:
            self._tasks.ensure(
                f"publish {name}", lambda: self._supplier.publish_narinfo(name, known)
            )
        return known.origin

    def _is_present(self, hash_part: HashPart) -> None:
        """Forget that a path was absent: whoever answers absences looks at nothing else."""
        self._absences.drop(f"{hash_part}.narinfo")

    async def _joined(
        self, key: str, open_supply: OpenSupply, name: NarName | None = None
    ) -> tuple[Reader, Result]:
        """Join the fetch that is under way, or start it; and wait until there is something to read."""
        fetch, result = self._fetches.get(key), COALESCED
        if fetch is None or not fetch.can_be_joined:
            self._absences.refuse(key)
            fetch, result = self._start(key, open_supply, name), MISS
        reader = fetch.attach()  # before anything is waited for: later it may be over
        try:
            await reader.wait_beyond(0)
        except BaseException:
            reader.close()
            raise
        return reader, result

    def _start(self, key: str, open_supply: OpenSupply, name: NarName | None = None) -> Fetch:
        """Run a fetch as a task of the daemon; it can be joined until its file is in the store."""
        fetch = Fetch(
            key,
            open_supply=open_supply,
            incoming=self._store.incoming(name),
            executor=self._workers,
            observer=self._observer,
        )

        async def run() -> None:
            try:
                await fetch.run()
            finally:
                fetch.close()
                self._claims.pop(key, None)
                if self._fetches.get(key) is fetch:  # not one for those who could not join this one
                    del self._fetches[key]
            if isinstance(fetch.error, NotFoundError):
                self._absences.add(key)

        self._fetches[key] = fetch
        _ = self._tasks.start(run())
        return fetch
