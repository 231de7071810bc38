"""The pull-through: the store first, then the upstreams, and each thing asked for once."""

from __future__ import annotations

import asyncio
import random
import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest

from proxy.errors import NotFoundError, UpstreamUnavailableError
from proxy.events import (
    FetchEnded,
    FetchStarted,
    Published,
    RequestServed,
    StoreChanged,
    StoreFailed,
    UpstreamAnswered,
)
from proxy.nix.nar_name import NarName
from proxy.nix.store_path import HashPart, parse_hash_part
from tests.closures import SigningKey, StoreEntry, closure
from tests.conftest import RunDaemon, RunSimulator, StartSimulator
from tests.faults import Chunked, Gate, Headers, Html, Status
from tests.inside import InsideProxy
from tests.simulator import BinaryCacheSimulator

pytestmark = pytest.mark.timeout(60)

KEY = SigningKey("test-cache-1")
"""The key that the fixtures trust."""

ENTRY = StoreEntry.make("thing-1.0", random.Random(10).randbytes(100_000))
FILE = bytes(ENTRY.file)
HASH_PART: HashPart = parse_hash_part(ENTRY.hash_part)
NAME = NarName.parse(f"{ENTRY.hash_part}-{ENTRY.nar_hash}.nar.xz")
URL = f"/nar/{NAME}"
ABSENT = f"/{'0' * 32}.narinfo"


@pytest.fixture
async def cache(sim: StartSimulator) -> BinaryCacheSimulator:
    """Return an upstream that has `ENTRY`."""
    return await sim(ENTRY)


@pytest.fixture
async def proxy(cache: BinaryCacheSimulator, tmp_path: Path) -> AsyncIterator[InsideProxy]:
    """Return a proxy with an empty store in front of `cache`."""
    async with InsideProxy(tmp_path / "store", cache.url, keys=[KEY.public]) as running:
        yield running


async def result_of(proxy: InsideProxy, path: str, method: str = "GET") -> tuple[int, str]:
    """Return the status, and where the answer came from."""
    answer = await proxy.pull(path, method=method)
    return answer.status, answer.headers.get("X-Cache", "")


async def pulled(proxy: InsideProxy) -> None:
    """Pull `ENTRY` and wait until it is in the store for good."""
    await proxy.nar_url(ENTRY.hash_part)
    assert (await proxy.pull(URL)).body == FILE
    await proxy.until(lambda: proxy.observed(Published))
    await proxy.idle()


# --- where answers come from ------------------------------------------------------------------


async def test_the_second_time_touches_no_upstream(
    proxy: InsideProxy, cache: BinaryCacheSimulator
) -> None:
    """A narinfo and a NAR are fetched once and then come from here, with the same headers."""
    for path in (ENTRY.narinfo_path, URL):
        first = await proxy.pull(path)
        await proxy.idle()
        second = await proxy.pull(path)
        head = await proxy.pull(path, method="HEAD")
        assert (first.status, first.headers["X-Cache"]) == (200, "MISS")
        assert (second.status, second.headers["X-Cache"]) == (200, "HIT")
        assert first.body == second.body
        assert head.body == b""
        for name in ("Content-Length", "Content-Type", "X-Upstream", "ETag"):
            assert first.headers.get(name) == second.headers.get(name) == head.headers.get(name)
        assert first.headers["X-Upstream"] == "up0"
    assert cache.count() == 2


async def test_a_closure_is_pulled_once(sim: StartSimulator, tmp_path: Path) -> None:
    """The second pull of a closure touches no upstream, and gives the same bytes."""
    entries = closure(40, seed=7)
    cache = await sim(*entries)
    async with InsideProxy(tmp_path, cache.url, keys=[KEY.public]) as proxy:

        async def pull(entry: StoreEntry) -> None:
            answer = await proxy.pull(await proxy.nar_url(entry.hash_part))
            assert answer.body == bytes(entry.file)

        for _ in range(2):
            await asyncio.gather(*map(pull, entries))
            await proxy.idle()
        assert [cache.count(entry.narinfo_path) for entry in entries] == [1] * 40
        assert [cache.count(entry.nar_path) for entry in entries] == [1] * 40
        assert len(proxy.kept) == 80


