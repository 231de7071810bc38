"""What nobody has is remembered for a while, and not for longer."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from proxy import absences
from tests.closures import SigningKey, StoreEntry
from tests.conftest import StartSimulator
from tests.faults import Gate, Status
from tests.inside import InsideProxy
from tests.simulator import BinaryCacheSimulator

ENTRY = StoreEntry.make("late-1.0", b"late\n" * 100)
NAR_URL = f"/nar/{ENTRY.hash_part}-{ENTRY.nar_hash}.nar.xz"

TARGETS = (
    ENTRY.narinfo_path,
    NAR_URL,
    f"/nar/{ENTRY.file_hash}.nar.xz",
    f"/{ENTRY.hash_part}.ls",
    f"/log/{ENTRY.hash_part}-late.drv",
    f"/realisations/sha256:{'ab' * 32}!out.doi",
    f"/build-trace-v2/{ENTRY.hash_part}-late.drv/out.doi",
    f"/debuginfo/{'0123456789' * 4}",
)
"""One of everything that can be absent."""

TTL = 60.0


def proxy_of(
    cache: BinaryCacheSimulator, folder: Path, key: SigningKey, ttl: float = TTL
) -> InsideProxy:
    """Make a proxy in front of one upstream."""
    return InsideProxy(folder, cache.url, keys=[key.public], negative_ttl=ttl)


@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize("target", TARGETS)
async def test_remembered(
    target: str, method: str, sim: StartSimulator, key: SigningKey, tmp_path: Path
) -> None:
    """What nobody has is asked for once in ``negative_ttl``, however often it is asked for."""
    cache = await sim()
    async with proxy_of(cache, tmp_path, key) as proxy:
        for _ in range(3):
            assert (await proxy.pull(target, method=method)).status == 404
        assert cache.count() == 1
        proxy.clock.now += TTL - 0.001
        assert (await proxy.pull(target, method=method)).status == 404
        assert cache.count() == 1
        proxy.clock.now += 0.001
        assert (await proxy.pull(target, method=method)).status == 404
        assert cache.count() == 2


async def test_asking_does_not_prolong(
    sim: StartSimulator, key: SigningKey, tmp_path: Path
) -> None:
    """An absence ends when it was to end, though it was asked for again and again meanwhile."""
    cache = await sim()
    async with proxy_of(cache, tmp_path, key) as proxy:
        for _ in range(10):
            assert (await proxy.pull(ENTRY.narinfo_path)).status == 404
            proxy.clock.now += TTL / 10
        assert cache.count() == 1
        assert (await proxy.pull(ENTRY.narinfo_path)).status == 404
        assert cache.count() == 2


async def test_not_remembered_at_all(sim: StartSimulator, key: SigningKey, tmp_path: Path) -> None:
    """With ``negative_ttl = 0`` every request asks."""
    cache = await sim()
    async with proxy_of(cache, tmp_path, key, ttl=0) as proxy:
        for asked in (1, 2, 3):
            assert (await proxy.pull(ENTRY.narinfo_path)).status == 404
            assert cache.count() == asked


async def test_appears_later(sim: StartSimulator, key: SigningKey, tmp_path: Path) -> None:
    """A path that is published later is served once the absence is over."""
    cache = await sim()
    async with proxy_of(cache, tmp_path, key) as proxy:
        for target in (ENTRY.narinfo_path, NAR_URL):
            assert (await proxy.pull(target)).status == 404
        cache.publish(ENTRY)
        for target in (ENTRY.narinfo_path, NAR_URL):
            assert (await proxy.pull(target)).status == 404
        proxy.clock.now += TTL
        nar_url = await proxy.nar_url(ENTRY.hash_part)
        assert (await proxy.pull(nar_url)).body == bytes(ENTRY.file)


async def test_narinfo_ends_the_absence_of_its_nar(
    sim: StartSimulator, key: SigningKey, tmp_path: Path
) -> None:
    """A NAR that was absent a moment ago is served as soon as its narinfo has been handed out."""
    cache = await sim()
    async with proxy_of(cache, tmp_path, key) as proxy:
        assert (await proxy.pull(NAR_URL)).status == 404
        cache.publish(ENTRY)
        assert await proxy.nar_url(ENTRY.hash_part) == NAR_URL
        assert (await proxy.pull(NAR_URL)).body == bytes(ENTRY.file)


async def test_nar_ends_the_absence_of_its_narinfo(
    sim: StartSimulator, key: SigningKey, tmp_path: Path
) -> None:
    """A narinfo that was absent a moment ago is served once its NAR has been found."""
    cache = await sim()
    async with proxy_of(cache, tmp_path, key) as proxy:
        assert (await proxy.pull(ENTRY.narinfo_path)).status == 404
        cache.publish(ENTRY)
        assert (await proxy.pull(NAR_URL)).body == bytes(ENTRY.file)
        assert await proxy.nar_url(ENTRY.hash_part) == NAR_URL


async def test_one_absence_is_not_anothers(
    sim: StartSimulator, key: SigningKey, tmp_path: Path
) -> None:
    """That one thing is absent says nothing about any other."""
    other = StoreEntry.make("other-1.0")
    cache = await sim(other)
    async with proxy_of(cache, tmp_path, key) as proxy:
        for target in TARGETS:
            assert (await proxy.pull(target)).status == 404
        nar_url = await proxy.nar_url(other.hash_part)
        assert (await proxy.pull(nar_url)).body == bytes(other.file)


async def test_absent_with_other_contents(
    sim: StartSimulator, key: SigningKey, tmp_path: Path
) -> None:
    """A NAR of other contents than the upstream's is absent, and the narinfo is none the less there."""
    cache = await sim(ENTRY)
    async with proxy_of(cache, tmp_path, key) as proxy:
        other = f"/nar/{ENTRY.hash_part}-{'0' * 52}.nar.xz"
        for _ in range(3):
            assert (await proxy.pull(other)).status == 404
        assert cache.gets(ENTRY.narinfo_path) <= 1
        assert await proxy.nar_url(ENTRY.hash_part) == NAR_URL


