"""The daemon and its porter as processes: whichever of the two ends, and how, clients get the right bytes."""

from __future__ import annotations

import contextlib
import os
import random
import signal
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPException
from pathlib import Path

import pytest

from proxy.porter.porter import WORTH_IT
from tests.closures import SigningKey, StoreEntry, closure
from tests.conftest import RunDaemon, RunSimulator
from tests.daemon import DaemonProcess
from tests.faults import Gate
from tests.folder_oracle import complete_paths
from tests.porters import is_alive
from tests.simulator import BinaryCacheSimulator
from tests.store.publishing import nar_name
from tests.waiting import eventually

PATIENCE = 10.0

ENTRIES = closure(30, seed=8, sizes=(100, 30_000))
SMALL = StoreEntry.make("small-1.0", random.Random(6).randbytes(50_000), compression="none")
LARGE = StoreEntry.make("large-1.0", random.Random(7).randbytes(700_000), compression="none")
FILE = bytes(SMALL.file)
FIRST = [StoreEntry.make(f"first-{number}", b"first") for number in range(WORTH_IT)]


def hash_parts(*entries: StoreEntry) -> set[str]:
    """Return the hash parts of paths."""
    return {entry.hash_part for entry in entries}


def nar_target(entry: StoreEntry) -> str:
    """Return the target under which the proxy has an entry's NAR."""
    return f"/nar/{nar_name(entry)}"


def the_porter(daemon: DaemonProcess, cache: BinaryCacheSimulator) -> int:
    """Have the daemon start its porter, and return the process, which takes orders."""
    for first in FIRST:
        cache.publish(first)
        daemon.get(nar_target(first))
    eventually(lambda: any(map(_takes_orders, daemon.children)))
    return next(filter(_takes_orders, daemon.children))


def _takes_orders(pid: int) -> bool:
    """Tell whether a process is a porter that has begun: it ignores SIGTERM."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        if b"proxy.porter" in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0"):
            status = Path(f"/proc/{pid}/status").read_text()
            ignored = next(line for line in status.splitlines() if line.startswith("SigIgn:"))
            return bool(int(ignored.split()[1], 16) >> (signal.SIGTERM - 1) & 1)
    return False


@pytest.mark.parametrize("state", ["at work", "stopped"])
def test_daemon_killed(
    state: str, threaded_sim: RunSimulator, daemon: RunDaemon, key: SigningKey
) -> None:
    """With the daemon its porter is gone, and one that is started at once finds all in good order."""
    cache = threaded_sim(*ENTRIES)
    proxy = daemon(cache.url)
    pid = the_porter(proxy, cache)
    gate = Gate(10)
    cache.fault("/nar/*.xz", gate)
    cache.fault("/nar/*.zst", gate)
    with ThreadPoolExecutor(8) as clients:
        asked = [clients.submit(proxy.get, nar_target(entry)) for entry in ENTRIES]
        gate.reached.block()
        if state == "stopped":
            os.kill(pid, signal.SIGSTOP)
        proxy.kill()
        eventually(lambda: not is_alive(pid))
        gate.open()
        for each in asked:
            with contextlib.suppress(OSError, HTTPException):
                each.result(PATIENCE)
    cache.heal()
    complete_paths(proxy.store, [key])
    proxy.start()
    with ThreadPoolExecutor(8) as clients:
        bodies = list(clients.map(lambda entry: proxy.get(nar_target(entry)), ENTRIES))
    assert bodies == [bytes(entry.file) for entry in ENTRIES]
    eventually(lambda: complete_paths(proxy.store, [key]) >= hash_parts(*ENTRIES))
    assert proxy.stop() == 0
    assert list((proxy.store / ".state" / "partial").iterdir()) == []


def test_daemon_told_to_stop(
    threaded_sim: RunSimulator, daemon: RunDaemon, key: SigningKey
) -> None:
    """What was verified is published before the daemon ends, and with it its porter."""
    cache = threaded_sim(LARGE)
    proxy = daemon(cache.url)
    pid = the_porter(proxy, cache)
    os.kill(pid, signal.SIGSTOP)
    try:
        assert proxy.get(nar_target(LARGE)) == bytes(LARGE.file)  # streamed, and not published
        proxy.signal(signal.SIGTERM)
        proxy.wait_for_log("stopping")
        assert LARGE.hash_part not in complete_paths(proxy.store, [key])
        assert proxy.process.poll() is None
    finally:
        os.kill(pid, signal.SIGCONT)
    assert proxy.wait() == 0
    assert not is_alive(pid)
    assert LARGE.hash_part in complete_paths(proxy.store, [key])
    assert list((proxy.store / ".state" / "partial").iterdir()) == []
    assert proxy.logged("porter ended") == []


@pytest.mark.parametrize("workers", [1, 2])
def test_porter_killed(
    workers: int, threaded_sim: RunSimulator, daemon: RunDaemon, key: SigningKey
) -> None:
    """The daemon says so in its log, and serves on; metrics can be had as ever."""
    cache = threaded_sim(*ENTRIES)
    proxy = daemon(cache.url, workers=workers)
    pid = the_porter(proxy, cache)
    gate = Gate(10)
    cache.fault(f"*{ENTRIES[0].nar_path}", gate)
    with ThreadPoolExecutor(8) as clients:
        asked = [clients.submit(proxy.get, nar_target(entry)) for entry in ENTRIES]
        gate.reached.block()
        os.kill(pid, signal.SIGKILL)
        gate.open()
        assert [each.result(PATIENCE) for each in asked] == [bytes(e.file) for e in ENTRIES]
    (line,) = proxy.wait_for_log("porter ended")
    assert (line["pid"], line["reason"]) == (pid, "it was ended by SIGKILL")
    assert proxy.metric("fetches_in_flight") >= 0
    assert proxy.get("/healthz")
    assert proxy.stop() == 0
    assert complete_paths(proxy.store, [key]) <= hash_parts(*ENTRIES, *FIRST)


def test_signals_for_the_whole_group(threaded_sim: RunSimulator, daemon: RunDaemon) -> None:
    """What a terminal or a service manager sends to all processes is for the daemon to decide."""
    cache = threaded_sim(SMALL)
    proxy = daemon(cache.url)
    pid = the_porter(proxy, cache)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        os.kill(pid, number)
    assert proxy.get(nar_target(SMALL)) == FILE
    assert pid in proxy.children
    assert proxy.stop() == 0
    assert proxy.logged("porter ended") == []
