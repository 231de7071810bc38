"""Small real servers on loopback for what the simulator is not: TLS, a forward proxy, anything but HTTP."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

HOST = "127.0.0.1"
PIECE = 2**16

Answer = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
"""What happens on a connection."""


@contextlib.asynccontextmanager
async def serving(answer: Answer, tls: ssl.SSLContext | None = None) -> AsyncIterator[int]:
    """Answer every connection to the port that is yielded."""
    tasks: set[asyncio.Task[object]] = set()

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        try:
            await answer(reader, writer)
        except (OSError, EOFError):
            pass  # the other side left
        finally:
            tasks.discard(task)
            writer.close()

    server = await asyncio.start_server(connected, HOST, 0, ssl=tls)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        running = tuple(tasks)
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)


def says(text: bytes) -> Answer:
    """Read a request's head, say ``text``, and close the connection."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(text)
        await writer.drain()

    return answer


def forwards_to(port: int) -> Answer:
    """Pass everything on to another port of loopback, both ways: behind `serving` with TLS, a TLS front."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        behind, ahead = await asyncio.open_connection(HOST, port)
        try:
            await _first_ends(_pump(reader, ahead), _pump(behind, writer))
        finally:
            ahead.close()

    return answer


@dataclass
class ForwardProxy:
    """A forward proxy for plain http, without CONNECT: the form of it that needs no tunnel.

    Attributes:
        targets: What it was asked for, as it stood in the request line.
        heads: The requests' headers, as they came.
    """

    targets: list[str] = field(default_factory=list)
    heads: list[str] = field(default_factory=list)

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Pass one request on to where its target says, and the answer back."""
        line, _, head = (await reader.readuntil(b"\r\n\r\n")).decode().partition("\r\n")
        method, target, version = line.split(" ")
        self.targets.append(target)
        self.heads.append(head)
        url = urlsplit(target)
        behind, ahead = await asyncio.open_connection(url.hostname, url.port or 80)
        try:
            path = target.split(url.netloc, 1)[1]
            ahead.write(f"{method} {path} {version}\r\nConnection: close\r\n{head}".encode())
            await _pump(behind, writer)
        finally:
            ahead.close()


async def _pump(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
    while data := await source.read(PIECE):
        sink.write(data)
        await sink.drain()


async def _first_ends(*ways: Awaitable[None]) -> None:
    tasks = [asyncio.ensure_future(way) for way in ways]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@contextlib.contextmanager
def black_hole() -> Iterator[str]:
    """Yield the URL of a host that completes connections and then never says a word."""
    with socket.socket() as listener:
        listener.bind((HOST, 0))
        listener.listen(128)
        yield f"http://{HOST}:{listener.getsockname()[1]}"


@dataclass(frozen=True)
class Authority:
    """A private certificate authority, made by ``openssl``; its certificates are for loopback.

    Attributes:
        folder: Where it keeps its files.
    """

    folder: Path

    @classmethod
    def make(cls, folder: Path) -> Authority:
        """Make one in a folder of its own."""
        folder.mkdir()
        authority = cls(folder)
        authority._request(
            *("ca", "-subj", "/CN=a private authority"),
            *("-addext", "basicConstraints=critical,CA:TRUE"),
            *("-addext", "keyUsage=critical,keyCertSign"),
        )
        authority._request(
            *("host", "-subj", "/CN=localhost"),
            *("-addext", "basicConstraints=critical,CA:FALSE"),
            *("-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"),
            *("-CA", authority.certificate, "-CAkey", folder / "ca.key"),
        )
        return authority

    @property
    def certificate(self) -> Path:
        """Who to trust: a value for ``ca_file``."""
        return self.folder / "ca.pem"

    def server_context(self) -> ssl.SSLContext:
        """Return what a server needs to be believed to be loopback."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.folder / "host.pem", self.folder / "host.key")
        return context

    def _request(self, name: str, *options: str | Path) -> None:
        """Make a certificate and its key; by an empty configuration, as the system's may add to it."""
        empty = self.folder / "openssl.cnf"
        empty.write_text("[req]\ndistinguished_name = dn\n[dn]\n")
        command: list[str | Path] = ["openssl", "req", "-x509", "-config", empty, "-nodes"]
        command += ["-days", "2", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1"]
        command += ["-keyout", self.folder / f"{name}.key", "-out", self.folder / f"{name}.pem"]
        subprocess.run([*command, *options], check=True, capture_output=True)
