"""The store: one folder, one daemon, a binary cache that Nix reads without us."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from proxy.errors import StoreError, StoreLockedError
from proxy.events import Event, Published, StoreChanged, StoreFailed
from proxy.nix.cache_info import CacheInfo
from proxy.nix.store_path import HashPart
from proxy.store import publisher
from proxy.store.folder import Store
from proxy.store.publisher import Publication
from proxy.store.reader import is_there
from tests.closures import StoreEntry, closure
from tests.daemon import DaemonProcess
from tests.nix_client import NixClient
from tests.small_disk import fill, make_read_only, remount, small_disk, unmount
from tests.store.publishing import KEY, PATIENCE, nar_name, narinfo_text, publish
from tests.store.test_index import on_disk

HASH = HashPart("0123456789abcdfghijklmnpqrsvwxyz")


class Opened:
    """Stores that a test has opened; closed at its end.

    Attributes:
        events: What they reported.
    """

    def __init__(self) -> None:
        self.events: list[Event] = []
        self._stores: list[Store] = []

    def __call__(self, root: Path) -> Store:
        """Open a store."""
        store = Store(root, CacheInfo(), self.events.append)
        self._stores.append(store)
        return store

    async def close(self) -> None:
        """Close all of them, and let the last reports arrive."""
        while self._stores:
            await self._stores.pop().close()
        await asyncio.sleep(0)


@pytest.fixture
async def opened() -> AsyncIterator[Opened]:
    """Return what opens a store that is closed after the test."""
    stores = Opened()
    yield stores
    await stores.close()


def _names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


# --- a binary cache ---------------------------------------------------------------------------


async def test_new_store_is_a_binary_cache(tmp_path: Path, opened: Opened) -> None:
    """The folder is made, with a ``nix-cache-info`` that says what it was told."""
    opened(tmp_path / "new" / "store")

    text = (tmp_path / "new" / "store" / "nix-cache-info").read_bytes()
    assert text == CacheInfo().format()
    assert b"StoreDir: /nix/store\n" in text


async def test_cache_info_follows_the_configuration(tmp_path: Path, opened: Opened) -> None:
    """A store that is opened again says what it is told this time."""
    opened(tmp_path)
    await opened.close()
    store = Store(tmp_path, CacheInfo(priority=7), opened.events.append)
    await store.close()

    assert b"Priority: 7\n" in (tmp_path / "nix-cache-info").read_bytes()


async def test_published_nar_is_there(tmp_path: Path, opened: Opened) -> None:
    """What was published is there when the wait is over, and is reported and counted."""
    entry = StoreEntry.make("one-1")
    store = opened(tmp_path)
    await publish(store, entry, origin="up1")

    assert store.narinfo(HashPart(entry.hash_part)) == narinfo_text(entry)
    assert store.has_narinfo(HashPart(entry.hash_part))
    assert store.has_nar(nar_name(entry))
    with store.open_nar(nar_name(entry)) or pytest.fail("absent") as file:
        assert os.pread(file.fd, file.size + 1, 0) == bytes(entry.file)
    await opened.close()
    assert opened.events == [Published(str(nar_name(entry)), "up1")]
    assert store.totals == on_disk(tmp_path)
    assert store.totals.paths == 1


async def test_nothing_is_there_before_it_is_published(tmp_path: Path, opened: Opened) -> None:
    """A file on its way has no final name, and what was never published is absent."""
    entry = StoreEntry.make("one-1")
    store = opened(tmp_path)
    partial = store.partial()
    partial.append(bytes(entry.file))

    assert store.narinfo(HashPart(entry.hash_part)) is None
    assert not store.has_narinfo(HashPart(entry.hash_part))
    assert not store.has_nar(nar_name(entry))
    assert store.open_nar(nar_name(entry)) is None
    assert store.open_file(f"log/{entry.base_name}.drv") is None
    assert list(store.layout.nars.iterdir()) == []
    partial.discard()


async def test_many_at_once(tmp_path: Path, opened: Opened) -> None:
    """Hundreds of publications at the same time are all there, whole, and leave nothing behind."""
    entries = closure(300, sizes=(10, 2000), compressions=("none",))
    store = opened(tmp_path)
    await asyncio.gather(*(publish(store, entry) for entry in entries))

    for entry in entries:
        assert store.narinfo(HashPart(entry.hash_part)) == narinfo_text(entry)
        assert (store.layout.nars / str(nar_name(entry))).read_bytes() == bytes(entry.file)
    assert list(store.layout.partials.iterdir()) == []
    await opened.close()
    assert store.totals == on_disk(tmp_path)
    assert store.totals.paths == 300


async def test_narinfo_of_a_nar_that_is_there(tmp_path: Path, opened: Opened) -> None:
    """A narinfo can follow its NAR, as after a crash between the two."""
    entry = StoreEntry.make("one-1")
    store = opened(tmp_path)
    (store.layout.nars / str(nar_name(entry))).write_bytes(bytes(entry.file))
    hash_part = HashPart(entry.hash_part)
    store.remember_narinfo("up0", hash_part, entry.narinfo())
    await store.publish_narinfo(nar_name(entry), narinfo_text(entry), origin="up0")

    assert store.narinfo(hash_part) == narinfo_text(entry)
    assert store.remembered_narinfo("up0", hash_part) is None


async def test_nar_that_is_evicted_while_it_is_published(
    tmp_path: Path, opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No narinfo is left that leads to nothing, when the NAR goes before its narinfo has come."""
    entry = StoreEntry.make("one-1")
    store = opened(tmp_path)
    rename = publisher._rename

    def evict_between(item: Publication, stage: int) -> OSError | StoreError | None:
        if stage == 1:
            (store.layout.nars / str(nar_name(entry))).unlink()
        return rename(item, stage)

    monkeypatch.setattr(publisher, "_rename", evict_between)
    await publish(store, entry)

    assert not store.has_narinfo(HashPart(entry.hash_part))


