"""Numbers with their spread, tables of them, and files that keep them."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench import machine

RESULTS = Path(__file__).with_name("results")
"""Where results are kept."""


@dataclass(frozen=True, slots=True)
class Spread:
    """What several rounds of the same thing gave."""

    median: float
    least: float
    most: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        """Sum up some values."""
        kept = sorted(values)
        return cls(statistics.median(kept), kept[0], kept[-1])

    def text(self, form: str = ".2f") -> str:
        """Write ``median (least-most)``."""
        return f"{self.median:{form}} ({self.least:{form}}-{self.most:{form}})"

    def as_json(self) -> dict[str, float]:
        """Return it for a file."""
        return asdict(self)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Write a table in Markdown, with columns that line up."""
    lines = [list(head), *map(list, rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(
        "| "
        + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        + " |"
        for line in lines
    )


def keep(name: str, results: Mapping[str, Any]) -> Path:
    """Write results to a file, with the machine and the time."""
    RESULTS.mkdir(exist_ok=True)
    file = RESULTS / f"{name}.json"
    when = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    whole = {"when": when, "machine": machine.describe(), **results}
    file.write_text(json.dumps(whole, indent=1) + "\n")
    return file