async def test_bounded(
    sim: StartSimulator, key: SigningKey, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However much is absent, only so much is remembered, the latest of it."""
    monkeypatch.setattr(absences, "ABSENT", 10)
    entries = [StoreEntry.make(f"absent-{number}") for number in range(30)]
    cache = await sim()
    async with proxy_of(cache, tmp_path, key) as proxy:
        for entry in entries:
            assert (await proxy.pull(entry.narinfo_path)).status == 404
        assert cache.count() == 30
        for entry in entries[-10:]:
            assert (await proxy.pull(entry.narinfo_path)).status == 404
        assert cache.count() == 30
        for entry in entries[:5]:
            assert (await proxy.pull(entry.narinfo_path)).status == 404
        assert cache.count() == 35


async def test_all_who_wait(sim: StartSimulator, key: SigningKey, tmp_path: Path) -> None:
    """Many who ask for the same absent path at once ask the upstream once, and all are told."""
    cache = await sim()
    gate = Gate(None)
    cache.fault("*", gate)
    async with proxy_of(cache, tmp_path, key) as proxy, asyncio.TaskGroup() as group:
        asked = [group.create_task(proxy.pull(ENTRY.narinfo_path)) for _ in range(20)]
        async with asyncio.timeout(20):
            await gate.reached.wait()
        gate.open()
        assert [(await task).status for task in asked] == [404] * 20
        assert cache.count() == 1


async def test_absence_outlives_its_asker(
    sim: StartSimulator, key: SigningKey, tmp_path: Path
) -> None:
    """When who asked has left before the answer, the answer is remembered all the same."""
    cache = await sim()
    gate = Gate(None)
    cache.fault("*", gate)
    async with proxy_of(cache, tmp_path, key) as proxy:
        leaving = asyncio.create_task(proxy.pull(ENTRY.narinfo_path))
        async with asyncio.timeout(20):
            await gate.reached.wait()
        leaving.cancel()
        await asyncio.gather(leaving, return_exceptions=True)
        gate.open()
        await proxy.idle()
        assert (await proxy.pull(ENTRY.narinfo_path)).status == 404
        assert cache.count() == 1


@pytest.mark.parametrize("status", [401, 403, 429, 500, 503])
async def test_failure_is_no_absence(
    status: int, sim: StartSimulator, key: SigningKey, tmp_path: Path
) -> None:
    """A failure is not remembered: the next request finds the path."""
    cache = await sim(ENTRY)
    cache.fault("*", Status(status), times=2)
    async with proxy_of(cache, tmp_path, key) as proxy:
        for _ in range(2):
            assert (await proxy.pull(ENTRY.narinfo_path)).status == 404
        assert await proxy.nar_url(ENTRY.hash_part) == NAR_URL


async def test_not_kept_on_disk(sim: StartSimulator, key: SigningKey, tmp_path: Path) -> None:
    """An absence is forgotten by a restart."""
    cache = await sim()
    async with proxy_of(cache, tmp_path, key) as proxy:
        assert (await proxy.pull(ENTRY.narinfo_path)).status == 404
    cache.publish(ENTRY)
    async with proxy_of(cache, tmp_path, key) as proxy:
        assert await proxy.nar_url(ENTRY.hash_part) == NAR_URL


async def test_forgotten_with_the_upstreams(
    sim: StartSimulator, key: SigningKey, tmp_path: Path
) -> None:
    """What was absent at other upstreams is asked for again when the configuration changes."""
    cache, other = await sim(), await sim(ENTRY)
    async with proxy_of(cache, tmp_path, key) as proxy:
        assert (await proxy.pull(ENTRY.narinfo_path)).status == 404
        before, proxy.failover = proxy.failover, proxy.make_failover(other.url)
        proxy.cache.use(proxy.failover, negative_ttl=TTL)
        assert await proxy.nar_url(ENTRY.hash_part) == NAR_URL
        await before.close()
