"""Make room: measure the folder, and evict what is too much. For the index's thread alone."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection, Iterable

from proxy.store.database import Database, narinfo_of
from proxy.store.eviction import Candidate, Limits, beyond, choose, excess, room
from proxy.store.files import in_use
from proxy.store.layout import Layout
from proxy.store.leftovers import make_room
from proxy.store.scan import forget_narinfos, nar_of, overhead

EVICTION = 256
"""Files evicted in one go."""

REMEMBERED = 400 * 2**20
"""Bytes of remembered narinfos, at most: 100,000 of them, on a disk with blocks of 4 KiB."""

REMEMBERED_SHARE = 1 / 20
"""Part of ``max_size`` that they may take."""

DAY = 24 * 3600.0


class Room:
    """The room in one store folder.

    Args:
        layout: The folder.
        limits: What it may take.
        on_failure: Called with the reason when something cannot be evicted.
        on_evicted: Called with the name and the size of what was evicted.

    Attributes:
        left: Bytes that can be kept before anything has to be evicted, when it was last measured.
        used: Bytes that the whole folder took then, as ``du`` counts them.
        beyond: How many of them were beyond the marks at which eviction ends.
        evictions: How many NARs and other files were evicted; it counts before they go.
    """

    def __init__(
        self,
        layout: Layout,
        limits: Limits,
        on_failure: Callable[[str], None],
        on_evicted: Callable[[str, int], None],
    ) -> None:
        self.left = 0
        self.used = 0
        self.beyond = 0
        self.evictions = 0
        self._layout = layout
        self._limits = limits
        self._on_failure = on_failure
        self._on_evicted = on_evicted
        self._remembered = 0
        self._forgot_at = -DAY

    def measure(self, database: Database) -> int:
        """Find out how much room there is, and return how many bytes are to be evicted."""
        try:
            disk = os.statvfs(self._layout.root)
        except OSError:  # the folder has vanished; there is nothing to evict
            self.left = 0
            return 0
        self.used = database.totals.bytes + overhead(self._layout) + self._remembered
        free = disk.f_bavail * disk.f_frsize
        self.left = room(self._limits, used=self.used, free=free)
        self.beyond = beyond(self._limits, used=self.used, free=free)
        return excess(self._limits, used=self.used, free=free)

    def make(self, database: Database) -> bool:
        """Evict some of what is too much; return whether anything went.

        Unfinished downloads are the first to go, and then what was used least recently.
        """
        wanted = self.measure(database)
        if wanted > 0 and self._give_up(wanted):
            return True
        return wanted > 0 and bool(self._evict(database, choose(database.oldest(EVICTION), wanted)))

    def evict(self, database: Database, names: Collection[str]) -> list[str]:
        """Evict what an operator wants gone, as far as it can be, and return the names of what went."""
        return self._evict(database, database.candidates(names))

    def remembered(self, size: int) -> None:
        """Take in that another narinfo is remembered, whose NAR is not here."""
        self._remembered += size

    def forget(self) -> None:
        """Keep what is remembered of paths that are not here within its bounds."""
        limit = self._limits.max_size
        most = min(REMEMBERED, int(limit * REMEMBERED_SHARE)) if limit else REMEMBERED
        if self._remembered > most or time.monotonic() - self._forgot_at > DAY:
            self._forgot_at = time.monotonic()
            self._remembered = forget_narinfos(self._layout, most - most // 8)

    def _give_up(self, wanted: int) -> bool:
        """Remove unfinished downloads."""
        gone = False
        try:
            for path, size in make_room(self._layout.partials, wanted):
                gone = True
                self._on_evicted(str(path.relative_to(self._layout.root)), size)
        except OSError as error:
            self._on_failure(f"cannot remove an unfinished download: {error}")
        return gone

    def _evict(self, database: Database, victims: Iterable[Candidate]) -> list[str]:
        """Remove what nobody reads or writes."""
        gone: list[str] = []
        with database.transaction():
            for victim in victims:
                try:
                    if in_use(self._layout.root / victim.name):
                        continue
                    self._remove(database, victim.name)
                except OSError as error:
                    self._on_failure(f"cannot evict {victim.name}: {error}")
                else:
                    gone.append(victim.name)
                    self._on_evicted(victim.name, victim.size)
        return gone

    def _remove(self, database: Database, name: str) -> None:
        """Remove a file, and before a NAR its narinfo: without its NAR it would be a broken promise.

        A narinfo that is published between the two is removed after it.
        """
        self.evictions += 1
        narinfo = narinfo_of(name)
        self._remove_narinfo(database, narinfo, name)
        (self._layout.root / name).unlink(missing_ok=True)
        database.remove(name)
        self._remove_narinfo(database, narinfo, name)

    def _remove_narinfo(self, database: Database, narinfo: str | None, nar: str) -> None:
        if narinfo is None:
            return
        path = self._layout.root / narinfo
        if self._leads_to(narinfo, nar):
            path.unlink(missing_ok=True)
            database.remove(narinfo)
        elif not path.exists():
            database.remove(narinfo)  # whoever took it away may not have said so

    def _leads_to(self, narinfo: str, nar: str) -> bool:
        """Tell whether a narinfo is that of a NAR, and not of the same path compressed otherwise."""
        try:
            return nar_of(self._layout.root / narinfo) == nar
        except FileNotFoundError:
            return False
