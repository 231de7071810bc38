"""A URL that was handed out once works for ever, wherever the upstream keeps the file."""

from __future__ import annotations

import asyncio
import random
import re
import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from proxy.events import Published, Rejected, UpstreamAnswered
from proxy.nix.store_path import parse_hash_part
from proxy.upstream.credentials import Credentials, basic, bearer
from tests.blobs import EXTENSIONS, Blob
from tests.closures import COMPRESSIONS, SCHEMES, SigningKey, StoreEntry, nar
from tests.conftest import StartSimulator
from tests.faults import Gate, Redirect, Request, Status
from tests.inside import InsideProxy
from tests.simulator import BinaryCacheSimulator

pytestmark = pytest.mark.timeout(60)

KEY = SigningKey("test-cache-1")
"""The key that the fixtures trust."""

ENTRY = StoreEntry.make("thing+plus-1.0", random.Random(6).randbytes(60_000), compression="zstd")
FILE = bytes(ENTRY.file)
ISSUED = f"/nar/{ENTRY.hash_part}-{ENTRY.nar_hash}.nar.zst"
CHANGED = ENTRY.but(nar=Blob.of(nar(b"other contents")))
"""The same path with other contents, as a build that cannot be reproduced gives."""


@pytest.fixture
async def cache(sim: StartSimulator) -> BinaryCacheSimulator:
    """Return an upstream that has `ENTRY`."""
    return await sim(ENTRY)


@pytest.fixture
async def proxy(cache: BinaryCacheSimulator, tmp_path: Path) -> AsyncIterator[InsideProxy]:
    """Return a proxy with an empty store in front of `cache`."""
    async with proxy_of(tmp_path, cache) as running:
        yield running


def proxy_of(folder: Path, *caches: BinaryCacheSimulator) -> InsideProxy:
    """Return a proxy with a store in that folder."""
    return InsideProxy(folder, *(cache.url for cache in caches), keys=[KEY.public])


async def assert_served(proxy: InsideProxy, url: str = ISSUED, file: bytes = FILE) -> None:
    """Pull a NAR, whole."""
    answer = await proxy.pull(url)
    assert (answer.status, answer.complete) == (200, True)
    assert answer.body == file
    assert answer.headers["Content-Length"] == str(len(file))
    assert "Content-Encoding" not in answer.headers


def emptied(folder: Path) -> Path:
    """Remove everything from a folder."""
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
    return folder


# --- where upstreams keep their files ---------------------------------------------------------


@pytest.mark.parametrize("scheme", SCHEMES)
async def test_every_scheme_is_hidden_behind_our_own(
    scheme: str, tmp_path: Path, sim: StartSimulator
) -> None:
    """Whatever the upstream's URL looks like, clients get ours; it works with all state lost."""
    entry = ENTRY.but(scheme=scheme)
    cache = await sim(entry)
    async with proxy_of(tmp_path, cache) as proxy:
        assert await proxy.nar_url(entry.hash_part) == ISSUED
        await assert_served(proxy)
        assert cache.gets(entry.nar_path) == 1
        await proxy.idle()
        assert proxy.kept == {ISSUED[1:], entry.narinfo_path[1:]}
    async with proxy_of(emptied(tmp_path), cache) as proxy:
        await assert_served(proxy)
        assert cache.gets(entry.nar_path) == 2
    assert not [request for request in cache.requests if request.raw_path == ISSUED]


@pytest.mark.parametrize("compression", COMPRESSIONS)
async def test_the_url_names_path_content_and_compression(
    compression: str, tmp_path: Path, sim: StartSimulator
) -> None:
    """The URL is `nar/<hash>-<narhash>.nar[.ext]`, and nothing in it has to be escaped."""
    entry = ENTRY.but(compression=compression)
    cache = await sim(entry)
    async with proxy_of(tmp_path, cache) as proxy:
        url = await proxy.nar_url(entry.hash_part)
        assert url == f"/nar/{entry.hash_part}-{entry.nar_hash}.nar{EXTENSIONS[compression]}"
        assert re.fullmatch(r"[a-z0-9/.-]+", url)
        await assert_served(proxy, url, bytes(entry.file))


