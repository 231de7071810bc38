"""``check-config``: say whether a configuration could be used."""

from __future__ import annotations

import typer

from proxy.cli.options import ConfigFile, configuration


def check_config(config: ConfigFile = None) -> None:
    """Check a configuration file and say what it amounts to."""
    checked = configuration(config, None, None, None, None)
    listen = ", ".join(map(str, checked.server.listen))
    typer.echo(f"{config or 'the default configuration'}: ok")
    typer.echo(f"listen    {listen}")
    typer.echo(f"store     {checked.store.path}")
    for upstream in checked.upstreams:
        typer.echo(f"upstream  {upstream.name} {upstream.url}")
