"""Pin closures: find out what belongs to them, fetch what is missing, and keep all of it.

A pin is made whole or not at all. What belongs to it is held from the moment that it is known, so that
nothing of it is evicted while the rest arrives; and a pin that is replaced holds until the new one is made.
"""

from __future__ import annotations

import asyncio
import itertools
from collections import deque
from collections.abc import Awaitable, Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from proxy.cache import Cache
from proxy.errors import CommandError, NotFoundError, ProxyError, StoreError
from proxy.nix import narinfo
from proxy.nix.nar_name import NarName
from proxy.nix.narinfo import NarInfo
from proxy.nix.store_path import HashPart, StorePath
from proxy.reader import Reader
from proxy.sizes import readable
from proxy.store.database import Database
from proxy.store.eviction import Limits, most_to_pin
from proxy.store.folder import Store
from proxy.store.pins import Pin, check_pin_name

T = TypeVar("T")

AT_ONCE = 8
"""Questions, and again downloads, at the same time: a quarter of what an upstream is given by default."""

MOST_PATHS = 200_000
"""Paths in one pin: some 40 systems."""

SLICE = 1_000
"""Paths that the index is asked about at once."""

LACKING = 20
"""Missing paths of a pin that are named."""

INTERVAL = 0.2
"""Seconds between two accounts of how far it is."""

NARINFO_SIZE = 4096
"""Bytes on disk of a narinfo that is not here yet."""


@dataclass(frozen=True, slots=True)
class Progress:
    """How far making a pin is: paths that are here, of how many are known of; and bytes to be fetched."""

    here: int
    paths: int
    to_fetch: int


@dataclass(frozen=True, slots=True)
class PinState:
    """A pin, and what is here of it: ``bytes`` on disk, and how many of its ``paths`` are ``missing``.

    ``lacking`` are the first of those, each with why it could not be fetched, as far as that was tried.
    """

    name: str
    roots: tuple[StorePath, ...]
    paths: int
    missing: int
    bytes: int
    lacking: tuple[tuple[StorePath, str], ...]


class Source(Protocol):
    """Where paths come from."""

    async def info(self, hash_part: HashPart) -> NarInfo:
        """Return a path's narinfo; raises `ProxyError` when it cannot be had."""

    async def keep(self, name: NarName) -> None:
        """Have a NAR in the store; raises `ProxyError` when that cannot be."""


class FromUpstreams:
    """Paths come from the store, and from the upstreams where they are not there."""

    def __init__(self, cache: Cache, store: Store) -> None:
        self._cache = cache
        self._store = store

    async def info(self, hash_part: HashPart) -> NarInfo:
        """Return a path's narinfo."""
        return (await self._cache.narinfo(hash_part)).known.info

    async def keep(self, name: NarName) -> None:
        """Have a NAR in the store."""
        with await self._cache.nar(name) as content:
            if isinstance(content.file, Reader):
                await content.file.fetch.over()
        await self._cache.settled(name)
        if not self._store.has_narinfo(name.hash_part):
            raise StoreError("the disk does not keep it at the moment")


class FromStore:
    """Paths come from the store alone."""

    def __init__(self, store: Store) -> None:
        self._store = store

    async def info(self, hash_part: HashPart) -> NarInfo:
        """Return a path's narinfo."""
        text = self._store.narinfo(hash_part)
        if text is None:
            raise NotFoundError("it is not in the store, and no daemon runs that could fetch it")
        return narinfo.parse(text)

    async def keep(self, name: NarName) -> None:
        """See that a NAR is in the store."""
        if not self._store.has_nar(name):
            raise NotFoundError(
                "its NAR is not in the store, and no daemon runs that could fetch it"
            )


