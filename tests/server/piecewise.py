"""A connection whose bytes arrive in exactly the pieces, and at exactly the moments, that a test says.

The proxy's end is real: its own connection on a real socket. Only the arrival of data, which the event loop
would time as it likes, is done by hand.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import socket
from types import TracebackType
from typing import NamedTuple, Self, cast

from proxy.events import FastlaneServed
from proxy.server.app import Server
from proxy.server.connection import DISK_TURNS, Connection
from proxy.server.connection import Server as Connections
from proxy.server.listening import _connections
from tests.inside import InsideProxy

PATIENCE = 20.0
"""Seconds after which nothing is waited for any more."""

BLOCK = b" HTTP/1.1\r\nHost: cache\r\nAccept: */*\r\n\r\n"
"""What follows the target in the requests of a client that always sends the same."""

CALM = DISK_TURNS + 10
"""Turns of the event loop without anything to do, after which nothing more comes, not even from a disk."""

LINGERING = 0.5
"""Seconds that aiohttp waits for the rest of a body that nobody wants: no test takes as long to send it."""


class Answer(NamedTuple):
    """One answer, byte for byte, but for the order of the headers and the date."""

    status: bytes
    headers: tuple[bytes, ...]
    body: bytes

    @property
    def code(self) -> int:
        """The status as a number."""
        return int(self.status.split(b" ")[1])


def plain(target: str) -> bytes:
    """Return the plainest request for a target."""
    return b"GET " + target.encode() + BLOCK


def answers(received: bytes) -> list[Answer]:
    """Take apart what a server sent; a body is all up to the next status line."""
    nothing, *found = re.split(rb"(?=HTTP/\d\.\d \d{3} )", received)
    assert nothing == b"", received
    return [_answer(text) for text in found]


def codes(received: bytes) -> list[int]:
    """Return the statuses of what a server sent."""
    return [answer.code for answer in answers(received)]


def dates(received: bytes) -> list[bytes]:
    """Return the dates of what a server sent."""
    return re.findall(rb"\r\nDate: ([^\r]*)\r\n", received)


def _answer(text: bytes) -> Answer:
    head, _, body = text.partition(b"\r\n\r\n")
    status, *headers = head.split(b"\r\n")
    kept = (header for header in headers if not header.startswith(b"Date: "))
    return Answer(status, tuple(sorted(kept)), body)


def through_the_lane(proxy: InsideProxy) -> int:
    """Return how many requests have taken the fast lane so far."""
    proxy.server.lane.flush()
    return sum(event.requests for event in proxy.observed(FastlaneServed))


def connections(server: Server, *, lane: bool = True) -> Connections:
    """Make connections to a proxy as it makes them itself, or with the fast lane closed."""
    made = _connections(server)
    if not lane:
        made.lane = None
    return made


class Piecewise:
    """A client's connection, for ``async with``.

    Args:
        server: What the connection belongs to.
        send_buffer: Bytes that the kernel may hold of what the server sends; None is its default.
        tcp: Whether it is one of TCP, and not of a Unix socket.
    """

    def __init__(
        self, server: Connections, *, send_buffer: int | None = None, tcp: bool = False
    ) -> None:
        self._server = server
        self._send_buffer = send_buffer
        self._tcp = tcp

    async def __aenter__(self) -> Self:
        """Connect."""
        self._came = bytearray()
        self._ours, theirs = _tcp_pair() if self._tcp else socket.socketpair()
        self._ours.settimeout(0)
        theirs.settimeout(0)
        if self._send_buffer is not None:
            theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, self._send_buffer)
        loop = asyncio.get_running_loop()
        self.transport, protocol = await loop.connect_accepted_socket(self._server, theirs)
        self.protocol = cast("Connection", protocol)
        self.protocol._lingering_time = LINGERING
        await turns(2)  # aiohttp waits for a request now
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Drop the connection at once."""
        self.transport.abort()
        await self.settled()
        self._ours.close()

    def feed(self, *pieces: bytes) -> None:
        """Let pieces arrive, one after the other; where nobody listens any more, they are lost."""
        for piece in pieces:
            if self.open and piece:
                self.protocol.data_received(piece)

    def send(self, data: bytes) -> None:
        """Send data, to be read from the socket by whoever reads it now."""
        with contextlib.suppress(ConnectionError):
            self._ours.send(data)

    async def ask(self, *pieces: bytes) -> bytes:
        """Let pieces arrive, and return what has come back when all is done."""
        self.feed(*pieces)
        await self.settled()
        return self.received()

    async def settled(self) -> None:
        """Read until nothing more will come unless something arrives."""
        calm = 0
        async with asyncio.timeout(PATIENCE):
            while calm < CALM:
                calm = 0 if self._busy() else calm + 1
                await asyncio.sleep(0)
                self._read()

    def received(self) -> bytes:
        """Return what the server has sent, and was not returned before."""
        self._read()
        data = bytes(self._came)
        self._came.clear()
        return data

    @property
    def open(self) -> bool:
        """Whether the server still listens to this connection."""
        return not self.transport.is_closing()

    def _read(self) -> None:
        with contextlib.suppress(BlockingIOError, ConnectionError):
            while piece := self._ours.recv(2**16):
                self._came += piece

    def _busy(self) -> bool:
        protocol = self.protocol
        woken = protocol._waiter is not None and protocol._waiter.done()
        asked = woken or bool(protocol._messages) or protocol._request_in_progress
        return self.open and (asked or self.transport.get_write_buffer_size() > 0)


def _tcp_pair() -> tuple[socket.socket, socket.socket]:
    """Return the two ends of a connection of TCP."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        ours = socket.create_connection(listening.getsockname())
        theirs, _ = listening.accept()
    return ours, theirs


async def turns(count: int) -> None:
    """Let the event loop go round."""
    for _ in range(count):
        await asyncio.sleep(0)
