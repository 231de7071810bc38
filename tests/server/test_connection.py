"""Who may take the fast lane: only a request that can be nothing else, and never before its turn."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import random
import socket
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Self

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proxy.events import FastlaneClosed, Fault
from proxy.server import aiohttp_slots, connection
from proxy.server.connection import (
    KEEPALIVE,
    LONGEST_BLOCK,
    LONGEST_REQUEST,
    MOST_BLOCKS,
    MOST_REQUESTS,
    REGULAR,
)
from proxy.server.connection import Server as Connections
from proxy.server.listening import listening
from tests.faults import Gate
from tests.inside import InsideProxy
from tests.server.hot import (
    ABSENT,
    HOT,
    KEY,
    LARGE,
    LARGE_NAR,
    NAR,
    NARINFO,
    SMALL,
    UNASKED,
    heat,
    hot_proxy,
)
from tests.server.piecewise import (
    BLOCK,
    Answer,
    Piecewise,
    answers,
    codes,
    connections,
    plain,
    through_the_lane,
    turns,
)
from tests.simulator import BinaryCacheSimulator
from tests.wire import Wire, until

pytestmark = pytest.mark.timeout(60)

INSIDE = plain(NARINFO)
"""A hot request, byte for byte as the fast lane knows it, to be hidden in others."""

LENGTH = b"Content-Length: %d\r\n" % len(INSIDE)
CHUNK = b"%x\r\n" % len(INSIDE)


def request(*lines: bytes, method: bytes = b"GET", version: bytes = b"1.1") -> bytes:
    """Return a request for what is never hot, with more header lines."""
    first = method + b" /healthz HTTP/" + version + b"\r\nHost: cache\r\n"
    return first + b"".join(line + b"\r\n" for line in lines) + b"\r\n"


@contextlib.asynccontextmanager
async def taught(proxy: InsideProxy) -> AsyncIterator[Connections]:
    """Make connections that know the plain header block already."""
    server = connections(proxy.server)
    try:
        async with Piecewise(server) as client:
            assert codes(await client.ask(plain("/healthz"))) == [200]
            before = through_the_lane(proxy)
            assert codes(await client.ask(INSIDE)) == [200]
            assert through_the_lane(proxy) == before + 1
        yield server
    finally:
        await server.shutdown(1)


async def slowly(proxy: InsideProxy, pieces: Sequence[bytes], pause: int = 0) -> list[Answer]:
    """Return how the proxy answers with the fast lane closed."""
    server = connections(proxy.server, lane=False)
    before = through_the_lane(proxy)
    async with Piecewise(server) as client:
        for piece in pieces:
            client.feed(piece)
            await turns(pause)
        await client.settled()
        found = answers(client.received())
    await server.shutdown(1)
    assert through_the_lane(proxy) == before
    return found


# --- requests that are none -------------------------------------------------------------------

HIDDEN: dict[str, list[bytes]] = {
    "a header's value": [b"GET /healthz HTTP/1.1\r\nX-Long: ", INSIDE],
    "a header's name": [b"GET /healthz HTTP/1.1\r\nX-", INSIDE],
    "a folded header": [b"GET /healthz HTTP/1.1\r\nX-Long: a\r\n ", INSIDE],
    "a header behind a blank": [b"GET /healthz HTTP/1.1\r\n", INSIDE],
    "the target": [b"GET /healthz?", INSIDE],
    "the body of a GET": [request(LENGTH[:-2]), INSIDE],
    "the body of a POST": [request(LENGTH[:-2], method=b"POST"), INSIDE],
    "the body of a PUT": [request(LENGTH[:-2], method=b"PUT"), INSIDE],
    "the rest of a body": [request(b"Content-Length: %d" % (len(INSIDE) + 3)), b"abc", INSIDE],
    "the rest of a body that came along": [
        request(b"Content-Length: %d" % (len(INSIDE) + 3)) + b"abc",
        INSIDE,
    ],
    "a body that begins like an end": [
        request(b"Content-Length: %d" % (len(INSIDE) + 4)) + b"\r\n\r\n",
        INSIDE,
    ],
    "a body that begins with a line": [
        request(b"Content-Length: %d" % (len(INSIDE) + 2)) + b"\r\n",
        INSIDE,
    ],
    "one of two bodies": [request(LENGTH[:-2]), INSIDE, request(LENGTH[:-2]), INSIDE],
    "a chunk of a GET": [
        request(b"Transfer-Encoding: chunked"),
        CHUNK,
        INSIDE,
        b"\r\n0\r\n\r\n",
    ],
    "a chunk of a POST": [
        request(b"Transfer-Encoding: chunked", method=b"POST"),
        CHUNK,
        INSIDE,
        b"\r\n0\r\n\r\n",
    ],
    "a chunk whose size came along": [request(b"Transfer-Encoding: chunked") + CHUNK, INSIDE],
    "a trailer": [request(b"Transfer-Encoding: chunked") + b"0\r\nX-Trailer: ", INSIDE],
    "a chunk's extension": [request(b"Transfer-Encoding: chunked") + b"1;x=", INSIDE],
    "a body of two framings": [request(b"Transfer-Encoding: chunked", LENGTH[:-2]), INSIDE],
    "a body whose length has a split name": [
        b"GET /healthz HTTP/1.1\r\nHost: cache\r\nContent-Le",
        b"ngth: %d\r\n\r\n" % len(INSIDE),
        INSIDE,
    ],
    "a body whose length is split": [
        b"GET /healthz HTTP/1.1\r\nHost: cache\r\nContent-Length: %d" % (len(INSIDE) // 10),
        b"%d\r\n\r\n" % (len(INSIDE) % 10),
        INSIDE,
    ],
    "a body behind a split end of headers": [
        b"GET /healthz HTTP/1.1\r\nHost: cache\r\n" + LENGTH + b"\r",
        b"\n",
        INSIDE,
    ],
    "a body behind a request in the same piece": [
        plain("/healthz") + request(LENGTH[:-2]),
        INSIDE,
    ],
    "a body that is expected": [request(b"Expect: 100-continue", LENGTH[:-2]), INSIDE],
    "a websocket": [request(b"Connection: Upgrade", b"Upgrade: websocket"), INSIDE],
    "a tunnel": [b"CONNECT cache:80 HTTP/1.1\r\nHost: cache\r\n\r\n", INSIDE],
}
"""Bytes that are exactly a hot request when they are looked at alone, and are none."""


@pytest.mark.parametrize("pause", [0, 1, 30])
@pytest.mark.parametrize("pieces", HIDDEN.values(), ids=HIDDEN)
async def test_hidden_requests(proxy: InsideProxy, pieces: list[bytes], pause: int) -> None:
    """What stands in another request's header or body is no request, however it arrives."""
    async with taught(proxy) as server, Piecewise(server) as client:
        before = through_the_lane(proxy)
        for piece in pieces:
            client.feed(piece)
            await turns(pause)
        await client.settled()
        found = answers(client.received())
    assert through_the_lane(proxy) == before
    assert found == await slowly(proxy, pieces, pause)


