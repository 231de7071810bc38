"""Connections on which one hot request follows another, in an epoll(7) of their own.

The event loop takes a handle, a context and three calls of its transport to bring one piece of data to a
connection, which is more than all that is done with a hot request. Of these connections it watches a single
descriptor, that of the epoll: whatever has come on any of them is read and answered in one go. A connection
goes back to its transport, with all that was read, as soon as there is something that cannot be answered at
once: another request, a part of one, an end, an error.

Only public parts of asyncio are used for that: a transport that has been told to pause reading leaves its
socket alone until it is told to resume.
"""

from __future__ import annotations

import asyncio
import os
import select
from collections.abc import Callable
from typing import Final, Protocol

from proxy.server.sending import Answer

AT_ONCE: Final = 64
"""Requests answered in one turn of the event loop: about half a millisecond."""

PIECE: Final = 1_024
"""Bytes that are read at once; a hot request has about 250. Longer ones are left to the transport."""


class HotConnection(Protocol):
    """What is needed of `proxy.server.connection.Connection`."""

    def find(self, data: bytes) -> Answer | None:
        """Find the answer to a piece of data, if there is one at once."""

    def give(self, answer: Answer, now: float) -> None:
        """Send an answer."""

    def fail(self) -> None:
        """End: there is a fault of ours."""

    def take_back(self, data: bytes) -> None:
        """Go on with the transport; ``data`` was read from the socket, and is empty if nothing could be."""


class HotConnections:
    """Made inside of a running event loop; closed with `close`.

    Args:
        begin: Called before requests are answered.
    """

    def __init__(self, begin: Callable[[], None]) -> None:
        self._begin = begin
        self._loop = asyncio.get_running_loop()
        self._connections: dict[int, HotConnection] = {}
        self._epoll = select.epoll()
        self._loop.add_reader(self._epoll.fileno(), self._answer)

    def __len__(self) -> int:
        return len(self._connections)

    def add(self, socket: int, connection: HotConnection) -> None:
        """Watch a connection, whose transport does so no longer.

        Args:
            socket: Its descriptor.
            connection: Who gets what comes.
        """
        self._epoll.register(socket, select.EPOLLIN)
        self._connections[socket] = connection

    def remove(self, socket: int) -> None:
        """Watch a connection no longer; it is still open."""
        if self._connections.pop(socket, None) is not None:
            self._epoll.unregister(socket)

    def close(self) -> None:
        """Watch nothing any more."""
        self._connections.clear()
        self._loop.remove_reader(self._epoll.fileno())
        self._epoll.close()

    def _answer(self) -> None:
        """Answer what has come. What all requests can share is done once: clocks are read, changes seen.

        Answers in memory are all found before any of them is sent: a client that gets one after the other,
        without time to fall asleep in between, need not be woken for each.
        """
        self._begin()
        found: list[tuple[HotConnection, Answer]] = []
        now = self._loop.time()
        try:
            for socket, _ in self._epoll.poll(0, AT_ONCE):
                connection = self._connections.get(socket)
                if connection is None:
                    continue  # one before it has ended it
                try:
                    data = os.read(socket, PIECE)
                except OSError:
                    data = b""  # the transport will find the same, and knows what to do
                try:
                    answer = connection.find(data)
                    if answer is None:
                        connection.take_back(data)
                    elif isinstance(answer, bytearray):
                        found.append((connection, answer))
                    else:
                        connection.give(answer, now)
                except BaseException:
                    connection.fail()  # as a transport would: its client waits for an answer
                    raise
        finally:
            for connection, answer in found:
                connection.give(answer, now)
