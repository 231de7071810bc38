"""Connections of clients: aiohttp's, with a fast lane in front, and words of our own for what is no HTTP.

A request takes the fast lane only when no other reading of its bytes is possible than the one that aiohttp's
parser has made of the same bytes before:

- The connection is *clean*: every piece that has arrived on it so far was exactly one request without a body,
  so the parser stands at the beginning of a request.
- It is idle: aiohttp waits for a request, has none queued, is neither closing nor held up by a client that
  does not read. Otherwise a quick answer would overtake a slow one.
- The piece is ``GET``, a space, a target, and a header block (all from the space behind the target to
  the empty line) that the parser has *accepted before, byte for byte*, as that of a plain keep-alive GET
  without a body. Nix sends the same block with every request, so one slow request teaches it.

So nothing can hide in a header's value, in another request's body, or behind a Content-Length. What is not
sure goes to aiohttp, on the same connection and in order. What a piece was found to ask for is remembered
(`Server.requests`), which says nothing of the answer.

Answers are written to the socket itself, or sent from files, past the transport (`proxy.server.sending`).
That is safe because the transport of an idle connection has nothing left to write; what the socket does not
take at once is left to the transport. After a few of them in a row the socket is also read past the transport
(`proxy.server.hot_connections`), until something else comes.

This needs to look into aiohttp's `RequestHandler`. Where what it looks at is not there (any more), the fast
lane stays closed (`proxy.server.aiohttp_slots`).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Awaitable, Callable
from typing import Final

from aiohttp import web
from aiohttp.http import RawRequestMessage
from aiohttp.streams import EMPTY_PAYLOAD

from proxy.server.backend import Audience
from proxy.server.body import STALL_TIMEOUT
from proxy.server.fastlane import FastLane, Lookup
from proxy.server.hot_connections import HotConnections
from proxy.server.outflow import Outflow
from proxy.server.plain import is_plain
from proxy.server.same_host import spare_pacing
from proxy.server.sending import Answer

KEEPALIVE: Final = 120.0
"""Seconds that an idle connection is kept: longer than Nix keeps it (curl: 118 s), so that Nix never
sends a request into a connection that is being closed. Also the deadline for a request's headers."""

MOST_BLOCKS: Final = 256
"""Header blocks remembered: one for each Nix version and what its users add."""

LONGEST_BLOCK: Final = 2_048
"""Bytes; Nix's has about 150."""

MOST_REQUESTS: Final = 8_192
"""Whole requests whose meaning is remembered, of all connections together."""

LONGEST_REQUEST: Final = 512
"""Bytes of one of them; Nix's have about 250."""

RECEIVED: Final = 2**16
"""Bytes that are received at once. asyncio would have memory for 256 KiB made each time, which malloc(3)
gets from the kernel and gives back; that takes longer than a hot request."""

DRAINING: Final = 0.01
"""Seconds between two looks at whether a client has the rest of its answer, while the daemon stops."""

DISK_TURNS: Final = 20
"""Turns of the event loop in which a quick disk is waited for, which costs less than aiohttp and a thread."""

REGULAR: Final = 4
"""Hot requests in a row that make a connection a hot one: to and fro takes as long as a few of them gain."""


class Server(web.Server):
    """aiohttp's low-level server, making connections of the kind below.

    Args:
        handler: Answers requests.
        refuse: Answers what is no request, given a status.
        prefetch: Told who comes and goes.
        lane: The fast lane; None keeps it closed.
    """

    def __init__(
        self,
        handler: Callable[[web.BaseRequest], Awaitable[web.StreamResponse]],
        *,
        refuse: Callable[[int], web.Response],
        prefetch: Audience,
        lane: FastLane | None,
    ) -> None:
        super().__init__(handler)
        self.prefetch = prefetch
        self.refuse = refuse
        self.lane = lane
        self.blocks: set[bytes] = set()
        """Header blocks that the parser has accepted as those of plain GETs."""
        self.requests: dict[bytes, Lookup] = {}
        """What was asked for by requests that the lane has answered, byte for byte."""
        self.hot = HotConnections(lane.begin if lane is not None else _nothing)
        self.outflow = Outflow()

    def __call__(self) -> web.RequestHandler:
        """Make a connection; called by the event loop for each that is accepted."""
        return Connection(self, asyncio.get_running_loop())

    async def shutdown(self, timeout: float | None = None) -> None:  # noqa: ASYNC109  # aiohttp's
        """Close all connections."""
        await super().shutdown(timeout)
        self.hot.close()
        self.outflow.close()


