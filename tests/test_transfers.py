"""NARs that break off, stall or change on their way, and what readers notice of that: a pause."""

from __future__ import annotations

import asyncio
import functools
import random
from typing import Any

import pytest

from proxy import patience
from proxy.events import BreakerOpened, FetchEnded
from proxy.patience import MUCH
from proxy.upstream import breaker
from proxy.upstream.breaker import THRESHOLD
from tests.closures import StoreEntry
from tests.conftest import RunDaemon, RunSimulator, StartProxy, StartSimulator
from tests.faults import (
    Corrupt,
    Cut,
    Fault,
    Gate,
    Headers,
    Html,
    Longer,
    NoRanges,
    Reset,
    Shorter,
    Stall,
    Status,
)
from tests.inside import InsideProxy
from tests.nix_client import NixClient
from tests.simulator import BinaryCacheSimulator, Rule

CONTENT = random.Random(7).randbytes(600_000)
NAR = StoreEntry.make("large-1.0", CONTENT, compression="none")
SIZE = len(NAR.file)
SMALL = StoreEntry.make("small-1.0", b"small\n" * 500, compression="none")
MIDDLE = SIZE // 2


@pytest.fixture
def start(start: StartProxy) -> StartProxy:
    """Return a function that starts proxies, as everywhere, with little patience."""
    return functools.partial(start, read_timeout=0.5)


def once(cache: BinaryCacheSimulator, *faults: Fault, entry: StoreEntry = NAR) -> Rule:
    """Let something happen to the next request for a NAR."""
    return cache.fault(entry.nar_path, *faults, times=1)


async def whole(proxy: InsideProxy, entry: StoreEntry = NAR) -> None:
    """Pull a NAR and see that it is whole and right, for this reader and for the store."""
    answer = await proxy.pull(await proxy.nar_url(entry.hash_part))
    assert (answer.status, answer.complete) == (200, True)
    assert answer.body == bytes(entry.file)
    await proxy.idle()
    assert any(name.startswith("nar/") for name in proxy.kept)


def asked(cache: BinaryCacheSimulator, entry: StoreEntry = NAR) -> list[str | None]:
    """Return the Range of each request for a NAR."""
    return [
        request.headers.get("Range")
        for request in cache.requests
        if request.raw_path == entry.nar_path and request.method == "GET"
    ]


def begin(wanted: str | None) -> int:
    """Return where a Range begins."""
    assert wanted is not None
    return int(wanted.removeprefix("bytes=").removesuffix("-"))


# --- the same upstream ------------------------------------------------------------------------


@pytest.mark.parametrize("at", [1, 100, MIDDLE, SIZE - 1, SIZE])
@pytest.mark.parametrize("how", ["cut", "reset", "stall"])
async def test_it_goes_on_where_it_stopped(
    at: int, how: str, sim: StartSimulator, start: StartProxy
) -> None:
    """Wherever and however it ends, what has not been received is asked for, once."""
    cache = await sim(NAR)
    proxy = await start(cache)
    once(cache, Stall(at) if how == "stall" else Cut(at, reset=how == "reset"))
    await whole(proxy)
    first, *rest = asked(cache)
    assert first is None
    assert len(rest) <= 1
    for request in cache.requests[
        2:
    ]:  # what the HTTP client held when the connection broke is lost
        if "Range" in request.headers:
            assert begin(request.headers["Range"]) <= at
            assert request.headers["If-Range"] == f'"{NAR.file_hash}"'


async def test_nothing_has_come_yet(sim: StartSimulator, start: StartProxy) -> None:
    """What ends before the first byte is asked for again, whole."""
    cache = await sim(NAR)
    proxy = await start(cache)
    once(cache, Cut(0))
    await whole(proxy)
    assert asked(cache) == [None, None]


async def test_again_and_again(sim: StartSimulator, start: StartProxy) -> None:
    """Each attempt may end, as long as each brings something."""
    entry = StoreEntry.huge("huge-1.0", 6 * MUCH)
    cache = await sim(entry)
    cache.fault(entry.nar_path, Cut(MUCH))
    proxy = await start(cache)
    await whole(proxy, entry)
    assert len(asked(cache, entry)) >= len(entry.file) / MUCH
    assert not proxy.observed(BreakerOpened)


async def test_twice_at_the_same_byte(sim: StartSimulator, start: StartProxy) -> None:
    """An attempt that brings nothing is not the last one."""
    cache = await sim(NAR)
    once(cache, Cut(MIDDLE))
    once(cache, Cut(0))
    await whole(await start(cache))
    first, second, third = asked(cache)
    assert first is None
    assert second == third
    assert 0 < begin(second) <= MIDDLE


