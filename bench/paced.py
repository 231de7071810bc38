"""An upstream that says when it sent the first byte of each NAR, and then makes everybody wait."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

HOST = "127.0.0.1"

FIRST = 1_000
"""Bytes of a NAR that are sent before the pause: less than anybody's buffer."""

PAUSE = 0.25
"""Seconds: longer than the delay that is to be seen."""


class PacedUpstream:
    """A binary cache that serves a table.

    Args:
        files: Bodies by URL path.

    Attributes:
        port: Where it listens, once it does.
        first_bytes: When the first byte of the body of each NAR was sent, by URL path.
    """

    def __init__(self, files: Mapping[str, bytes]) -> None:
        self._files = files
        self.port = 0
        self.first_bytes: dict[str, float] = {}

    @property
    def url(self) -> str:
        """The URL of the cache."""
        return f"http://{HOST}:{self.port}"

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer the requests of a connection."""
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                await self._answer(head.split(b" ", 2)[1].decode(), writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    async def _answer(self, path: str, writer: asyncio.StreamWriter) -> None:
        body = self._files.get(path)
        status = b"404 Not Found" if body is None else b"200 OK"
        body = body or b""
        writer.write(b"HTTP/1.1 %s\r\nContent-Length: %d\r\n\r\n" % (status, len(body)))
        if path.startswith("/nar/"):
            await asyncio.sleep(PAUSE)  # the head has arrived long before
            self.first_bytes[path] = time.monotonic()
            writer.write(body[:FIRST])
            await asyncio.sleep(PAUSE)
            body = body[FIRST:]
        writer.write(body)
        await writer.drain()


@contextmanager
def running(upstream: PacedUpstream) -> Iterator[PacedUpstream]:
    """Run an upstream in a thread."""
    loop = asyncio.new_event_loop()

    async def listen() -> asyncio.Server:
        server = await asyncio.start_server(upstream.answer, HOST, 0)
        upstream.port = server.sockets[0].getsockname()[1]
        return server

    async def end(server: asyncio.Server) -> None:
        server.close()
        answering = asyncio.all_tasks() - {asyncio.current_task()}
        for task in answering:
            task.cancel()
        await asyncio.gather(*answering, return_exceptions=True)

    server = loop.run_until_complete(listen())
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        yield upstream
    finally:
        asyncio.run_coroutine_threadsafe(end(server), loop).result(timeout=10)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
