"""What upstreams said of paths whose NARs are not here, for as long as clients may come for them.

It is written to the disk a while later, by a thread, and only if its NAR has not been published by then: of a
closure that is being pulled nearly all have, and making and removing a file for each would cost as much as
the narinfo itself. Losing what is not written yet costs one question to the upstream.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from pathlib import Path

from proxy.errors import StoreError
from proxy.nix.store_path import HashPart
from proxy.recent import Recent
from proxy.store.files import disk
from proxy.store.layout import Layout
from proxy.store.reader import read

DELAY = 15.0
"""Seconds, once to twice as many, in which a narinfo's NAR may come and make it superfluous."""

PENDING = 16 * 2**20
"""Bytes of narinfos that are not written yet, some 10,000 of them; what is older than that is lost."""


class Remembered:
    """Upstreams' own narinfos, by upstream and hash part.

    Made inside of a running event loop, and used there; closed with `close`.

    Args:
        layout: Where they are kept.
        write: Replaces a small file in one step; called on a thread.
        on_failure: Called on that thread, when the disk refuses.
    """

    def __init__(
        self,
        layout: Layout,
        write: Callable[[Path, bytes], None],
        on_failure: Callable[[Path, StoreError], None],
    ) -> None:
        self._layout = layout
        self._write = write
        self._on_failure = on_failure
        self._loop = asyncio.get_running_loop()
        self._pending: Recent[tuple[str, HashPart], bytes] = Recent(PENDING, weigh=len)
        self._aged: dict[tuple[str, HashPart], bytes] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._writing: asyncio.Future[None] | None = None

    def get(self, upstream: str, hash_part: HashPart) -> bytes | None:
        """Return what an upstream said of a path, or None.

        Raises:
            StoreError: The disk failed.
        """
        pending = self._pending.get((upstream, hash_part))
        if pending is not None:
            return pending
        return read(self._layout.remembered_narinfo_name(upstream, hash_part))

    def put(self, upstream: str, hash_part: HashPart, text: bytes) -> None:
        """Take in what an upstream said of a path."""
        self._pending.put((upstream, hash_part), text)
        if self._timer is None:
            self._timer = self._loop.call_later(DELAY, self._begin_writing)

    def supersede(self, upstream: str, hash_part: HashPart) -> None:
        """Do not write what is not written yet."""
        self._pending.drop((upstream, hash_part))

    def forget(self, upstream: str, hash_part: HashPart) -> None:
        """Forget what an upstream said of a path. Never fails."""
        self.supersede(upstream, hash_part)
        with contextlib.suppress(OSError):
            self._layout.remembered_narinfo(upstream, hash_part).unlink(missing_ok=True)

    async def close(self) -> None:
        """Write what is pending."""
        if self._timer is not None:
            self._timer.cancel()
        if self._writing is not None:
            await asyncio.gather(self._writing, return_exceptions=True)
        await asyncio.to_thread(self._write_all, dict(self._pending.items()))

    def _begin_writing(self) -> None:
        """Write what was there the last time already."""
        batch, self._aged = self._aged, dict(self._pending.items())
        self._writing = self._loop.run_in_executor(None, self._write_all, batch)
        self._writing.add_done_callback(lambda _writing: self._written(batch))

    def _written(self, batch: dict[tuple[str, HashPart], bytes]) -> None:
        for key, text in batch.items():
            if self._pending.peek(key) is text:
                self._pending.drop(key)
        self._timer = None
        if len(self._pending):
            self._timer = self._loop.call_later(DELAY, self._begin_writing)

    def _write_all(self, batch: dict[tuple[str, HashPart], bytes]) -> None:
        """Write them, as long as the disk takes them. On a thread."""
        for (upstream, hash_part), text in batch.items():
            if self._pending.peek((upstream, hash_part)) is not text:
                continue  # superseded meanwhile
            path = self._layout.remembered_narinfo(upstream, hash_part)
            try:
                with disk("cannot remember a narinfo"):
                    path.parent.mkdir(parents=True, exist_ok=True)
                    self._write(path, text)
            except StoreError as error:
                self._on_failure(path, error)
                return
