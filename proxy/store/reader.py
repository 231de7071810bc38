"""The store folder for those who only read it: no lock, no index, nothing to close.

Any number of processes may have one, beside the one daemon that has the `proxy.store.folder.Store`. Reads
are plain calls: a narinfo is a small file in the page cache, and reading it costs less than handing it to
a thread. One that is not in memory is brought there first, by a thread.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

from proxy.nix.nar_name import NarName
from proxy.nix.store_path import HashPart
from proxy.store import pages
from proxy.store.files import OpenFile, unreadable
from proxy.store.layout import Layout
from proxy.store.provenance import origin_of

_PIECE: Final = 2**14
"""Bytes that are read at once: no narinfo but the oddest has more."""


class StoreReader:
    """A store folder, read.

    Args:
        root: The folder.
    """

    def __init__(self, root: Path) -> None:
        self.layout = Layout(root)

    def narinfo(self, hash_part: HashPart) -> bytes | None:
        """Return the narinfo of a path whose NAR is here too.

        Raises:
            StoreError: The disk failed.
        """
        return read(self.layout.narinfo_name(hash_part))

    def origin(self, hash_part: HashPart) -> str:
        """Return the name of the upstream that a path is from; empty when nobody knows."""
        return origin_of(self.layout.narinfo_name(hash_part))

    def has_at_hand(self, hash_part: HashPart) -> bool:
        """Tell whether a narinfo can be read, or is not there, without waiting for what is in it."""
        fd = _opened(self.layout.narinfo_name(hash_part))
        if fd is None:
            return True
        try:
            return pages.are_in_memory(fd, 0, 1)
        finally:
            os.close(fd)

    async def bring_in_narinfo(self, hash_part: HashPart) -> None:
        """Have a narinfo, if there is one, in memory for `narinfo`.

        Raises:
            StoreError: The disk does not answer.
        """
        fd = _opened(self.layout.narinfo_name(hash_part))
        if fd is None:
            return
        try:
            await pages.bring_in_beginning(fd)
        finally:
            os.close(fd)

    def has_narinfo(self, hash_part: HashPart) -> bool:
        """Tell whether a path is here whole: its NAR, and the narinfo that is published after it."""
        return is_there(self.layout.narinfo_name(hash_part))

    def open_nar(self, name: NarName) -> OpenFile | None:
        """Open a NAR that is here.

        Raises:
            StoreError: The disk failed.
        """
        return self._open(self.layout.nar(name))

    def nar_at_hand(
        self, name: NarName, size: int, whole: int
    ) -> tuple[bytearray, OpenFile | None] | None:
        """Return a NAR that is here, if it is as long as it should be and takes no waiting.

        Returns:
            All of it, or its beginning and the file: `OpenFile.at_hand`.

        Raises:
            BlockingIOError: The disk was asked for it, and may have it in memory soon.
        """
        return OpenFile.at_hand(self.layout.nar_name(name), size, whole)

    def has_nar(self, name: NarName) -> bool:
        """Tell whether a NAR is here."""
        return is_there(self.layout.nar_name(name))

    def open_file(self, path: str) -> OpenFile | None:
        """Open another file that is here: a log, a listing, and so on.

        Raises:
            StoreError: The disk failed.
        """
        return self._open(self.layout.file(path))

    def _open(self, path: Path) -> OpenFile | None:
        return OpenFile.at(path)


def _opened(path: str) -> int | None:
    """Open a file that may be there; `read` finds out what is wrong with it."""
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None


def is_there(path: str) -> bool:
    """Tell whether there is such a file, as far as the disk says; `Path.exists` takes longer."""
    return os.access(path, os.F_OK)


def read(path: str | Path) -> bytes | None:
    """Read a small file, or return None when there is none.

    Raises:
        StoreError: The disk failed.
    """
    pieces = []
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            while piece := os.read(fd, _PIECE):
                pieces.append(piece)
        finally:
            os.close(fd)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise unreadable(f"cannot read {Path(path).name}", error) from error
    return b"".join(pieces)
