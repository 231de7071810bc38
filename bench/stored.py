"""A store with very many paths, as if all of them had been pulled through the proxy."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

from bench.content import KEY
from tests.blobs import Blob
from tests.closures import StoreEntry, nar, random_hash_part

NAR = Blob.of(nar(b"hello\n"))
"""What every path holds; the files are links to few others, which takes less time and room."""

LINKS = 50_000
"""How many links to one file; ext4 allows 65,000."""


class LargeStore:
    """A store folder with so many paths; made when it is not there yet.

    Args:
        folder: Where it is.
        count: How many paths.

    Attributes:
        folder: To be given to one daemon at a time.
        count: How many paths.
    """

    def __init__(self, folder: Path, count: int) -> None:
        self.folder = folder
        self.count = count
        complete = folder.with_name(f"{folder.name}.complete")
        if not complete.exists():
            shutil.rmtree(folder, ignore_errors=True)
            print(f"making a store of {count:,} paths …", flush=True)
            (folder / "nar").mkdir(parents=True)
            for number in range(count):
                self._add(number)
            complete.touch()

    def narinfo_paths(self, count: int) -> Iterator[str]:
        """Yield URL paths of narinfos that are there, at random, and others each time."""
        chosen = random.Random()
        for _ in range(count):
            yield _entry(chosen.randrange(self.count)).narinfo_path

    def forget_index(self) -> None:
        """Remove all that is derived, so that the next daemon has to scan the folder."""
        shutil.rmtree(self.folder / ".state", ignore_errors=True)

    def _add(self, number: int) -> None:
        entry = _entry(number)
        target = self.folder / entry.nar_path[1:]
        origin = self.folder / f"nar.{number // LINKS}"
        if not origin.exists():
            origin.write_bytes(bytes(NAR))
        os.link(origin, target)
        (self.folder / entry.narinfo_path[1:]).write_bytes(entry.narinfo(KEY))


def _entry(number: int) -> StoreEntry:
    hash_part = random_hash_part(random.Random(f"stored/{number}"))
    # This scheme names NARs just as the proxy's store does.
    return StoreEntry(hash_part, "stored-1.0", NAR, compression="none", scheme="nix-serve")
