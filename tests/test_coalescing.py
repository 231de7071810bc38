"""One fetch, however many ask: they all read it as it arrives, and none disturbs another."""

from __future__ import annotations

import asyncio
import random
import socket
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from types import TracebackType
from typing import Self
from urllib.parse import urlsplit

import pytest

from proxy.events import FetchEnded, Published
from proxy.fetch import HELD_BACK
from tests.closures import SigningKey, StoreEntry
from tests.conftest import StartSimulator
from tests.faults import Chunked, Gate
from tests.inside import InsideProxy
from tests.simulator import BinaryCacheSimulator

pytestmark = pytest.mark.timeout(100)

MIB = 1 << 20

ENTRY = StoreEntry.make("thing-1.0", random.Random(5).randbytes(2 * MIB), compression="none")
FILE = bytes(ENTRY.file)


class Reader:
    """A client that reads as far as it is told to, and compares what comes with the truth.

    A bare socket and a small buffer: two hundred of these pull twenty gigabytes in one thread.

    Args:
        url: The proxy's.
        path: What to ask for.
        truth: What must come.
        receive_buffer: Bytes that the kernel may hold for us; None is its default.
    """

    def __init__(
        self, url: str, path: str, truth: bytes, *, receive_buffer: int | None = None
    ) -> None:
        parts = urlsplit(url)
        self._address = (parts.hostname, parts.port)
        self._request = f"GET {path} HTTP/1.1\r\nHost: {parts.netloc}\r\n\r\n".encode()
        self._truth = truth
        self._buffer = memoryview(bytearray(256 * 1024))
        self._socket = socket.socket()
        self._socket.settimeout(0)
        if receive_buffer is not None:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        self.position = 0
        """Bytes of the body that came, all of them right."""

    async def __aenter__(self) -> Self:
        """Connect and ask."""
        loop = asyncio.get_running_loop()
        await loop.sock_connect(self._socket, self._address)
        await loop.sock_sendall(self._socket, self._request)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Leave."""
        self._socket.close()

    async def begin(self) -> str:
        """Wait for the first byte of the body; return status line and headers."""
        head = b""
        while b"\r\n\r\n" not in head:
            head += await asyncio.get_running_loop().sock_recv(self._socket, 1024)
        head, _, body = head.partition(b"\r\n\r\n")
        self._check(body)
        if not body:
            await self.read_to(1)
        return head.decode("latin-1")

    async def read_to(self, position: int | None = None) -> None:
        """Read until the body is at `position` at least, or all of it is there."""
        loop = asyncio.get_running_loop()
        end = len(self._truth) if position is None else position
        while self.position < end:
            count = await loop.sock_recv_into(self._socket, self._buffer)
            assert count, f"the connection ended after {self.position} bytes"
            self._check(self._buffer[:count])

    def _check(self, data: bytes | memoryview) -> None:
        right = self._truth.startswith(data, self.position)
        assert right, f"other bytes came from {self.position} on"
        self.position += len(data)


@pytest.fixture
async def cache(sim: StartSimulator) -> BinaryCacheSimulator:
    """Return an upstream that has `ENTRY`."""
    return await sim(ENTRY)


@pytest.fixture
async def proxy(
    cache: BinaryCacheSimulator, key: SigningKey, tmp_path: Path
) -> AsyncIterator[InsideProxy]:
    """Return a proxy with an empty store in front of `cache`."""
    async with InsideProxy(tmp_path, cache.url, keys=[key.public]) as running:
        yield running


async def test_two_hundred_clients_of_one_cold_nar(
    tmp_path: Path, sim: StartSimulator, key: SigningKey
) -> None:
    """100 MB that 200 clients want at once are fetched once; all read from the first MiB on.

    One of them stops reading and one leaves half way; the others do not notice, and the one that
    stopped finds everything there when it goes on.
    """
    entry = StoreEntry.huge("popular-1.0", 100 * MIB)
    truth = bytes(entry.file)
    upstream = await sim(entry)
    gate = Gate(after=MIB)
    upstream.fault(entry.nar_path, gate)
    async with InsideProxy(tmp_path, upstream.url, keys=[key.public]) as proxy:
        url = await proxy.nar_url(entry.hash_part)
        async with AsyncExitStack() as stack:
            slow, leaver, *others = [
                await stack.enter_async_context(Reader(proxy.url, url, truth, receive_buffer=size))
                for size in (64 * 1024, *[None] * 199)
            ]
            heads = await asyncio.gather(*(reader.begin() for reader in (slow, leaver, *others)))
            assert not [head for head in heads if not head.startswith("HTTP/1.1 200 ")]
            assert sum("X-Cache: MISS" in head for head in heads) == 1
            assert sum("X-Cache: COALESCED" in head for head in heads) == 199
            assert not proxy.observed(FetchEnded), "the first byte came long before the last"
            gate.open()

            async def leave() -> None:
                async with leaver:
                    await leaver.read_to(len(truth) // 2)

            await asyncio.gather(leave(), *(reader.read_to() for reader in others))
            assert slow.position < MIB
            await slow.read_to()
        assert upstream.count(entry.nar_path) == 1
        await proxy.until(lambda: proxy.observed(Published))
        kept = tmp_path / url.lstrip("/")
        is_right = kept.read_bytes() == truth
        kept.unlink()
        assert is_right


async def test_a_client_that_stops_reading_stops_nobody(
    proxy: InsideProxy, cache: BinaryCacheSimulator
) -> None:
    """The one who began the fetch reads nothing of it, and the next one gets it all at once."""
    url = await proxy.nar_url(ENTRY.hash_part)
    async with Reader(proxy.url, url, FILE, receive_buffer=4096) as slow:
        await slow.begin()
        assert (await proxy.pull(url)).body == FILE
        await proxy.until(lambda: proxy.observed(Published))
        assert slow.position < len(FILE) // 2
        await slow.read_to()
    assert cache.gets(ENTRY.nar_path) == 1


async def test_who_began_a_fetch_may_leave(proxy: InsideProxy, cache: BinaryCacheSimulator) -> None:
    """The first client leaves after 10 %; the file lands in the store, and the next one has it."""
    gate = Gate(after=len(FILE) // 10)
    cache.fault(ENTRY.nar_path, gate)
    url = await proxy.nar_url(ENTRY.hash_part)
    async with Reader(proxy.url, url, FILE) as first:
        await first.begin()
    gate.open()
    await proxy.until(lambda: proxy.observed(Published))
    answer = await proxy.pull(url)
    assert (answer.headers["X-Cache"], answer.body) == ("HIT", FILE)
    assert cache.gets(ENTRY.nar_path) == 1


async def test_all_may_leave_before_anything_came(
    proxy: InsideProxy, cache: BinaryCacheSimulator
) -> None:
    """Clients that give up while the upstream is silent take nothing away from the next one."""
    gate = Gate(after=None)
    cache.fault(ENTRY.nar_path, gate)
    url = await proxy.nar_url(ENTRY.hash_part)
    async with Reader(proxy.url, url, FILE), Reader(proxy.url, url, FILE):
        await gate.reached.wait()
    gate.open()
    assert (await proxy.pull(url)).body == FILE
    assert cache.gets(ENTRY.nar_path) == 1


async def test_cold_narinfos_are_asked_for_once(
    sim: StartSimulator, key: SigningKey, tmp_path: Path
) -> None:
    """Three cold narinfos that thirty clients want at once are three questions to the upstream."""
    entries = [StoreEntry.make(f"cold-{number}", b"cold") for number in range(3)]
    upstream = await sim(*entries)
    gate = Gate(after=None)
    upstream.fault("/*.narinfo", gate)
    async with InsideProxy(tmp_path, upstream.url, keys=[key.public]) as proxy:
        asking = [
            asyncio.create_task(proxy.get(entry.narinfo_path))
            for _ in range(10)
            for entry in entries
        ]
        await upstream.expect("/*.narinfo", 3).wait()
        gate.open()
        answers = await asyncio.gather(*asking)
        for number, entry in enumerate(entries):
            (text,) = {body for _, _, body in answers[number::3]}
            assert f"StorePath: {entry.store_path}\n".encode() in text
            results = [headers["X-Cache"] for _, headers, _ in answers[number::3]]
            assert results.count("MISS") == 1
            assert upstream.count(entry.narinfo_path) == 1


@pytest.mark.parametrize("first", ["narinfo", "NAR"])
async def test_a_narinfo_and_its_nar_at_the_same_moment(
    first: str, proxy: InsideProxy, cache: BinaryCacheSimulator
) -> None:
    """Who wants a NAR needs its narinfo, too: that is asked for once, for both."""
    gate = Gate(None)
    cache.fault(ENTRY.narinfo_path, gate)
    nar = f"/nar/{ENTRY.hash_part}-{ENTRY.nar_hash}.nar"
    order = [ENTRY.narinfo_path, nar] if first == "narinfo" else [nar, ENTRY.narinfo_path]
    asking = [asyncio.create_task(proxy.pull(order[0]))]
    await gate.reached.wait()
    asking += [asyncio.create_task(proxy.pull(path)) for path in (order[1], nar)]
    asking += [asyncio.create_task(proxy.pull(nar, method="HEAD"))]
    await proxy.eventually(lambda: proxy.cache.fetches_in_flight == 1)
    gate.open()
    answers = await asyncio.gather(*asking)
    assert [answer.status for answer in answers] == [200] * 4
    assert FILE in [answer.body for answer in answers]
    assert (cache.count(ENTRY.narinfo_path), cache.gets(ENTRY.nar_path)) == (1, 1)


async def test_narinfo_clients_may_leave(proxy: InsideProxy, cache: BinaryCacheSimulator) -> None:
    """A narinfo's lookup outlives the client that caused it."""
    gate = Gate(after=None)
    cache.fault(ENTRY.narinfo_path, gate)
    async with Reader(proxy.url, ENTRY.narinfo_path, b""):
        await gate.reached.wait()
    gate.open()
    assert (await proxy.get(ENTRY.narinfo_path))[0] == 200
    assert cache.count(ENTRY.narinfo_path) == 1


