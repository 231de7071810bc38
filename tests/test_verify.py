"""``verify``, as a user types it: of a store that a daemon serves from, and of one that none has."""

from __future__ import annotations

import contextlib
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.closures import StoreEntry
from tests.conftest import RunDaemon, RunSimulator
from tests.daemon import DaemonProcess
from tests.simulator import BinaryCacheSimulator
from tests.store.publishing import nar_name
from tests.test_cli import assert_failed, run
from tests.waiting import eventually

SMALL = StoreEntry.make("small-1", random.Random("small").randbytes(30_000))
LARGE = StoreEntry.make("large-1", random.Random("large").randbytes(6_000_000), compression="none")
ENTRIES = sorted((SMALL, LARGE), key=lambda entry: entry.hash_part)
SUMMARY = "2 checked: {} sound, {} damaged, 0 not signed by a trusted key\n"


def verify(proxy: DaemonProcess, *options: str) -> subprocess.CompletedProcess[str]:
    """Verify a daemon's store, be it running or not."""
    return run("verify", "--config", proxy.config_file, *options, cwd=proxy.folder)


@contextlib.contextmanager
def verifying(proxy: DaemonProcess) -> Iterator[subprocess.Popen[str]]:
    """Begin to verify, and wait until some of it is done."""
    with subprocess.Popen(
        [sys.executable, "-m", "proxy", "verify", "--config", str(proxy.config_file)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[1],
    ) as process:
        try:
            assert process.stderr is not None
            assert process.stderr.readline() == "checked 1 of 2\n"
            yield process
        finally:
            process.kill()


def pull(proxy: DaemonProcess, entry: StoreEntry) -> None:
    """Pull a path as Nix does, and see that it is right."""
    narinfo = proxy.get(entry.narinfo_path).decode()
    assert f"URL: nar/{nar_name(entry)}\n" in narinfo
    assert proxy.get(f"/nar/{nar_name(entry)}") == bytes(entry.file)


def filled(
    daemon: RunDaemon, upstream: BinaryCacheSimulator, workers: int = 1
) -> tuple[DaemonProcess, dict[StoreEntry, Path]]:
    """Run a daemon that keeps both paths, in memory too; return where their NARs are."""
    proxy = daemon(upstream.url, workers=workers)
    for entry in ENTRIES:
        pull(proxy, entry)
    proxy.wait_for_log("stored", len(ENTRIES))
    for entry in ENTRIES * 3 * workers:
        pull(proxy, entry)
    upstream.reset_counts()
    return proxy, {entry: proxy.store / "nar" / str(nar_name(entry)) for entry in ENTRIES}


def flip(path: Path) -> bytes:
    """Change a bit that no length tells of; return what is there now."""
    with path.open("r+b") as file:
        content = bytearray(file.read())
        content[len(content) // 2] ^= 1
        file.seek(0)
        file.write(content)
    return bytes(content)


def endless(proxy: DaemonProcess) -> Path:
    """Put a NAR between the two paths that takes for ever to be hashed, and no room on the disk."""
    first = ENTRIES[0].hash_part
    path = proxy.store / "nar" / f"{first[:-1]}z-{'0' * 52}.nar"
    assert first < path.name < ENTRIES[1].hash_part
    with path.open("wb") as file:
        file.truncate(2**42)
    return path


@pytest.mark.parametrize("workers", [1, 2])
def test_damage_is_mended_while_clients_pull(
    workers: int, daemon: RunDaemon, threaded_sim: RunSimulator
) -> None:
    """A running daemon finds what is damaged, forgets it in all processes, and the next pull mends it."""
    upstream = threaded_sim(*ENTRIES)
    proxy, nars = filled(daemon, upstream, workers)
    flip(nars[LARGE])
    narinfo = proxy.store / SMALL.narinfo_path[1:]
    narinfo.write_bytes(narinfo.read_bytes().replace(b"NarSize: ", b"NarSize: 1"))

    with ThreadPoolExecutor(2) as clients:
        work = [clients.submit(pull, proxy, SMALL) for _ in range(200)]
        found = verify(proxy)
        for each in work:
            each.result(30)
    assert found.returncode == 1
    assert SUMMARY.format(1, 2).replace("2 checked", "3 checked") in found.stdout
    assert f"damaged: {nars[LARGE].name}: NarHash: " in found.stdout
    assert f"damaged: {narinfo.name}: " in found.stdout
    assert (proxy.store / ".state" / "quarantine" / nars[LARGE].name).is_file()

    for _ in range(4 * workers):
        for entry in ENTRIES:
            pull(proxy, entry)
    assert (upstream.gets(LARGE.nar_path), upstream.gets(SMALL.nar_path)) == (1, 0)
    eventually(nars[LARGE].exists)
    assert nars[LARGE].read_bytes() == bytes(LARGE.file)
    assert verify(proxy).stdout == SUMMARY.format(2, 0)


def test_a_small_nar_in_memory_is_forgotten(daemon: RunDaemon, threaded_sim: RunSimulator) -> None:
    """A NAR that is answered from memory is fetched again when its file turns out to be damaged."""
    upstream = threaded_sim(*ENTRIES)
    proxy, nars = filled(daemon, upstream, workers=2)
    flip(nars[SMALL])
    assert verify(proxy).returncode == 1
    for _ in range(8):
        pull(proxy, SMALL)
    assert upstream.gets(SMALL.nar_path) == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_who_interrupts_it_goes_on_later(
    number: signal.Signals, daemon: RunDaemon, threaded_sim: RunSimulator
) -> None:
    """Ctrl-C ends it at once, also in the middle of a large NAR; the next one goes on there."""
    proxy, _ = filled(daemon, threaded_sim(*ENTRIES))
    blocker = endless(proxy)
    with verifying(proxy) as process:
        process.send_signal(number)
        _, said = process.communicate(timeout=20)
        assert (process.returncode, said) == (1, "interrupted; the next verify goes on there\n")
    blocker.unlink()

    while "being verified already" in (done := verify(proxy)).stderr:
        pass  # the daemon has not seen yet that the other one is gone
    assert (done.returncode, done.stderr.splitlines()[-1:]) == (0, ["checked 1 of 1"])
    assert done.stdout.startswith(f"1 checked, all behind {ENTRIES[0].hash_part}: 1 sound, ")
    assert verify(proxy).stdout == SUMMARY.format(2, 0)


def test_one_at_a_time_while_it_serves(daemon: RunDaemon, threaded_sim: RunSimulator) -> None:
    """While one goes on, a second is refused in one line, clients are served, and the daemon stops."""
    upstream = threaded_sim(*ENTRIES)
    proxy, _ = filled(daemon, upstream)
    endless(proxy)
    with verifying(proxy) as process:
        assert_failed(verify(proxy), 1, "the store is being verified already")
        for entry in ENTRIES:
            pull(proxy, entry)
        assert proxy.stop() == 0
        _, said = process.communicate(timeout=20)
        assert process.returncode == 1
        assert said == "nix-cache-proxy: the daemon went away before it was done\n"
    verified = proxy.store / ".state" / "verified"
    assert verified.read_text().strip() == ENTRIES[0].hash_part


def test_without_a_daemon(daemon: RunDaemon, threaded_sim: RunSimulator) -> None:
    """Where no daemon has the store the command does it by itself, and a later pull mends the damage."""
    upstream = threaded_sim(*ENTRIES)
    proxy, nars = filled(daemon, upstream)
    proxy.stop()
    sound = verify(proxy)
    assert (sound.returncode, sound.stdout) == (0, SUMMARY.format(2, 0))
    content = flip(nars[LARGE])
    found = verify(proxy)
    assert found.returncode == 1
    damage, summary = found.stdout.splitlines(keepends=True)
    assert damage.startswith(f"damaged: {nars[LARGE].name}: NarHash: ")
    assert summary == SUMMARY.format(1, 1)
    assert (proxy.store / ".state" / "quarantine" / nars[LARGE].name).read_bytes() == content

    proxy.start()
    for entry in ENTRIES:
        pull(proxy, entry)
    assert (upstream.gets(LARGE.nar_path), upstream.gets(SMALL.nar_path)) == (1, 0)


def test_a_daemon_that_commands_do_not_reach(daemon: RunDaemon, threaded_sim: RunSimulator) -> None:
    """A daemon without a socket still has its store: the command says who, and touches nothing."""
    proxy, _ = filled(daemon, threaded_sim(*ENTRIES))
    in_its_place = proxy.store / ".state" / "taken"
    in_its_place.touch()
    in_its_place.rename(proxy.store / ".state" / "control.sock")  # or the daemon makes another
    assert_failed(verify(proxy), 1, f"(process {proxy.process.pid})")


def test_without_a_store(tmp_path: Path) -> None:
    """Where there is no store it says so, in one line, and makes none."""
    done = run("verify", "--store", tmp_path / "absent", cwd=tmp_path)
    assert_failed(done, 1, f"no daemon runs on {tmp_path}/absent, and there is no store")
    assert not (tmp_path / "absent").exists()
