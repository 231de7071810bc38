"""Who accepts clients: this process, or workers."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from typing import Protocol

from proxy.cli import assembly
from proxy.config import Config
from proxy.server.app import Server
from proxy.server.listening import Address, listening
from proxy.workers.messages import Rules, Setup
from proxy.workers.service import Core
from proxy.workers.supervisor import Supervisor


class Front(Protocol):
    """What accepts clients."""

    @property
    def addresses(self) -> Sequence[str]:
        """Where they find us."""

    async def use(self, config: Config) -> None:
        """Go by another configuration from now on."""


class _OneProcess:
    """This process."""

    def __init__(self, server: Server, addresses: Sequence[str]) -> None:
        self._server = server
        self.addresses = addresses

    async def use(self, config: Config) -> None:
        """Go by another configuration from now on."""
        self._server.strict = _strict(config)
        self._server.lane.forget_nars()


class Workers:
    """Processes besides this one."""

    def __init__(self, supervisor: Supervisor) -> None:
        self._supervisor = supervisor
        self.addresses = supervisor.addresses

    async def use(self, config: Config) -> None:
        """Go by another configuration from now on."""
        await self._supervisor.use(_rules(config))


@contextlib.asynccontextmanager
async def one_process(
    config: Config, core: Core, addresses: Sequence[Address], *, hurry: asyncio.Event
) -> AsyncIterator[Front]:
    """Accept clients here, until the block ends.

    Raises:
        ListenError: An address cannot be listened on.
    """
    server = Server(
        core.cache,
        prefetch=core.prefetch,
        cache_info=assembly.cache_info(config),
        observer=core.observer,
        operations=core.operations,
    )
    server.strict = _strict(config)
    timeout = config.server.shutdown_timeout
    async with listening(server, addresses, shutdown_timeout=timeout, hurry=hurry) as texts:
        yield _OneProcess(server, texts)


def setup(config: Config) -> Setup:
    """What workers are told before they begin."""
    return Setup(
        store=str(config.store.path),
        cache_info=assembly.cache_info(config).format(),
        shutdown_timeout=config.server.shutdown_timeout,
        rules=_rules(config),
    )


def _strict(config: Config) -> bool:
    return config.policy.mode == "strict" or config.policy.upstream_down == "error"


def _rules(config: Config) -> Rules:
    keyrings = tuple(
        None if keys is None else tuple(map(str, keys)) for keys in assembly.trusted_keys(config)
    )
    return Rules(keyrings, _strict(config))
