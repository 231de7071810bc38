"""Clients on the machine that we run on: between them and us there is memory, and no network.

What TCP does to share a network costs there, and gains nothing. Where the machine's congestion control is
BBR, which sends by the clock, most of the time of a large answer goes into setting timers.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from typing import Final

UNPACED: Final = b"reno"
"""A congestion control that sends whatever the client has room for. Every Linux has it, and lets every
process choose it (tcp(7), tcp_allowed_congestion_control)."""


def spare_pacing(transport: asyncio.BaseTransport) -> None:
    """Let a client on this machine have bytes as soon as it has room; leave others as the machine has it.

    Who connects to an address of its own machine has the same one for its end, unless it asks for another.
    """
    ours, theirs = map(transport.get_extra_info, ("sockname", "peername"))
    if isinstance(ours, tuple) and isinstance(theirs, tuple) and ours[0] == theirs[0]:
        connection = transport.get_extra_info("socket")
        with contextlib.suppress(OSError):  # it is as slow as it was
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, UNPACED)