@pytest.mark.parametrize("scheme", ["filehash", "harmonia", "absolute", "folder"])
async def test_an_upstream_below_a_path(scheme: str, tmp_path: Path, sim: StartSimulator) -> None:
    """A cache that is not at the root of its host has its NARs below itself."""
    cache = await sim(ENTRY.but(scheme=scheme), prefix="/caches/mine")
    async with proxy_of(tmp_path, cache) as proxy:
        await assert_served(proxy, await proxy.nar_url(ENTRY.hash_part))


# --- redirects --------------------------------------------------------------------------------


class SignedLinks:
    """Redirects to links on another host, each of which works once.

    Attributes:
        issued: How many there were.
    """

    def __init__(self, host: BinaryCacheSimulator) -> None:
        self.issued = 0
        self._host = host

    def __call__(self, _request: Request) -> str:
        """Return the Location of the next link, and forget the last one."""
        self._host.files.pop(self.path, None)
        self.issued += 1
        self._host.files[self.path] = (FILE, {})
        return f"{self._host.url}{self.path}"

    @property
    def path(self) -> str:
        """The link that works."""
        return f"/blobs/a%2Fb?X-Signature=%2B{self.issued}&X-Expires=60"


async def test_a_redirect_to_another_host_is_followed(
    proxy: InsideProxy, cache: BinaryCacheSimulator, sim: StartSimulator
) -> None:
    """The file behind a 302 is served as if it were the upstream's own, byte for byte of its URL."""
    host = await sim()
    cache.fault(ENTRY.nar_path, Redirect(links := SignedLinks(host)))
    await assert_served(proxy, await proxy.nar_url(ENTRY.hash_part))
    assert [request.raw_path for request in host.requests] == [links.path]


async def test_a_location_is_not_remembered(
    proxy: InsideProxy, cache: BinaryCacheSimulator, sim: StartSimulator
) -> None:
    """A Location is good for one download: the next one asks the upstream for a new one."""
    host = await sim()
    cache.fault(ENTRY.nar_path, Redirect(links := SignedLinks(host)))
    await proxy.nar_url(ENTRY.hash_part)
    for count in (1, 2):
        await assert_served(proxy)
        await proxy.idle()
        (proxy.folder / ISSUED[1:]).unlink()
        assert links.issued == host.count() == cache.gets(ENTRY.nar_path) == count
    stored = b"".join(path.read_bytes() for path in proxy.folder.rglob("*") if path.is_file())
    assert b"X-Signature" not in stored


@pytest.mark.parametrize(
    ("header", "credentials"),
    [("Bearer secret", bearer("secret")), ("Basic OnNlY3JldA==", basic("", "secret"))],
)
async def test_credentials_stay_with_their_host(
    header: str, credentials: Credentials, tmp_path: Path, sim: StartSimulator
) -> None:
    """The upstream sees who we are; where it redirects to, nobody does."""
    cache, host = await sim(ENTRY), await sim()
    cache.require_auth = header
    cache.fault(ENTRY.nar_path, Redirect(SignedLinks(host)))
    async with InsideProxy(
        tmp_path, cache.url, keys=[KEY.public], credentials=credentials
    ) as proxy:
        await assert_served(proxy, await proxy.nar_url(ENTRY.hash_part))
    assert [request.headers["Authorization"] for request in cache.requests] == [header] * 2
    assert [request.headers.get("Authorization") for request in host.requests] == [None]


async def test_a_redirected_narinfo_leads_to_the_nar(
    proxy: InsideProxy, cache: BinaryCacheSimulator, sim: StartSimulator
) -> None:
    """A narinfo behind a redirect counts as the upstream's own: its URL is relative to the cache."""
    host = await sim(ENTRY)
    cache.fault(ENTRY.narinfo_path, Redirect(f"{host.url}{ENTRY.narinfo_path}"))
    await assert_served(proxy, await proxy.nar_url(ENTRY.hash_part))
    assert cache.gets(ENTRY.nar_path) == 1


# --- what may be lost -------------------------------------------------------------------------


