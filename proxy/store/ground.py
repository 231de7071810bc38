"""The folder of a store itself: claimed, made, looked at, and made anew when somebody has removed it."""

from __future__ import annotations

import itertools
import os
from pathlib import Path

from proxy.nix.cache_info import CacheInfo
from proxy.store.files import Partial, disk, flush
from proxy.store.layout import Layout
from proxy.store.leftovers import Leftovers
from proxy.store.lock import FolderLock, refuse_foreign
from proxy.store.scan import remove_leftovers

PROBE = 64 * 2**10
"""Bytes written to find out whether the disk keeps anything."""


class Ground:
    """A folder that is ours until `release`.

    Args:
        layout: Where everything is.
        cache_info: What the folder's own ``nix-cache-info`` says.

    Raises:
        StoreLockedError: Another daemon has the folder.
        StoreError: The folder cannot be made, read or written.
    """

    def __init__(self, layout: Layout, cache_info: CacheInfo) -> None:
        self._layout = layout
        self._cache_info = cache_info.format()
        self._prefix = f"{layout.partials}/{os.getpid()}-"
        self._numbers = itertools.count()
        self.leftovers = Leftovers(layout.partials)
        """The downloads that were left unfinished."""
        self.renewals = 0
        """How often the folder was made anew."""
        with disk(f"cannot use {layout.root} as the store"):
            refuse_foreign(layout.root)
            self._make_folders()
            self._lock = FolderLock(layout)
            try:
                remove_leftovers(layout)
                self.leftovers.tidy()
                self._write_cache_info()
            except BaseException:
                self._lock.release()
                raise

    def release(self) -> None:
        """Let others have it."""
        self._lock.release()

    def probe(self) -> None:
        """Write, flush and remove a small file. Called on a thread.

        Raises:
            StoreError: The disk keeps nothing.
        """
        with disk(f"cannot use {self._layout.root} as the store"):
            self._lock.check_folder()
            self._make_folders()
            self.renewals += self._lock.keep()
        partial = self.partial()
        try:
            partial.append(bytes(PROBE))
            partial.flush()
        finally:
            partial.discard()
        if not self._layout.cache_info.exists():
            with disk("cannot write nix-cache-info"):
                self._write_cache_info()

    def new_path(self) -> str:
        """Name a partial file, as no other process of ours does that may still be ending."""
        return f"{self._prefix}{next(self._numbers)}"

    def partial(self) -> Partial:
        """Start a file that can be published later.

        Raises:
            StoreError: The disk failed.
        """
        return Partial(self.new_path())

    def write(self, path: Path, content: bytes, *, durable: bool = False) -> None:
        """Replace a small file in one step.

        Raises:
            StoreError: The disk failed.
            OSError: The disk failed.
        """
        partial = self.partial()
        try:
            partial.append(content)
            if durable:
                partial.flush()
            os.replace(partial.path, path)
            if durable:
                flush(path.parent)
        finally:
            partial.discard()

    def _write_cache_info(self) -> None:
        self.write(self._layout.cache_info, self._cache_info, durable=True)

    def _make_folders(self) -> None:
        for folder in self._layout.folders:
            folder.mkdir(parents=True, exist_ok=True)