async def test_with_the_upstream_gone_what_is_here_is_served(
    cache: BinaryCacheSimulator, tmp_path: Path
) -> None:
    """What was pulled once is served with the upstream down, also after a restart."""
    async with InsideProxy(tmp_path, cache.url, keys=[KEY.public]) as proxy:
        await pulled(proxy)
        cache.down()
        assert await result_of(proxy, URL) == (200, "HIT")
    async with InsideProxy(tmp_path, cache.url, keys=[KEY.public]) as proxy:
        assert await result_of(proxy, ENTRY.narinfo_path) == (200, "HIT")
        assert (await proxy.pull(URL)).body == FILE


async def test_who_asks_at_the_same_time_shares_the_answer(
    proxy: InsideProxy, cache: BinaryCacheSimulator
) -> None:
    """Of those who ask for the same narinfo together one is the cause, and the others join."""
    texts = await asyncio.gather(*(proxy.cache.narinfo(HASH_PART) for _ in range(5)))
    assert sorted(text.result for text in texts) == ["COALESCED"] * 4 + ["MISS"]
    assert len({text.body for text in texts}) == 1
    assert cache.count() == 1


async def test_who_asked_first_may_give_up(proxy: InsideProxy, cache: BinaryCacheSimulator) -> None:
    """The one who caused a lookup gives up, and those who joined get the answer all the same."""
    gate = Gate(after=None)
    cache.fault(ENTRY.narinfo_path, gate)
    first = asyncio.create_task(proxy.cache.narinfo(HASH_PART))
    await gate.reached.wait()
    others = [asyncio.create_task(proxy.cache.narinfo(HASH_PART)) for _ in range(3)]
    first.cancel()
    await asyncio.wait([first])
    gate.open()
    assert [text.result for text in await asyncio.gather(*others)] == ["COALESCED"] * 3
    assert cache.count() == 1


async def test_fetches_are_counted_until_they_are_stored(
    proxy: InsideProxy, cache: BinaryCacheSimulator
) -> None:
    """A download is in flight from its first byte until its file is in the store."""
    gate = Gate(after=50_000)
    cache.fault(ENTRY.nar_path, gate)
    asking = asyncio.create_task(proxy.pull(URL))
    await gate.reached.wait()
    assert proxy.cache.fetches_in_flight == 1
    gate.open()
    await asking
    await proxy.idle()
    assert proxy.cache.fetches_in_flight == 0
    assert not proxy.cache.tasks


async def test_what_happens_is_observed(proxy: InsideProxy) -> None:
    """A pull tells, in order, whom it asked, what was fetched, served and stored."""
    await pulled(proxy)
    told = [event for event in proxy.events if not isinstance(event, RequestServed)]
    assert [type(event) for event in told] == [
        UpstreamAnswered,
        UpstreamAnswered,
        FetchStarted,
        FetchEnded,
        Published,
    ]
    assert told[0] == UpstreamAnswered("up0", "narinfo", f"{HASH_PART}.narinfo", "hit")
    assert told[1] == UpstreamAnswered("up0", "nar", str(NAME), "hit")
    (ended,) = proxy.observed(FetchEnded)
    assert (ended.what, ended.upstream, ended.size, ended.error) == (
        str(NAME),
        "up0",
        len(FILE),
        None,
    )
    assert proxy.observed(Published) == [Published(str(NAME), "up0")]
    served = [(e.route, e.code, e.result, e.body_bytes) for e in proxy.observed(RequestServed)]
    assert served[1] == ("nar", 200, "MISS", len(FILE))


# --- absence ----------------------------------------------------------------------------------


