"""Listen on addresses, and stop doing so without cutting anybody off who could be served."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

from aiohttp import web

from proxy.errors import ListenError
from proxy.server.app import Server

KEEPALIVE = 120.0
"""Seconds that an idle connection is kept: longer than Nix keeps it (curl: 118 s), so that Nix never
sends a request into a connection that is being closed. Also the deadline for a request's headers."""

LINGER = 0.2
"""Seconds between the last connection accepted and the first closed: a request may be on its way."""

Address = tuple[str, int] | Path | socket.socket
"""Host and port, the path of a Unix socket, or a socket that listens already."""


@contextlib.asynccontextmanager
async def listening(
    server: Server, addresses: Sequence[Address], *, shutdown_timeout: float
) -> AsyncIterator[list[str]]:
    """Serve on addresses, and yield them as they turned out to be: ports that were 0 have a number.

    At the end no more connections are accepted, requests under way get ``shutdown_timeout`` seconds to
    complete, and what is not complete by then is cut off.

    Raises:
        ListenError: An address cannot be listened on.
    """
    runner = web.ServerRunner(
        _Server(server),
        shutdown_timeout=shutdown_timeout / 2,  # aiohttp waits it twice: to end, and once cancelled
    )
    await runner.setup()
    try:
        for address in addresses:
            site = _site(runner, address)
            try:
                _refuse_if_in_use(address)
                await site.start()
            except OSError as error:
                reason = error.strerror or str(error)
                raise ListenError(f"cannot listen on {_text(address)}: {reason}") from error
        yield [_text(address) for address in runner.addresses]
    finally:
        server.draining = True
        for site in tuple(runner.sites):
            await site.stop()
        await asyncio.sleep(LINGER)
        await runner.cleanup()


class _Server(web.Server):
    """aiohttp's server, with another kind of connection."""

    def __init__(self, server: Server) -> None:
        super().__init__(server.handle)
        self._refuse = server.refuse

    def __call__(self) -> web.RequestHandler:
        loop = asyncio.get_running_loop()
        return _Connection(
            self,
            loop=loop,
            keepalive_timeout=KEEPALIVE,
            access_log=None,
            refuse=self._refuse,
        )


class _Connection(web.RequestHandler):
    """A connection that answers what is no HTTP in words of ours.

    aiohttp's own answer repeats what the client sent, and names the software that runs here.
    """

    __slots__ = ("_refuse",)

    def __init__(
        self, manager: web.Server, *, refuse: Callable[[int], web.Response], **options: Any
    ) -> None:
        super().__init__(manager, **options)
        self._refuse = refuse

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        del request, exc, message
        return self._refuse(status)


def _refuse_if_in_use(address: Address) -> None:
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


def _text(address: object) -> str:
    """Write an address as the configuration does."""
    match address:
        case (str(host), int(port), *_):
            return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        case socket.socket():
            return _text(address.getsockname())
        case _:
            return f"unix:{address}"
