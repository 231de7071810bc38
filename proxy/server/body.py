"""Send files to clients, complete ones and ones that are still arriving.

The bytes go from the page cache to the socket (`proxy.server.outflow`), past the transport, whose own
`asyncio.loop.sendfile` neither notices a client that has stopped reading nor says how far it got. That is
safe as long as the transport has nothing left to write, which is waited for first. Where pages are missing
they are brought in by a thread (`proxy.store.pages`), so that a slow disk holds up its own readers only.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import AsyncIterator, Iterator

from aiohttp import web
from aiohttp.abc import AbstractStreamWriter

from proxy.answers import File
from proxy.server.outflow import ClientGoneError, Flow, Outflow, too_short
from proxy.server.ranges import Span
from proxy.store.files import OpenFile, reading

PIECE = 2**18
"""Bytes of a piece, where they have to be copied."""

STALL_TIMEOUT = 60.0
"""Seconds without a byte after which a client that reads nothing is cut off (nginx: send_timeout)."""


class Delivery:
    """The sending of one file to one client.

    Args:
        request: What is answered.
        response: Status and headers; its Content-Length is that of what will be sent.
        file: A complete file, or one that still arrives.
        outflow: Sends it.
    """

    def __init__(
        self,
        request: web.BaseRequest,
        response: web.StreamResponse,
        file: File,
        outflow: Outflow,
    ) -> None:
        self._request = request
        self._outflow = outflow
        self._response = response
        self._file = file
        self.sent = 0
        """Bytes of the body that went out."""

    async def run(self, span: Span | None) -> None:
        """Send the headers and then ``span``, or the whole of a file whose size nobody knows yet.

        Raises:
            ClientGoneError: The client has left or does not read.
            ProxyError: The fetch or the disk failed; part of the answer has been sent.
        """
        try:
            async with _gone_if_stalled():
                writer = await self._response.prepare(self._request)
            if writer is None or self._request.transport is None:
                raise ClientGoneError
            if span is None:
                await self._copy_all()
            else:
                await self._sendfile(span, self._request.transport, writer)
            async with _gone_if_stalled():
                await self._response.write_eof()
        except OSError as error:
            raise ClientGoneError from error

    def cut(self) -> None:
        """Close the connection at once, so that nobody takes what was sent for the whole."""
        if self._request.transport is not None:
            self._request.transport.abort()

    async def _copy_all(self) -> None:
        """Send a file whose size nobody knows, in chunks of HTTP."""
        while (end := await self._file.wait_beyond(self.sent)) > self.sent:
            with reading("cannot read"):
                piece = os.pread(self._file.fd, min(PIECE, end - self.sent), self.sent)
            if not piece:
                raise too_short(self.sent, end)
            async with _gone_if_stalled():
                await self._response.write(piece)
            self.sent += len(piece)

    async def _sendfile(
        self, span: Span, transport: asyncio.Transport, writer: AbstractStreamWriter
    ) -> None:
        async with _gone_if_stalled():
            await writer.drain()  # to the last byte: `connection` has set the limit to 0
        is_complete = isinstance(self._file, OpenFile)
        is_judged = is_complete or span.stop == self._file.size
        stop = span.stop if is_judged else span.stop - 1
        segments = _full_segments(transport) if is_complete else contextlib.nullcontext()
        with _duplicate_of(transport) as fd, segments:
            position = span.start
            while position < stop:
                end = min(stop, await self._file.wait_beyond(position))
                flow = Flow(fd, self._file.fd, position, end, wary=is_complete)
                try:
                    while not await self._outflow.send(flow, patience=STALL_TIMEOUT):
                        await flow.bring_in()
                finally:
                    self.sent += flow.position - position
                position = end
        if not is_judged:
            await self._send_byte(stop)

    async def _send_byte(self, position: int) -> None:
        """Send the last byte of a part, once the whole that it is a part of is known to be right."""
        await self._file.wait_beyond(position)
        with reading("cannot read"):
            byte = os.pread(self._file.fd, 1, position)
        if not byte:
            raise too_short(position, position + 1)
        await self._file.wait_beyond(await self._file.size_known() - 1)
        async with _gone_if_stalled():
            await self._response.write(byte)
        self.sent += 1


@contextlib.contextmanager
def _duplicate_of(transport: asyncio.Transport) -> Iterator[int]:
    """Duplicate a transport's socket: the event loop does not let anybody wait for its own."""
    fd = os.dup(transport.get_extra_info("socket").fileno())
    try:
        yield fd
    finally:
        os.close(fd)


@contextlib.contextmanager
def _full_segments(transport: asyncio.Transport) -> Iterator[None]:
    """Have the kernel send full segments only (TCP_CORK of tcp(7)), and what is left at the end.

    Else the end of each sendfile(2) is one of its own, and to a client on the same machine, whose segments
    have 64 KiB, so is that of each 64 KiB. Not while a file arrives: what there is of it would be held back.
    """
    _cork(transport, 1)
    try:
        yield
    finally:
        _cork(transport, 0)


def _cork(transport: asyncio.Transport, corked: int) -> None:
    with contextlib.suppress(OSError):  # a socket of another kind, or one that is closed
        connection = transport.get_extra_info("socket")
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_CORK, corked)


@contextlib.asynccontextmanager
async def _gone_if_stalled() -> AsyncIterator[None]:
    try:
        async with asyncio.timeout(STALL_TIMEOUT):
            yield
    except TimeoutError as error:
        raise ClientGoneError from error
