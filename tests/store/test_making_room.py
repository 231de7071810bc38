"""Making room: what goes, what never does, and what the numbers are compared with, which is du."""

from __future__ import annotations

import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proxy.errors import StoreError
from proxy.nix.store_path import HashPart
from proxy.store import index, room
from proxy.store.database import Database, Totals
from proxy.store.eviction import HIGH, UNLIMITED, Candidate, Limits
from proxy.store.files import OpenFile, Partial, disk_usage, in_use
from proxy.store.index import Index
from proxy.store.layout import Layout
from proxy.store.leftovers import Leftovers, Origin
from tests.closures import nix32, sha256

PATIENCE = 20.0


class Folder:
    """A store folder with an index, in which paths are put by their numbers."""

    def __init__(
        self, root: Path, limits: Limits = UNLIMITED, pinned: Collection[int] = ()
    ) -> None:
        """Make the folders and start the index."""
        self.layout = Layout(root)
        self.evicted: list[str] = []
        for folder in (self.layout.nars, self.layout.partials, self.layout.remembered):
            folder.mkdir(parents=True, exist_ok=True)
        self.index = Index(
            self.layout,
            pytest.fail,
            limits=limits,
            on_evicted=lambda name, _size: self.evicted.append(name),
            pinned=[hash_part(number) for number in pinned],
        )
        assert self.index.wait_scanned(PATIENCE)  # no scan meets a file that is half written

    def put(self, number: int, size: int, use: Callable[[Path], object] = id) -> None:
        """Put a path there, and begin to ``use`` its NAR before the index knows of it."""
        name = nar(number)
        narinfo = self.layout.root / f"{hash_part(number)}.narinfo"
        path = self.layout.root / name
        path.write_bytes(os.urandom(size))
        with _opened(path):  # as who publishes has it
            use(path)
            narinfo.write_text(f"URL: {name}\n")
            for each in (path, narinfo):
                self.index.added(each, "up0")

    def has(self, number: int) -> bool:
        """Tell whether a path is there, which is whole or not at all."""
        there = {
            (self.layout.root / nar(number)).exists(),
            (self.layout.root / f"{hash_part(number)}.narinfo").exists(),
        }
        assert len(there) == 1
        return there.pop()

    def settled(self) -> Totals:
        """Wait until everything noted so far is taken in and nothing more is evicted."""
        while True:
            before = len(self.evicted)
            for _ in range(3):
                self.index.ask(lambda _database: None).result(PATIENCE)
            if len(self.evicted) == before:
                return self.index.totals

    def settle_used(self, number: int, at: int) -> None:
        """Let the index believe that a path was used at some time."""
        self.index.ask(lambda database: database.use([(nar(number), at)])).result(PATIENCE)


@contextmanager
def folder(limits: Limits = UNLIMITED, pinned: Collection[int] = ()) -> Iterator[Folder]:
    """Make a folder for a while."""
    with tempfile.TemporaryDirectory() as root:
        opened = Folder(Path(root), limits, pinned)
        try:
            yield opened
        finally:
            opened.index.close()


def hash_part(number: int) -> HashPart:
    """Return the hash part of a path."""
    return HashPart(nix32(sha256(str(number).encode()))[:32])


def nar(number: int) -> str:
    """Return the name of a path's NAR."""
    return f"nar/{hash_part(number)}-{nix32(sha256(b'nar'))}.nar"


def cached(layout: Layout) -> int:
    """Return how much the cached files take, in the words of du(1)."""
    files = [str(path) for path in layout.root.glob("*.narinfo")] + [str(layout.nars)]
    said = subprocess.run(
        ["du", "--summarize", "--total", "--block-size=1", *files],
        capture_output=True,
        check=True,
        text=True,
    )
    folder = layout.nars.stat().st_blocks * 512
    return int(said.stdout.splitlines()[-1].split()[0]) - folder


def du_of_all(layout: Layout) -> int:
    """Return what du(1) says of the whole folder."""
    said = subprocess.run(
        ["du", "--summarize", "--block-size=1", str(layout.root)],
        capture_output=True,
        check=True,
        text=True,
    )
    return int(said.stdout.split()[0])


def test_a_narinfo_that_is_gone_before_its_nar_is_not_counted() -> None:
    """Whoever took it away, it counts no longer than its NAR."""
    with folder() as there:
        there.put(1, 10_000)
        there.settled()
        (there.layout.root / f"{hash_part(1)}.narinfo").unlink()

        assert there.index.evict([nar(1)]).result(PATIENCE) == [nar(1)]
        assert there.settled() == Totals(0, 0)


