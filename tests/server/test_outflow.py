"""Files on their way to clients: every byte, in turn, and an end where a client or a file fails."""

from __future__ import annotations

import asyncio
import os
import random
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from proxy.errors import DamagedError
from proxy.server.outflow import PIECE, ClientGoneError, Flow, Outflow
from proxy.store import pages

CONTENT = random.Random("outflow").randbytes(3 * PIECE + 17)


@pytest.fixture
async def outflow() -> Outflow:
    """Return what sends files."""
    return Outflow()


@contextmanager
def client() -> Iterator[tuple[socket.socket, socket.socket]]:
    """Yield our end of a connection, and a client's."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        theirs = socket.create_connection(listening.getsockname())
        ours, _ = listening.accept()
    with ours, theirs:
        ours.settimeout(0)
        theirs.settimeout(0)
        yield ours, theirs


@pytest.fixture
def file(tmp_path: Path) -> Iterator[int]:
    """Yield the descriptor of a file with `CONTENT`."""
    path = tmp_path / "file"
    path.write_bytes(CONTENT)
    fd = os.open(path, os.O_RDWR)
    yield fd
    os.close(fd)


async def receive(theirs: socket.socket, size: int) -> bytes:
    """Receive so many bytes."""
    loop = asyncio.get_running_loop()
    data = bytearray()
    while len(data) < size:
        piece = await loop.sock_recv(theirs, size - len(data))
        if not piece:
            break
        data += piece
    return bytes(data)


async def send(outflow: Outflow, flow: Flow, patience: float = 60.0) -> None:
    """Send a flow to its end, whatever is in memory."""
    while not await outflow.send(flow, patience=patience):
        await flow.bring_in()


@pytest.mark.parametrize("known", [True, False], ids=["in memory", "nobody can tell"])
@pytest.mark.parametrize(("start", "stop"), [(0, len(CONTENT)), (5, 6), (PIECE, 3 * PIECE)])
async def test_every_byte(
    outflow: Outflow,
    file: int,
    monkeypatch: pytest.MonkeyPatch,
    start: int,
    stop: int,
    *,
    known: bool,
) -> None:
    """A client gets a part of a file, also where no file system can tell what is in memory of it."""
    if not known:
        monkeypatch.setattr(pages, "are_in_memory", lambda *_: False)
    with client() as (ours, theirs):
        receiving = asyncio.create_task(receive(theirs, stop - start))
        flow = Flow(ours.fileno(), file, start, stop, wary=True)
        await send(outflow, flow)
        assert await receiving == CONTENT[start:stop]
        assert flow.position == stop
    outflow.close()


async def test_one_does_not_hold_up_another(outflow: Outflow, file: int) -> None:
    """While a client reads nothing, others are sent what they want; then it goes on where it was."""
    with client() as (ours, slow), client() as (others, quick):
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2**14)
        waiting = asyncio.create_task(
            send(outflow, Flow(ours.fileno(), file, 0, len(CONTENT), wary=False))
        )
        for _ in range(2):
            receiving = asyncio.create_task(receive(quick, len(CONTENT)))
            await send(outflow, Flow(others.fileno(), file, 0, len(CONTENT), wary=False))
            assert await receiving == CONTENT
        assert not waiting.done()
        assert await receive(slow, len(CONTENT)) == CONTENT
        await waiting
    outflow.close()


async def test_a_file_that_becomes_shorter(outflow: Outflow, file: int) -> None:
    """Where a file ends too early, its reader is told that it is damaged."""
    os.truncate(file, PIECE)
    with client() as (ours, theirs):
        receiving = asyncio.create_task(receive(theirs, PIECE))
        with pytest.raises(DamagedError, match=f"ends at {PIECE}"):
            await send(outflow, Flow(ours.fileno(), file, 0, len(CONTENT), wary=False))
        assert await receiving == CONTENT[:PIECE]
    outflow.close()


@pytest.mark.parametrize("leaves", [True, False], ids=["leaves", "reads nothing"])
async def test_a_client_that_is_gone(outflow: Outflow, file: int, *, leaves: bool) -> None:
    """Who leaves, or reads nothing for too long, is given up."""
    with client() as (ours, theirs):
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2**14)
        flow = Flow(ours.fileno(), file, 0, len(CONTENT), wary=False)
        waiting = asyncio.create_task(send(outflow, flow, patience=30.0 if leaves else 0.1))
        await receive(theirs, 1)
        if leaves:
            theirs.close()
        with pytest.raises(OSError if leaves else ClientGoneError):
            await asyncio.wait_for(waiting, 20)
        assert 0 < flow.position < len(CONTENT)
    outflow.close()


async def test_the_end(outflow: Outflow, file: int) -> None:
    """Who still waits for room when nothing is sent any more is told, and waits no longer."""
    with client() as (ours, _):
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2**14)
        flow = Flow(ours.fileno(), file, 0, len(CONTENT), wary=False)
        waiting = asyncio.create_task(send(outflow, flow))
        await asyncio.sleep(0)
        assert not waiting.done()
        outflow.close()
        with pytest.raises(ClientGoneError):
            await waiting