async def test_an_absence_is_remembered_for_a_while(
    proxy: InsideProxy, cache: BinaryCacheSimulator
) -> None:
    """A 404 that all upstreams said is remembered for `negative_ttl`, and not a second longer."""
    for _ in range(3):
        assert (await proxy.get(ABSENT))[0] == 404
    proxy.clock.now += 59
    assert (await proxy.get(ABSENT))[0] == 404
    assert cache.count(ABSENT) == 1
    proxy.clock.now += 1
    assert (await proxy.get(ABSENT))[0] == 404
    assert cache.count(ABSENT) == 2


@pytest.mark.parametrize("status", [401, 403, 429, 500, 503])
async def test_a_failure_is_not_remembered(
    status: int, proxy: InsideProxy, cache: BinaryCacheSimulator
) -> None:
    """Not to know is not to know that there is none: the next one asks again."""
    cache.fault(ENTRY.narinfo_path, Status(status), times=1)
    assert (await proxy.get(ENTRY.narinfo_path))[0] == 404
    assert (await proxy.get(ENTRY.narinfo_path))[0] == 200


async def test_an_absence_ends_when_the_configuration_changes(
    proxy: InsideProxy, sim: StartSimulator, cache: BinaryCacheSimulator
) -> None:
    """What the old upstreams did not have is asked of the new ones at once."""
    cache.withdraw(ENTRY)
    assert (await proxy.get(ENTRY.narinfo_path))[0] == 404
    other = await sim(ENTRY)
    old, new = proxy.failover, proxy.make_failover(other.url)
    proxy.cache.use(new, negative_ttl=1)
    try:
        assert await result_of(proxy, ENTRY.narinfo_path) == (200, "MISS")
        assert (await proxy.pull(URL)).body == FILE
        assert (await proxy.get(ABSENT))[0] == 404
        proxy.clock.now += 1
        assert (await proxy.get(ABSENT))[0] == 404
        assert other.count(ABSENT) == 2
    finally:
        await old.close()
        proxy.failover = new


async def test_what_is_under_way_outlives_a_change_of_configuration(
    proxy: InsideProxy, cache: BinaryCacheSimulator
) -> None:
    """A download goes on with the upstream that it began with."""
    gate = Gate(after=50_000)
    cache.fault(ENTRY.nar_path, gate)
    asking = asyncio.create_task(proxy.pull(URL))
    await gate.reached.wait()
    proxy.cache.use(proxy.make_failover(), negative_ttl=60)
    gate.open()
    assert (await asking).body == FILE
    await proxy.idle()
    assert URL[1:] in proxy.kept


def test_without_upstreams_the_store_is_served(
    daemon: RunDaemon, threaded_sim: RunSimulator
) -> None:
    """`upstream = []` asks nobody, and serves what is in the store."""
    cache = threaded_sim(ENTRY)
    proxy = daemon(cache.url)
    narinfo = proxy.get(ENTRY.narinfo_path)
    assert proxy.get(URL) == FILE
    proxy.wait_for_log("stored")
    proxy.stop()
    proxy.configure(upstreams=[], keys=[KEY.public])
    proxy.config_file.write_text(f"upstream = []\n{proxy.config_file.read_text()}")
    proxy.start()
    assert proxy.get(URL) == FILE
    assert proxy.get(ENTRY.narinfo_path) == narinfo


# --- HEAD of a NAR that is not here -----------------------------------------------------------


@pytest.mark.parametrize("status", [403, 405])
async def test_head_where_the_upstream_allows_only_get(
    status: int, proxy: InsideProxy, cache: BinaryCacheSimulator
) -> None:
    """An upstream whose signed URLs are for GET alone: the narinfo says the size."""
    cache.fault(lambda request: request.method == "HEAD", Status(status))
    answer = await proxy.pull(URL, method="HEAD")
    assert (answer.status, answer.headers["Content-Length"]) == (200, str(len(FILE)))