BEHIND_SOMETHING: dict[str, list[bytes]] = {
    "a wish for a body": [request(b"Expect: 100-continue"), INSIDE],
    "an unknown wish": [request(b"Expect: the-unexpected"), INSIDE],
    "another protocol": [request(b"Connection: Upgrade", b"Upgrade: h2c"), INSIDE],
    "garbage": [b"\x16\x03\x01\r\n\r\n", INSIDE],
    "a bad header": [request(b"no colon"), INSIDE],
    "a request without Host": [b"GET /healthz HTTP/1.1\r\n\r\n", INSIDE],
    "the last one": [request(b"Connection: close"), INSIDE],
    "HTTP/1.0": [request(version=b"1.0"), INSIDE],
    "HTTP/0.9": [b"GET /healthz\r\n\r\n", INSIDE],
}
"""A hot request behind something that a connection may or may not survive."""


@pytest.mark.parametrize("pause", [0, 1, 30])
@pytest.mark.parametrize("pieces", BEHIND_SOMETHING.values(), ids=BEHIND_SOMETHING)
async def test_behind_something_odd(proxy: InsideProxy, pieces: list[bytes], pause: int) -> None:
    """A hot request is answered, or is not, as it is without a fast lane."""
    async with taught(proxy) as server, Piecewise(server) as client:
        for piece in pieces:
            client.feed(piece)
            await turns(pause)
        await client.settled()
        assert answers(client.received()) == await slowly(proxy, pieces, pause)


DISGUISED = {
    "an absolute target": b"GET http://cache" + INSIDE[4:],
    "another host's": b"GET http://elsewhere" + INSIDE[4:],
    "an empty line in front": b"\r\n" + INSIDE,
    "a bare line feed in front": b"\n" + INSIDE,
    "two blanks": b"GET  " + INSIDE[4:],
    "a tab": b"GET\t" + INSIDE[4:],
    "a blank in front": b" " + INSIDE,
    "lower case": b"get " + INSIDE[4:],
    "another version": INSIDE.replace(b"HTTP/1.1", b"HTTP/1.0"),
    "no version": INSIDE.replace(b" HTTP/1.1", b""),
    "a query": INSIDE.replace(b" HTTP", b"? HTTP"),
    "a fragment": INSIDE.replace(b" HTTP", b"# HTTP"),
    "two slashes": b"GET /" + INSIDE[4:],
    "an escape": INSIDE.replace(b".narinfo", b"%2enarinfo"),
    "a NUL": INSIDE.replace(b".narinfo", b".narinfo\0"),
    "a line feed for an end": INSIDE.replace(b"\r\n", b"\n"),
    "something behind": INSIDE + b"\r\n",
    "the beginning of another behind": INSIDE + b"GET ",
}


@pytest.mark.parametrize("piece", DISGUISED.values(), ids=DISGUISED)
async def test_disguised_requests(proxy: InsideProxy, piece: bytes) -> None:
    """What is a hot request but for a byte gets the answer that it gets without a fast lane."""
    async with taught(proxy) as server:
        for pieces in ([piece], [piece, INSIDE], [INSIDE, piece, INSIDE]):
            async with Piecewise(server) as client:
                client.feed(*pieces)
                await client.settled()
                assert answers(client.received()) == await slowly(proxy, pieces)


TEACHERS = {
    "an empty line": (b"\r\nGET /healthz", b" /healthz"),
    "many empty lines": (b"\r\n\r\nGET /healthz", b" /healthz"),
    "a bare line feed": (b"\n\nGET /healthz", b" /healthz"),
    "two blanks": (b"GET  /healthz", b" /healthz"),
    "three blanks": (b"GET   /healthz", b"  /healthz"),
    "two blanks behind": (b"GET /healthz ", b" "),
}
"""The beginning of a request that is valid, and what a careless reader takes to follow its target."""


@pytest.mark.parametrize("target", HOT)
@pytest.mark.parametrize(("teacher", "behind"), TEACHERS.values(), ids=TEACHERS)
async def test_nothing_false_is_learnt(
    proxy: InsideProxy, teacher: bytes, behind: bytes, target: str
) -> None:
    """A request with a strange but valid first line teaches nothing that makes an invalid one valid."""
    server = connections(proxy.server)
    async with Piecewise(server) as client:
        await client.ask(teacher + BLOCK)
    taken_apart = b"GET " + target.encode() + behind + BLOCK
    async with Piecewise(server) as client:
        assert answers(await client.ask(taken_apart)) == await slowly(proxy, [taken_apart])
    await server.shutdown(1)


# --- in order ---------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [2, 3, 20])
async def test_several_in_one_piece(proxy: InsideProxy, count: int) -> None:
    """Requests that arrive together are answered each, in order."""
    targets = [HOT[number % len(HOT)] for number in range(count)]
    together = b"".join(plain(target) for target in targets)
    async with taught(proxy) as server, Piecewise(server) as client:
        found = answers(await client.ask(together))
        assert found == await slowly(proxy, [plain(target) for target in targets])
        assert len(found) == count
        assert answers(await client.ask(INSIDE)) == await slowly(proxy, [INSIDE])


