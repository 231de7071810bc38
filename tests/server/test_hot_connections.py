"""Connections on which one hot request follows another: all that came in a turn is answered in it."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

from proxy.server.hot_connections import HotConnections
from proxy.server.sending import Answer
from tests.wire import until


class Client:
    """A client, and our end of its connection, on which every request is hot: it is sent back.

    Args:
        hot: Who watches it.
        faulty: Whether to look for an answer is a fault.
    """

    def __init__(self, hot: HotConnections, *, faulty: bool = False) -> None:
        self._ours, self.theirs = socket.socketpair()
        self.theirs.settimeout(0)
        self._faulty = faulty
        self.failed = False
        hot.add(self._ours.fileno(), self)

    def find(self, data: bytes) -> Answer | None:
        """Find the answer."""
        if self._faulty:
            raise RuntimeError("a fault")
        return bytearray(data)

    def give(self, answer: Answer, _now: float) -> None:
        """Send it."""
        assert isinstance(answer, bytearray)
        self._ours.send(answer)

    def fail(self) -> None:
        """End."""
        self.failed = True
        self.close()

    def take_back(self, _data: bytes) -> None:
        """Let the transport go on, which there is not."""
        raise AssertionError("every request is hot")

    def close(self) -> None:
        """Close both ends."""
        self._ours.close()
        self.theirs.close()

    async def received(self) -> bytes:
        """Receive something."""
        return await asyncio.get_running_loop().sock_recv(self.theirs, 2**16)


async def test_a_fault_is_one_client_s_alone() -> None:
    """Where an answer cannot be found for a fault of ours, that client is dropped, and others get theirs."""
    faults: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _loop, context: faults.append(context))
    hot = HotConnections(lambda: None)
    before, faulty, behind = (Client(hot, faulty=number == 1) for number in range(3))
    for number, client in enumerate((before, faulty, behind)):
        client.theirs.send(b"request %d" % number)
    assert await before.received() == b"request 0"
    assert await behind.received() == b"request 2"
    await until(lambda: faulty.failed)
    assert [str(fault["exception"]) for fault in faults] == ["a fault"]
    for client in (before, behind):
        client.close()
    hot.close()
