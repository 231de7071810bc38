"""Hot: our proxy on one core against nginx with ``proxy_cache`` on the same core, in turn.

Both have everything on disk and in the page cache; the load comes from other cores, except for two workers
where there are too few. Each round measures both sides, and who goes first alternates; each round gives one
ratio.
"""

from __future__ import annotations

import argparse
import random
import tempfile
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Any

from bench import content, load, machine, program, report, servers
from bench.load import Sample
from bench.program import Part
from bench.report import Spread
from bench.servers import Served
from tests.closures import StoreEntry, closure

CONFIG = '[policy]\nnegative_ttl = "1h"'
"""What nginx is told, too: nothing expires while it is measured."""


WORKERS = 2
"""Where more than one is measured."""

TOGETHER = (
    "Two workers and their load need more cores than there are, so that each worker shared its core with its "
    "load: two cores and 64 connections over one core and 32."
)
"""What is said where that was so."""


@dataclass(frozen=True, slots=True)
class Row:
    """A kind of work.

    Attributes:
        name: What it is.
        bar: The ratio that is to be reached.
        paths: Makes a server hot; returns the URL paths that it is then asked for.
        connections: Keep-alive connections of the load.
        status: What is answered.
        in_bytes: Bytes per second count, not requests per second.
    """

    name: str
    bar: float
    paths: Callable[[Served], list[str]]
    connections: int = 64
    status: int = HTTPStatus.OK
    in_bytes: bool = False

    def rate(self, sample: Sample) -> float:
        """Return what counts."""
        return sample.bytes_rate if self.in_bytes else sample.rate

    def cost(self, sample: Sample) -> float:
        """Return CPU time: microseconds per request, or seconds per 10^9 bytes."""
        return sample.cpu_per_gb if self.in_bytes else sample.cpu_us

    def per_cpu(self, sample: Sample) -> float:
        """Return what a second of CPU time gives; others on the machine do not change it much."""
        return 1 / self.cost(sample)


@dataclass(frozen=True, slots=True)
class Side:
    """A server and the load on it.

    Attributes:
        server: The server.
        cores: Where the load goes.
        share: Of the row's connections.
    """

    server: Served
    cores: Sequence[int]
    share: float = 1.0


@dataclass(frozen=True, slots=True)
class Comparison:
    """A row and what it gave: ``rounds`` has pairs of samples, ours and the other one's."""

    row: Row
    ours: str
    other: str
    rounds: list[tuple[Sample, Sample]]

    def ratio(self, of: Callable[[Sample], float]) -> Spread:
        """Return ours over the other one's, round by round."""
        return Spread.of(of(ours) / of(other) for ours, other in self.rounds)

    def sides(self, of: Callable[[Sample], float]) -> tuple[Spread, Spread]:
        """Return ours and the other one's."""
        return (
            Spread.of(of(ours) for ours, _ in self.rounds),
            Spread.of(of(other) for _, other in self.rounds),
        )

    def as_json(self) -> dict[str, Any]:
        """Return it for a file."""
        return {
            "name": self.row.name,
            "bar": self.row.bar,
            "ratio": self.ratio(self.row.rate).as_json(),
            "ratio_per_cpu": self.ratio(self.row.per_cpu).as_json(),
            "rounds": [
                {self.ours: ours.as_json(), self.other: other.as_json()}
                for ours, other in self.rounds
            ],
        }


class Works:
    """What is published below a folder, and the rows that ask for it."""

    def __init__(self, folder: Path) -> None:
        self._many = closure(2_000, depth=12, sizes=(1_000, 4_000), compressions=("none",))
        self._small = content.single_files("small", 200, 30_000)
        self._large = [StoreEntry.huge("large", 100_000_000)]
        content.publish(folder, [*self._many, *self._small, *self._large])

    def against_nginx(self) -> list[Row]:
        """Return the rows in which nginx is the other side."""
        return [
            Row("narinfo", 1.5, self._narinfos),
            Row("NAR 30 kB", 1.1, lambda server: _nars(server, self._small)),
            Row(
                "NAR 100 MB",
                1.2,
                lambda server: _nars(server, self._large),
                connections=8,
                in_bytes=True,
            ),
            Row("narinfo 404", 1.5, _absent, status=HTTPStatus.NOT_FOUND),
        ]

    def of_two_workers(self) -> Row:
        """Return the row in which one worker is the other side."""
        return Row("workers 2 over 1", 1.8, self._narinfos)

    def _narinfos(self, server: Served) -> list[str]:
        _nars(server, self._many)  # with its NAR, a narinfo is kept for good
        return [entry.narinfo_path for entry in self._many]


def _nars(server: Served, entries: Sequence[StoreEntry]) -> list[str]:
    narinfos = load.fetch_all(server, [entry.narinfo_path for entry in entries])
    paths = [load.nar_path(narinfo) for narinfo in narinfos]
    load.fetch_all(server, paths)
    return paths


def _absent(server: Served) -> list[str]:
    paths = content.absent_narinfos(2_000)
    load.fetch_all(server, paths, status=HTTPStatus.NOT_FOUND)
    return paths


