"""NARs that arrive damaged from an upstream, while another one has them whole."""

from __future__ import annotations

import asyncio
import random
from contextlib import closing
from http.client import HTTPConnection, IncompleteRead
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from proxy.events import Rejected
from proxy.fetch import HELD_BACK
from proxy.nix.nar_name import NarName
from proxy.places import BLAME_LASTS, Blame
from proxy.supply import WHOLE
from tests.closures import SigningKey, StoreEntry
from tests.conftest import RunDaemon, RunSimulator, StartProxy, StartSimulator
from tests.faults import Corrupt, Cut, Gate, Stall, Status
from tests.inside import InsideProxy, Received
from tests.nix_client import NixClient
from tests.simulator import BinaryCacheSimulator

CONTENT = random.Random(11).randbytes(2_000_000)
NAR = StoreEntry.make("large-1.0", CONTENT, compression="none")
FILE = bytes(NAR.file)
SIZE = len(FILE)
MIDDLE = SIZE // 2

PACKED = StoreEntry.make(
    "packed-1.0", random.Random(12).randbytes(700_000).hex().encode(), compression="xz"
)
"""Text, because xz has no use for its own checks where it cannot compress."""

ATTEMPTS = 5
"""Of Nix, for one download (``download-attempts``)."""


async def resume(proxy: InsideProxy, url: str, have: bytes = b"") -> bytes:
    """Download as Nix does: what is cut off is continued with a Range, a few times."""
    for _ in range(ATTEMPTS):
        wanted = {"Range": f"bytes={len(have)}-"} if have else None
        answer = await proxy.pull(url, wanted)
        assert answer.status == (206 if have else 200)
        have += answer.body
        if answer.complete:
            return have
    pytest.fail("Nix would have given up")


def gets(*caches: BinaryCacheSimulator) -> list[int]:
    """Return how often each was asked for the NAR."""
    return [cache.gets(NAR.nar_path) for cache in caches]


async def test_a_small_one_comes_from_elsewhere_at_once(
    sim: StartSimulator, start: StartProxy
) -> None:
    """What is given to clients whole is fetched elsewhere before anybody has a byte of it."""
    small = StoreEntry.make("small-1.0", CONTENT[: WHOLE - 1_000], compression="none")
    assert 2 * HELD_BACK < len(small.file) <= WHOLE
    ill, well = await sim(small), await sim(small)
    ill.fault(small.nar_path, Corrupt(0))
    proxy = await start(ill, well)
    answer = await proxy.pull(await proxy.nar_url(small.hash_part))
    assert (answer.status, answer.complete, answer.body) == (200, True, bytes(small.file))
    assert answer.headers["X-Upstream"] == "up1"
    assert len(proxy.observed(Rejected)) == 1


@pytest.mark.parametrize("at", [SIZE - HELD_BACK, SIZE - 1])
async def test_who_asks_again_gets_it_from_elsewhere(
    at: int, sim: StartSimulator, start: StartProxy
) -> None:
    """Clients are cut off before the damage, and what they ask for next comes from who has it whole."""
    ill, well = await sim(NAR), await sim(NAR)
    ill.fault(NAR.nar_path, Corrupt(at))
    proxy = await start(ill, well)
    url = await proxy.nar_url(NAR.hash_part)
    first = await proxy.pull(url)
    assert (first.status, first.complete) == (200, False)
    assert FILE.startswith(first.body)
    assert await resume(proxy, url, first.body) == FILE
    assert gets(ill, well) == [1, 1]
    await proxy.idle()
    assert len(proxy.kept) == 2


