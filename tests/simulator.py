"""A binary cache on loopback that publishes signed paths, can lie, stall and cut, and counts.

A real server on a real socket. What it serves is one table, `BinaryCacheSimulator.files`; what it
does wrong is a list of `faults`, applied in the order in which they were set. It runs in the loop
of the test (``async with``) or in a thread of its own (`running`), for tests that drive ``nix`` or
another process.
"""

from __future__ import annotations

import asyncio
import re
import socket
import struct
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Self, TypeAlias

from aiohttp import web
from multidict import CIMultiDict

from tests.blobs import PIECE, Blob
from tests.closures import SigningKey, StoreEntry, nix32
from tests.faults import Fault, Latch, Reply, Request

if TYPE_CHECKING:
    from types import TracebackType

Pattern: TypeAlias = str | Callable[[Request], bool]
"""Which requests: a glob over the raw path, a prefix that ends in ``/``, or a predicate."""

HOST = "127.0.0.1"
_RESET_ON_CLOSE = struct.pack("ii", 1, 0)  # struct linger: on, for no time


@dataclass(eq=False)
class Rule:
    """Faults for the requests that match, for a number of times or for ever.

    Attributes:
        pattern: Which requests.
        faults: What happens to them, all of it.
        times: How often; None is for ever.
        hits: How often it has happened.
    """

    pattern: Pattern
    faults: tuple[Fault, ...]
    times: int | None = None
    hits: int = 0

    def lift(self) -> None:
        """Let it happen no more."""
        self.times = self.hits

    def applies(self, request: Request) -> bool:
        """Return whether `request` is hit."""
        left = self.times is None or self.hits < self.times
        return left and matches(self.pattern, request)


def matches(pattern: Pattern, request: Request) -> bool:
    """Return whether `request` is one that `pattern` means."""
    if not isinstance(pattern, str):
        return pattern(request)
    if pattern.endswith("/"):
        return request.raw_path.startswith(pattern)
    return request.raw_path == pattern or fnmatchcase(request.raw_path, pattern)


