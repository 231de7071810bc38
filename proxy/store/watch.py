"""Watch the disk: look at it after every failure, and while it fails from time to time."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable

from proxy.errors import StoreError
from proxy.events import Observer, StoreChanged
from proxy.store.health import Health

PATIENCE = 10.0
"""Seconds after which a disk that does not answer has failed."""


class Watch:
    """Finds out whether the disk keeps anything. Made inside of a running event loop.

    Args:
        probe: Writes something durably; raises `StoreError` when that fails. Called on a thread.
        observer: Told when the disk begins to fail, and when it works again.
        clock: Seconds on a monotonic clock.
    """

    def __init__(
        self,
        probe: Callable[[], None],
        observer: Observer,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._probe = probe
        self._observer = observer
        self._clock = clock
        self._health = Health()
        self._loop = asyncio.get_running_loop()
        self._probing: asyncio.Task[None] | None = None
        self._job: asyncio.Future[None] | None = (
            None  # outlives a probe that the disk keeps waiting
        )
        self._again: asyncio.TimerHandle | None = None
        self._closed = False

    @property
    def reason(self) -> str:
        """Why nothing is kept; empty while the disk works."""
        return self._health.reason

    def failed(self) -> None:
        """Something could not be written; find out whether that is so in general. From any thread."""
        self._loop.call_soon_threadsafe(self._look)

    def suspected(self) -> None:
        """Something may be wrong; find out, unless something is known to be. From any thread."""
        if not self.reason:
            self.failed()

    async def check(self) -> str:
        """Look at the disk now, once for all who ask, and return what `reason` says then."""
        self._look()
        if self._probing is not None:
            await asyncio.shield(self._probing)
        return self.reason

    async def close(self) -> None:
        """Look no more."""
        self._closed = True
        if self._again is not None:
            self._again.cancel()
        if self._probing is not None:
            self._probing.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._probing

    def _look(self) -> None:
        if self._probing is None and not self._closed:
            self._probing = asyncio.create_task(self._find_out())
            self._probing.add_done_callback(self._found_out)

    async def _find_out(self) -> None:
        if self._job is None:
            self._job = self._loop.run_in_executor(None, self._probe)
        await asyncio.wait({self._job}, timeout=PATIENCE)
        reason = "the disk does not answer"
        if self._job.done():
            error, self._job = self._job.exception(), None
            if error is not None and not isinstance(error, StoreError):
                raise error
            reason = "" if error is None else str(error)
        if self._health.probed(self._clock(), reason):
            self._observer(StoreChanged(reason))

    def _found_out(self, _task: asyncio.Task[None]) -> None:
        self._probing = None
        if self._again is not None:
            self._again.cancel()
        if self.reason and not self._closed:
            self._again = self._loop.call_later(self._health.pause, self._look)
