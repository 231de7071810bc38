"""A disk that is small, and soon full: a tmpfs of the test's own."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest


@contextlib.contextmanager
def small_disk(folder: Path, *, size: int, inodes: int = 10_000) -> Iterator[Path]:
    """Mount a new file system of `size` bytes and `inodes` files at `folder`, which is made.

    Skips the test where mounting is not permitted.
    """
    folder.mkdir(parents=True)
    options = f"size={size},nr_inodes={inodes}"
    mounted = _mount("-t", "tmpfs", "-o", options, "small-disk", str(folder))
    if mounted.returncode != 0:
        pytest.skip(f"mounting is not permitted here: {mounted.stderr.decode().strip()}")
    try:
        yield folder
    finally:
        while folder.is_mount():  # what a test has mounted over it would outlive the test otherwise
            unmount(folder)


def unmount(folder: Path) -> None:
    """Take away what is mounted at `folder`, also from under those who use it."""
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def remount(folder: Path, *, size: int) -> None:
    """Mount another, empty file system there."""
    _mount("-t", "tmpfs", "-o", f"size={size}", "small-disk", str(folder)).check_returncode()


def mount_over(folder: Path, options: str) -> None:
    """Mount what is at `folder` there once more, with options; what is open stays as it was.

    The options are set aside first: a mount in which somebody writes does not become read-only (EBUSY).
    """
    aside = folder.with_name(f"{folder.name}-aside")
    aside.mkdir()
    _mount("--bind", str(folder), str(aside)).check_returncode()
    try:
        _mount("-o", f"remount,bind,{options}", str(aside)).check_returncode()
        _mount("--bind", str(aside), str(folder)).check_returncode()
    finally:
        unmount(aside)
        aside.rmdir()


def make_read_only(folder: Path) -> None:
    """Let nobody write to a small disk any more."""
    _mount("-o", "remount,ro", str(folder)).check_returncode()


def fill(folder: Path) -> Path:
    """Use up all space of a small disk; remove the returned file to have it back."""
    filler = folder / "filler"
    with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
        while file.write(bytes(4096)):
            pass
    assert shutil.disk_usage(folder).free == 0
    return filler


def _mount(*arguments: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(["mount", *arguments], check=False, capture_output=True)
