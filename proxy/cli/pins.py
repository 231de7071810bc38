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
    """List the pins, what they take, and whether all of them is here."""
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
