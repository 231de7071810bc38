"""What commands have done: from their arguments to their results, both as JSON."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from proxy import __version__
from proxy.cache import Cache
from proxy.cli.verifying import verify_store
from proxy.collection import collect
from proxy.control.server import Command, Tell
from proxy.errors import CommandError, ParseError
from proxy.events import Mode
from proxy.failover import Failover
from proxy.nix.store_path import StorePath
from proxy.pins import Pins, PinState, Progress
from proxy.store.eviction import most_to_pin
from proxy.store.folder import Store
from proxy.upstream.breaker import State


@dataclass(frozen=True, slots=True)
class StoreCommands:
    """What can be done with a store, be there a daemon or not.

    Attributes:
        store: The store.
        pins: Its pins.
    """

    store: Store
    pins: Pins

    def table(self) -> dict[str, Command]:
        """Return what can be asked for, by name."""
        return {"pin": self.pin, "unpin": self.unpin, "pins": self.list_pins, "gc": self.gc}

    async def pin(self, arguments: Mapping[str, Any], tell: Tell) -> Mapping[str, Any]:
        """Keep closures under a name: ``name``, ``paths``."""

        async def tell_progress(progress: Progress) -> None:
            await tell(asdict(progress))

        match arguments:
            case {"name": str(name), "paths": [_, *_] as paths}:
                roots = [_store_path(each) for each in paths]
            case _:
                raise CommandError("pin takes a name and store paths")
        return _pin(await self.pins.pin(name, roots, tell_progress))

    async def unpin(self, arguments: Mapping[str, Any], _tell: Tell) -> Mapping[str, Any]:
        """Let go of a pin: ``name``."""
        match arguments:
            case {"name": str(name)}:
                await self.pins.unpin(name)
                return {}
            case _:
                raise CommandError("unpin takes a name")

    async def list_pins(self, _arguments: Mapping[str, Any], tell: Tell) -> Mapping[str, Any]:
        """Tell of every pin; the result is how much can be pinned at all."""
        for pin in await self.pins.all():
            await tell(_pin(pin))
        return {"limit": most_to_pin(self.store.limits)}

    async def gc(self, arguments: Mapping[str, Any], tell: Tell) -> Mapping[str, Any]:
        """Evict: ``size`` and ``older_than`` (seconds) or None, ``dry_run``. Tells of all that goes."""
        match arguments:
            case {
                "size": int() | None as size,
                "older_than": int() | float() | None as older_than,
                "dry_run": bool(dry_run),
            }:
                since = None if older_than is None else int(time.time() - older_than)
            case _:
                raise CommandError("gc takes a size, an age, and whether it is for real")
        count = freed = 0
        before, _ = await asyncio.wrap_future(self.store.index.measure())
        async for page in collect(self.store, size=size, unused_since=since, dry_run=dry_run):
            count += len(page)
            freed += sum(each.size for each in page)
            await tell({"gone": [asdict(each) for each in page]})
        return {"files": count, "bytes": freed, "before": before}


@dataclass(frozen=True, slots=True)
class DaemonCommands:
    """The commands of a running daemon.

    Attributes:
        on_store: What can be done with its store.
        cache: Its cache.
        failover: Returns the upstreams that are asked.
        mode: Returns how they are treated.
        set_mode: Has them treated otherwise.
        listen: Where it listens.
    """

    on_store: StoreCommands
    cache: Cache
    failover: Callable[[], Failover]
    mode: Callable[[], Mode]
    set_mode: Callable[[Mode], Awaitable[None]]
    listen: Sequence[str]
    _verifying: asyncio.Lock = field(default_factory=asyncio.Lock, init=False)

    def table(self) -> dict[str, Command]:
        """Return what can be asked for, by name."""
        own = {"status": self.status, "mode": self.change_mode, "verify": self.verify}
        return {**self.on_store.table(), **own}

    async def change_mode(self, arguments: Mapping[str, Any], _tell: Tell) -> Mapping[str, Any]:
        """Treat upstreams otherwise until the configuration is read again: ``mode``; or None to ask."""
        match arguments:
            case {"mode": None}:
                pass
            case {"mode": "auto" | "offline" | "strict" as mode}:
                await self.set_mode(mode)
            case _:
                raise CommandError("mode is auto, offline or strict")
        return {"mode": self.mode()}

    async def verify(self, arguments: Mapping[str, Any], tell: Tell) -> Mapping[str, Any]:
        """Check everything in the store again: ``restart``, to begin at the beginning."""
        match arguments:
            case {"restart": bool(restart)}:
                pass
            case _:
                raise CommandError("verify takes whether to begin anew")
        if self._verifying.locked():
            raise CommandError("the store is being verified already")
        async with self._verifying:
            return await verify_store(
                self.on_store.store,
                self.failover().trust,
                tell,
                restart=restart,
                taken_out=self.cache.taken_out,
            )

    async def status(self, _arguments: Mapping[str, Any], _tell: Tell) -> Mapping[str, Any]:
        """Say what the daemon is and has."""
        store = self.on_store.store
        return {
            "pid": os.getpid(),
            "version": __version__,
            "listen": [*self.listen],
            "store": str(store.layout.root),
            "paths": store.totals.paths,
            "bytes": store.totals.bytes,
            "folder_bytes": store.index.used_bytes,
            "max_size": store.limits.max_size,
            "min_free": store.limits.min_free,
            "not_keeping": store.not_keeping,
            "pins": len(self.on_store.pins),
            "fetches": self.cache.fetches_in_flight,
            "mode": self.mode(),
            "upstreams": [
                {
                    "name": source.upstream.name,
                    "url": source.upstream.url,
                    "asked": source.upstream.breaker.state is State.CLOSED,
                }
                for source in self.failover().sources
            ],
        }


def _store_path(text: object) -> StorePath:
    try:
        return StorePath.parse(str(text))
    except ParseError as error:
        raise CommandError(f"{str(text)[:300]!r} is no store path: {error.reason}") from error


def _pin(pin: PinState) -> Mapping[str, Any]:
    lacking = [{"path": str(path), "reason": reason} for path, reason in pin.lacking]
    return {**asdict(pin), "roots": [str(path) for path in pin.roots], "lacking": lacking}
