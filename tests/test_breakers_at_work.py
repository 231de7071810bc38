"""Upstreams that fail are left alone: what clients get, what upstreams hear, what operators see."""

from __future__ import annotations

import asyncio

import pytest

from proxy.events import BreakerClosed, BreakerOpened, UpstreamAnswered
from proxy.upstream import remote
from proxy.upstream.breaker import LONGEST_RETRY_AFTER, THRESHOLD, State
from tests.closures import StoreEntry
from tests.conftest import RunDaemon, RunSimulator, StartProxy, StartSimulator
from tests.faults import Corrupt, Cut, Fault, Gate, Headers, Html, Reset, Stall, Status
from tests.inside import InsideProxy
from tests.simulator import BinaryCacheSimulator
from tests.upstream.servers import black_hole

CACHED = StoreEntry.make("cached-1.0", b"cached\n" * 5_000)
PATHS = [StoreEntry.make(f"path-{number}", f"{number}\n".encode() * 5_000) for number in range(12)]

AN_HOUR = 3_600.0


async def statuses(proxy: InsideProxy, *entries: StoreEntry) -> list[int]:
    """Ask for narinfos, one after the other."""
    return [(await proxy.pull(entry.narinfo_path)).status for entry in entries]


def state(proxy: InsideProxy, position: int = 0) -> State:
    """Return the state of an upstream's breaker."""
    return proxy.failover.sources[position].upstream.breaker.state


async def open_breaker(proxy: InsideProxy, cache: BinaryCacheSimulator) -> None:
    """Let an upstream fail until it is left alone."""
    rule = cache.fault("*", Reset())
    assert await statuses(proxy, *PATHS[:THRESHOLD]) == [404] * THRESHOLD
    assert state(proxy) is State.OPEN
    rule.lift()
    cache.reset_counts()


@pytest.mark.parametrize("fault", [Reset(), Status(500), Html(), Corrupt(0)], ids=repr)
async def test_left_alone(fault: Fault, sim: StartSimulator, start: StartProxy) -> None:
    """After three failures in a row nothing is asked, nor is anything remembered as absent."""
    cache = await sim(*PATHS)
    proxy = await start(cache)
    rule = cache.fault("*", fault)
    assert await statuses(proxy, *PATHS) == [404] * len(PATHS)
    assert len(proxy.observed(UpstreamAnswered)) == THRESHOLD
    assert len(proxy.observed(BreakerOpened)) == 1
    rule.lift()
    proxy.clock.now += AN_HOUR
    assert await statuses(proxy, *PATHS) == [200] * len(PATHS)
    assert proxy.observed(BreakerClosed) == [BreakerClosed("up0")]


@pytest.mark.parametrize("status", [404, 410, 401, 403])
async def test_answers(status: int, sim: StartSimulator, start: StartProxy) -> None:
    """That it is not there, or not for us, is an answer, however often it comes."""
    cache = await sim()
    cache.fault("*", Status(status))
    proxy = await start(cache)
    await statuses(proxy, *PATHS)
    assert cache.count() == len(PATHS)
    assert state(proxy) is State.CLOSED


async def test_not_even_a_connection(start: StartProxy) -> None:
    """A black hole costs the first questions their time; then nobody connects, and nobody waits."""
    with black_hole() as silent:
        proxy = await start(silent, budget=0.2, strict=True)
        assert await statuses(proxy, *PATHS[:THRESHOLD]) == [502] * THRESHOLD
        await proxy.until(lambda: proxy.observed(BreakerOpened))
        asked = len(proxy.observed(UpstreamAnswered))
        assert await statuses(proxy, *PATHS) == [502] * len(PATHS)
        assert len(proxy.observed(UpstreamAnswered)) == asked
        assert state(proxy) is State.OPEN


