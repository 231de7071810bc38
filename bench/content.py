"""Binary caches to measure with: store paths made from scratch, written to a folder."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable
from pathlib import Path

from tests.closures import SigningKey, StoreEntry, closure, huge_nar, random_hash_part

KEY = SigningKey("bench-1")
"""Who signs everything."""

CACHE_INFO = "StoreDir: /nix/store\nWantMassQuery: 1\nPriority: 40\n"


def single_files(prefix: str, count: int, size: int, compression: str = "none") -> list[StoreEntry]:
    """Make paths without references; each has one file of `size` random bytes."""
    source = random.Random(prefix)
    return [
        StoreEntry.make(f"{prefix}-{number}", source.randbytes(size), compression=compression)
        for number in range(count)
    ]


def programs(count: int) -> list[StoreEntry]:
    """Make paths with a file of 64 MiB each that zstd makes a third of, as it does with programs.

    Each is one block of 4 MiB of words, the more frequent the shorter its number, sixteen times over,
    in zstd frames of their own: what a frame holds is too much to be remembered from the last one.
    """
    source = random.Random("programs")
    words = [source.randbytes(source.randint(2, 12)) for _ in range(4096)]
    likely = [1 / rank for rank in range(1, len(words) + 1)]
    entries = []
    for number in range(count):
        block = b"".join(source.choices(words, likely, k=700_000))[: 4 << 20]
        archive = huge_nar(block, 16)
        name = f"program-{number}"
        entries.append(StoreEntry(random_hash_part(source), name, archive, compression="zstd"))
    return entries


def framed(name: str, size: int) -> StoreEntry:
    """Make a path of about so many bytes in zstd frames of 16 MiB each, as Nix ≥ 2.35 writes them.

    To read one takes all of it in memory, which is twice what ``zstd -19`` needs.
    """
    source = random.Random(name)
    archive = huge_nar(source.randbytes(16 << 20), max(1, size >> 24))
    return StoreEntry(random_hash_part(source), name, archive, compression="zstd")


def publish(folder: Path, entries: Iterable[StoreEntry]) -> None:
    """Write entries to a folder that any static file server makes a binary cache."""
    (folder / "nar").mkdir(parents=True, exist_ok=True)
    (folder / "nix-cache-info").write_text(CACHE_INFO)
    for entry in entries:
        (folder / entry.narinfo_path[1:]).write_bytes(entry.narinfo(KEY))
        with (folder / entry.nar_path[1:]).open("wb") as file:
            for piece in entry.file.pieces(1 << 20):
                file.write(piece)


def absent_narinfos(count: int) -> list[str]:
    """Return URL paths of narinfos that no cache has."""
    entries = (StoreEntry.make("absent", seed=seed) for seed in range(count))
    return [entry.narinfo_path for entry in entries]


def closure_of_size(paths: int, size: float, *, depth: int) -> list[StoreEntry]:
    """Make a closure whose files, half of them compressed, have about so many bytes together."""
    least = 1_000.0
    mean = size / paths / 0.76  # zstd halves what `closure` makes; the other half is not compressed
    most = 2 * least
    while (most - least) / math.log(
        most / least
    ) < mean:  # the mean of sizes spread evenly by order
        most *= 1.01
    return closure(paths, depth=depth, sizes=(int(least), int(most)), compressions=("zstd", "none"))
