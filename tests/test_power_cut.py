"""The power is cut while clients pull: what the disk holds is a valid cache, at every moment.

``NCP_POWER_CUTS`` is how often; see `tests.power` for what is simulated and what is not.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from proxy.nix.cache_info import CacheInfo
from proxy.store.ground import Ground
from proxy.store.layout import Layout
from tests.closures import SigningKey, StoreEntry, closure
from tests.conftest import RunSimulator
from tests.daemon import DaemonProcess
from tests.folder_oracle import complete_paths
from tests.power import PowerCut, power_cut
from tests.store.test_index import on_disk
from tests.waiting import eventually

CUTS = int(os.environ.get("NCP_POWER_CUTS", "3"))
PATIENCE = 60.0
PULL = 24
"""Paths of one pull, with one cut in the middle of it."""


def _daemon(folder: Path, store: Path, upstream: str, key: SigningKey) -> DaemonProcess:
    daemon = DaemonProcess(folder, upstreams=[upstream], keys=[key.public])
    text = daemon.config_file.read_text().replace(str(daemon.store), str(store))
    daemon.config_file.write_text(text.replace("[store]\n", "[store]\nmin_free = 0\n"))
    daemon.store = store
    return daemon


def _pull(daemon: DaemonProcess, entry: StoreEntry) -> None:
    narinfo = daemon.get(entry.narinfo_path).decode()
    url = dict(line.split(": ", 1) for line in narinfo.splitlines())["URL"]
    assert daemon.get(f"/{url}") == bytes(entry.file)


def _pull_all(daemon: DaemonProcess, entries: Sequence[StoreEntry]) -> None:
    with ThreadPoolExecutor(8) as clients:
        list(clients.map(lambda entry: _pull(daemon, entry), entries))


@dataclass(frozen=True)
class Aftermath:
    """Who looks at what a cut has left: a daemon on a copy of the disk."""

    machine: PowerCut
    folder: Path
    upstream: str
    key: SigningKey

    def kept(self, copy: Path, pulled: Sequence[StoreEntry]) -> set[str]:
        """Return the paths that are there whole, after a daemon has started on them and mended the rest."""
        with self.machine.restored(copy) as disk:
            store = disk / "store"
            kept = complete_paths(store, [self.key])
            daemon = _daemon(self.folder, store, self.upstream, self.key)
            with daemon:
                assert complete_paths(store, [self.key]) == kept
                assert list((store / ".state" / "partial").iterdir()) == []
                _pull_all(daemon, pulled)
                # The index agrees with the disk after one scan, and with what was pulled meanwhile.
                eventually(lambda: daemon.metric("store_bytes") == on_disk(store).bytes)
                assert daemon.stop() == 0
            assert complete_paths(store, [self.key]) == {entry.hash_part for entry in pulled}
        return kept


@pytest.mark.timeout(120 + 30 * CUTS)
def test_power_cuts_under_load(tmp_path: Path, threaded_sim: RunSimulator, key: SigningKey) -> None:
    """No cut leaves a wrong byte under a final name, or loses what an earlier one had kept."""
    source = random.Random("power")
    upstream = threaded_sim()
    survived: set[str] = set()
    pulled: list[StoreEntry] = []
    middle = 0
    with power_cut(tmp_path / "machine") as machine:
        aftermath = Aftermath(machine, tmp_path / "after", upstream.url, key)
        with _daemon(tmp_path / "proxy", machine.disk / "store", upstream.url, key) as daemon:
            for number in range(CUTS):
                more = closure(PULL, depth=3, seed=9_000 + number, sizes=(500, 60_000))
                upstream.publish(*more)
                pulled += more
                moment = upstream.expect("/nar/*", source.randint(1, PULL))
                upstream.reset_counts()
                with ThreadPoolExecutor(1) as pull:
                    pulling = pull.submit(_pull_all, daemon, more)
                    moment.block(PATIENCE)
                    time.sleep(source.uniform(0, 0.1))  # any moment is one
                    copy = machine.cut()
                    pulling.result(PATIENCE)
                kept = aftermath.kept(copy, pulled)
                assert survived <= kept
                middle += survived < kept < {entry.hash_part for entry in pulled}
                survived = kept
            assert daemon.stop() == 0
        final = aftermath.kept(machine.cut(), pulled)
    assert final == {entry.hash_part for entry in pulled}
    assert middle > 0, "no cut was in the middle of a pull"


def test_a_store_that_was_just_made(tmp_path: Path, key: SigningKey) -> None:
    """A folder is a binary cache from the moment when it is somebody's store; no cut takes that from it."""
    with power_cut(tmp_path / "machine") as machine:
        store = machine.disk / "store"
        ground = Ground(Layout(store), CacheInfo())
        copy = machine.cut()
        ground.release()
        with machine.restored(copy) as disk:
            assert complete_paths(disk / "store", [key]) == set()


def test_the_simulation_tells(tmp_path: Path) -> None:
    """A file that is renamed without being flushed is lost in a cut; one that is flushed is not."""
    with power_cut(tmp_path / "machine") as machine:
        for name, flush in (("careless", False), ("careful", True)):
            with (machine.disk / "partial").open("wb") as file:
                file.write(bytes(100_000))
                if flush:
                    file.flush()
                    os.fsync(file.fileno())
            (machine.disk / "partial").rename(machine.disk / name)
        folder = os.open(machine.disk, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)
        with machine.restored(machine.cut()) as disk:
            assert (disk / "careful").stat().st_size == 100_000
            assert (disk / "careless").stat().st_size == 0