async def test_airplane(sim: StartSimulator, start: StartProxy) -> None:
    """With every upstream left alone, what is cached is served, and no upstream hears of anything."""
    caches = [await sim(CACHED), await sim(CACHED)]
    proxy = await start(*caches)
    nar_url = await proxy.nar_url(CACHED.hash_part)
    await proxy.pull(nar_url)
    await proxy.idle()
    for cache in caches:
        cache.down()
    await statuses(proxy, *PATHS)
    assert {state(proxy, position) for position in (0, 1)} == {State.OPEN}
    accepted = [cache.accepted for cache in caches]
    for cache in caches:
        cache.up()
    assert await statuses(proxy, CACHED, PATHS[0]) == [200, 404]
    assert (await proxy.pull(nar_url)).body == bytes(CACHED.file)
    other_nar = f"/nar/{PATHS[0].hash_part}-{PATHS[0].nar_hash}.nar.xz"
    assert (await proxy.pull(other_nar)).status == 404
    assert (await proxy.pull(f"/{PATHS[0].hash_part}.ls")).status == 404
    assert [cache.accepted for cache in caches] == accepted


async def test_one_probe(sim: StartSimulator, start: StartProxy) -> None:
    """When the pause is over one question goes out; who asks meanwhile waits for what it brings."""
    cache = await sim(*PATHS)
    proxy = await start(cache)
    await open_breaker(proxy, cache)
    gate = Gate(None)
    cache.fault("*", gate)
    proxy.clock.now += AN_HOUR
    asking = [asyncio.create_task(proxy.pull(entry.narinfo_path)) for entry in PATHS]
    await gate.reached.wait()
    await asyncio.sleep(0)
    assert gate.arrivals == 1
    gate.open()
    assert [(await answer).status for answer in asking] == [200] * len(PATHS)


async def test_probe_in_vain(sim: StartSimulator, start: StartProxy) -> None:
    """A probe that gets no answer keeps nobody for long, and the upstream is left alone for longer."""
    cache = await sim(*PATHS)
    proxy = await start(cache, budget=0.4)
    await open_breaker(proxy, cache)
    stall = Stall(None)
    cache.fault("*", stall)
    proxy.clock.now += AN_HOUR
    answers = await asyncio.gather(*(proxy.pull(entry.narinfo_path) for entry in PATHS))
    assert {answer.status for answer in answers} == {404}
    assert stall.arrivals == 1
    await proxy.until(lambda: len(proxy.observed(BreakerOpened)) == 2)
    first, second = proxy.observed(BreakerOpened)
    assert first.seconds <= second.seconds


async def test_slow_but_alive(sim: StartSimulator, start: StartProxy) -> None:
    """Who is passed over because another was faster, and then answers, has not failed."""
    slow, fast = await sim(*PATHS), await sim(*PATHS)
    gate = Gate(None)
    slow.fault("*", gate)
    proxy = await start(slow, fast, budget=4.0)
    asked = PATHS[: 2 * THRESHOLD]
    answers = await asyncio.gather(*(proxy.pull(entry.narinfo_path) for entry in asked))
    assert {answer.headers["X-Upstream"] for answer in answers} == {"up1"}
    gate.open()
    await proxy.until(lambda: len(proxy.observed(UpstreamAnswered)) == 2 * len(asked))
    assert {event.outcome for event in proxy.observed(UpstreamAnswered)} == {"hit"}
    assert state(proxy) is State.CLOSED


async def test_preferred_black_hole(sim: StartSimulator, start: StartProxy) -> None:
    """A preferred upstream that never answers is soon not waited for any more."""
    ready = await sim(*PATHS)
    with black_hole() as silent:
        proxy = await start(silent, ready, budget=1.2)
        asked = PATHS[:THRESHOLD]
        assert await statuses(proxy, *asked) == [200] * len(asked)
        await proxy.until(lambda: proxy.observed(BreakerOpened))
        before = len(proxy.observed(UpstreamAnswered))
        assert await statuses(proxy, PATHS[5]) == [200]
        (event,) = proxy.observed(UpstreamAnswered)[before:]
        assert event.upstream == "up1"


