"""``pin``: keep closures, whatever else has to make room."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from proxy.cli.asking import ask_anybody, configured
from proxy.cli.options import ConfigFile, PinName, StorePath
from proxy.errors import CommandError
from proxy.nix.store_path import STORE_DIR
from proxy.sizes import paths as count_of
from proxy.sizes import readable
from proxy.store.pins import check_pin_name

Paths = Annotated[
    list[str],
    typer.Argument(
        metavar="PATH…", help="A store path, something in one, or a link there such as ./result."
    ),
]


def pin(name: PinName, paths: Paths, config: ConfigFile = None, store: StorePath = None) -> None:
    """Keep paths and all that they need under a name, and fetch what is not here.

    What the name kept before is let go. It is all or nothing: when anything cannot be fetched, or does not
    fit below max_size, nothing changes.
    """
    where = configured(config, store)
    try:
        check_pin_name(name)
        roots = [_store_path(path) for path in paths]
    except CommandError as error:
        raise typer.BadParameter(str(error)) from error
    progress = _ProgressLine()
    try:
        made = ask_anybody(where, "pin", {"name": name, "paths": roots}, progress)
    finally:
        progress.close()
    typer.echo(f"pinned {name}: {count_of(made['paths'])}, {readable(made['bytes'])}")


def _store_path(text: str) -> str:
    """Return the store path that something on this machine is, lies in, or leads to.

    Raises:
        CommandError: It is none.
    """
    path = os.path.normpath(text)
    if not path.startswith(f"{STORE_DIR}/"):
        path = os.path.realpath(path)
    if not path.startswith(f"{STORE_DIR}/"):
        raise CommandError(f"{text} is no store path, and does not lead to one")
    return "/".join(Path(path).parts[: len(Path(STORE_DIR).parts) + 1])[1:]


class _ProgressLine:
    """One line on a terminal that is written again and again; nothing where there is none."""

    def __init__(self) -> None:
        self._written = False

    def __call__(self, told: Mapping[str, Any]) -> None:
        """Write how far it is."""
        if sys.stderr.isatty():
            self._written = True
            line = f"{told['here']} of {told['paths']} paths, {readable(told['to_fetch'])} to fetch"
            sys.stderr.write(f"\r\033[K{line}")
            sys.stderr.flush()

    def close(self) -> None:
        """Remove the line."""
        if self._written:
            sys.stderr.write("\r\033[K")
            sys.stderr.flush()