@pytest.mark.parametrize("path", ["log/a-b.drv", "build-trace-v2/a-b.drv/out.doi", f"{HASH}.ls"])
async def test_other_files(tmp_path: Path, opened: Opened, path: str) -> None:
    """Side files lie where the protocol has them, also in folders that are not there yet."""
    store = opened(tmp_path)
    partial = store.partial()
    partial.append(b"content")
    await store.publish_file(path, partial, origin="up0")

    assert (tmp_path / path).read_bytes() == b"content"
    with store.open_file(path) or pytest.fail("absent") as file:
        assert os.pread(file.fd, 100, 0) == b"content"
    await opened.close()
    assert store.totals == on_disk(tmp_path)


async def test_nix_reads_the_folder_at_once(tmp_path: Path, opened: Opened, nix: NixClient) -> None:
    """Real Nix installs from the folder while the store is open, with signatures and hashes checked."""
    entries = closure(5, sizes=(100, 20_000))
    store = opened(tmp_path / "store")
    await asyncio.gather(*(publish(store, entry) for entry in entries))

    url = f"file://{tmp_path / 'store'}"
    copied = await asyncio.to_thread(nix.copy_from, url, entries[0].store_path)
    assert copied.returncode == 0, copied.stderr
    installed = await asyncio.to_thread(nix.installed)
    assert installed == {entry.base_name for entry in entries}
    assert (await asyncio.to_thread(nix.verify)).returncode == 0


# --- memory of narinfos -----------------------------------------------------------------------


async def test_remember_and_forget(tmp_path: Path, opened: Opened) -> None:
    """A narinfo is remembered for each upstream apart, replaced by a newer one, and forgotten."""
    store = opened(tmp_path)
    for upstream, text in (("up0", b"old"), ("up1", b"other"), ("up0", b"new")):
        store.remember_narinfo(upstream, HASH, text)
    assert store.remembered_narinfo("up0", HASH) == b"new"
    assert store.remembered_narinfo("up1", HASH) == b"other"
    for _ in range(2):
        store.forget_narinfo("up0", HASH)

    assert store.remembered_narinfo("up0", HASH) is None
    assert store.remembered_narinfo("up1", HASH) == b"other"
    assert store.narinfo(HASH) is None
    assert opened.events == []


async def test_remembered_narinfos_survive_a_restart(tmp_path: Path, opened: Opened) -> None:
    """What an upstream said is still known by the next daemon."""
    opened(tmp_path).remember_narinfo("up0", HASH, b"text")
    await opened.close()

    assert opened(tmp_path).remembered_narinfo("up0", HASH) == b"text"


async def test_memory_that_cannot_be_written(tmp_path: Path, opened: Opened) -> None:
    """A narinfo that cannot be remembered is reported, and stops nobody."""
    store = opened(tmp_path)
    (store.layout.remembered / "up0").touch()  # where a folder should be
    store.remember_narinfo("up0", HASH, b"text")
    assert store.remembered_narinfo("up0", HASH) == b"text"
    await opened.close()

    (event,) = opened.events
    assert isinstance(event, StoreFailed)
    assert event.reason.startswith("cannot remember a narinfo: ")
    assert list(store.layout.partials.iterdir()) == []