async def test_lying_nars(sim: StartSimulator, start: StartProxy) -> None:
    """NARs that are not what was signed, and NARs that break off, are failures, too."""
    cache = await sim(*PATHS)
    proxy = await start(cache)
    urls = [await proxy.nar_url(entry.hash_part) for entry in PATHS]
    cache.fault("/nar/", Corrupt())
    for url in urls[:THRESHOLD]:
        await proxy.pull(url)
    await proxy.idle()
    assert state(proxy) is State.OPEN


@pytest.mark.parametrize("fault", [Html(), Status(400), Status(500)], ids=repr)
async def test_what_clients_make_up(fault: Fault, sim: StartSimulator, start: StartProxy) -> None:
    """Strange answers to URLs that a client made up do not take an upstream away from the others."""
    cache = await sim()
    cache.fault("*", fault)
    proxy = await start(cache)
    for number in range(2 * THRESHOLD):
        await proxy.pull(f"/nar/made-up-{number}.nar.xz")
        await proxy.pull(f"/log/{number:032}-x.drv")
    assert state(proxy) is State.CLOSED


@pytest.mark.parametrize(
    ("value", "least", "most"),
    [("30", 30.0, 30.0), ("999999", LONGEST_RETRY_AFTER, LONGEST_RETRY_AFTER), ("soon", 0.5, 1.0)],
)
async def test_retry_after(
    value: str, least: float, most: float, sim: StartSimulator, start: StartProxy
) -> None:
    """Who asks to be left alone for a while is, within a bound."""
    cache = await sim()
    cache.fault("*", Status(429), Headers({"Retry-After": value}))
    proxy = await start(cache)
    await statuses(proxy, *PATHS)
    (opened,) = proxy.observed(BreakerOpened)
    assert least <= opened.seconds <= most


async def test_a_cut_nar_counts_once(sim: StartSimulator, start: StartProxy) -> None:
    """One NAR that broke off is one failure, and what is answered afterwards makes up for it."""
    cache = await sim(*PATHS)
    proxy = await start(cache)
    for entry in PATHS[: 2 * THRESHOLD]:
        url = await proxy.nar_url(entry.hash_part)
        cache.fault("/nar/", Cut(10), times=1)
        await proxy.pull(url)
        await proxy.idle()
    assert state(proxy) is State.CLOSED


async def test_busy_with_us(
    sim: StartSimulator, start: StartProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An upstream all of whose connections we use ourselves has not failed."""
    monkeypatch.setattr(remote, "SLOT_TIMEOUT", 0.05)
    cache = await sim(*PATHS)
    proxy = await start(cache, max_connections=2)
    urls = [await proxy.nar_url(entry.hash_part) for entry in PATHS]
    gate = Gate(None)
    cache.fault("/nar/", gate)
    reading = asyncio.create_task(proxy.pull(urls[0]))
    await gate.reached.wait()
    for url in urls[1 : 2 * THRESHOLD]:
        assert (await proxy.pull(url)).status == 404
    assert state(proxy) is State.CLOSED
    gate.open()
    assert (await reading).complete


def test_operators_see_it(daemon: RunDaemon, threaded_sim: RunSimulator) -> None:
    """Metrics, log and page tell which upstream is left alone."""
    cache, other = threaded_sim(), threaded_sim()
    proxy = daemon(cache.url, other.url, config='[policy]\nupstream_down = "not-found"')
    assert proxy.metric("upstream_up", upstream="up0") == 1
    assert b"left alone" not in proxy.get("/")
    cache.down()
    for entry in PATHS[:THRESHOLD]:
        with pytest.raises(OSError, match="404"):
            proxy.get(entry.narinfo_path)
    (line,) = proxy.wait_for_log("upstream left alone")
    assert line["upstream"] == "up0"
    assert proxy.metric("upstream_up", upstream="up0") == 0
    assert proxy.metric("upstream_up", upstream="up1") == 1
    assert proxy.metric("upstream_breaker_opened_total", upstream="up0") == 1
    assert f"{cache.url} (has failed, and is left alone for now), {other.url}<".encode() in (
        proxy.get("/").replace(b"\n", b"<")
    )
