"""Everything in the store checked again, and what is damaged taken out."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from proxy.events import Event, Quarantined
from proxy.nix.cache_info import CacheInfo
from proxy.nix.narinfo import parse
from proxy.nix.signature import Keyring, PublicKey
from proxy.nix.store_path import HashPart
from proxy.nix.trust import Trust
from proxy.store.folder import Store
from proxy.store.quarantine import KEEP_FOR, MOST, clear
from proxy.store.verification import Checked
from tests.closures import SigningKey, StoreEntry, closure
from tests.folder_oracle import complete_paths
from tests.store.publishing import KEY, nar_name, publish
from tests.store.test_index import on_disk

TRUST = Trust([Keyring([PublicKey.parse(KEY.public)])])


class Kept:
    """A store with some paths in it."""

    def __init__(self, folder: Path, entries: list[StoreEntry]) -> None:
        self.folder = folder
        self.entries = sorted(entries, key=lambda entry: entry.hash_part)
        self.events: list[Event] = []
        self.store = Store(folder, CacheInfo(), self.events.append)

    def nar(self, entry: StoreEntry) -> Path:
        """Where the NAR of a path is."""
        return self.folder / "nar" / str(nar_name(entry))

    def narinfo(self, entry: StoreEntry) -> Path:
        """Where the narinfo of a path is."""
        return self.folder / f"{entry.hash_part}.narinfo"

    def verify(self, trust: Trust = TRUST, *, most: int | None = None) -> list[Checked]:
        """Check everything, or stop after so many files."""
        stop = threading.Event()
        found: list[Checked] = []
        for checked in self.store.verification(trust, stop, shared=False).run():
            found.append(checked)
            if len(found) == most:
                stop.set()
        return found


@pytest.fixture
async def kept(tmp_path: Path) -> Kept:
    """Return a store that keeps seven paths of several compressions."""
    kept = Kept(tmp_path / "store", closure(7, sizes=(1_000, 200_000)))
    for entry in kept.entries:
        await publish(kept.store, entry)
    return kept


def _verify_on_a_thread(kept: Kept, trust: Trust = TRUST, most: int | None = None) -> list[Checked]:
    """Verify as the daemon does: the thread keeps the priority that it gets."""
    found: list[Checked] = []
    thread = threading.Thread(target=lambda: found.extend(kept.verify(trust, most=most)))
    thread.start()
    thread.join()
    return found


def _flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


async def test_a_sound_store(kept: Kept) -> None:
    """What is as it was put there is found sound, every byte of it, and stays."""
    found = _verify_on_a_thread(kept)
    assert [(each.what, each.outcome) for each in found] == [
        (str(nar_name(entry)), "sound") for entry in kept.entries
    ]
    assert sum(each.size for each in found) == sum(len(entry.file) for entry in kept.entries)
    assert complete_paths(kept.folder, [KEY]) == {entry.hash_part for entry in kept.entries}
    await kept.store.close()


@pytest.mark.parametrize("damage", ["flipped", "truncated", "longer", "empty", "gone"])
async def test_a_damaged_nar(kept: Kept, damage: str) -> None:
    """A NAR that is not what was signed is taken out with its narinfo, and counted no longer."""
    victim = kept.entries[3]
    nar = kept.nar(victim)
    match damage:
        case "flipped":
            _flip(nar, nar.stat().st_size // 2)
        case "truncated":
            os.truncate(nar, nar.stat().st_size - 1)
        case "longer":
            nar.write_bytes(nar.read_bytes() + b"x")
        case "empty":
            nar.write_bytes(b"")
        case _:
            nar.unlink()
    found = _verify_on_a_thread(kept)
    assert [each.outcome for each in found] == ["sound"] * 3 + ["damaged"] + ["sound"] * 3
    assert not nar.exists()
    assert not kept.narinfo(victim).exists()
    sound = {entry.hash_part for entry in kept.entries} - {victim.hash_part}
    assert complete_paths(kept.folder, [KEY]) == sound
    await kept.store.close()
    assert [event.what for event in kept.events if isinstance(event, Quarantined)] == [nar.name]
    assert kept.store.totals == on_disk(kept.folder)


async def test_every_byte_of_a_narinfo(kept: Kept) -> None:
    """Whatever byte of a narinfo changes: it is taken out, or still leads to what was signed."""
    victim = kept.entries[0]
    narinfo = kept.narinfo(victim)
    text = narinfo.read_bytes()
    for position in range(0, len(text), 7):
        narinfo.write_bytes(text)
        _flip(narinfo, position)
        found = _verify_on_a_thread(kept, most=1)
        kept.store.verification(TRUST, threading.Event()).start_over()
        if narinfo.exists() and found[0].outcome != "untrusted":  # the key's name changed
            info = parse(narinfo.read_bytes())
            TRUST.verify(info, HashPart(victim.hash_part))
            assert info.url == f"nar/{nar_name(victim)}"
        if not kept.nar(victim).exists():
            kept.nar(victim).write_bytes(bytes(victim.file))
    await kept.store.close()


async def test_what_nobody_trusted_has_signed(kept: Kept) -> None:
    """Paths whose key is not trusted any more are told, and stay: the key may come back."""
    other = Trust([Keyring([PublicKey.parse(SigningKey("other-1").public)])])
    found = _verify_on_a_thread(kept, other)
    assert [each.outcome for each in found if each.what.endswith(".narinfo")] == ["untrusted"] * 7
    assert len(complete_paths(kept.folder, [KEY])) == 7
    await kept.store.close()


async def test_a_forged_signature(kept: Kept) -> None:
    """A narinfo that claims a trusted key and does not verify is taken out; its NAR is judged by itself."""
    victim = kept.entries[0]
    narinfo = kept.narinfo(victim)
    narinfo.write_bytes(narinfo.read_bytes().replace(b"NarSize: ", b"NarSize: 1"))
    found = _verify_on_a_thread(kept)
    assert [(each.what, each.outcome) for each in found[:2]] == [
        (narinfo.name, "damaged"),
        (str(nar_name(victim)), "sound"),
    ]
    await kept.store.close()


async def test_a_nar_without_narinfo(kept: Kept) -> None:
    """A NAR that a crash left without narinfo is judged by the NarHash in its name."""
    sound, damaged = kept.entries[:2]
    for entry in (sound, damaged):
        kept.narinfo(entry).unlink()
    _flip(kept.nar(damaged), kept.nar(damaged).stat().st_size // 2)
    found = _verify_on_a_thread(kept)
    assert [each.outcome for each in found[:2]] == ["sound", "damaged"]
    assert kept.nar(sound).exists()
    assert not kept.nar(damaged).exists()
    await kept.store.close()


async def test_it_goes_on_where_it_stopped(kept: Kept) -> None:
    """An interrupted check is continued behind what was checked; a finished one starts anew."""
    first = _verify_on_a_thread(kept, most=3)
    verification = kept.store.verification(TRUST, threading.Event())
    assert verification.begin == kept.entries[2].hash_part
    assert verification.count() == 4
    second = _verify_on_a_thread(kept)
    names = [str(nar_name(entry)) for entry in kept.entries]
    assert [each.what for each in first + second] == names
    assert [each.what for each in _verify_on_a_thread(kept)] == names
    kept.store.layout.verified.write_text("garbage")
    assert [each.what for each in _verify_on_a_thread(kept)] == names
    await kept.store.close()


class _Replacing(threading.Event):
    """Puts another file where a NAR is, as soon as some of it has been read."""

    def __init__(self, nar: Path, content: bytes) -> None:
        super().__init__()
        self._nar = nar
        self._content = content
        self._asked = 0

    def is_set(self) -> bool:
        """Say that nobody wants it to stop, which is asked before each path and after each piece."""
        self._asked += 1
        if self._asked == 2:
            fresh = self._nar.with_suffix(".fresh")
            fresh.write_bytes(self._content)
            fresh.replace(self._nar)
        return False


async def test_what_is_replaced_meanwhile(tmp_path: Path) -> None:
    """A damaged NAR that the daemon replaces while it is read is nobody's any more: the new one stays."""
    victim = StoreEntry.make("victim", os.urandom(10_000), compression="none")
    kept = Kept(tmp_path / "store", [victim])
    await publish(kept.store, victim)
    _flip(kept.nar(victim), 100)
    replacing = _Replacing(kept.nar(victim), bytes(victim.file))
    assert list(kept.store.verification(TRUST, replacing).run()) == []
    assert complete_paths(kept.folder, [KEY]) == {victim.hash_part}
    await kept.store.close()


