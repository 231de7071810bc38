"""Damage found while serving: nobody gets it complete, and it is fetched afresh."""

from __future__ import annotations

import asyncio
import os
import random
import resource
import threading
from collections.abc import AsyncIterator, Iterator, Mapping
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from proxy.cli import verifying
from proxy.events import Published, Quarantined
from proxy.nix.signature import Keyring, PublicKey
from proxy.nix.trust import Trust
from proxy.store.verification import Checked, Verification
from tests.closures import SigningKey, StoreEntry
from tests.conftest import StartSimulator
from tests.inside import InsideProxy
from tests.simulator import BinaryCacheSimulator
from tests.store.publishing import nar_name

SMALL = StoreEntry.make("small-1", random.Random("small").randbytes(30_000))
LARGE = StoreEntry.make("large-1", random.Random("large").randbytes(6_000_000), compression="none")
ENTRIES = [SMALL, LARGE]


@pytest.fixture
async def upstream(sim: StartSimulator) -> BinaryCacheSimulator:
    """Return an upstream that has both paths."""
    return await sim(*ENTRIES)


@pytest.fixture
async def proxy(
    tmp_path: Path, upstream: BinaryCacheSimulator, key: SigningKey
) -> AsyncIterator[InsideProxy]:
    """Return a proxy that keeps both paths."""
    async with InsideProxy(tmp_path / "store", upstream.url, keys=[key.public]) as proxy:
        for entry in ENTRIES:
            await proxy.get(await proxy.nar_url(entry.hash_part))
        await proxy.until(lambda: len(proxy.observed(Published)) == len(ENTRIES))
        upstream.reset_counts()
        yield proxy


def _nar(proxy: InsideProxy, entry: StoreEntry) -> Path:
    return proxy.folder / "nar" / str(nar_name(entry))


@pytest.mark.parametrize("entry", ENTRIES, ids=["small", "large"])
@pytest.mark.parametrize("size", [0, 1, -1], ids=["empty", "short", "long"])
async def test_a_file_of_another_size(
    proxy: InsideProxy, upstream: BinaryCacheSimulator, entry: StoreEntry, size: int
) -> None:
    """A NAR that is not as long as signed is not served: this very request is answered from upstream."""
    nar = _nar(proxy, entry)
    if size < 0:
        nar.write_bytes(nar.read_bytes() + b"x")
    else:
        os.truncate(nar, size)
    answer = await proxy.pull(f"/nar/{nar_name(entry)}")
    assert (answer.body, answer.headers["X-Cache"]) == (bytes(entry.file), "MISS")
    assert [event.what for event in proxy.observed(Quarantined)] == [str(nar_name(entry))]
    await proxy.until(lambda: len(proxy.observed(Published)) == len(ENTRIES) + 1)
    again = await proxy.pull(f"/nar/{nar_name(entry)}")
    assert (again.body, again.headers["X-Cache"]) == (bytes(entry.file), "HIT")
    assert upstream.gets(entry.nar_path) == 1
    assert nar.read_bytes() == bytes(entry.file)


async def test_a_narinfo_that_changed(proxy: InsideProxy, upstream: BinaryCacheSimulator) -> None:
    """A narinfo that does not verify any more is replaced by the upstream's, and its NAR serves on."""
    narinfo = proxy.folder / f"{SMALL.hash_part}.narinfo"
    text = narinfo.read_bytes()
    narinfo.write_bytes(text.replace(b"NarSize: ", b"NarSize: 1"))
    proxy.cache.use(proxy.failover, negative_ttl=60.0)  # and what was in memory is gone
    assert (await proxy.get(SMALL.narinfo_path))[::2] == (200, text)
    assert (await proxy.pull(f"/nar/{nar_name(SMALL)}")).headers["X-Cache"] == "HIT"
    await proxy.eventually(narinfo.exists)
    assert narinfo.read_bytes() == text
    assert upstream.gets(SMALL.nar_path) == 0


