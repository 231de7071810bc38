"""The index: what is in the folder, counted; rebuilt whenever it may be wrong; never in the way."""

from __future__ import annotations

import contextlib
import os
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proxy.store import index as index_module
from proxy.store import room as room_module
from proxy.store.database import Totals
from proxy.store.eviction import UNLIMITED, Limits
from proxy.store.index import Index
from proxy.store.layout import Layout
from tests.closures import nix32, sha256
from tests.strace import require_strace
from tests.waiting import eventually

PATIENCE = 30.0
"""Seconds after which nobody waits any more."""


def _is_published(path: Path, root: Path) -> bool:
    inside = path.relative_to(root).parts
    return path.is_file() and inside[0] not in {".state", "nix-cache-info"}


def on_disk(root: Path) -> Totals:
    """Count what is under its final name, without the help of the code under test."""
    files = [path for path in root.rglob("*") if _is_published(path, root)]
    narinfos = sum(path.parent == root and path.suffix == ".narinfo" for path in files)
    return Totals(sum(path.stat().st_blocks * 512 for path in files), narinfos)


class Box:
    """A store folder with an index, as seen by whoever publishes.

    Attributes:
        failures: What the index said of the database.
    """

    def __init__(self, root: Path) -> None:
        """Make the folders; `open` starts the index."""
        self.layout = Layout(root)
        self.failures: list[str] = []
        for folder in (self.layout.nars, self.layout.root / "log", self.layout.state):
            folder.mkdir(parents=True, exist_ok=True)

    def open(self, limits: Limits = UNLIMITED) -> Index:
        """Start the index."""
        self.index = Index(self.layout, self.failures.append, limits=limits)
        return self.index

    def scanned(self) -> Index:
        """Start the index, and wait until it agrees with the folder."""
        index = self.open()
        assert index.wait_scanned(PATIENCE)
        return index

    def close(self) -> Totals:
        """Stop the index, and return its last word."""
        _bounded(self.index.close)
        return self.index.totals

    def path(self, number: int, size: int, origin: str = "up0") -> None:
        """Put a NAR and its narinfo there, and tell the index."""
        name = nix32(sha256(str(number).encode()))
        self.file(f"nar/{name}.nar", size, origin)
        self.file(f"{name[:32]}.narinfo", size % 2000, origin, f"URL: nar/{name}.nar\n".encode())

    def file(self, name: str, size: int, origin: str = "up0", head: bytes = b"") -> Path:
        """Put a file there, and tell the index."""
        path = self.write(name, size, head)
        self.index.added(path, origin)
        return path

    def write(self, name: str, size: int, head: bytes = b"") -> Path:
        """Put a file there as the publisher does: complete at once, and on the disk."""
        path = self.layout.root / name
        unfinished = self.layout.state / "unfinished"
        with unfinished.open("wb") as file:
            file.write(head + os.urandom(size))
            file.flush()
            os.fsync(file.fileno())
        return unfinished.replace(path)

    def forget_close(self) -> None:
        """Let the closed index look like one that was not closed, as after a crash."""
        with self.database() as database:
            database.execute("UPDATE state SET closed = 0")

    @contextlib.contextmanager
    def database(self) -> Iterator[sqlite3.Connection]:
        """Open the database as a stranger."""
        with contextlib.closing(sqlite3.connect(self.layout.index)) as database, database:
            yield database

    def origins(self) -> dict[str, str]:
        """Return what the closed database says of where files came from."""
        with self.database() as database:
            return dict(database.execute("SELECT name, origin FROM entry"))

    def last_uses(self) -> dict[str, int]:
        """Return what the closed database says of when files were given out."""
        with self.database() as database:
            return dict(database.execute("SELECT name, at FROM used"))


def _bounded(action: Callable[[], object]) -> None:
    """Do something that must not take for ever."""
    thread = threading.Thread(target=action, daemon=True)
    thread.start()
    thread.join(PATIENCE)
    assert not thread.is_alive()


@pytest.fixture
def box(tmp_path: Path) -> Box:
    """Return an empty store folder."""
    return Box(tmp_path)


# --- the totals -------------------------------------------------------------------------------


def test_totals_of_what_was_published(box: Box) -> None:
    """Bytes are what ``du`` counts, paths are narinfos."""
    box.scanned()
    box.path(1, 100_000)
    box.path(2, 10)
    box.file("log/build", 5000)

    assert box.close() == on_disk(box.layout.root)
    assert box.index.totals.paths == 2
    assert box.failures == []