async def test_lowest_priority(kept: Kept) -> None:
    """The thread that checks gives way to everybody else; the process does not."""
    niceness: list[int] = []

    def check() -> None:
        run = kept.store.verification(TRUST, threading.Event(), shared=False).run()
        niceness.extend(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()) for _ in run)

    thread = threading.Thread(target=check)
    thread.start()
    thread.join()
    assert set(niceness) == {19}
    assert os.getpriority(os.PRIO_PROCESS, os.getpid()) < 19
    await kept.store.close()


async def test_a_priority_that_may_not_be_changed(
    kept: Kept, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where system calls are filtered everything is checked all the same, with rests in between."""

    def refuse(*_arguments: int) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "setpriority", refuse)
    assert [each.outcome for each in _verify_on_a_thread(kept)] == ["sound"] * 7
    await kept.store.close()


async def test_a_disk_that_lets_nothing_be_moved(kept: Kept) -> None:
    """Where the disk takes nothing, what is damaged counts as gone all the same, until it is replaced."""
    victim = kept.entries[0]
    kept.nar(victim).write_bytes(b"damaged")
    kept.store.layout.quarantine.touch()  # no folder can be made there
    _verify_on_a_thread(kept)
    assert kept.nar(victim).exists()
    assert not kept.store.has_nar(nar_name(victim))
    assert kept.store.open_nar(nar_name(victim)) is None
    assert kept.store.narinfo(HashPart(victim.hash_part)) is None
    await publish(kept.store, victim)
    assert kept.store.has_nar(nar_name(victim))
    assert complete_paths(kept.folder, [KEY]) == {entry.hash_part for entry in kept.entries}
    await kept.store.close()


async def test_quarantine_is_bounded(kept: Kept) -> None:
    """What lies in quarantine is limited in size and age, the newest is kept."""
    quarantine = kept.store.layout.quarantine
    quarantine.mkdir()
    for number, size in enumerate([MOST // 2, MOST // 2, 10, MOST + 1]):
        with (quarantine / str(number)).open("wb") as file:
            file.truncate(size)
    now = max(path.stat().st_ctime for path in quarantine.iterdir())
    clear(kept.store.layout, now)
    assert sum(path.stat().st_size for path in quarantine.iterdir()) <= MOST
    assert not (quarantine / "3").exists()
    clear(kept.store.layout, now + KEEP_FOR + 1)
    assert list(quarantine.iterdir()) == []
    await kept.store.close()
