"""What upstreams said, kept for later: at once in memory, on the disk only when it is needed there."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from proxy.errors import StoreError
from proxy.nix.store_path import parse_hash_part
from proxy.store import remembered
from proxy.store.layout import Layout
from proxy.store.remembered import Remembered

HASHES = [parse_hash_part(f"{number:032}") for number in range(20)]


class Kept:
    """What is remembered in a folder, and what the disk was told."""

    def __init__(self, folder: Path) -> None:
        self.layout = Layout(folder)
        self.failures: list[StoreError] = []
        self.remembered = Remembered(
            self.layout,
            self._write,
            lambda _path, error: self.failures.append(error),
        )

    def _write(self, path: Path, text: bytes) -> None:
        partial = path.with_suffix(".partial")
        partial.write_bytes(text)
        partial.replace(path)

    @property
    def written(self) -> set[str]:
        """The hash parts that are on the disk."""
        return {path.stem for path in self.layout.remembered.rglob("*.narinfo")}

    async def until_written(self, count: int) -> None:
        """Wait until so many are on the disk."""
        async with asyncio.timeout(10):
            while len(self.written) < count:  # noqa: ASYNC110  # a thread writes, and nothing tells
                await asyncio.sleep(0.005)


@pytest.fixture
async def kept(tmp_path: Path) -> AsyncIterator[Kept]:
    """Return what remembers nothing yet."""
    kept = Kept(tmp_path)
    yield kept
    await kept.remembered.close()


async def test_it_is_written_later(kept: Kept, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is still of use after a while is written, and read from there when memory has it no more."""
    monkeypatch.setattr(remembered, "DELAY", 0.05)
    kept.remembered.put("up0", HASHES[0], b"text")
    assert (kept.remembered.get("up0", HASHES[0]), kept.written) == (b"text", set())
    await kept.until_written(1)
    kept.layout.remembered_narinfo("up0", HASHES[0]).write_bytes(b"as the disk has it")
    async with asyncio.timeout(10):
        while kept.remembered.get("up0", HASHES[0]) == b"text":  # noqa: ASYNC110
            await asyncio.sleep(0.005)
    assert kept.remembered.get("up0", HASHES[0]) == b"as the disk has it"


async def test_what_was_superseded_is_never_written(kept: Kept) -> None:
    """What is of no use any more by then costs no file; other upstreams' words stay."""
    for upstream in ("up0", "up1"):
        kept.remembered.put(upstream, HASHES[0], b"text")
    kept.remembered.supersede("up0", HASHES[0])
    await kept.remembered.close()
    assert kept.remembered.get("up0", HASHES[0]) is None
    assert [path.parent.name for path in kept.layout.remembered.rglob("*.narinfo")] == ["up1"]


async def test_it_is_bounded(kept: Kept, monkeypatch: pytest.MonkeyPatch) -> None:
    """However much upstreams say, memory holds so many bytes of it, the latest ones."""
    monkeypatch.setattr(remembered, "PENDING", 1_000)
    few = Kept(kept.layout.root)
    for hash_part in HASHES:
        few.remembered.put("up0", hash_part, bytes(100))
    await few.remembered.close()
    assert few.written == set(HASHES[-10:])


async def test_a_disk_that_refuses(kept: Kept) -> None:
    """It is told once for all that could not be written, and nothing is raised."""
    kept.layout.remembered.parent.mkdir(parents=True)
    kept.layout.remembered.touch()  # where a folder should be
    for hash_part in HASHES:
        kept.remembered.put("up0", hash_part, b"text")
    await kept.remembered.close()
    assert len(kept.failures) == 1
