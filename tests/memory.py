"""Files that stay in memory, whatever the kernel would take out of it: it may do so at any time."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Self

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


def _check(succeeded: bool) -> None:  # noqa: FBT001  # what a system call says
    if not succeeded:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
