"""A disk whose power can be cut: what has reached it stays, what was only in memory is gone.

An ext4 file system lies in an image, and the image lies on XFS, which copies a file in one step
(ioctl_ficlone(2)). Such a copy, taken while the system writes, holds exactly what had been written to the
block device at that moment: mounting it replays ext4's journal, as after a power cut. Pages that nobody has
flushed are not in it, so a missing fsync(2) shows. Writes that a drive's own cache reorders do not:
ext4 has the drive flush that cache before each commit, which a loop device obeys.
"""

from __future__ import annotations

import contextlib
import fcntl
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import require_tool
from tests.small_disk import unmount

_FICLONE = 0x40049409
"""_IOW(0x94, 9, int) of linux/fs.h."""

MIB = 2**20


class PowerCut:
    """An ext4 file system that can be seen as a power cut would leave it.

    Attributes:
        disk: Where it is mounted.
        cuts: How often the power was cut.
    """

    def __init__(self, folder: Path, image: Path) -> None:
        self.disk = folder / "disk"
        self.cuts = 0
        self._folder = folder
        self._image = image

    def cut(self) -> Path:
        """Take a copy of what has reached the disk, in one step, and return it."""
        self.cuts += 1
        copy = self._image.with_name(f"cut{self.cuts}.img")
        with self._image.open("rb") as source, copy.open("wb") as target:
            fcntl.ioctl(target, _FICLONE, source.fileno())
        return copy

    @contextlib.contextmanager
    def restored(self, copy: Path) -> Iterator[Path]:
        """Switch the power on again: mount a copy, and remove it afterwards."""
        place = self._folder / "restored"
        place.mkdir(exist_ok=True)
        with _mounted(copy, place):
            yield place
        copy.unlink()


@contextlib.contextmanager
def power_cut(folder: Path, *, size: int = 192 * MIB, copies: int = 4) -> Iterator[PowerCut]:
    """Make such a disk of `size` bytes, with room for so many changed copies of it.

    Skips the test where file systems cannot be mounted.
    """
    require_tool("mkfs.xfs", "mkfs.ext4", "losetup")
    folder.mkdir()
    outer, below = folder / "outer.img", folder / "outer"
    below.mkdir()
    _allocate(outer, max(300 * MIB, (copies + 1) * size))
    _make("mkfs.xfs", "-q", "-m", "reflink=1", str(outer))
    with _mounted(outer, below):
        image = below / "disk.img"
        _allocate(image, size)
        _make("mkfs.ext4", "-q", "-E", "lazy_itable_init=0,lazy_journal_init=0", str(image))
        machine = PowerCut(folder, image)
        machine.disk.mkdir()
        with _mounted(image, machine.disk):
            yield machine


@contextlib.contextmanager
def _mounted(image: Path, place: Path) -> Iterator[None]:
    mounted = subprocess.run(
        ["mount", "-o", "loop", str(image), str(place)], check=False, capture_output=True
    )
    if mounted.returncode != 0:
        pytest.skip(f"mounting is not permitted here: {mounted.stderr.decode().strip()}")
    try:
        yield
    finally:
        unmount(place)


def _allocate(path: Path, size: int) -> None:
    with path.open("wb") as file:
        file.truncate(size)


def _make(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)