class Bench:
    """Compares servers.

    Args:
        folder: For files.
        rounds: How often each side is measured.
        seconds: How long, each time.
    """

    def __init__(self, folder: Path, *, rounds: int, seconds: int) -> None:
        self._folder = folder
        self._rounds = rounds
        self._seconds = seconds

    def compare(self, row: Row, ours: Side, other: Side) -> Comparison:
        """Measure two servers in turn.

        Raises:
            LoadError: One of them does not answer as it should.
        """
        names = ours.server.name, other.server.name
        print(f"{row.name}: {names[0]} and {names[1]} …", flush=True)
        for side in (ours, other):
            self._make_hot(row, side.server)
            self._sample(row, side, seconds=1)
        rounds = []
        for number in range(self._rounds):
            order = (ours, other) if number % 2 == 0 else (other, ours)
            samples = {side.server.name: self._sample(row, side, self._seconds) for side in order}
            rounds.append((samples[names[0]], samples[names[1]]))
        return Comparison(row, *names, rounds)

    def _make_hot(self, row: Row, server: Served) -> None:
        """Write the paths to ask for to a file, in no order that a cache could like."""
        paths = row.paths(server)
        random.Random(row.name).shuffle(paths)
        self._paths(server).write_text("".join(f"{path}\n" for path in paths))

    def _sample(self, row: Row, side: Side, seconds: int) -> Sample:
        server, paths = side.server, self._paths(side.server)
        connections = round(row.connections * side.share)
        if row.in_bytes:
            return load.drain(
                server, paths, connections=connections, seconds=seconds, cores=side.cores
            )
        return load.wrk(
            server,
            paths,
            connections=connections,
            seconds=seconds,
            cores=side.cores,
            status=row.status,
        )

    def _paths(self, server: Served) -> Path:
        return self._folder / f"{server.name}.paths"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this program."""
    group = parser.add_argument_group("hot")
    group.add_argument("--rounds", type=int, default=5, help="rounds per row (%(default)s)")
    group.add_argument("--seconds", type=int, default=2, help="per side and round (%(default)s)")
    group.add_argument("--row", default="", help="only rows whose name has this in it")


def measure(options: argparse.Namespace) -> None:
    """Measure, print and keep the results."""
    machine.require("nginx", "wrk", "taskset")
    with tempfile.TemporaryDirectory(prefix="bench-hot-") as folder:
        comparisons, notes = _measure(Path(folder), options)
    print(_table(comparisons), *notes, sep="\n")
    rows = [comparison.as_json() for comparison in comparisons]
    report.keep("hot", {"rows": rows, "notes": notes})


def _measure(folder: Path, options: argparse.Namespace) -> tuple[list[Comparison], list[str]]:
    """Return what was measured, and notes on how, or why not."""
    cores = machine.Cores.of_this_machine()
    bench = Bench(folder, rounds=options.rounds, seconds=options.seconds)
    works = Works(folder / "upstream")
    with ExitStack() as stack:
        run = stack.enter_context
        files = run(servers.nginx_files(folder / "files", folder / "upstream", cores=cores.load))
        core = cores.servers[:1]
        ours = run(servers.our_proxy(folder / "ours", [files.url], cores=core, config=CONFIG))
        nginx = run(servers.nginx_cache(folder / "nginx", files.url, cores=core))
        comparisons = [
            bench.compare(row, Side(ours, cores.load), Side(nginx, cores.load))
            for row in works.against_nginx()
            if options.row in row.name
        ]
        row = works.of_two_workers()
        if options.row not in row.name:
            return comparisons, []
        apart = len(cores.servers) >= WORKERS
        theirs = cores.servers[:WORKERS] if apart else (*core, *cores.load)[:WORKERS]
        try:
            two = run(
                servers.our_proxy(
                    folder / "two",
                    [files.url],
                    name="two workers",
                    workers=WORKERS,
                    cores=theirs,
                    config=CONFIG,
                )
            )
        except servers.ServerError as error:
            return comparisons, [f"Two workers were not measured: {error}"]
        if apart:
            sides = Side(two, cores.load), Side(ours, cores.load)
        else:
            sides = Side(two, theirs), Side(ours, core, 1 / WORKERS)
        comparisons.append(bench.compare(row, *sides))
    return comparisons, [] if apart else [TOGETHER]


def _table(comparisons: Iterable[Comparison]) -> str:
    head = (
        "row",
        "to reach",
        "ratio",
        "ours",
        "other",
        "CPU ours",
        "CPU other",
        "CPU ratio",
        "busy",
    )
    return report.table(head, map(_line, comparisons))


def _line(comparison: Comparison) -> Sequence[str]:
    row = comparison.row
    rates = comparison.sides(row.rate)
    costs = comparison.sides(row.cost)
    busy = comparison.sides(lambda sample: sample.busy)
    rate, cost = (_bytes_rate, "{:.3f} s/GB") if row.in_bytes else (_rate, "{:.1f} µs")
    return (
        row.name,
        f"≥ {row.bar}",
        comparison.ratio(row.rate).text(),
        comparison.ratio(row.per_cpu).text(),
        *(rate(side.median) for side in rates),
        *(cost.format(side.median) for side in costs),
        " / ".join(f"{side.median:.2f}" for side in busy),
    )


def _rate(value: float) -> str:
    return f"{value:,.0f}/s"


def _bytes_rate(value: float) -> str:
    return f"{value / 1e9:.2f} GB/s"


PART = Part("hot", add_options, measure)

if __name__ == "__main__":
    program.main(__doc__, PART)