async def test_publication_supersedes_what_is_remembered(tmp_path: Path, opened: Opened) -> None:
    """Once the NAR is here its upstream's own narinfo is of no use; another upstream's stays."""
    entry = StoreEntry.make("one-1")
    store = opened(tmp_path)
    for upstream in ("up0", "up1"):
        store.remember_narinfo(upstream, HashPart(entry.hash_part), b"text")
    await publish(store, entry, origin="up0")

    assert store.remembered_narinfo("up0", HashPart(entry.hash_part)) is None
    assert store.remembered_narinfo("up1", HashPart(entry.hash_part)) == b"text"


def _daemon(folder: Path) -> DaemonProcess:
    return DaemonProcess(folder, upstreams=["http://127.0.0.1:1"], keys=[KEY.public])


# --- one daemon -------------------------------------------------------------------------------


async def test_second_store_is_locked_out(tmp_path: Path, opened: Opened) -> None:
    """A folder that is in use is refused, by one line that names the process which has it."""
    store = opened(tmp_path)
    partial = store.partial()

    with pytest.raises(StoreLockedError) as caught:
        opened(tmp_path)
    assert str(caught.value) == (
        f"the store {tmp_path} is in use by another nix-cache-proxy (process {os.getpid()})"
    )
    assert is_there(partial.path)  # the other's downloads are not taken for leftovers
    partial.discard()


async def test_lock_ends_with_the_store(tmp_path: Path, opened: Opened) -> None:
    """A folder that was closed can be opened again, in the same process too."""
    for _ in range(3):
        opened(tmp_path)
        await opened.close()


async def test_lock_ends_with_the_process(tmp_path: Path, opened: Opened) -> None:
    """A killed daemon leaves no lock; one that lives cannot be pushed aside."""
    daemon = _daemon(tmp_path)
    await asyncio.to_thread(daemon.start)
    try:
        with pytest.raises(StoreLockedError, match=rf"\(process {daemon.process.pid}\)$"):
            opened(daemon.store)
    finally:
        await asyncio.to_thread(daemon.kill)

    assert await opened(daemon.store).check() == ""


def test_second_daemon_says_why(tmp_path: Path) -> None:
    """A second daemon on the same folder ends with status 1 and one line, no traceback."""
    with _daemon(tmp_path) as daemon:
        second = subprocess.run(
            [sys.executable, "-m", "proxy", "serve", "--config", str(daemon.config_file)],
            check=False,
            stderr=subprocess.PIPE,
            text=True,
            timeout=PATIENCE,
            cwd=Path(__file__).parents[2],
        )
        assert second.returncode == 1
        assert f"process {daemon.process.pid}" in second.stderr
        assert len(second.stderr.splitlines()) == 1, second.stderr
        assert daemon.get("/nix-cache-info")


async def test_leftovers_are_removed_at_the_start(tmp_path: Path, opened: Opened) -> None:
    """What downloads left when the last daemon died is gone, and its names are free again."""
    opened(tmp_path)
    await opened.close()
    for number in range(3):
        (tmp_path / ".state" / "partial" / str(number)).write_bytes(b"left over")
    store = opened(tmp_path)

    assert list(store.layout.partials.iterdir()) == []
    store.partial().discard()


# --- folders that cannot be used --------------------------------------------------------------


def _is_a_file(folder: Path) -> Path:
    (folder / "file").touch()
    return folder / "file"


def _below_a_file(folder: Path) -> Path:
    return _is_a_file(folder) / "store"


def _without_room_for_nars(folder: Path) -> Path:
    (folder / "nar").touch()
    return folder


def _without_room_for_state(folder: Path) -> Path:
    (folder / ".state").touch()
    return folder


def _without_room_for_cache_info(folder: Path) -> Path:
    (folder / "nix-cache-info").mkdir()
    return folder


def _where_nobody_may_write(_folder: Path) -> Path:
    return Path("/sys/nix-cache-proxy")


@pytest.mark.parametrize(
    "make",
    [
        _is_a_file,
        _below_a_file,
        _without_room_for_nars,
        _without_room_for_state,
        _without_room_for_cache_info,
        _where_nobody_may_write,
    ],
)
async def test_unusable_folder(
    tmp_path: Path, opened: Opened, make: Callable[[Path], Path]
) -> None:
    """A folder that cannot be the store is a `StoreError` of one line that names it."""
    root = make(tmp_path)
    with pytest.raises(StoreError) as caught:
        opened(root)

    message = str(caught.value)
    assert message.startswith(f"cannot use {root} as the store: ")
    assert len(message.splitlines()) == 1


