"""Load on a server, and what it costs the server."""

from __future__ import annotations

import http.client
import json
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from http import HTTPStatus
from pathlib import Path

from bench import processes
from bench.servers import HOST, Served

_SCRIPT = Path(__file__).with_name("wrk.lua")
_MARK = "RESULT "  # what the script's line with the result begins with
_SPARE = 120.0  # seconds that a load may take longer than it was told


class LoadError(Exception):
    """The answers were not those that are to be measured."""


@dataclass(frozen=True, slots=True)
class Sample:
    """What one server did under load for a while.

    Attributes:
        rate: Requests answered per second.
        bytes_rate: Bytes received per second.
        cpu_us: CPU time of the server per request, in microseconds.
        cpu_per_gb: CPU time of the server per 10^9 bytes, in seconds.
        busy: CPU time of the server per second. Where it is far below the number of its workers, the
            load was the bottleneck, and only CPU times can be compared.
        p50_us: Half of the answers took no longer, in microseconds; 0 where it was not measured.
        p99_us: 99 % of them took no longer.
    """

    rate: float
    bytes_rate: float
    cpu_us: float
    cpu_per_gb: float
    busy: float
    p50_us: float = 0
    p99_us: float = 0

    @classmethod
    def of(cls, result: Mapping[str, float], cpu_seconds: float) -> Sample:
        """Work it out from what a load counted, and from the CPU time that the server used."""
        requests, size, took = result["requests"], result["bytes"], result["seconds"]
        return cls(
            rate=requests / took,
            bytes_rate=size / took,
            cpu_us=cpu_seconds / max(1, requests) * 1e6,
            cpu_per_gb=cpu_seconds / size * 1e9,
            busy=cpu_seconds / took,
            p50_us=result.get("p50_us", 0),
            p99_us=result.get("p99_us", 0),
        )

    def as_json(self) -> dict[str, float]:
        """Return it for a file."""
        return asdict(self)


def wrk(
    server: Served,
    paths: Path,
    *,
    connections: int,
    seconds: float,
    cores: Sequence[int],
    status: int = HTTPStatus.OK,
) -> Sample:
    """Ask a server for the URL paths in a file, in turn, over keep-alive connections.

    Raises:
        LoadError: Answers failed, or had another status.
    """
    threads = str(min(len(cores), connections))
    command = [
        *("wrk", "--threads", threads, "--connections", str(connections)),
        *("--duration", f"{max(1, round(seconds))}s", "--timeout", "10s", "--latency"),
        *("--script", str(_SCRIPT), server.url, "--", str(paths), threads),
    ]
    before = server.cpu_seconds
    (output,) = _run([processes.pinned(command, cores)], seconds)
    used = server.cpu_seconds - before
    line = next((line for line in output.splitlines() if line.startswith(_MARK)), None)
    if line is None:
        raise LoadError(f"wrk gave no result: {output}")
    result: dict[str, float] = json.loads(line.removeprefix(_MARK))
    # wrk counts everything from 400 on as an error.
    unexpected = result["refused"] - (result["requests"] if status >= HTTPStatus.BAD_REQUEST else 0)
    if result["failed"] or unexpected or not result["bytes"]:
        raise LoadError(f"{server.name}: {result}, and every status should be {status}")
    return Sample.of(result, used)


def drain(
    server: Served, paths: Path, *, connections: int, seconds: float, cores: Sequence[int]
) -> Sample:
    """Fetch large files over keep-alive connections, by one process on each core.

    0 seconds means: until each connection has one whole answer.

    Raises:
        LoadError: Answers failed.
    """
    shares = [str(len(range(number, connections, len(cores)))) for number in range(len(cores))]
    commands = [
        processes.pinned(
            [
                sys.executable,
                "-m",
                "bench.drain",
                str(server.port),
                share,
                str(seconds),
                str(paths),
            ],
            [core],
        )
        for core, share in zip(cores, shares, strict=True)
    ]
    before = server.cpu_seconds
    results = [json.loads(output) for output in _run(commands, seconds)]
    used = server.cpu_seconds - before
    total = {
        "requests": sum(result["requests"] for result in results),
        "bytes": sum(result["bytes"] for result in results),
        "seconds": max(result["seconds"] for result in results),
    }
    if not total["bytes"]:
        raise LoadError(f"{server.name} sent nothing")
    return Sample.of(total, used)


def _run(commands: Sequence[Sequence[str]], seconds: float) -> list[str]:
    """Run programs at the same time, and return what they print."""
    started = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for command in commands
    ]
    try:
        outputs = [process.communicate(timeout=seconds + _SPARE)[0] for process in started]
    finally:
        for process in started:
            process.kill()
            process.wait()
    for process, output in zip(started, outputs, strict=True):
        if process.returncode:
            raise LoadError(f"the load failed: {output[-2000:]}")
    return outputs


# --- filling caches ---------------------------------------------------------------------------


def fetch_all(
    server: Served, paths: Iterable[str], *, status: int = HTTPStatus.OK, at_once: int = 16
) -> list[bytes]:
    """Get every URL path once, many at a time; return the bodies.

    Raises:
        LoadError: A status is another one.
    """
    listed = list(paths)
    shares = [listed[start::at_once] for start in range(at_once)]
    with ThreadPoolExecutor(at_once) as pool:
        done = list(pool.map(lambda share: _fetch_share(server, share, status), shares))
    bodies = dict(pair for share in done for pair in share)
    return [bodies[path] for path in listed]


def _fetch_share(server: Served, paths: Sequence[str], status: int) -> list[tuple[str, bytes]]:
    connection = http.client.HTTPConnection(HOST, server.port, timeout=60)
    bodies = []
    try:
        for path in paths:
            connection.request("GET", path)
            answer = connection.getresponse()
            bodies.append((path, answer.read()))
            if answer.status != status:
                raise LoadError(f"{server.name} answers {answer.status} for {path}")
    finally:
        connection.close()
    return bodies


def nar_path(narinfo: bytes) -> str:
    """Return the URL path that a narinfo names.

    Raises:
        LoadError: It names none.
    """
    for line in narinfo.splitlines():
        if line.startswith(b"URL: "):
            return "/" + line.removeprefix(b"URL: ").decode()
    raise LoadError("a narinfo has no URL")