def test_totals_while_open(box: Box) -> None:
    """What was published is counted soon after, and without closing anything."""
    index = box.scanned()
    box.path(1, 100_000)
    eventually(lambda: index.totals == on_disk(box.layout.root))
    box.close()


def test_replaced_file_counts_once(box: Box) -> None:
    """A file that is published again counts as what it is now."""
    box.scanned()
    for size in (50_000, 10, 200_000):
        box.path(1, size)

    assert box.close() == on_disk(box.layout.root)
    assert box.index.totals.paths == 1


def test_closed_index_needs_no_scan(box: Box) -> None:
    """An index that was closed in good order is believed: the folder is not looked at."""
    box.scanned()
    box.path(1, 10_000)
    known = box.close()
    box.write("nar/stranger.nar", 10_000)

    box.scanned()
    assert box.close() == known


def test_vanished_file_is_not_noted(box: Box) -> None:
    """A file that is gone before it could be counted does not count, and is no failure."""
    box.scanned()
    box.index.added(box.layout.nars / "gone.nar", "up0")

    assert box.close() == Totals(0, 0)
    assert box.failures == []


STEPS = st.one_of(
    st.tuples(st.just("path"), st.integers(0, 5), st.integers(0, 60_000)),
    st.tuples(st.just("file"), st.integers(0, 3), st.integers(0, 60_000)),
    st.tuples(st.just("remove"), st.integers(0, 10), st.just(0)),
    st.tuples(
        st.sampled_from(["restart", "crash", "lose", "garble", "truncate"]),
        st.just(0),
        st.just(0),
    ),
)


def _step(box: Box, what: str, number: int, size: int) -> None:
    if what == "path":
        box.path(number, size)
    elif what == "file":
        box.index.used(box.file(f"log/{number}", size))
    else:
        box.close()
        WHILE_CLOSED[what](box, number)
        box.open()


def _remove(box: Box, number: int) -> None:
    """Take away a NAR behind the back of an index that then has reason to look."""
    files = sorted(box.layout.nars.iterdir())
    if files:
        files[number % len(files)].unlink()
    box.forget_close()


WHILE_CLOSED: dict[str, Callable[[Box, int], object]] = {
    "remove": _remove,
    "restart": lambda _box, _number: None,
    "crash": lambda box, _number: box.forget_close(),
    "lose": lambda box, _number: box.layout.index.unlink(),
    "garble": lambda box, _number: box.layout.index.write_bytes(b"not a database" * 1000),
    "truncate": lambda box, _number: _halve(box.layout.index),
}