# --- HEAD and Range ---------------------------------------------------------------------------


async def test_head_joins_an_arriving_nar(proxy: InsideProxy, cache: BinaryCacheSimulator) -> None:
    """HEAD of a NAR that is arriving is answered from what is known of it here."""
    gate = Gate(after=MIB)
    cache.fault(ENTRY.nar_path, gate)
    url = await proxy.nar_url(ENTRY.hash_part)
    async with Reader(proxy.url, url, FILE) as reader:
        head = await reader.begin()
        answer = await proxy.pull(url, method="HEAD")
        assert (answer.status, answer.body) == (200, b"")
        assert answer.headers["Content-Length"] == str(len(FILE))
        assert answer.headers["X-Cache"] == "COALESCED"
        assert f"ETag: {answer.headers['ETag']}" in head
        gate.open()
        await reader.read_to()
    assert cache.count(ENTRY.nar_path) == 1


async def test_a_range_of_what_has_arrived_is_there_at_once(
    proxy: InsideProxy, cache: BinaryCacheSimulator
) -> None:
    """Range of an arriving NAR's beginning waits for its end with the last byte only."""
    gate = Gate(after=MIB)
    cache.fault(ENTRY.nar_path, gate)
    url = await proxy.nar_url(ENTRY.hash_part)
    async with Reader(proxy.url, url, FILE) as reader, AsyncExitStack() as stack:
        head = await reader.begin()
        asked = []
        for start, stop in ((0, 100), (1, 2), (70_000, 70_001), (500_000, 900_000)):
            wanted = {"Range": f"bytes={start}-{stop - 1}"}
            answer = await stack.enter_async_context(
                proxy.session.get(proxy.url + url, headers=wanted)
            )
            early = await answer.content.readexactly(stop - start - 1)
            assert (answer.status, early) == (206, FILE[start : stop - 1])
            assert answer.headers["Content-Range"] == f"bytes {start}-{stop - 1}/{len(FILE)}"
            assert f"ETag: {answer.headers['ETag']}" in head
            asked.append((answer, FILE[stop - 1 : stop]))
        gate.open()
        await reader.read_to()
        for answer, last in asked:
            assert await answer.read() == last
    assert cache.count(ENTRY.nar_path) == 1


