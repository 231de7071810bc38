"""The index's tables: every file of the store with its size and origin, and when it was last used."""

from __future__ import annotations

import contextlib
import sqlite3
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from proxy.nix.store_path import HASH_PART_LENGTH
from proxy.store.eviction import Candidate
from proxy.store.scan import NARINFO_SUFFIX, Found

_SCHEMA_VERSION = 1
"""The user_version below; another one means another schema, and a rebuilt index."""

_SCHEMA = """
PRAGMA journal_mode = WAL;
PRAGMA synchronous = NORMAL;
BEGIN;
PRAGMA user_version = 1;
CREATE TABLE entry (
    name   TEXT PRIMARY KEY,  -- relative to the store folder
    size   INTEGER NOT NULL,  -- bytes on disk, as du counts them
    origin TEXT NOT NULL      -- the upstream's name; empty when nobody remembers
) WITHOUT ROWID;
CREATE TABLE used (           -- apart and narrow, because it changes all the time
    name TEXT PRIMARY KEY,    -- of what can be evicted: everything but narinfos, which follow their NAR
    at   INTEGER NOT NULL     -- seconds since the epoch
) WITHOUT ROWID;
CREATE INDEX used_at ON used (at);
CREATE TABLE before (         -- what entry said when a scan began
    name   TEXT PRIMARY KEY,
    origin TEXT NOT NULL
) WITHOUT ROWID;
CREATE TABLE state (closed INTEGER NOT NULL);
INSERT INTO state VALUES (0);
COMMIT;
"""

_START_OVER = """
BEGIN;
INSERT OR REPLACE INTO before SELECT name, origin FROM entry;
DELETE FROM entry;
DROP INDEX IF EXISTS used_at;  -- its order is not that in which a scan finds files: made again at the end
COMMIT;
"""

_SCANNED = """
BEGIN;
DELETE FROM before;
DELETE FROM used WHERE name NOT IN (SELECT name FROM entry);  -- or `oldest` would pass over them for ever
CREATE INDEX IF NOT EXISTS used_at ON used (at);
COMMIT;
"""


@dataclass(frozen=True, slots=True)
class Totals:
    """What the store holds: ``bytes`` on disk as ``du`` counts them, ``paths`` that have a narinfo."""

    bytes: int
    paths: int


