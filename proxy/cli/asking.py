"""Commands that go with a daemon: done by the one that runs, or else on the store alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from proxy.cli.options import configuration
from proxy.config import Config
from proxy.control import client
from proxy.control.client import Progress
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
