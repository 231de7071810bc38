"""What can happen to a disk happens in the middle of a pull by the real client, and no build breaks.

Each fault is inflicted while the daemon has some paths, is in the middle of one, and lacks the others. The
client ends well and with the right contents, the state can be seen, and once the disk is mended a second
client pulls everything, and everything is kept.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.closures import SigningKey, StoreEntry, closure
from tests.conftest import RunSimulator, require_tool
from tests.daemon import DaemonProcess
from tests.faults import Gate
from tests.folder_oracle import complete_paths
from tests.nix_client import NixClient
from tests.simulator import BinaryCacheSimulator
from tests.small_disk import fill, mount_over, small_disk, unmount
from tests.store.publishing import nar_name
from tests.strace import require_strace
from tests.waiting import eventually

PATIENCE = 60.0
DISK = 64 * 2**20


def _take_all_room(daemon: DaemonProcess) -> None:
    """Have a daemon leave nothing free: on a small disk it would evict everything otherwise."""
    text = daemon.config_file.read_text()
    daemon.config_file.write_text(text.replace("[store]\n", "[store]\nmin_free = 0\n"))


@contextlib.contextmanager
def full(daemon: DaemonProcess) -> Iterator[None]:
    """Leave no byte on the disk (ENOSPC)."""
    filler = fill(daemon.store)
    yield
    filler.unlink()


@contextlib.contextmanager
def read_only(daemon: DaemonProcess) -> Iterator[None]:
    """Let nothing be written under any name in the store (EROFS)."""
    mount_over(daemon.store, "ro")
    yield
    unmount(daemon.store)


@contextlib.contextmanager
def unmounted(daemon: DaemonProcess) -> Iterator[None]:
    """Take the file system away; an empty folder remains where it was mounted. Then bring it back."""
    elsewhere = daemon.folder / "elsewhere"
    elsewhere.mkdir()
    subprocess.run(["mount", "--bind", str(daemon.store), str(elsewhere)], check=True)
    unmount(daemon.store)
    try:
        yield
        assert list(daemon.store.iterdir()) == []
        subprocess.run(["mount", "--bind", str(elsewhere), str(daemon.store)], check=True)
    finally:
        unmount(elsewhere)


@contextlib.contextmanager
def removed(daemon: DaemonProcess) -> Iterator[None]:
    """Remove everything in the store folder, the lock and the index with it."""
    for path in daemon.store.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    yield


def _injected(daemon: DaemonProcess, what: str) -> Iterator[None]:
    """Let system calls of the running daemon fail."""
    pid = daemon.process.pid
    command = ["strace", "-f", "-q", "-o", "/dev/null", "-e", "trace=write,fsync", "-e", what]
    tracer = subprocess.Popen([*command, "-p", str(pid)], stderr=subprocess.DEVNULL)
    status = Path(f"/proc/{pid}/status")
    eventually(lambda: f"TracerPid:\t{tracer.pid}\n" in status.read_text())
    try:
        yield
    finally:
        tracer.terminate()
        tracer.wait(PATIENCE)


@contextlib.contextmanager
def write_errors(daemon: DaemonProcess) -> Iterator[None]:
    """Let every write to a file fail (EIO)."""
    yield from _injected(daemon, "inject=write,fsync:error=EIO")


@contextlib.contextmanager
def flush_errors(daemon: DaemonProcess) -> Iterator[None]:
    """Let every write succeed and every flush fail (EIO), as a disk with a write cache does."""
    yield from _injected(daemon, "inject=fsync:error=EIO")


@contextlib.contextmanager
def quota(daemon: DaemonProcess) -> Iterator[None]:
    """Let every write to a file fail for want of quota (EDQUOT)."""
    yield from _injected(daemon, "inject=write:error=EDQUOT")


@contextlib.contextmanager
def damaged_index(daemon: DaemonProcess) -> Iterator[None]:
    """Overwrite the index."""
    for path in (daemon.store / ".state").glob("index.sqlite*"):
        with path.open("r+b") as file:
            file.write(os.urandom(max(100, path.stat().st_size)))
    yield


@contextlib.contextmanager
def deleted_index(daemon: DaemonProcess) -> Iterator[None]:
    """Delete the index."""
    for path in (daemon.store / ".state").glob("index.sqlite*"):
        path.unlink()
    yield


@contextlib.contextmanager
def truncated_nars(daemon: DaemonProcess) -> Iterator[None]:
    """Cut every NAR that is kept to half its length."""
    for path in (daemon.store / "nar").iterdir():
        os.truncate(path, path.stat().st_size // 2)
    yield


@contextlib.contextmanager
def garbled_narinfos(daemon: DaemonProcess) -> Iterator[None]:
    """Change every narinfo that is kept; the daemon remembers the right ones until it starts again."""
    for path in daemon.store.glob("*.narinfo"):
        path.write_bytes(path.read_bytes().replace(b"NarSize: ", b"NarSize: 1"))
    yield
    daemon.stop()
    daemon.start()


@contextlib.contextmanager
def second_daemon(daemon: DaemonProcess) -> Iterator[None]:
    """Start another daemon on the same store, which has to refuse and say who has it."""
    second = subprocess.run(
        [sys.executable, "-m", "proxy", "serve", "--config", str(daemon.config_file)],
        check=False,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        cwd=Path(__file__).parents[1],
    )
    assert (second.returncode, second.stdout) == (1, "")
    assert f"(process {daemon.process.pid})" in second.stderr
    yield


KEEPS_NOTHING = (full, read_only, unmounted, write_errors, flush_errors, quota)
KEEPS_ON = (
    *(removed, damaged_index, deleted_index),
    *(truncated_nars, garbled_narinfos, second_daemon),
)


class Scene:
    """A daemon on a disk of its own, a client that is in the middle of a pull, and its end."""

    def __init__(
        self, daemon: DaemonProcess, upstream: BinaryCacheSimulator, key: SigningKey, nix: NixClient
    ) -> None:
        self.daemon = daemon
        self.upstream = upstream
        self.key = key
        self.nix = nix
        # Of the pull's end a client sees the first path; the middle one of these stands still.
        self.entries = closure(12, depth=4, seed=5, sizes=(20_000, 1_500_000))
        self.waiting = max(self.entries[4:8], key=lambda entry: len(entry.file))
        self.gate = Gate(after=len(self.waiting.file) // 2)

    def pull(self, store: str) -> None:
        """Pull everything with the real client, and compare every byte."""
        root = self.nix.root.parent / store
        pulled = self.nix.copy_from(self.daemon.url, self.entries[0].store_path, to=root)
        assert pulled.returncode == 0, pulled.stderr
        checked = self.nix.run(
            *("nix-store", "--verify", "--check-contents", "--store", f"local?root={root}")
        )
        assert checked.returncode == 0, checked.stderr

    def is_kept(self) -> bool:
        """Tell whether everything is in the store, whole and signed."""
        kept = complete_paths(self.daemon.store, [self.key])
        return kept == {entry.hash_part for entry in self.entries}

    def run(
        self, fault: Callable[[DaemonProcess], contextlib.AbstractContextManager[None]]
    ) -> None:
        """Inflict a fault in the middle of a pull, and mend it again."""
        self.upstream.publish(*self.entries)
        first = self.entries[-1]
        self.daemon.start()
        narinfo = self.daemon.get(first.narinfo_path).decode()
        url = dict(line.split(": ", 1) for line in narinfo.splitlines())["URL"]
        assert self.daemon.get(f"/{url}") == bytes(first.file)
        eventually((self.daemon.store / f"{first.hash_part}.narinfo").exists)
        self.upstream.fault(self.waiting.nar_path, self.gate, times=1)
        with ThreadPoolExecutor(1) as client:
            pull = client.submit(self.pull, "first")
            self.gate.reached.block(PATIENCE)
            with fault(self.daemon):
                self.gate.open()
                pull.result(PATIENCE)
                self.during(fault)
        self.mended()

    def during(self, fault: object) -> None:
        """See that the state can be seen, and what is kept can be had."""
        if fault is full:
            fill(self.daemon.store)  # what the transfer had taken, too
        ready = self.daemon.get("/readyz")
        if fault in KEEPS_NOTHING:
            assert ready.startswith(b"ready, but not keeping: "), ready
            assert self.daemon.metric("store_writable") == 0
        else:
            assert ready == b"ready\n"

    def mended(self) -> None:
        """See that keeping has been resumed by itself: a second pull ends with everything kept."""
        eventually(lambda: self.daemon.metric("store_writable") == 1)
        self.pull("second")
        eventually(self.is_kept)
        assert self.daemon.get("/readyz") == b"ready\n"
        assert self.daemon.metric("faults_total") == 0
        for entry in self.entries:
            nar = self.daemon.store / "nar" / str(nar_name(entry))
            assert nar.read_bytes() == bytes(entry.file)
        self.daemon.signal(signal.SIGTERM)
        assert self.daemon.wait() == 0


@pytest.fixture
def scene(
    tmp_path: Path, threaded_sim: RunSimulator, key: SigningKey, nix: NixClient
) -> Iterator[Scene]:
    """Return a scene whose daemon is not started, on a small disk."""
    upstream = threaded_sim()
    daemon = DaemonProcess(tmp_path / "proxy", upstreams=[upstream.url], keys=[key.public])
    _take_all_room(daemon)
    with small_disk(daemon.store, size=DISK):
        try:
            yield Scene(daemon, upstream, key, nix)
        finally:
            if daemon._process is not None and daemon.process.poll() is None:
                daemon.kill()


@pytest.mark.parametrize("fault", [*KEEPS_NOTHING, *KEEPS_ON])
def test_no_build_breaks(
    scene: Scene, fault: Callable[[DaemonProcess], contextlib.AbstractContextManager[None]]
) -> None:
    """Whatever happens to the disk, the pull ends well, and keeping goes on when that is possible."""
    require_tool("nix")
    if fault in (write_errors, flush_errors, quota):
        require_strace()
    scene.run(fault)


def test_a_disk_that_is_full_for_a_large_nar(
    tmp_path: Path, threaded_sim: RunSimulator, key: SigningKey
) -> None:
    """A NAR larger than the disk and than memory's window reaches twenty readers; memory stays small."""
    large = StoreEntry.make("large-1", os.urandom(120 * 2**20), compression="none")
    upstream = threaded_sim(large)
    daemon = DaemonProcess(tmp_path / "proxy", upstreams=[upstream.url], keys=[key.public])
    _take_all_room(daemon)
    with small_disk(daemon.store, size=DISK), daemon:
        narinfo = daemon.get(large.narinfo_path).decode()
        url = dict(line.split(": ", 1) for line in narinfo.splitlines())["URL"]
        before = daemon.rss
        with ThreadPoolExecutor(20) as clients:
            answers = clients.map(lambda _: daemon.get(f"/{url}") == bytes(large.file), range(20))
            assert all(answers)
        assert daemon.rss - before < 60 * 2**20
        eventually(lambda: daemon.metric("store_writable") == 1)
        assert list((daemon.store / ".state" / "partial").iterdir()) == []
