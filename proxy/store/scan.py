"""Walk the store folder: what is there, and what crashes and time left behind."""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from proxy.store.files import disk_usage
from proxy.store.layout import SIDE_FOLDERS, Layout
from proxy.store.leftovers import DATA, NOTE

REMEMBER_FOR = 30 * 24 * 3600
"""Seconds that a narinfo without NAR is kept: as long as Nix keeps its own copy of it."""

NARINFO_SUFFIX = ".narinfo"

NAMES = 150_000
"""Names read from a folder at once, at least: some 25 megabytes."""

_URL = re.compile(rb"^URL: (nar/[^/\n]+)$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Found:
    """A file under its final name.

    ``name`` is relative to the store, ``size`` as ``du`` counts it, ``modified`` in seconds since the epoch.
    """

    name: str
    size: int
    modified: int


def scan(layout: Layout) -> Iterator[Found]:
    """Yield every file of the binary cache, one after the other; those of a folder in the order of names.

    A narinfo whose NAR is missing (somebody deleted it) would make Nix ask this folder for a NAR that it
    does not have, so such a narinfo is removed instead. Files that vanish meanwhile are passed over.

    Raises:
        OSError: The folder itself cannot be read.
    """
    for name in _names(layout.root):
        path = f"{layout.root}/{name}"
        if name.endswith(NARINFO_SUFFIX) and not has_nar(layout, path):
            with contextlib.suppress(OSError):
                os.unlink(path)  # a Path for each of a million files takes longer than this
        elif name.endswith((NARINFO_SUFFIX, ".ls")):
            yield from _found(layout, name)
    yield from _below(layout, "nar")
    for folder in SIDE_FOLDERS:
        yield from _below(layout, folder)


def remove_leftovers(layout: Layout) -> None:
    """Remove what downloads left that nobody can go on with.

    Raises:
        OSError: The state folder cannot be written.
    """
    for entry in _files(layout.partials):
        if not entry.name.endswith((DATA, NOTE)):
            Path(entry.path).unlink()


def forget_narinfos(layout: Layout, most: int, now: float | None = None) -> int:
    """Remove remembered narinfos that no client remembers any more, and the oldest beyond ``most`` bytes.

    Never fails.

    Returns:
        Bytes on disk that are left.
    """
    horizon = (time.time() if now is None else now) - REMEMBER_FOR
    kept: list[tuple[float, int, str]] = []
    with contextlib.suppress(OSError):
        for entry in _files_below(layout.remembered):
            with contextlib.suppress(OSError):
                status = entry.stat()
                kept.append((status.st_mtime, disk_usage(status), entry.path))
    left = sum(size for _, size, _ in kept)
    for modified, size, path in sorted(kept):
        if modified >= horizon and left <= most:
            break
        with contextlib.suppress(OSError):
            Path(path).unlink()
        left -= size
    return left


def overhead(layout: Layout) -> int:
    """Return the bytes on disk of what is neither a cached file nor a remembered narinfo.

    That is folders, the index, what is on its way, quarantine, and pins: with them, all that ``du`` counts.
    """
    total = 0
    own = (layout.state, layout.partials, layout.pins, layout.quarantine)
    upstreams: list[Path] = []
    with contextlib.suppress(OSError):  # whatever the disk refuses; it may be no folder any more
        upstreams = [layout.remembered / name for name in _folders(layout.remembered)]
    for folder in {
        layout.root,
        layout.state,
        layout.pins,
        layout.quarantine,
        *layout.folders,
        *upstreams,
    }:
        with contextlib.suppress(OSError):
            total += disk_usage(folder.stat())
    for folder in own:
        with contextlib.suppress(OSError):  # also what goes meanwhile
            for entry in _files(folder):
                total += disk_usage(entry.stat(follow_symlinks=False))
    return total


def _files(folder: Path) -> Iterator[os.DirEntry[str]]:
    with contextlib.suppress(FileNotFoundError), os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_file(follow_symlinks=False):
                yield entry


def _files_below(folder: Path) -> Iterator[os.DirEntry[str]]:
    with contextlib.suppress(FileNotFoundError), os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                yield from _files_below(Path(entry.path))
            elif entry.is_file(follow_symlinks=False):
                yield entry


def _below(layout: Layout, folder: str) -> Iterator[Found]:
    """Find what is in a folder and in those below it."""
    for name in _names(layout.root / folder):
        yield from _found(layout, f"{folder}/{name}")
    for name in _folders(layout.root / folder):
        yield from _below(layout, f"{folder}/{name}")


def _names(folder: Path) -> Iterator[str]:
    """Yield the names of a folder's files in their order.

    A table in that order is written from one end to the other; in the folder's own order every file would
    touch a page of its own. Of a large folder the names do not have to fit into memory: it is read once
    for each first character.
    """
    firsts = Counter(entry.name[0] for entry in _files(folder))
    together: list[str] = []
    for first in sorted(firsts):
        together.append(first)
        if sum(firsts[each] for each in together) >= NAMES:
            yield from _names_with(folder, together)
            together = []
    if together:
        yield from _names_with(folder, together)


def _names_with(folder: Path, firsts: list[str]) -> list[str]:
    """Return the names of files that begin with one of these characters, in their order."""
    wanted = frozenset(firsts)
    with os.scandir(folder) as entries:
        names = [
            entry.name
            for entry in entries
            if entry.name[0] in wanted and entry.is_file(follow_symlinks=False)
        ]
    names.sort()
    return names


def _folders(folder: Path) -> list[str]:
    with contextlib.suppress(FileNotFoundError), os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if entry.is_dir(follow_symlinks=False))
    return []


def _found(layout: Layout, name: str) -> Iterator[Found]:
    # A name that is not UTF-8 is not one of ours, and no database holds it.
    with contextlib.suppress(FileNotFoundError, UnicodeEncodeError):
        name.encode()
        status = os.stat(f"{layout.root}/{name}", follow_symlinks=False)  # see scan
        yield Found(name, disk_usage(status), int(status.st_mtime))


def nar_of(narinfo: str | Path) -> str | None:
    """Return the name of the NAR that a narinfo of the store leads to; None when it leads nowhere.

    Raises:
        OSError: It cannot be read.
    """
    with open(narinfo, "rb", buffering=0) as file:  # see scan
        url = _URL.search(file.read())
    return None if url is None else os.fsdecode(url[1])


def has_nar(layout: Layout, narinfo: str | Path) -> bool:
    """Tell whether what a narinfo of the store leads to is here; True as well when it cannot be read."""
    try:
        nar = nar_of(narinfo)
    except OSError:
        return True  # unreadable is not the same as useless
    return nar is not None and os.path.isfile(f"{layout.root}/{nar}")  # see scan
