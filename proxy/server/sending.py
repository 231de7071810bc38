"""Answers of the fast lane on their way into a socket: from memory, and from files."""

from __future__ import annotations

import errno
import os
from typing import TypeAlias

from proxy.server.shared import SharedAnswer
from proxy.store.files import OpenFile


class FileAnswer:
    """An answer whose end is in a file that the disk has at hand. It is sent once.

    Args:
        head: What goes before that: headers, and the beginning of the file.
        file: The file, which is closed once the answer was sent.
        position: Where the rest of the file begins.
    """

    __slots__ = ("_file", "_head", "_position")

    def __init__(self, head: bytearray, file: OpenFile, position: int) -> None:
        self._head = head
        self._file = file
        self._position = position

    def send(self, socket: int) -> bytes:
        """Send it, and return what the socket did not take.

        Raises:
            OSError: It cannot be completed, because its file cannot be read; what is wrong with a socket its
                transport finds out.
        """
        head, position = memoryview(self._head), self._position
        with self._file as file:
            try:
                head = head[os.write(socket, head) :]
                if not head:
                    position += os.sendfile(socket, file.fd, position, file.size - position)
            except OSError:
                pass  # of the socket: the transport will find the same, and knows what to do
            if position == file.size:
                return b""
            rest = os.pread(file.fd, file.size - position, position)
            if len(rest) < file.size - position:
                raise OSError(errno.EIO, "the file has become shorter")
            return bytes(head) + rest


Answer: TypeAlias = bytearray | SharedAnswer | FileAnswer
"""What the fast lane has found; memory, unless the kernel can take it from a file."""
