"""Listings, logs, realisations and debug info: passed through decoded, and kept."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncIterator
from pathlib import Path
from urllib.parse import urljoin, urlsplit

import pytest

from proxy.events import Published, StoreChanged, StoreFailed
from tests.blobs import Blob, compress
from tests.closures import SigningKey, StoreEntry, random_hash_part
from tests.conftest import StartSimulator
from tests.faults import Body, Corrupt, Encoded, Gate, Headers, Html, ShortBody, Status
from tests.inside import InsideProxy
from tests.simulator import BinaryCacheSimulator

pytestmark = pytest.mark.timeout(60)

ENTRY = StoreEntry.make("thing-1.0", random.Random(3).randbytes(5_000), scheme="filehash")
DRV = f"{random_hash_part(random.Random(4))}-thing-1.0.drv"
BUILD_ID = "0123456789abcdef" * 2 + "01234567"
LISTING = json.dumps({"version": 1, "root": {"type": "regular", "size": 5_000}}).encode()
LOG = b"building\n" * 5_000 + "done: ✓\n".encode()
REALISATION = json.dumps({"outPath": ENTRY.base_name, "signatures": []}).encode()
DEBUG_INFO = json.dumps(
    {"archive": f"..{ENTRY.nar_path}", "member": f"lib/debug/.build-id/01/{BUILD_ID[2:]}.debug"}
).encode()

FILES: dict[str, tuple[bytes, str]] = {
    f"/{ENTRY.hash_part}.ls": (LISTING, "application/json"),
    f"/log/{DRV}": (LOG, "text/plain; charset=utf-8"),
    f"/realisations/sha256:{'ab' * 32}!out.doi": (REALISATION, "application/json"),
    f"/build-trace-v2/{DRV}/out.doi": (REALISATION, "application/json"),
    f"/debuginfo/{BUILD_ID}": (DEBUG_INFO, "application/json"),
    f"/debuginfo/{BUILD_ID}.debug": (DEBUG_INFO, "application/json"),
}
"""Path → contents, and what the proxy calls them."""

LOG_PATH = f"/log/{DRV}"


@pytest.fixture
async def cache(sim: StartSimulator) -> BinaryCacheSimulator:
    """Return an upstream that has all `FILES`."""
    cache = await sim(ENTRY)
    for path, (contents, _) in FILES.items():
        cache.files[path] = (contents, {"Content-Type": "application/octet-stream"})
    return cache


@pytest.fixture
async def proxy(
    cache: BinaryCacheSimulator, key: SigningKey, tmp_path: Path
) -> AsyncIterator[InsideProxy]:
    """Return a proxy with an empty store in front of `cache`."""
    async with InsideProxy(tmp_path, cache.url, keys=[key.public]) as running:
        yield running


@pytest.mark.parametrize("coding", [None, "identity", "gzip", "br", "zstd"])
@pytest.mark.parametrize("path", FILES)
async def test_a_file_is_passed_through_decoded_and_kept(
    path: str, coding: str | None, proxy: InsideProxy, cache: BinaryCacheSimulator
) -> None:
    """However the upstream encodes it, clients get it plain, and the second one from the disk."""
    contents, content_type = FILES[path]
    if coding:
        cache.fault(path, Encoded(coding))
    for result in ("MISS", "HIT"):
        answer = await proxy.pull(path, {"Accept-Encoding": "zstd, br, gzip, deflate, bzip2, xz"})
        assert (answer.status, answer.complete) == (200, True)
        assert answer.body == contents
        assert "Content-Encoding" not in answer.headers
        assert answer.headers["Content-Length"] == str(len(contents))
        assert answer.headers["Content-Type"] == content_type
        assert answer.headers["X-Cache"] == result
        assert cache.count(path) == 1
    assert proxy.kept == {path.lstrip("/")}
    assert (proxy.folder / path.lstrip("/")).read_bytes() == contents


@pytest.mark.parametrize("path", FILES)
async def test_a_kept_file_needs_no_upstream(
    path: str, cache: BinaryCacheSimulator, tmp_path: Path
) -> None:
    """What was fetched once is there with the upstream down, also after a restart."""
    async with InsideProxy(tmp_path, cache.url) as proxy:
        assert (await proxy.pull(path)).status == 200
        cache.down()
        assert (await proxy.pull(path)).body == FILES[path][0]
    async with InsideProxy(tmp_path, cache.url) as proxy:
        answer = await proxy.pull(path)
        assert (answer.body, answer.headers["X-Cache"]) == (FILES[path][0], "HIT")


@pytest.mark.parametrize("path", FILES)
async def test_head_says_what_get_would(
    path: str, proxy: InsideProxy, cache: BinaryCacheSimulator
) -> None:
    """HEAD has the headers of GET and no body, cold and kept."""
    cache.fault(path, Encoded("gzip"))
    cold = await proxy.pull(path, method="HEAD")
    get = await proxy.pull(path)
    kept = await proxy.pull(path, method="HEAD")
    for answer in (cold, kept):
        assert (answer.status, answer.body) == (200, b"")
        for name in ("Content-Length", "Content-Type", "Accept-Ranges"):
            assert answer.headers[name] == get.headers[name]


async def test_a_range_of_a_file(proxy: InsideProxy) -> None:
    """Range works on what is decoded and kept."""
    answer = await proxy.pull(LOG_PATH, {"Range": "bytes=9-16"})
    assert (answer.status, answer.body) == (206, b"building")
    assert answer.headers["Content-Range"] == f"bytes 9-16/{len(LOG)}"


@pytest.mark.parametrize("path", FILES)
@pytest.mark.parametrize("method", ["GET", "HEAD"])
async def test_an_absence_is_remembered_for_a_while(
    path: str, method: str, proxy: InsideProxy, cache: BinaryCacheSimulator
) -> None:
    """404 is remembered for `negative_ttl`, and then asked for again."""
    saved = cache.files.pop(path)
    for _ in range(3):
        assert (await proxy.pull(path, method=method)).status == 404
    assert cache.count(path) == 1
    cache.files[path] = saved
    proxy.clock.now += 61
    assert (await proxy.pull(path)).body == FILES[path][0]
    assert cache.count(path) == 2


@pytest.mark.parametrize(
    "fault",
    [
        Status(500),
        Status(403),
        Status(429),
        Status(200, b"", {"Content-Encoding": "gzip"}),
        Headers({"Content-Encoding": "compress"}),
        Headers({"Content-Encoding": "gzip"}),
        ShortBody(5),
    ],
    ids=["500", "403", "429", "empty gzip", "unknown coding", "mislabelled", "cut"],
)
async def test_what_is_not_the_file_is_not_kept(
    fault: Status | Headers | ShortBody, proxy: InsideProxy, cache: BinaryCacheSimulator
) -> None:
    """An error, a damaged or a truncated answer is 404 here, kept nowhere, and asked for again."""
    cache.fault(LOG_PATH, fault)
    for attempt in (1, 2):
        assert (await proxy.pull(LOG_PATH)).status == 404
        assert cache.count(LOG_PATH) == attempt
    assert proxy.kept == set()
    assert proxy.partials == []
    cache.heal()
    assert (await proxy.pull(LOG_PATH)).body == LOG


@pytest.mark.parametrize("coding", ["gzip", "br", "zstd"])
@pytest.mark.parametrize("damage", [Corrupt(0), ShortBody(3)], ids=["damaged", "cut"])
async def test_a_broken_encoding_is_not_kept(
    coding: str,
    damage: Corrupt | ShortBody,
    proxy: InsideProxy,
    cache: BinaryCacheSimulator,
) -> None:
    """Of an encoded file that is damaged or cut, no client gets the part that can be read."""
    cache.fault(LOG_PATH, Encoded(coding), damage)
    assert (await proxy.pull(LOG_PATH)).status == 404
    assert proxy.kept == set()
    assert proxy.partials == []


async def test_a_file_that_unpacks_to_anything_is_refused(
    proxy: InsideProxy, cache: BinaryCacheSimulator
) -> None:
    """A small body that unpacks to gigabytes ends at a limit, and leaves nothing on the disk."""
    bomb = compress(Blob(((bytes(1 << 20), 4096),)), "zstd")
    cache.fault(LOG_PATH, Body(bomb), Headers({"Content-Encoding": "zstd"}))
    assert (await proxy.pull(LOG_PATH)).status == 404
    assert proxy.kept == set()
    assert proxy.partials == []


async def test_many_who_want_a_file_are_one_request(
    proxy: InsideProxy, cache: BinaryCacheSimulator
) -> None:
    """A cold file is fetched once, however many ask for it at the same time."""
    gate = Gate(after=100)
    cache.fault(LOG_PATH, gate)
    asking = [asyncio.create_task(proxy.pull(LOG_PATH)) for _ in range(20)]
    await gate.reached.wait()
    gate.open()
    answers = await asyncio.gather(*asking)
    assert {answer.body for answer in answers} == {LOG}
    assert cache.count(LOG_PATH) == 1
    assert len(proxy.observed(Published)) == 1


async def test_a_disk_that_keeps_nothing(proxy: InsideProxy) -> None:
    """A file that cannot be kept is passed on, and kept once it can be."""
    (proxy.folder / "log").rmdir()
    (proxy.folder / "log").write_bytes(b"in the way")
    assert (await proxy.pull(LOG_PATH)).body == LOG
    await proxy.until(lambda: proxy.observed(StoreChanged))
    assert (await proxy.pull(LOG_PATH)).body == LOG
    assert proxy.partials == []
    assert not proxy.observed(Published)
    (proxy.folder / "log").unlink()
    assert await proxy.store.check() == ""
    assert (await proxy.pull(LOG_PATH)).body == LOG
    assert proxy.observed(Published)


async def test_the_next_upstream_has_it(
    cache: BinaryCacheSimulator, sim: StartSimulator, tmp_path: Path
) -> None:
    """What the preferred upstream does not have, or garbles, is taken from another one."""
    first = await sim()
    async with InsideProxy(tmp_path, first.url, cache.url) as proxy:
        assert (await proxy.pull(LOG_PATH)).body == LOG
        listing = f"/{ENTRY.hash_part}.ls"
        first.fault(listing, Html(), Headers({"Content-Encoding": "gzip"}))
        assert (await proxy.pull(listing)).body == LISTING
        assert proxy.partials == []


# --- debug info -------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["filehash", "cachix", "uuid", "harmonia", "wrong_extension"])
async def test_the_archive_of_debug_info_resolves(
    scheme: str, proxy: InsideProxy, cache: BinaryCacheSimulator
) -> None:
    """`archive` is relative and names the upstream's own file: behind our URL it is the same one."""
    entry = ENTRY.but(scheme=scheme)
    cache.publish(entry)
    path = f"/debuginfo/{BUILD_ID}"
    cache.files[path] = (json.dumps({"archive": f"..{entry.nar_path}"}).encode(), {})
    archive = json.loads((await proxy.pull(path)).body)["archive"]
    url = urlsplit(urljoin(proxy.url + path, archive))
    target = f"{url.path}?{url.query}" if url.query else url.path
    for method, body in (("HEAD", b""), ("GET", bytes(entry.file))):
        answer = await proxy.pull(target, method=method)
        assert (answer.status, answer.body) == (200, body)
        assert answer.headers["Content-Length"] == str(len(entry.file))
    assert not proxy.observed(StoreFailed)
