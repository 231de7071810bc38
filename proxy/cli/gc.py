"""``gc``: make room now, or say what would go."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from typing import Annotated, Any, TypeVar

import typer

from proxy.cli.asking import ask_anybody, configured
from proxy.cli.options import AsJson, ConfigFile, StorePath
from proxy.config.quantities import parse_duration, parse_size
from proxy.sizes import files, readable

T = TypeVar("T")

DryRun = Annotated[bool, typer.Option("--dry-run", help="Only say what would go.")]
MaxSize = Annotated[
    str | None,
    typer.Option("--max-size", metavar="SIZE", help='Go down to a size such as "20GiB".'),
]
OlderThan = Annotated[
    str | None,
    typer.Option(
        "--older-than",
        metavar="DURATION",
        help='Remove what was not used for so long: "30d", "12h".',
    ),
]


def gc(
    *,
    dry_run: DryRun = False,
    max_size: MaxSize = None,
    older_than: OlderThan = None,
    config: ConfigFile = None,
    store: StorePath = None,
    as_json: AsJson = False,
) -> None:
    """Remove what was used least recently, but nothing that is pinned or in use.

    Without --max-size and --older-than: down to where eviction ends by itself, 90 % of max_size.
    """
    arguments = {
        "size": _read("--max-size", parse_size, max_size),
        "older_than": _read("--older-than", parse_duration, older_than),
        "dry_run": dry_run,
    }
    gone: list[Mapping[str, Any]] = []

    def show(told: Mapping[str, Any]) -> None:
        if as_json:
            gone.extend(told["gone"])
            return
        for each in told["gone"]:
            used = time.strftime("%Y-%m-%d %H:%M", time.localtime(each["used"]))
            typer.echo(f"{readable(each['size']):>10}  last used {used}  {each['path']}")

    result = ask_anybody(configured(config, store), "gc", arguments, show)
    if as_json:
        typer.echo(json.dumps({"gone": gone, **result}, indent=2))
        return
    verb = "would remove" if dry_run else "removed"
    typer.echo(
        f"{verb} {files(result['files'])}, {readable(result['bytes'])},"
        f" of {readable(result['before'])}"
    )


def _read(flag: str, read: Callable[[object], T], text: str | None) -> T | None:
    """Read a quantity as the configuration writes it."""
    if text is None:
        return None
    try:
        return read(int(text) if text.isdecimal() else text)
    except ValueError as error:
        raise typer.BadParameter(f"{flag}: {error}") from error
