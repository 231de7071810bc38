"""Cold: a closure pulled by real Nix from a cache that is far away, with the proxy and without.

Far away is `bench.relay` in front of a static file server. Each run has a client with an empty store, and
a cold one an empty proxy; the hot runs follow on the proxy that a cold one has filled. Nobody is pinned to
cores: Nix works with as many as there are, and so does whatever it waits for.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench import clients, content, machine, program, report, servers
from bench.clients import MakeClient
from bench.program import Part
from bench.report import Spread
from bench.servers import Served
from tests.nix_client import Completed, NixClient

RTT = 0.040
MBIT = 500.0
DEPTH = 12

LONGEST = 900.0
"""Seconds that one run of Nix may take."""

BARS = {
    ("nix copy", "2.8"): 0.06,
    ("nix copy", "2.26"): 0.10,
    ("nix-store -r", "2.26"): 0.55,
}
"""What a cold proxy is to take, over what it takes directly."""

HOT_BAR = 1.05
"""What a hot proxy is to take, over what a plain file server takes."""

HOT_ROUNDS = 5
"""Times that both are measured, in turn, for each cold run: they take seconds, and differ by little. Who goes
first alternates: the first one comes while the kernel still writes what the pull before has left."""

Command = Callable[[NixClient, str, str], Completed]
"""Pulls a path and all it needs from a cache: client, URL, store path."""

COMMANDS: dict[str, Command] = {
    "nix-store -r": lambda client, url, path: client.realise(
        path, substituters=[url], timeout=LONGEST
    ),
    "nix copy": lambda client, url, path: client.copy_from(url, path, timeout=LONGEST),
}


class PullError(Exception):
    """Nix did not get what it was to get; the message has its last words."""


@dataclass(frozen=True, slots=True)
class Closure:
    """A closure on disk.

    Attributes:
        folder: A binary cache, to be served by anything.
        root: The store path that needs all others.
        paths: How many there are.
        size: Bytes of all their files.
    """

    folder: Path
    root: str
    paths: int
    size: int

    @classmethod
    def at(cls, folder: Path, paths: int, megabytes: float) -> Closure:
        """Make it below a folder, or take the one that was made there."""
        place = folder / f"closure-{paths}-{megabytes:g}"
        about = place / "about.json"
        if not about.exists():
            shutil.rmtree(place, ignore_errors=True)
            print(f"making {paths} paths, {megabytes:g} MB …", flush=True)
            entries = content.closure_of_size(paths, megabytes * 1e6, depth=DEPTH)
            content.publish(place, entries)
            size = sum(len(entry.file) for entry in entries)
            about.write_text(json.dumps({"root": entries[0].store_path, "size": size}))
        known = json.loads(about.read_text())
        return cls(place, known["root"], paths, known["size"])


@dataclass(slots=True)
class Times:
    """Seconds that one command of one Nix took, by source, round by round.

    Attributes:
        command: A key of `COMMANDS`.
        nix: The version.
        sources: ``direct``, ``cold``, ``hot`` and ``files``, and the seconds of each round.
        fetched: Bytes that the cold proxy got from its upstream, over those of the closure.
        cpu: CPU time that the cold proxy used, in seconds.
    """

    command: str
    nix: str
    sources: dict[str, list[float]] = field(default_factory=dict)
    fetched: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)

    @property
    def row(self) -> str:
        """What it is called."""
        return f"{self.command}, Nix {self.nix}"

    def add(self, source: str, seconds: float) -> None:
        """Take in one run."""
        print(f"  {self.command} (Nix {self.nix}), {source}: {seconds:.1f} s", flush=True)
        self.sources.setdefault(source, []).append(seconds)

    def ratio(self, source: str, other: str) -> Spread:
        """Return one source over another; rounds that the other one missed take its last."""
        there = self.sources[other]
        return Spread.of(
            seconds / there[min(number, len(there) - 1)]
            for number, seconds in enumerate(self.sources[source])
        )

    def as_json(self) -> dict[str, Any]:
        """Return it for a file."""
        return {
            "command": self.command,
            "nix": self.nix,
            "seconds": self.sources,
            "fetched": self.fetched,
            "cpu": self.cpu,
            "cold_over_direct": self.ratio("cold", "direct").as_json(),
            "cold_bar": BARS.get((self.command, _short(self.nix))),
            "hot_over_files": self.ratio("hot", "files").as_json(),
            "hot_bar": HOT_BAR,
        }


class Bench:
    """Pulls one closure in several ways.

    Args:
        closure: What is pulled.
        folder: For clients and proxies. Nothing in it goes before the end: whenever a file is made, ext4
            looks over the inodes that were freed in the last minute, for up to 6 s of a client's CPU time.
        files: The URL of the closure on a plain file server.
        far: The same through the relay.
        from_disk: Whether NARs are to be out of memory before each pull from a hot proxy or the file server.
    """

    def __init__(
        self, closure: Closure, folder: Path, *, files: str, far: str, from_disk: bool = False
    ) -> None:
        self._closure = closure
        self._folder = folder
        self._files = files
        self._far = far
        self._from_disk = from_disk
        self._runs = itertools.count()

    def direct(self, times: Times, make_client: MakeClient) -> None:
        """Pull it from far away.

        Raises:
            PullError: That failed.
        """
        times.add("direct", self._pull(times.command, make_client, self._far))

    def through_proxy(self, times: Times, make_client: MakeClient) -> None:
        """Pull it through a cold proxy; then in turn through the same one, now hot, and from the file server.

        Raises:
            PullError: One of them failed.
        """
        folder = self._new("proxy")
        with servers.our_proxy(folder, [self._far]) as proxy:
            began = proxy.cpu_seconds
            times.add("cold", self._pull(times.command, make_client, proxy.url))
            times.cpu.append(proxy.cpu_seconds - began)
            self._await_stored(proxy)
            received = proxy.metric("upstream_bytes_total")
            times.fetched.append(received / self._closure.size)
            near = (
                ("hot", proxy.url, folder / "store"),
                ("files", self._files, self._closure.folder),
            )
            for number in range(HOT_ROUNDS):
                for source, url, store in near if number % 2 == 0 else reversed(near):
                    if self._from_disk:
                        _drop_nars(store)
                    times.add(source, self._pull(times.command, make_client, url))

    def _pull(self, command: str, make_client: MakeClient, url: str) -> float:
        """Return the seconds that it took."""
        client = make_client(self._new("client"))
        began = time.monotonic()
        done = COMMANDS[command](client, url, self._closure.root)
        seconds = time.monotonic() - began
        if done.returncode:
            raise PullError(f"{command} from {url}: {done.stderr[-2000:]}")
        installed = len(client.installed())
        if installed != self._closure.paths:
            raise PullError(f"{command} from {url} gave {installed} paths only")
        return seconds

    def _new(self, name: str) -> Path:
        folder = self._folder / f"{name}-{next(self._runs)}"
        folder.mkdir()
        return folder

    def _await_stored(self, proxy: Served) -> None:
        """Wait until the proxy has put everything where it belongs."""
        deadline = time.monotonic() + 60
        while proxy.metric("store_paths") < self._closure.paths:
            if time.monotonic() > deadline:
                raise PullError("the proxy did not keep everything")
            time.sleep(0.2)


def _drop_nars(store: Path) -> None:
    """Have the kernel forget what is in the NARs of a binary cache."""
    for nar in (store / "nar").iterdir():
        with nar.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this program."""
    group = parser.add_argument_group("cold")
    group.add_argument("--paths", type=int, default=2_000, help="in the closure (%(default)s)")
    group.add_argument("--megabytes", type=float, default=210, help="of it (%(default)s)")
    group.add_argument("--pull", default="", help="only rows that contain this")
    group.add_argument(
        "--nix", type=Path, action="append", default=[], help="root of another system with Nix"
    )
    group.add_argument(
        "--from-disk", action="store_true", help="drop NARs from memory before each hot pull"
    )
    group.add_argument("--repeat", type=int, default=3, help="rounds at most (%(default)s)")
    group.add_argument(
        "--minutes", type=float, default=8, help="no round is begun after them (%(default)s)"
    )


