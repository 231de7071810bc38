"""``kill -9`` at any moment, and what may be deleted: nothing torn, nothing lost that was published.

``NCP_CRASH_ROUNDS`` is how many pulls are killed; a round takes about two seconds.
"""

from __future__ import annotations

import os
import random
import shutil
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPException
from pathlib import Path

import pytest

from proxy.events import Published, StoreChanged, StoreFailed
from proxy.store.leftovers import DATA, NOTE
from tests.closures import SigningKey, StoreEntry, closure
from tests.conftest import RunSimulator, StartSimulator
from tests.daemon import DaemonProcess
from tests.faults import Gate
from tests.folder_oracle import complete_paths
from tests.inside import InsideProxy
from tests.nix_client import NixClient
from tests.simulator import BinaryCacheSimulator
from tests.small_disk import fill, small_disk
from tests.store.publishing import nar_name, narinfo_text
from tests.store.test_index import on_disk
from tests.waiting import eventually

ROUNDS = int(os.environ.get("NCP_CRASH_ROUNDS", "15"))
CLIENTS = 8
PATIENCE = 30.0
"""Seconds after which nobody waits any more."""


def _closure(seed: int, *, n: int = 14) -> list[StoreEntry]:
    return closure(n, depth=3, seed=seed, sizes=(1_000, 2_000_000))


@pytest.fixture
def upstream(threaded_sim: RunSimulator) -> BinaryCacheSimulator:
    """Return an upstream that has nothing yet."""
    return threaded_sim()


@pytest.fixture
def daemon(
    tmp_path: Path, upstream: BinaryCacheSimulator, key: SigningKey
) -> Iterator[DaemonProcess]:
    """Return a daemon that is not started, and does not outlive the test."""
    daemon = DaemonProcess(tmp_path / "proxy", upstreams=[upstream.url], keys=[key.public])
    try:
        yield daemon
    finally:
        if daemon._process is not None and daemon.process.poll() is None:
            daemon.kill()


def _get(url: str) -> tuple[bytes, str]:
    """Return the body of a 200 answer and what its X-Cache says."""
    with urllib.request.urlopen(url, timeout=PATIENCE) as answer:  # noqa: S310 - it is ours
        return answer.read(), answer.headers["X-Cache"]


def _nar_url(daemon: DaemonProcess, entry: StoreEntry) -> str:
    narinfo, _ = _get(f"{daemon.url}{entry.narinfo_path}")
    lines = dict(line.split(": ", 1) for line in narinfo.decode().splitlines())
    return lines["URL"]


def _pull(daemon: DaemonProcess, entry: StoreEntry) -> bytes:
    """Do what Nix does for one path; return the NAR as it came."""
    nar, _ = _get(f"{daemon.url}/{_nar_url(daemon, entry)}")
    return nar


def _try_to_pull(daemon: DaemonProcess, entry: StoreEntry) -> bytes | None:
    try:
        return _pull(daemon, entry)
    except (OSError, HTTPException):  # the daemon was killed meanwhile
        return None


def _pull_all(daemon: DaemonProcess, entries: Sequence[StoreEntry]) -> None:
    """Pull everything, several at a time, and compare each byte."""
    with ThreadPoolExecutor(CLIENTS) as clients:
        nars = list(clients.map(lambda entry: _pull(daemon, entry), entries))
    assert [nar == bytes(entry.file) for nar, entry in zip(nars, entries, strict=True)] == [
        True for _ in entries
    ]


def _leftovers(daemon: DaemonProcess) -> list[Path]:
    """Return partial files that nobody can use, unlike unfinished downloads that are to be continued."""
    files = (daemon.store / ".state" / "partial").iterdir()
    return [file for file in files if file.suffix not in (DATA, NOTE)]


def _kill_during_a_pull(
    daemon: DaemonProcess,
    upstream: BinaryCacheSimulator,
    entries: Sequence[StoreEntry],
    source: random.Random,
) -> None:
    """Kill the daemon at some moment while clients pull; what they did get whole is right."""
    order = source.sample(list(entries), len(entries))
    what = source.choice(["/nar/*", "/nar/*", "/nar/*", "*.narinfo"])
    count = upstream.count(what) + source.randint(1, len(entries))
    moment = upstream.expect(what, min(count, len(entries)))
    with ThreadPoolExecutor(CLIENTS) as clients:
        pulls = [(entry, clients.submit(_try_to_pull, daemon, entry)) for entry in order]
        moment.block(PATIENCE)
        time.sleep(source.uniform(0, 0.03))  # moments after the request are moments, too
        daemon.kill()
    for entry, pull in pulls:
        assert pull.result() in (None, bytes(entry.file))


