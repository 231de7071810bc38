"""The store folder for those who only read it: no lock, no index, nothing to close.

Any number of processes may have one, beside the one daemon that has the `proxy.store.folder.Store`. Reads
are plain calls: a narinfo is a small file in the page cache, and reading it costs less than handing it to
a thread.
"""

from __future__ import annotations

from pathlib import Path

from proxy.nix.nar_name import NarName
from proxy.nix.store_path import HashPart
from proxy.store.files import OpenFile, reading
from proxy.store.layout import Layout
from proxy.store.provenance import origin_of


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
        return read(self.layout.narinfo(hash_part))

    def origin(self, hash_part: HashPart) -> str:
        """Return the name of the upstream that a path is from; empty when nobody knows."""
        return origin_of(self.layout.narinfo(hash_part))

    def has_narinfo(self, hash_part: HashPart) -> bool:
        """Tell whether a path is here whole: its NAR, and the narinfo that is published after it."""
        return self.layout.narinfo(hash_part).exists()

    def open_nar(self, name: NarName) -> OpenFile | None:
        """Open a NAR that is here.

        Raises:
            StoreError: The disk failed.
        """
        return self._open(self.layout.nar(name))

    def has_nar(self, name: NarName) -> bool:
        """Tell whether a NAR is here."""
        return self.layout.nar(name).exists()

    def open_file(self, path: str) -> OpenFile | None:
        """Open another file that is here: a log, a listing, and so on.

        Raises:
            StoreError: The disk failed.
        """
        return self._open(self.layout.file(path))

    def _open(self, path: Path) -> OpenFile | None:
        return OpenFile.at(path)


def read(path: Path) -> bytes | None:
    """Read a small file, or return None when there is none.

    Raises:
        StoreError: The disk failed.
    """
    with reading(f"cannot read {path.name}"):
        try:
            return path.read_bytes()
        except FileNotFoundError:
            return None
