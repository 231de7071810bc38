"""What commands have the daemon do: from their arguments to their results, both as JSON."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from proxy import __version__
from proxy.cache import Cache
from proxy.config import Config
from proxy.control.server import Command, Tell
from proxy.store.folder import Store


@dataclass(frozen=True, slots=True)
class Handlers:
    """The commands of a running daemon.

    Attributes:
        store: Its store.
        cache: Its cache.
        config: Returns the configuration in force.
        listen: Where it listens.
    """

    store: Store
    cache: Cache
    config: Callable[[], Config]
    listen: Sequence[str]

    def table(self) -> dict[str, Command]:
        """Return what can be asked for, by name."""
        return {"status": self.status}

    async def status(self, _arguments: Mapping[str, Any], _tell: Tell) -> Mapping[str, Any]:
        """Say what the daemon is and has."""
        config = self.config()
        return {
            "pid": os.getpid(),
            "version": __version__,
            "listen": [*self.listen],
            "store": str(self.store.layout.root),
            "paths": self.store.totals.paths,
            "bytes": self.store.totals.bytes,
            "max_size": config.store.max_size,
            "min_free": config.store.min_free,
            "fetches": self.cache.fetches_in_flight,
            "upstreams": [{"name": each.name, "url": each.url} for each in config.upstreams],
        }
