"""The command line. One command a file; ``daemon`` puts the parts together."""

from __future__ import annotations

import sys
from collections.abc import Callable
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
COMMANDS: dict[Callable[..., None], str] = {
    serve: "Run the daemon in the foreground.",
    check_config: "Say whether a configuration can be used.",
    status: "Say what the running daemon is and has.",
    mode: "Say or change whether upstreams are asked.",
    pin: "Keep paths, and all that they need, under a name.",
    unpin: "Let go of what is kept under a name.",
    pins: "List what is kept by name, and what of it is missing.",
    gc: "Make room now, or say what would go.",
    verify: "Check everything in the store; take out what is damaged.",
}
"""All of them, each with the line by which people find it."""

for command, line in COMMANDS.items():
    app.command(short_help=line)(command)


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