async def test_a_file_that_gets_short_while_it_is_sent(
    proxy: InsideProxy, upstream: BinaryCacheSimulator
) -> None:
    """What ends too early under the hands of a reader is cut off there, and fetched afresh for the next."""
    async with proxy.session.get(f"{proxy.url}/nar/{nar_name(LARGE)}") as answer:
        got = await answer.content.readexactly(100_000)
        os.truncate(_nar(proxy, LARGE), 200_000)
        with pytest.raises((aiohttp.ClientPayloadError, ConnectionError)):
            got += await answer.content.read()
    assert bytes(LARGE.file).startswith(got)
    await proxy.until(lambda: proxy.observed(Quarantined))
    again = await proxy.pull(f"/nar/{nar_name(LARGE)}")
    assert again.body == bytes(LARGE.file)
    assert upstream.gets(LARGE.nar_path) == 1


async def test_a_small_file_that_is_open_already(
    proxy: InsideProxy, upstream: BinaryCacheSimulator
) -> None:
    """A small NAR that the fast lane holds open is not served on after it was taken out."""
    url = f"/nar/{nar_name(SMALL)}"
    for _ in range(3):
        assert (await proxy.pull(url)).headers["X-Cache"] == "HIT"
    await proxy.cache.take_out(nar_name(SMALL), "somebody found out")
    assert (await proxy.pull(url)).body == bytes(SMALL.file)
    assert upstream.gets(SMALL.nar_path) == 1


async def test_a_block_that_cannot_be_read(
    proxy: InsideProxy, upstream: BinaryCacheSimulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the disk cannot read any more (EIO) is cut off, and fetched afresh for the next."""
    sendfile, left = os.sendfile, [2]

    def failing(socket: int, fd: int, offset: int, count: int) -> int:
        left[0] -= 1
        if left[0] == 0:
            raise OSError(5, "Input/output error")
        return sendfile(socket, fd, offset, count)

    monkeypatch.setattr(os, "sendfile", failing)
    cut = await proxy.pull(f"/nar/{nar_name(LARGE)}")
    assert not cut.complete
    assert bytes(LARGE.file).startswith(cut.body)
    await proxy.until(lambda: proxy.observed(Quarantined))
    assert (await proxy.pull(f"/nar/{nar_name(LARGE)}")).body == bytes(LARGE.file)
    assert upstream.gets(LARGE.nar_path) == 1


async def test_no_descriptors_are_no_damage(
    proxy: InsideProxy, upstream: BinaryCacheSimulator
) -> None:
    """That a file cannot be opened for want of descriptors is no reason to take it out."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
    try:
        file = await proxy.cache._supplier.kept_nar(nar_name(LARGE))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert file is None
    assert not proxy.observed(Quarantined)
    assert _nar(proxy, LARGE).exists()


async def test_verify_is_interrupted(
    proxy: InsideProxy, key: SigningKey, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who ends a verification in the middle loses nothing: the next one goes on behind that."""
    monkeypatch.setattr(verifying, "TELL_EVERY", 0.0)
    trust = Trust([Keyring([PublicKey.parse(key.public)])])
    first, second = sorted(entry.hash_part for entry in ENTRIES)
    told: list[Mapping[str, Any]] = []
    checked = proxy.store.verification

    def slow(*arguments: Any, **options: Any) -> Verification:
        verification = checked(*arguments, **options)
        original = verification._check
        monkeypatch.setattr(verification, "_check", lambda *what: _slowly(original(*what)))
        return verification

    def _slowly(found: Iterator[Checked]) -> Iterator[Checked]:
        yield from found
        assert going_on.wait(10)

    going_on = threading.Event()
    monkeypatch.setattr(proxy.store, "verification", slow)

    async def tell(progress: Mapping[str, Any]) -> None:
        told.append(progress)
        if progress["checked"]:
            asyncio.get_running_loop().call_later(0.05, going_on.set)
            raise ConnectionResetError  # the client has left

    with pytest.raises(ConnectionResetError):
        await verifying.verify_store(proxy.store, trust, tell)
    assert told[-1]["checked"] == 1
    monkeypatch.undo()

    async def ignore(_progress: Mapping[str, Any]) -> None:
        """Take no notice."""

    found = await verifying.verify_store(proxy.store, trust, ignore)
    assert (found["resumed"], found["checked"]) == (first, 1)
    assert found["sound"] == 1
    assert second > first
    found = await verifying.verify_store(proxy.store, trust, ignore, restart=True)
    assert (found["resumed"], found["checked"]) == ("", 2)
