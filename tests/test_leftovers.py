"""Downloads that were not finished: kept, continued, and thrown away when nothing comes of them."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import threading
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest

from proxy import patience
from proxy.store.leftovers import DATA, MAX_AGE, MOST, NOTE, Leftovers, Origin
from tests.closures import SigningKey, StoreEntry
from tests.conftest import RunDaemon, RunSimulator, StartProxy, StartSimulator
from tests.faults import Cut, Fault, Headers, NoRanges, Stall, Status
from tests.inside import InsideProxy
from tests.nix_client import NixClient
from tests.simulator import BinaryCacheSimulator
from tests.waiting import eventually

CONTENT = random.Random(9).randbytes(2_000_000)
NAR = StoreEntry.make("large-1.0", CONTENT, compression="none")
SIZE = len(NAR.file)
MIDDLE = SIZE // 2
ORIGIN = Origin("up0", '"etag"', None, 100)


async def leave(
    cache: BinaryCacheSimulator, folder: Path, key: SigningKey, *faults: Fault, at: int = MIDDLE
) -> str:
    """Let a proxy stop in the middle of a download; return the URL of the NAR."""
    stall = Stall(at)
    rule = cache.fault("/nar/", stall, *faults)
    async with InsideProxy(folder / "store", cache.url, keys=[key.public]) as proxy:
        url = await proxy.nar_url(NAR.hash_part)
        reading = asyncio.create_task(proxy.pull(url))
        await stall.reached.wait()
        await proxy.eventually(lambda: any(each.stat().st_size == at for each in proxy.partials))
        reading.cancel()
    await asyncio.gather(reading, return_exceptions=True)
    rule.lift()
    cache.reset_counts()
    return url


def ranges(cache: BinaryCacheSimulator) -> list[str | None]:
    """Return the Range of each request for the NAR."""
    return [
        request.headers.get("Range")
        for request in cache.requests
        if request.raw_path == NAR.nar_path
    ]


async def test_a_restart(
    sim: StartSimulator, start: StartProxy, tmp_path: Path, key: SigningKey
) -> None:
    """After a restart only the rest is asked for, with If-Range, and all of it is right."""
    cache = await sim(NAR)
    url = await leave(cache, tmp_path, key)
    proxy = await start(cache)
    assert len(proxy.partials) == 2
    answer = await proxy.pull(url)
    assert (answer.complete, answer.body) == (True, bytes(NAR.file))
    assert ranges(cache) == [f"bytes={MIDDLE}-"]
    assert cache.requests[-1].headers["If-Range"] == f'"{NAR.file_hash}"'
    await proxy.idle()
    assert proxy.partials == []
    assert len(proxy.kept) == 2


async def test_all_had_arrived(
    sim: StartSimulator, start: StartProxy, tmp_path: Path, key: SigningKey
) -> None:
    """Where all of it is here, nothing is asked for: it is only verified."""
    cache = await sim(NAR)
    url = await leave(cache, tmp_path, key)
    (part,) = (tmp_path / "store/.state/partial").glob(f"*{DATA}")
    part.write_bytes(bytes(NAR.file))
    proxy = await start(cache)
    assert (await proxy.pull(url)).body == bytes(NAR.file)
    assert ranges(cache) == []


async def test_another_upstream(
    sim: StartSimulator, start: StartProxy, tmp_path: Path, key: SigningKey
) -> None:
    """Another upstream with the same file may bring the rest."""
    cache, other = await sim(NAR), await sim(NAR)
    url = await leave(cache, tmp_path, key)
    proxy = await start(other)
    assert (await proxy.pull(url)).body == bytes(NAR.file)
    assert ranges(other) == [f"bytes={MIDDLE}-"]


async def test_the_file_has_changed(
    sim: StartSimulator, start: StartProxy, tmp_path: Path, key: SigningKey
) -> None:
    """The same NAR in another file is begun anew."""
    cache = await sim(NAR)
    url = await leave(cache, tmp_path, key)
    (note,) = (tmp_path / "store/.state/partial").glob(f"*{NOTE}")
    note.write_bytes(Origin("up0", f'"{NAR.file_hash}"', f"sha256:{'0' * 52}", SIZE).format())
    proxy = await start(cache)
    assert (await proxy.pull(url)).body == bytes(NAR.file)
    assert ranges(cache) == [None]


@pytest.mark.parametrize("fault", [NoRanges(), Headers({"ETag": '"new"'})], ids=repr)
async def test_no_rest_to_be_had(
    fault: Fault, sim: StartSimulator, start: StartProxy, tmp_path: Path, key: SigningKey
) -> None:
    """An upstream that sends the whole file is listened to from the beginning."""
    cache = await sim(NAR)
    url = await leave(cache, tmp_path, key)
    cache.fault(NAR.nar_path, fault)
    proxy = await start(cache)
    answer = await proxy.pull(url)
    assert (answer.complete, answer.body) == (True, bytes(NAR.file))
    await proxy.idle()
    assert proxy.partials == []


@pytest.mark.parametrize("at", [0, MIDDLE - 1])
async def test_a_damaged_leftover(
    at: int, sim: StartSimulator, start: StartProxy, tmp_path: Path, key: SigningKey
) -> None:
    """Damage is found by the hash: nobody gets it whole, it is thrown away, and the next try is right."""
    cache = await sim(NAR)
    url = await leave(cache, tmp_path, key)
    (part,) = (tmp_path / "store/.state/partial").glob(f"*{DATA}")
    with part.open("r+b") as file:
        byte = os.pread(file.fileno(), 1, at)
        os.pwrite(file.fileno(), bytes([byte[0] ^ 1]), at)
    proxy = await start(cache)
    assert not (await proxy.pull(url)).complete
    await proxy.idle()
    assert proxy.partials == []
    answer = await proxy.pull(url)
    assert (answer.complete, answer.body) == (True, bytes(NAR.file))
    assert ranges(cache) == [f"bytes={MIDDLE}-", None]


async def test_too_long_a_leftover(
    sim: StartSimulator, start: StartProxy, tmp_path: Path, key: SigningKey
) -> None:
    """More than the file can have is not the file."""
    cache = await sim(NAR)
    url = await leave(cache, tmp_path, key)
    (part,) = (tmp_path / "store/.state/partial").glob(f"*{DATA}")
    part.write_bytes(bytes(SIZE + 1))
    proxy = await start(cache)
    assert (await proxy.pull(url)).body == bytes(NAR.file)
    assert ranges(cache) == [None]


async def test_without_a_restart(
    sim: StartSimulator, start: StartProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A download that was given up is continued by whoever asks next."""
    monkeypatch.setattr(patience, "ATTEMPTS", 2)
    cache = await sim(NAR)
    proxy = await start(cache)
    url = await proxy.nar_url(NAR.hash_part)
    cache.fault(NAR.nar_path, Cut(MIDDLE), times=1)
    rule = cache.fault(NAR.nar_path, Status(500))
    assert not (await proxy.pull(url)).complete
    await proxy.idle()
    rule.lift()
    cache.reset_counts()
    proxy.clock.now += 3_600
    answer = await proxy.pull(url)
    assert (answer.complete, answer.body) == (True, bytes(NAR.file))
    (wanted,) = ranges(cache)
    assert wanted is not None