async def test_a_url_outlives_a_restart(cache: BinaryCacheSimulator, tmp_path: Path) -> None:
    """A URL issued before a restart works after it; the narinfo is not asked for again."""
    async with proxy_of(tmp_path, cache) as proxy:
        await proxy.nar_url(ENTRY.hash_part)
    async with proxy_of(tmp_path, cache) as proxy:
        await assert_served(proxy)
        await proxy.until(lambda: proxy.observed(Published))
        assert proxy.kept == {ISSUED[1:], ENTRY.narinfo_path[1:]}
    assert cache.gets(ENTRY.narinfo_path) == 1
    cache.down()
    async with proxy_of(tmp_path, cache) as proxy:
        await assert_served(proxy)


async def test_a_url_needs_no_narinfo_first(
    proxy: InsideProxy, cache: BinaryCacheSimulator
) -> None:
    """A client that remembers the narinfo of an earlier life asks for the NAR alone."""
    await assert_served(proxy)
    assert (await proxy.pull(ISSUED, method="HEAD")).headers["Content-Length"] == str(len(FILE))
    assert cache.gets(ENTRY.narinfo_path) == 1
    await proxy.until(lambda: proxy.observed(Published))
    status, headers, _ = await proxy.get(ENTRY.narinfo_path)
    assert (status, headers["X-Cache"]) == (200, "HIT")


@pytest.mark.parametrize("restarted", [False, True], ids=["running", "restarted"])
async def test_a_url_outlives_its_file(
    cache: BinaryCacheSimulator, tmp_path: Path, *, restarted: bool
) -> None:
    """A NAR that somebody removed from the store is fetched, and kept, once more."""
    proxy = await proxy_of(tmp_path, cache).start()
    try:
        await assert_served(proxy, await proxy.nar_url(ENTRY.hash_part))
        await proxy.idle()
        (tmp_path / ISSUED[1:]).unlink()
        if restarted:
            await proxy.stop()
            proxy = await proxy_of(tmp_path, cache).start()
        await assert_served(proxy)
        await proxy.idle()
        assert (tmp_path / ISSUED[1:]).read_bytes() == FILE
        assert cache.gets(ENTRY.nar_path) == 2
    finally:
        await proxy.stop()


@pytest.mark.parametrize("state", ["remembered", "restarted", "emptied"])
@pytest.mark.parametrize("old", [404, 410, 403], ids=str)
async def test_a_url_outlives_a_move_at_the_upstream(
    state: str, old: int, cache: BinaryCacheSimulator, tmp_path: Path
) -> None:
    """The upstream has put the file elsewhere: its new narinfo leads there, the old URL is ours."""
    proxy = await proxy_of(tmp_path, cache).start()
    try:
        await proxy.nar_url(ENTRY.hash_part)
        cache.withdraw(ENTRY)
        moved = ENTRY.but(scheme="uuid")
        cache.publish(moved)
        cache.fault(ENTRY.nar_path, Status(old))
        if state != "remembered":
            await proxy.stop()
            folder = emptied(tmp_path) if state == "emptied" else tmp_path
            proxy = await proxy_of(folder, cache).start()
        await assert_served(proxy)
        assert cache.gets(moved.nar_path) == 1
        assert cache.gets(ENTRY.narinfo_path) == 2
    finally:
        await proxy.stop()


async def test_a_url_outlives_its_upstream(
    cache: BinaryCacheSimulator, sim: StartSimulator, tmp_path: Path
) -> None:
    """The upstream of old has lost the path, and another one has the same contents."""
    other = await sim(ENTRY.but(scheme="cachix"))
    async with proxy_of(tmp_path, cache, other) as proxy:
        await proxy.nar_url(ENTRY.hash_part)
        cache.withdraw(ENTRY)
        await assert_served(proxy)
    assert other.gets("/nar/*") == 1


async def test_head_of_a_url_asks_the_upstream_for_head(
    proxy: InsideProxy, cache: BinaryCacheSimulator
) -> None:
    """HEAD of a NAR that is not here fetches nothing."""
    answer = await proxy.pull(ISSUED, method="HEAD")
    assert (answer.status, answer.body) == (200, b"")
    assert answer.headers["Content-Length"] == str(len(FILE))
    assert cache.gets(ENTRY.nar_path) == 0
    assert proxy.kept == set()


