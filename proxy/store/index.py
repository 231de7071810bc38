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
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from proxy.errors import StoreError
from proxy.nix.store_path import HashPart
from proxy.store.database import Database, Totals
from proxy.store.eviction import UNLIMITED, Limits
from proxy.store.files import disk_usage
from proxy.store.layout import Layout
from proxy.store.room import Room
from proxy.store.scan import Found, scan

T = TypeVar("T")

COMMIT_INTERVAL = 1.0
"""Seconds that notes wait for company before they are written in one transaction."""

SLICE = 2_000
"""Files looked at in one go of a scan: a few milliseconds."""


@dataclass(frozen=True, slots=True)
class _Added:
    """``evictions``: how many there had been when the file was looked at."""

    name: str
    size: int
    origin: str
    evictions: int


@dataclass(frozen=True, slots=True)
class _Used:
    name: str
    at: int


@dataclass(frozen=True, slots=True)
class _Removed:
    name: str


@dataclass(frozen=True, slots=True)
class _PathsUsed:
    hash_parts: Collection[HashPart]
    at: int


@dataclass(frozen=True, slots=True)
class _Remembered:
    size: int


@dataclass(frozen=True, slots=True)
class _Question:
    answer: Callable[[Database], Any]
    future: Future[Any]


_Note = _Added | _Used | _Removed | _PathsUsed | _Remembered | _Question


