"""One daemon for one store folder: flock(2) on a file in it, which names the process that has it."""

from __future__ import annotations

import contextlib
import fcntl
import os
from pathlib import Path

from proxy.errors import StoreError, StoreLockedError
from proxy.store.layout import Layout


class FolderLock:
    """The lock of a store folder, taken when this is made.

    Args:
        layout: The store folder; its state folder exists.

    Raises:
        StoreLockedError: Another daemon has it.
        OSError: The file cannot be made.
    """

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._fd = _take(layout.lock)

    def release(self) -> None:
        """Let others have the folder."""
        os.close(self._fd)

    def check_folder(self) -> None:
        """See that the folder is still on the file system that it was on.

        What is below a mount point while nothing is mounted there is not the store's to fill.

        Raises:
            StoreError: It is not.
        """
        if self._layout.lock.exists():
            return
        if _device_of(self._layout.root) != os.fstat(self._fd).st_dev:
            raise StoreError(f"the file system of {self._layout.root} is not there")

    def keep(self) -> bool:
        """Take the lock again, if somebody removed its file, or if another file system is there now.

        Returns:
            Whether that was so.

        Raises:
            StoreLockedError: Another daemon has it.
            OSError: The file cannot be made.
        """
        path = self._layout.lock
        if path.exists() and os.path.samestat(path.stat(), os.fstat(self._fd)):
            return False
        taken = _take(path)
        os.close(self._fd)
        self._fd = taken
        return True


def _device_of(path: Path) -> int:
    """Return the device that a path is on, or would be on."""
    while not path.exists():
        path = path.parent
    return path.stat().st_dev


def refuse_foreign(root: Path) -> None:
    """Leave alone a folder that is somebody else's: what we make there, they could not remove.

    Raises:
        StoreError: It is.
        OSError: It cannot be looked at.
    """
    with contextlib.suppress(FileNotFoundError):
        owner = root.stat().st_uid
        if owner != os.geteuid():
            raise StoreError(
                f"cannot use {root} as the store: it belongs to user {owner}, not to us"
            )


def _take(path: Path) -> int:
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
