"""HTTP byte for byte, for what a well-behaved client neither sends nor shows.

Shares no code with the server or with any HTTP library: what a test sees is what was on the wire.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Self
from urllib.parse import urlsplit

PATIENCE = 20.0
"""Seconds after which nothing is waited for any more."""


@dataclass(frozen=True)
class Answer:
    """One answer.

    Attributes:
        version: What the status line begins with.
        status: The status code.
        fields: Headers in order, names in lower case.
        body: The body as far as it came, without the framing of chunks.
        complete: False when the connection ended before the body did.
    """

    version: str
    status: int
    fields: tuple[tuple[str, str], ...]
    body: bytes = b""
    complete: bool = True

    @property
    def headers(self) -> dict[str, str]:
        """Headers by name in lower case."""
        return dict(self.fields)

    def without(self, *names: str) -> list[tuple[str, str]]:
        """Return the headers, sorted, but for some of them."""
        return sorted(field for field in self.fields if field[0] not in names)


class Wire:
    """One connection to a server, for ``async with``.

    Args:
        url: The server's.
        receive_buffer: Bytes that the kernel may hold for us; None is its default.
    """

    def __init__(self, url: str, *, receive_buffer: int | None = None) -> None:
        parts = urlsplit(url)
        self.host = parts.netloc
        self._address = (parts.hostname, parts.port)
        self._receive_buffer = receive_buffer

    async def __aenter__(self) -> Self:
        """Connect."""
        connection = socket.socket()
        if self._receive_buffer is not None:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, self._receive_buffer)
        connection.settimeout(0)
        try:
            await asyncio.get_running_loop().sock_connect(connection, self._address)
        except BaseException:
            connection.close()
            raise
        # The reader holds at most twice its limit, so a small one is as slow as its user.
        limit = self._receive_buffer or 2**16
        self._reader, self._writer = await asyncio.open_connection(sock=connection, limit=limit)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Drop the connection at once."""
        self._writer.transport.abort()
        with contextlib.suppress(OSError):  # as which it ended before
            await self._writer.wait_closed()

    @property
    def port(self) -> int:
        """Our port."""
        return int(self._writer.get_extra_info("sockname")[1])

    async def send(self, data: bytes) -> None:
        """Send bytes as they are."""
        self._writer.write(data)
        await self._writer.drain()

    async def ask(self, target: str, *headers: str, method: str = "GET") -> Answer:
        """Make one HTTP/1.1 request and return its answer."""
        await self.send(self.request(target, *headers, method=method))
        return await self.answer(method)

    def request(
        self, target: str, *headers: str, method: str = "GET", version: str = "1.1"
    ) -> bytes:
        """Return the bytes of a request without a body."""
        lines = (f"{method} {target} HTTP/{version}", f"Host: {self.host}", *headers, "", "")
        return "\r\n".join(lines).encode("latin-1")

    async def answer(self, method: str = "GET") -> Answer:
        """Read one answer, to a request with this method."""
        head = await self.head()
        async with asyncio.timeout(PATIENCE):
            body, complete = await self._body(head, method)
        return replace(head, body=body, complete=complete)

    async def head(self) -> Answer:
        """Read status and headers, and leave the body to `some`."""
        async with asyncio.timeout(PATIENCE):
            text = (await self._line_block()).decode("latin-1")
        status_line, *lines = text.removesuffix("\r\n\r\n").split("\r\n")
        version, status, *_ = status_line.split(" ")
        assert version.startswith("HTTP/"), status_line
        fields = tuple(
            (name.lower(), value) for name, value in (line.split(": ", 1) for line in lines)
        )
        assert len({name for name, _ in fields}) == len(fields), f"a header came twice: {fields}"
        return Answer(version, int(status), fields)

    async def some(self, count: int) -> bytes:
        """Read exactly so many bytes."""
        async with asyncio.timeout(PATIENCE):
            return await self._reader.readexactly(count)

    async def rest(self) -> bytes:
        """Read until the server ends the connection, in good order or not."""
        data = bytearray()
        async with asyncio.timeout(PATIENCE):
            try:
                while piece := await self._reader.read(2**16):
                    data += piece
            except ConnectionError:
                pass
        return bytes(data)

    async def _line_block(self) -> bytes:
        block = b""
        while not block.endswith(b"\r\n\r\n"):
            line = await self._reader.readline()
            if not line.endswith(b"\n"):
                raise ConnectionResetError(f"the connection ended after {block + line!r}")
            block += line
        return block

    async def _body(self, head: Answer, method: str) -> tuple[bytes, bool]:
        if method == "HEAD" or head.status in (204, 304):
            return b"", True
        if head.headers.get("transfer-encoding") == "chunked":
            assert "content-length" not in head.headers
            return await self._chunks()
        if "content-length" in head.headers:
            return await self._exactly(int(head.headers["content-length"]))
        return await self.rest(), True

    async def _exactly(self, count: int) -> tuple[bytes, bool]:
        data = bytearray()
        try:
            while len(data) < count:
                piece = await self._reader.read(min(2**16, count - len(data)))
                if not piece:
                    break
                data += piece
        except ConnectionError:
            pass
        return bytes(data), len(data) == count

    async def _chunks(self) -> tuple[bytes, bool]:
        data = bytearray()
        while size_line := await self._line():
            size = int(size_line, 16)
            piece, complete = await self._exactly(size)
            data += piece
            if not complete or await self._line() != b"\r\n":
                break
            if size == 0:
                return bytes(data), True
        return bytes(data), False

    async def _line(self) -> bytes:
        try:
            return await self._reader.readline()
        except ConnectionError:
            return b""


async def until(condition: Callable[[], bool]) -> None:
    """Wait until something that is not announced has happened.

    Raises:
        TimeoutError: It did not.
    """
    async with asyncio.timeout(PATIENCE):
        while not condition():  # noqa: ASYNC110  # nobody can tell us
            await asyncio.sleep(0.005)
