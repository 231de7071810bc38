"""The pattern of Nix: a closure asked for breadth first over 25 connections, then its NARs."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TypeVar

import aiohttp

from tests.closures import StoreEntry, closure
from tests.conftest import RunDaemon, RunSimulator

T = TypeVar("T")

NARINFO_CONNECTIONS = 25
"""Nix's ``http-connections``."""

NAR_DOWNLOADS = 16
"""Nix's ``max-substitution-jobs``."""

HEADERS = {
    "Accept": "*/*",
    "Accept-Encoding": "zstd, br, gzip, deflate, bzip2, xz",
    "User-Agent": "curl/8.9.1 Nix/2.24.9",
}
"""What Nix 2.14 to 2.33 sends with every request."""


@dataclass(frozen=True)
class Answer:
    """What came: the status, the coding that was announced, where it came from, and the body."""

    status: int
    coding: str | None
    result: str | None
    body: bytes

    @property
    def fields(self) -> Mapping[str, str]:
        """The fields of a narinfo (of ``Sig`` the last)."""
        lines = self.body.decode().removesuffix("\n").split("\n")
        return dict(line.split(": ", 1) for line in lines)


@asynccontextmanager
async def pattern_client(connections: int) -> AsyncIterator[Callable[[str], Awaitable[Answer]]]:
    """Yield a function that gets a URL over one of so many keep-alive connections."""
    connector = aiohttp.TCPConnector(limit=connections)
    async with aiohttp.ClientSession(
        connector=connector, headers=HEADERS, auto_decompress=False
    ) as session:

        async def get(url: str) -> Answer:
            async with session.get(url) as answer:
                headers = answer.headers
                coding, result = headers.get("Content-Encoding"), headers.get("X-Cache")
                return Answer(answer.status, coding, result, await answer.read())

        yield get


async def breadth_first(url: str, root: StoreEntry) -> dict[str, Answer]:
    """Ask for the narinfos of a closure as Nix does; return them by hash part."""
    answers: dict[str, Answer] = {}
    seen = {root.hash_part}
    wanted = [root.hash_part]
    async with pattern_client(NARINFO_CONNECTIONS) as get:

        async def look_up(hash_part: str) -> None:
            answer = answers[hash_part] = await get(f"{url}/{hash_part}.narinfo")
            assert answer.status == 200, (hash_part, answer)
            for reference in answer.fields["References"].split():
                if reference[:32] not in seen:
                    seen.add(reference[:32])
                    wanted.append(reference[:32])

        asked: set[asyncio.Task[None]] = set()
        while wanted or asked:
            asked |= {asyncio.create_task(look_up(hash_part)) for hash_part in wanted}
            wanted.clear()
            done, asked = await asyncio.wait(asked, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
    return answers


async def download(url: str, narinfos: Iterable[Answer]) -> dict[str, Answer]:
    """Get the NARs of these narinfos, as many at a time as Nix does; by base name."""
    async with pattern_client(NAR_DOWNLOADS) as get:
        fields = [narinfo.fields for narinfo in narinfos]
        answers = await asyncio.gather(*(get(f"{url}/{field['URL']}") for field in fields))
    names = (field["StorePath"].removeprefix("/nix/store/") for field in fields)
    return dict(zip(names, answers, strict=True))


def without_url(narinfo: bytes) -> list[bytes]:
    """Return the lines of a narinfo but for the one that a proxy may write."""
    return [line for line in narinfo.split(b"\n") if not line.startswith(b"URL: ")]


async def test_a_closure_of_2000_paths_asked_for_as_nix_does(
    threaded_sim: RunSimulator, daemon: RunDaemon
) -> None:
    """Everything is answered with the upstream's bytes and fetched once; the second time, never."""
    entries = closure(2_000, depth=8, sizes=(50, 300), compressions=("none", "zstd"))
    upstream = threaded_sim(*entries)
    proxy = daemon(upstream.url)

    narinfos = await breadth_first(proxy.url, entries[0])
    nars = await download(proxy.url, narinfos.values())

    assert_identical(entries, narinfos, nars)
    fetched = Counter(request.raw_path for request in tuple(upstream.requests))
    assert fetched == {
        path: 1 for entry in entries for path in (entry.narinfo_path, entry.nar_path)
    }

    upstream.reset_counts()
    again = await breadth_first(proxy.url, entries[0])
    nars_again = await download(proxy.url, again.values())

    assert_identical(entries, again, nars_again)
    assert {answer.result for answer in again.values()} == {"HIT"}
    assert {answer.result for answer in nars_again.values()} <= {"HIT", "COALESCED"}
    assert upstream.requests == []


def assert_identical(
    entries: Iterable[StoreEntry], narinfos: Mapping[str, Answer], nars: Mapping[str, Answer]
) -> None:
    """All is there, with the upstream's own bytes and no coding of ours."""
    for entry in entries:
        narinfo, nar = narinfos[entry.hash_part], nars[entry.base_name]
        assert (narinfo.status, narinfo.coding) == (200, None)
        assert (nar.status, nar.coding) == (200, None)
        assert nar.body == bytes(entry.file)
    assert len(narinfos) == len(nars) == len(list(entries))


async def test_narinfos_are_the_upstreams_but_for_the_url(
    threaded_sim: RunSimulator, daemon: RunDaemon
) -> None:
    """A narinfo is passed on line by line, signatures included; only its URL is ours."""
    entries = closure(40)
    upstream = threaded_sim(*entries)
    proxy = daemon(upstream.url)
    narinfos = await breadth_first(proxy.url, entries[0])
    for entry in entries:
        original, _ = upstream.files[entry.narinfo_path]
        assert isinstance(original, bytes)
        narinfo = narinfos[entry.hash_part]
        assert without_url(narinfo.body) == without_url(original)
        extension = entry.nar_path.partition(".nar")[2]
        url = f"nar/{entry.hash_part}-{entry.nar_hash}.nar{extension}"
        assert narinfo.fields["URL"] == url


async def test_twenty_five_connections_suffice_and_are_kept(
    threaded_sim: RunSimulator, daemon: RunDaemon
) -> None:
    """A thousand requests need no more connections than Nix opens: each is kept alive."""
    entries = closure(200, sizes=(50, 300), compressions=("none",))
    proxy = daemon(threaded_sim(*entries).url)
    opened = 0

    async def count(*_: object) -> None:
        nonlocal opened
        opened += 1

    trace = aiohttp.TraceConfig()
    trace.on_connection_create_end.append(count)
    async with aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=NARINFO_CONNECTIONS), trace_configs=[trace]
    ) as session:

        async def status(path: str) -> int:
            async with session.get(f"{proxy.url}{path}", headers=HEADERS) as answer:
                await answer.read()
                return answer.status

        absent = [f"/{entry.hash_part[::-1]}.narinfo" for entry in entries]
        paths = ["/nix-cache-info", *(entry.narinfo_path for entry in entries), *absent] * 3
        statuses = await asyncio.gather(*map(status, paths))
    assert Counter(statuses) == {200: 3 * 201, 404: 3 * 200}
    assert opened <= NARINFO_CONNECTIONS
