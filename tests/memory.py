"""Files that stay in memory, though the kernel may take any out of it at any time; and files that do not."""

from __future__ import annotations

import ctypes
import mmap
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Self

import pytest

_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.mmap.restype = ctypes.c_void_p
_LIBC.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
_LIBC.mlock.argtypes = _LIBC.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_FAILED = ctypes.c_void_p(-1).value


class InMemory:
    """Files that are kept in memory until the end of a ``with`` block (mlock(2)).

    Args:
        paths: Some of them; those that are not there, or empty, are left out.
    """

    def __init__(self, paths: Iterable[Path] = ()) -> None:
        self._areas: dict[Path, tuple[int, int]] = {}
        for path in paths:
            self.keep(path)

    def keep(self, path: Path) -> None:
        """Bring a file in, and keep it."""
        self.let_go(path)
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return
        try:
            size = os.fstat(fd).st_size
            if size:
                start = _LIBC.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, fd, 0)
                _check(start != _FAILED)
                self._areas[path] = (start, size)
                _check(_LIBC.mlock(start, size) == 0)
        finally:
            os.close(fd)

    def let_go(self, path: Path) -> None:
        """Leave a file to the kernel again."""
        if path in self._areas:
            _check(_LIBC.munmap(*self._areas.pop(path)) == 0)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for path in tuple(self._areas):
            self.let_go(path)


def drop_pages(path: Path) -> None:
    """Have the kernel forget the pages of a file, so that reading it means reading the disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        for _ in range(100):  # what has just been written is kept for a moment
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            if not pages_in_memory(fd):
                return
            time.sleep(0.01)
        pytest.skip("the file system keeps all pages in memory")
    finally:
        os.close(fd)


def pages_in_memory(fd: int) -> int:
    """Count them by mincore(2); to ask by reading would bring them in."""
    size = os.fstat(fd).st_size
    vector = (ctypes.c_ubyte * -(-size // mmap.PAGESIZE))()
    with mmap.mmap(fd, size, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE) as area:
        first = ctypes.c_char.from_buffer(area)
        failed = _LIBC.mincore(
            ctypes.c_void_p(ctypes.addressof(first)), ctypes.c_size_t(size), vector
        )
        del first
    _check(not failed)
    return sum(each & 1 for each in vector)


def _check(succeeded: bool) -> None:  # noqa: FBT001  # what a system call says
    if not succeeded:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