async def test_upstream_down(
    sim: StartSimulator, start: StartProxy, tmp_path: Path, key: SigningKey
) -> None:
    """With nobody to bring the rest nothing is sent, and what is here stays for another time."""
    cache = await sim(NAR)
    url = await leave(cache, tmp_path, key)
    cache.down()
    proxy = await start(cache)
    assert (await proxy.pull(url)).status == 404
    await proxy.idle()
    assert len(proxy.partials) == 2
    cache.up()
    proxy.clock.now += 3_600
    assert (await proxy.pull(url)).body == bytes(NAR.file)
    assert ranges(cache) == [f"bytes={MIDDLE}-"]


def test_killed(
    daemon: RunDaemon, threaded_sim: RunSimulator, nix: NixClient, key: SigningKey
) -> None:
    """After ``kill -9`` in the middle of a pull the upstream is asked for the rest, and Nix is happy."""
    cache = threaded_sim(NAR)
    stall = Stall(MIDDLE)
    rule = cache.fault(NAR.nar_path, stall)
    proxy = daemon(cache.url)
    narinfo = proxy.get(NAR.narinfo_path).decode()
    url = next(line[5:] for line in narinfo.splitlines() if line.startswith("URL: "))

    def read() -> None:
        with urllib.request.urlopen(f"{proxy.url}/{url}", timeout=60) as answer:  # noqa: S310
            while answer.read(65536):
                pass

    reading = threading.Thread(target=lambda: _ignoring(read))
    reading.start()
    partials = proxy.store / ".state/partial"
    eventually(lambda: any(part.stat().st_size == MIDDLE for part in partials.glob(f"*{DATA}")))
    proxy.signal(signal.SIGKILL)
    proxy.wait()
    reading.join(30)
    rule.lift()
    cache.reset_counts()
    proxy.start()
    nix.copy_from(proxy.url, NAR.store_path)
    assert ranges(cache) == [f"bytes={MIDDLE}-"]


