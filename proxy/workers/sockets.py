"""The sockets that workers accept clients on, bound by the core.

A TCP address has a socket for each worker (SO_REUSEPORT, socket(7)), so that the kernel spreads connections;
of one shared socket, the busiest worker would get most. The core keeps them open: a worker that is
started again gets the same one, and what has queued up on it. Unix sockets, and those that systemd
passes, are shared.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from proxy.errors import ListenError
from proxy.server.listening import Address, address_text, refuse_if_in_use

BACKLOG: Final = 128
"""Connections that wait to be accepted, on each socket: as many as with one process."""


class Listeners:
    """Listening sockets of all workers.

    Args:
        addresses: Where to listen.
        workers: How many there are.

    Raises:
        ListenError: An address cannot be listened on.
    """

    def __init__(self, addresses: Sequence[Address], workers: int) -> None:
        self._of: list[list[socket.socket]] = [[] for _ in range(workers)]
        self._owned = contextlib.ExitStack()
        self.texts: list[str] = []
        """The addresses as they turned out to be: ports that were 0 have a number."""
        with contextlib.ExitStack() as on_failure:
            on_failure.callback(self._owned.close)
            for address in addresses:
                self._listen(address)
            on_failure.pop_all()

    def of(self, worker: int) -> Sequence[socket.socket]:
        """Return the sockets of one worker."""
        return self._of[worker]

    def close(self) -> None:
        """Close all sockets; those of a worker that runs stay open there."""
        self._owned.close()

    def _listen(self, address: Address) -> None:
        try:
            match address:
                case socket.socket():
                    self._share(address)
                case Path():
                    self._share(_unix(address))
                case (host, port):
                    self._spread(host, port)
        except OSError as error:
            reason = os.strerror(error.errno) if error.errno and error.errno > 0 else str(error)
            raise ListenError(f"cannot listen on {address_text(address)}: {reason}") from error

    def _share(self, listener: socket.socket) -> None:
        self._owned.enter_context(listener)
        listener.listen(BACKLOG)
        for each in self._of:
            each.append(listener)
        self.texts.append(address_text(listener.getsockname() or address_text(listener)))

    def _spread(self, host: str, port: int) -> None:
        """Give each worker a socket for each address that a host name stands for, as asyncio does."""
        found = socket.getaddrinfo(
            host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        for family, _, _, _, place in dict.fromkeys(found):
            if place[1] != 0:
                with _bound(family, place, shared=False):
                    pass  # nobody else is there, not even with SO_REUSEPORT
            target = place
            for each in self._of:
                listener = self._owned.enter_context(_bound(family, target, shared=True))
                listener.listen(BACKLOG)
                each.append(listener)
                target = listener.getsockname()  # what was port 0 is now a number, for all
            self.texts.append(address_text(target))


def _bound(family: int, place: object, *, shared: bool) -> socket.socket:
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if shared:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        if family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        listener.bind(place)  # type: ignore[arg-type]  # what getaddrinfo gave
    except BaseException:
        listener.close()
        raise
    return listener


def _unix(path: Path) -> socket.socket:
    """Bind a Unix socket, in the place of one that nobody listens on."""
    refuse_if_in_use(path)
    if path.is_socket():
        path.unlink()
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listener.bind(str(path))
    except BaseException:
        listener.close()
        raise
    return listener
