"""Large files go out in full segments, and what arrives goes out as it arrives."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from tests.conftest import StartSimulator
from tests.faults import Gate
from tests.inside import InsideProxy
from tests.server.hot import LARGE, LARGE_NAR, hot_proxy
from tests.server.piecewise import Piecewise, answers, connections, plain, turns

pytestmark = pytest.mark.timeout(60)

FILE = bytes(LARGE.file)
BUFFER = 2**18
"""Bytes: the kernel's buffer for a client that is behind; a few segments."""


def is_corked(client: Piecewise) -> bool:
    """Tell whether the kernel holds back what makes no full segment."""
    connection = client.transport.get_extra_info("socket")
    return bool(connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_CORK))


@pytest.fixture
async def proxy(sim: StartSimulator, tmp_path: Path) -> AsyncIterator[InsideProxy]:
    """Return a proxy that has the NAR in its store."""
    async with hot_proxy(tmp_path, await sim(LARGE)) as running:
        assert (await running.pull(await running.nar_url(LARGE.hash_part))).body == FILE
        await running.idle()
        yield running


@asynccontextmanager
async def halfway(proxy: InsideProxy) -> AsyncIterator[Piecewise]:
    """Connect a client that is being sent the NAR."""
    server = connections(proxy.server)
    async with Piecewise(server, send_buffer=BUFFER, tcp=True) as client:
        client.feed(plain(LARGE_NAR))
        while not is_corked(client):
            await turns(1)
        yield client
    await server.shutdown(1)


async def test_a_complete_file(proxy: InsideProxy) -> None:
    """While a complete file is sent, only full segments are; its end is not held back."""
    async with halfway(proxy) as client:
        await client.settled()
        assert not is_corked(client)
        (answer,) = answers(client.received())
        assert answer.body == FILE


async def test_a_file_that_arrives(sim: StartSimulator, tmp_path: Path) -> None:
    """What has come of a file that still arrives is sent at once, whatever segments that makes."""
    cache = await sim(LARGE)
    gate = Gate(after=400_000)
    cache.fault("/nar/*", gate)
    async with hot_proxy(tmp_path, cache) as proxy:
        await proxy.nar_url(LARGE.hash_part)
        server = connections(proxy.server)
        async with Piecewise(server, tcp=True) as client:
            client.feed(plain(LARGE_NAR))
            came = b""
            while len(came) < 300_000:
                assert not is_corked(client)
                await turns(1)
                came += client.received()
            gate.open()
            await client.settled()
            assert not is_corked(client)
            (answer,) = answers(came + client.received())
            assert answer.body == FILE
        await server.shutdown(1)


async def test_a_client_that_leaves(proxy: InsideProxy) -> None:
    """A connection that ends while a file is sent takes nothing with it."""
    async with halfway(proxy) as client:
        client.transport.abort()
        await client.settled()
    assert (await proxy.pull(LARGE_NAR)).body == FILE
