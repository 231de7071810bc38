"""What is in the store folder: sizes, last use, origin; and what to evict. Derived, and deletable.

One thread owns the database and is its only reader and writer (SQLite before 3.51.3 can corrupt a WAL
database that two connections checkpoint). The rest of the program hands it notes and goes on: nothing
that a client waits for touches the database.

The folder is the truth. When the index is missing, damaged, or was not closed, the thread scans the
folder in slices, and takes notes between them, while the proxy serves.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from proxy.store.database import Database, Totals, narinfo_of
from proxy.store.eviction import UNLIMITED, Limits, choose, excess, room
from proxy.store.layout import Layout
from proxy.store.scan import Found, disk_usage, forget_old_narinfos, nar_of, scan

COMMIT_INTERVAL = 1.0
"""Seconds that notes wait for company before they are written in one transaction."""

SLICE = 2_000
"""Files looked at in one go of a scan: a few milliseconds."""

DAY = 24 * 3600.0

EVICTION = 256
"""Files evicted in one go."""


@dataclass(frozen=True, slots=True)
class _Added:
    name: str
    size: int
    origin: str


@dataclass(frozen=True, slots=True)
class _Used:
    name: str
    at: int


@dataclass(frozen=True, slots=True)
class _Removed:
    name: str


_Note = _Added | _Used | _Removed


class Index:
    """The index of one store folder.

    Args:
        layout: The store folder; its state folder exists.
        on_failure: Called on the index's thread with the reason when the database fails. The index
            then goes on in memory, since losing it costs a scan and nothing else.
        limits: What the store may take.
        on_evicted: Called on the index's thread with the name and the size of what was evicted.
    """

    def __init__(
        self,
        layout: Layout,
        on_failure: Callable[[str], None],
        *,
        limits: Limits = UNLIMITED,
        on_evicted: Callable[[str, int], None] = lambda _name, _size: None,
    ) -> None:
        self._layout = layout
        self._on_failure = on_failure
        self._limits = limits
        self._on_evicted = on_evicted
        self._notes: queue.SimpleQueue[_Note | None] = queue.SimpleQueue()
        self._totals = Totals(0, 0)
        self._room = 0
        self._scanned = threading.Event()
        self._closing = False
        self._agrees = True
        self._evicting = False
        self._forgot_at = -DAY
        self._thread = threading.Thread(target=self._run, name="index", daemon=True)
        self._thread.start()

    @property
    def totals(self) -> Totals:
        """What is known to be there; it grows while a scan goes on."""
        return self._totals

    @property
    def room(self) -> int:
        """Bytes that can be kept before anything has to be evicted; as of the last transaction."""
        return self._room

    @property
    def scanned(self) -> bool:
        """Whether the index is known to agree with the folder."""
        return self._scanned.is_set()

    def wait_scanned(self, timeout: float) -> bool:
        """Block until the index is known to agree with the folder; False when time ran out first."""
        return self._scanned.wait(timeout)

    def added(self, path: Path, origin: str) -> None:
        """Note that a file has its final name now. Called from any thread."""
        with contextlib.suppress(OSError):
            self._notes.put(_Added(self._name(path), disk_usage(path.stat()), origin))

    def removed(self, path: Path) -> None:
        """Note that a file has been taken away. Called from any thread."""
        self._notes.put(_Removed(self._name(path)))

    def used(self, path: Path) -> None:
        """Note that a client was given a file. Called from any thread; cheap."""
        self._notes.put(_Used(self._name(path), int(time.time())))

    def close(self) -> None:
        """Write what is pending and close. Blocks; call it off the event loop."""
        self._notes.put(None)
        self._thread.join()

    def _name(self, path: Path) -> str:
        return path.relative_to(self._layout.root).as_posix()

    def _run(self) -> None:
        try:
            database, agrees = Database.open(self._layout.index)
            self._keep(database, agrees=agrees)
        except Exception as error:  # noqa: BLE001  # the thread has to live: it is what evicts
            self._on_failure(str(error) or type(error).__name__)
            if not self._closing:
                self._scanned.clear()
                self._keep(Database.in_memory(), agrees=False)

    def _keep(self, database: Database, *, agrees: bool) -> None:
        """Take notes until the end, and first scan the folder unless the index agrees with it."""
        found: Iterator[Found] = iter(())
        if not agrees:
            database.start_over()
            found = scan(self._layout)
        self._totals = database.totals
        if agrees:
            self._measure(database)
            self._scanned.set()
        while not self._closing:
            if not self._scanned.is_set():
                self._scan_slice(database, found)
            self._write(database, self._gather())
            if self._scanned.is_set():
                self._evict(database)
                self._forget_daily()
        database.close(agrees=self._agrees and self._scanned.is_set())

    def _scan_slice(self, database: Database, found: Iterator[Found]) -> None:
        """Look at some more files; the last slice is an empty one."""
        looked_at = 0
        with database.transaction():
            try:
                for file in itertools.islice(found, SLICE):
                    database.add_found(file)
                    looked_at += 1
            except OSError as error:  # what was found counts, and the next start looks again
                self._on_failure(f"cannot look at the store: {error}")
                self._agrees = False
                looked_at = 0
        self._totals = database.totals
        if looked_at == 0:
            database.scanned()
            self._measure(database)
            self._scanned.set()

    def _gather(self) -> list[_Note]:
        """Collect notes for a while, or until the index is being closed."""
        notes: list[_Note] = []
        busy = self._evicting or not self._scanned.is_set()
        deadline = time.monotonic() + (0 if busy else COMMIT_INTERVAL)
        with contextlib.suppress(queue.Empty):
            while True:
                remaining = max(0.0, deadline - time.monotonic())
                note = self._notes.get(block=remaining > 0, timeout=remaining)
                if note is None:
                    self._closing = True
                    break
                notes.append(note)
        return notes

    def _write(self, database: Database, notes: list[_Note]) -> None:
        with database.transaction():
            for note in notes:
                if isinstance(note, _Added):
                    database.add(note.name, note.size, note.origin)
                elif isinstance(note, _Removed):
                    database.remove(note.name)
            database.use({note.name: note.at for note in notes if isinstance(note, _Used)}.items())
        self._totals = database.totals

    def _evict(self, database: Database) -> None:
        """Remove what was used least recently, as long as a limit is exceeded."""
        wanted = self._measure(database)
        self._evicting = False
        if wanted == 0:
            return
        with database.transaction():
            for victim in choose(database.oldest(EVICTION), wanted):
                try:
                    self._remove(database, victim.name)
                except OSError as error:
                    self._on_failure(f"cannot evict {victim.name}: {error}")
                else:
                    self._evicting = True  # and at once again, until there is room
                    self._on_evicted(victim.name, victim.size)
        self._totals = database.totals

    def _forget_daily(self) -> None:
        if time.monotonic() - self._forgot_at > DAY:
            self._forgot_at = time.monotonic()
            forget_old_narinfos(self._layout)

    def _measure(self, database: Database) -> int:
        """Find out how much room there is, and return how many bytes are to be evicted."""
        try:
            disk = os.statvfs(self._layout.root)
        except OSError:  # the folder has vanished; there is nothing to evict
            self._room = 0
            return 0
        used, free = database.totals.bytes, disk.f_bavail * disk.f_frsize
        self._room = room(self._limits, used=used, free=free)
        return excess(self._limits, used=used, free=free)

    def _remove(self, database: Database, name: str) -> None:
        """Remove a file, and before a NAR its narinfo: without its NAR it would be a broken promise.

        A narinfo that is published between the two is removed after it.
        """
        narinfo = narinfo_of(name)
        self._remove_narinfo(database, narinfo, name)
        (self._layout.root / name).unlink(missing_ok=True)
        database.remove(name)
        self._remove_narinfo(database, narinfo, name)

    def _remove_narinfo(self, database: Database, narinfo: str | None, nar: str) -> None:
        if narinfo is not None and self._leads_to(narinfo, nar):
            (self._layout.root / narinfo).unlink(missing_ok=True)
            database.remove(narinfo)

    def _leads_to(self, narinfo: str, nar: str) -> bool:
        """Tell whether a narinfo is that of a NAR, and not of the same path compressed otherwise."""
        try:
            return nar_of(self._layout.root / narinfo) == nar
        except FileNotFoundError:
            return False