async def test_split_anywhere(proxy: InsideProxy) -> None:
    """A request that arrives in two pieces is one, wherever it is split; so is the one behind it."""
    right = await slowly(proxy, [INSIDE, INSIDE])
    async with taught(proxy) as server:
        for cut in range(1, len(INSIDE)):
            for pause in (0, 2):
                async with Piecewise(server) as client:
                    client.feed(INSIDE[:cut])
                    await turns(pause)
                    client.feed(INSIDE[cut:])
                    await turns(pause)
                    assert answers(await client.ask(INSIDE)) == right, cut


async def test_byte_by_byte(proxy: InsideProxy) -> None:
    """Requests that arrive byte by byte are answered like any other."""
    data = b"".join(plain(target) for target in HOT)
    pieces = [data[place : place + 1] for place in range(len(data))]
    async with taught(proxy) as server, Piecewise(server) as client:
        found = answers(await client.ask(*pieces))
    assert found == await slowly(proxy, [data])
    assert len(found) == len(HOT)


@pytest.mark.parametrize("later", range(12))
async def test_behind_one_that_waits(
    proxy: InsideProxy, cache: BinaryCacheSimulator, later: int
) -> None:
    """What is hot waits for what was asked before it on the same connection, whenever it arrives."""
    gate = Gate(after=None)
    cache.fault(UNASKED.narinfo_path, gate)
    async with taught(proxy) as server, Piecewise(server) as client:
        before = through_the_lane(proxy)
        client.feed(plain(UNASKED.narinfo_path))
        await turns(later)
        client.feed(INSIDE)
        await gate.reached.wait()
        client.feed(plain(NAR))
        await turns(5)
        assert client.received() == b""
        assert through_the_lane(proxy) == before
        gate.open()
        await client.settled()
        waited, narinfo, nar = answers(client.received())
        assert UNASKED.store_path.encode() in waited.body
        assert SMALL.store_path.encode() in narinfo.body
        assert nar.body == bytes(SMALL.file)


async def test_others_do_not_wait(proxy: InsideProxy, cache: BinaryCacheSimulator) -> None:
    """What is hot is answered on one connection while another one waits for an upstream."""
    gate = Gate(after=None)
    cache.fault(UNASKED.narinfo_path, gate)
    async with (
        taught(proxy) as server,
        Piecewise(server) as waiting,
        Piecewise(server) as client,
    ):
        waiting.feed(plain(UNASKED.narinfo_path))
        await gate.reached.wait()
        before = through_the_lane(proxy)
        client.feed(INSIDE)  # and no turn of the event loop
        assert codes(client.received()) == [200]
        assert through_the_lane(proxy) == before + 1
        gate.open()
        await waiting.settled()


SLOW = ["/healthz", "/nix-cache-info", LARGE_NAR, f"{NAR}?", f"/{SMALL.hash_part}.ls", "/x"]


@pytest.mark.parametrize("slow", SLOW)
async def test_behind_one_that_is_about_to_end(proxy: InsideProxy, slow: str) -> None:
    """At whatever moment of another request's life a hot one arrives, its answer comes second."""
    first, second = plain(slow), plain(ABSENT)
    async with taught(proxy) as server:
        async with Piecewise(server) as client:
            (right,) = answers(await client.ask(first))
        (absent,) = await slowly(proxy, [second])
        for later in range(30):
            async with Piecewise(server) as client:
                client.feed(first)
                received = b""
                for _ in range(later):
                    await turns(1)
                    received += client.received()
                received += await client.ask(second)
                assert answers(received) == [right, absent], later


async def test_a_crowd(proxy: InsideProxy) -> None:
    """Any mixture of hot and other requests, at any pace, is answered in order."""
    source = random.Random(11)
    targets = [*HOT, *HOT, "/healthz", "/nix-cache-info", "/x", f"{NAR}?"]
    async with taught(proxy) as server:
        alone = {target: (await slowly(proxy, [plain(target)]))[0] for target in targets}
        for _ in range(60):
            chosen = source.choices(targets, k=source.randrange(2, 12))
            async with Piecewise(server) as client:
                for target in chosen:
                    client.feed(plain(target))
                    await turns(source.choice((0, 0, 1, 1, 2, 3, 5, 8)))
                await client.settled()
                assert answers(client.received()) == [alone[target] for target in chosen]


# --- connections that are in no state for it --------------------------------------------------


async def test_a_client_that_does_not_read(proxy: InsideProxy) -> None:
    """What a client does not read stops the fast lane, and costs a bounded amount of memory."""
    async with taught(proxy) as server, Piecewise(server, send_buffer=4_096) as client:
        before = through_the_lane(proxy)
        asked = 0
        while not client.protocol._paused:
            client.feed(plain(NAR))
            asked += 1
            assert asked < 200
        held = client.transport.get_write_buffer_size()
        assert held < 2**16 + 2 * len(SMALL.file)
        for _ in range(20):
            client.feed(plain(NAR))
            await turns(2)
        assert through_the_lane(proxy) == before + asked
        assert client.transport.get_write_buffer_size() < held + 2 * len(SMALL.file)
        found = answers(await client.ask())
        assert {answer.body for answer in found} == {bytes(SMALL.file)}
        assert len(found) == asked + 20
        assert codes(await client.ask(INSIDE)) == [200]
        assert through_the_lane(proxy) == before + asked + 1


@pytest.mark.parametrize("taken", [0, 1, 100, 250, 2_999, None])
@pytest.mark.parametrize("target", HOT)
async def test_a_socket_that_takes_a_part(
    proxy: InsideProxy, monkeypatch: pytest.MonkeyPatch, target: str, taken: int | None
) -> None:
    """Wherever a socket stops taking an answer, in the headers or behind, the rest follows in order."""
    (right,) = await slowly(proxy, [plain(target)])
    real = os.write
    refused = 0

    async with taught(proxy) as server, Piecewise(server) as client:

        def write(fd: int, data: bytes) -> int:
            nonlocal refused
            if fd != client.protocol._socket:
                return real(fd, data)
            refused += 1
            if not taken:
                error = errno.EAGAIN if taken == 0 else errno.EBADF
                raise OSError(error, os.strerror(error))
            return real(fd, data[:taken])

        before = through_the_lane(proxy)
        monkeypatch.setattr(os, "write", write)
        for _ in range(REGULAR + 2):
            assert answers(await client.ask(plain(target))) == [right]
        assert through_the_lane(proxy) == before + refused == before + REGULAR + 2


