"""The walk over the store folder: what counts, what goes, what is left alone."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from proxy.nix.store_path import HashPart
from proxy.store.files import disk_usage
from proxy.store.layout import SIDE_FOLDERS, Layout
from proxy.store.scan import (
    REMEMBER_FOR,
    forget_narinfos,
    remove_leftovers,
    scan,
)

HASH = "0123456789abcdfghijklmnpqrsvwxyz"
NOW = 2_000_000_000.0
EVERYTHING = 2**60
NOBODY = 65534


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    """Return the layout of an empty store whose folders are all there."""
    layout = Layout(tmp_path)
    for folder in (layout.nars, layout.partials, layout.remembered):
        folder.mkdir(parents=True)
    for name in SIDE_FOLDERS:
        (tmp_path / name).mkdir()
    return layout


def _write(path: Path, content: bytes = b"content") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def _narinfo(layout: Layout, url: str, hash_part: str = HASH) -> Path:
    text = f"StorePath: /nix/store/{hash_part}-x\nURL: {url}\nCompression: none\n"
    return _write(layout.narinfo(HashPart(hash_part)), text.encode())


def _names(layout: Layout) -> set[str]:
    return {found.name for found in scan(layout)}


def test_everything_published_is_found(layout: Layout) -> None:
    """Narinfos, NARs, listings and all side files are found once each, with what ``du`` says of them."""
    _narinfo(layout, "nar/one.nar")
    names = [
        "nar/one.nar",
        f"{HASH}.ls",
        f"log/{HASH}-x.drv",
        "realisations/sha256:00!out.doi",
        f"build-trace-v2/{HASH}-x.drv/out.doi",
        "debuginfo/00.debug",
    ]
    for length, name in enumerate(names):
        _write(layout.root / name, b"x" * 5000 * length)

    found = list(scan(layout))

    assert sorted(file.name for file in found) == sorted([*names, f"{HASH}.narinfo"])
    for file in found:
        assert file.size == (layout.root / file.name).stat().st_blocks * 512


@pytest.mark.parametrize("at_once", [1, 5, 10_000])
def test_names_come_in_order(layout: Layout, monkeypatch: pytest.MonkeyPatch, at_once: int) -> None:
    """Files of a folder come once each and in order, whether its names fit into memory or not."""
    monkeypatch.setattr("proxy.store.scan.NAMES", at_once)
    names = [f"nar/{first}{number}.nar" for first in "0az_Ä🙂" for number in range(3)]
    for name in names:
        _write(layout.root / name)

    assert [file.name for file in scan(layout)] == sorted(names)


def test_state_and_strangers_do_not_count(layout: Layout) -> None:
    """Neither what is derived counts, nor ``nix-cache-info``, nor what somebody else put there."""
    for path in (
        layout.cache_info,
        layout.index,
        layout.partials / "0",
        layout.remembered / "up0" / f"{HASH}.narinfo",
        layout.root / "README",
        layout.root / "stranger" / "file",
    ):
        _write(path)

    assert _names(layout) == set()
    assert (layout.root / "README").exists()


@pytest.mark.parametrize("url", ["nar/gone.nar", "nar/folder", "https://elsewhere/nar/x", "x.nar"])
def test_narinfo_without_nar_is_removed(layout: Layout, url: str) -> None:
    """A narinfo that leads Nix to nothing in this folder is removed, and does not count."""
    (layout.nars / "folder").mkdir()
    narinfo = _narinfo(layout, url)

    assert _names(layout) == set()
    assert not narinfo.exists()


def test_narinfo_without_url_is_removed(layout: Layout) -> None:
    """A narinfo that leads nowhere at all, as a torn one does, is removed."""
    narinfo = _write(layout.narinfo(HashPart(HASH)), b"StorePath: /nix/sto")

    assert _names(layout) == set()
    assert not narinfo.exists()


def test_narinfo_with_nar_stays(layout: Layout) -> None:
    """A narinfo whose NAR is here stays as it is."""
    _write(layout.nars / "one.nar.xz")
    narinfo = _narinfo(layout, "nar/one.nar.xz")
    before = narinfo.read_bytes()

    assert _names(layout) == {"nar/one.nar.xz", f"{HASH}.narinfo"}
    assert narinfo.read_bytes() == before


def test_nar_without_narinfo_stays(layout: Layout) -> None:
    """A NAR that a crash left without its narinfo is complete, and stays."""
    _write(layout.nars / "one.nar")

    assert _names(layout) == {"nar/one.nar"}
    assert (layout.nars / "one.nar").exists()


def test_unreadable_narinfo_stays() -> None:
    """A narinfo that cannot be read may be good: it stays, and counts."""
    with tempfile.TemporaryDirectory() as folder:  # pytest's own is closed to other users
        layout = Layout(Path(folder))
        layout.root.chmod(0o777)
        narinfo = _narinfo(layout, "nar/gone.nar")
        narinfo.chmod(0)

        with _as_nobody():
            assert _names(layout) == {f"{HASH}.narinfo"}
        assert narinfo.exists()


@contextmanager
def _as_nobody() -> Iterator[None]:
    """Be somebody for whom files can be unreadable, which root is not."""
    privileged = os.geteuid() == 0
    if privileged:
        os.seteuid(NOBODY)
    try:
        yield
    finally:
        if privileged:
            os.seteuid(0)


def test_links_are_not_followed(layout: Layout, tmp_path_factory: pytest.TempPathFactory) -> None:
    """No symbolic link is followed, counted or removed, whatever it points to."""
    outside = tmp_path_factory.mktemp("outside")
    _write(outside / "file")
    links = {
        layout.nars / "link.nar": outside / "file",
        layout.root / f"{HASH}.narinfo": outside / "file",
        layout.root / "log" / "folder": outside,
        layout.partials / "link": outside / "file",
        layout.remembered / "up0": outside,
    }
    for link, target in links.items():
        link.symlink_to(target)
    os.utime(outside / "file", (0, 0))

    assert _names(layout) == set()
    remove_leftovers(layout)
    forget_narinfos(layout, EVERYTHING, NOW)
    assert all(link.is_symlink() for link in links)
    assert (outside / "file").exists()


def test_files_that_vanish_are_passed_over(layout: Layout) -> None:
    """A file that somebody removes during the walk ends nothing."""
    for number in range(20):
        _write(layout.nars / f"{number}.nar")
    found = scan(layout)
    first = next(found).name
    for path in layout.nars.iterdir():
        path.unlink()

    assert first.startswith("nar/")
    assert sum(1 for _ in found) <= 19


def test_missing_folders_are_empty(tmp_path: Path) -> None:
    """A store that is not there has nothing in it, and nothing to remove."""
    layout = Layout(tmp_path / "absent")

    assert _names(layout) == set()
    remove_leftovers(layout)
    forget_narinfos(layout, EVERYTHING)


def test_disk_usage_counts_blocks(tmp_path: Path) -> None:
    """A file with a hole counts what it takes, not how long it is."""
    path = tmp_path / "sparse"
    with path.open("wb") as file:
        file.truncate(10 * 2**20)

    assert disk_usage(path.stat()) < 2**20


# --- what time and crashes leave --------------------------------------------------------------


def test_leftovers_are_removed(layout: Layout) -> None:
    """Of partial downloads nothing stays; published files are not touched."""
    for number in range(3):
        _write(layout.partials / str(number))
    nar = _write(layout.nars / "one.nar")
    remove_leftovers(layout)

    assert list(layout.partials.iterdir()) == []
    assert nar.exists()


def _remembered(layout: Layout) -> Iterator[str]:
    return (path.stem for path in layout.remembered.rglob("*.narinfo"))


def test_old_remembered_narinfos_are_forgotten(layout: Layout) -> None:
    """What Nix itself remembers no longer is forgotten, of every upstream; what is younger stays."""
    ages = {"old": REMEMBER_FOR + 10, "young": REMEMBER_FOR - 10, "new": 0}
    for upstream in ("up0", "up1"):
        for name, age in ages.items():
            path = _write(layout.remembered / upstream / f"{name}.narinfo")
            os.utime(path, (NOW - age, NOW - age))
    forget_narinfos(layout, EVERYTHING, NOW)

    assert sorted(_remembered(layout)) == ["new", "new", "young", "young"]


def test_forgetting_goes_by_the_clock(layout: Layout) -> None:
    """Without being told the time it is today."""
    path = _write(layout.remembered / "up0" / "ancient.narinfo")
    os.utime(path, (0, 0))
    _write(layout.remembered / "up0" / "new.narinfo")
    forget_narinfos(layout, EVERYTHING)

    assert list(_remembered(layout)) == ["new"]


def test_remembering_lasts_as_long_as_nix_does() -> None:
    """Nix keeps a narinfo for 30 days, and so do we."""
    assert REMEMBER_FOR == 30 * 24 * 60 * 60
