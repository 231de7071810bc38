"""The porter's own process, where it is looked at from inside."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Iterator

import pytest

from proxy.porter.process import LULL, Unhurried


@pytest.fixture
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    """Yield an event loop that looks at sockets as the porter's does."""
    loop = asyncio.SelectorEventLoop(Unhurried())
    yield loop
    loop.close()


def test_all_that_comes(loop: asyncio.AbstractEventLoop) -> None:
    """What comes in pieces arrives, all of it and in order, however many are taken at a time."""
    ours, theirs = socket.socketpair()
    pieces: list[bytes] = []

    async def receive() -> None:
        while piece := await loop.sock_recv(ours, 2**16):
            pieces.append(piece)

    async def send() -> None:
        for _ in range(100):
            theirs.send(b"piece")
            await asyncio.sleep(0)  # a turn of the loop for each
        theirs.close()

    async def both() -> None:
        await asyncio.gather(receive(), send())

    with ours, theirs:
        ours.settimeout(0)
        loop.run_until_complete(both())
    assert b"".join(pieces) == b"piece" * 100


def test_timers_and_turns_are_kept(loop: asyncio.AbstractEventLoop) -> None:
    """Who has waited long enough goes on, and what can go on at once does not wait."""

    async def run() -> tuple[float, float]:
        began = time.monotonic()
        await asyncio.sleep(3 * LULL)
        slept = time.monotonic() - began
        began = time.monotonic()
        for _ in range(1_000):
            await asyncio.sleep(0)
        return slept, time.monotonic() - began

    slept, turned = loop.run_until_complete(run())
    assert slept >= 3 * LULL
    assert turned < 1_000 * LULL / 2