async def test_damage_that_shows_is_not_given_to_anybody(
    sim: StartSimulator, start: StartProxy
) -> None:
    """What a decompressor notices never gets out, so that clients can go on where they were cut off."""
    ill, well = await sim(PACKED), await sim(PACKED)
    truth = bytes(PACKED.file)
    assert len(truth) > 2 * WHOLE
    ill.fault(PACKED.nar_path, Corrupt(len(truth) // 2))
    proxy = await start(ill, well)
    url = await proxy.nar_url(PACKED.hash_part)
    first = await proxy.pull(url)
    assert not first.complete
    assert truth.startswith(first.body)
    assert await resume(proxy, url, first.body) == truth


async def test_readers_of_all_kinds(sim: StartSimulator, start: StartProxy) -> None:
    """Whoever came, before or after, for all or a part: nobody has a wrong part that looks complete."""
    ill, well = await sim(NAR), await sim(NAR)
    gate = Gate(MIDDLE)
    ill.fault(NAR.nar_path, Corrupt(100), gate)
    proxy = await start(ill, well)
    url = await proxy.nar_url(NAR.hash_part)
    wishes = {None: slice(None), f"bytes={MIDDLE + 9}-": slice(MIDDLE + 9, None)}
    wishes |= {"bytes=-50": slice(-50, None), "bytes=0-199": slice(200)}
    wishes |= {"bytes=100-100": slice(100, 101), "bytes=90-99999": slice(90, 100_000)}

    def ask() -> list[tuple[slice, asyncio.Task[Received]]]:
        return [
            (part, asyncio.create_task(proxy.pull(url, {"Range": wish} if wish else None)))
            for wish, part in wishes.items()
        ]

    before = ask()
    await gate.reached.wait()
    during = ask()
    gate.open()
    for part, task in before + during:
        answer = await task
        assert not answer.complete or answer.body == FILE[part]
    for part, task in ask():
        answer = await task
        assert (answer.complete, answer.body) == (True, FILE[part])
    assert gets(ill, well) == [1, 1]


async def test_better_than_nobody(sim: StartSimulator, start: StartProxy) -> None:
    """Where nobody else has it, who sent damage is asked again, and may have been mended."""
    ill, poor = await sim(NAR), await sim()
    rule = ill.fault(NAR.nar_path, Corrupt(-1))
    proxy = await start(ill, poor)
    url = await proxy.nar_url(NAR.hash_part)
    first = await proxy.pull(url)
    assert not first.complete
    rule.lift()
    assert await resume(proxy, url, first.body) == FILE


async def test_it_is_not_held_against_them_for_ever(sim: StartSimulator, start: StartProxy) -> None:
    """After a while the preferred upstream is the preferred one again, also for this NAR."""
    ill, well = await sim(NAR), await sim(NAR)
    ill.fault(NAR.nar_path, Corrupt(-1), times=1)
    proxy = await start(ill, well)
    url = await proxy.nar_url(NAR.hash_part)
    await proxy.pull(url)
    well.fault(NAR.nar_path, Corrupt(-1), times=1)
    await proxy.pull(url)
    assert gets(ill, well) == [1, 1]
    proxy.clock.now += BLAME_LASTS + 1
    assert await resume(proxy, url) == FILE
    assert gets(ill, well) == [2, 1]


async def test_one_of_two_was_it(sim: StartSimulator, start: StartProxy) -> None:
    """Where two have brought a part each, the one that could end it is tried alone."""
    ill, well = await sim(NAR), await sim(NAR)
    ill.fault(NAR.nar_path, Corrupt(9), Cut(SIZE - 5), times=1)
    ill.fault(NAR.nar_path, Status(500))
    proxy = await start(ill, well)
    url = await proxy.nar_url(NAR.hash_part)
    assert not (await proxy.pull(url)).complete
    ill.heal()
    ill.fault(NAR.nar_path, Corrupt(9), Cut(SIZE - 5))
    asked = gets(ill)
    assert await resume(proxy, url) == FILE
    assert gets(ill) == asked


async def test_after_a_restart(
    sim: StartSimulator, start: StartProxy, tmp_path: Path, key: SigningKey
) -> None:
    """What was left of a damaged download costs a client some attempts, and no wrong byte."""
    ill, well = await sim(NAR), await sim(NAR)
    stall = Stall(SIZE - 5)
    rule = ill.fault(NAR.nar_path, Corrupt(SIZE - 9), stall)
    async with InsideProxy(tmp_path / "store", ill.url, keys=[key.public]) as stopped:
        url = await stopped.nar_url(NAR.hash_part)
        reading = asyncio.create_task(stopped.pull(url))
        await stall.reached.wait()
        await stopped.eventually(
            lambda: any(each.stat().st_size == SIZE - 5 for each in stopped.partials)
        )
        reading.cancel()
    await asyncio.gather(reading, return_exceptions=True)
    rule.lift()
    ill.fault(NAR.nar_path, Corrupt(SIZE - 9))
    assert await resume(await start(ill, well), url) == FILE


@pytest.mark.parametrize("headers", [{}, {"Range": "bytes=0-99"}], ids=["all", "a part"])
def test_with_workers(
    headers: dict[str, str], threaded_sim: RunSimulator, daemon: RunDaemon
) -> None:
    """Clients of a worker are cut off, too, and get it from elsewhere when they ask again."""
    ill, well = threaded_sim(NAR), threaded_sim(NAR)
    ill.fault(NAR.nar_path, Corrupt(-1))
    proxy = daemon(ill.url, well.url, workers=2)
    url = f"/nar/{NAR.hash_part}-{NAR.nar_hash}.nar"
    with closing(HTTPConnection(urlsplit(proxy.url).netloc, timeout=60)) as client:
        client.request("GET", url, headers=headers)
        with pytest.raises(IncompleteRead):
            client.getresponse().read()
    assert proxy.get(url) == FILE
    assert gets(ill, well) == [1, 1]


@pytest.mark.parametrize(
    ("entry", "where"),
    [pytest.param(PACKED, 0.5, id="middle of xz"), pytest.param(NAR, 1.0, id="last byte")],
)
def test_nix_notices_a_pause(
    entry: StoreEntry, where: float, daemon: RunDaemon, threaded_sim: RunSimulator, nix: NixClient
) -> None:
    """With the proxy as the only substituter, Nix asks again and installs what was signed."""
    ill, well = threaded_sim(entry), threaded_sim(entry)
    ill.fault(entry.nar_path, Corrupt(int(where * (len(entry.file) - 1))))
    proxy = daemon(ill.url, well.url)
    done = nix.realise(entry.store_path, substituters=[proxy.url])
    assert done.returncode == 0, done.stderr
    assert nix.dump(entry.store_path) == bytes(entry.nar)
    assert (ill.gets(entry.nar_path), well.gets(entry.nar_path)) == (1, 1)


def test_blame() -> None:
    """Who was blamed last comes last, until it is forgotten."""
    now = 0.0
    blame = Blame(lambda: now)
    name, other = (
        NarName.parse(f"{entry.hash_part}-{entry.nar_hash}.nar") for entry in (NAR, PACKED)
    )
    for upstream in ("a", "b", "a"):
        blame.add(name, upstream)
    assert blame.of(name) == ["b", "a"]
    now = BLAME_LASTS / 2
    blame.add(name, "b")
    assert blame.of(name) == ["a", "b"]
    now = BLAME_LASTS
    assert blame.of(name) == ["b"]
    assert blame.of(other) == []
    blame.clear()
    assert blame.of(name) == []
