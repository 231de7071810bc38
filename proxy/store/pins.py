"""Pins: names for what is never evicted. Each is a file in the store folder.

Pins are what somebody wants and not derived from anything, so they lie outside of ``.state``, in ``pins/``,
where they are in the way of nobody who reads the folder as a binary cache. A pin names its paths and all
that they need, so that what it keeps does not depend on a narinfo that may get lost. The file can be read,
and made, by people: store paths, one a line; the first block are those that were asked for.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Final

from proxy.errors import CommandError, ParseError
from proxy.nix.store_path import HashPart, StorePath
from proxy.store.files import disk, flush
from proxy.store.layout import Layout

_NAME: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,99}")
_HEADER: Final = (
    "# Kept by nix-cache-proxy until `nix-cache-proxy unpin`: these paths, and what they need.\n"
)


def check_pin_name(name: str) -> None:
    """See that a pin can have this name.

    Raises:
        CommandError: It cannot.
    """
    if not _NAME.fullmatch(name):
        raise CommandError(
            f"{name[:120]!r} is no name for a pin: it takes letters, digits, '.', '_' and '-',"
            " begins with neither '.' nor '-', and has at most 100 characters"
        )


@dataclass(frozen=True, slots=True)
class Pin:
    """What is kept under one name.

    Attributes:
        roots: What was asked for.
        needs: What that refers to, and what this refers to, and so on; without the roots.
    """

    roots: tuple[StorePath, ...]
    needs: tuple[StorePath, ...]

    @property
    def paths(self) -> tuple[StorePath, ...]:
        """All of it."""
        return (*self.roots, *self.needs)

    @property
    def hash_parts(self) -> frozenset[HashPart]:
        """The hash parts of all of it."""
        return frozenset(path.hash_part for path in self.paths)


class PinFiles:
    """The pins of one store folder.

    Args:
        layout: The folder.
    """

    def __init__(self, layout: Layout) -> None:
        self._layout = layout

    def read(self) -> dict[str, Pin]:
        """Return all pins by name, sorted.

        Raises:
            StoreError: The disk failed.
        """
        return dict(self._read())

    def hash_parts(self) -> frozenset[HashPart]:
        """Return everything that is pinned.

        Raises:
            StoreError: The disk failed.
        """
        return frozenset[HashPart]().union(*(pin.hash_parts for pin in self.read().values()))

    def write(self, name: str, pin: Pin) -> None:
        """Make or replace a pin, durably and in one step.

        Raises:
            StoreError: The disk failed; what there was before is still there.
        """
        folder = self._layout.pins
        text = f"{_HEADER}{_lines(pin.roots)}\n{_lines(sorted(pin.needs))}"
        temporary = self._layout.partials / f"pin-{name}"
        with disk(f"cannot pin {name}"):
            folder.mkdir(exist_ok=True)
            with temporary.open("w") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(folder / name)
            _flush(self._layout)

    def remove(self, name: str) -> bool:
        """Remove a pin, durably; return whether there was one.

        Raises:
            StoreError: The disk failed.
        """
        with disk(f"cannot unpin {name}"):
            try:
                (self._layout.pins / name).unlink()
            except FileNotFoundError:
                return False
            _flush(self._layout)
            return True

    def _read(self) -> Iterator[tuple[str, Pin]]:
        with disk("cannot read the pins"):
            try:
                files = sorted(self._layout.pins.iterdir())
            except FileNotFoundError:
                return
            for file in files:
                if _NAME.fullmatch(file.name) and file.is_file():
                    yield file.name, _parse(file.read_text(errors="replace"))


def _lines(paths: Iterable[StorePath]) -> str:
    return "".join(f"{path}\n" for path in paths)


def _parse(text: str) -> Pin:
    """Read a pin; a line that is no store path keeps nothing, and does not harm the others."""
    blocks: list[list[StorePath]] = [[], []]
    block = blocks[0]
    for line in text.splitlines():
        if not line.strip() and blocks[0]:
            block = blocks[1]
        with contextlib.suppress(ParseError):
            block.append(StorePath.parse(line.strip()))
    return Pin(tuple(blocks[0]), tuple(blocks[1]))


def _flush(layout: Layout) -> None:
    """Wait until names are on the disk: those in the folder, and the folder's own."""
    for folder in (layout.pins, layout.root):
        flush(folder)