def _halve(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


@settings(max_examples=40)
@given(st.lists(STEPS, max_size=15))
def test_totals_are_always_right(steps: list[tuple[str, int, int]]) -> None:
    """Whatever is published, replaced, removed and lost: the totals are what is on the disk."""
    with tempfile.TemporaryDirectory() as folder:
        box = Box(Path(folder))
        box.open()
        for step in steps:
            _step(box, *step)
        assert box.index.wait_scanned(PATIENCE)

        assert box.close() == on_disk(box.layout.root)
        assert box.failures == []


# --- rebuilt ----------------------------------------------------------------------------------


def _garbage(index: Path) -> None:
    index.write_bytes(os.urandom(20_000))


def _empty(index: Path) -> None:
    index.write_bytes(b"")


def _truncated(index: Path) -> None:
    os.truncate(index, index.stat().st_size - 4096)


def _damaged(index: Path) -> None:
    """Overwrite all pages but the first one, which says what the others are."""
    with index.open("r+b") as file:
        file.seek(4096)
        file.write(b"\xff" * (index.stat().st_size - 4096))


def _of_the_future(index: Path) -> None:
    with contextlib.closing(sqlite3.connect(index)) as database:
        database.execute("PRAGMA user_version = 999")


def _of_somebody_else(index: Path) -> None:
    index.unlink()
    with contextlib.closing(sqlite3.connect(index)) as database:
        database.execute("CREATE TABLE entry (something TEXT)")
        database.commit()


@pytest.mark.parametrize(
    "damage",
    [Path.unlink, _garbage, _empty, _truncated, _damaged, _of_the_future, _of_somebody_else],
)
def test_unusable_index_is_rebuilt(box: Box, damage: Callable[[Path], None]) -> None:
    """An index that is missing, damaged or of another version is made anew from the folder, for good."""
    box.scanned()
    for number in range(30):
        box.path(number, 3000)
    known = box.close()
    damage(box.layout.index)

    box.scanned()
    assert box.close() == known == on_disk(box.layout.root)
    assert set(box.origins().values()) == {""}  # it is a new one, and it is on the disk
    assert box.failures == []


@pytest.mark.parametrize(
    "missing",
    [
        "DROP TABLE entry; DROP TABLE used; DROP TABLE state",
        "DROP TABLE state",
        "DELETE FROM state",
    ],
    ids=["tables", "state", "row"],
)
def test_index_that_lacks_something_is_rebuilt(box: Box, missing: str) -> None:
    """An index of the right version that is not whole is damaged, and made anew for good."""
    box.scanned()
    box.path(1, 3000)
    known = box.close()
    with box.database() as database:
        database.executescript(missing)

    box.scanned()
    assert box.close() == known
    assert box.failures == []
    assert len(box.origins()) == 2


INDEXING = """
import sys
from pathlib import Path
from proxy.store.eviction import UNLIMITED, Limits
from proxy.store.index import Index
from proxy.store.layout import Layout

index = Index(Layout(Path(sys.argv[1])), sys.exit)
index.wait_scanned(30)
index.close()
"""


@pytest.mark.parametrize("part", range(3))
def test_index_survives_a_crash_at_any_write(tmp_path: Path, part: int) -> None:
    """A kill before any of the writes that make an index leaves one that is taken or made anew."""
    require_strace()
    box = Box(tmp_path / "store")
    box.write("nar/one.nar", 5000)
    writes = _index_under_strace(box, tmp_path / "calls")
    assert writes > 5

    for write in range(1 + part, writes + 1, 3):
        shutil.rmtree(box.layout.state)
        box.layout.state.mkdir()
        assert _index_under_strace(box, tmp_path / "calls", kill_at=write) == write

        box.scanned()
        assert box.close() == on_disk(box.layout.root)
        assert box.failures == [], f"killed at write {write} of {writes}"
        assert len(box.origins()) == 1


def _index_under_strace(box: Box, log: Path, *, kill_at: int | None = None) -> int:
    """Open and close the index in a process of its own, and return how often it wrote."""
    inject = [] if kill_at is None else ["-e", f"inject=pwrite64:signal=KILL:when={kill_at}"]
    options = ["strace", "-f", "-o", str(log), "-e", "trace=pwrite64", *inject]
    subprocess.run(
        [*options, sys.executable, "-c", INDEXING, str(box.layout.root)],
        check=kill_at is None,
        timeout=PATIENCE,
        cwd=Path(__file__).parents[2],
    )
    return sum(" pwrite64(" in line for line in log.read_text().splitlines())


def test_last_use_and_origin_survive_a_rescan(box: Box) -> None:
    """What the folder cannot say is kept when the folder is looked at again."""
    box.scanned()
    box.path(1, 3000, "up0")
    box.path(2, 3000, "up1")
    box.file("log/1", 10, "up2")
    box.close()
    origins = box.origins()
    with box.database() as database:
        database.execute("UPDATE used SET at = 12345 WHERE name LIKE 'log/%'")
    box.forget_close()

    box.scanned()
    box.close()
    assert box.origins() == origins
    assert sorted(origins.values()) == ["up0", "up0", "up1", "up1", "up2"]
    assert box.last_uses()["log/1"] == 12345


def test_rescan_forgets_the_use_of_what_is_gone(box: Box) -> None:
    """A file that was taken away is not looked for again whenever something is to be evicted."""
    box.scanned()
    gone = box.file("log/1", 10)
    box.file("log/2", 10)
    box.close()
    gone.unlink()
    box.forget_close()

    box.scanned()
    box.close()
    assert set(box.last_uses()) == {"log/2"}


def test_last_use(box: Box) -> None:
    """The time at which a client was last given a file is noted."""
    box.scanned()
    path = box.file("log/1", 10)
    box.close()
    with box.database() as database:
        database.execute("UPDATE used SET at = 12345")
    before = int(time.time())
    box.scanned()
    box.index.used(path)
    box.close()

    assert before <= box.last_uses()["log/1"] <= time.time()


def test_origin_of_a_file_published_meanwhile(box: Box) -> None:
    """What is published during a scan keeps the origin that was told, not the one that was before."""
    box.scanned()
    box.path(1, 3000, "before")
    box.close()
    box.forget_close()

    box.open()
    box.path(1, 5000, "after")
    assert box.index.wait_scanned(PATIENCE)
    assert box.close() == on_disk(box.layout.root)
    assert set(box.origins().values()) == {"after"}


def test_rescan_forgets_old_narinfos(box: Box) -> None:
    """A start that looks at the folder also forgets narinfos that Nix remembers no longer."""
    old = _remember(box, age=10_000 * 24 * 3600)
    young = _remember(box, age=3600)
    box.scanned()
    box.close()

    assert (old.exists(), young.exists()) == (False, True)


def test_clean_start_forgets_old_narinfos(box: Box) -> None:
    """A daemon that is always stopped in good order does not remember narinfos for ever either."""
    box.scanned()
    box.close()
    old = _remember(box, age=10_000 * 24 * 3600)
    young = _remember(box, age=3600)
    box.scanned()
    box.close()

    assert (old.exists(), young.exists()) == (False, True)


def _remember(box: Box, *, age: float) -> Path:
    path = box.layout.remembered / "up0" / f"{age}.narinfo"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    os.utime(path, (time.time() - age, time.time() - age))
    return path


# --- while serving ----------------------------------------------------------------------------


def _fill(box: Box, count: int) -> None:
    for number in range(count):
        (box.layout.nars / f"{number}.nar").write_bytes(b"x")


@contextlib.contextmanager
def _held_up(box: Box) -> Iterator[None]:
    """Hold the database's lock, so that the index cannot get anywhere meanwhile."""
    with contextlib.closing(sqlite3.connect(box.layout.index, isolation_level=None)) as database:
        database.execute("CREATE TABLE anything (a)")
        database.execute("BEGIN EXCLUSIVE")
        yield
        database.rollback()


def test_start_does_not_wait_for_the_scan(box: Box) -> None:
    """With 20,000 files there, the index is open before it knows them, takes notes, and then knows all."""
    _fill(box, 20_000)
    with _held_up(box):
        index = box.open()
        assert not index.wait_scanned(0)
        assert index.totals == Totals(0, 0)
        box.path(1, 5000)
    assert index.wait_scanned(PATIENCE)

    assert box.close() == on_disk(box.layout.root)
    assert box.failures == []


def test_notes_keep_coming_during_a_scan(box: Box) -> None:
    """What several threads publish while the folder is looked at is counted once, as they said."""
    _fill(box, 6000)
    index = box.open()

    def publish(worker: int) -> None:
        for number in range(400):
            index.used(_publish_some(box, f"nar/{worker}-{number}.nar", number * 10))

    workers = [threading.Thread(target=publish, args=(each,)) for each in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(PATIENCE)
    assert index.wait_scanned(PATIENCE)

    assert box.close() == on_disk(box.layout.root)
    published = [origin for name, origin in box.origins().items() if "-" in name]
    assert published == ["up0"] * 1200


def _publish_some(box: Box, name: str, size: int) -> Path:
    unfinished = box.layout.state / name.rpartition("/")[2]
    unfinished.write_bytes(b"x" * size)
    path = unfinished.replace(box.layout.root / name)
    box.index.added(path, "up0")
    return path


def test_close_during_a_scan(box: Box) -> None:
    """A scan does not hold up closing, and an unfinished one is begun again at the next start."""
    _fill(box, 6000)
    box.open()
    box.close()

    box.scanned()
    assert box.close() == on_disk(box.layout.root)
    assert box.failures == []


# --- failures ---------------------------------------------------------------------------------


def test_index_that_cannot_be_opened(box: Box) -> None:
    """Without a database the index goes on in memory: one report, and the counts are right."""
    box.write("nar/before.nar", 10_000)
    box.layout.index.mkdir()
    box.scanned()
    box.path(1, 5000)

    assert box.close() == on_disk(box.layout.root)
    assert len(box.failures) == 1
    assert box.layout.index.is_dir()


def test_index_that_fails_later(box: Box) -> None:
    """A database that fails while it is used is given up: one report, and the counts are right."""
    box.scanned()
    box.path(1, 5000)
    with box.database() as database:
        database.execute("DROP TABLE entry")
    for number in range(2, 6):
        box.path(number, 5000)
    eventually(lambda: box.failures)
    assert box.index.wait_scanned(PATIENCE)
    box.path(7, 5000)

    assert box.close() == on_disk(box.layout.root)
    assert len(box.failures) == 1


def test_folder_that_cannot_be_read(box: Box) -> None:
    """A folder that refuses to be looked at is reported once; what is published still counts."""
    (box.layout.root / "realisations").touch()  # where a folder should be
    box.open()
    nar = box.file("nar/one.nar", 5000)
    eventually(lambda: box.index.totals.bytes)
    assert box.index.totals.bytes == nar.stat().st_blocks * 512
    assert box.close().bytes == nar.stat().st_blocks * 512
    assert len(box.failures) == 1


@pytest.mark.parametrize("made", [True, False], ids=["sound", "unusable"])
def test_close_at_once(box: Box, *, made: bool) -> None:
    """Closing right after opening ends, whatever state the database is in."""
    if not made:
        box.layout.index.mkdir()
    for _ in range(20):
        box.open()
        box.close()


# --- the room -----------------------------------------------------------------------------------


def test_room_of_an_unlimited_store(box: Box) -> None:
    """Without limits there is room for what the disk has."""
    index = box.open()
    eventually(lambda: index.room > 0)
    disk = os.statvfs(box.layout.root)
    box.close()

    assert 0 < index.room <= disk.f_blocks * disk.f_frsize


def test_room_grows_and_shrinks(box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    """Room is what is left of the size at which eviction begins; what is published takes it."""
    monkeypatch.setattr(room_module, "overhead", lambda _layout: 0)
    limits = Limits(max_size=1_000_000)
    index = box.open(limits)
    eventually(lambda: index.room == 950_000)
    box.path(1, 300_000)
    eventually(lambda: index.totals.bytes > 0)
    eventually(lambda: index.room == 950_000 - index.totals.bytes)
    box.close()

    assert index.totals == on_disk(box.layout.root)


def test_no_room_before_the_folder_is_known(box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    """A store of which nobody knows yet how full it is, after a crash, has no room."""
    monkeypatch.setattr(room_module, "overhead", lambda _layout: 0)
    monkeypatch.setattr(index_module, "SLICE", 1)
    box.scanned()
    for number in range(40):
        box.path(number, 20_000)
    totals = box.close()
    box.forget_close()
    index = box.open(Limits(max_size=2_000_000))
    rooms = {index.room}
    while not index.wait_scanned(0):
        rooms.add(index.room)
    eventually(lambda: index.room > 0)
    box.close()

    assert index.room == 1_900_000 - totals.bytes
    assert rooms <= {0, index.room}


def test_room_after_a_restart(box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is in the store counts from the start."""
    monkeypatch.setattr(room_module, "overhead", lambda _layout: 0)
    box.scanned()
    box.path(1, 300_000)
    totals = box.close()
    index = box.open(Limits(max_size=1_000_000))
    eventually(lambda: index.room > 0)
    assert index.room == 950_000 - totals.bytes
    box.close()


def test_no_room_beyond_the_limits(box: Box) -> None:
    """A store that is over its limit, or a disk with less free than it must have, has no room."""
    box.scanned()
    box.path(1, 300_000)
    box.close()
    disk = os.statvfs(box.layout.root)
    for limits in (Limits(max_size=300_000), Limits(min_free=disk.f_blocks * disk.f_frsize)):
        index = box.open(limits)
        assert index.wait_scanned(PATIENCE)
        assert index.room == 0
        box.close()


def test_a_folder_that_vanishes_has_no_room(box: Box) -> None:
    """When the store is gone nothing can be kept in it."""
    index = box.open()
    eventually(lambda: index.room > 0)
    shutil.rmtree(box.layout.root)
    eventually(lambda: index.room == 0)
    box.close()


def test_narinfo_that_comes_while_its_nar_is_evicted(
    box: Box, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A narinfo that is published between the removal of narinfo and NAR goes, too."""
    box.scanned()
    box.path(1, 200_000)
    box.close()
    leads_to = room_module.Room._leads_to

    def too_early(room: room_module.Room, narinfo: str, nar: str) -> bool:
        return not (box.layout.root / nar).exists() and leads_to(room, narinfo, nar)

    monkeypatch.setattr(room_module.Room, "_leads_to", too_early)
    box.open(Limits(max_size=100_000))

    assert box.close() == Totals(0, 0) == on_disk(box.layout.root)
