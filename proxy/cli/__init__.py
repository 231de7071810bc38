"""The command line. One command a file; ``daemon`` puts the parts together."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from proxy import __version__
from proxy.cli.check_config import check_config
from proxy.cli.gc import gc
from proxy.cli.mode import mode
from proxy.cli.pin import pin
from proxy.cli.pins import pins
from proxy.cli.serve import serve
from proxy.cli.status import status
from proxy.cli.unpin import unpin
from proxy.cli.verify import verify
from proxy.errors import ConfigError, ProxyError

app = typer.Typer(
    name="nix-cache-proxy",
    no_args_is_help=True,
    invoke_without_command=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command(short_help="Run the daemon in the foreground.")(serve)
app.command()(check_config)
for command in (status, mode, pin, unpin, pins, gc, verify):
    app.command()(command)


@app.callback()
def options(
    *,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", is_eager=True)
    ] = False,
) -> None:
    """A pull-through proxy for Nix binary caches that verifies what it keeps."""
    if version:
        typer.echo(__version__)
        raise typer.Exit


def main() -> None:
    """Run a command and exit: 0 fine, 1 failed, 2 wrong usage or configuration."""
    try:
        app()
    except ProxyError as error:
        typer.echo(f"nix-cache-proxy: {error}", err=True)
        sys.exit(2 if isinstance(error, ConfigError) else 1)
