"""The machine that is measured on: what it is, what is installed, which core does what."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

PACKAGES = {
    "nginx": "nginx-light",
    "nix": "nix-bin",
    "nix-store": "nix-bin",
    "taskset": "util-linux",
    "wrk": "wrk",
}
"""Programs that are run, and the Debian packages that have them."""


def require(*programs: str) -> None:
    """End the program with a message when something that it runs is not installed."""
    missing = [name for name in programs if shutil.which(name) is None]
    if missing:
        packages = sorted({PACKAGES[name] for name in missing})
        sys.exit(
            f"not installed: {', '.join(missing)}; on Debian: apt-get install {' '.join(packages)}"
        )


@dataclass(frozen=True, slots=True)
class Cores:
    """Which cores the servers have, and which ones the load and everything else.

    Servers that are compared have the same ones, in turn.
    """

    servers: tuple[int, ...]
    load: tuple[int, ...]

    @classmethod
    def of_this_machine(cls) -> Cores:
        """Give the load half of the cores, the servers the others.

        The first core goes last: it is where the kernel of a small machine takes its interrupts.
        """
        cores = sorted(os.sched_getaffinity(0), reverse=True)
        if len(cores) < 2:  # noqa: PLR2004
            sys.exit("a server and its load need a core each, and there is only one")
        half = (len(cores) + 1) // 2
        return cls(servers=tuple(cores[half:]), load=tuple(cores[:half]))


def describe() -> dict[str, str]:
    """Say what the machine is, for people who read the results later."""
    return {
        "CPU": _field("/proc/cpuinfo", "model name"),
        "cores": str(len(os.sched_getaffinity(0))),
        "memory": f"{int(_field('/proc/meminfo', 'MemTotal').split()[0]) / 2**20:.0f} GiB",
        "kernel": platform.release(),
        "Python": platform.python_version(),
        "load before": " ".join(f"{load:.1f}" for load in os.getloadavg()),
    }


def _field(file: str, name: str) -> str:
    for line in Path(file).read_text().splitlines():
        key, _, value = line.partition(":")
        if key.strip() == name:
            return value.strip()
    return "unknown"
