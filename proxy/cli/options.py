"""Options that several commands have, and the configuration they make together."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from proxy.config import Config, load

ConfigFile = Annotated[
    Path | None,
    typer.Option("--config", metavar="FILE", help="The configuration file (TOML). Default: none."),
]
Listen = Annotated[
    list[str] | None,
    typer.Option(
        "--listen",
        metavar="ADDRESS",
        help="host:port, [v6]:port or unix:/path; may be repeated. Default 127.0.0.1:8627.",
    ),
]
StorePath = Annotated[
    str | None,
    typer.Option(
        "--store",
        metavar="DIR",
        help="Where what is fetched is kept. Default ~/.cache/nix-cache-proxy.",
    ),
]
Upstreams = Annotated[
    list[str] | None,
    typer.Option(
        "--upstream",
        metavar="URL",
        help="A binary cache to ask, instead of the configured ones; may be repeated, preferred first.",
    ),
]
TrustedKeys = Annotated[
    list[str] | None,
    typer.Option(
        "--trusted-key", metavar="KEY", help="name:base64, in addition to the configured ones."
    ),
]
PinName = Annotated[str, typer.Argument(metavar="NAME", help="Letters, digits, '.', '_' and '-'.")]
AsJson = Annotated[
    bool, typer.Option("--json", help="Print JSON, for programs, instead of a text.")
]


def configuration(
    config: Path | None,
    listen: list[str] | None,
    store: str | None,
    upstream: list[str] | None,
    trusted_key: list[str] | None,
) -> Config:
    """Read the file, or the defaults, and let the flags override it.

    Raises:
        ConfigError: Any of it is wrong.
    """
    return load(config).with_overrides(
        listen=listen or (),
        store=store,
        upstreams=upstream or (),
        trusted_keys=trusted_key or (),
    )