# --- kill -9 ----------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(ROUNDS))
def test_kill_during_a_pull(
    daemon: DaemonProcess, upstream: BinaryCacheSimulator, key: SigningKey, seed: int
) -> None:
    """Everything under a final name is whole and signed; leftovers go; the pull then succeeds.

    What was whole before is not asked for again.
    """
    entries = _closure(seed)
    upstream.publish(*entries)
    daemon.start()
    _kill_during_a_pull(daemon, upstream, entries, random.Random(f"kill/{seed}"))
    survived = complete_paths(daemon.store, [key])
    missing = {entry.hash_part for entry in entries}
    missing -= {nar.name[:32] for nar in (daemon.store / "nar").iterdir()}
    partials = (daemon.store / ".state" / "partial").iterdir()
    begun = {partial.name[:32] for partial in partials if partial.suffix == DATA}

    upstream.reset_counts()
    daemon.start()
    assert _leftovers(daemon) == []
    assert complete_paths(daemon.store, [key]) == survived
    _pull_all(daemon, entries)
    asked = {entry.hash_part for entry in entries if upstream.gets(entry.nar_path)}
    assert missing - begun <= asked <= missing  # of what was begun all may have been there already
    assert not any(upstream.count(f"/{hash_part}.narinfo") for hash_part in survived)

    assert daemon.stop() == 0
    assert complete_paths(daemon.store, [key]) == {entry.hash_part for entry in entries}


def test_kill_leaves_a_download_behind(
    daemon: DaemonProcess, upstream: BinaryCacheSimulator, key: SigningKey
) -> None:
    """Half a NAR that a kill left is gone after the restart, and never had a final name."""
    entry = StoreEntry.make("big-1", random.Random("big").randbytes(1_000_000), compression="none")
    upstream.publish(entry)
    gate = Gate(after=600_000)
    upstream.fault(entry.nar_path, gate, times=1)
    daemon.start()
    with ThreadPoolExecutor(1) as client:
        pull = client.submit(_try_to_pull, daemon, entry)
        gate.reached.block(PATIENCE)
        eventually(lambda: any(path.stat().st_size > 100_000 for path in _leftovers(daemon)))
        daemon.kill()
        assert pull.result() is None
    assert _leftovers(daemon) != []
    assert complete_paths(daemon.store, [key]) == set()
    assert list((daemon.store / "nar").iterdir()) == []

    daemon.start()
    assert _leftovers(daemon) == []
    _pull_all(daemon, [entry])


def test_kill_over_and_over(
    daemon: DaemonProcess, upstream: BinaryCacheSimulator, key: SigningKey
) -> None:
    """One store that dies four times loses nothing of what it had before, and counts it right."""
    source = random.Random("over and over")
    entries: list[StoreEntry] = []
    survived: set[str] = set()
    for seed in range(4):
        more = _closure(1000 + seed, n=6)
        upstream.publish(*more)
        upstream.reset_counts()
        entries += more
        daemon.start()
        _kill_during_a_pull(daemon, upstream, more, source)
        complete = complete_paths(daemon.store, [key])
        assert survived <= complete
        survived = complete

    daemon.start()
    _pull_all(daemon, entries)
    everything = {entry.hash_part for entry in entries}
    eventually(lambda: complete_paths(daemon.store, [key]) == everything)
    eventually(lambda: daemon.metric("store_bytes") == on_disk(daemon.store).bytes)
    assert daemon.metric("store_paths") == len(entries)