class BinaryCacheSimulator:
    """A binary cache that does what the test wants.

    Attributes:
        files: Raw path and query to body and headers: everything that is served. Change it freely.
        requests: Every request that came, in order.
        accepted: How many connections were accepted.
        require_auth: The only ``Authorization`` that is let in; None lets in everyone.
    """

    def __init__(
        self,
        entries: Iterable[StoreEntry] = (),
        *,
        key: SigningKey | None = None,
        keys: Iterable[SigningKey] = (),
        prefix: str = "",
        priority: int = 40,
    ) -> None:
        """Prepare a cache of `entries`, signed by `key` and `keys`, at ``http://host:port<prefix>``."""
        self.keys = (*([key] if key else []), *keys)
        self.prefix = prefix
        self.files: dict[str, tuple[bytes | Blob, Mapping[str, str]]] = {}
        self.requests: list[Request] = []
        self.accepted = 0
        self.require_auth: str | None = None
        self._rules: list[Rule] = []
        self._log: list[tuple[int, Request]] = []
        self._expected: list[tuple[Pattern, int, Latch]] = []
        self._reserved = _reserve()
        self._listener: socket.socket | None = None
        self._opening: set[asyncio.Task[object]] = set()
        self.port: int = self._reserved.getsockname()[1]
        info = f"StoreDir: /nix/store\nWantMassQuery: 1\nPriority: {priority}\n"
        self.files["/nix-cache-info"] = (info.encode(), {"Content-Type": "text/x-nix-cache-info"})
        self.publish(*entries)

    # --- what it publishes

    @property
    def url(self) -> str:
        """The URL of the cache, without trailing slash; known before the start."""
        return f"http://{HOST}:{self.port}{self.prefix}"

    def publish(self, *entries: StoreEntry) -> None:
        """Serve the narinfo and the NAR of each entry."""
        for entry in entries:
            narinfo = entry.narinfo(*self.keys, base=self.url)
            etag = {"ETag": f'"{entry.file_hash}"'}
            self.files[entry.narinfo_path] = (narinfo, {"Content-Type": "text/x-nix-narinfo"})
            self.files[entry.nar_path] = (
                entry.file,
                {"Content-Type": "application/x-nix-nar", **etag},
            )

    def withdraw(self, *entries: StoreEntry) -> None:
        """Answer 404 for these entries from now on."""
        for entry in entries:
            self.files.pop(entry.narinfo_path, None)
            self.files.pop(entry.nar_path, None)

    # --- what it does wrong

    def fault(self, pattern: Pattern, *faults: Fault, times: int | None = None) -> Rule:
        """Let `faults` happen to the requests that match, `times` times or for ever.

        The oldest rule that still applies wins, so that several calls make a script.
        """
        rule = Rule(pattern, faults, times)
        self._rules.append(rule)
        return rule

    def heal(self) -> None:
        """Forget all faults. Requests already being answered keep theirs."""
        self._rules.clear()

    def down(self) -> None:
        """Stop listening and reset all connections; the port stays ours and refuses."""
        self._in_loop(self._close_listener)

    def up(self) -> None:
        """Listen again, on the same port."""
        self._in_loop(self._open_listener)

    # --- what it has seen

    def count(self, pattern: Pattern = "*", method: str | None = None) -> int:
        """Return how many requests matched."""
        return sum(
            method in (None, request.method) and matches(pattern, request)
            for request in tuple(self.requests)
        )

    def gets(self, pattern: Pattern) -> int:
        """Return how many of them were GET."""
        return self.count(pattern, "GET")

    def peak(self, pattern: Pattern = "*") -> int:
        """Return how many matching requests were being answered at the same time, at most."""
        running = most = 0
        for step, request in tuple(self._log):
            if matches(pattern, request):
                running += step
                most = max(most, running)
        return most

    @property
    def max_concurrent(self) -> int:
        """How many requests were being answered at the same time, at most."""
        return self.peak()

    def reset_counts(self) -> None:
        """Forget all requests seen so far; best when none is being answered."""
        self.requests.clear()
        self._log.clear()

    def expect(self, pattern: Pattern, count: int = 1) -> Latch:
        """Return a latch that is set once so many matching requests have come, also before."""
        latch = Latch()
        self._expected.append((pattern, count, latch))
        self._check_expected()
        return latch

    # --- life

    async def __aenter__(self) -> Self:
        """Listen."""
        self._loop = asyncio.get_running_loop()
        self._thread = threading.get_ident()
        self._server = web.Server(
            self._answer, handler_cancellation=True, keepalive_timeout=3600, access_log=None
        )
        try:
            self._open_listener()
        except BaseException:
            self._reserved.close()
            raise
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stop listening, reset all connections, free the port."""
        self._close_listener()
        await asyncio.gather(*self._opening, return_exceptions=True)
        self._reset_connections()
        await self._server.shutdown(timeout=1)
        self._reserved.close()

    def _in_loop(self, action: Callable[[], None]) -> None:
        """Run `action` in the loop of the server, wherever we are called from."""
        if threading.get_ident() == self._thread:
            action()
            return
        done: Future[None] = Future()

        def run() -> None:
            try:
                action()
            except Exception as error:  # noqa: BLE001 - it is handed to the caller
                done.set_exception(error)
            else:
                done.set_result(None)

        self._loop.call_soon_threadsafe(run)
        done.result(timeout=10)

    def _open_listener(self) -> None:
        if self._listener is None:
            listener = _bind(self.port)
            listener.listen(1024)
            self._loop.add_reader(listener, self._accept, listener)
            self._listener = listener

    def _close_listener(self) -> None:
        if self._listener is not None:
            self._loop.remove_reader(self._listener)
            self._listener.close()
            self._listener = None
        self._reset_connections()

    def _accept(self, listener: socket.socket) -> None:
        try:
            connection, _ = listener.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return
        connection.settimeout(0)
        self.accepted += 1
        task: asyncio.Task[object] = self._loop.create_task(
            self._loop.connect_accepted_socket(self._server, connection)
        )
        self._opening.add(task)
        task.add_done_callback(self._opening.discard)

    def _reset_connections(self) -> None:
        for protocol in self._server.connections:
            if isinstance(protocol.transport, asyncio.Transport):
                _reset(protocol.transport)

    # --- a request

    async def _answer(self, message: web.BaseRequest) -> web.StreamResponse:
        connection = _Connection(message)
        below = message.raw_path.startswith(self.prefix)
        path = message.raw_path.removeprefix(self.prefix) if below else message.raw_path
        request = Request(message.method, path, CIMultiDict(message.headers))
        self.requests.append(request)
        self._log.append((1, request))
        try:
            self._check_expected()
            if self._listener is None:  # accepted just before it went down
                await connection.cut(reset=True)
            reply = self._reply(request) if below else _not_found()
            return await connection.send(reply)
        finally:
            self._log.append((-1, request))

    def _check_expected(self) -> None:
        for pattern, count, latch in self._expected:
            if not latch.is_set() and self.count(pattern) >= count:
                latch.set()

    def _reply(self, request: Request) -> Reply:
        reply = self._honest(request)
        rule = next((rule for rule in self._rules if rule.applies(request)), None)
        if rule:
            rule.hits += 1
            for fault in rule.faults:
                fault.shape(reply, request)
        if reply.status == web.HTTPOk.status_code:
            _apply_conditions(reply, request)
        return reply

    def _honest(self, request: Request) -> Reply:
        """Return the answer of a cache that does nothing wrong."""
        if self.require_auth and request.headers.get("Authorization") != self.require_auth:
            challenge = {"WWW-Authenticate": 'Basic realm="cache"'}
            return _plain(401, b"not authorized\n", challenge)
        if request.method not in {"GET", "HEAD"}:
            return _plain(405, b"read only\n", {"Allow": "GET, HEAD"})
        if request.raw_path not in self.files:
            return _not_found()
        body, headers = self.files[request.raw_path]
        blob = Blob.of(body)
        reply = Reply(200, CIMultiDict(headers), blob)
        reply.headers.setdefault("ETag", f'"{nix32(blob.sha256)}"')
        return reply


@contextmanager
def running(simulator: BinaryCacheSimulator) -> Iterator[BinaryCacheSimulator]:
    """Run `simulator` in a thread with a loop of its own."""
    started: Future[None] = Future()
    stop = Latch()

    async def serve() -> None:
        async with simulator:
            started.set_result(None)
            await stop.wait()

    def main() -> None:
        try:
            asyncio.run(serve())
        except BaseException as error:
            if started.done():
                raise
            started.set_exception(error)

    thread = threading.Thread(target=main, name=f"simulator :{simulator.port}")
    thread.start()
    try:
        started.result(timeout=60)
        yield simulator
    finally:
        stop.set()
        thread.join(timeout=10)


# --- sockets ----------------------------------------------------------------------------------


def _bind(port: int) -> socket.socket:
    """Bind `port`, which `_reserve` holds; only the socket that listens gets connections."""
    bound = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        bound.settimeout(0)
        bound.bind((HOST, port))
    except BaseException:
        bound.close()
        raise
    return bound


def _reserve() -> socket.socket:
    """Bind a free port and never listen: it cannot be given to anyone else while we are down."""
    return _bind(0)


def _reset(transport: asyncio.Transport) -> None:
    connection = transport.get_extra_info("socket")
    if connection is not None and connection.fileno() >= 0:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
    transport.abort()


# --- replies ----------------------------------------------------------------------------------


def _plain(status: int, body: bytes, headers: Mapping[str, str]) -> Reply:
    fields = CIMultiDict({"Content-Type": "text/plain", **headers})
    return Reply(status, fields, Blob.of(body), ranges=False)


def _not_found() -> Reply:
    return _plain(404, b"404\n", {})


_RANGE = re.compile(r"bytes=(\d*)-(\d*)")


def _apply_conditions(reply: Reply, request: Request) -> None:
    """Obey If-None-Match, Range and If-Range as RFC 9110 says, for a single range."""
    etag = reply.headers.get("ETag")
    if etag and request.headers.get("If-None-Match") == etag:
        reply.status, reply.body = 304, Blob.of(b"")
        return
    if not reply.ranges:
        return
    reply.headers.setdefault("Accept-Ranges", "bytes")
    wanted = _RANGE.fullmatch(request.headers.get("Range", ""))
    unchanged = request.headers.get("If-Range", etag) == etag
    if request.method == "GET" and wanted and any(wanted.groups()) and unchanged:
        _cut_range(reply, *wanted.groups())


def _cut_range(reply: Reply, first: str, last: str) -> None:
    size = len(reply.body)
    start = int(first) if first else max(0, size - int(last))
    stop = min(size, int(last) + 1) if first and last else size
    if start >= stop:
        reply.status, reply.body = 416, Blob.of(b"")
        reply.headers["Content-Range"] = f"bytes */{size}"
        return
    reply.status, reply.body = 206, reply.body[start:stop]
    reply.headers["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"


class _Connection:
    """One request's way back to the client."""

    def __init__(self, message: web.BaseRequest) -> None:
        self._message = message
        if isinstance(message.transport, asyncio.WriteTransport):
            # Every drain waits until the kernel has it all: then "after n bytes" is exact,
            # and a client that does not read stops us at once.
            message.transport.set_write_buffer_limits(high=0)

    async def send(self, reply: Reply) -> web.StreamResponse:
        """Give `reply`, with all that happens on the way."""
        for action in reply.before:
            await action(self)
        response = web.StreamResponse(status=reply.status, headers=reply.headers)
        if reply.chunked:
            response.enable_chunked_encoding()
        else:
            response.content_length = len(reply.body)
        if reply.missing:
            response.force_close()
        await response.prepare(self._message)
        if self._message.method != "HEAD":
            await self._send_body(response, reply)
        return response

    async def _send_body(self, response: web.StreamResponse, reply: Reply) -> None:
        body = reply.body[: max(0, len(reply.body) - reply.missing)]
        sent = 0
        for offset, action in sorted(reply.stops, key=lambda stop: stop[0]):
            stop = max(sent, min(offset, len(body)))
            await self._write(response, body[sent:stop], reply.pace)
            sent = stop
            await action(self)
        await self._write(response, body[sent:], reply.pace)

    async def _write(
        self, response: web.StreamResponse, body: Blob, pace: tuple[float, int] | None
    ) -> None:
        for piece in body.pieces(pace[1] if pace else PIECE):
            await response.write(piece)
            await self._message.writer.drain()
            if pace:
                await asyncio.sleep(len(piece) / pace[0])

    async def cut(self, *, reset: bool) -> None:
        """End the connection; does not return."""
        transport = self._message.transport
        if isinstance(transport, asyncio.Transport):
            if reset:
                _reset(transport)
            else:
                transport.abort()
        await asyncio.get_running_loop().create_future()  # cancelled as the connection is lost
