"""NARs whose compression refers far back, so that reading them takes much memory."""

from __future__ import annotations

import lzma
import random
from pathlib import Path

import pytest
import zstandard

from proxy.errors import StoreError
from proxy.fetch import HELD_BACK
from proxy.store.files import Partial
from tests.blobs import Blob
from tests.closures import SigningKey, StoreEntry
from tests.conftest import StartSimulator
from tests.inside import InsideProxy

pytestmark = pytest.mark.timeout(60)

KEY = SigningKey("test-cache-1")
"""The key that the fixtures trust."""

LENGTH = 3_000_000
"""Bytes of the NARs: some pieces from an upstream, and much less than any window."""


def _far_back(nar: Blob, compression: str) -> Blob:
    """Compress for a window of 128 MiB or 64 MiB."""
    if compression == "xz":
        return Blob.of(lzma.compress(bytes(nar), preset=9))
    parameters = zstandard.ZstdCompressionParameters.from_level(1, window_log=27)
    compressor = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    return Blob.of(compressor.compress(bytes(nar)) + compressor.flush())


def _entry(compression: str, *, lying: bool = False) -> StoreEntry:
    content = random.Random(compression).randbytes(LENGTH)
    entry = StoreEntry.make(f"far-{compression}", content, compression=compression)
    said = StoreEntry.make(f"far-{compression}", content[::-1], compression=compression)
    return entry.but(served=_far_back((said if lying else entry).nar, compression))


@pytest.mark.parametrize("compression", ["zstd", "xz"])
async def test_a_large_window_is_served_and_kept(
    sim: StartSimulator, tmp_path: Path, compression: str
) -> None:
    """It is verified when its turn comes, and nobody who asks for it notices."""
    entry = _entry(compression)
    cache = await sim(entry)
    async with InsideProxy(tmp_path, cache.url, keys=[KEY.public]) as proxy:
        url = await proxy.nar_url(entry.hash_part)
        assert (await proxy.pull(url)).body == bytes(entry.file)
        await proxy.idle()
        cache.down()
        assert (await proxy.pull(url)).body == bytes(entry.file)


@pytest.mark.parametrize("compression", ["zstd", "xz"])
async def test_a_lie_in_a_large_window_is_cut(
    sim: StartSimulator, tmp_path: Path, compression: str
) -> None:
    """Another NAR than the signed one is never given whole, and not kept."""
    entry = _entry(compression, lying=True)
    cache = await sim(entry)
    async with InsideProxy(tmp_path, cache.url, keys=[KEY.public]) as proxy:
        answer = await proxy.pull(await proxy.nar_url(entry.hash_part))
        assert not answer.complete
        assert len(answer.body) <= len(entry.file) - HELD_BACK
        await proxy.idle()
        assert not proxy.kept


@pytest.mark.parametrize("lying", [False, True], ids=["right", "lying"])
@pytest.mark.parametrize("taken", [0, LENGTH // 2], ids=["nothing", "half"])
async def test_a_large_window_that_the_disk_refuses(
    sim: StartSimulator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, taken: int, *, lying: bool
) -> None:
    """What cannot be read again is verified as it passes, also where the disk fails on the way."""
    append = Partial.append

    def refusing(self: Partial, data: bytes) -> None:
        if self.size >= taken:
            raise StoreError("full")
        append(self, data)

    entry = _entry("zstd", lying=lying)
    cache = await sim(entry)
    async with InsideProxy(tmp_path, cache.url, keys=[KEY.public]) as proxy:
        url = await proxy.nar_url(entry.hash_part)
        monkeypatch.setattr(Partial, "append", refusing)
        answer = await proxy.pull(url)
        monkeypatch.undo()
        assert answer.complete is not lying
        assert lying or answer.body == bytes(entry.file)
        await proxy.idle()
        assert not [name for name in proxy.kept if name.startswith("nar/")]
