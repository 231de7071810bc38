"""``pins``: what is kept under which name."""

from __future__ import annotations

import json
from typing import Any

import typer

from proxy.cli.asking import ask_anybody, configured
from proxy.cli.options import AsJson, ConfigFile, StorePath
from proxy.sizes import paths as count_of
from proxy.sizes import readable


def pins(*, config: ConfigFile = None, store: StorePath = None, as_json: AsJson = False) -> None:
    """List the pins, what they take, and what of them is not here.

    A running daemon fetches that by itself: when it starts, and then every hour at the latest.
    """
    found: list[dict[str, Any]] = []
    result = ask_anybody(
        configured(config, store), "pins", {}, lambda told: found.append(dict(told))
    )
    if as_json:
        typer.echo(json.dumps({"pins": found, **result}, indent=2))
        return
    width = max((len(pin["name"]) for pin in found), default=0)
    for pin in found:
        missing = f", {pin['missing']} of them missing" if pin["missing"] else ""
        typer.echo(
            f"{pin['name']:{width}}  {readable(pin['bytes']):>10}  {count_of(pin['paths'])}{missing}"
        )
        for root in pin["roots"]:
            typer.echo(f"{'':{width}}  {root}")
        for each in pin["lacking"]:
            typer.echo(f"{'':{width}}  missing: {each['reason'] or each['path']}")
        if pin["missing"] > len(pin["lacking"]):
            typer.echo(f"{'':{width}}  and {pin['missing'] - len(pin['lacking'])} more")
