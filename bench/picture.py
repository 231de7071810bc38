"""A picture of the results: ``python -m bench.picture`` writes figures.svg from results/*.json."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

from bench.report import RESULTS

PICTURE = Path(__file__).with_name("figures.svg")

WIDTH = 960
LABELS = 330  # x at which bars begin
LENGTH = 440  # of the longest bar
LINE = 26

REACHED, MISSED, PLAIN, OTHER = "#2f855a", "#c05621", "#2b6cb0", "#a0aec0"

STYLE = """
text { font: 13px sans-serif; fill: #1a202c }
.title { font-size: 17px; font-weight: bold }
.note { font-size: 12px; fill: #4a5568 }
"""


@dataclass(frozen=True, slots=True)
class Bar:
    """A line of a panel.

    Attributes:
        label: Left of it.
        value: Its length, in units of the panel.
        text: Right of it.
        color: Of the bar.
        least: Where the whisker of its spread begins; None draws none.
        most: Where it ends.
        mark: What was to be reached, in the same unit; None draws no mark.
    """

    label: str
    value: float
    text: str
    color: str
    least: float | None = None
    most: float | None = None
    mark: float | None = None


@dataclass(frozen=True, slots=True)
class Panel:
    """Bars with a title and a note."""

    title: str
    note: str
    bars: Sequence[Bar]

    @property
    def height(self) -> int:
        """Pixels."""
        return 62 + LINE * len(self.bars)

    def draw(self, top: int) -> str:
        """Return its SVG."""
        ends = [max(bar.value, bar.most or 0, bar.mark or 0) for bar in self.bars]
        scale = LENGTH / max(ends)
        lines = [
            f'<text class="title" x="16" y="{top + 22}">{escape(self.title)}</text>',
            f'<text class="note" x="16" y="{top + 40}">{escape(self.note)}</text>',
        ]
        for number, bar in enumerate(self.bars):
            lines += _draw(bar, top + 52 + number * LINE, scale)
        return "\n".join(lines)


def _draw(bar: Bar, y: int, scale: float) -> Iterable[str]:
    middle = y + LINE // 2 - 3
    end = LABELS + max(bar.value, bar.most or 0, bar.mark or 0) * scale
    yield f'<text x="{LABELS - 10}" y="{y + 15}" text-anchor="end">{escape(bar.label)}</text>'
    yield (
        f'<rect x="{LABELS}" y="{y + 1}" width="{max(1, bar.value * scale):.1f}" '
        f'height="{LINE - 8}" fill="{bar.color}"/>'
    )
    if bar.least is not None and bar.most is not None:
        yield (
            f'<path d="M{LABELS + bar.least * scale:.1f} {middle}H{LABELS + bar.most * scale:.1f}" '
            'stroke="#1a202c" stroke-width="2"/>'
        )
    if bar.mark is not None:
        x = LABELS + bar.mark * scale
        yield (
            f'<path d="M{x:.1f} {y - 2}V{y + LINE - 4}" stroke="#1a202c" stroke-dasharray="3 2"/>'
        )
    yield f'<text x="{end + 8:.1f}" y="{y + 15}">{escape(bar.text)}</text>'


def _hot(results: dict[str, Any]) -> Panel:
    bars = []
    for row in results["rows"]:
        ratio, bar = row["ratio"], row["bar"]
        color = REACHED if ratio["median"] >= bar else MISSED
        text = f"{ratio['median']:.2f} ×  (to reach {bar})"
        spread = ratio["least"], ratio["most"]
        bars.append(Bar(row["name"], ratio["median"], text, color, *spread, mark=bar))
    note = "Rate over that of nginx with proxy_cache on the same core (workers: over one worker)."
    return Panel("Hot", f"{note} Longer is better.", bars)


def _cold(results: dict[str, Any]) -> Panel:
    bars = []
    for row in results["rows"]:
        for source, seconds in row["seconds"].items():
            middle = sorted(seconds)[len(seconds) // 2]
            label = f"{row['command']}, Nix {row['nix']}: {_SOURCES[source]}"
            color = PLAIN if source in ("cold", "hot") else OTHER
            bars.append(Bar(label, middle, f"{middle:.1f} s", color))
    note = (
        f"Seconds for {results['paths']:,} paths, {results['bytes'] / 1e6:.0f} MB; the upstream is "
        f"{results['rtt'] * 1e3:.0f} ms and {results['mbit']:.0f} Mbit/s away. Shorter is better."
    )
    return Panel("Cold", note, bars)


_SOURCES = {
    "direct": "no proxy",
    "cold": "cold proxy",
    "hot": "hot proxy",
    "files": "file server next door",
}


def _cost(results: dict[str, Any]) -> Panel:
    bars = []
    for row in results["rows"]:
        if row["bar"] is not None:
            share = row["median"] / row["bar"]
            text = f"{row['median']:.3g} {row['unit']}  (to reach {row['bar']:g})"
            color = REACHED if share <= 1 else MISSED
            # A share of several times the bar would make all others invisible.
            bars.append(Bar(row["name"], min(share, _MOST), text, color, mark=1))
    return Panel("Cost", "Share of what was to be reached at most. Shorter is better.", bars)


_MOST = 3.0

_PANELS = {"hot": _hot, "cold": _cold, "cost": _cost}


def draw(results: Path) -> str:
    """Return a picture of the results in a folder, as SVG.

    Raises:
        FileNotFoundError: There are none.
    """
    files = {name: results / f"{name}.json" for name in _PANELS}
    panels = [
        _PANELS[name](json.loads(file.read_text())) for name, file in files.items() if file.exists()
    ]
    if not panels:
        raise FileNotFoundError(f"there are no results in {results}")
    parts, top = [], 10
    for panel in panels:
        parts.append(panel.draw(top))
        top += panel.height
    return "\n".join(
        (
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{top}">',
            f"<style>{STYLE}</style>",
            '<rect width="100%" height="100%" fill="#ffffff"/>',
            *parts,
            "</svg>\n",
        )
    )


if __name__ == "__main__":
    PICTURE.write_text(draw(RESULTS))
