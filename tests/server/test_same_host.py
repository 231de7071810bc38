"""Between clients on the machine of the proxy and the proxy, TCP does not pace what is sent."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from proxy.server.same_host import UNPACED, spare_clients_pacing
from tests.inside import InsideProxy
from tests.server.piecewise import connections


def congestion_control(of: socket.socket) -> bytes:
    """Return the name of what decides how fast a socket sends."""
    return of.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16).rstrip(b"\0")


def listen_on(host: str, family: socket.AddressFamily = socket.AF_INET) -> socket.socket:
    """Listen where connections have another congestion control than the one for this machine."""
    listening = socket.create_server((host, 0), family=family)
    if congestion_control(listening) == UNPACED:
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, b"cubic")
    return listening


@asynccontextmanager
async def served(
    proxy: InsideProxy, listening: socket.socket, come_from: str
) -> AsyncIterator[socket.socket]:
    """Connect from an address, and yield the socket on which the proxy answers."""
    loop = asyncio.get_running_loop()
    with (
        listening,
        socket.create_connection(listening.getsockname()[:2], source_address=(come_from, 0)),
    ):
        accepted, _ = listening.accept()
        accepted.settimeout(0)
        transport, _ = await loop.connect_accepted_socket(connections(proxy.server), accepted)
        try:
            yield accepted
        finally:
            transport.abort()


@pytest.mark.parametrize(
    ("family", "host", "come_from", "is_same"),
    [
        pytest.param(socket.AF_INET, "127.0.0.1", "127.0.0.1", True, id="its own address"),
        pytest.param(socket.AF_INET6, "::1", "::1", True, id="IPv6"),
        pytest.param(socket.AF_INET, "127.0.0.1", "127.0.0.2", False, id="another address"),
    ],
)
async def test_only_clients_of_this_machine(
    family: socket.AddressFamily,
    host: str,
    come_from: str,
    is_same: object,
    proxy: InsideProxy,
) -> None:
    """Who connects from the address that it connects to is on this machine; others keep its default."""
    listening = listen_on(host, family)
    default = congestion_control(listening)
    async with served(proxy, listening, come_from) as accepted:
        assert congestion_control(accepted) == (UNPACED if is_same else default)


async def test_a_kernel_that_refuses(proxy: InsideProxy, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the congestion control cannot be had, the client is served with the default."""
    monkeypatch.setattr("proxy.server.same_host.UNPACED", b"no such thing")
    listening = listen_on("127.0.0.1")
    default = congestion_control(listening)
    async with served(proxy, listening, "127.0.0.1") as accepted:
        assert congestion_control(accepted) == default


@pytest.mark.parametrize(
    ("host", "family", "is_spared"),
    [
        pytest.param("127.0.0.1", socket.AF_INET, True, id="IPv4"),
        pytest.param("::1", socket.AF_INET6, True, id="IPv6"),
        pytest.param("0.0.0.0", socket.AF_INET, False, id="every address"),
        pytest.param("::", socket.AF_INET6, False, id="every IPv6 address"),
    ],
)
def test_where_only_they_can_come(
    host: str, family: socket.AddressFamily, *, is_spared: bool
) -> None:
    """A socket that only clients of this machine reach has another congestion control; no other has."""
    with listen_on(host, family) as listening:
        default = congestion_control(listening)
        spare_clients_pacing([listening])
        assert congestion_control(listening) == (UNPACED if is_spared else default)


async def test_what_the_proxy_listens_on(proxy: InsideProxy) -> None:
    """Its socket has that congestion control, so that no connection was ever paced."""
    _, _, port = proxy.url.rpartition(":")
    with listening_on(int(port)) as listening:
        assert congestion_control(listening) == UNPACED


def listening_on(port: int) -> socket.socket:
    """Return a duplicate of what this process listens with on a port."""
    for link in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            found = socket.socket(fileno=os.dup(int(link.name)))
            is_listening = found.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
            if is_listening and found.getsockname()[1] == port:
                return found
            found.close()
    raise AssertionError(f"nobody listens on {port}")