async def test_head_where_the_upstream_says_no_size(
    proxy: InsideProxy, cache: BinaryCacheSimulator
) -> None:
    """An upstream that answers in chunks: the narinfo says the size."""
    cache.fault(ENTRY.nar_path, Chunked())
    answer = await proxy.pull(URL, method="HEAD")
    assert (answer.status, answer.headers["Content-Length"]) == (200, str(len(FILE)))
    assert cache.gets(ENTRY.nar_path) == 0


async def test_head_of_a_page(sim: StartSimulator, tmp_path: Path) -> None:
    """A page of HTML is no NAR, to HEAD neither, and another upstream may have it."""
    cache, other = await sim(ENTRY), await sim(ENTRY)
    cache.fault(ENTRY.nar_path, Html())
    rule = other.fault(ENTRY.nar_path, Html())
    async with InsideProxy(tmp_path, cache.url, other.url, keys=[KEY.public]) as proxy:
        assert (await proxy.pull(URL, method="HEAD")).status == 404
        rule.lift()
        answer = await proxy.pull(URL, method="HEAD")
        assert (answer.status, answer.headers["Content-Length"]) == (200, str(len(FILE)))
        assert answer.headers["X-Upstream"] == "up1"


async def test_head_where_nobody_says_the_size(sim: StartSimulator, tmp_path: Path) -> None:
    """Without FileSize, and with an upstream that refuses HEAD, there is nothing to say but 404."""
    cache = await sim(ENTRY.but(fields={"FileSize": None}))
    cache.fault(lambda request: request.method == "HEAD", Status(403))
    async with InsideProxy(tmp_path, cache.url, keys=[KEY.public]) as proxy:
        assert (await proxy.pull(URL, method="HEAD")).status == 404
        assert (await proxy.pull(URL)).body == FILE


@pytest.mark.parametrize("status", [404, 500])
async def test_head_of_what_the_upstream_cannot_give(
    status: int, proxy: InsideProxy, cache: BinaryCacheSimulator
) -> None:
    """HEAD does not promise what GET would not give, although the narinfo is known."""
    await proxy.nar_url(ENTRY.hash_part)
    cache.fault(ENTRY.nar_path, Status(status))
    for method in ("HEAD", "GET"):
        assert (await proxy.pull(URL, method=method)).status == 404


async def test_head_follows_a_file_that_was_moved(
    proxy: InsideProxy, cache: BinaryCacheSimulator
) -> None:
    """HEAD of an issued URL finds the file where the upstream keeps it now, as GET does."""
    await proxy.nar_url(ENTRY.hash_part)
    cache.withdraw(ENTRY)
    cache.publish(ENTRY.but(scheme="uuid"))
    answer = await proxy.pull(URL, method="HEAD")
    assert (answer.status, answer.headers["Content-Length"]) == (200, str(len(FILE)))


# --- conditions -------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize("here", [True, False], ids=["here", "elsewhere"])
async def test_what_a_client_has_already_is_not_sent(
    method: str, proxy: InsideProxy, cache: BinaryCacheSimulator, *, here: bool
) -> None:
    """If-None-Match with the ETag of a NAR is answered 304, and fetches nothing."""
    tag = (await proxy.pull(URL, method="GET" if here else "HEAD")).headers["ETag"]
    await proxy.idle()
    fetched = cache.gets(ENTRY.nar_path)
    for condition in (tag, f"W/{tag}", f'"other", {tag}', "*"):
        answer = await proxy.pull(URL, {"If-None-Match": condition}, method)
        assert (answer.status, answer.body, answer.complete) == (304, b"", True)
        assert answer.headers["ETag"] == tag
        assert "Content-Length" not in answer.headers
    assert cache.gets(ENTRY.nar_path) == fetched == here
    for condition in ('"other"', tag.strip('"'), ""):
        answer = await proxy.pull(URL, {"If-None-Match": condition}, method)
        assert (answer.status, answer.body) == (200, FILE if method == "GET" else b"")


