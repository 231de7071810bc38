"""Commands done on the store alone, for which no daemon runs."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Mapping
from typing import Any

from proxy.cli import assembly
from proxy.cli.handlers import StoreCommands
from proxy.cli.verifying import verify_store
from proxy.config import Config
from proxy.control.client import Progress
from proxy.control.server import Tell
from proxy.events import ignore
from proxy.pins import FromStore, Pins
from proxy.store.eviction import Limits
from proxy.store.folder import Store


async def carry_out(
    config: Config, command: str, arguments: Mapping[str, Any], progress: Progress
) -> Mapping[str, Any]:
    """Carry out a command on the store, under its lock.

    Raises:
        CommandError: It cannot be done.
        StoreError: The store cannot be used, or somebody else has it.
    """
    limits = Limits(config.store.max_size, config.store.min_free)
    store = Store(config.store.path, assembly.cache_info(config), ignore, limits)
    try:
        pins = Pins(store, FromStore(store), limits)
        commands = StoreCommands(store, pins).table()
        return await commands[command](arguments, _teller(progress))
    finally:
        await store.close()


async def verify(config: Config, progress: Progress, *, restart: bool) -> Mapping[str, Any] | None:
    """Check everything in the store, until somebody interrupts it.

    Returns:
        What was found; None if somebody interrupted it.

    Raises:
        StoreError: The store cannot be used, or somebody else has it.
    """
    store = Store(config.store.path, assembly.cache_info(config), ignore)
    try:
        work = asyncio.ensure_future(
            verify_store(store, assembly.trust(config), _teller(progress), restart=restart)
        )
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, work.cancel)
        with contextlib.suppress(asyncio.CancelledError):
            return await work
        return None
    finally:
        await store.close()


def _teller(progress: Progress) -> Tell:
    async def tell(told: Mapping[str, Any]) -> None:  # as a daemon's does, which has to wait for it
        progress(told)

    return tell
