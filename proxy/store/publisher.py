"""Put verified files under their final names, durably, many at a time.

A file is on the disk before its name is, and a NAR's name before that of its narinfo:

1. write the narinfos to partial files; flush all the files of the batch to the disk (``fsync``);
2. rename the NARs and other files; flush their folders;
3. rename the narinfos; flush the store folder.

A crash between any two steps leaves a valid binary cache. Clients do not wait for any of this: while one
batch is being flushed the next one gathers, so that thousands of small NARs share a few journal commits
instead of waiting for one each. A batch waits a moment for company, since its flushes cost the same.

A file whose flush failed is given up, never flushed again: the kernel marks its pages clean after the
first failure, so that a second ``fsync`` would succeed without the bytes being on the disk.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import queue
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Protocol

from proxy.errors import StoreError
from proxy.store.files import Partial, flush
from proxy.store.provenance import label

BATCH = 512
"""Publications in one batch: bounds how long the first of them waits for the last."""

COMPANY = 0.02
"""Seconds that the first publication of a batch waits for others: about what flushing a batch takes."""

FLUSHERS = 8
"""Concurrent ``fsync``: the journal commits them together, while one after the other they would not."""


@dataclass(frozen=True, slots=True)
class Rename:
    """A file and the name that it shall have.

    Names are texts: a closure is thousands of them, and a `Path` of each takes as long as to rename it.
    ``content`` is what is to be written to the new file ``source``; None when that is complete already.
    """

    source: str
    target: str
    content: bytes | None = None


@dataclass(frozen=True, slots=True)
class Publication:
    """What belongs together: a NAR and then its narinfo, or one other file.

    ``superseded`` are derived files that are of no use afterwards; ``origin`` is the upstream's name.
    """

    renames: tuple[Rename, ...]
    origin: str
    superseded: tuple[str, ...] = ()
    done: Future[None] = field(default_factory=Future)
    """Resolves when everything is on the disk; fails with `StoreError`."""


class Publishing(Protocol):
    """What gives final names: a `Publisher`, or somebody who has one in another process."""

    def submit(self, publication: Publication) -> Future[None] | asyncio.Future[None]:
        """Queue a publication, on the event loop, and return its future, which nobody may cancel."""

    def close(self) -> None:
        """Publish what is queued, then stop. Blocks; call it off the event loop."""


MakePublisher = Callable[[Callable[[Publication], None]], Publishing]
"""Makes it, given what is called for each success before its future resolves, on any thread."""


class Publisher:
    """The one thread that gives final names.

    Args:
        on_published: Called on this thread for each success, before its future resolves.
    """

    def __init__(self, on_published: Callable[[Publication], None]) -> None:
        self._on_published = on_published
        self._queue: queue.SimpleQueue[Publication | None] = queue.SimpleQueue()
        self._flushers = ThreadPoolExecutor(FLUSHERS, thread_name_prefix="flush")
        self._thread = threading.Thread(target=self._run, name="publisher", daemon=True)
        self._thread.start()

    def submit(self, publication: Publication) -> Future[None]:
        """Queue a publication and return its future, which nobody can cancel."""
        publication.done.set_running_or_notify_cancel()
        self._queue.put(publication)
        return publication.done

    def close(self) -> None:
        """Publish what is queued, then stop. Blocks; call it off the event loop."""
        self._queue.put(None)
        self._thread.join()
        self._flushers.shutdown()

    def _run(self) -> None:
        more = True
        while more:
            batch, more = self._gather()
            try:
                self._publish(batch)
            except Exception as error:  # noqa: BLE001  # the thread has to live, and nobody may wait for ever
                for item in batch:
                    if not item.done.done():
                        item.done.set_exception(StoreError(f"cannot publish: {error!r}"))

    def _gather(self) -> tuple[list[Publication], bool]:
        """Wait for a publication, and take what else is there; False when it was the last batch."""
        first = self._queue.get()
        if first is None:
            return [], False
        batch = [first]
        time.sleep(COMPANY)  # to be woken by each of them would cost more
        with contextlib.suppress(queue.Empty):
            while len(batch) < BATCH:
                item = self._queue.get_nowait()
                if item is None:
                    return batch, False
                batch.append(item)
        return batch, True

    def _publish(self, batch: list[Publication]) -> None:
        share = -(-len(batch) // FLUSHERS) or 1
        shares = [batch[at : at + share] for at in range(0, len(batch), share)]
        flushed_shares = self._flushers.map(_write_and_flush_all, shares)
        batch = self._survivors(batch, itertools.chain.from_iterable(flushed_shares))
        for stage in (0, 1):
            batch = self._survivors(batch, (_rename(item, stage) for item in batch))
            folders = {folder for item in batch if (folder := _folder(item, stage)) is not None}
            flushed = {folder: _failure_of(flush, folder) for folder in folders}
            batch = self._survivors(
                batch,
                (
                    flushed.get(folder) if (folder := _folder(item, stage)) else None
                    for item in batch
                ),
            )
        for item in batch:
            for path in item.superseded:
                _failure_of(os.unlink, path)
            self._on_published(item)
            item.done.set_result(None)

    def _survivors(
        self, batch: list[Publication], outcomes: Iterable[OSError | StoreError | None]
    ) -> list[Publication]:
        """Give up the publications whose last step failed; return the others."""
        survivors = []
        for item, error in zip(batch, list(outcomes), strict=True):
            if error is None:
                survivors.append(item)
                continue
            for rename in item.renames:
                _failure_of(os.unlink, rename.source)
            name = os.path.basename(item.renames[0].target)
            item.done.set_exception(StoreError(f"cannot keep {name}: {error}"))
        return survivors


def _failure_of(step: Callable[..., object], *args: object) -> OSError | StoreError | None:
    try:
        step(*args)
    except (OSError, StoreError) as error:
        return error
    return None


def _write_and_flush(rename: Rename, origin: str) -> None:
    if rename.content is None:
        flush(rename.source)
        return
    partial = Partial(rename.source)
    try:
        partial.append(rename.content)
        label(rename.source, origin)
        partial.flush()
    finally:
        partial.close()


def _write_and_flush_all(items: Iterable[Publication]) -> list[OSError | StoreError | None]:
    return [_written_and_flushed(item) for item in items]


def _written_and_flushed(item: Publication) -> OSError | StoreError | None:
    failures = (_failure_of(_write_and_flush, rename, item.origin) for rename in item.renames)
    return next((error for error in failures if error is not None), None)


def _rename(item: Publication, stage: int) -> OSError | StoreError | None:
    if stage >= len(item.renames):
        return None
    rename = item.renames[stage]
    return _failure_of(os.replace, rename.source, rename.target)


def _folder(item: Publication, stage: int) -> str | None:
    return os.path.dirname(item.renames[stage].target) if stage < len(item.renames) else None
