"""The publisher: what gets a final name is on the disk, in the right order, many at a time."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from proxy.errors import StoreError
from proxy.events import ignore
from proxy.nix.cache_info import CacheInfo
from proxy.store.folder import Store
from proxy.store.publisher import BATCH, Publication, Rename
from tests.closures import StoreEntry
from tests.store.publishing import PATIENCE, HeldPublisher, failures, nar_name, publish
from tests.strace import Call, require_strace, trace

PUBLISHING = (sys.executable, "-m", "tests.store.publishing")


def _flushes(calls: list[Call], path: str | Path) -> list[Call]:
    return [call for call in calls if call.name == "fsync" and call.paths == (str(path),)]


def _rename_to(calls: list[Call], target: str | Path) -> Call:
    (rename,) = [call for call in calls if call.name == "rename" and call.paths[-1] == str(target)]
    return rename


# --- the order --------------------------------------------------------------------------------


def test_order_of_flushes_and_renames(tmp_path: Path) -> None:
    """Each file is on the disk before its name, the NAR's name before the narinfo's, and that at last."""
    require_strace()
    store = tmp_path / "store"
    calls, failed = trace(tmp_path / "calls", (*PUBLISHING, "closure", str(store), "5"))

    narinfos = list(store.glob("*.narinfo"))
    assert (json.loads(failed), len(narinfos)) == ({}, 5)
    for narinfo in narinfos:
        (nar,) = (store / "nar").glob(f"{narinfo.stem}-*")
        named, described = _rename_to(calls, nar), _rename_to(calls, narinfo)
        for rename in (named, described):
            (flush,) = _flushes(calls, rename.paths[0])
            assert flush.before(rename)
        assert any(
            named.before(flush) and flush.before(described)
            for flush in _flushes(calls, store / "nar")
        )
        assert any(described.before(flush) for flush in _flushes(calls, store))


def test_a_batch_shares_its_folder_flushes(tmp_path: Path) -> None:
    """A hundred NARs that wait together cost one flush of each folder, and one of each file."""
    require_strace()
    calls, failed = trace(tmp_path / "calls", (*PUBLISHING, "batch", str(tmp_path), "100"))

    store = tmp_path / "store"
    (held_up, *_) = _flushes(calls, store)  # that of the publication which holds up the others
    batch = [call for call in calls if held_up.before(call)]
    assert json.loads(failed) == {}
    assert len(list(store.glob("*.narinfo"))) == 100
    assert len(_flushes(batch, store / "nar")) == 1
    # One for the file that is not a NAR, and has its name in the first stage; one for the narinfos.
    assert len(_flushes(batch, store)) == 2
    assert len([call for call in batch if call.name == "fsync"]) == 2 * 100 + 1 + 3


# --- what fails -------------------------------------------------------------------------------


def test_a_failed_flush_gives_up_that_publication(tmp_path: Path) -> None:
    """A file that the disk does not take is never renamed nor flushed again; the others go on."""
    require_strace()
    bad = tmp_path / "partial" / "3.nar"
    calls, failed = trace(
        tmp_path / "calls",
        (*PUBLISHING, "batch", str(tmp_path), "6"),
        only=bad,
        inject="fsync:error=EIO",
    )

    assert list(json.loads(failed)) == ["3.nar"]
    assert [(call.name, call.result[:6]) for call in calls] == [("fsync", "-1 EIO")]
    assert _names(tmp_path / "store") == {f"{n}.narinfo" for n in (0, 1, 2, 4, 5)} | _OTHERS
    assert _names(tmp_path / "store" / "nar") == {f"{n}.nar" for n in (0, 1, 2, 4, 5)}
    assert _names(tmp_path / "partial") == set()


def test_a_failed_flush_of_the_narinfo_gives_up_the_nar(tmp_path: Path) -> None:
    """When the narinfo cannot be flushed its NAR is not published either."""
    require_strace()
    _, failed = trace(
        tmp_path / "calls",
        (*PUBLISHING, "batch", str(tmp_path), "2"),
        only=tmp_path / "partial" / "1.narinfo",
        inject="fsync:error=EIO",
    )

    assert list(json.loads(failed)) == ["1.nar"]
    assert _names(tmp_path / "store" / "nar") == {"0.nar"}


def test_a_failed_flush_of_the_nar_folder_withholds_the_narinfos(tmp_path: Path) -> None:
    """No narinfo gets its name when the names of the NARs may not be on the disk."""
    require_strace()
    _, failed = trace(
        tmp_path / "calls",
        (*PUBLISHING, "batch", str(tmp_path), "4"),
        only=tmp_path / "store" / "nar",
        inject="fsync:error=EIO",
    )

    assert set(json.loads(failed)) == {f"{n}.nar" for n in range(4)}
    assert _names(tmp_path / "store") == _OTHERS
    assert _names(tmp_path / "partial") == set()


_OTHERS = {"nar", "first", "alone"}


def _names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def _without_source(held: HeldPublisher) -> Publication:
    publication = held.nar("bad")
    Path(publication.renames[0].source).unlink()
    return publication


def _without_narinfo(held: HeldPublisher) -> Publication:
    publication = held.nar("bad")
    Path(publication.renames[1].source).unlink()
    return publication


def _without_folder(held: HeldPublisher) -> Publication:
    publication = held.nar("bad")
    nar, narinfo = publication.renames
    return replace(publication, renames=(Rename(nar.source, f"{held.root}/no/bad"), narinfo))


def _below_a_file(held: HeldPublisher) -> Publication:
    publication = held.nar("bad")
    nar, narinfo = publication.renames
    below = held.root / "first" / "bad"
    return replace(publication, renames=(Rename(nar.source, str(below)), narinfo))


def _onto_a_folder(held: HeldPublisher) -> Publication:
    publication = held.nar("bad")
    Path(publication.renames[0].target, "occupied").mkdir(parents=True)
    return publication


@pytest.mark.parametrize(
    "make_bad",
    [_without_source, _without_narinfo, _without_folder, _below_a_file, _onto_a_folder],
)
def test_one_failure_is_one_failure(
    tmp_path: Path, make_bad: Callable[[HeldPublisher], Publication]
) -> None:
    """What cannot be published is given up whole, with a reason; the rest of its batch is published."""
    with HeldPublisher(tmp_path) as held:
        good = [held.nar(f"{number}") for number in range(4)]
        bad = make_bad(held)
        held.publish(*good[:2], bad, *good[2:])

    reasons = failures(*good, bad)
    assert len(reasons) == 1
    assert next(iter(reasons.values())).startswith("cannot keep bad")
    assert isinstance(bad.done.exception(), StoreError)
    assert held.published == good
    assert {path.stem for path in held.root.glob("*.narinfo")} == {"0", "1", "2", "3"}
    assert _names(held.partials) == set()


def test_narinfo_that_cannot_be_named(tmp_path: Path) -> None:
    """A NAR whose narinfo finds its name taken is reported as failed, and nothing is left behind."""
    with HeldPublisher(tmp_path) as held:
        bad, good = held.nar("bad"), held.nar("good")
        Path(bad.renames[1].target).mkdir()
        held.publish(bad, good)

    assert set(failures(bad, good)) == {"bad.nar"}
    assert held.published == [good]
    assert _names(held.partials) == set()


# --- life -------------------------------------------------------------------------------------


def test_superseded_files_go_after_success_only(tmp_path: Path) -> None:
    """What a publication makes useless is removed when it succeeds, and kept when it does not."""
    with HeldPublisher(tmp_path) as held:
        old = {name: tmp_path / name for name in ("good", "bad")}
        for path in old.values():
            path.touch()
        good = replace(held.nar("good"), superseded=(str(old["good"]),))
        bad = replace(_without_source(held), superseded=(str(old["bad"]),))
        held.publish(good, bad)

    assert (old["good"].exists(), old["bad"].exists()) == (False, True)


def test_close_publishes_what_is_queued(tmp_path: Path) -> None:
    """Closing waits for everything submitted before it, also for more than one batch holds."""
    with HeldPublisher(tmp_path) as held, ThreadPoolExecutor(1) as executor:
        queued = [held.nar(f"{number}") for number in range(BATCH + 10)]
        held.submit(*queued)
        closing = executor.submit(held.publisher.close)
        held.release()
        closing.result(PATIENCE)

        assert held.published == queued
        assert all(each.done.done() for each in queued)
        assert failures(*queued) == {}


def test_the_latest_of_equal_names_wins(tmp_path: Path) -> None:
    """Two publications of one name in one batch both succeed; the later one stays."""
    with HeldPublisher(tmp_path) as held:
        first = held.nar("same")
        second = replace(
            first,
            renames=tuple(Rename(f"{each.source}-again", each.target) for each in first.renames),
            done=type(first.done)(),
        )
        for each in second.renames:
            Path(each.source).write_text("second")
        held.publish(first, second)

    assert failures(first, second) == {}
    assert [Path(each.target).read_text() for each in second.renames] == ["second", "second"]


async def test_cancelled_waiter(tmp_path: Path) -> None:
    """Who waits for a publication may leave: it is published all the same, and so are later ones."""
    store = Store(tmp_path, CacheInfo(), ignore)
    left, later = StoreEntry.make("left-1"), StoreEntry.make("later-1")
    waiter = asyncio.create_task(publish(store, left))
    await asyncio.sleep(0)  # it has submitted, and waits
    waiter.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await waiter
    await asyncio.wait_for(publish(store, later), PATIENCE)
    await store.close()

    assert waiter.cancelled()
    for entry in (left, later):
        assert (tmp_path / "nar" / str(nar_name(entry))).read_bytes() == bytes(entry.file)
        assert (tmp_path / entry.narinfo_path.lstrip("/")).exists()