# --- what a URL does not stand for ------------------------------------------------------------

INSTEAD = {"contents": CHANGED, "compression": ENTRY.but(compression="xz")}
"""What the upstream has now, under the same path."""


@pytest.mark.parametrize("what", INSTEAD)
@pytest.mark.parametrize("method", ["GET", "HEAD"])
async def test_a_url_never_gives_anything_else(
    what: str, method: str, tmp_path: Path, sim: StartSimulator
) -> None:
    """When the upstream has other contents or another compression now, the old URL is 404."""
    cache = await sim(INSTEAD[what])
    async with proxy_of(tmp_path, cache) as proxy:
        assert (await proxy.pull(ISSUED, method=method)).status == 404
        assert cache.gets("/nar/*") == 0
        assert proxy.kept == set()
        url = await proxy.nar_url(ENTRY.hash_part)
        assert url != ISSUED
        await assert_served(proxy, url, bytes(INSTEAD[what].file))
        assert (await proxy.pull(ISSUED, method=method)).status == 404
        assert not proxy.observed(Rejected)


@pytest.mark.parametrize("what", INSTEAD)
async def test_a_url_of_replaced_contents_is_gone(
    what: str, proxy: InsideProxy, cache: BinaryCacheSimulator
) -> None:
    """Issued, and replaced at the upstream before it was asked for: 404, and what is new is served."""
    await proxy.nar_url(ENTRY.hash_part)
    cache.withdraw(ENTRY)
    cache.publish(INSTEAD[what])
    assert (await proxy.pull(ISSUED)).status == 404
    url = await proxy.nar_url(ENTRY.hash_part)
    await assert_served(proxy, url, bytes(INSTEAD[what].file))


async def test_contents_that_are_here_stay_here(
    proxy: InsideProxy, cache: BinaryCacheSimulator
) -> None:
    """What the upstream replaces after we have it does not change what our URL gives."""
    await assert_served(proxy, await proxy.nar_url(ENTRY.hash_part))
    await proxy.until(lambda: proxy.observed(Published))
    cache.withdraw(ENTRY)
    cache.publish(CHANGED)
    await assert_served(proxy)
    assert await proxy.nar_url(ENTRY.hash_part) == ISSUED


@pytest.mark.parametrize("methods", [("GET", "HEAD", "GET"), ("HEAD", "HEAD")], ids="-".join)
async def test_a_path_that_nobody_has(
    methods: tuple[str, ...], proxy: InsideProxy, cache: BinaryCacheSimulator
) -> None:
    """An issued URL whose path is gone from all upstreams is 404, and asked for once in a while."""
    cache.withdraw(ENTRY)
    for method in methods:
        assert (await proxy.pull(ISSUED, method=method)).status == 404
    assert cache.count() == cache.count(ENTRY.narinfo_path) == 1
    cache.publish(ENTRY)
    proxy.clock.now += 61
    await assert_served(proxy)


async def test_a_new_narinfo_ends_the_absence_of_its_nar(
    proxy: InsideProxy, cache: BinaryCacheSimulator
) -> None:
    """Once an upstream has the path, its NAR is served, however recently it was absent."""
    cache.withdraw(ENTRY)
    assert (await proxy.pull(ISSUED)).status == 404
    cache.publish(ENTRY)
    await assert_served(proxy, await proxy.nar_url(ENTRY.hash_part))


# --- names that somebody else gave ------------------------------------------------------------

FOREIGN = [name for name in SCHEMES if ENTRY.but(scheme=name).nar_path.startswith("/nar/")]
"""Schemes whose URLs a client can send here that remembers the upstream's own narinfo."""