async def test_failed_start_lets_go_of_the_folder(tmp_path: Path, opened: Opened) -> None:
    """A folder whose opening failed can be opened once the reason is gone."""
    (tmp_path / "nix-cache-info").mkdir()
    with pytest.raises(StoreError):
        opened(tmp_path)
    (tmp_path / "nix-cache-info").rmdir()

    assert await opened(tmp_path).check() == ""


# --- disks that fail --------------------------------------------------------------------------


async def test_writable(tmp_path: Path, opened: Opened) -> None:
    """The check of a folder that can be written passes, and leaves nothing behind."""
    store = opened(tmp_path)
    assert await store.check() == store.not_keeping == ""

    assert list(store.layout.partials.iterdir()) == []


async def test_not_writable(tmp_path: Path, opened: Opened) -> None:
    """The check of a folder that cannot be written says why, each way once, until it can."""
    store = opened(tmp_path)
    store.layout.nars.rmdir()
    store.layout.nars.touch()
    for _ in range(2):
        assert "File exists" in await store.check()
    assert store.room == 0
    store.layout.nars.unlink()
    assert await store.check() == ""

    changes = [event for event in opened.events if isinstance(event, StoreChanged)]
    assert [bool(change.reason) for change in changes] == [True, False]


async def test_folder_that_was_removed(tmp_path: Path, opened: Opened) -> None:
    """A folder that somebody removed is made again, and is locked as before."""
    store = opened(tmp_path / "store")
    store.layout.root.rename(
        tmp_path / "gone"
    )  # in one step, with whatever the index writes meanwhile
    assert await store.check() == ""
    await publish(store, StoreEntry.make("one-1"))

    with pytest.raises(StoreLockedError):
        opened(tmp_path / "store")


async def test_file_system_that_was_unmounted(tmp_path: Path, opened: Opened) -> None:
    """Nothing is written below the mount point of a file system that is gone."""
    with small_disk(tmp_path / "disk", size=2**24) as disk:
        store = opened(disk)
        unmount(disk)
        assert "is not there" in await store.check()
        assert list(disk.iterdir()) == []
        remount(disk, size=2**24)  # for whoever unmounts it
        await opened.close()


async def test_full_disk_is_not_writable(tmp_path: Path, opened: Opened) -> None:
    """The check notices a disk on which no byte can be written any more."""
    with small_disk(tmp_path / "disk", size=2**20) as disk:
        store = opened(disk)
        filler = fill(disk)
        assert "No space left" in await store.check()
        filler.unlink()
        assert await store.check() == ""
        await opened.close()


async def test_read_only_disk(tmp_path: Path, opened: Opened) -> None:
    """When the disk becomes read-only what is there is read, and what cannot be kept is reported."""
    old, new = StoreEntry.make("old-1"), StoreEntry.make("new-1")
    with small_disk(tmp_path / "disk", size=2**24) as disk:
        store = opened(disk)
        await publish(store, old)
        partial = store.partial()
        partial.append(bytes(new.file))
        partial.close()
        # An index that is open for writing would keep the disk from becoming read-only.
        await opened.close()
        make_read_only(disk)
        with pytest.raises(StoreError, match="Read-only file system"):
            opened(disk)

        assert store.narinfo(HashPart(old.hash_part)) == narinfo_text(old)
        assert store.has_nar(nar_name(old))
        with pytest.raises(StoreError, match="Read-only file system"):
            await publish(store, new)
        store.remember_narinfo("up0", HASH, b"text")
        store.forget_narinfo("up0", HASH)
        assert not store.has_nar(nar_name(new))


async def test_full_disk_leaves_nothing_torn(tmp_path: Path, opened: Opened) -> None:
    """On a full disk no file gets a final name that is not whole, and each failure is reported."""
    entries = closure(40, sizes=(20_000, 60_000), compressions=("none",))
    with small_disk(tmp_path / "disk", size=2**20) as disk:
        store = opened(disk)
        outcomes: list[BaseException | None] = []
        for at in range(0, len(entries), 4):
            some = (publish(store, entry) for entry in entries[at : at + 4])
            outcomes += await asyncio.gather(*some, return_exceptions=True)
        failed = [outcome for outcome in outcomes if outcome is not None]
        assert 0 < len(failed) < len(entries)
        assert all(isinstance(outcome, StoreError) for outcome in failed), failed

        for entry, outcome in zip(entries, outcomes, strict=True):
            text = store.narinfo(HashPart(entry.hash_part))
            assert text == (narinfo_text(entry) if outcome is None else None)
            if store.has_nar(nar_name(entry)):
                nar = store.layout.nars / str(nar_name(entry))
                assert nar.read_bytes() == bytes(entry.file)
        await opened.close()