class Connection(web.RequestHandler):
    """One connection of a client.

    Args:
        server: What all connections share.
        loop: The event loop.
    """

    __slots__ = (
        "_blocks",
        "_clean",
        "_held",
        "_hot",
        "_hot_requests",
        "_is_hot",
        "_lane",
        "_prefetch",
        "_refuse",
        "_requests",
        "_socket",
        "_stalled",
        "client",
        "fetches",
        "outflow",
    )

    def __init__(self, server: Server, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(
            server,
            loop=loop,
            keepalive_timeout=KEEPALIVE,
            access_log=None,  # type: ignore[arg-type]  # None is what switches it off
        )
        self._refuse = server.refuse
        self._lane = server.lane
        self._blocks = server.blocks
        self._requests = server.requests
        self._socket = -1
        self._clean = server.lane is not None
        self._hot = server.hot
        self.outflow = server.outflow
        self._is_hot = False
        self._hot_requests = 0
        self._prefetch = server.prefetch
        self._stalled: asyncio.TimerHandle | None = None
        self._held = 0
        self.client = ""
        self.fetches = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Note that a client has come."""
        super().connection_made(transport)
        if self.transport is not None:
            # Whatever a client leaves unread pauses writing, and so starts the watch over it.
            self.transport.set_write_buffer_limits(high=0)
        self._socket = _plain_socket(transport)
        spare_pacing(transport)
        if hasattr(transport, "max_size"):
            transport.max_size = RECEIVED
        self.client = client_of(transport.get_extra_info("peername"))
        self._prefetch.connected(self.client)

    def connection_lost(self, exc: BaseException | None) -> None:
        """Note that a client may have left."""
        self._hot.remove(self._socket)
        self._socket = -1  # its number will be another's
        super().connection_lost(exc)
        self._watch(None)
        self._hold(0)
        self._prefetch.disconnected(self.client)

    def pause_writing(self) -> None:
        """Note that the client does not keep up, and drop it when that lasts."""
        super().pause_writing()
        if self.transport is not None:
            self._hold(self.transport.get_write_buffer_size())
            self._watch(self._loop.call_later(STALL_TIMEOUT, self.transport.abort))

    def resume_writing(self) -> None:
        """Note that the client keeps up again."""
        super().resume_writing()
        self._hold(0)
        self._watch(None)

    def _watch(self, stalled: asyncio.TimerHandle | None) -> None:
        if self._stalled is not None:
            self._stalled.cancel()
        self._stalled = stalled

    def _hold(self, size: int) -> None:
        """Say how many bytes its client has left in our memory."""
        if self._lane is not None:
            self._lane.held += size - self._held
            self._held = size

    async def shutdown(self, timeout: float | None = 15.0) -> None:  # noqa: ASYNC109  # aiohttp's
        """Close the connection once its client has the rest of an answer; `timeout` seconds may pass."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                # While a request is in progress, aiohttp waits for that.
                while self._held and not self._request_in_progress:  # noqa: ASYNC110  # once in a life
                    await asyncio.sleep(DRAINING)
        await super().shutdown(timeout)

    def data_received(self, data: bytes) -> None:
        """Answer at once what can be, and leave the rest to aiohttp."""
        if self._lane is None or not self._clean:
            super().data_received(data)
            return
        self._lane.begin()
        if self.answer(data, self._loop.time()):
            self._hot_requests += 1
            if self._hot_requests == REGULAR:
                self._become_hot()
        else:
            self.take_back(data)

    def answer(self, data: bytes, now: float) -> bool:
        """Answer a piece of data at once, if it is nothing but a hot request and nothing is under way.

        Args:
            data: What has come.
            now: The time, by the event loop.

        Returns:
            Whether it is answered.
        """
        waiter = self._waiter
        if waiter is None or waiter.done() or self._messages:
            return False
        answer = self.find(data)
        if answer is None:
            return False
        self.give(answer, now)
        return True

    def find(self, data: bytes) -> Answer | None:
        """Find the answer to a piece of data on a connection where nothing is under way.

        It is to be given in this turn of the event loop. Every line in here, and in `give`, is one that all
        hot requests pay for.
        """
        if self._paused or self._close or self._force_close:
            return None
        look_up = self._requests.get(data) or self._read(data)
        return None if look_up is None else look_up(self)

    def give(self, answer: Answer, now: float) -> None:
        """Send an answer: to the socket, and what that does not take to the transport."""
        self._next_keepalive_close_time = now + KEEPALIVE
        if isinstance(answer, bytearray):
            try:
                sent = os.write(self._socket, answer)
            except OSError:
                sent = 0  # the transport will find the same, and knows what to do
            if sent == len(answer):
                return
            rest = bytes(answer[sent:])
        else:
            try:
                rest = answer.send(self._socket)
            except OSError:
                self.fail()  # and never let the client take it for the whole
                return
        if rest and self.transport is not None:
            self.transport.write(rest)

    def take_back(self, data: bytes) -> None:
        """Wait for a moment if the disk was asked, else leave what came to aiohttp."""
        lane = self._lane
        if lane is not None and lane.disk_was_asked() and self._rest():
            self._loop.call_soon(self._look_again, lane, data, DISK_TURNS)
        else:
            self._leave(data)

    def _rest(self) -> bool:
        """Let nobody read the socket for a while, if that is possible, and tell whether it is."""
        if self._is_hot:
            self._hot.remove(self._socket)
        elif self._socket < 0 or self.transport is None or not self.transport.is_reading():
            return False
        else:
            self.transport.pause_reading()
            self._is_hot = True
        return True

    def _look_again(self, lane: FastLane, data: bytes, turns: int) -> None:
        """Answer if the disk has, which makes the connection a hot one."""
        try:
            lane.begin()
            if self.answer(data, self._loop.time()):
                self._hot.add(self._socket, self)
            elif lane.disk_was_asked() and turns > 1:
                self._loop.call_soon(self._look_again, lane, data, turns - 1)
            else:
                self._leave(data)
        except BaseException:
            self.fail()  # as a transport would: its client waits for an answer
            raise

    def _leave(self, data: bytes) -> None:
        """Let aiohttp have what came, and its transport read what comes next."""
        self._hot_requests = 0
        if self._is_hot:
            self._is_hot = False
            self._hot.remove(self._socket)
            if self.transport is not None:
                self.transport.resume_reading()
        if data:
            self._parse(data)

    def fail(self) -> None:
        """End the connection at once: there is a fault of ours."""
        if self.transport is not None:
            self.transport.abort()

    def _become_hot(self) -> None:
        """Have the socket read past the transport from now on."""
        if self._socket >= 0 and self.transport is not None and self.transport.is_reading():
            self.transport.pause_reading()
            self._hot.add(self._socket, self)
            self._is_hot = True

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """Answer what is no HTTP; aiohttp would repeat what was sent, and name what runs here."""
        del request, exc, message
        return self._refuse(status)

    def _read(self, data: bytes) -> Lookup | None:
        """Find out what a piece asks for, if it can only be read in one way."""
        end = data.find(b" ", 4)
        if self._lane is None or data[end:] not in self._blocks or not data.startswith(b"GET /"):
            return None
        look_up = self._lane.lookup(data[4:end])
        if look_up is not None and len(data) <= LONGEST_REQUEST:
            if len(self._requests) >= MOST_REQUESTS:
                self._requests.clear()
            self._requests[data] = look_up
        return look_up

    def _parse(self, data: bytes) -> None:
        """Let aiohttp parse a piece, and see whether it was one request and no more."""
        queued = len(self._messages)
        super().data_received(data)
        whole = data.endswith(b"\r\n\r\n") and data.find(b"\r\n\r\n") == len(data) - 4
        if not whole or len(self._messages) != queued + 1 or self._upgraded:
            self._clean = False
            return
        message, payload = self._messages[-1]
        block = data[data.find(b" ", 4) :]
        if not isinstance(message, RawRequestMessage) or payload is not EMPTY_PAYLOAD:
            self._clean = False
        elif data.startswith(b"GET /") and is_plain(message) and len(block) <= LONGEST_BLOCK:
            if len(self._blocks) >= MOST_BLOCKS:
                self._blocks.clear()  # somebody makes them up; the real ones are back at once
            self._blocks.add(block)


def client_of(peer: object) -> str:
    """Name a client by its address; those of a Unix socket are one."""
    return str(peer[0]) if isinstance(peer, tuple) else "unix"


def _nothing() -> None:
    """What a closed lane does."""


def _plain_socket(transport: asyncio.BaseTransport) -> int:
    """Return the descriptor of a connection's socket, or -1 where what is written there is encrypted."""
    socket = transport.get_extra_info("socket")
    if socket is None or transport.get_extra_info("sslcontext") is not None:
        return -1
    return int(socket.fileno())