@pytest.mark.parametrize("scheme", FOREIGN)
async def test_a_foreign_url_is_passed_on(scheme: str, tmp_path: Path, sim: StartSimulator) -> None:
    """A NAR by the upstream's own name is passed on as it comes, by GET and HEAD, and not kept."""
    entry = ENTRY.but(scheme=scheme, compression="none" if scheme == "nix-serve" else "zstd")
    file = bytes(entry.file)
    cache = await sim(entry)
    async with proxy_of(tmp_path, cache) as proxy:
        head = await proxy.pull(entry.nar_path, method="HEAD")
        assert (head.status, head.body) == (200, b"")
        assert head.headers["Content-Length"] == str(len(file))
        assert cache.count(entry.nar_path, "HEAD") == 1
        for _ in range(2):
            await assert_served(proxy, entry.nar_path, file)
            await proxy.idle()
        assert proxy.partials == []
        if scheme == "nix-serve":  # whose URLs are like ours, so it is kept like ours
            assert proxy.kept
        else:
            assert cache.gets(entry.nar_path) == 2
            assert cache.gets("/*.narinfo") == 0
            assert proxy.kept == set()


async def test_a_foreign_url_is_fetched_once_for_all_who_wait(
    proxy: InsideProxy, cache: BinaryCacheSimulator
) -> None:
    """Clients that want the same foreign NAR at the same time share one fetch, queries and all."""
    entry = ENTRY.but(scheme="harmonia")
    cache.publish(entry)
    gate = Gate(after=30_000)
    cache.fault(entry.nar_path, gate)
    asking = [asyncio.create_task(proxy.pull(entry.nar_path))]
    await gate.reached.wait()
    asking += [asyncio.create_task(proxy.pull(entry.nar_path)) for _ in range(9)]
    part = asyncio.create_task(proxy.pull(entry.nar_path, {"Range": "bytes=10-19"}))
    head = await proxy.pull(entry.nar_path, method="HEAD")
    assert head.headers["Content-Length"] == str(len(FILE))
    gate.open()
    assert {answer.body for answer in await asyncio.gather(*asking)} == {FILE}
    assert ((await part).status, (await part).body) == (206, FILE[10:20])
    assert cache.gets(entry.nar_path) == 1


async def test_an_absent_foreign_url(proxy: InsideProxy, cache: BinaryCacheSimulator) -> None:
    """A foreign NAR that no upstream has is 404, and remembered as absent for a while."""
    path = "/nar/0000.nar.xz?hash=1"
    for method in ("GET", "HEAD", "GET"):
        assert (await proxy.pull(path, method=method)).status == 404
    assert cache.count(path) == 1


async def test_a_foreign_url_is_looked_for_everywhere(
    cache: BinaryCacheSimulator, sim: StartSimulator, tmp_path: Path
) -> None:
    """A foreign URL does not say whose it is: the upstream that has it serves it."""
    first = await sim()
    async with proxy_of(tmp_path, first, cache) as proxy:
        answer = await proxy.pull(ENTRY.nar_path)
        assert (answer.body, answer.headers["X-Upstream"]) == (FILE, "up1")


async def test_the_preferred_upstream_serves_a_foreign_url(
    cache: BinaryCacheSimulator, sim: StartSimulator, tmp_path: Path
) -> None:
    """What a less preferred upstream began to send is let go, and its connections stay usable."""
    other = await sim(ENTRY)
    async with proxy_of(tmp_path, cache, other) as proxy:

        def has_other_answered() -> bool:
            return any(event.upstream == "up1" for event in proxy.observed(UpstreamAnswered))

        for _ in range(40):  # more than an upstream's connections
            gate = Gate(after=None)
            cache.heal()
            cache.fault(ENTRY.nar_path, gate)
            proxy.events.clear()
            asking = asyncio.create_task(proxy.pull(ENTRY.nar_path))
            await proxy.until(has_other_answered)
            gate.open()
            answer = await asking
            assert (answer.body, answer.headers["X-Upstream"]) == (FILE, "up0")
            await proxy.idle()


async def test_a_foreign_url_leaves_what_is_known_alone(
    proxy: InsideProxy, cache: BinaryCacheSimulator
) -> None:
    """Passing on a NAR under the upstream's name tells us nothing about the path."""
    cache.files[ENTRY.nar_path] = (b"not a NAR at all", {})
    await assert_served(proxy, ENTRY.nar_path, b"not a NAR at all")
    assert proxy.store.narinfo(parse_hash_part(ENTRY.hash_part)) is None
    assert (await proxy.pull(ISSUED)).status == 404
    cache.publish(ENTRY)
    await assert_served(proxy)
