"""``mode``: whether upstreams are asked, and whether clients are told what these do wrong."""

from __future__ import annotations

from typing import Annotated

import typer

from proxy.cli.asking import ask_daemon, configured
from proxy.cli.options import ConfigFile, StorePath
from proxy.events import Mode

Wanted = Annotated[
    Mode | None, typer.Argument(metavar="[auto|offline|strict]", help="Default: only say it.")
]


def mode(wanted: Wanted = None, config: ConfigFile = None, store: StorePath = None) -> None:
    """Say how the running daemon treats upstreams, or change it until it reads its configuration again."""
    told = ask_daemon(configured(config, store), "mode", {"mode": wanted})
    typer.echo(told["mode"])