async def test_a_condition_comes_before_a_range(proxy: InsideProxy) -> None:
    """A client that has the NAR gets no part of it either (RFC 9110 §13.2.2)."""
    tag = (await proxy.pull(URL)).headers["ETag"]
    wanted = {"Range": "bytes=0-9", "If-None-Match": tag}
    assert (await proxy.pull(URL, wanted)).status == 304
    wanted["If-None-Match"] = '"other"'
    assert (await proxy.pull(URL, wanted)).body == FILE[:10]


async def test_a_condition_where_the_upstream_allows_only_get(
    proxy: InsideProxy, cache: BinaryCacheSimulator
) -> None:
    """Where HEAD does not tell, the NAR is fetched as without a condition."""
    cache.publish(ENTRY.but(fields={"FileSize": None}))
    cache.fault(lambda request: request.method == "HEAD", Status(403))
    assert (await proxy.pull(URL, {"If-None-Match": '"other"'})).body == FILE


# --- upstreams that fail ----------------------------------------------------------------------


async def test_a_nar_with_a_content_coding_is_refused(
    proxy: InsideProxy, cache: BinaryCacheSimulator
) -> None:
    """A NAR arrives as its narinfo says or not at all."""
    cache.fault(ENTRY.nar_path, Headers({"Content-Encoding": "gzip"}), times=1)
    assert (await proxy.pull(URL)).status == 404
    assert (await proxy.pull(URL)).body == FILE


@pytest.mark.parametrize("status", [404, 500])
async def test_a_nar_that_is_gone_leaves_nothing_behind(
    status: int, proxy: InsideProxy, cache: BinaryCacheSimulator
) -> None:
    """A NAR that the upstream announces and does not have is 404, without a trace on the disk."""
    cache.fault(ENTRY.nar_path, Status(status))
    assert (await proxy.pull(URL)).status == 404
    await proxy.idle()
    assert proxy.kept == set()
    assert proxy.partials == []


async def test_strictness_tells_absence_from_ignorance(sim: StartSimulator, tmp_path: Path) -> None:
    """With `upstream_down = "error"`, what nobody has is 404, and what nobody knows is 502."""
    cache = await sim(ENTRY)
    async with InsideProxy(tmp_path, cache.url, keys=[KEY.public], strict=True) as proxy:
        assert (await proxy.get(ABSENT))[0] == 404
        cache.fault(ENTRY.narinfo_path, Status(503), times=1)
        assert (await proxy.get(ENTRY.narinfo_path))[0] == 502
        assert (await proxy.get(ENTRY.narinfo_path))[0] == 200
        failing = cache.fault(ENTRY.nar_path, Status(503))
        assert (await proxy.pull(URL)).status == 502
        failing.lift()
        proxy.clock.now += 3_600
        assert (await proxy.pull(URL)).body == FILE


# --- a disk that fails ------------------------------------------------------------------------


async def test_a_narinfo_that_a_crash_withheld_is_made_good(
    proxy: InsideProxy, cache: BinaryCacheSimulator
) -> None:
    """A NAR whose narinfo did not make it to the disk gets it when it is next served."""
    await pulled(proxy)
    narinfo = proxy.folder / ENTRY.narinfo_path[1:]
    text = narinfo.read_bytes()
    narinfo.unlink()
    proxy.store.remember_narinfo("up0", HASH_PART, ENTRY.narinfo(KEY))
    for _ in range(2):
        assert (await proxy.pull(URL)).body == FILE
    await proxy.until(lambda: len(proxy.observed(Published)) == 2)
    assert narinfo.read_bytes() == text
    assert cache.gets(ENTRY.nar_path) == 1


async def test_where_it_came_from_outlives_a_restart(
    cache: BinaryCacheSimulator, sim: StartSimulator, tmp_path: Path
) -> None:
    """Narinfo and NAR name the upstream that they are from, also without index."""
    async with InsideProxy(tmp_path, (await sim()).url, cache.url, keys=[KEY.public]) as proxy:
        await pulled(proxy)
    shutil.rmtree(tmp_path / ".state")
    async with InsideProxy(tmp_path, cache.url, keys=[KEY.public]) as proxy:
        for path in (ENTRY.narinfo_path, URL):
            headers = (await proxy.pull(path)).headers
            assert (headers["X-Cache"], headers["X-Upstream"]) == ("HIT", "up1")


