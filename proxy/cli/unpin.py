"""``unpin``: let go of what is kept under a name."""

from __future__ import annotations

import typer

from proxy.cli.asking import ask_anybody, configured
from proxy.cli.options import ConfigFile, PinName, StorePath


def unpin(name: PinName, config: ConfigFile = None, store: StorePath = None) -> None:
    """Let go of what is kept under a name; it stays until it has to make room."""
    ask_anybody(configured(config, store), "unpin", {"name": name})
    typer.echo(f"unpinned {name}")