class Pins:
    """The pins of a store. Made inside of a running event loop.

    Args:
        store: The store.
        source: Where paths come from.
        limits: What the store may take.

    Raises:
        StoreError: The disk failed.
    """

    def __init__(self, store: Store, source: Source, limits: Limits) -> None:
        self._store = store
        self._source = source
        self._limits = limits
        self._pins = store.pins.read()
        self._in_the_making: dict[object, frozenset[HashPart]] = {}
        self._reasons: dict[HashPart, str] = {}

    def __len__(self) -> int:
        return len(self._pins)

    async def pin(
        self,
        name: str,
        roots: Sequence[StorePath],
        tell: Callable[[Progress], Awaitable[None]],
    ) -> PinState:
        """Keep paths and all that they need under a name; what that name kept before is let go.

        Args:
            name: A name that `check_pin_name` lets pass.
            roots: The paths.
            tell: Called now and then.

        Raises:
            CommandError: It cannot be done, and nothing was changed.
            StoreError: The disk failed.
        """
        check_pin_name(name)
        making = object()
        try:
            closure = await self._closure(roots, tell)
            self._in_the_making[making] = frozenset(closure)
            await self._hold()
            await self._refuse_too_much(name, closure)
            await self._fetch(closure, tell)
            known = dict.fromkeys(roots)
            pin = Pin(
                tuple(known),
                tuple(info.store_path for info in closure.values() if info.store_path not in known),
            )
            await asyncio.to_thread(self._store.pins.write, name, pin)
            self._pins[name] = pin
        finally:
            self._in_the_making.pop(making, None)
            self._store.index.pin(self._union(self._pins))
        return await self._state(name)

    async def unpin(self, name: str) -> None:
        """Let go of what is kept under a name.

        Raises:
            CommandError: There is no such pin.
            StoreError: The disk failed.
        """
        check_pin_name(name)
        if not await asyncio.to_thread(self._store.pins.remove, name):
            raise CommandError(f"there is no pin {name}")
        self._pins.pop(name, None)
        await self._hold()

    async def all(self) -> list[PinState]:
        """Return all pins, and what is here of them."""
        return [await self._state(name) for name in sorted(self._pins)]

    async def mend(self) -> int:
        """Fetch what is missing of pins, as far as it can be had and fits; return how much is missing then.

        Raises:
            StoreError: The index does not answer.
        """
        paths = {path.hash_part: path for pin in self._pins.values() for path in pin.paths}
        sizes = await self._sizes(paths)
        missing = deque(paths[each] for each, size in sizes.items() if size is None)
        limit = most_to_pin(self._limits)
        room = None if limit is None else limit - sum(size or 0 for size in sizes.values())
        reasons: dict[HashPart, str] = {}

        async def fetch(path: StorePath) -> None:
            nonlocal room
            try:
                info = await self._info(path)
                if room is None or _announced(info) <= room:
                    room = None if room is None else room - _announced(info)
                    await _for(path, self._source.keep(info.nar_name))
                else:
                    reasons[path.hash_part] = f"cannot keep {path}: it does not fit below max_size"
            except CommandError as error:
                reasons[path.hash_part] = str(error)

        async def tell() -> None:
            """Nobody listens."""

        await _work_through(missing, fetch, tell)
        self._reasons = reasons
        return len(reasons)

    async def excess(self) -> int:
        """Return by how many bytes the pins exceed what can be pinned."""
        limit = most_to_pin(self._limits)
        if limit is None:
            return 0
        sizes = await self._sizes(self._union(self._pins))
        return max(0, sum(size for size in sizes.values() if size is not None) - limit)

    async def _closure(
        self, roots: Sequence[StorePath], tell: Callable[[Progress], Awaitable[None]]
    ) -> dict[HashPart, NarInfo]:
        """Find out what paths need, and what that needs, and so on."""
        found: dict[HashPart, NarInfo] = {}
        seen = {path.hash_part for path in roots}
        todo = deque(dict.fromkeys(roots))

        async def look_up(path: StorePath) -> None:
            info = await self._info(path)
            found[path.hash_part] = info
            for reference in info.references:
                if reference.hash_part not in seen:
                    seen.add(reference.hash_part)
                    todo.append(reference)
            if len(seen) > MOST_PATHS:
                raise CommandError(f"a pin has at most {MOST_PATHS} paths")

        await _work_through(todo, look_up, lambda: tell(Progress(0, len(seen), 0)))
        return found

    async def _info(self, path: StorePath) -> NarInfo:
        """Return the narinfo of a path that is to be kept.

        Raises:
            CommandError: It cannot be had, or is another's.
        """
        info = await _for(path, self._source.info(path.hash_part))
        if info.store_path != path:
            raise CommandError(f"cannot keep {path}: it is {info.store_path}")
        return info

    async def _fetch(
        self,
        closure: dict[HashPart, NarInfo],
        tell: Callable[[Progress], Awaitable[None]],
    ) -> None:
        """Have all of a closure in the store."""
        sizes = await self._sizes(closure)
        missing = deque(closure[each] for each, size in sizes.items() if size is None)
        here = len(closure) - len(missing)
        to_fetch = sum(map(_announced, missing))

        async def keep(info: NarInfo) -> None:
            nonlocal here, to_fetch
            await _for(info.store_path, self._source.keep(info.nar_name))
            here += 1
            to_fetch -= _announced(info)

        await _work_through(missing, keep, lambda: tell(Progress(here, len(closure), to_fetch)))

    async def _refuse_too_much(self, name: str, closure: dict[HashPart, NarInfo]) -> None:
        """See that eviction can still reach its mark when this is pinned, too.

        Raises:
            CommandError: It could not.
        """
        limit = most_to_pin(self._limits)
        if limit is None:
            return
        others = self._union(other for other in self._pins if other != name)
        sizes = await self._sizes(others.union(closure))
        total = sum(
            size if size is not None else _announced(closure[each]) if each in closure else 0
            for each, size in sizes.items()
        )
        if total > limit:
            raise CommandError(
                f"cannot pin {name}: with it {readable(total)} would be pinned, and at most"
                f" {readable(limit)} can be with max_size = {readable(self._limits.max_size)}"
            )

    async def _state(self, name: str) -> PinState:
        pin = self._pins[name]
        sizes = await self._sizes(pin.hash_parts)
        here = [size for size in sizes.values() if size is not None]
        lacking = (path for path in pin.paths if sizes[path.hash_part] is None)
        first = itertools.islice(lacking, LACKING)
        reasons = tuple((path, self._reasons.get(path.hash_part, "")) for path in first)
        return PinState(name, pin.roots, len(sizes), len(sizes) - len(here), sum(here), reasons)

    async def _sizes(self, hash_parts: Iterable[HashPart]) -> dict[HashPart, int | None]:
        """Return what paths take on the disk; None for those that are not here."""
        wanted = list(hash_parts)
        sizes: dict[HashPart, int | None] = {}
        for start in range(0, len(wanted), SLICE):
            some = wanted[start : start + SLICE]

            def look(database: Database, some: Sequence[HashPart] = some) -> list[int | None]:
                return [
                    None if (size := database.sizes(each)) is None else sum(size) for each in some
                ]

            found = await asyncio.wrap_future(self._store.index.ask(look))
            sizes.update(zip(some, found, strict=True))
        return sizes

    def _union(self, names: Iterable[str]) -> frozenset[HashPart]:
        pins = (self._pins[name].hash_parts for name in names)
        return frozenset[HashPart]().union(*pins, *self._in_the_making.values())

    def _hold(self) -> Awaitable[None]:
        """Let nothing be evicted of what is pinned or about to be; to be awaited where that matters."""
        return asyncio.wrap_future(self._store.index.pin(self._union(self._pins)))


def _announced(info: NarInfo) -> int:
    return (info.file_size or info.nar_size) + NARINFO_SIZE


async def _for(path: StorePath, work: Awaitable[T]) -> T:
    """Say of what fails for which path it was."""
    try:
        return await work
    except CommandError:
        raise
    except ProxyError as error:
        raise CommandError(f"cannot keep {path}: {error}") from error


async def _work_through(
    todo: deque[T],
    work: Callable[[T], Awaitable[None]],
    tell: Callable[[], Awaitable[None]],
) -> None:
    """Do what is to be done, which may become more meanwhile, some at a time; the first failure ends it."""
    loop = asyncio.get_running_loop()
    running: set[asyncio.Future[None]] = set()
    told = 0.0
    try:
        while todo or running:
            while todo and len(running) < AT_ONCE:
                running.add(asyncio.ensure_future(work(todo.popleft())))
            done, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
            for each in done:
                each.result()
            if loop.time() - told > INTERVAL:
                told = loop.time()
                await tell()
    finally:
        await _cancelled(running)


async def _cancelled(tasks: Collection[asyncio.Future[None]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
