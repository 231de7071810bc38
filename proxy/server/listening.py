"""Listen on addresses, and stop doing so without cutting anybody off who could be served."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
from collections.abc import AsyncIterator, Coroutine, Sequence
from pathlib import Path
from typing import Any

from aiohttp import web

from proxy.errors import ListenError
from proxy.events import FastlaneClosed
from proxy.server.aiohttp_slots import missing_slots
from proxy.server.app import Server
from proxy.server.connection import Server as ConnectionServer
from proxy.server.fastlane import FastLane
from proxy.server.same_host import spare_clients_pacing

FLUSH_INTERVAL = 10.0
"""Seconds between two accounts of what the fast lane did."""

LINGER = 0.2
"""Seconds between the last connection accepted and the first closed: a request may be on its way."""

Address = tuple[str, int] | Path | socket.socket
"""Host and port, the path of a Unix socket, or a socket that listens already."""


@contextlib.asynccontextmanager
async def listening(
    server: Server,
    addresses: Sequence[Address],
    *,
    shutdown_timeout: float,
    hurry: asyncio.Event | None = None,
    linger: float = LINGER,
) -> AsyncIterator[list[str]]:
    """Serve on addresses, and yield them as they turned out to be: ports that were 0 have a number.

    At the end no more connections are accepted, requests under way get ``shutdown_timeout`` seconds to
    complete, or until ``hurry`` is set, and what is not complete by then is cut off.

    Raises:
        ListenError: An address cannot be listened on.
    """
    runner = web.ServerRunner(
        _connections(server),
        shutdown_timeout=shutdown_timeout / 2,  # aiohttp waits it twice: to end, and once cancelled
    )
    await runner.setup()
    flushing = asyncio.create_task(_flush(server.lane))
    try:
        for address in addresses:
            site = _site(runner, address)
            try:
                refuse_if_in_use(address)
                await site.start()
                spare_clients_pacing(_sockets_of(site))
            except OSError as error:
                reason = os.strerror(error.errno) if error.errno else str(error)
                raise ListenError(f"cannot listen on {address_text(address)}: {reason}") from error
        yield [address_text(address) for address in runner.addresses]
    finally:
        server.draining = True
        server.lane.open = False
        for site in tuple(runner.sites):
            await site.stop()
        await asyncio.sleep(linger)
        await _unless(hurry, runner.cleanup())
        flushing.cancel()
        server.lane.close()


def _connections(server: Server) -> ConnectionServer:
    """Make what makes connections, with the fast lane if this aiohttp is one that we know."""
    missing = missing_slots()
    if missing:
        server.observer(FastlaneClosed(f"aiohttp has no {', '.join(missing)}"))
    lane = None if missing else server.lane
    return ConnectionServer(
        server.handle, refuse=server.refuse, prefetch=server.prefetch, lane=lane
    )


async def _unless(hurry: asyncio.Event | None, work: Coroutine[Any, Any, None]) -> None:
    """Do some work, or give it up when somebody is in a hurry."""
    task = asyncio.ensure_future(work)
    waiting = asyncio.ensure_future((hurry or asyncio.Event()).wait())
    await asyncio.wait((task, waiting), return_when=asyncio.FIRST_COMPLETED)
    for each in (task, waiting):
        each.cancel()
    await asyncio.gather(task, waiting, return_exceptions=True)


async def _flush(lane: FastLane) -> None:
    """Tell now and then what the fast lane answered, also when nobody looks at the metrics."""
    while True:
        await asyncio.sleep(FLUSH_INTERVAL)
        lane.flush()


def refuse_if_in_use(address: Address) -> None:
    """Leave a Unix socket to whoever listens on it; asyncio would take it away.

    Raises:
        OSError: Somebody listens there.
    """
    if isinstance(address, Path):
        with socket.socket(socket.AF_UNIX) as probe:
            try:
                probe.connect(str(address))
            except OSError:
                return
        raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))


def _site(runner: web.ServerRunner, address: Address) -> web.BaseSite:
    match address:
        case Path():
            return web.UnixSite(runner, address)
        case socket.socket():
            return web.SockSite(runner, address)
        case (host, port):
            return web.TCPSite(runner, host, port)


def _sockets_of(site: web.BaseSite) -> Sequence[socket.socket]:
    """Return what a site listens on, if aiohttp, which keeps it to itself, has it where it had it."""
    return getattr(getattr(site, "_server", None), "sockets", None) or ()


def address_text(address: object) -> str:
    """Write an address as the configuration does."""
    match address:
        case (str(host), int(port), *_):
            return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        case socket.socket():
            return address_text(address.getsockname())
        case _:
            return f"unix:{address}"
