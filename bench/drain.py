"""A client for large files that costs little itself.

wrk copies 8 KiB at a time and would measure itself. This takes 256 KiB at a time, and looks at no byte of
a body. Run as a program, ``python -m bench.drain PORT CONNECTIONS SECONDS FILE`` asks for the URL paths
in a file, one for each connection, over and over, and prints JSON. After 0 seconds means: once each
connection has one whole answer.
"""

from __future__ import annotations

import json
import re
import selectors
import socket
import sys
import time
from pathlib import Path

HOST = "127.0.0.1"

_SINK = memoryview(bytearray(256 << 10))
_HEAD = 16 << 10
_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)\r\n", re.IGNORECASE)
_REQUEST = (
    "GET {path} HTTP/1.1\r\n"
    "Host: {host}\r\n"
    "User-Agent: curl/7.88.1 Nix/2.18.1\r\n"
    "Accept: */*\r\n"
    "Accept-Encoding: zstd, br, gzip, deflate, bzip2, xz\r\n"
    "\r\n"
)


class Connection:
    """A keep-alive connection that asks for a path, once or over and over.

    Attributes:
        socket: What to wait for.
        received: Bytes of bodies so far.
        answers: Bodies that were complete so far.
    """

    def __init__(self, port: int, path: str, *, over_and_over: bool) -> None:
        self.socket = socket.create_connection((HOST, port))
        self._request = _REQUEST.format(path=path, host=f"{HOST}:{port}").encode()
        self._over_and_over = over_and_over
        self._left = 0
        self.received = 0
        self.answers = 0

    def ask(self) -> None:
        """Send a request."""
        self.socket.sendall(self._request)

    def read(self) -> None:
        """Take what has arrived, and perhaps ask again once that was all.

        Raises:
            ConnectionError: It is no part of a 200 answer.
        """
        if self._left == 0:
            self._left = self._read_head()
            return
        size = self.socket.recv_into(_SINK[: self._left])
        if size == 0:
            raise ConnectionError("the server hung up")
        self._left -= size
        self.received += size
        if self._left == 0:
            self.answers += 1
            if self._over_and_over:
                self.ask()

    def _read_head(self) -> int:
        """Return the bytes of the body that follows; 0 when not all of the head is here yet."""
        seen = self.socket.recv(_HEAD, socket.MSG_PEEK)
        end = seen.find(b"\r\n\r\n")
        if end < 0 and seen:
            return 0
        length = _LENGTH.search(seen[: end + 2])
        if not seen.startswith(b"HTTP/1.1 200 ") or length is None:
            raise ConnectionError(f"not what was asked for: {seen[:200]!r}")
        self.socket.recv(end + 4)
        return int(length[1])


def drain(port: int, paths: list[str], connections: int, seconds: float) -> dict[str, float]:
    """Receive for a while over several connections; return what came.

    Args:
        port: Of 127.0.0.1.
        paths: What to ask for, by one connection after the other.
        connections: How many.
        seconds: How long; 0 is until each has one whole answer.

    Raises:
        ConnectionError: An answer was wrong.
    """
    with selectors.EpollSelector() as selector:
        made = [
            Connection(port, paths[number % len(paths)], over_and_over=seconds > 0)
            for number in range(connections)
        ]
        for connection in made:
            selector.register(connection.socket, selectors.EVENT_READ, connection)
        began = time.monotonic()
        for connection in made:
            connection.ask()
        while (
            time.monotonic() < began + seconds
            if seconds
            else any(connection.answers == 0 for connection in made)
        ):
            for key, _ in selector.select(1):
                key.data.read()
        took = time.monotonic() - began
        for connection in made:
            connection.socket.close()
    return {
        "seconds": took,
        "bytes": sum(connection.received for connection in made),
        "requests": sum(connection.answers for connection in made),
    }


def main() -> None:
    """Do as the command line says."""
    port, connections, seconds, file = sys.argv[1:]
    paths = Path(file).read_text().splitlines()
    print(json.dumps(drain(int(port), paths, int(connections), float(seconds))))


if __name__ == "__main__":
    main()
