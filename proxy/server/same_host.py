"""Clients on the machine that we run on: between them and us there is memory, and no network.

What TCP does to share a network costs there, and gains nothing. Where the machine's congestion control is
BBR, which sends by the clock, most of the time of a large answer goes into setting timers; and a socket that
has once had it goes on setting them with any other. So where only clients of this machine can come, sockets
that listen have another one from the beginning.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import socket
from collections.abc import Iterable
from typing import Final

UNPACED: Final = b"reno"
"""A congestion control that sends whatever the client has room for. Every Linux has it, and lets every
process choose it (tcp(7), tcp_allowed_congestion_control)."""


def spare_clients_pacing(listening: Iterable[socket.socket]) -> None:
    """Let all clients have bytes as soon as they have room, where they can only come from this machine."""
    for each in listening:
        address = each.getsockname()
        if isinstance(address, tuple) and ipaddress.ip_address(address[0]).is_loopback:
            _spare(each)


def spare_pacing(transport: asyncio.BaseTransport) -> None:
    """Let a client on this machine have bytes as soon as it has room; leave others as the machine has it.

    Who connects to an address of its own machine has the same one for its end, unless it asks for another.
    """
    ours, theirs = map(transport.get_extra_info, ("sockname", "peername"))
    if isinstance(ours, tuple) and isinstance(theirs, tuple) and ours[0] == theirs[0]:
        _spare(transport.get_extra_info("socket"))


def _spare(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):  # it is as slow as it was
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, UNPACED)
