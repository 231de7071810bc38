"""``status``: what the running daemon is and has."""

from __future__ import annotations

import json

import typer

from proxy.cli.asking import ask_daemon, configured
from proxy.cli.options import AsJson, ConfigFile, StorePath
from proxy.sizes import paths, readable


def status(
    *,
    config: ConfigFile = None,
    store: StorePath = None,
    as_json: AsJson = False,
) -> None:
    """Say what the running daemon is and has; ends with 1 when none runs."""
    told = ask_daemon(configured(config, store), "status", {})
    if as_json:
        typer.echo(json.dumps(told, indent=2))
        return
    limit = f" of at most {readable(told['max_size'])}" if told["max_size"] else ""
    typer.echo(f"running   process {told['pid']}, version {told['version']}")
    typer.echo(f"listen    {', '.join(told['listen'])}")
    typer.echo(f"store     {told['store']}")
    typer.echo(f"kept      {paths(told['paths'])}, {readable(told['bytes'])}")
    typer.echo(f"folder    {readable(told['folder_bytes'])}{limit}")
    if told["not_keeping"]:
        typer.echo(f"failing   nothing is kept: {told['not_keeping']}")
    typer.echo(f"pins      {told['pins']}")
    typer.echo(f"fetching  {told['fetches']}")
    typer.echo(f"mode      {told['mode']}")
    for upstream in told["upstreams"]:
        state = "" if upstream["asked"] else " has failed, and is left alone for now"
        typer.echo(f"upstream  {upstream['name']} {upstream['url']}{state}")
