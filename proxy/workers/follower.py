"""The core's side of a file that arrives: tells one worker how far it is."""

from __future__ import annotations

import asyncio
import os
from typing import Final

from proxy.answers import File
from proxy.errors import ProxyError
from proxy.store.files import disk
from proxy.wire import Failed
from proxy.workers.link import Link
from proxy.workers.messages import Broken, Progress, Segment, Whole

SEGMENTS: Final = 4
"""Segments of memory that a worker may hold of one file, where the disk does not take it."""


class Follower:
    """Reads one file for a worker, or rather: knows where it is, and tells.

    A worker that is slow to listen hears of the last position only. Where the disk refuses the file, and
    it arrives in segments of memory, this reader goes no further than the worker's own readers let it.

    Args:
        number: How the worker calls the file.
        file: It; closed at the end.
        link: To the worker.
    """

    def __init__(self, number: int, file: File, link: Link) -> None:
        self._number = number
        self._file = file
        self._link = link
        self._fd = file.fd
        self._held = 0
        self._moved = asyncio.Event()

    async def run(self) -> None:
        """Tell how far the file is, until it ends or does not arrive."""
        position = 0
        try:
            while (released := await self._file.wait_beyond(position)) > position:
                if (
                    self._file.fd != self._fd
                ):  # the old one was open when the new one got its number
                    await self._hand_over(position)
                position = released
                self._link.tell(Progress(self._number, released, self._file.size))
                await self._link.drained()
            self._link.tell(Whole(self._number, position))
        except ProxyError as error:
            self._link.tell(Broken(self._number, Failed.of(error)))
        finally:
            self._file.close()

    def passed(self) -> None:
        """The worker has let go of a segment."""
        self._held -= 1
        self._moved.set()

    async def _hand_over(self, start: int) -> None:
        """Pass on the descriptor of the next segment, when the worker has room for it."""
        while self._held >= SEGMENTS:
            self._moved.clear()
            await self._moved.wait()
        self._held += 1
        self._fd = self._file.fd
        with disk("cannot read"):
            fd = os.dup(self._fd)
        self._link.hand_over(Segment(self._number, start), fd)
