"""Downloads that were not finished, kept to be continued, also after a restart or a crash.

A download that is worth it lies under the name of its NAR, beside a note that says where its bytes came
from. What is in it was never verified as a whole, so whoever continues it judges it from its first byte on.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

from proxy.errors import StoreError
from proxy.store.files import Partial, disk, disk_usage, in_use

MIN_SIZE = 2**20
"""Bytes of the whole file below which a download is begun anew: the rest is not worth the notes."""

MAX_AGE = 24 * 3600.0
"""Seconds after which nobody is expected to come back for the rest."""

MOST = 64
"""Unfinished downloads that are kept; the oldest go first."""

DATA, NOTE = ".part", ".from"
"""What their names end in."""


@dataclass(frozen=True, slots=True)
class Origin:
    """Where the bytes of a download came from.

    Attributes:
        upstream: The upstream's name.
        validator: What it says to recognise the file by; None when it says nothing.
        file_hash: The FileHash of its narinfo, as text; None when there is none.
        size: Bytes of the whole file; None when nobody says.
    """

    upstream: str
    validator: str | None
    file_hash: str | None
    size: int | None

    def format(self) -> bytes:
        """Write it down."""
        return json.dumps(asdict(self)).encode()

    @classmethod
    def parse(cls, text: bytes) -> Self:
        """Read what `format` wrote.

        Raises:
            ValueError: It is something else.
        """
        match json.loads(text):
            case {
                "upstream": str(upstream),
                "validator": str() | None as validator,
                "file_hash": str() | None as file_hash,
                "size": int() | None as size,
            }:
                return cls(upstream, validator, file_hash, size)
            case _:
                raise ValueError("not a note of a download")


class Leftovers:
    """The unfinished downloads in a folder. Nothing else may use names that end in `DATA` or `NOTE`.

    Args:
        folder: The folder of partial files.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._names: set[str] = set()

    def tidy(self, now: float | None = None) -> None:
        """Remove what is old, damaged or too much. Nothing may be under way in files that are kept.

        Raises:
            OSError: The folder cannot be written.
        """
        horizon = (time.time() if now is None else now) - MAX_AGE
        aged = sorted(self._aged(), reverse=True)
        self._names = {name for age, name in aged[:MOST] if age >= horizon}
        for path in self._files():
            if path.name.removesuffix(path.suffix) not in self._names:
                path.unlink(missing_ok=True)

    def forget_old(self, now: float | None = None) -> None:
        """Remove those that nobody came back for. Never fails."""
        horizon = (time.time() if now is None else now) - MAX_AGE
        aged = sorted((age, name) for age, name in self._aged() if name in self._names)
        self._names = {name for _, name in aged}  # the others had to make room
        for age, name in aged:
            if age < horizon or len(self._names) > MOST:
                self._names.discard(name)
                self._remove(name)

    def take(self, name: str) -> tuple[Partial, Origin] | None:
        """Return an unfinished download to continue it; None when there is none."""
        if name not in self._names:
            return None
        self._names.discard(name)
        try:
            with disk("cannot continue a download"):
                origin = Origin.parse(self._note(name).read_bytes())
            return Partial(self._data(name), self._note(name), resume=True), origin
        except (StoreError, ValueError, RecursionError):
            self._remove(name)
            return None

    def start(self, name: str, origin: Origin) -> Partial:
        """Start a download that can be left.

        Raises:
            StoreError: The disk failed, or one is under way.
        """
        self._names.discard(name)
        partial = Partial(self._data(name), self._note(name))
        try:
            with disk("cannot start a file"):
                self._note(name).write_bytes(origin.format())
        except StoreError:
            partial.discard()
            raise
        return partial

    def under_way(self, name: str) -> bool:
        """Tell whether somebody writes to the file that would be left."""
        return name not in self._names and self._data(name).exists()

    def left(self, partial: Partial) -> None:
        """Take note of a download that is left."""
        self._names.add(os.path.basename(partial.path).removesuffix(DATA))
        if len(self._names) > MOST:
            self.forget_old()

    def _aged(self) -> Iterator[tuple[float, str]]:
        """Yield when each was last written to, of those that have a note, and its name."""
        for path in self._files():
            name = path.name.removesuffix(DATA)
            if path.suffix == DATA and self._note(name).exists():
                with contextlib.suppress(FileNotFoundError):
                    yield path.stat().st_mtime, name

    def _files(self) -> list[Path]:
        return [path for path in self._folder.glob("*") if path.suffix in {DATA, NOTE}]

    def _remove(self, name: str) -> None:
        for path in (self._data(name), self._note(name)):
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)

    def _data(self, name: str) -> Path:
        return self._folder / f"{name}{DATA}"

    def _note(self, name: str) -> Path:
        return self._folder / f"{name}{NOTE}"


def make_room(folder: Path, wanted: int) -> Iterator[tuple[Path, int]]:
    """Remove unfinished downloads that nobody writes or goes on with, what was written to last the last.

    Args:
        folder: The folder of partial files.
        wanted: Bytes on disk that are to become free.

    Yields:
        What is gone, and the bytes on disk that it took.

    Raises:
        OSError: The folder cannot be read or written.
    """
    there = []
    for path in folder.glob(f"*{DATA}"):
        with contextlib.suppress(FileNotFoundError):
            there.append((path.stat(), path))
    for status, path in sorted(there, key=lambda each: each[0].st_mtime):
        if wanted <= 0:
            return
        if not in_use(path):
            path.unlink(missing_ok=True)
            path.with_suffix(NOTE).unlink(missing_ok=True)
            wanted -= disk_usage(status)
            yield path, disk_usage(status)


class Lasting:
    """A NAR's download that can be left: `proxy.store.incoming.Lasting`.

    Args:
        leftovers: Where it is left.
        start_other: Starts a file that cannot be left.
        name: The NAR's name.
    """

    def __init__(self, leftovers: Leftovers, start_other: Callable[[], Partial], name: str) -> None:
        self._leftovers = leftovers
        self._start_other = start_other
        self._name = name

    def take(self) -> tuple[Partial, Origin] | None:
        """Take up what was left."""
        return self._leftovers.take(self._name)

    def start(self, origin: Origin) -> Partial:
        """Start it, unless readers that were too slow for another to be joined hold one of that name."""
        if self._leftovers.under_way(self._name):
            return self._start_other()
        return self._leftovers.start(self._name, origin)

    def left(self, partial: Partial) -> None:
        """Leave it."""
        self._leftovers.left(partial)
