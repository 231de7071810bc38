"""Commands that go with a daemon: done by the one that runs, or else on the store alone."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from proxy.cli.options import configuration
from proxy.config import Config
from proxy.control import client
from proxy.control.client import Progress
from proxy.errors import NotRunningError, StoreError
from proxy.store.layout import Layout


def configured(config: Path | None, store: str | None) -> Config:
    """Read the configuration as ``serve`` does, which says where the store is.

    Raises:
        ConfigError: It is wrong.
    """
    return configuration(config, None, store, None, None)


def ask_daemon(
    config: Config,
    command: str,
    arguments: Mapping[str, Any],
    progress: Progress = lambda _told: None,
) -> Mapping[str, Any]:
    """Have the running daemon carry out a command.

    Raises:
        NotRunningError: No daemon has the store.
        CommandError: It cannot be done.
    """
    return client.ask(Layout(config.store.path).control, command, arguments, progress)


def ask_anybody(
    config: Config,
    command: str,
    arguments: Mapping[str, Any],
    progress: Progress = lambda _told: None,
) -> Mapping[str, Any]:
    """Have the running daemon carry out a command; without one, do it on the store alone.

    Raises:
        CommandError: It cannot be done.
        StoreError: There is no store, or it cannot be used, or somebody else has it.
    """
    try:
        return ask_daemon(config, command, arguments, progress)
    except NotRunningError:
        refuse_absent(config)
    from proxy.cli import alone  # noqa: PLC0415  # takes long, and a daemon makes it needless

    return asyncio.run(alone.carry_out(config, command, arguments, progress))


def refuse_absent(config: Config) -> None:
    """See that there is a store for a command that finds no daemon: none is made for it.

    Raises:
        StoreError: There is none.
    """
    path = config.store.path
    if path.exists() and not path.is_dir():
        raise StoreError(f"no daemon runs on {path}, which is no folder")
    if not Layout(path).cache_info.exists():
        raise StoreError(f"no daemon runs on {path}, and there is no store")
