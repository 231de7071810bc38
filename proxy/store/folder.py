"""The store: one folder, opened by one daemon.

What takes long (writing NARs, flushing, the index) has threads of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from proxy.errors import StoreError
from proxy.events import Evicted, Observer, Published, Quarantined, StoreFailed
from proxy.nix.cache_info import CacheInfo
from proxy.nix.nar_name import NarName
from proxy.nix.store_path import HashPart
from proxy.nix.trust import Trust
from proxy.store.database import Totals
from proxy.store.eviction import UNLIMITED, Limits
from proxy.store.files import OpenFile, Partial, disk
from proxy.store.ground import Ground
from proxy.store.incoming import Incoming
from proxy.store.index import Index
from proxy.store.leftovers import Lasting
from proxy.store.pins import PinFiles
from proxy.store.publisher import MakePublisher, Publication, Publisher, Rename
from proxy.store.quarantine import Quarantine
from proxy.store.reader import StoreReader, is_there, read
from proxy.store.remembered import Remembered
from proxy.store.scan import has_nar
from proxy.store.verification import Verification
from proxy.store.watch import Watch

TIDY_EVERY = 3600.0
"""Seconds after which unfinished downloads are looked through again."""


class Store(StoreReader):
    """An open store folder.

    Made inside of a running event loop, and closed with `close`.

    Args:
        root: The folder; made when missing.
        cache_info: What the folder's own ``nix-cache-info`` says.
        observer: Told of what is published and evicted, and of what fails.
        limits: What the folder may take.
        publisher: Makes what gives final names.

    Raises:
        StoreLockedError: Another daemon has the folder.
        StoreError: The folder cannot be made, read or written.
    """

    def __init__(
        self,
        root: Path,
        cache_info: CacheInfo,
        observer: Observer,
        limits: Limits = UNLIMITED,
        publisher: MakePublisher = Publisher,
    ) -> None:
        super().__init__(root)
        self.limits, self.pins = limits, PinFiles(self.layout)
        self._observer = observer
        self._loop = asyncio.get_running_loop()
        self._ground = Ground(self.layout, cache_info)
        self._quarantine = Quarantine(self.layout)
        self.on_evicted: Callable[[str], None] = lambda _name: None
        """Called with the file name of each NAR that was evicted."""
        self._watch = Watch(self._ground.probe, observer)
        self.index = Index(
            self.layout,
            self._on_index_failure,
            limits=limits,
            on_evicted=self._on_evicted,
            pinned=self.pins.hash_parts(),
            on_vanished=self._watch.suspected,
        )
        self._publisher = publisher(self._on_published)
        self._tidying = self._loop.call_later(TIDY_EVERY, self._tidy)
        self._remembered = Remembered(self.layout, self._write_remembered, self._on_not_remembered)

    @property
    def renewals(self) -> int:
        """How often the folder was made anew, because somebody had removed it."""
        return self._ground.renewals

    @property
    def not_keeping(self) -> str:
        """Why the disk keeps nothing at the moment; empty while it does."""
        return self._watch.reason

    @property
    def totals(self) -> Totals:
        """Bytes and paths in the store; grows while a scan after an unclean stop goes on."""
        return self.index.totals

    @property
    def scanned(self) -> bool:
        """Whether `totals` is all that there is: no scan goes on."""
        return self.index.scanned

    @property
    def room(self) -> int:
        """Bytes that can be kept before anything has to be evicted."""
        return 0 if self.not_keeping else self.index.room

    async def check(self) -> str:
        """Find out, by writing, whether the disk keeps anything; return `not_keeping`."""
        return await self._watch.check()

    async def close(self) -> None:
        """Publish what is verified, write the index, and let go of the folder."""
        self._tidying.cancel()
        await self._watch.close()
        await self._remembered.close()
        await asyncio.to_thread(self._publisher.close)
        await asyncio.to_thread(self.index.close)
        self._ground.release()

    def narinfo(self, hash_part: HashPart) -> bytes | None:
        """Return the narinfo of a path whose NAR is here too: `StoreReader.narinfo`.

        Raises:
            StoreError: The disk failed.
        """
        path = self.layout.narinfo_name(hash_part)
        return None if path in self._quarantine else read(path)

    def remembered_narinfo(self, upstream: str, hash_part: HashPart) -> bytes | None:
        """Return what an upstream said of a path whose NAR is not here.

        Raises:
            StoreError: The disk failed.
        """
        return self._remembered.get(upstream, hash_part)

    def remember_narinfo(self, upstream: str, hash_part: HashPart, text: bytes) -> None:
        """Keep an upstream's own narinfo, so that its NAR can be fetched later without asking again."""
        if not self.not_keeping:
            self._remembered.put(upstream, hash_part, text)

    def forget_narinfo(self, upstream: str, hash_part: HashPart) -> None:
        """Forget what `remember_narinfo` kept; it was wrong or has gone out of date."""
        self._remembered.forget(upstream, hash_part)

    def open_nar(self, name: NarName) -> OpenFile | None:
        """Open a NAR that is here: `StoreReader.open_nar`.

        Raises:
            StoreError: The disk failed.
        """
        path = self.layout.nar(name)
        return None if path in self._quarantine else self._open(path)

    def nar_at_hand(
        self, name: NarName, size: int, whole: int
    ) -> tuple[bytearray, OpenFile | None] | None:
        """Return a NAR that is here, if that takes no waiting; raise as `StoreReader.nar_at_hand`."""
        path = self.layout.nar_name(name)
        content = None if path in self._quarantine else OpenFile.at_hand(path, size, whole)
        if content is not None:
            self.index.used(path)
        return content

    def has_narinfo(self, hash_part: HashPart) -> bool:
        """Tell whether a path is here whole: its NAR, and the narinfo that is published after it."""
        return self._has(self.layout.narinfo_name(hash_part))

    def has_nar(self, name: NarName) -> bool:
        """Tell whether a NAR is here."""
        return self._has(self.layout.nar_name(name))

    def used(self, name: NarName) -> None:
        """Note that a NAR was used by somebody who had it open already."""
        self.index.used(self.layout.nar(name))

    def take_out(self, hash_part: HashPart, name: NarName | None, reason: str) -> None:
        """Take what is damaged out of the binary cache: it is here no more, and is fetched afresh.

        Called on any thread; with a NAR it waits for the disk.

        Args:
            hash_part: The path whose narinfo is damaged, if there is no ``name``.
            name: The NAR that is damaged; the narinfo that leads to it goes, too.
            reason: What is wrong.
        """
        narinfo = self.layout.narinfo(hash_part)
        nar = None if name is None else self.layout.nar(name)
        what = f"{hash_part}.narinfo" if name is None else str(name)
        try:
            with disk("cannot move it into quarantine"):
                self._quarantine.take(narinfo, nar)
        except StoreError as error:
            self._loop.call_soon_threadsafe(self._observer, StoreFailed(what, str(error)))
        for path in (narinfo, nar):
            if path is not None and not path.exists():
                self.index.removed(path)
        self._loop.call_soon_threadsafe(self._observer, Quarantined(what, reason))

    def verification(
        self,
        trust: Trust,
        stop: threading.Event,
        set_aside: Callable[[HashPart, NarName | None, str], object] | None = None,
        *,
        shared: bool = True,
    ) -> Verification:
        """Check everything again; ``set_aside`` replaces `take_out`."""
        return Verification(self.layout, trust, set_aside or self.take_out, stop, shared=shared)

    def incoming(self, name: NarName | None = None) -> Incoming:
        """Start a file that can be published later if the disk takes it, and passed on if it does not.

        Args:
            name: Of the NAR that it is, if it may be left unfinished, and what was left may be gone on with.
        """
        lasting = None if name is None else Lasting(self._ground.leftovers, self.partial, str(name))
        start = None if self.not_keeping else self.partial
        return Incoming(start, self._on_refused, lasting, self._ground.new_path)

    def partial(self) -> Partial:
        """Start a file that can be published later.

        Raises:
            StoreError: The disk failed.
        """
        return self._ground.partial()

    async def publish_nar(
        self, name: NarName, partial: Partial, narinfo: bytes, *, origin: str
    ) -> None:
        """Give a verified NAR and its narinfo their final names, durably; takes over ``partial``.

        Args:
            name: The NAR's name.
            partial: The NAR; its bytes were verified.
            narinfo: The verified narinfo, whose URL is ``nar/{name}``.
            origin: The upstream's name.

        Raises:
            StoreError: The disk failed; nothing has its final name that is not complete.
        """
        nar = self.layout.nar_name(name)
        renames = (Rename(partial.path, nar), self._described(name, narinfo))
        superseded = (self.layout.remembered_narinfo_name(origin, name.hash_part),)
        try:
            await self._publish(Publication(renames, origin=origin, superseded=superseded))
            self._remembered.supersede(origin, name.hash_part)
        except StoreError:
            self.index.added(nar, origin)  # it takes room, if it was renamed before that
            raise

    async def publish_narinfo(self, name: NarName, narinfo: bytes, *, origin: str) -> None:
        """Give a verified narinfo its final name, durably; its NAR has its own already.

        Raises:
            StoreError: The disk failed.
        """
        superseded = (self.layout.remembered_narinfo_name(origin, name.hash_part),)
        renames = (self._described(name, narinfo),)
        await self._publish(Publication(renames, origin=origin, superseded=superseded))
        self._remembered.supersede(origin, name.hash_part)

    async def publish_file(self, path: str, partial: Partial, *, origin: str) -> None:
        """Give another complete file its final name, durably; takes over ``partial``.

        Raises:
            StoreError: The disk failed.
        """
        partial.close()
        target = self.layout.file(path)
        try:
            with self._watched(), disk(f"cannot keep {path}"):
                target.parent.mkdir(parents=True, exist_ok=True)
        except StoreError:
            partial.discard()
            raise
        renames = (Rename(partial.path, str(target)),)
        await self._publish(Publication(renames, origin=origin))

    async def _publish(self, publication: Publication) -> None:
        published = asyncio.wrap_future(self._publisher.submit(publication))
        published.add_done_callback(functools.partial(self._tell_published, publication))
        with self._watched():
            await asyncio.shield(published)

    def _tell_published(self, publication: Publication, published: asyncio.Future[None]) -> None:
        if not published.cancelled() and published.exception() is None:
            target = publication.renames[0].target
            self._observer(Published(os.path.basename(target), publication.origin))

    @contextlib.contextmanager
    def _watched(self) -> Iterator[None]:
        """When something cannot be written, find out whether that is so in general."""
        try:
            yield
        except StoreError:
            self._watch.failed()
            raise

    def _on_refused(self, error: StoreError) -> None:
        """The disk does not take a download. Called on the thread that writes it."""
        self._loop.call_soon_threadsafe(self._observer, StoreFailed("a download", str(error)))
        self._watch.failed()

    def _tidy(self) -> None:
        self._ground.leftovers.forget_old()
        self._tidying = self._loop.call_later(TIDY_EVERY, self._tidy)

    def _on_published(self, publication: Publication) -> None:
        """Called on the publisher's thread, or on the event loop."""
        first = publication.renames[0].target
        there = not first.endswith(".narinfo") or has_nar(self.layout, first)
        for rename in publication.renames:
            self._quarantine.replaced(rename.target)
            if not there:  # evicted while it was published: its narinfo leads to nothing
                with contextlib.suppress(OSError):
                    os.unlink(rename.target)
                    self.index.removed(rename.target)
            there = self.index.added(rename.target, publication.origin)

    def _write_remembered(self, path: Path, text: bytes) -> None:
        """Called on a thread."""
        self._ground.write(path, text)
        self.index.remembered(path)

    def _on_not_remembered(self, path: Path, error: StoreError) -> None:
        """Called on the thread that writes it."""
        self._loop.call_soon_threadsafe(self._observer, StoreFailed(path.name, str(error)))
        self._watch.failed()

    def _on_evicted(self, name: str, size: int) -> None:
        """Called on the index's thread."""
        self._loop.call_soon_threadsafe(self._tell_evicted, name, size)

    def _tell_evicted(self, name: str, size: int) -> None:
        self._observer(Evicted(name, size))
        folder, _, nar = name.partition("/")
        if folder == self.layout.nars.name:
            self.on_evicted(nar)

    def _on_index_failure(self, reason: str) -> None:
        """Called on the index's thread."""
        self._loop.call_soon_threadsafe(self._observer, StoreFailed("index", reason))

    def _has(self, path: str) -> bool:
        return is_there(path) and path not in self._quarantine

    def _open(self, path: Path) -> OpenFile | None:
        file = super()._open(path)
        if file is not None:
            self.index.used(path)
        return file

    def _described(self, name: NarName, narinfo: bytes) -> Rename:
        """Say that a NAR's narinfo is to be written."""
        return Rename(self._ground.new_path(), self.layout.narinfo_name(name.hash_part), narinfo)
