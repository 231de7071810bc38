"""What systemd tells a service and wants to be told (sd_listen_fds(3), sd_notify(3))."""

from __future__ import annotations

import contextlib
import os
import socket
import time

_FIRST_FD = 3


def inherited_sockets() -> list[socket.socket]:
    """Return the listening sockets that systemd opened for us; none when there are none.

    The variables are taken out of the environment, so that no child believes they are for it.
    """
    pid, count = os.environ.pop("LISTEN_PID", ""), os.environ.pop("LISTEN_FDS", "0")
    os.environ.pop("LISTEN_FDNAMES", None)
    if pid != str(os.getpid()) or not count.isdecimal():
        return []
    sockets = []
    for fd in range(_FIRST_FD, _FIRST_FD + int(count)):
        os.set_inheritable(fd, False)  # noqa: FBT003  # takes no keyword
        sockets.append(socket.socket(fileno=fd))
    return sockets


def notify(*states: str) -> None:
    """Tell the service manager ``READY=1``, ``STOPPING=1``, … when there is one; never fails."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    if address.startswith("@"):
        address = "\0" + address[1:]
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
        channel.sendto("\n".join(states).encode(), address)


def notify_reloading() -> None:
    """Tell that a reload began; newer versions want the time with it, and older ones ignore it."""
    notify("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")