def test_nix_reads_the_folder_after_a_kill(
    daemon: DaemonProcess, upstream: BinaryCacheSimulator, nix: NixClient
) -> None:
    """To real Nix the folder is a valid cache right after the kill, and a whole one in the end."""
    entries = _closure(2000)
    upstream.publish(*entries)
    url = f"file://{daemon.store}"
    daemon.start()
    _kill_during_a_pull(daemon, upstream, entries, random.Random("nix"))
    checked = nix.run("nix", "store", "verify", "--store", url, "--all")
    assert checked.returncode == 0, checked.stderr

    daemon.start()
    pulled = nix.copy_from(daemon.url, entries[0].store_path)
    assert pulled.returncode == 0, pulled.stderr
    assert daemon.stop() == 0
    copied = nix.copy_from(url, entries[0].store_path, to=nix.root.parent / "other")
    assert copied.returncode == 0, copied.stderr
    assert nix.installed() == {entry.base_name for entry in entries}
    assert nix.verify().returncode == 0


# --- between the two renames ------------------------------------------------------------------


@pytest.fixture
def half_published(
    daemon: DaemonProcess, upstream: BinaryCacheSimulator
) -> tuple[StoreEntry, Path]:
    """Return a path whose NAR has its name, and the narinfo that it lacks: killed between the two."""
    entry = StoreEntry.make("half-1", random.Random("half").randbytes(300_000))
    upstream.publish(entry)
    with daemon:
        _pull_all(daemon, [entry])
        daemon.stop()
    narinfo = daemon.store / f"{entry.hash_part}.narinfo"
    narinfo.unlink()
    _forget_clean_stop(daemon)
    upstream.reset_counts()
    return entry, narinfo


def _forget_clean_stop(daemon: DaemonProcess) -> None:
    """Take the index away; after a kill it would not be believed either."""
    for index in (daemon.store / ".state").glob("index*"):
        index.unlink()


def _remember(daemon: DaemonProcess, upstream: BinaryCacheSimulator, entry: StoreEntry) -> None:
    """Put back what publishing removes at its very end: the upstream's own narinfo."""
    body, _ = upstream.files[entry.narinfo_path]
    remembered = daemon.store / ".state" / "narinfo" / "up0" / f"{entry.hash_part}.narinfo"
    remembered.parent.mkdir(parents=True, exist_ok=True)
    remembered.write_bytes(bytes(body))


def test_nar_without_narinfo_is_served(
    daemon: DaemonProcess,
    upstream: BinaryCacheSimulator,
    key: SigningKey,
    half_published: tuple[StoreEntry, Path],
) -> None:
    """With the NAR here, no upstream is asked for it, and its narinfo gets its name after all."""
    entry, narinfo = half_published
    with daemon:
        _pull_all(daemon, [entry])
        eventually(narinfo.exists)

        assert upstream.gets(entry.nar_path) == 0
        assert complete_paths(daemon.store, [key]) == {entry.hash_part}
        eventually(lambda: daemon.metric("store_bytes") == on_disk(daemon.store).bytes)


def test_nar_without_narinfo_needs_no_upstream(
    daemon: DaemonProcess,
    upstream: BinaryCacheSimulator,
    key: SigningKey,
    half_published: tuple[StoreEntry, Path],
) -> None:
    """With the upstream gone the narinfo that was remembered does, and is published as ours."""
    entry, narinfo = half_published
    _remember(daemon, upstream, entry)
    upstream.down()
    with daemon:
        _pull_all(daemon, [entry])
        eventually(narinfo.exists)

        assert complete_paths(daemon.store, [key]) == {entry.hash_part}
        assert _get(f"{daemon.url}{entry.narinfo_path}")[1] == "HIT"


def test_nar_without_narinfo_by_its_old_url(
    daemon: DaemonProcess, upstream: BinaryCacheSimulator, half_published: tuple[StoreEntry, Path]
) -> None:
    """A client that has its URL from before gets the NAR, with the upstream gone and nothing known."""
    entry, _ = half_published
    upstream.down()
    with daemon:
        body, result = _get(f"{daemon.url}/nar/{nar_name(entry)}")

    assert (body == bytes(entry.file), result) == (True, "HIT")


def test_narinfo_without_nar(
    daemon: DaemonProcess, upstream: BinaryCacheSimulator, key: SigningKey
) -> None:
    """A narinfo whose NAR somebody deleted does not mislead: the NAR is fetched once more."""
    entry = StoreEntry.make("gone-1", random.Random("gone").randbytes(100_000))
    upstream.publish(entry)
    with daemon:
        _pull_all(daemon, [entry])
        daemon.stop()
    (daemon.store / "nar" / str(nar_name(entry))).unlink()
    with daemon:
        _pull_all(daemon, [entry])
        assert daemon.stop() == 0

    assert upstream.gets(entry.nar_path) == 2
    assert complete_paths(daemon.store, [key]) == {entry.hash_part}


