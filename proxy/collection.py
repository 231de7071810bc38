"""What an operator wants gone: find it, and evict it.

Both go page by page through what was used least recently, between everything else that the index does.
What is pinned, read or written stays.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

from proxy.errors import CommandError, ParseError, StoreError
from proxy.nix import narinfo
from proxy.nix.store_path import HashPart
from proxy.store.database import Database, narinfo_of
from proxy.store.eviction import Candidate, choose
from proxy.store.files import in_use
from proxy.store.folder import Store

PAGE = 200
"""Files looked at in one go."""


@dataclass(frozen=True, slots=True)
class Victim:
    """A file that goes: ``path`` is the store path of a NAR, or the file's name.

    ``size`` is bytes on disk, ``used`` when it was used last, in seconds since the epoch.
    """

    path: str
    size: int
    used: int


async def collect(
    store: Store, *, size: int | None, unused_since: int | None, dry_run: bool
) -> AsyncIterator[list[Victim]]:
    """Evict what an operator wants gone, least recently used first, and yield page by page what that was.

    Args:
        store: The store.
        size: Bytes that the folder may keep. With neither this nor ``unused_since``: down to the mark at
            which eviction ends by itself.
        unused_since: Seconds since the epoch; what was used last before that goes.
        dry_run: Only find out what would go.

    Raises:
        StoreError: The index does not answer.
    """
    index = store.index
    used, excess = await asyncio.wrap_future(index.measure())
    wanted = 0 if size is None else used - size
    if size is None and unused_since is None:
        wanted = excess
    last: Candidate | None = None
    while True:
        page = await asyncio.wrap_future(index.ask(_Page(last)))
        chosen = choose(page, wanted, unused_since)
        if not chosen:
            return
        last = chosen[-1]
        victims = await asyncio.to_thread(_described, store, chosen)
        if dry_run:
            gone = await asyncio.to_thread(_unused, store, chosen)
        else:
            evicted = await asyncio.wrap_future(index.evict([each.name for each in chosen]))
            gone = frozenset(evicted)
        wanted -= sum(each.size for each in chosen if each.name in gone)
        yield [victims[each.name] for each in chosen if each.name in gone]


@dataclass(frozen=True, slots=True)
class _Page:
    """A question to the index."""

    after: Candidate | None

    def __call__(self, database: Database) -> list[Candidate]:
        return database.oldest(PAGE, self.after)


def _unused(store: Store, chosen: Sequence[Candidate]) -> frozenset[str]:
    try:
        return frozenset(each.name for each in chosen if not in_use(store.layout.root / each.name))
    except OSError as error:
        raise CommandError(f"cannot look at the store: {error.strerror}") from error


def _described(store: Store, chosen: Sequence[Candidate]) -> dict[str, Victim]:
    return {each.name: Victim(_path(store, each.name), each.size, each.used) for each in chosen}


def _path(store: Store, name: str) -> str:
    """Return the store path of a NAR, which only its narinfo knows."""
    file = narinfo_of(name)
    if file is None:
        return name
    try:
        text = store.narinfo(HashPart(file.partition(".")[0]))
        return name if text is None else str(narinfo.parse(text).store_path)
    except (ParseError, StoreError):
        return name
