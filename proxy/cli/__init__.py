"""The command line. One command a file; ``daemon`` puts the parts together."""

from __future__ import annotations

import sys

import typer

from proxy import __version__
from proxy.cli.check_config import check_config
from proxy.cli.serve import serve
from proxy.errors import ConfigError, ProxyError

app = typer.Typer(
    name="nix-cache-proxy",
    help="A pull-through proxy for Nix binary caches that verifies what it keeps.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command()(serve)
app.command()(check_config)


@app.command()
def version() -> None:
    """Print the version."""
    typer.echo(__version__)


def main() -> None:
    """Run a command and exit: 0 fine, 1 failed, 2 wrong usage or configuration."""
    try:
        app()
    except ProxyError as error:
        typer.echo(f"nix-cache-proxy: {error}", err=True)
        sys.exit(2 if isinstance(error, ConfigError) else 1)