def _ignoring(step: Callable[[], None]) -> None:
    try:
        step()
    except (OSError, ValueError):
        return


# --- the folder -------------------------------------------------------------------------------


def made(folder: Path, name: str, age: float = 0.0) -> Path:
    """Leave a download behind."""
    leftovers = Leftovers(folder)
    partial = leftovers.start(name, ORIGIN)
    partial.append(b"data")
    partial.close()
    moment = time.time() - age
    os.utime(partial.path, (moment, moment))
    return Path(partial.path)


def test_what_is_left_is_found(tmp_path: Path) -> None:
    """What was left is there again, with what is known of it, for one taker."""
    made(tmp_path, "a")
    leftovers = Leftovers(tmp_path)
    leftovers.tidy()
    found = leftovers.take("a")
    assert found is not None
    partial, origin = found
    assert (partial.size, partial.read(0, 9), origin) == (4, b"data", ORIGIN)
    partial.append(b"more")
    assert partial.read(0, 9) == b"datamore"
    assert leftovers.take("a") is None
    partial.discard()
    assert list(tmp_path.iterdir()) == []


def test_nothing_old_stays(tmp_path: Path) -> None:
    """After a day nobody comes back for it; it goes at the start, and while the daemon runs."""
    made(tmp_path, "old", MAX_AGE + 60)
    made(tmp_path, "young", MAX_AGE - 60)
    leftovers = Leftovers(tmp_path)
    leftovers.tidy()
    assert {path.stem for path in tmp_path.iterdir()} == {"young"}
    leftovers.forget_old(time.time() + 120)
    assert list(tmp_path.iterdir()) == []


def test_what_is_under_way_is_not_old(tmp_path: Path) -> None:
    """A download that takes more than a day is not taken away from whoever writes it."""
    leftovers = Leftovers(tmp_path)
    partial = leftovers.start("a", ORIGIN)
    leftovers.forget_old(time.time() + 2 * MAX_AGE)
    assert Path(partial.path).exists()
    partial.close()


def test_there_are_not_too_many(tmp_path: Path) -> None:
    """Of too many the oldest go."""
    for number in range(MOST + 3):
        made(tmp_path, f"{number:03}", age=1_000.0 - number)
    leftovers = Leftovers(tmp_path)
    leftovers.tidy()
    kept = {path.stem for path in tmp_path.iterdir()}
    assert kept == {f"{number:03}" for number in range(3, MOST + 3)}


@pytest.mark.parametrize(
    "note",
    [b"", b"{}", b"[]", b"\xff", b"null", b'{"upstream": 1}', b"[" * 10_000, None],
    ids=lambda note: repr(note)[:20],
)
def test_a_note_that_is_none(note: bytes | None, tmp_path: Path) -> None:
    """What nobody can read leads to no download, and both files go."""
    part = made(tmp_path, "a")
    if note is None:
        part.with_suffix(NOTE).unlink()
    else:
        part.with_suffix(NOTE).write_bytes(note)
    leftovers = Leftovers(tmp_path)
    leftovers.tidy()
    assert leftovers.take("a") is None
    assert list(tmp_path.iterdir()) == []
