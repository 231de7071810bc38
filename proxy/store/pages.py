"""Pages of files: which are in memory, and bringing those that are not there without holding up the loop.

sendfile(2) waits for the disk where a page is missing, and with it everybody whom the event loop serves.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from concurrent.futures import ThreadPoolExecutor
from typing import Final

from proxy.errors import StoreError

STRIDE: Final = 2**18
"""Bytes between two pages that are looked at: the kernel reads ahead, and drops, in larger pieces."""

AHEAD: Final = 2**23
"""Bytes that the kernel is asked to read; most of them are there when their turn comes."""

DEADLINE: Final = 60.0
"""Seconds after which a disk that has not answered is given up."""

LITTLE: Final = 2**18
"""Bytes that the loop itself may ask for: one request to most disks. For many the loop might have to wait, as
a disk's queue is short."""

_PIECE: Final = 2**18
_READERS: Final = ThreadPoolExecutor(8, thread_name_prefix="read-ahead")


async def bring_in_beginning(fd: int) -> None:
    """Have the first page of a file in memory: of a small file, all that there is.

    Raises:
        StoreError: The disk does not answer.
    """
    if not are_in_memory(fd, 0, 1):
        await bring_in(fd, 0, 1, ahead=0)


def are_in_memory(fd: int, start: int, stop: int) -> bool:
    """Tell whether a part of a file can, in all likelihood, be read without waiting.

    False also where the file system cannot tell: those without ``RWF_NOWAIT`` are the slow ones.
    """
    try:
        look_at(fd, start, stop)
    except OSError:
        return False
    return True


def look_at(fd: int, start: int, stop: int) -> None:
    """See that a part of a file can, in all likelihood, be read without waiting.

    Raises:
        BlockingIOError: It cannot.
        OSError: The file system cannot tell, or cannot read.
    """
    byte = bytearray(1)
    for offset in (*range(start, stop - 1, STRIDE), stop - 1):
        os.preadv(fd, [byte], offset, os.RWF_NOWAIT)


def read_in_memory(fd: int, start: int, count: int) -> bytearray:
    """Read up to ``count`` bytes of a file: as many as can be read without waiting.

    Raises:
        BlockingIOError: None of it can.
        OSError: The file system cannot tell, or cannot read.
    """
    content = bytearray(count)
    del content[os.preadv(fd, [content], start, os.RWF_NOWAIT) :]
    return content


def ask_for(fd: int, size: int) -> bool:
    """Have the kernel read a file, without waiting, if it has no more than `LITTLE`; tell whether it has."""
    if size > LITTLE:
        return False
    with contextlib.suppress(OSError):
        os.posix_fadvise(fd, 0, size, os.POSIX_FADV_WILLNEED)
    return True


async def bring_in(fd: int, start: int, stop: int, *, ahead: int = AHEAD) -> None:
    """Have a part of a file read into memory by a thread, and ``ahead`` bytes of it by the kernel.

    Raises:
        StoreError: The disk does not answer. Whoever reads what is there finds out what else is wrong.
    """
    try:
        own = os.dup(fd)  # whoever waits may leave, and close the other
    except OSError:
        return
    work = asyncio.get_running_loop().run_in_executor(_READERS, _read, own, start, stop, ahead)
    try:
        async with asyncio.timeout(DEADLINE):
            await asyncio.shield(work)
    except TimeoutError:
        raise StoreError(f"the disk has not answered for {DEADLINE:.0f} seconds") from None


def _read(fd: int, start: int, stop: int, ahead: int) -> None:
    try:
        if ahead:
            os.posix_fadvise(fd, start, ahead, os.POSIX_FADV_WILLNEED)
        while start < stop:
            count = len(os.pread(fd, min(_PIECE, stop - start), start))
            if not count:
                return
            start += count
    except OSError:
        return
    finally:
        os.close(fd)