async def test_disk_that_has_room_again(tmp_path: Path, opened: Opened) -> None:
    """A disk that was full is used again as soon as it has room; nothing of before stays behind."""
    entry = StoreEntry.make("one-1", bytes(50_000), compression="none")
    with small_disk(tmp_path / "disk", size=2**20) as disk:
        store = opened(disk)
        filler = fill(disk)
        for _ in range(3):
            partial = store.partial()
            with pytest.raises(StoreError, match="No space left"):
                partial.append(bytes(entry.file))
            partial.discard()
        filler.unlink()
        await publish(store, entry)

        assert list(store.layout.partials.iterdir()) == []
        assert store.narinfo(HashPart(entry.hash_part)) == narinfo_text(entry)
        await opened.close()


async def test_narinfo_without_room_gives_up_the_nar(tmp_path: Path, opened: Opened) -> None:
    """When there is no room for the narinfo its NAR is given up with it."""
    entry = StoreEntry.make("one-1")
    with small_disk(tmp_path / "disk", size=2**20) as disk:
        store = opened(disk)
        partial = store.partial()
        partial.append(bytes(entry.file))
        assert store.index.wait_scanned(PATIENCE)  # and so nothing makes room any more
        filler = fill(disk)
        with pytest.raises(StoreError, match="No space left"):
            await store.publish_nar(nar_name(entry), partial, narinfo_text(entry), origin="up0")
        filler.unlink()

        assert list(store.layout.partials.iterdir()) == []
        assert list(store.layout.nars.iterdir()) == []
        await opened.close()


async def test_file_whose_folder_is_taken(tmp_path: Path, opened: Opened) -> None:
    """A side file that cannot have its folder is given up, with a reason."""
    store = opened(tmp_path)
    (tmp_path / "build-trace-v2" / "a").touch()
    partial = store.partial()
    with pytest.raises(StoreError, match=r"^cannot keep build-trace-v2/a/b: "):
        await store.publish_file("build-trace-v2/a/b", partial, origin="up0")

    assert list(store.layout.partials.iterdir()) == []


async def test_nar_is_counted_when_its_narinfo_is_refused(tmp_path: Path, opened: Opened) -> None:
    """A NAR that has its name takes room, and counts, also when its narinfo could not follow."""
    entry = StoreEntry.make("one-1", bytes(100_000), compression="none")
    opened(tmp_path)
    await opened.close()
    store = opened(tmp_path)  # which has no reason to look at the folder
    (tmp_path / f"{entry.hash_part}.narinfo").mkdir()
    with pytest.raises(StoreError):
        await publish(store, entry)
    await opened.close()

    assert store.totals == on_disk(tmp_path)


async def test_close_after_the_folder_is_gone(tmp_path: Path, opened: Opened) -> None:
    """A store whose folder somebody took away can still be closed."""
    store = opened(tmp_path / "store")
    store.layout.root.rename(tmp_path / "elsewhere")
    store.layout.root.touch()
    assert "Not a directory" in await store.check()

    await asyncio.wait_for(opened.close(), PATIENCE)


def test_kill_while_publishing(tmp_path: Path) -> None:
    """A process killed while it publishes leaves only whole files under final names."""
    publishing = subprocess.Popen(
        [sys.executable, "-m", "tests.store.publishing", "closure", str(tmp_path), "400"],
        cwd=Path(__file__).parents[2],
        stdout=subprocess.DEVNULL,
    )
    nars = tmp_path / "nar"
    while not (nars.exists() and any(nars.iterdir())):
        assert publishing.poll() is None
    publishing.send_signal(signal.SIGKILL)
    publishing.wait(PATIENCE)

    expected = {str(nar_name(entry)): entry for entry in closure(400, depth=2, sizes=(100, 1000))}
    described = {path.stem for path in tmp_path.glob("*.narinfo")}
    for nar in nars.iterdir():
        entry = expected[nar.name]
        assert nar.read_bytes() == bytes(entry.file)
        if entry.hash_part in described:
            narinfo = tmp_path / entry.narinfo_path.lstrip("/")
            assert narinfo.read_bytes() == narinfo_text(entry)
    assert described <= {name[:32] for name in _names(nars)}