class Database:
    """One connection, for one thread.

    Args:
        connection: A connection to a database with the schema above.
    """

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection
        # Temporary: the pins themselves are files, which this follows.
        connection.executescript(
            "PRAGMA temp_store = MEMORY; CREATE TEMP TABLE pinned (hash TEXT PRIMARY KEY) WITHOUT ROWID;"
        )
        self.totals = self._count()

    @classmethod
    def open(cls, path: Path) -> tuple[Self, bool]:
        """Open the database, or start a new one; and say whether it was closed the last time.

        Raises:
            sqlite3.Error: It cannot be opened or made.
            OSError: What is left of a damaged one cannot be removed.
        """
        connection = sqlite3.connect(path)
        closed = _closed_before(connection)
        if closed is None:
            connection.close()
            for remains in path.parent.glob(f"{path.name}*"):
                remains.unlink()
            return cls(_create(str(path))), False
        with connection:
            connection.execute("UPDATE state SET closed = 0")
        return cls(connection), closed

    @classmethod
    def in_memory(cls) -> Self:
        """Make one that is gone when it is closed."""
        return cls(_create(":memory:"))

    def close(self, *, agrees: bool) -> None:
        """Close it, and remember whether it agrees with the folder."""
        with contextlib.closing(self._connection), self._connection:
            self._connection.execute("UPDATE state SET closed = ?", (agrees,))

    def start_over(self) -> None:
        """Forget which files there are, but neither where they came from nor when they were used."""
        self._connection.executescript(_START_OVER)
        self.totals = Totals(0, 0)

    def scanned(self) -> None:
        """Take in that the scan has ended."""
        self._connection.executescript(_SCANNED)

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """Do what follows in one transaction."""
        with self._connection:
            yield

    def add(self, name: str, size: int, origin: str) -> None:
        """Enter a file that has just been put there."""
        self._put(name, size, origin)
        self.use([(name, int(time.time()))])

    def add_found(self, file: Found) -> None:
        """Enter a file that a scan found, unless it was entered meanwhile."""
        if self._size_of(file.name) is not None:
            return
        row = self._connection.execute(
            "SELECT origin FROM before WHERE name = ?", (file.name,)
        ).fetchone()
        self._put(file.name, file.size, row[0] if row else "")
        if not file.name.endswith(NARINFO_SUFFIX):
            self._connection.execute(
                "INSERT OR IGNORE INTO used VALUES (?, ?)", (file.name, file.modified)
            )

    def use(self, uses: Iterable[tuple[str, int]]) -> None:
        """Enter when files were used: names, and seconds since the epoch."""
        self._connection.executemany(
            "INSERT OR REPLACE INTO used VALUES (?, ?)",
            (use for use in uses if not use[0].endswith(NARINFO_SUFFIX)),
        )

    def use_paths(self, hash_parts: Iterable[str], at: int) -> None:
        """Enter when the narinfos of paths were used: their NARs count as used then, too."""
        self._connection.executemany(
            "UPDATE used SET at = max(at, ?) WHERE name > ? AND name < ?",
            ((at, *_nars_of(hash_part)) for hash_part in hash_parts),
        )

    def pin(self, hash_parts: Iterable[str]) -> None:
        """Take nothing of these paths for a candidate any more; replaces what was said before."""
        with self._connection:
            self._connection.execute("DELETE FROM pinned")
            self._connection.executemany(
                "INSERT OR IGNORE INTO pinned VALUES (?)", ((each,) for each in hash_parts)
            )

    def sizes(self, hash_part: str) -> tuple[int, int] | None:
        """Return what the narinfo and the NARs of a path take; None unless it is here whole."""
        narinfo = self._size_of(hash_part + NARINFO_SUFFIX)
        row = self._connection.execute(
            "SELECT sum(size) FROM entry WHERE name > ? AND name < ?", _nars_of(hash_part)
        ).fetchone()
        return None if narinfo is None or row[0] is None else (narinfo, int(row[0]))

    def remove(self, name: str) -> None:
        """Forget a file that is gone."""
        size = self._size_of(name)
        if size is not None:
            path = name.endswith(NARINFO_SUFFIX)
            self.totals = Totals(self.totals.bytes - size, self.totals.paths - path)
        self._connection.execute("DELETE FROM entry WHERE name = ?", (name,))
        self._connection.execute("DELETE FROM used WHERE name = ?", (name,))

    def oldest(self, most: int, after: Candidate | None = None) -> list[Candidate]:
        """Return what was used least recently first: NARs, with the size of their narinfos, and files.

        What is pinned is passed over.

        Args:
            most: How many to return at most.
            after: The last one that was returned before.
        """
        rows = self._connection.execute(
            "SELECT entry.name, entry.size, at FROM used JOIN entry USING (name)"
            " WHERE (at, used.name) > (?, ?)"
            " AND substr(used.name, 5, 32) NOT IN (SELECT hash FROM pinned)"
            " ORDER BY at, used.name LIMIT ?",
            (-1, "", most) if after is None else (after.used, after.name, most),
        ).fetchall()
        return [Candidate(name, size + self._size_of_narinfo(name), at) for name, size, at in rows]

    def candidates(self, names: Iterable[str]) -> Iterator[Candidate]:
        """Return those of the files that could be evicted: which are here, and not pinned."""
        for name in names:
            row = self._connection.execute(
                "SELECT size FROM entry WHERE name = ?"
                " AND substr(name, 5, 32) NOT IN (SELECT hash FROM pinned)",
                (name,),
            ).fetchone()
            if row is not None:
                yield Candidate(name, row[0] + self._size_of_narinfo(name))

    def _put(self, name: str, size: int, origin: str) -> None:
        """Keep the totals right, too, without adding up a million rows."""
        before = self._size_of(name)
        self._connection.execute(
            "INSERT OR REPLACE INTO entry VALUES (?, ?, ?)", (name, size, origin)
        )
        new_path = before is None and name.endswith(NARINFO_SUFFIX)
        self.totals = Totals(self.totals.bytes + size - (before or 0), self.totals.paths + new_path)

    def _size_of(self, name: str) -> int | None:
        row = self._connection.execute("SELECT size FROM entry WHERE name = ?", (name,)).fetchone()
        return None if row is None else int(row[0])

    def _size_of_narinfo(self, name: str) -> int:
        narinfo = narinfo_of(name)
        return 0 if narinfo is None else self._size_of(narinfo) or 0

    def _count(self) -> Totals:
        total, paths = self._connection.execute(
            "SELECT coalesce(sum(size), 0), coalesce(sum(name LIKE ?), 0) FROM entry",
            (f"%{NARINFO_SUFFIX}",),
        ).fetchone()
        return Totals(total, paths)


def _nars_of(hash_part: str) -> tuple[str, str]:
    """Return what the names of a path's NARs lie between: they are ``nar/<hash part>-…``."""
    return f"nar/{hash_part}-", f"nar/{hash_part}."


def narinfo_of(name: str) -> str | None:
    """Return the name of the narinfo that belongs to a NAR; None for other files."""
    if not name.startswith("nar/"):
        return None
    return name.removeprefix("nar/")[:HASH_PART_LENGTH] + NARINFO_SUFFIX


def _closed_before(connection: sqlite3.Connection) -> bool | None:
    """Tell whether the database was closed the last time; None when it is new, damaged or another one."""
    try:
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        (verdict,) = connection.execute("PRAGMA quick_check(1)").fetchone()
        if (version, verdict) != (_SCHEMA_VERSION, "ok"):
            return None
        connection.execute("SELECT name, size, origin FROM entry LIMIT 1")
        connection.execute("SELECT name, at FROM used LIMIT 1")
        connection.execute("SELECT name, origin FROM before LIMIT 1")
        row = connection.execute("SELECT closed FROM state").fetchone()
    except sqlite3.DatabaseError:
        return None
    return None if row is None else bool(row[0])


def _create(path: str) -> sqlite3.Connection:
    connection = sqlite3.connect(path)
    connection.executescript(_SCHEMA)
    return connection