async def test_readers_wait_and_go_on(sim: StartSimulator, start: StartProxy) -> None:
    """Everyone who reads, whenever they came, gets every byte once."""
    cache = await sim(NAR)
    proxy = await start(cache)
    gate = Gate(MIDDLE)
    once(cache, gate, Cut(MIDDLE))
    url = await proxy.nar_url(NAR.hash_part)
    readers = [asyncio.create_task(proxy.pull(url)) for _ in range(5)]
    readers.append(asyncio.create_task(proxy.pull(url, {"Range": f"bytes={MIDDLE - 9}-"})))
    await gate.reached.wait()
    readers += [asyncio.create_task(proxy.pull(url)) for _ in range(5)]
    gate.open()
    answers = await asyncio.gather(*readers)
    assert all(answer.complete for answer in answers)
    bodies = {answer.body for answer in answers}
    assert bodies == {bytes(NAR.file), bytes(NAR.file)[MIDDLE - 9 :]}


@pytest.mark.parametrize("validators", [{"ETag": None}, {"ETag": 'W/"weak"'}], ids=["none", "weak"])
async def test_without_validators(
    validators: dict[str, str | None], sim: StartSimulator, start: StartProxy
) -> None:
    """A FileHash vouches for the rest where no validator does."""
    cache = await sim(NAR)
    once(cache, Headers(validators), Cut(MIDDLE))
    await whole(await start(cache))
    first, second = asked(cache)
    assert first is None
    assert 0 < begin(second) <= MIDDLE
    assert "If-Range" not in cache.requests[-1].headers


async def test_nothing_vouches(sim: StartSimulator, start: StartProxy) -> None:
    """Without FileHash and validators the whole is asked for, and compared."""
    bare = NAR.but(fields={"FileHash": None, "FileSize": None})
    cache = await sim(bare)
    cache.fault(bare.nar_path, Headers({"ETag": None}), Cut(MIDDLE), times=1)
    cache.fault(bare.nar_path, Headers({"ETag": None}))
    await whole(await start(cache), bare)
    assert asked(cache, bare) == [None, None]


# --- an upstream that changes its mind --------------------------------------------------------


async def test_no_ranges(sim: StartSimulator, start: StartProxy) -> None:
    """A 200 to a Range is compared with what readers have, and followed from there."""
    cache = await sim(NAR)
    cache.fault(NAR.nar_path, NoRanges(), Cut(MIDDLE), times=1)
    cache.fault(NAR.nar_path, NoRanges())
    await whole(await start(cache))
    first, second = asked(cache)
    assert first is None
    assert 0 < begin(second) <= MIDDLE


async def test_no_ranges_for_nobody(sim: StartSimulator, start: StartProxy) -> None:
    """As long as readers have nothing a 200 starts over."""
    cache = await sim(SMALL)
    cache.fault(SMALL.nar_path, NoRanges(), Cut(1_000), times=1)
    cache.fault(SMALL.nar_path, NoRanges())
    await whole(await start(cache), SMALL)