# --- what may be deleted ----------------------------------------------------------------------


def test_state_can_be_deleted(
    daemon: DaemonProcess, upstream: BinaryCacheSimulator, key: SigningKey
) -> None:
    """Without ``.state`` nothing that was published is lost, not even with the upstream gone."""
    entries = _closure(3000, n=6)
    upstream.publish(*entries)
    with daemon:
        _pull_all(daemon, entries)
        daemon.stop()
    shutil.rmtree(daemon.store / ".state")
    upstream.down()
    with daemon:
        _pull_all(daemon, entries)
        assert {_get(f"{daemon.url}{entry.narinfo_path}")[1] for entry in entries} == {"HIT"}
        eventually(lambda: daemon.metric("store_bytes") == on_disk(daemon.store).bytes)
        assert daemon.metric("store_paths") == len(entries)

    assert complete_paths(daemon.store, [key]) == {entry.hash_part for entry in entries}


def test_store_can_be_deleted(daemon: DaemonProcess, upstream: BinaryCacheSimulator) -> None:
    """With the whole store gone, URLs that were handed out before still answer the same bytes."""
    entries = _closure(4000, n=6)
    upstream.publish(*entries)
    with daemon:
        urls = [_nar_url(daemon, entry) for entry in entries]
        _pull_all(daemon, entries)
        daemon.stop()
    shutil.rmtree(daemon.store)
    with daemon:
        for url, entry in zip(urls, entries, strict=True):
            assert _get(f"{daemon.url}/{url}")[0] == bytes(entry.file)


def test_what_somebody_else_published(
    daemon: DaemonProcess, upstream: BinaryCacheSimulator, key: SigningKey
) -> None:
    """A folder that another daemon has filled is served, and what in it is not signed is not."""
    good, bad = StoreEntry.make("good-1"), StoreEntry.make("bad-1")
    nars = daemon.store / "nar"
    nars.mkdir(parents=True)
    texts = {
        good: narinfo_text(good),
        bad: narinfo_text(bad).replace(b"NarSize: ", b"NarSize: 1"),
    }
    for entry, text in texts.items():
        (nars / str(nar_name(entry))).write_bytes(bytes(entry.file))
        (daemon.store / f"{entry.hash_part}.narinfo").write_bytes(text)
    with daemon:
        _pull_all(daemon, [good])
        with pytest.raises(urllib.error.HTTPError, match="404"):
            _get(f"{daemon.url}{bad.narinfo_path}")

        assert daemon.metric("verification_failures_total") >= 1


# --- a disk that is full ----------------------------------------------------------------------


async def test_full_disk(tmp_path: Path, sim: StartSimulator, key: SigningKey) -> None:
    """With the disk full what is here is served, what is not is passed on, and room ends it all."""
    here = StoreEntry.make("here-1", random.Random("here").randbytes(50_000))
    missing = StoreEntry.make("missing-1", random.Random("missing").randbytes(50_000))
    upstream = await sim(here, missing)
    with small_disk(tmp_path / "disk", size=2**20) as disk:
        async with InsideProxy(disk / "store", upstream.url, keys=[key.public]) as proxy:
            nar_of_here = await proxy.nar_url(here.hash_part)
            assert (await proxy.get(nar_of_here))[2] == bytes(here.file)
            await proxy.until(lambda: proxy.observed(Published) != [])

            filler = fill(disk)
            assert (await proxy.get(nar_of_here))[::2] == (200, bytes(here.file))
            nar_of_missing = await proxy.nar_url(missing.hash_part)
            assert (await proxy.get(nar_of_missing))[::2] == (200, bytes(missing.file))
            await proxy.until(lambda: proxy.observed(StoreChanged))
            assert any("No space left" in event.reason for event in proxy.observed(StoreFailed))
            assert complete_paths(disk / "store", [key]) == {here.hash_part}

            filler.unlink()
            await proxy.until(lambda: not proxy.store.not_keeping)
            assert (await proxy.get(nar_of_missing))[::2] == (200, bytes(missing.file))
        assert complete_paths(disk / "store", [key]) == {here.hash_part, missing.hash_part}
