"""Answers of the fast lane on their way into a socket: from memory, and from files."""

from __future__ import annotations

import errno
import os
from typing import TypeAlias

from proxy.server.shared import SharedAnswer
from proxy.store.files import OpenFile


class FileAnswer:
    """An answer whose body is a file that the disk has at hand. It is sent once.

    Args:
        head: What goes before the body.
        file: The body, which is closed once it was sent.
    """

    __slots__ = ("_file", "_head")

    def __init__(self, head: bytearray, file: OpenFile) -> None:
        self._head = head
        self._file = file

    def send(self, socket: int) -> bytes:
        """Send it, and return what the socket did not take.

        Raises:
            OSError: It cannot be completed, because its file cannot be read; what is wrong with a socket its
                transport finds out.
        """
        with self._file as file:
            head, sent = bytes(self._head), 0
            try:
                head = head[os.write(socket, head) :]
                if not head:
                    sent = os.sendfile(socket, file.fd, 0, file.size)
            except OSError:
                pass  # of the socket: the transport will find the same, and knows what to do
            if sent == file.size:
                return b""
            rest = os.pread(file.fd, file.size - sent, sent)
            if len(rest) < file.size - sent:
                raise OSError(errno.EIO, "the file has become shorter")
            return head + rest


Answer: TypeAlias = bytearray | SharedAnswer | FileAnswer
"""What the fast lane has found; memory, unless the kernel can take it from a file."""
