"""The command line that the benchmarks share."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Part:
    """One benchmark.

    Attributes:
        name: What it is called on the command line.
        add_options: Adds its options to a parser.
        measure: Measures, prints a table, and keeps the results.
    """

    name: str
    add_options: Callable[[argparse.ArgumentParser], None]
    measure: Callable[[argparse.Namespace], None]


def main(description: str | None, *parts: Part) -> None:
    """Do as the command line says: run the parts that it names, or all."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [part.name for part in parts]
    if len(parts) > 1:
        parser.add_argument("parts", nargs="*", metavar="|".join(names), help="default: all")
    parser.add_argument(
        "--content",
        type=Path,
        default=_cache_home() / "nix-cache-proxy-bench",
        help="where what takes long to make is kept for the next run (%(default)s)",
    )
    for part in parts:
        part.add_options(parser)
    options = parser.parse_args()
    wanted = getattr(options, "parts", []) or names
    if unknown := set(wanted) - set(names):
        parser.error(f"no such part: {', '.join(sorted(unknown))}")
    for part in parts:
        if part.name in wanted:
            print(f"\n{part.name}\n", flush=True)
            part.measure(options)


def _cache_home() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
