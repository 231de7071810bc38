"""Files on their way to clients, past asyncio's transports, many at a time.

The bytes go from the page cache to the socket with sendfile(2). Of sockets that have no room the event loop
watches a single descriptor, that of an epoll(7) of ours, and each that has room again gets a piece in its
turn: a large file is thousands of pieces, and a task, a handle and a timeout for each of them would take
longer than the kernel does.
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import os
import select
import sys
import termios
from typing import Final

from proxy.errors import DamagedError
from proxy.store import pages

PIECE: Final = 2**20
"""Bytes for one client in one turn, at most."""

AT_ONCE: Final = 64
"""Clients that get a piece in one turn of the event loop."""


class ClientGoneError(Exception):
    """The client has left, or does not read; there is nobody to tell."""


class Outflow:
    """Sends files. Made inside of a running event loop; closed with `close`."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._flows: dict[int, Flow] = {}
        self._epoll = select.epoll()
        self._loop.add_reader(self._epoll.fileno(), self._turn)

    def close(self) -> None:
        """Send nothing any more; whoever still waits for that is told that the client is gone."""
        for flow in self._flows.values():
            if not flow.over.done():
                flow.over.set_exception(ClientGoneError())
        self._flows.clear()
        self._loop.remove_reader(self._epoll.fileno())
        self._epoll.close()

    async def send(self, flow: Flow, *, patience: float) -> bool:
        """Send a flow, as far as that can be done without waiting for a disk.

        Args:
            flow: What goes where.
            patience: Seconds in which its client has to take something, again and again.

        Returns:
            Whether all of it went out; else the next piece is not in memory.

        Raises:
            ClientGoneError: The client takes nothing any more.
            DamagedError: The file is shorter, or cannot be read.
            OSError: The client has left.
        """
        while not flow.advance():
            await self._advance(flow, patience)
        return flow.position == flow.stop

    async def _advance(self, flow: Flow, patience: float) -> None:
        """Wait until a flow needs its task, as long as its client takes something now and then."""
        flow.over = self._loop.create_future()
        self._epoll.register(flow.socket, select.EPOLLOUT)
        self._flows[flow.socket] = flow
        self._watch(flow, patience, flow.left + 1)
        try:
            await flow.over
        finally:
            flow.watch.cancel()
            if self._flows.pop(flow.socket, None) is not None:
                self._epoll.unregister(flow.socket)

    def _watch(self, flow: Flow, patience: float, before: int) -> None:
        """Look now and then whether a client has taken something; end its flow if it has not."""
        left = flow.left
        if left < before:
            flow.watch = self._loop.call_later(patience, self._watch, flow, patience, left)
        elif not flow.over.done():
            flow.over.set_exception(ClientGoneError())

    def _turn(self) -> None:
        """Give a piece to each client that has room.

        The last one is for the task: once a client has it, it may ask for something else, and then its
        connection should be waiting for that.
        """
        for socket, _ in self._epoll.poll(0, AT_ONCE):
            flow = self._flows[socket]
            if flow.over.done():
                continue  # its task has its turn soon
            try:
                if flow.is_at_last_piece or flow.advance():
                    flow.over.set_result(None)
            except (OSError, DamagedError) as error:
                flow.over.set_exception(error)


class Flow:
    """A part of a file on its way to one client.

    Args:
        socket: Where nobody else writes meanwhile.
        fd: The file.
        start: Where the part begins.
        stop: Where it ends.
        wary: Look whether pages are in memory before they are sent.
    """

    __slots__ = ("_sure", "fd", "over", "position", "socket", "stop", "watch")

    over: asyncio.Future[None]
    watch: asyncio.TimerHandle

    def __init__(self, socket: int, fd: int, start: int, stop: int, *, wary: bool) -> None:
        self.socket = socket
        self.fd = fd
        self.position = start
        """How far it has got."""
        self.stop = stop
        self._sure = start if wary else stop

    @property
    def left(self) -> int:
        """Bytes that the client has not taken yet: SIOCOUTQ of tcp(7) and unix(7), and what is to come.

        The kernel says that a socket has room when a good part of its buffer is free, which may take a slow
        client minutes; so what counts is whether this gets less.
        """
        answer = fcntl.ioctl(self.socket, termios.TIOCOUTQ, bytes(4))
        return self.stop - self.position + int.from_bytes(answer, sys.byteorder)

    @property
    def is_at_last_piece(self) -> bool:
        """Whether no more than a piece is left."""
        return self.stop - self.position <= PIECE

    async def bring_in(self) -> None:
        """Have the next piece in memory, as far as anybody can: it is sent in any case.

        Raises:
            StoreError: The disk does not answer.
        """
        sure = min(self.stop, self.position + PIECE)
        await pages.bring_in(self.fd, self.position, sure)
        self._sure = sure

    def advance(self) -> bool:
        """Send a piece, if there is room for one; tell whether no more can be sent from memory.

        Raises:
            DamagedError: The file is shorter, or cannot be read.
            OSError: The client has left.
        """
        if self.position == self._sure:
            sure = min(self.stop, self.position + PIECE)
            if not pages.are_in_memory(self.fd, self.position, sure):
                return True
            self._sure = sure
        end = min(self._sure, self.position + PIECE)
        try:
            sent = os.sendfile(self.socket, self.fd, self.position, end - self.position)
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno == errno.EIO:  # of the file: no socket says so
                raise DamagedError(f"cannot read: {error.strerror}") from error
            raise
        if sent == 0:
            raise too_short(self.position, end)
        self.position += sent
        return self.position == self.stop


def too_short(position: int, end: int) -> DamagedError:
    """Say that a file ends before it should."""
    return DamagedError(f"a file ends at {position}, and should go on to {end}")
