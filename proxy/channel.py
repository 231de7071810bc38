"""Frames, and file descriptors with them, over a Unix socket between two processes of ours.

A frame is a length, a flag, and bytes. With the flag set, a descriptor came along (SCM_RIGHTS, unix(7)): the
kernel hands it over no later than the last byte of its frame, and in order.
"""

from __future__ import annotations

import array
import asyncio
import os
import socket
import struct
from collections import deque
from collections.abc import Callable
from typing import Final, Generic, TypeVar

T = TypeVar("T")

_HEAD: Final = struct.Struct("!I?")
_PIECE: Final = 256 * 2**10
_RIGHTS: Final = socket.CMSG_SPACE(array.array("i").itemsize)

NONE: Final = -1
"""No descriptor."""


class Channel:
    """One end of a connected stream socket, which it owns. Made inside of a running event loop.

    Args:
        sock: The socket.
        on_frame: Called with each frame, and the descriptor that came along, which is then its own.
        on_drained: Called when everything that was sent has been taken by the kernel.
        on_end: Called once, when the other end has gone.
    """

    def __init__(
        self,
        sock: socket.socket,
        *,
        on_frame: Callable[[bytes, int], None],
        on_drained: Callable[[], None],
        on_end: Callable[[], None],
    ) -> None:
        sock.settimeout(0)
        self._socket = sock
        self._on_frame = on_frame
        self._on_drained = on_drained
        self._on_end = on_end
        self._loop = asyncio.get_running_loop()
        self._arrived = bytearray()
        self._descriptors: deque[int] = deque()
        self._queue: deque[tuple[memoryview, int]] = deque()
        self.closed = False
        self._loop.add_reader(sock, self._readable)

    @property
    def is_drained(self) -> bool:
        """Whether the kernel has taken everything that was sent."""
        return not self._queue

    def send(self, frame: bytes, fd: int = NONE) -> None:
        """Send a frame, and a descriptor, which is closed here when it has gone."""
        if self.closed:
            close(fd)
            return
        was_drained = self.is_drained
        self._queue.append((memoryview(_HEAD.pack(len(frame), fd != NONE) + frame), fd))
        if was_drained:
            self._write()

    def close(self) -> None:
        """Close the socket, and every descriptor that nobody has taken; safe to repeat."""
        if self.closed:
            return
        self.closed = True
        self._loop.remove_reader(self._socket)
        self._loop.remove_writer(self._socket)
        self._socket.close()
        for fd in (*self._descriptors, *(fd for _, fd in self._queue)):
            close(fd)
        self._queue.clear()
        self._descriptors.clear()

    def _write(self) -> None:
        """Send what the kernel takes, and go on when it takes more."""
        try:
            while self._queue:
                data, fd = self._queue[0]
                sent = _send(self._socket, data, fd)
                self._queue[0] = (data[sent:], NONE)
                close(fd)
                if sent == len(data):
                    self._queue.popleft()
        except BlockingIOError:
            self._loop.add_writer(self._socket, self._writable)
        except OSError:
            self._end()

    def _writable(self) -> None:
        self._loop.remove_writer(self._socket)
        self._write()
        if self.is_drained and not self.closed:
            self._on_drained()

    def _readable(self) -> None:
        try:
            data, ancillary, flags, _ = self._socket.recvmsg(
                _PIECE, _RIGHTS, socket.MSG_CMSG_CLOEXEC
            )
        except BlockingIOError:
            return
        except OSError:
            data, ancillary, flags = b"", [], 0
        if not data:
            self._end()
            return
        self._descriptors += _received(ancillary)
        if flags & socket.MSG_CTRUNC:
            self._descriptors.append(NONE)  # it was sent, and there was no room in our table for it
        self._arrived += data
        self._take_frames()

    def _take_frames(self) -> None:
        frames: list[tuple[bytes, int]] = []
        begin = 0
        while len(self._arrived) >= begin + _HEAD.size:
            length, with_descriptor = _HEAD.unpack_from(self._arrived, begin)
            end = begin + _HEAD.size + length
            if len(self._arrived) < end:
                break
            frame = bytes(memoryview(self._arrived)[begin + _HEAD.size : end])
            frames.append((frame, self._descriptors.popleft() if with_descriptor else NONE))
            begin = end
        del self._arrived[:begin]
        for frame, fd in frames:
            if self.closed:
                close(fd)
            else:
                self._on_frame(frame, fd)

    def _end(self) -> None:
        if not self.closed:
            self.close()
            self._on_end()


class Outbox(Generic[T]):
    """Sends what is put into it in one frame, at the end of each turn of the event loop.

    Args:
        channel: Where it goes.
        encode: Writes a batch.
    """

    def __init__(self, channel: Channel, encode: Callable[[list[T]], bytes]) -> None:
        self._channel = channel
        self._encode = encode
        self._loop = asyncio.get_running_loop()
        self._batch: list[T] = []

    def put(self, item: T) -> None:
        """Send something, soon."""
        if not self._batch:
            self._loop.call_soon(self._send)
        self._batch.append(item)

    def _send(self) -> None:
        batch, self._batch = self._batch, []
        self._channel.send(self._encode(batch))


def _send(sock: socket.socket, data: memoryview, fd: int) -> int:
    if fd == NONE:
        return sock.send(data)
    rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))
    return sock.sendmsg([data], [rights])


def _received(ancillary: list[tuple[int, int, bytes]]) -> list[int]:
    fds = array.array("i")
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(data[: len(data) - len(data) % fds.itemsize])
    return fds.tolist()


def close(fd: int) -> None:
    """Close a descriptor, if it is one."""
    if fd != NONE:
        os.close(fd)
