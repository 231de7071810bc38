"""Cost: CPU and memory of the proxy by itself, and how long it makes clients wait."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import http.client
import resource
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import zstandard

from bench import content, load, machine, paced, processes, program, report, servers
from bench.program import Part
from bench.report import Spread
from bench.servers import HOST, Served
from bench.stored import LargeStore
from tests.closures import StoreEntry

MB = 1_000_000
GB = 1_000_000_000

NARS = 8
"""On the miss path, of 64 MiB each before compression, `FETCHED_AT_ONCE` at the same time."""

FETCHED_AT_ONCE = 4

UNPACKED_AT_ONCE = 64 * 1024

RANDOM_NARINFOS = 100_000
MODEST = 8
"""Connections of a load that leaves the proxy time: over more, they wait for each other."""

IDLE_CONNECTIONS = 1_000
READERS = 20
FIRST_BYTES = 12
"""NARs whose first byte is timed, in each round."""


@dataclass(slots=True)
class Row:
    """Something that is measured, and what it gave in each round.

    Attributes:
        name: What it is.
        unit: Of the values.
        bar: What it is not to exceed; None where nothing was asked for.
        values: One for each round, or more.
    """

    name: str
    unit: str
    bar: float | None = None
    values: list[float] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """Return it for a file."""
        spread = Spread.of(self.values).as_json()
        return {
            "name": self.name,
            "unit": self.unit,
            "bar": self.bar,
            "values": self.values,
        } | spread

    def line(self) -> tuple[str, str, str]:
        """Return its line of the table."""
        form = ",.1f" if Spread.of(self.values).median >= 10 else ".2f"  # noqa: PLR2004
        bar = "–" if self.bar is None else f"≤ {self.bar:g} {self.unit}"
        return self.name, bar, f"{Spread.of(self.values).text(form)} {self.unit}"


class Bench:
    """Measures our proxy by itself.

    Args:
        folder: For files that are removed at the end.
        kept: For files that the next run may use.
        options: See `add_options`.
    """

    def __init__(self, folder: Path, kept: Path, options: argparse.Namespace) -> None:
        self._folder = folder
        self._kept = kept
        self._options = options
        self._cores = machine.Cores.of_this_machine()
        self._rows: dict[str, Row] = {}

    @property
    def rows(self) -> list[Row]:
        """What was measured."""
        return list(self._rows.values())

    def measure(self) -> None:
        """Measure everything.

        Raises:
            LoadError: The proxy did not answer as it should.
            ServerError: It did not start.
        """
        steps: Mapping[str, Callable[[], None]] = {
            "miss": self._miss_path,
            "first byte": self._first_byte,
            "first start": self._first_start,
            "store": self._large_store,
            "idle": self._idle_connections,
            "large NAR": self._large_nar,
        }
        for name, step in steps.items():
            if self._options.step in name:
                print(f"{name} …", flush=True)
                step()

    def _note(self, name: str, unit: str, value: float, *, bar: float | None = None) -> None:
        self._rows.setdefault(name, Row(name, unit, bar)).values.append(value)

    @contextmanager
    def _proxy(self, *upstreams: str) -> Iterator[Served]:
        """Run a proxy with an empty store."""
        folder = self._folder / "proxy"
        with servers.our_proxy(folder, upstreams, cores=self._cores.servers) as proxy:
            yield proxy
        shutil.rmtree(folder)

    # --- the miss path

    def _miss_path(self) -> None:
        """CPU time for NARs that come from an upstream, are verified, kept and passed on."""
        with self._published(content.programs(NARS)) as (entries, files):
            for _ in range(self._options.cost_rounds):
                with self._proxy(files.url) as proxy:
                    before = proxy.cpu_seconds
                    narinfos = load.fetch_all(proxy, [entry.narinfo_path for entry in entries])
                    load.fetch_all(proxy, map(load.nar_path, narinfos), at_once=FETCHED_AT_ONCE)
                    used = proxy.cpu_seconds - before
                self._note_per_gb("miss path", used, entries, bar=3)
                self._note_per_gb("that only unpacks and hashes", _unpacking(entries), entries)

    def _note_per_gb(
        self, what: str, seconds: float, entries: Sequence[StoreEntry], *, bar: float | None = None
    ) -> None:
        """Note CPU time over the bytes of the NARs, which are what is verified, and of their files."""
        unpacked = sum(len(entry.nar) for entry in entries)
        received = sum(len(entry.file) for entry in entries)
        self._note(f"{what}: CPU per GB of NAR", "s", seconds / unpacked * GB, bar=bar)
        self._note(f"{what}: CPU per GB of zstd file", "s", seconds / received * GB)

    @contextmanager
    def _published(self, entries: list[StoreEntry]) -> Iterator[tuple[list[StoreEntry], Served]]:
        folder = self._folder / "upstream"
        content.publish(folder, entries)
        with servers.nginx_files(self._folder / "files", folder, cores=self._cores.load) as files:
            yield entries, files
        shutil.rmtree(folder)

    # --- the first byte

    def _first_byte(self) -> None:
        """From the first byte of a NAR leaving the upstream until the client has one."""
        for number in range(self._options.cost_rounds):
            entries = content.single_files(f"first-{number}", FIRST_BYTES, MB)
            files = {entry.nar_path: bytes(entry.file) for entry in entries}
            files |= {entry.narinfo_path: entry.narinfo(content.KEY) for entry in entries}
            with (
                paced.running(paced.PacedUpstream(files)) as upstream,
                self._proxy(upstream.url) as proxy,
            ):
                for entry in entries:
                    delay = _first_byte(proxy, entry) - upstream.first_bytes[entry.nar_path]
                    self._note(
                        "first byte of a cold NAR, after the upstream's", "ms", delay * 1e3, bar=20
                    )

    # --- many paths

    def _first_start(self) -> None:
        """How a store with very many paths and no index starts, and answers while it is counted."""
        store = self._store()
        store.forget_index()
        what = f"first start, {store.count:,} paths"
        with self._started(store, what, bars=(None, None)) as proxy:
            self._random_narinfos(proxy, store, "while they are counted", (8,), bar=None)
            self._wait_counted(proxy)
            counting = time.monotonic() - proxy.began
            self._note(f"{what}: until all are counted", "s", counting)

    def _large_store(self) -> None:
        """How a store with very many paths starts from its index, and answers."""
        store = self._store()
        with servers.our_proxy(store.folder.parent, [], cores=self._cores.servers) as proxy:
            self._wait_counted(proxy)  # so that there is nothing to count in what follows
        what = f"start, {store.count:,} paths"
        for _ in range(self._options.cost_rounds):
            with self._started(store, what, bars=(1, 150)) as proxy:
                self._wait_counted(proxy)
                self._note(f"{what}: until counted", "s", time.monotonic() - proxy.began)
                self._random_narinfos(proxy, store, "", (1, 8, 64), bar=5)

    def _store(self) -> LargeStore:
        count: int = self._options.stored
        return LargeStore(self._kept / f"store-{count}" / "store", count)

    @contextmanager
    def _started(
        self, store: LargeStore, what: str, *, bars: tuple[float | None, float | None]
    ) -> Iterator[Served]:
        """Start a proxy, and yield it when it serves the store; ``bars`` are for time and memory."""
        (path,) = store.narinfo_paths(1)
        with servers.our_proxy(store.folder.parent, [], cores=self._cores.servers) as proxy:
            proxy.get("/readyz")
            proxy.get(path)
            self._note(f"{what}: until it serves", "s", time.monotonic() - proxy.began, bar=bars[0])
            yield proxy
            memory = processes.peak_rss(proxy.process.pid)
            self._note(f"{what}: peak RSS", "MB", memory / MB, bar=bars[1])

    def _wait_counted(self, proxy: Served) -> None:
        while not proxy.metric("store_scanned"):
            time.sleep(0.1)

    def _random_narinfos(
        self,
        proxy: Served,
        store: LargeStore,
        when: str,
        loads: Iterable[int],
        *,
        bar: float | None,
    ) -> None:
        """Ask for others in each round: the disk does not have them in memory, as after any start."""
        file = self._folder / "random.paths"
        file.write_text("".join(f"{path}\n" for path in store.narinfo_paths(RANDOM_NARINFOS)))
        for connections in loads:
            sample = load.wrk(
                proxy, file, connections=connections, seconds=3, cores=self._cores.load
            )
            name = f"narinfo at random of {store.count:,}{when and ' '}{when}, over {connections}"
            self._note(f"{name}: p50", "ms", sample.p50_us / 1e3)
            modest = connections <= MODEST
            self._note(f"{name}: p99", "ms", sample.p99_us / 1e3, bar=bar if modest else None)
            self._note(f"{name}: CPU per request", "µs", sample.cpu_us)

    # --- memory

    def _idle_connections(self) -> None:
        """Memory for connections that have asked once and stay open."""
        with self._published(content.single_files("idle", 1, 1_000)) as (entries, files):
            for _ in range(self._options.cost_rounds):
                with self._proxy(files.url) as proxy, ExitStack() as stack:
                    load.fetch_all(proxy, [entries[0].narinfo_path])
                    before = processes.rss(proxy.process.pid)
                    for _ in range(IDLE_CONNECTIONS):
                        _ask(stack.enter_context(_connection(proxy)), entries[0].narinfo_path)
                    more = processes.rss(proxy.process.pid) - before
                self._note("1,000 idle keep-alive connections: RSS", "MB", more / MB, bar=40)

    def _large_nar(self) -> None:
        """Memory while many read one large NAR as it arrives, as it is and compressed."""
        size = int(self._options.nar_gigabytes * GB)
        self._read_by_many(StoreEntry.huge("large", size), f"{size / GB:g} GB NAR")
        self._read_by_many(content.framed("framed", size), f"{size / GB:g} GB zstd NAR")

    def _read_by_many(self, entry: StoreEntry, name: str) -> None:
        with (
            self._published([entry]) as (entries, files),
            self._proxy(files.url) as proxy,
        ):
            (narinfo,) = load.fetch_all(proxy, [entries[0].narinfo_path])
            paths = self._folder / "large.paths"
            paths.write_text(load.nar_path(narinfo) + "\n")
            sample = load.drain(
                proxy, paths, connections=READERS, seconds=0, cores=self._cores.load
            )
            memory = processes.peak_rss(proxy.process.pid)
            what = f"{name}, cold, {READERS} readers"
            self._note(f"{what}: peak RSS", "MB", memory / MB, bar=120)
            self._note(f"{what}: CPU per GB sent", "s", sample.cpu_per_gb)


def _unpacking(entries: Iterable[StoreEntry]) -> float:
    """Return the CPU time of what cannot be left out: FileHash, zstd, NarHash."""
    files = [bytes(entry.file) for entry in entries]
    began = time.process_time()
    for file in files:
        hashlib.sha256(file).digest()
        unpacked = hashlib.sha256()
        decompressor = zstandard.ZstdDecompressor().decompressobj(read_across_frames=True)
        for at in range(0, len(file), UNPACKED_AT_ONCE):
            unpacked.update(decompressor.decompress(file[at : at + UNPACKED_AT_ONCE]))
    return time.process_time() - began


def _first_byte(proxy: Served, entry: StoreEntry) -> float:
    """Fetch a NAR; return when the first byte of its body was there."""
    with _connection(proxy) as connection:
        path = load.nar_path(_ask(connection, entry.narinfo_path))
        connection.request("GET", path)
        answer = connection.getresponse()
        answer.read(1)
        seen = time.monotonic()
        answer.read()
    return seen


@contextmanager
def _connection(proxy: Served) -> Iterator[http.client.HTTPConnection]:
    with contextlib.closing(http.client.HTTPConnection(HOST, proxy.port, timeout=60)) as connection:
        connection.connect()
        connection.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        yield connection


def _ask(connection: http.client.HTTPConnection, path: str) -> bytes:
    connection.request("GET", path)
    return connection.getresponse().read()


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this program."""
    group = parser.add_argument_group("cost")
    group.add_argument("--cost-rounds", type=int, default=3, help="rounds (%(default)s)")
    group.add_argument(
        "--stored", type=int, default=100_000, help="paths in the large store (%(default)s)"
    )
    group.add_argument(
        "--nar-gigabytes", type=float, default=1, help="of the large NAR (%(default)s)"
    )
    group.add_argument("--step", default="", help="only steps whose name has this in it")


def measure(options: argparse.Namespace) -> None:
    """Measure, print and keep the results."""
    machine.require("nginx", "wrk", "taskset")
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    with tempfile.TemporaryDirectory(prefix="bench-cost-") as folder:
        bench = Bench(Path(folder), options.content, options)
        bench.measure()
    print(report.table(("what", "to reach", "measured"), (row.line() for row in bench.rows)))
    report.keep("cost", {"rows": [row.as_json() for row in bench.rows]})


PART = Part("cost", add_options, measure)

if __name__ == "__main__":
    program.main(__doc__, PART)
