"""What operators are told of a running proxy."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from proxy import __version__
from proxy.cli import assembly
from proxy.config import Config
from proxy.failover import Failover
from proxy.metrics import Metrics
from proxy.server.page import Facts
from proxy.store.folder import Store
from proxy.upstream.breaker import State
from proxy.upstream.remote import Upstream


async def _nothing() -> None:
    """Where one process does all, there is nobody to wait for."""


class Operations:
    """The `proxy.server.backend.Operations` of a daemon.

    Args:
        config: Returns the configuration that is in force.
        failover: Returns the upstreams that are asked.
        store: What is kept.
        metrics: What was counted.
    """

    def __init__(
        self,
        config: Callable[[], Config],
        failover: Callable[[], Failover],
        store: Store,
        metrics: Metrics,
    ) -> None:
        self._config = config
        self._failover = failover
        self._store = store
        self._metrics = metrics
        self.collect: Callable[[], Awaitable[None]] = _nothing
        """Waits until what other processes have counted is here."""

    async def facts(self) -> Facts:
        """Return what the page says."""
        config = self._config()
        return Facts(
            upstreams=[_described(source.upstream) for source in self._failover().sources],
            keys=assembly.public_keys(config),
            paths=self._store.totals.paths,
            size=self._store.totals.bytes,
            version=__version__,
            mode=config.policy.mode,
        )

    async def metrics(self) -> tuple[bytes, str]:
        """Return the rendered metrics, and their content type."""
        await self.collect()
        return self._metrics.render()

    async def check_store(self) -> str:
        """Find out why the disk keeps nothing; an empty text while it does."""
        return await self._store.check()


def _described(upstream: Upstream) -> str:
    """Say where an upstream is, and whether it is asked."""
    asked = upstream.breaker.state is State.CLOSED
    return upstream.url if asked else f"{upstream.url} (has failed, and is left alone for now)"