def measure(options: argparse.Namespace) -> None:
    """Measure, print and keep the results."""
    machine.require("nginx", "nix", "nix-store", "taskset")
    closure = Closure.at(options.content, options.paths, options.megabytes)
    with tempfile.TemporaryDirectory(prefix="bench-cold-") as folder:
        all_times = _measure(closure, Path(folder), options)
    print(_table(all_times))
    about = {
        "paths": closure.paths,
        "bytes": closure.size,
        "rtt": RTT,
        "mbit": MBIT,
        "from_disk": options.from_disk,
    }
    report.keep("cold", {**about, "rows": [times.as_json() for times in all_times]})


def _measure(closure: Closure, folder: Path, options: argparse.Namespace) -> list[Times]:
    makers = [clients.client_maker(system) for system in (None, *options.nix)]
    pulls = [
        (Times(command, clients.version(maker, folder / "version")), maker)
        for maker in makers
        for command in COMMANDS
    ]
    pulls = [(times, maker) for times, maker in pulls if options.pull in times.row]
    deadline = time.monotonic() + options.minutes * 60
    with ExitStack() as stack:
        run = stack.enter_context
        files = run(servers.nginx_files(folder / "files", closure.folder))
        far = run(servers.far_away(folder / "relay.log", files, rtt=RTT, mbit=MBIT))
        bench = Bench(closure, folder, files=files.url, far=far, from_disk=options.from_disk)
        for number in range(options.repeat):
            for times, maker in pulls:
                if number and time.monotonic() > deadline:
                    break
                if number == 0 or times.sources["direct"][0] < _SHORT:
                    bench.direct(times, maker)
                bench.through_proxy(times, maker)
    return [times for times, _ in pulls]


_SHORT = 60.0  # what takes longer than this directly is done once: delays do not vary


def _table(all_times: list[Times]) -> str:
    head = (
        *("row", "direct", "cold", "cold / direct", "to reach", "CPU", "fetched"),
        *("hot", "files", "hot / files", "to reach"),
    )
    return report.table(head, map(_line, all_times))


def _line(times: Times) -> tuple[str, ...]:
    direct, cold, hot, files = (
        f"{Spread.of(times.sources[source]).median:.1f} s"
        for source in ("direct", "cold", "hot", "files")
    )
    bar = BARS.get((times.command, _short(times.nix)))
    return (
        *(times.row, direct, cold),
        *(times.ratio("cold", "direct").text(), f"≤ {bar}" if bar else "–"),
        f"{Spread.of(times.cpu).median:.1f} s",
        f"{Spread.of(times.fetched).median:.1%}",
        *(hot, files, times.ratio("hot", "files").text(), f"≤ {HOT_BAR}"),
    )


def _short(version: str) -> str:
    return ".".join(version.split(".")[:2])


PART = Part("cold", add_options, measure)

if __name__ == "__main__":
    program.main(__doc__, PART)