async def test_a_range_of_what_is_to_come_waits_for_it(
    proxy: InsideProxy, cache: BinaryCacheSimulator
) -> None:
    """Range behind what has arrived is answered as it arrives, the last bytes once verified."""
    gate = Gate(after=MIB)
    cache.fault(ENTRY.nar_path, gate)
    url = await proxy.nar_url(ENTRY.hash_part)
    size = len(FILE)
    wanted = {
        f"bytes={MIB - 5000}-{MIB + 5000}": FILE[MIB - 5000 : MIB + 5001],
        f"bytes={MIB + MIB // 2}-": FILE[MIB + MIB // 2 :],
        "bytes=-100": FILE[-100:],
        f"bytes={size - HELD_BACK - 1}-{size - HELD_BACK + 1}": FILE[
            size - HELD_BACK - 1 : size - HELD_BACK + 2
        ],
    }
    asking = [asyncio.create_task(proxy.pull(url, {"Range": text})) for text in wanted]
    await gate.reached.wait()
    beyond = await proxy.pull(url, {"Range": f"bytes={size}-"})
    assert (beyond.status, beyond.headers["Content-Range"]) == (416, f"bytes */{size}")
    assert not [task for task in asking if task.done()]
    gate.open()
    answers = await asyncio.gather(*asking)
    assert [answer.status for answer in answers] == [206] * len(wanted)
    assert [answer.body for answer in answers] == list(wanted.values())
    assert cache.count(ENTRY.nar_path) == 1


async def test_clients_of_a_nar_of_unknown_size(
    sim: StartSimulator, key: SigningKey, tmp_path: Path
) -> None:
    """Where nobody says the size, GET reads along in chunks, and Range waits for the end."""
    entry = ENTRY.but(fields={"FileHash": None, "FileSize": None})
    upstream = await sim(entry)
    gate = Gate(after=MIB)
    upstream.fault(entry.nar_path, gate, Chunked())
    async with InsideProxy(tmp_path, upstream.url, keys=[key.public]) as proxy:
        url = await proxy.nar_url(entry.hash_part)
        async with proxy.session.get(proxy.url + url) as answer:
            first = await answer.content.readany()
            assert answer.headers["Transfer-Encoding"] == "chunked"
            asking = asyncio.create_task(proxy.pull(url, {"Range": "bytes=100-199"}))
            head = await proxy.pull(url, method="HEAD")
            assert head.status == 200
            assert "Content-Length" not in head.headers
            assert not asking.done()
            gate.open()
            assert first + await answer.read() == FILE
        part = await asking
        assert (part.status, part.body) == (206, FILE[100:200])
        assert part.headers["Content-Range"] == f"bytes 100-199/{len(FILE)}"
    assert upstream.count(entry.nar_path) == 1