class Index:
    """The index of one store folder.

    Args:
        layout: The store folder; its state folder exists.
        on_failure: Called on the index's thread with the reason when the database fails. The index
            then goes on in memory, since losing it costs a scan and nothing else.
        limits: What the store may take.
        on_evicted: Called on the index's thread with the name and the size of what was evicted.
        pinned: Paths of which nothing is evicted, to begin with: see `pin`.
        on_vanished: Called on the index's thread, about once a second, while the state folder is not there.
    """

    def __init__(
        self,
        layout: Layout,
        on_failure: Callable[[str], None],
        *,
        limits: Limits = UNLIMITED,
        on_evicted: Callable[[str, int], None] = lambda _name, _size: None,
        pinned: Collection[HashPart] = (),
        on_vanished: Callable[[], object] = lambda: None,
    ) -> None:
        self._layout = layout
        self._on_vanished = on_vanished
        self._prefix = len(str(layout.root / "_")) - 1
        self._on_failure = on_failure
        self._pinned = pinned
        self._questions: list[_Question] = []
        self._notes: queue.SimpleQueue[_Note | None] = queue.SimpleQueue()
        self._totals = Totals(0, 0)
        self._room = Room(layout, limits, on_failure, on_evicted)
        self._added_bytes = 0
        self._written_bytes = 0
        self._measured_bytes = 0
        self._adding = threading.Lock()
        self._hurry = threading.Event()
        self._scanned = threading.Event()
        self._closing = False
        self._agrees = True
        self._evicting = False
        self._thread = threading.Thread(target=self._run, name="index", daemon=True)
        self._thread.start()

    @property
    def totals(self) -> Totals:
        """What is known to be there; it grows while a scan goes on."""
        return self._totals

    @property
    def room(self) -> int:
        """Bytes that can be kept before anything has to be evicted, all that was added being counted."""
        return self._room.left - (self._added_bytes - self._measured_bytes)

    @property
    def used_bytes(self) -> int:
        """Bytes that the whole folder takes, as ``du`` counts them; as of the last transaction."""
        return self._room.used

    @property
    def scanned(self) -> bool:
        """Whether the index is known to agree with the folder."""
        return self._scanned.is_set()

    def wait_scanned(self, timeout: float) -> bool:
        """Block until the index is known to agree with the folder; False when time ran out first."""
        return self._scanned.wait(timeout)

    def added(self, path: str | Path, origin: str) -> bool:
        """Note that a file has its final name now; False when it is gone again. From any thread."""
        evictions = self._room.evictions
        try:
            size = disk_usage(os.stat(path))
        except OSError:
            return False
        with self._adding:
            self._added_bytes += size
        self._notes.put(_Added(self._name(path), size, origin, evictions))
        return True

    def removed(self, path: str | Path) -> None:
        """Note that a file has been taken away. Called from any thread."""
        self._notes.put(_Removed(self._name(path)))

    def used(self, path: Path | str) -> None:
        """Note that a client was given a file. Called from any thread; cheap."""
        self._notes.put(_Used(self._name(path), int(time.time())))

    def used_paths(self, hash_parts: Collection[HashPart]) -> None:
        """Note that clients were given the narinfos of paths. Called from any thread; cheap."""
        self._notes.put(_PathsUsed(hash_parts, int(time.time())))

    def remembered(self, path: Path) -> None:
        """Note that a narinfo is remembered, whose NAR is not here. Called from any thread."""
        with contextlib.suppress(OSError):
            self._notes.put(_Remembered(disk_usage(path.stat())))

    def ask(self, answer: Callable[[Database], T]) -> Future[T]:
        """Have a question answered from the database, once it agrees with the folder.

        Args:
            answer: Called on the index's thread, where all else waits for it: it does not take long.

        Returns:
            The answer; fails with `StoreError` when there will be none.
        """
        future: Future[T] = Future()
        self._notes.put(_Question(answer, future))
        self._hurry.set()
        if not self._thread.is_alive():
            self._refuse_questions()
        return future

    def pin(self, hash_parts: Collection[HashPart]) -> Future[None]:
        """Evict nothing of these paths from now on; replaces what was said before.

        Returns:
            Resolves when that is in force, and nothing of them is being evicted any more.
        """

        def pin(database: Database) -> None:
            self._pinned = hash_parts
            database.pin(hash_parts)

        return self.ask(pin)

    def measure(self) -> Future[tuple[int, int]]:
        """Look how much the whole folder takes now.

        Returns:
            Bytes, and how many of them are beyond the marks at which eviction ends.
        """

        def measure(database: Database) -> tuple[int, int]:
            self._room.measure(database)
            return self._room.used, self._room.beyond

        return self.ask(measure)

    def evict(self, names: Collection[str]) -> Future[list[str]]:
        """Evict some files, but nothing that is pinned or in use. Some hundreds at a time, at most.

        Returns:
            The names of what is gone.
        """
        return self.ask(lambda database: self._room.evict(database, names))

    def close(self) -> None:
        """Write what is pending and close. Blocks; call it off the event loop."""
        self._notes.put(None)
        self._hurry.set()
        self._thread.join()

    def _name(self, path: Path | str) -> str:
        return str(path)[self._prefix :]

    def _run(self) -> None:
        try:
            database, agrees = Database.open(self._layout.index)
            self._keep(database, agrees=agrees)
        except Exception as error:  # noqa: BLE001  # the thread has to live: it is what evicts
            self._on_failure(str(error) or type(error).__name__)
            if not self._closing:
                self._scanned.clear()
                self._keep(Database.in_memory(), agrees=False)
        self._refuse_questions()

    def _keep(self, database: Database, *, agrees: bool) -> None:
        """Take notes until the end, and first scan the folder unless the index agrees with it."""
        found: Iterator[Found] = iter(())
        if not agrees:
            database.start_over()
            found = scan(self._layout)
        self._totals = database.totals
        database.pin(self._pinned)
        if agrees:
            self._measure(database)
            self._scanned.set()
        while not self._closing:
            if not self._scanned.is_set():
                self._scan_slice(database, found)
            self._write(database, self._gather())
            if not os.path.exists(self._layout.lock):  # whatever the disk says of it
                self._on_vanished()
            if self._scanned.is_set():
                self._answer(database)
                self._room.forget()
                self._measured_bytes = self._written_bytes
                self._evicting = self._room.make(database)
                self._totals = database.totals
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

    def _measure(self, database: Database) -> None:
        self._measured_bytes = self._written_bytes
        self._room.measure(database)

    def _gather(self) -> list[_Note]:
        """Collect notes for a while, or until the index is being closed."""
        notes: list[_Note] = []
        busy = self._evicting or not self._scanned.is_set()
        if not busy:
            self._hurry.wait(COMMIT_INTERVAL)  # to be woken by each of them would cost more
        self._hurry.clear()
        with contextlib.suppress(queue.Empty):
            while True:
                note = self._notes.get_nowait()
                if note is None:
                    self._closing = True
                    break
                if isinstance(note, _Question):
                    self._questions.append(note)
                else:
                    notes.append(note)
        return notes

    def _write(self, database: Database, notes: list[_Note]) -> None:
        with database.transaction():
            for note in notes:
                if isinstance(note, _Added):
                    if self._is_there(note):
                        database.add(note.name, note.size, note.origin)
                    self._written_bytes += note.size
                elif isinstance(note, _Removed):
                    database.remove(note.name)
                elif isinstance(note, _PathsUsed):
                    database.use_paths(note.hash_parts, note.at)
                elif isinstance(note, _Remembered):
                    self._room.remembered(note.size)
            database.use({note.name: note.at for note in notes if isinstance(note, _Used)}.items())
        self._totals = database.totals

    def _is_there(self, note: _Added) -> bool:
        """Tell whether a file is still there: a narinfo may have been evicted since, with its NAR."""
        return note.evictions == self._room.evictions or (self._layout.root / note.name).exists()

    def _answer(self, database: Database) -> None:
        questions, self._questions = self._questions, []
        for question in questions:
            try:
                question.future.set_result(question.answer(database))
            except Exception as error:  # noqa: BLE001  # nobody may wait for ever
                question.future.set_exception(StoreError(f"the index does not answer: {error}"))

    def _refuse_questions(self) -> None:
        """Nobody will answer any more."""
        with contextlib.suppress(queue.Empty):
            while True:
                note = self._notes.get_nowait()
                if isinstance(note, _Question):
                    self._questions.append(note)
        for question in self._questions:
            question.future.set_exception(StoreError("the store is being closed"))
        self._questions.clear()