async def test_a_nar_whose_narinfo_is_lost_is_served(
    cache: BinaryCacheSimulator, tmp_path: Path
) -> None:
    """A NAR in the store is served by its URL, whether or not anybody remembers its narinfo."""
    async with InsideProxy(tmp_path, cache.url, keys=[KEY.public]) as proxy:
        await pulled(proxy)
    (tmp_path / ENTRY.narinfo_path[1:]).unlink()
    async with InsideProxy(tmp_path, cache.url, keys=[KEY.public]) as proxy:
        answer = await proxy.pull(URL)
        assert (answer.body, answer.headers["X-Cache"]) == (FILE, "HIT")
        assert "X-Upstream" not in answer.headers
        assert await result_of(proxy, ENTRY.narinfo_path) == (200, "MISS")
        assert cache.gets(ENTRY.nar_path) == 1


async def test_a_disk_that_keeps_nothing_still_passes_on(
    proxy: InsideProxy, cache: BinaryCacheSimulator
) -> None:
    """Where a NAR cannot be kept, it is reported, and clients get it all the same."""
    shutil.rmtree(proxy.folder / "nar")
    (proxy.folder / "nar").touch()
    for count in (1, 2):
        assert (await proxy.pull(URL)).body == FILE
        await proxy.idle()
        assert cache.gets(ENTRY.nar_path) == count
        await proxy.until(lambda: proxy.observed(StoreChanged))
    assert str(NAME) in {failure.what for failure in proxy.observed(StoreFailed)}
    assert not proxy.observed(Published)
    assert proxy.partials == []


async def test_a_disk_that_takes_nothing_is_passed_by(
    proxy: InsideProxy, cache: BinaryCacheSimulator
) -> None:
    """Where not even a partial file can be begun, narinfos and NARs are served as they arrive."""
    shutil.rmtree(proxy.store.layout.partials)
    proxy.store.layout.partials.touch()
    assert (await proxy.get(ENTRY.narinfo_path))[0] == 200
    for _ in range(2):
        assert (await proxy.pull(URL)).body == FILE
        await proxy.idle()
    assert cache.gets(ENTRY.nar_path) == 2
    proxy.store.layout.partials.unlink()
    assert await proxy.store.check() == ""
    assert (await proxy.pull(URL)).body == FILE
    await proxy.until(lambda: proxy.observed(Published))


# --- its end ----------------------------------------------------------------------------------


async def test_closing_ends_everything_under_way(
    cache: BinaryCacheSimulator, tmp_path: Path
) -> None:
    """When the cache is closed, downloads end, who waits is told, and no partial file remains."""
    entry = StoreEntry.make("large-1.0", random.Random(11).randbytes(500_000), compression="none")
    cache.publish(entry)
    gate = Gate(after=400_000)
    cache.fault(entry.nar_path, gate)
    cache.fault(ABSENT, Gate(after=None))
    proxy = InsideProxy(tmp_path, cache.url, keys=[KEY.public])
    async with proxy:
        asked = asyncio.create_task(proxy.cache.narinfo(parse_hash_part("0" * 32)))
        url = f"{proxy.url}/nar/{entry.hash_part}-{entry.nar_hash}.nar"
        async with proxy.session.get(url) as answer:
            begun = await answer.content.readany()
            await gate.reached.wait()
            await cache.expect(ABSENT).wait()
            await proxy.cache.close()
            with pytest.raises(aiohttp.ClientPayloadError):
                await answer.read()
        assert bytes(entry.file).startswith(begun)
        with pytest.raises((asyncio.CancelledError, NotFoundError, UpstreamUnavailableError)):
            await asked
        assert not proxy.cache.tasks
        assert proxy.partials == []
        assert proxy.kept == set()