@pytest.mark.parametrize("upstreams", [1, 2])
async def test_silence_of_which_nobody_has_a_byte(
    upstreams: int, sim: StartSimulator, start: StartProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However long it was silent, another upstream delivers it, or else the same one goes on."""
    monkeypatch.setattr(patience, "FIRST_SILENCE", 0.1)
    caches = [await sim(SMALL) for _ in range(upstreams)]
    rule = caches[0].fault(SMALL.nar_path, Stall(1_000), times=1 if upstreams == 1 else None)
    proxy = await start(*caches)
    await whole(proxy, SMALL)
    assert rule.hits == 1
    assert asked(caches[-1], SMALL)[-1] == "bytes=1000-"


async def test_another_etag(sim: StartSimulator, start: StartProxy) -> None:
    """The same bytes under another ETag are compared, and followed."""
    cache = await sim(NAR)
    once(cache, Cut(MIDDLE))
    cache.fault(NAR.nar_path, Headers({"ETag": '"new"'}))
    await whole(await start(cache))
    first, second = asked(cache)
    assert first is None
    assert 0 < begin(second) <= MIDDLE


async def test_other_bytes_under_another_etag(sim: StartSimulator, start: StartProxy) -> None:
    """Other bytes are noticed: readers have a true beginning and a cut, never a mixture."""
    cache = await sim(NAR)
    proxy = await start(cache)
    url = await proxy.nar_url(NAR.hash_part)
    once(cache, Cut(MIDDLE))
    cache.fault(NAR.nar_path, Corrupt(10), Headers({"ETag": '"new"'}))
    answer = await proxy.pull(url)
    assert not answer.complete
    assert bytes(NAR.file).startswith(answer.body)
    await proxy.idle()
    assert not proxy.kept


@pytest.mark.parametrize(
    "content_range",
    [
        f"bytes {MIDDLE + 1}-{SIZE - 1}/{SIZE}",
        f"bytes {MIDDLE}-{SIZE - 1}/{SIZE + 1}",
        f"bytes 0-{SIZE - MIDDLE - 1}/{SIZE}",
        "bytes */5",
        "nonsense",
        None,
    ],
)
async def test_another_part(
    content_range: str | None, sim: StartSimulator, start: StartProxy
) -> None:
    """A part that is not the one that was asked for is not taken; the whole is asked for then."""
    cache = await sim(NAR)
    once(cache, Cut(MIDDLE))
    once(cache, OtherRange(content_range))
    await whole(await start(cache))
    first, second, *others = asked(cache)
    assert first is None
    assert 0 < begin(second) <= MIDDLE
    assert len(others) == 1


class OtherRange:
    """Answer 206 with a Content-Range that is not that of the body."""

    def __init__(self, text: str | None) -> None:
        self._text = text

    def shape(self, reply: Any, request: Any) -> None:
        """Make it up."""
        reply.status, reply.ranges = 206, False
        reply.body = reply.body[MIDDLE:]
        if self._text is not None:
            reply.headers["Content-Range"] = self._text


@pytest.mark.parametrize("fault", [Shorter(1), Longer(1)], ids=repr)
async def test_another_length(fault: Fault, sim: StartSimulator, start: StartProxy) -> None:
    """A file of another length is not the same one, and another upstream's is."""
    cache, other = await sim(NAR), await sim(NAR)
    once(cache, Cut(MIDDLE))
    cache.fault(NAR.nar_path, fault, Headers({"ETag": '"new"'}))
    await whole(await start(cache, other))
    (wanted,) = asked(other)
    assert 0 < begin(wanted) <= MIDDLE


# --- other upstreams --------------------------------------------------------------------------


async def test_another_upstream_goes_on(sim: StartSimulator, start: StartProxy) -> None:
    """Where one upstream dies, another with the same file continues, at the same byte."""
    dying, other = await sim(NAR), await sim(NAR)
    proxy = await start(dying, other)
    dying.fault(NAR.nar_path, Cut(MIDDLE), times=1)
    dying.fault(NAR.nar_path, Status(500))
    await whole(proxy)
    (wanted,) = asked(other)
    assert 0 < begin(wanted) <= MIDDLE
    (ended,) = proxy.observed(FetchEnded)
    assert (ended.upstream, ended.error) == ("up1", None)


async def test_alternating(
    sim: StartSimulator, start: StartProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two upstreams that break off all the time make one whole NAR."""
    monkeypatch.setattr(breaker, "THRESHOLD", 100)
    caches = [await sim(NAR), await sim(NAR)]
    for cache in caches:
        for _ in range(3):
            once(cache, Cut(50_000))
            once(cache, Cut(0))
            once(cache, Cut(0))
    await whole(await start(*caches))
    assert all(len(asked(cache)) > 2 for cache in caches)


async def test_another_file_does_not_go_on(
    sim: StartSimulator, start: StartProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same NAR in another file cannot continue what readers have begun to read."""
    monkeypatch.setattr(patience, "ATTEMPTS", 3)
    packed = StoreEntry.make("packed-1.0", CONTENT, compression="gzip")
    again = packed.but(streams=3)
    dying, other = await sim(packed), await sim(again)
    proxy = await start(dying, other)
    url = await proxy.nar_url(packed.hash_part)
    dying.fault(packed.nar_path, Cut(MIDDLE), times=1)
    dying.fault(packed.nar_path, Status(404))
    answer = await proxy.pull(url)
    assert not answer.complete
    assert bytes(packed.file).startswith(answer.body)
    assert asked(other, again) == []


@pytest.mark.parametrize(
    "fault",
    [Status(404), Status(403), Status(500), Reset(), Html(), Corrupt(), Shorter(), Cut(0)],
    ids=repr,
)
async def test_second_choice(fault: Fault, sim: StartSimulator, start: StartProxy) -> None:
    """As long as nothing has been sent, another upstream with the same NAR may deliver it."""
    ill, other = await sim(SMALL), await sim(SMALL)
    proxy = await start(ill, other)
    ill.fault("/nar/", fault)
    await whole(proxy, SMALL)
    assert len(asked(other, SMALL)) == 1
    assert len(asked(ill, SMALL)) <= 2


async def test_second_choice_of_another_file(sim: StartSimulator, start: StartProxy) -> None:
    """The same NAR may be another file there: what came of the first one is thrown away."""
    one = StoreEntry.make("packed-1.0", b"packed\n" * 2_000, compression="gzip")
    two = StoreEntry.make("packed-1.0", b"packed\n" * 2_000, compression="gzip", streams=3)
    assert (one.hash_part, one.nar_hash) == (two.hash_part, two.nar_hash)
    assert bytes(one.file) != bytes(two.file)
    ill, other = await sim(one), await sim(two)
    proxy = await start(ill, other)
    ill.fault("/nar/", Cut(10))
    answer = await proxy.pull(await proxy.nar_url(one.hash_part))
    assert (answer.complete, answer.body) == (True, bytes(two.file))


async def test_no_second_choice(sim: StartSimulator, start: StartProxy) -> None:
    """Where nobody else has it, the doubt about the first one stays doubt, and is not remembered."""
    ill, other = await sim(SMALL), await sim()
    proxy = await start(ill, other, strict=True)
    url = await proxy.nar_url(SMALL.hash_part)
    rule = ill.fault("/nar/", Html())
    assert (await proxy.pull(url)).status == 502
    rule.lift()
    await whole(proxy, SMALL)


async def test_doubt_and_absence(sim: StartSimulator, start: StartProxy) -> None:
    """One upstream fails, the other has lost the file: that is not known to be absent."""
    ill, poor = await sim(SMALL), await sim(SMALL)
    proxy = await start(ill, poor, strict=True)
    url = await proxy.nar_url(SMALL.hash_part)
    rules = [ill.fault("/nar/", Html()), poor.fault("/nar/", Status(404))]
    assert (await proxy.pull(url)).status == 502
    for rule in rules:
        rule.lift()
    await whole(proxy, SMALL)


# --- bounds -----------------------------------------------------------------------------------


async def test_all_down_and_up_again(sim: StartSimulator, start: StartProxy) -> None:
    """With every upstream gone in the middle, readers wait, and go on when one is back."""
    caches = [await sim(NAR), await sim(NAR)]
    proxy = await start(*caches)
    url = await proxy.nar_url(NAR.hash_part)
    gate = Gate(MIDDLE)
    caches[0].fault(NAR.nar_path, gate)
    reading = asyncio.create_task(proxy.pull(url))
    await gate.reached.wait()
    for cache in caches:
        cache.down()
    await proxy.until(
        lambda: (
            [getattr(event, "outcome", "") for event in proxy.events].count("unavailable")
            >= THRESHOLD
        )
    )
    assert not reading.done()
    caches[0].heal()
    proxy.clock.now += 3_600
    caches[0].up()
    answer = await reading
    assert (answer.complete, answer.body) == (True, bytes(NAR.file))


async def test_it_is_given_up(
    sim: StartSimulator, start: StartProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever never comes back is waited for a bounded number of times."""
    monkeypatch.setattr(patience, "ATTEMPTS", 4)
    cache = await sim(NAR)
    proxy = await start(cache)
    once(cache, Cut(MIDDLE))
    cache.fault(NAR.nar_path, Cut(0))
    answer = await proxy.pull(await proxy.nar_url(NAR.hash_part))
    assert not answer.complete
    assert bytes(NAR.file).startswith(answer.body)
    assert len(asked(cache)) <= 5


async def test_retry_after(sim: StartSimulator, start: StartProxy) -> None:
    """Who asks for time is given it, while another upstream goes on."""
    busy, other = await sim(NAR), await sim(NAR)
    proxy = await start(busy, other)
    busy.fault(NAR.nar_path, Cut(MIDDLE), times=1)
    busy.fault(NAR.nar_path, Status(503), Headers({"Retry-After": "20"}))
    began = asyncio.get_running_loop().time()
    await whole(proxy)
    assert asyncio.get_running_loop().time() - began < 20
    assert len(asked(busy)) == 2


# --- the real client --------------------------------------------------------------------------


def test_nix_does_not_notice(daemon: RunDaemon, threaded_sim: RunSimulator, nix: NixClient) -> None:
    """With the proxy as the only substituter, a pull survives a cut in the middle of its NAR."""
    cache = threaded_sim(NAR)
    rule = cache.fault(NAR.nar_path, Cut(MIDDLE), times=2)
    proxy = daemon(cache.url)
    nix.copy_from(proxy.url, NAR.store_path)
    assert rule.hits == 2
    assert 0 < begin(asked(cache)[-1]) <= 2 * MIDDLE
