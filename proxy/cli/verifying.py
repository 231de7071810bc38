"""Check a store while others may use it, and tell how far that is: in the daemon, or in a command."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from proxy.nix.nar_name import NarName
from proxy.nix.store_path import HashPart
from proxy.nix.trust import Trust
from proxy.store.files import disk
from proxy.store.folder import Store
from proxy.store.verification import Checked

TELL_EVERY = 0.5
"""Seconds between two reports of progress."""


async def verify_store(
    store: Store,
    trust: Trust,
    tell: Callable[[Mapping[str, Any]], Awaitable[None]],
    *,
    restart: bool = False,
    taken_out: Callable[[HashPart], object] | None = None,
) -> Mapping[str, Any]:
    """Check every path in a store, and take out what is damaged.

    A thread of its own does it, and gives way to all others. When this is cancelled it stops, and the
    next verification goes on there.

    Args:
        store: The open store.
        trust: Whose signatures count.
        tell: Told of progress: ``checked`` paths of ``total``, ``bytes`` read, and ``bad``, what was found
            since the last time, each with ``what``, ``outcome`` and ``reason``.
        restart: Begin at the beginning, wherever the last one stopped.
        taken_out: Called for each path of which something was taken out of the store; None where nobody
            else uses it.

    Returns:
        What was told last, of the whole, and ``resumed``: the hash part behind which it began.

    Raises:
        StoreError: The folder cannot be read.
    """
    loop = asyncio.get_running_loop()
    tally = _Tally()

    def set_aside(hash_part: HashPart, name: NarName | None, reason: str) -> None:
        store.take_out(hash_part, name, reason)
        if taken_out is not None:
            loop.call_soon_threadsafe(taken_out, hash_part)

    stop = threading.Event()
    verification = store.verification(trust, stop, set_aside, shared=taken_out is not None)
    if restart:
        verification.start_over()
    resumed = verification.begin

    def work() -> None:
        with disk("cannot check the store"):
            tally.total = verification.count()
            for checked in verification.run():
                tally.add(checked)

    with ThreadPoolExecutor(1, thread_name_prefix="verification") as threads:
        job = loop.run_in_executor(threads, work)
        try:
            while not job.done():
                await asyncio.wait({job}, timeout=TELL_EVERY)
                await tell(tally.news())
        finally:
            stop.set()
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait({job})
        await job
    return {**tally.summary(), "resumed": resumed}


class _Tally:
    """What was found so far. One thread adds, another one tells."""

    def __init__(self) -> None:
        self.total = 0
        self._checked = 0
        self._bytes = 0
        self._outcomes = {"sound": 0, "damaged": 0, "untrusted": 0}
        self._bad: list[Mapping[str, str]] = []
        self._lock = threading.Lock()

    def add(self, checked: Checked) -> None:
        with self._lock:
            self._checked += 1
            self._bytes += checked.size
            self._outcomes[checked.outcome] += 1
            if checked.outcome != "sound":
                self._bad.append(
                    {"what": checked.what, "outcome": checked.outcome, "reason": checked.reason}
                )

    def summary(self) -> Mapping[str, Any]:
        """What was found in all."""
        with self._lock:
            return {
                "checked": self._checked,
                "total": self.total,
                "bytes": self._bytes,
                **self._outcomes,
            }

    def news(self) -> Mapping[str, Any]:
        """The same, with what was found since the last time."""
        with self._lock:
            bad, self._bad = self._bad, []
        return {**self.summary(), "bad": bad}
