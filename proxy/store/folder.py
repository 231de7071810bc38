"""The store: one folder, opened by one daemon.

What takes long (writing NARs, flushing, the index) has threads of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import itertools
import os
from collections.abc import Iterator
from pathlib import Path

from proxy.errors import StoreError, StoreLockedError
from proxy.events import Evicted, Observer, Published, StoreFailed
from proxy.nix.cache_info import CacheInfo
from proxy.nix.nar_name import NarName
from proxy.nix.store_path import HashPart
from proxy.store.database import Totals
from proxy.store.eviction import UNLIMITED, Limits
from proxy.store.files import OpenFile, Partial, disk
from proxy.store.incoming import Incoming
from proxy.store.index import Index
from proxy.store.layout import SIDE_FOLDERS
from proxy.store.publisher import Publication, Publisher, Rename
from proxy.store.reader import StoreReader, read
from proxy.store.scan import remove_leftovers
from proxy.store.watch import Watch

PROBE = 64 * 2**10
"""Bytes written to find out whether the disk keeps anything."""


class Store(StoreReader):
    """An open store folder.

    Made inside of a running event loop, and closed with `close`.

    Args:
        root: The folder; made when missing.
        cache_info: What the folder's own ``nix-cache-info`` says.
        observer: Told of what is published and evicted, and of what fails.
        limits: What the folder may take.

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
    ) -> None:
        super().__init__(root)
        self._observer = observer
        self._loop = asyncio.get_running_loop()
        self._serial = itertools.count()
        with disk(f"cannot use {root} as the store"):
            self._make_folders()
            self._lock = _take_lock(self.layout.lock)
            try:
                remove_leftovers(self.layout)
                self._write(self.layout.cache_info, cache_info.format(), durable=True)
            except BaseException:
                os.close(self._lock)
                raise
        self._index = Index(
            self.layout, self._on_index_failure, limits=limits, on_evicted=self._on_evicted
        )
        self._publisher = Publisher(self._on_published)
        self._watch = Watch(self._probe, observer)

    @property
    def not_keeping(self) -> str:
        """Why the disk keeps nothing at the moment; empty while it does."""
        return self._watch.reason

    @property
    def totals(self) -> Totals:
        """Bytes and paths in the store; grows while a scan after an unclean stop goes on."""
        return self._index.totals

    @property
    def room(self) -> int:
        """Bytes that can be kept before anything has to be evicted."""
        return 0 if self.not_keeping else self._index.room

    async def check(self) -> str:
        """Find out, by writing, whether the disk keeps anything; return `not_keeping`."""
        return await self._watch.check()

    async def close(self) -> None:
        """Publish what is verified, write the index, and let go of the folder."""
        await self._watch.close()
        await asyncio.to_thread(self._publisher.close)
        await asyncio.to_thread(self._index.close)
        os.close(self._lock)

    def remembered_narinfo(self, upstream: str, hash_part: HashPart) -> bytes | None:
        """Return what an upstream said of a path whose NAR is not here.

        Raises:
            StoreError: The disk failed.
        """
        return read(self.layout.remembered_narinfo(upstream, hash_part))

    def remember_narinfo(self, upstream: str, hash_part: HashPart, text: bytes) -> None:
        """Keep an upstream's own narinfo, so that its NAR can be fetched later without asking again.

        It is not flushed to the disk: losing it costs one question to the upstream.
        """
        if self.not_keeping:
            return
        path = self.layout.remembered_narinfo(upstream, hash_part)
        try:
            with self._watched(), disk("cannot remember a narinfo"):
                path.parent.mkdir(parents=True, exist_ok=True)
                self._write(path, text)
        except StoreError as error:
            self._observer(StoreFailed(path.name, str(error)))

    def forget_narinfo(self, upstream: str, hash_part: HashPart) -> None:
        """Forget what `remember_narinfo` kept; it was wrong or has gone out of date."""
        with contextlib.suppress(OSError):
            self.layout.remembered_narinfo(upstream, hash_part).unlink(missing_ok=True)

    def used(self, name: NarName) -> None:
        """Note that a NAR was used by somebody who had it open already."""
        self._index.used(self.layout.nar(name))

    def incoming(self) -> Incoming:
        """Start a file that can be published later if the disk takes it, and passed on if it does not."""
        return Incoming(None if self.not_keeping else self.partial, self._on_refused)

    def partial(self) -> Partial:
        """Start a file that can be published later.

        Raises:
            StoreError: The disk failed.
        """
        return Partial(self.layout.partials / str(next(self._serial)))

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
        try:
            with self._watched():
                text = self._written(narinfo)
        except StoreError:
            partial.discard()
            raise
        nar = self.layout.nar(name)
        renames = (Rename(partial.path, nar), Rename(text, self.layout.narinfo(name.hash_part)))
        superseded = (self.layout.remembered_narinfo(origin, name.hash_part),)
        try:
            await self._publish(Publication(renames, origin=origin, superseded=superseded))
        except StoreError:
            self._index.added(nar, origin)  # it takes room, if it was renamed before that
            raise

    async def publish_narinfo(self, name: NarName, narinfo: bytes, *, origin: str) -> None:
        """Give a verified narinfo its final name, durably; its NAR has its own already.

        Raises:
            StoreError: The disk failed.
        """
        target = self.layout.narinfo(name.hash_part)
        superseded = (self.layout.remembered_narinfo(origin, name.hash_part),)
        with self._watched():
            renames = (Rename(self._written(narinfo), target),)
        await self._publish(Publication(renames, origin=origin, superseded=superseded))
        if not self.has_nar(name):  # evicted meanwhile
            with contextlib.suppress(OSError):
                target.unlink()

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
        await self._publish(Publication(renames=(Rename(partial.path, target),), origin=origin))

    async def _publish(self, publication: Publication) -> None:
        with self._watched():
            await asyncio.wrap_future(self._publisher.submit(publication))

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

    def _probe(self) -> None:
        """Write, flush and remove a small file. Called on a thread.

        Raises:
            StoreError: The disk keeps nothing.
        """
        with disk(f"cannot use {self.layout.root} as the store"):
            self._recover_folder()
        partial = self.partial()
        try:
            partial.append(bytes(PROBE))
            partial.flush()
        finally:
            partial.discard()

    def _recover_folder(self) -> None:
        """Make what somebody removed, or see that a file system that was gone is there again.

        What is below a mount point while nothing is mounted there is not the store's to fill.
        """
        lock = self.layout.lock
        if lock.exists() and os.path.samestat(lock.stat(), os.fstat(self._lock)):
            self._make_folders()
            return
        if not lock.exists() and _device_of(self.layout.root) != os.fstat(self._lock).st_dev:
            raise StoreError(f"the file system of {self.layout.root} is not there")
        self._make_folders()
        gone, self._lock = self._lock, _take_lock(lock)
        os.close(gone)

    def _on_published(self, publication: Publication) -> None:
        """Called on the publisher's thread."""
        for rename in publication.renames:
            self._index.added(rename.target, publication.origin)
        self._loop.call_soon_threadsafe(
            self._observer, Published(publication.renames[0].target.name, publication.origin)
        )

    def _on_evicted(self, name: str, size: int) -> None:
        """Called on the index's thread."""
        self._loop.call_soon_threadsafe(self._observer, Evicted(name, size))

    def _on_index_failure(self, reason: str) -> None:
        """Called on the index's thread."""
        self._loop.call_soon_threadsafe(self._observer, StoreFailed("index", reason))

    def _open(self, path: Path) -> OpenFile | None:
        file = super()._open(path)
        if file is not None:
            self._index.used(path)
        return file

    def _written(self, content: bytes) -> Path:
        """Write a small file that is to be published."""
        partial = self.partial()
        try:
            partial.append(content)
        except StoreError:
            partial.discard()
            raise
        partial.close()
        return partial.path

    def _write(self, path: Path, content: bytes, *, durable: bool = False) -> None:
        """Replace a small file in one step."""
        partial = self.partial()
        try:
            partial.append(content)
            if durable:
                partial.flush()
            partial.path.replace(path)
        finally:
            partial.discard()

    def _make_folders(self) -> None:
        for folder in (
            self.layout.nars,
            *(self.layout.root / name for name in SIDE_FOLDERS),
            self.layout.partials,
            self.layout.remembered,
        ):
            folder.mkdir(parents=True, exist_ok=True)


def _device_of(path: Path) -> int:
    """Return the device that a path is on, or would be on."""
    while not path.exists():
        path = path.parent
    return path.stat().st_dev


def _take_lock(path: Path) -> int:
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.pread(fd, 32, 0).decode(errors="replace").strip()
        os.close(fd)
        raise StoreLockedError(
            f"the store {path.parent.parent} is in use by another nix-cache-proxy (process {holder})"
        ) from None
    os.ftruncate(fd, 0)
    os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
    return fd
