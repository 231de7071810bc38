"""Processes that are measured: started on certain cores, watched through /proc, ended by their id."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

STOP_TIMEOUT = 30.0
"""Seconds that a process may take to end before it is killed."""

_TICKS = os.sysconf("SC_CLK_TCK")
_UTIME = 11  # fields of /proc/PID/stat after the command, see proc(5)
_STIME = 12


@contextmanager
def running(
    command: Sequence[str],
    *,
    cores: Iterable[int] | None = None,
    output: Path,
    environment: Mapping[str, str] | None = None,
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a command on certain cores until the block ends; its output goes to a file."""
    with output.open("wb") as file:
        process = subprocess.Popen(
            pinned(command, cores),
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=clean_environment(environment),
        )
    try:
        yield process
    finally:
        end(process)


def pinned(command: Sequence[str], cores: Iterable[int] | None) -> list[str]:
    """Return the command that runs another one on certain cores; None is all."""
    if cores is None:
        return list(command)
    return ["taskset", "--cpu-list", ",".join(map(str, cores)), *command]


def clean_environment(more: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return our environment without any proxy: everything is on this machine."""
    kept = {key: value for key, value in os.environ.items() if not key.lower().endswith("_proxy")}
    return {**kept, **(more or {})}


def end(process: subprocess.Popen[bytes]) -> None:
    """Ask a process to end, and kill it when it does not."""
    if process.poll() is not None:
        return
    process.terminate()
    try:
        process.wait(STOP_TIMEOUT)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def cpu_seconds(pid: int) -> float:
    """Return the CPU time that a process and its children have used so far.

    Children that have ended do not count. The unit of the kernel is 10 ms.
    """
    return sum(_own_cpu_seconds(each) for each in tree(pid))


def rss(pid: int) -> int:
    """Return the bytes of memory that a process and its children have now."""
    return sum(_status(each, "VmRSS") for each in tree(pid))


def peak_rss(pid: int) -> int:
    """Return the most bytes of memory that a process has had, added up over its children."""
    return sum(_status(each, "VmHWM") for each in tree(pid))


def tree(pid: int) -> list[int]:
    """Return the ids of a process and its children and their children."""
    found = [pid]
    for each in found:
        for task in Path(f"/proc/{each}/task").iterdir():
            found += map(int, (task / "children").read_text().split())
    return found


def _own_cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[_UTIME]) + int(fields[_STIME])) / _TICKS


def _status(pid: int, name: str) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        key, _, value = line.partition(":")
        if key == name:
            return int(value.split()[0]) * 1024
    return 0
