"""Take what is damaged out of the binary cache, and keep some of it for whoever wants to know why.

The narinfo goes before its NAR, as in eviction: a narinfo without NAR would be a broken promise.
"""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

from proxy.store.files import flush
from proxy.store.layout import Layout
from proxy.store.scan import nar_of

MOST = 256 * 2**20
"""Bytes kept in quarantine; the oldest goes first, and what is larger is not kept at all."""

KEEP_FOR = 7 * 24 * 3600
"""Seconds that something is kept there: long enough for whoever was away over the weekend."""


class Quarantine:
    """What is damaged. It contains what could not be moved away, since the disk takes nothing.

    Args:
        layout: The store folder.
    """

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._condemned: set[Path] = set()

    def __contains__(self, path: str | Path) -> bool:
        return bool(self._condemned) and Path(path) in self._condemned  # to hash it takes a while

    def replaced(self, path: str) -> None:
        """There is another file under that name now."""
        if self._condemned:
            self._condemned.discard(Path(path))

    def take(self, narinfo: Path, nar: Path | None) -> None:
        """Move a narinfo, or a NAR and the narinfo that leads to it; any of them may be gone already.

        Raises:
            OSError: They cannot be moved, and count as gone all the same.
        """
        files = [narinfo] if nar is None or _leads_to(narinfo, nar) else []
        files += [] if nar is None else [nar]
        self._condemned.update(files)
        self._layout.quarantine.mkdir(parents=True, exist_ok=True)
        for number, path in enumerate(files):
            if number > 0:
                flush(self._layout.root)
            with contextlib.suppress(FileNotFoundError):
                path.rename(self._layout.quarantine / path.name)
        self._condemned.difference_update(files)
        clear(self._layout, time.time())


def clear(layout: Layout, now: float) -> None:
    """Remove what is too old or too much. Never fails.

    Args:
        layout: The store folder.
        now: Seconds since the epoch.
    """
    room = MOST
    with contextlib.suppress(OSError):
        newest_first = sorted(
            ((path.stat(), path) for path in layout.quarantine.iterdir()),
            key=lambda entry: -entry[0].st_ctime,  # of the move; what it was moved with is older
        )
        for status, path in newest_first:
            room -= status.st_size
            if room < 0 or status.st_ctime < now - KEEP_FOR:
                path.unlink()
                room += status.st_size


def _leads_to(narinfo: Path, nar: Path) -> bool:
    """Tell whether a narinfo is that of a NAR; one that cannot be read is no use without it."""
    try:
        found = nar_of(narinfo)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return found == f"nar/{nar.name}"