def test_what_is_evicted_while_it_is_noted_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """A narinfo that goes with its NAR between the look at it and the note of it leaves nothing."""

    def evicted_meanwhile(status: os.stat_result) -> int:
        """Evict the NAR of a path as soon as somebody has looked at its narinfo."""
        monkeypatch.undo()
        there.index.added(path, "up0")
        assert there.index.evict([nar(1)]).result(PATIENCE) == [nar(1)]
        return disk_usage(status)

    with folder() as there:
        path = there.layout.root / nar(1)
        path.write_bytes(bytes(10_000))
        narinfo = there.layout.root / f"{hash_part(1)}.narinfo"
        narinfo.write_text(f"URL: {nar(1)}\n")
        monkeypatch.setattr(index, "disk_usage", evicted_meanwhile)
        assert there.index.added(narinfo, "up0")

        assert not narinfo.exists()
        assert there.settled() == Totals(0, 0)


NUMBERS = st.integers(0, 30)


@given(
    paths=st.dictionaries(NUMBERS, st.integers(0, 300_000), min_size=5, max_size=25),
    pinned=st.sets(NUMBERS, max_size=8),
    read=st.sets(NUMBERS, max_size=4),
    written=st.sets(NUMBERS, max_size=2),
    limit=st.integers(1_000_000, 3_000_000),
)
@settings(max_examples=12)
def test_what_is_pinned_or_in_use_stays(
    paths: dict[int, int], pinned: set[int], read: set[int], written: set[int], limit: int
) -> None:
    """What is pinned, read or written is never evicted, the rest only as needed; du says the same."""
    with ExitStack() as stack:
        there = stack.enter_context(folder(Limits(max_size=limit), pinned))

        def reading(path: Path) -> None:
            stack.enter_context(_opened(path))

        def writing(path: Path) -> None:
            path.unlink()
            unfinished = Partial(path)
            stack.callback(unfinished.close)
            unfinished.append(bytes(1_000))

        for number, size in paths.items():
            use = reading if number in read else writing if number in written else id
            there.put(number, size, use)
        there.settled()

        def look(database: Database) -> tuple[set[int], Totals, Totals]:
            """On the index's thread, so that nothing is evicted meanwhile."""
            kept = {number for number in paths if there.has(number)}
            return kept, database.totals, Totals(cached(there.layout), len(kept))

        kept, counted, said = there.index.ask(look).result(PATIENCE)
        used = pinned | read | written

        assert kept >= paths.keys() & used
        assert counted == said
        names = [there.layout.root / nar(number) for number in kept - used]
        _eventually(
            lambda: du_of_all(there.layout) <= limit or not any(path.exists() for path in names)
        )


def test_the_folder_stays_below_its_limit() -> None:
    """Index, downloads and remembered narinfos count, too: du of the whole folder obeys max_size."""
    limit = 3_000_000
    with folder(Limits(max_size=limit)) as there:
        download = Partial(there.layout.partials / "1")
        download.append(bytes(500_000))
        for number in range(100):
            there.put(number, 50_000)
            there.settled()
            assert du_of_all(there.layout) <= limit
        download.discard()

        assert du_of_all(there.layout) > limit / 2
        assert len(there.evicted) > 40


def test_unfinished_downloads_go_first() -> None:
    """What was left unfinished makes room before anything whole, the oldest first; never one in work."""
    with folder(Limits(max_size=3_000_000)) as there:
        leftovers = Leftovers(there.layout.partials)
        downloads = {}
        for age, name in enumerate(("new", "old", "in-work")):
            downloads[name] = leftovers.start(name, Origin("up0", None, None, None))
            downloads[name].append(bytes(400_000))
            os.utime(downloads[name].path, (0, 2_000 - age))
        for name in ("new", "old"):
            downloads[name].close()
            leftovers.left(downloads[name])
        there.put(1, 1_300_000)
        there.put(2, 400_000)
        there.settled()
        assert there.evicted == [".state/partial/old.part"]
        assert sorted(path.name for path in there.layout.partials.iterdir()) == [
            "in-work.from",
            "in-work.part",
            "new.from",
            "new.part",
        ]
        there.put(3, 400_000)
        there.settled()
        assert there.evicted[1:] == [".state/partial/new.part"]
        assert leftovers.take("old") is None
        assert (there.layout.partials / "in-work.part").exists()
        assert there.index.measure().result(PATIENCE)[0] == du_of_all(there.layout)
        downloads["in-work"].discard()


def test_least_recently_used_goes_first() -> None:
    """The order is that of the last use, and reading a narinfo is one."""
    with folder(Limits(max_size=4_000_000)) as there:
        for number in range(10):
            there.put(number, 200_000)
            there.settle_used(number, 1_000 + number)
        there.index.used_paths([hash_part(0)])
        there.put(10, 2_000_000)
        there.settled()

        assert there.has(0)
        assert there.evicted[:3] == [nar(1), nar(2), nar(3)]


