"""``verify``: check everything in the store again."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys
from collections.abc import Iterator, Mapping
from typing import Annotated, Any

import typer

from proxy.cli.asking import ask_daemon, refuse_absent
from proxy.cli.options import ConfigFile, StorePath, TrustedKeys, configuration
from proxy.config import Config
from proxy.control.client import Progress
from proxy.errors import NotRunningError

_PLAIN_STEPS = 10
"""Lines of progress where there is no terminal that could show a bar."""


def verify(
    *,
    config: ConfigFile = None,
    store: StorePath = None,
    trusted_key: TrustedKeys = None,
    restart: Annotated[
        bool, typer.Option("--restart", help="Begin anew, wherever the last one was interrupted.")
    ] = False,
) -> None:
    """Check signature and hashes of everything in the store; take out what is damaged.

    It goes on where the last one was interrupted. What was taken out is fetched afresh when it is
    asked for; it lies in .state/quarantine for a week. Ends with 1 when something is not as it should be.
    A running daemon does it beside serving, and goes by the keys that it trusts itself.
    """
    settings = configuration(config, None, store, None, trusted_key)
    with _shown() as show:
        try:
            found = _ask_daemon(settings, show, restart=restart)
        except NotRunningError:
            found = _verify_alone(settings, show, restart=restart)
    if found is None:
        typer.echo("interrupted; the next verify goes on there", err=True)
        raise typer.Exit(1)
    behind = f", all behind {found['resumed']}" if found["resumed"] else ""
    typer.echo(
        f"{found['checked']} checked{behind}: {found['sound']} sound, {found['damaged']} damaged, "
        f"{found['untrusted']} not signed by a trusted key"
    )
    if found["damaged"] or found["untrusted"]:
        raise typer.Exit(1)


def _ask_daemon(config: Config, show: Progress, *, restart: bool) -> Mapping[str, Any] | None:
    """Have the daemon check its store; it stops when we go.

    Returns:
        What was found; None if somebody interrupted it.

    Raises:
        NotRunningError: No daemon has the store.
        CommandError: It cannot be done.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    try:
        return ask_daemon(config, "verify", {"restart": restart}, show)
    except KeyboardInterrupt:
        return None


def _verify_alone(config: Config, show: Progress, *, restart: bool) -> Mapping[str, Any] | None:
    """Check a store that no daemon has.

    Returns:
        What was found; None if somebody interrupted it.

    Raises:
        StoreError: There is no store, or it cannot be used.
    """
    refuse_absent(config)
    from proxy.cli import alone  # noqa: PLC0415  # takes long, and a daemon makes it needless

    return asyncio.run(alone.verify(config, show, restart=restart))


@contextlib.contextmanager
def _shown() -> Iterator[Progress]:
    """Show what is bad on standard output, and progress on standard error: a bar on a terminal."""
    if not sys.stderr.isatty():
        yield _Lines()
        return
    with typer.progressbar(length=0, label="checking", file=sys.stderr) as bar:

        def show(progress: Mapping[str, Any]) -> None:
            _print_bad(progress)
            bar.length = max(progress["total"], progress["checked"])
            bar.update(progress["checked"] - bar.pos)

        yield show


class _Lines:
    """Progress as lines, a few for the whole."""

    def __init__(self) -> None:
        self._step = 0

    def __call__(self, progress: Mapping[str, Any]) -> None:
        _print_bad(progress)
        step = _PLAIN_STEPS * progress["checked"] // max(1, progress["total"])
        if step > self._step:
            self._step = step
            typer.echo(f"checked {progress['checked']} of {progress['total']}", err=True)


def _print_bad(progress: Mapping[str, Any]) -> None:
    for bad in progress["bad"]:
        typer.echo(f"{bad['outcome']}: {bad['what']}: {bad['reason']}")