async def test_a_connection_that_breaks(
    proxy: InsideProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client that is gone when it is answered is dropped, and that is no fault."""
    real = os.write

    async with taught(proxy) as server, Piecewise(server) as client:

        def write(fd: int, data: bytes) -> int:
            if fd == client.protocol._socket:
                raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))
            return real(fd, data)

        monkeypatch.setattr(os, "write", write)
        client._ours.shutdown(socket.SHUT_RDWR)
        client.feed(INSIDE)
        await turns(3)
        assert not client.open
        assert len(server.connections) == 0
    assert not proxy.observed(Fault)


async def test_an_unlucky_number(proxy: InsideProxy) -> None:
    """A connection that is lost writes nothing more to its descriptor, which may be another's."""
    async with taught(proxy) as server, Piecewise(server) as client:
        client.transport.abort()
        await turns(3)
        assert client.protocol._socket == -1


@pytest.mark.parametrize("target", HOT)
async def test_a_unix_socket(proxy: InsideProxy, tmp_path: Path, target: str) -> None:
    """On a Unix socket the fast lane answers as it does on any other."""
    path = tmp_path / "listening"
    (right,) = await slowly(proxy, [plain(target)])
    async with listening(proxy.server, [path], shutdown_timeout=1, linger=0):
        reader, writer = await asyncio.open_unix_connection(str(path))
        before = through_the_lane(proxy)
        for _ in range(3):
            writer.write(plain(target))
            head = await reader.readuntil(b"\r\n\r\n")
            body = await reader.readexactly(len(right.body))
            assert answers(head + body) == [right]
        assert through_the_lane(proxy) == before + 2
        writer.close()


@pytest.mark.parametrize("later", range(10))
async def test_behind_the_last_one(proxy: InsideProxy, later: int) -> None:
    """Behind a request that says that it is the last one, nothing is answered."""
    async with taught(proxy) as server, Piecewise(server) as client:
        before = through_the_lane(proxy)
        client.feed(request(b"Connection: close"))
        await turns(later)
        client.feed(INSIDE)
        await client.settled()
        assert codes(client.received()) == [200]
        assert not client.open
    assert through_the_lane(proxy) == before


@pytest.mark.parametrize("target", [*HOT, "/healthz", LARGE_NAR])
async def test_a_proxy_that_stops(proxy: InsideProxy, target: str) -> None:
    """While the proxy stops, every answer tells the client not to use the connection again."""
    serving = listening(proxy.server, [("127.0.0.1", 0)], shutdown_timeout=1, linger=0.5)
    (address,) = await serving.__aenter__()
    async with Wire(f"http://{address}") as wire:
        for _ in range(2):
            assert "connection" not in (await wire.ask(target)).headers
        stopping = asyncio.create_task(serving.__aexit__(None, None, None))
        await until(lambda: proxy.server.draining)
        answer = await wire.ask(target)
        assert answer.complete
        assert answer.headers.get("connection") == "close"
        assert await wire.rest() == b""
        await stopping


async def test_a_connection_that_is_closed(proxy: InsideProxy) -> None:
    """On a connection that is being closed nothing more is answered."""
    async with taught(proxy) as server:
        for close in ("close", "force_close"):
            async with Piecewise(server) as client:
                before = through_the_lane(proxy)
                getattr(client.protocol, close)()
                client.protocol.data_received(INSIDE)
                await client.settled()
                assert client.received() == b""
                assert through_the_lane(proxy) == before


async def test_a_client_that_has_left(proxy: InsideProxy) -> None:
    """A request whose client has left since is no trouble."""
    async with taught(proxy) as server, Piecewise(server) as client:
        client.transport.abort()
        client.protocol.data_received(INSIDE)
        await turns(3)
        client.protocol.data_received(INSIDE)
    assert not proxy.observed(Fault)


class LoopClock:
    """The clock of the running event loop, which can be put forward."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        loop = asyncio.get_running_loop()
        self._ahead = 0.0
        real = loop.time
        monkeypatch.setattr(loop, "time", lambda: real() + self._ahead)

    async def forward(self, seconds: float) -> None:
        """Let so much time pass, and do what is then due."""
        self._ahead += seconds
        await turns(10)


@pytest.mark.parametrize("target", HOT)
async def test_keep_alive(proxy: InsideProxy, monkeypatch: pytest.MonkeyPatch, target: str) -> None:
    """A connection of nothing but hot requests lasts until it is idle for `KEEPALIVE`, and no longer."""
    clock = LoopClock(monkeypatch)
    async with Wire(proxy.url) as wire:
        await wire.ask("/healthz")
        before = through_the_lane(proxy)
        for _ in range(5):
            await clock.forward(0.9 * KEEPALIVE)
            await wire.ask(target)
        assert through_the_lane(proxy) == before + 5
        await clock.forward(0.2 * KEEPALIVE)
        await clock.forward(0.7 * KEEPALIVE)
        await wire.ask(target)
        assert through_the_lane(proxy) == before + 6
        await clock.forward(0.5 * KEEPALIVE)
        await clock.forward(0.6 * KEEPALIVE)
        assert await wire.rest() == b""


async def test_a_client_that_never_asks(
    proxy: InsideProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A connection on which nothing comes, or never a whole request, is closed after `KEEPALIVE`."""
    clock = LoopClock(monkeypatch)
    async with Wire(proxy.url) as silent, Wire(proxy.url) as halting:
        await halting.send(INSIDE[:-1])
        await turns(10)
        await clock.forward(1.1 * KEEPALIVE)
        assert await silent.rest() == b""
        assert await halting.rest() == b""


@pytest.mark.parametrize("more", [b"", plain("/healthz"), plain(LARGE_NAR)])
async def test_a_client_that_never_reads(
    proxy: InsideProxy, monkeypatch: pytest.MonkeyPatch, more: bytes
) -> None:
    """A client that asks and does not read is dropped some time, with all that is held for it."""
    clock = LoopClock(monkeypatch)
    async with taught(proxy) as server, Piecewise(server, send_buffer=4_096) as client:
        while not client.protocol._paused:
            client.feed(plain(NAR))
        client.feed(more)
        await turns(10)
        await clock.forward(1.1 * KEEPALIVE)
        await clock.forward(1.1 * KEEPALIVE)
        assert not client.open
        assert client.transport.get_write_buffer_size() == 0
        assert len(server.connections) == 0


async def test_a_client_that_reads_nearly_all(
    proxy: InsideProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor is a connection kept for ever because of a little that its client does not read."""
    clock = LoopClock(monkeypatch)
    async with taught(proxy) as server, Piecewise(server, send_buffer=4_096) as client:
        while client.transport.get_write_buffer_size() == 0:
            client.feed(INSIDE)
        await clock.forward(1.1 * KEEPALIVE)
        await clock.forward(1.1 * KEEPALIVE)
        assert not client.open
        assert client.transport.get_write_buffer_size() == 0
        assert len(server.connections) == 0


# --- connections that are read past their transport -------------------------------------------


async def become_hot(client: Piecewise) -> None:
    """Ask for hot things until the connection is known for it."""
    for _ in range(1 + REGULAR):
        client.send(plain(NARINFO))
        await client.settled()
    assert codes(client.received()) == [200] * (1 + REGULAR)


@pytest.mark.parametrize("target", HOT)
async def test_a_hot_connection(proxy: InsideProxy, target: str) -> None:
    """A few hot requests in a row make a connection hot; it gets the same bytes, and all are counted."""
    (right,) = await slowly(proxy, [plain(target)])
    async with taught(proxy) as server, Piecewise(server) as client:
        await become_hot(client)
        assert (len(server.hot), client.transport.is_reading()) == (1, False)
        before = through_the_lane(proxy)
        for number in range(1, 11):
            client.send(plain(target))
            await client.settled()
            assert answers(client.received()) == [right]
            assert through_the_lane(proxy) == before + number
        assert len(server.hot) == 1


@pytest.mark.parametrize("target", ["/healthz", LARGE_NAR, UNASKED.narinfo_path, "/nix-cache-info"])
async def test_a_hot_connection_for_something_else(proxy: InsideProxy, target: str) -> None:
    """What cannot be answered at once, aiohttp answers in its turn; then the connection is hot again."""
    async with taught(proxy) as server, Piecewise(server) as client:
        await become_hot(client)
        client.send(plain(target))
        await turns(2)
        assert (len(server.hot), client.transport.is_reading()) == (0, True)
        client.send(INSIDE)
        await client.settled()
        found = answers(client.received())
        assert [answer.code for answer in found] == [200, 200]
        assert found[1].body.startswith(b"StorePath: ")
        for _ in range(REGULAR):
            client.send(INSIDE)
            await client.settled()
        assert codes(client.received()) == [200] * REGULAR
        assert len(server.hot) == 1


@pytest.mark.parametrize("count", [2, 3, 20])
async def test_several_at_once_on_a_hot_connection(proxy: InsideProxy, count: int) -> None:
    """Requests that arrive together on a hot connection are answered in order."""
    targets = [HOT[number % len(HOT)] for number in range(count)]
    alone = {target: (await slowly(proxy, [plain(target)]))[0] for target in HOT}
    async with taught(proxy) as server, Piecewise(server) as client:
        await become_hot(client)
        client.send(b"".join(map(plain, targets)))
        await client.settled()
        assert answers(client.received()) == [alone[target] for target in targets]


async def test_a_hot_connection_that_ends(proxy: InsideProxy) -> None:
    """A hot connection whose client leaves, or that is cut, is watched no longer."""
    async with taught(proxy) as server:
        async with Piecewise(server) as left, Piecewise(server) as cut, Piecewise(server) as stays:
            for client in (left, cut, stays):
                await become_hot(client)
            assert len(server.hot) == 3
            left._ours.shutdown(socket.SHUT_WR)
            cut.transport.abort()
            await turns(5)
            assert (left.open, cut.open, len(server.hot)) == (False, False, 1)
            stays.send(INSIDE)
            await stays.settled()
            assert codes(stays.received()) == [200]
        assert len(server.hot) == 0
    assert not proxy.observed(Fault)


async def test_the_last_words_of_a_hot_connection(proxy: InsideProxy) -> None:
    """A client that asks once more and sends nothing after that is answered."""
    async with taught(proxy) as server, Piecewise(server) as client:
        await become_hot(client)
        client.send(INSIDE)
        client._ours.shutdown(socket.SHUT_WR)
        await client.settled()
        assert codes(client.received()) == [200]
        assert not client.open


async def test_a_hot_connection_is_idle(
    proxy: InsideProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hot connection lasts until it is idle for `KEEPALIVE`, and no longer."""
    clock = LoopClock(monkeypatch)
    async with taught(proxy) as server, Piecewise(server) as client:
        await become_hot(client)
        for _ in range(3):
            await clock.forward(0.9 * KEEPALIVE)
            client.send(INSIDE)
            await client.settled()
            assert codes(client.received()) == [200]
        await clock.forward(0.6 * KEEPALIVE)
        assert client.open
        await clock.forward(0.6 * KEEPALIVE)
        assert (client.open, len(server.hot)) == (False, 0)


async def test_a_hot_connection_while_the_proxy_stops(proxy: InsideProxy) -> None:
    """While the proxy stops, a hot connection is told not to be used again, like every other."""
    serving = listening(proxy.server, [("127.0.0.1", 0)], shutdown_timeout=1, linger=0.5)
    (address,) = await serving.__aenter__()
    async with Wire(f"http://{address}") as wire:
        for _ in range(2 + REGULAR):
            assert "connection" not in (await wire.ask(NARINFO)).headers
        stopping = asyncio.create_task(serving.__aexit__(None, None, None))
        await until(lambda: proxy.server.draining)
        answer = await wire.ask(NARINFO)
        assert answer.complete
        assert answer.headers.get("connection") == "close"
        assert await wire.rest() == b""
        await stopping


async def test_a_hot_client_that_does_not_read(proxy: InsideProxy) -> None:
    """What a hot client does not read stops the fast lane, and is sent in order when it reads again."""
    async with taught(proxy) as server, Piecewise(server, send_buffer=4_096) as client:
        await become_hot(client)
        asked = 0
        while not client.protocol._paused:
            client.send(plain(NAR))
            await turns(2)
            asked += 1
            assert asked < 200
        for _ in range(5):
            client.send(plain(NAR))
            await turns(2)
        await client.settled()
        found = answers(client.received())
        assert [answer.body for answer in found] == [bytes(SMALL.file)] * (asked + 5)


async def test_a_fault_of_ours(proxy: InsideProxy, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fault ends the connection on which it happens, is reported, and disturbs no other one."""
    reported: list[object] = []
    asyncio.get_running_loop().set_exception_handler(
        lambda _loop, context: reported.append(context["exception"])
    )
    async with taught(proxy) as server, Piecewise(server) as bad, Piecewise(server) as good:
        await become_hot(bad)
        await become_hot(good)
        fault = ZeroDivisionError()

        def look_up(asker: object) -> bytearray:
            assert asker is bad.protocol
            raise fault

        monkeypatch.setitem(server.requests, plain(NAR), look_up)
        bad.send(plain(NAR))
        good.send(INSIDE)
        await good.settled()
        assert codes(good.received()) == [200]
        assert (bad.open, good.open, reported) == (False, True, [fault])


# --- requests that never take it --------------------------------------------------------------

NEVER = {
    "a range": [b"Range: bytes=0-9"],
    "another unit": [b"Range: lines=0-9"],
    "If-Range": [b'If-Range: "x"'],
    "If-Match": [b'If-Match: "x"'],
    "If-None-Match": [b'If-None-Match: "x"'],
    "If-Modified-Since": [b"If-Modified-Since: Thu, 01 Jan 2026 00:00:00 GMT"],
    "If-Unmodified-Since": [b"If-Unmodified-Since: Thu, 01 Jan 2026 00:00:00 GMT"],
    "Authorization": [b"Authorization: Basic eDp5"],
    "no body": [b"Content-Length: 0"],
    "Expect": [b"Expect: 100-continue"],
    "TE": [b"TE: trailers"],
    "Trailer": [b"Trailer: X-Trailer"],
    "odd case": [b"rAnGe: bytes=0-9"],
}
"""Headers that change the answer or say that more follows, on a connection that goes on."""


@pytest.mark.parametrize("lines", NEVER.values(), ids=NEVER)
async def test_more_than_plain(proxy: InsideProxy, lines: list[bytes]) -> None:
    """Such a request takes the long way, however often it comes, and does not close the short one."""
    async with taught(proxy) as server, Piecewise(server) as client:
        for target in HOT:
            piece = plain(target)[:-2] + b"".join(line + b"\r\n" for line in lines) + b"\r\n"
            right = await slowly(proxy, [piece])
            before = through_the_lane(proxy)
            for _ in range(3):
                assert answers(await client.ask(piece)) == right
            assert through_the_lane(proxy) == before
            assert codes(await client.ask(INSIDE)) == [200]
            assert through_the_lane(proxy) == before + 1


@pytest.mark.parametrize("target", HOT)
async def test_head(proxy: InsideProxy, target: str) -> None:
    """HEAD gets headers and no body, and what follows takes the fast lane again."""
    head = plain(target).replace(b"GET", b"HEAD", 1)
    (right,) = await slowly(proxy, [plain(target)])
    async with taught(proxy) as server, Piecewise(server) as client:
        before = through_the_lane(proxy)
        for _ in range(3):
            assert answers(await client.ask(head)) == [right._replace(body=b"")]
        assert through_the_lane(proxy) == before
        assert answers(await client.ask(plain(target))) == [right]
        assert through_the_lane(proxy) == before + 1


LAST = {
    "Connection: close": plain(NARINFO)[:-2] + b"Connection: close\r\n\r\n",
    "HTTP/1.0": plain(NARINFO).replace(b"1.1", b"1.0"),
}


@pytest.mark.parametrize("piece", LAST.values(), ids=LAST)
async def test_the_last_one(proxy: InsideProxy, piece: bytes) -> None:
    """A client that wants the connection closed gets its answer, and then the end."""
    async with taught(proxy) as server:
        before = through_the_lane(proxy)
        for _ in range(3):
            async with Piecewise(server) as client:
                assert answers(await client.ask(piece)) == await slowly(proxy, [piece])
                assert not client.open
        assert through_the_lane(proxy) == before


async def test_other_methods(proxy: InsideProxy) -> None:
    """Only GET takes the fast lane."""
    async with taught(proxy) as server:
        before = through_the_lane(proxy)
        for method in (b"POST", b"PUT", b"DELETE", b"OPTIONS", b"PATCH", b"GETS", b"PURGE"):
            for target in HOT:
                piece = plain(target).replace(b"GET", method, 1)
                async with Piecewise(server) as client:
                    assert answers(await client.ask(piece)) == await slowly(proxy, [piece])
        assert through_the_lane(proxy) == before


# --- what is learnt ---------------------------------------------------------------------------


def made_up(number: int, length: int = 0) -> bytes:
    """Return a plain request with a header block that nobody has sent before."""
    return plain("/healthz")[:-2] + b"X-Made-Up: %d%s\r\n\r\n" % (number, b"x" * length)


async def test_one_request_teaches(proxy: InsideProxy) -> None:
    """The second request with the same headers takes the fast lane, also on another connection."""
    server = connections(proxy.server)
    before = through_the_lane(proxy)
    for number, expected in ((1, 0), (1, 1), (2, 1), (2, 2)):
        async with Piecewise(server) as client:
            assert codes(await client.ask(made_up(number).replace(b"/healthz", NAR.encode()))) == [
                200
            ]
            assert through_the_lane(proxy) == before + expected
    await server.shutdown(1)


@pytest.mark.parametrize("made_up_ones", [0, MOST_BLOCKS - 1, MOST_BLOCKS, 3 * MOST_BLOCKS])
async def test_made_up_headers(proxy: InsideProxy, made_up_ones: int) -> None:
    """A client that makes up headers takes bounded memory, and locks nobody out, old or new."""
    real = [made_up(-1), INSIDE]
    async with taught(proxy) as server, Piecewise(server) as client:
        for number in range(made_up_ones):
            assert codes(await client.ask(made_up(number))) == [200]
            assert len(server.blocks) <= MOST_BLOCKS
        before = through_the_lane(proxy)
        for piece in real * 10:
            assert codes(await client.ask(piece.replace(b"/healthz", NAR.encode()))) == [200]
        assert through_the_lane(proxy) >= before + 18  # each has to be learnt once at most


async def test_requests_that_are_remembered(
    proxy: InsideProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of what requests mean, a bounded number is remembered, and none of the long ones; all are answered."""
    assert MOST_REQUESTS * LONGEST_REQUEST <= 2**22
    monkeypatch.setattr(connection, "MOST_REQUESTS", 4)
    async with taught(proxy) as server, Piecewise(server) as client:
        for number in range(20):
            before = through_the_lane(proxy)
            made_up_one = f"/{number:032d}.narinfo"
            for _ in range(2):
                assert codes(await client.ask(plain(made_up_one))) == [404]
            for target in HOT:
                await client.ask(plain(target))
            assert through_the_lane(proxy) == before + 1 + len(HOT)
            assert len(server.requests) <= 4
        known = dict(server.requests)
        long = made_up(0, LONGEST_REQUEST).replace(b"/healthz", NARINFO.encode())
        before = through_the_lane(proxy)
        for _ in range(3):
            assert codes(await client.ask(long)) == [200]
        assert through_the_lane(proxy) == before + 2
        assert server.requests == known


async def test_long_headers(proxy: InsideProxy) -> None:
    """Headers that are longer than any client's are not learnt."""
    async with taught(proxy) as server, Piecewise(server) as client:
        before, known = through_the_lane(proxy), set(server.blocks)
        for _ in range(3):
            piece = made_up(0, LONGEST_BLOCK).replace(b"/healthz", NARINFO.encode())
            assert codes(await client.ask(piece)) == [200]
        assert through_the_lane(proxy) == before
        assert server.blocks == known


async def test_refused_headers(proxy: InsideProxy) -> None:
    """Nothing is learnt from what aiohttp refuses."""
    async with taught(proxy) as server:
        known = set(server.blocks)
        for line in (b"no colon", b"X : a", b"Content-Length: -1", b"Host: other", b"X: a\x00"):
            piece = plain(NARINFO)[:-2] + line + b"\r\n\r\n"
            for _ in range(2):
                async with Piecewise(server) as client:
                    assert answers(await client.ask(piece)) == await slowly(proxy, [piece])
        assert server.blocks == known


# --- another aiohttp --------------------------------------------------------------------------


@pytest.mark.parametrize("slot", ["_slot_of_another_version", *aiohttp_slots._SLOTS])
def test_missing_slots(monkeypatch: pytest.MonkeyPatch, slot: str) -> None:
    """What this module looks at is there, and is missed when it is not."""
    assert aiohttp_slots.missing_slots() == []
    renamed = [f"{name}_of_old" if name == slot else name for name in aiohttp_slots._SLOTS]
    monkeypatch.setattr(aiohttp_slots, "_SLOTS", (*renamed, "_of_old"))
    assert "_of_old" in aiohttp_slots.missing_slots()


async def test_an_unknown_aiohttp(
    cache: BinaryCacheSimulator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With an aiohttp that lacks a slot the fast lane is closed, which is said once; all is answered."""
    monkeypatch.setattr(aiohttp_slots, "_SLOTS", (*aiohttp_slots._SLOTS, "_of_another_version"))
    async with hot_proxy(tmp_path, cache) as proxy:
        await heat(proxy)
        async with Wire(proxy.url) as wire:
            for _ in range(3):
                assert (await wire.ask(NARINFO)).status == 200
                assert (await wire.ask(NAR)).body == bytes(SMALL.file)
                assert (await wire.ask(ABSENT)).status == 404
        assert through_the_lane(proxy) == 0
    (closed,) = proxy.observed(FastlaneClosed)
    assert "_of_another_version" in closed.reason


async def test_nothing_is_said_of_a_known_one(proxy: InsideProxy) -> None:
    """With the aiohttp that is installed the fast lane is open."""
    assert proxy.observed(FastlaneClosed) == []


# --- idle at once -----------------------------------------------------------------------------


@pytest.mark.parametrize("slow", SLOW)
async def test_idle_after_the_last_byte(proxy: InsideProxy, slow: str) -> None:
    """When a client has the last byte of a slow answer, its next request takes the fast lane."""
    async with Wire(proxy.url) as wire:
        await wire.ask("/healthz")
        before = through_the_lane(proxy)
        for number in range(1, 51):
            await wire.ask(slow)
            assert (await wire.ask(NARINFO)).status == 200
            assert through_the_lane(proxy) == before + number


async def test_all_but_the_first(proxy: InsideProxy) -> None:
    """Of the requests for a hot NAR on one connection, all but the first take the fast lane."""
    async with Wire(proxy.url) as wire:
        before = through_the_lane(proxy)
        for number in range(51):
            assert (await wire.ask(NAR)).body == bytes(SMALL.file)
            assert through_the_lane(proxy) == before + number


# --- with and without -------------------------------------------------------------------------

PREFIXES = st.sampled_from([b""] * 12 + [b"\r\n", b"\n", b" ", b"\r\n\r\n", b"x"])
METHODS = st.sampled_from([b"GET"] * 12 + [b"HEAD", b"POST", b"get", b"GET\t", b"CONNECT"])
BLANKS = st.sampled_from([b" "] * 12 + [b"  ", b"", b"\t"])
TARGETS = st.sampled_from(
    [target.encode() for target in HOT] * 4
    + [b"/healthz", b"/nix-cache-info", b"/x", b"*", b"http://cache" + NARINFO.encode()]
    + [NAR.encode() + b"?", NARINFO.encode() + b"#", b"/" + NARINFO.encode()]
)
BEHIND = st.sampled_from([b""] * 12 + [b" ", b" /healthz", b" " + NARINFO.encode(), b"\r\n"])
TAILS = st.sampled_from(
    [BLOCK] * 12
    + [
        BLOCK[:-2] + line + b"\r\n\r\n"
        for line in (
            b"Content-Length: 5",
            LENGTH[:-2],
            b"Content-Length: 0",
            b"Transfer-Encoding: chunked",
            b"Expect: 100-continue",
            b"Connection: close",
            b"Connection: keep-alive",
            b"Connection: Upgrade\r\nUpgrade: websocket",
            b"Range: bytes=1-3",
            b"X: a\r\n b",
            b"X: ",
        )
    ]
    + [BLOCK.replace(b"1.1", b"1.0"), BLOCK.replace(b"Host: cache\r\n", b""), BLOCK[:-2], b"\r\n"]
)
REQUESTS = st.builds(
    lambda *parts: b"".join(parts), PREFIXES, METHODS, BLANKS, TARGETS, BEHIND, TAILS
)
BODIES = st.sampled_from(
    [b"hello", INSIDE, b"5\r\nhello\r\n0\r\n\r\n", CHUNK + INSIDE + b"\r\n0\r\n\r\n", b"\r\n\r\n"]
)
HOT_ONES = st.sampled_from([plain(target) for target in HOT])
PIECES = st.one_of(HOT_ONES, HOT_ONES, HOT_ONES, REQUESTS, REQUESTS, BODIES)


@st.composite
def conversations(draw: st.DrawFn) -> list[tuple[bytes, int]]:
    """Make what a client sends: pieces, and how many turns of the event loop pass behind each."""
    pieces = draw(st.lists(PIECES, min_size=1, max_size=8))
    if draw(st.sampled_from([False, False, True])):  # some arrive together, some apart
        data = b"".join(pieces)
        cuts = sorted(draw(st.sets(st.integers(1, max(1, len(data) - 1)), max_size=6)))
        pieces = [data[a:b] for a, b in zip([0, *cuts], [*cuts, len(data)], strict=True)]
    if draw(st.sampled_from([False, False, True])):  # somebody has damaged one
        number = draw(st.integers(0, len(pieces) - 1))
        place = draw(st.integers(0, len(pieces[number])))
        length = draw(st.integers(0, 2))
        damage = draw(st.sampled_from([b"", b" ", b"\r\n", b"\n", b"\0", b"/", b":", b"GET "]))
        piece = pieces[number]
        pieces[number] = piece[:place] + damage + piece[place + length :]
    pauses = st.sampled_from([0, 0, 1, 2, 5, 20])
    return [(piece, draw(pauses)) for piece in pieces]


class Runner:
    """A hot proxy in an event loop that lasts for all examples of a property."""

    def __init__(self, folder: Path) -> None:
        self._runner = asyncio.Runner()
        self._stack = contextlib.AsyncExitStack()
        self._folder = folder

    def __enter__(self) -> Self:
        self._runner.__enter__()
        self.proxy = self._runner.run(self._start())
        return self

    def __exit__(self, *_: object) -> None:
        self._runner.run(self._stack.aclose())
        self._runner.close()

    async def _start(self) -> InsideProxy:
        cache = BinaryCacheSimulator((SMALL, LARGE), key=KEY)
        await self._stack.enter_async_context(cache)
        proxy = await self._stack.enter_async_context(hot_proxy(self._folder, cache))
        await heat(proxy)
        return proxy

    def heard(self, conversation: list[tuple[bytes, int]], *, lane: bool) -> list[Answer]:
        """Return what a client gets."""
        return self._runner.run(self._heard(conversation, lane=lane))

    def heard_when_hot(self, conversation: list[tuple[bytes, int]], *, lane: bool) -> list[Answer]:
        """Return what a client gets that has asked for hot things before, from its socket on."""
        return self._runner.run(self._heard_when_hot(conversation, lane=lane))

    async def _heard(self, conversation: list[tuple[bytes, int]], *, lane: bool) -> list[Answer]:
        server = connections(self.proxy.server, lane=lane)
        async with Piecewise(server) as teacher:
            await teacher.ask(plain("/healthz"))
        async with Piecewise(server) as client:
            for piece, pause in conversation:
                client.feed(piece)
                await turns(pause)
            await client.settled()
            return answers(client.received())

    async def _heard_when_hot(
        self, conversation: list[tuple[bytes, int]], *, lane: bool
    ) -> list[Answer]:
        server = connections(self.proxy.server, lane=lane)
        async with Piecewise(server) as client:
            await become_hot(client)
            assert len(server.hot) == lane
            for piece, pause in conversation:
                client.send(piece)
                await turns(max(pause, 4))  # or it would arrive with the next one
            await client.settled()
            found = answers(client.received())
        await server.shutdown(1)
        return found


def test_hot_as_without_a_fast_lane(tmp_path: Path) -> None:
    """So it does on a connection that is read past its transport."""
    with Runner(tmp_path) as runner:

        @settings(max_examples=200, deadline=None)
        @given(conversations())
        def same(conversation: list[tuple[bytes, int]]) -> None:
            with_it, without = (
                runner.heard_when_hot(conversation, lane=lane) for lane in (True, False)
            )
            assert with_it == without

        same()


def test_as_without_a_fast_lane(tmp_path: Path) -> None:
    """Whatever a client sends, and in whatever pieces, it gets what it gets without a fast lane."""
    with Runner(tmp_path) as runner:

        @settings(max_examples=400)
        @given(conversations())
        def same(conversation: list[tuple[bytes, int]]) -> None:
            assert runner.heard(conversation, lane=True) == runner.heard(conversation, lane=False)

        same()
        assert through_the_lane(runner.proxy) > 100


@pytest.mark.parametrize("start", ["../", "\0", "e"])
def test_no_other_files_are_looked_for(tmp_path: Path, start: str) -> None:
    """What only looks like the name of a narinfo is not made the name of a file, in the store or outside."""
    name = f"{start:x<32}.narinfo"
    outside = tmp_path / name.removeprefix("../").replace("\0", "_")
    outside.write_text("not ours")
    with Runner(tmp_path / "store") as runner:
        conversation = [(plain(f"/{name}"), 0)]
        assert runner.heard(conversation, lane=True) == runner.heard(conversation, lane=False)
    assert outside.read_text() == "not ours"
    assert not (tmp_path / "store" / ".state" / "quarantine" / outside.name).exists()