def test_a_reader_gone_is_a_reader_no_more() -> None:
    """What somebody read can be evicted when the last descriptor is closed."""
    with folder(Limits(max_size=1_500_000)) as there:
        there.put(1, 700_000)
        file = _opened(there.layout.root / nar(1))
        there.settle_used(1, 1_000)
        there.put(2, 700_000)
        there.settled()
        assert there.has(1)
        with file, OpenFile(os.dup(file.fd), file.size):
            pass
        _eventually(lambda: there.settled().bytes and nar(1) in there.evicted)


def test_pins_can_change() -> None:
    """What is unpinned can be evicted at once; what is pinned no more."""
    with folder(Limits(max_size=1_500_000), pinned=[1, 2]) as there:
        there.put(1, 700_000)
        there.put(2, 700_000)
        there.settled()
        assert there.evicted == []
        there.index.pin([hash_part(2)]).result(PATIENCE)
        _eventually(lambda: there.settled().bytes and there.evicted == [nar(1)])


def test_only_what_can_go_is_evicted_on_demand() -> None:
    """An operator's choice is evicted but for what was pinned, opened or has gone meanwhile."""
    with folder(pinned=[1]) as there:
        for number in range(4):
            there.put(number, 10_000)
        there.settled()
        with _opened(there.layout.root / nar(2)):
            gone = there.index.evict([nar(number) for number in range(5)]).result(PATIENCE)
        totals = there.settled()

        assert gone == [nar(0), nar(3)]
        assert totals == Totals(cached(there.layout), 2)


def test_pages_of_the_oldest() -> None:
    """Going through all candidates page by page shows each once, in order."""
    with folder(pinned=[3]) as there:
        for number in range(10):
            there.put(number, 100)
            there.settle_used(number, 1_000 + number // 4)
        seen: list[str] = []
        last: Candidate | None = None
        while True:
            page = there.index.ask(partial(Database.oldest, most=3, after=last)).result(PATIENCE)
            if not page:
                break
            seen += [each.name for each in page]
            last = page[-1]

        order = sorted((n for n in range(10) if n != 3), key=lambda n: (n // 4, nar(n)))
        assert seen == [nar(number) for number in order]


def test_remembered_narinfos_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Narinfos of paths that are not here take a part of the limit; the oldest are forgotten."""
    monkeypatch.setattr(room, "REMEMBERED", 10 * 4096)
    with folder() as there:
        place = there.layout.remembered / "up0"
        place.mkdir()
        for number in range(30):
            path = place / f"{hash_part(number)}.narinfo"
            path.write_bytes(b"x" * 1_000)
            os.utime(path, (time.time() - 100 + number,) * 2)
            there.index.remembered(path)
            there.settled()
        left = {path.name for path in place.iterdir()}

        assert 5 <= len(left) <= 10
        assert left == {f"{hash_part(number)}.narinfo" for number in range(30 - len(left), 30)}


def test_who_asks_too_late_is_told() -> None:
    """A question that comes while the index is being closed gets an error, not silence."""
    with folder() as there:
        there.index.close()
        future = there.index.ask(lambda _database: None)
        with pytest.raises(StoreError):
            future.result(PATIENCE)


def test_a_question_that_fails_harms_nobody() -> None:
    """An answer that cannot be given is an error of ours, and the index goes on."""
    with folder() as there:
        with pytest.raises(StoreError, match="does not answer"):
            there.index.ask(lambda _database: 1 // 0).result(PATIENCE)
        there.put(1, 100)
        assert there.settled().paths == 1


def test_the_locks_of_files_do_not_outlive_them(tmp_path: Path) -> None:
    """A file is in use while any descriptor of its reader or writer is open, and not after."""
    path = tmp_path / "file"
    assert not in_use(path)
    writer = Partial(path)
    reader = writer.reader()
    assert in_use(path)
    writer.close()
    assert in_use(path)
    os.close(reader)
    assert not in_use(path)
    with _opened(path) as file:
        assert in_use(path)
        file.close()
        assert not in_use(path)


def _opened(path: Path) -> OpenFile:
    file = OpenFile.at(path)
    assert file is not None
    return file


def _eventually(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_the_mark_at_which_it_begins() -> None:
    """Below the high mark nothing is evicted."""
    limit = 4_000_000
    with folder(Limits(max_size=limit)) as there:
        number = 0
        while du_of_all(there.layout) + 300_000 < limit * HIGH:
            there.put(number, 200_000)
            there.settled()
            number += 1
        assert number > 10
        assert there.evicted == []
