"""Where each thing lies in the store folder. No file is touched here."""

from __future__ import annotations

from pathlib import Path

from proxy.nix.nar_name import NarName
from proxy.nix.store_path import HashPart

SIDE_FOLDERS = ("log", "realisations", "build-trace-v2", "debuginfo")
"""Folders of files that are neither narinfo nor NAR, named as in the protocol."""


class Layout:
    """The paths below one store folder.

    Args:
        root: The store folder.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._prefix = f"{root}/"
        self.cache_info = root / "nix-cache-info"
        self.nars = root / "nar"
        self.pins = root / "pins"
        self.state = root / ".state"
        self.partials = self.state / "partial"
        self.remembered = self.state / "narinfo"
        self.quarantine = self.state / "quarantine"
        self.verified = self.state / "verified"
        self.index = self.state / "index.sqlite"
        self.lock = self.state / "lock"
        self.control = self.state / "control.sock"

    @property
    def folders(self) -> tuple[Path, ...]:
        """The folders that are always there."""
        sides = (self.root / name for name in SIDE_FOLDERS)
        return (self.nars, *sides, self.partials, self.remembered)

    def narinfo(self, hash_part: HashPart) -> Path:
        """The narinfo of a path whose NAR is here too."""
        return self.root / f"{hash_part}.narinfo"

    def narinfo_name(self, hash_part: HashPart) -> str:
        """The same as a text, for whoever is in a hurry."""
        return f"{self._prefix}{hash_part}.narinfo"

    def nar(self, name: NarName) -> Path:
        """A NAR under its final name."""
        return Path(self.nar_name(name))

    def nar_name(self, name: NarName) -> str:
        """The same as a text, for whoever is in a hurry."""
        return f"{self._prefix}nar/{name}"

    def remembered_narinfo(self, upstream: str, hash_part: HashPart) -> Path:
        """An upstream's own narinfo of a path whose NAR is not here (yet)."""
        return self.remembered / upstream / f"{hash_part}.narinfo"

    def remembered_narinfo_name(self, upstream: str, hash_part: HashPart) -> str:
        """The same as a text, for whoever is in a hurry."""
        return f"{self._prefix}.state/narinfo/{upstream}/{hash_part}.narinfo"

    def file(self, path: str) -> Path:
        """Any other file of the cache.

        Args:
            path: Relative, as parsed by `proxy.nix.resource`: it holds no ``..`` and no empty part.
        """
        return self.root / path
