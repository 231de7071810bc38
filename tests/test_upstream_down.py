"""Whatever the upstreams do: what is cached is served, and the rest is quickly "ask the next cache"."""

from __future__ import annotations

import asyncio
import functools
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from proxy.events import UpstreamAnswered
from tests.closures import SigningKey, StoreEntry
from tests.conftest import RunDaemon, RunSimulator, StartProxy, StartSimulator
from tests.faults import Body, Fault, Html, Reset, Stall, Status
from tests.inside import InsideProxy, Received
from tests.simulator import BinaryCacheSimulator, Rule
from tests.upstream.servers import black_hole, says, serving

CACHED = StoreEntry.make("cached-1.0", b"cached\n" * 5_000)
MISSING = StoreEntry.make("missing-1.0", b"missing\n" * 5_000)
OTHER = StoreEntry.make("other-1.0", b"other\n")

BUDGET = 1.5
"""Seconds: the ``lookup_budget`` of these proxies."""

SLACK = 2.0
"""Seconds that a busy machine may add."""

GIVEN_AWAY = b"upstream's own words"
TELLTALE = {
    "Retry-After": "120",
    "WWW-Authenticate": 'Basic realm="upstream"',
    "Set-Cookie": "session=upstream",
    "X-Upstream-Header": "upstream",
    "Cache-Control": "max-age=86400",
}
"""What an upstream says besides a status, and what is for nobody else."""

OURS = {"content-type", "content-length", "date", "server", "connection"}
"""Headers that an answer of 404 or 502 may have."""


# --- what goes wrong --------------------------------------------------------------------------

Trouble = Callable[[BinaryCacheSimulator, SigningKey], object]


def _down(cache: BinaryCacheSimulator, _key: SigningKey) -> None:
    cache.down()


def _everywhere(*faults: Fault) -> Trouble:
    def trouble(cache: BinaryCacheSimulator, _key: SigningKey) -> Rule:
        return cache.fault("*", *faults)

    return trouble


def _instead_of_narinfos(make: Callable[[bytes, SigningKey], bytes]) -> Trouble:
    """Send something else than narinfos, made from the true one of the missing path."""

    def trouble(cache: BinaryCacheSimulator, key: SigningKey) -> Rule:
        return cache.fault("*.narinfo", Body(make(MISSING.narinfo(key), key)))

    return trouble


TROUBLES: Mapping[str, Trouble] = {
    "refused": _down,
    "reset": _everywhere(Reset()),
    "silent": _everywhere(Stall(None)),
    "silent in the middle": _everywhere(Stall(10)),
    **{
        str(code): _everywhere(Status(code, GIVEN_AWAY, TELLTALE))
        for code in (301, 400, 401, 403, 407, 429, 500, 503)
    },
    "a page for people": _everywhere(Html()),
    "nothing": _instead_of_narinfos(lambda _text, _key: b""),
    "cut": _instead_of_narinfos(lambda text, _key: text[: len(text) // 2]),
    "CRLF": _instead_of_narinfos(lambda text, _key: text.replace(b"\n", b"\r\n")),
    "no final newline": _instead_of_narinfos(lambda text, _key: text.removesuffix(b"\n")),
    "another path's": _instead_of_narinfos(lambda _text, key: OTHER.narinfo(key)),
    "unsigned": _instead_of_narinfos(lambda _text, _key: MISSING.narinfo()),
    "another's key": _instead_of_narinfos(lambda _text, _key: MISSING.narinfo(SigningKey("evil"))),
}

AN_HOUR = 3_600.0
"""Seconds after which any upstream is asked again."""

troubled = pytest.mark.parametrize("trouble", TROUBLES.values(), ids=TROUBLES.keys())


# --- the proxy --------------------------------------------------------------------------------


@pytest.fixture
def start(start: StartProxy) -> StartProxy:
    """Return a function that starts proxies, as everywhere, with little patience."""
    return functools.partial(start, budget=BUDGET, read_timeout=1.0)


async def quickly(proxy: InsideProxy, path: str, method: str = "GET") -> Received:
    """Ask, and see that the answer comes within the budget."""
    began = time.monotonic()
    received = await proxy.pull(path, method=method)
    assert time.monotonic() - began < BUDGET + SLACK
    return received


def assert_ours(received: Received, status: int) -> None:
    """The answer says what it has to, in our words, and nothing of the upstream's."""
    assert received.status == status, received
    assert received.complete
    assert {name.lower() for name in received.headers} <= OURS
    assert GIVEN_AWAY not in received.body
    assert b"<" not in received.body
    assert len(received.body) < 200


def lookups(proxy: InsideProxy, entry: StoreEntry = MISSING) -> int:
    """Return how often upstreams were asked for an entry's narinfo."""
    what = f"{entry.hash_part}.narinfo"
    return sum(event.what == what for event in proxy.observed(UpstreamAnswered))


# --- one upstream -----------------------------------------------------------------------------


@troubled
async def test_cached_paths_are_served(
    trouble: Trouble, sim: StartSimulator, start: StartProxy, key: SigningKey, tmp_path: Path
) -> None:
    """What was pulled once is served whole, also after a restart, and the upstream hears nothing."""
    cache = await sim(CACHED)
    async with InsideProxy(tmp_path / "store", cache.url, keys=[key.public]) as before:
        nar_url = await before.nar_url(CACHED.hash_part)
        assert (await before.pull(nar_url)).body == bytes(CACHED.file)
        await before.idle()
        cache.reset_counts()
        trouble(cache, key)
        for _ in range(2):
            assert await before.nar_url(CACHED.hash_part) == nar_url
            assert (await before.pull(nar_url)).body == bytes(CACHED.file)
    after = await start(cache)
    assert await after.nar_url(CACHED.hash_part) == nar_url
    received = await quickly(after, nar_url)
    assert (received.status, received.body) == (200, bytes(CACHED.file))
    assert (await quickly(after, f"/{CACHED.hash_part}.narinfo", "HEAD")).status == 200
    assert (await quickly(after, nar_url, "HEAD")).status == 200
    assert cache.count() == 0


@troubled
async def test_missing_paths_are_not_found(
    trouble: Trouble, sim: StartSimulator, start: StartProxy, key: SigningKey
) -> None:
    """What is not cached is 404 within the budget, in our own words, and is asked for anew each time."""
    cache = await sim(MISSING)
    trouble(cache, key)
    proxy = await start(cache)
    for asked in (1, 2, 3):
        method = "HEAD" if asked == 2 else "GET"
        assert_ours(await quickly(proxy, MISSING.narinfo_path, method), 404)
        assert lookups(proxy) == asked
    cache.heal()
    cache.up()
    proxy.clock.now += AN_HOUR
    assert await proxy.nar_url(MISSING.hash_part)


@troubled
async def test_strictness(
    trouble: Trouble, sim: StartSimulator, start: StartProxy, key: SigningKey
) -> None:
    """With ``upstream_down = "error"`` the same is 502, and what nobody has is still 404."""
    cache = await sim(MISSING)
    proxy = await start(cache, strict=True)
    assert_ours(await quickly(proxy, OTHER.narinfo_path), 404)
    trouble(cache, key)
    assert_ours(await quickly(proxy, MISSING.narinfo_path), 502)
    assert lookups(proxy) == 1
    assert_ours(await quickly(proxy, OTHER.narinfo_path), 404)


FILES = (
    f"/{MISSING.hash_part}.ls",
    f"/log/{MISSING.hash_part}-missing.drv",
    f"/realisations/sha256:{'ab' * 32}!out.doi",
    f"/debuginfo/{'0123456789' * 4}",
    f"/nar/{MISSING.file_hash}.nar.xz",
)


@pytest.mark.parametrize("strict", [False, True], ids=["not-found", "error"])
@pytest.mark.parametrize("name", ["refused", "reset", "silent", "401", "429", "503"])
async def test_other_files(
    name: str, strict: object, sim: StartSimulator, start: StartProxy, key: SigningKey
) -> None:
    """Listings, logs and foreign NARs fare like narinfos."""
    cache = await sim()
    TROUBLES[name](cache, key)
    proxy = await start(cache, strict=bool(strict))
    for path in FILES:
        assert_ours(await quickly(proxy, path), 502 if strict else 404)
    cache.heal()
    cache.up()
    proxy.clock.now += AN_HOUR
    cache.files.update({path: (b"found", {}) for path in FILES})
    for path in FILES:
        assert (await quickly(proxy, path)).body == b"found", path


@pytest.mark.parametrize("strict", [False, True], ids=["not-found", "error"])
@pytest.mark.parametrize("name", ["refused", "reset", "silent", "401", "403", "429", "503"])
async def test_nar_behind_a_known_narinfo(
    name: str, strict: object, sim: StartSimulator, start: StartProxy, key: SigningKey
) -> None:
    """A NAR that cannot be had is 404 before its first byte, and is there once the upstream is back."""
    cache = await sim(MISSING)
    proxy = await start(cache, strict=bool(strict), connect_timeout=1.0)
    nar_url = await proxy.nar_url(MISSING.hash_part)
    TROUBLES[name](cache, key)
    for method in ("GET", "HEAD", "GET"):
        assert_ours(await quickly(proxy, nar_url, method), 502 if strict else 404)
    cache.heal()
    cache.up()
    proxy.clock.now += AN_HOUR
    received = await proxy.pull(nar_url)
    assert (received.status, received.body) == (200, bytes(MISSING.file))


async def test_black_hole(start: StartProxy) -> None:
    """An upstream that takes connections and never says a word costs the budget, and no more."""
    with black_hole() as silent:
        proxy = await start(silent, read_timeout=30.0)
        began = time.monotonic()
        asked = [
            proxy.pull(path)
            for entry in (CACHED, MISSING, OTHER)
            for path in (
                entry.narinfo_path,
                f"/nar/{entry.hash_part}-{entry.nar_hash}.nar.xz",
                f"/{entry.hash_part}.ls",
            )
        ]
        for received in await asyncio.gather(*asked):
            assert_ours(received, 404)
        assert BUDGET * 0.9 < time.monotonic() - began < BUDGET + SLACK


async def test_not_even_http(start: StartProxy) -> None:
    """An upstream that is no HTTP server at all is one that is down."""
    async with serving(says(b"SSH-2.0-OpenSSH_9.2p1\r\n")) as port:
        proxy = await start(f"http://127.0.0.1:{port}")
        assert_ours(await quickly(proxy, MISSING.narinfo_path), 404)


@pytest.mark.parametrize("url", ["http://a..b/x.nar", "http://u:p@[::1]x/", "http://xn--/x.nar"])
async def test_url_that_is_none(url: str, sim: StartSimulator, start: StartProxy) -> None:
    """A narinfo whose URL leads nowhere breaks nothing: there is no such NAR."""
    cache = await sim(MISSING.but(fields={"URL": url}))
    proxy = await start(cache)
    assert (await quickly(proxy, MISSING.narinfo_path)).status in (200, 404)
    nar_url = f"/nar/{MISSING.hash_part}-{MISSING.nar_hash}.nar.xz"
    assert (await quickly(proxy, nar_url, "HEAD")).status in (200, 404)
    assert_ours(await quickly(proxy, nar_url), 404)


@pytest.mark.parametrize("location", ["http://a..b/", "http://[::1]x/", "", "/\x7f", "gopher://x/"])
async def test_redirect_to_nowhere(location: str, sim: StartSimulator, start: StartProxy) -> None:
    """A redirect that leads nowhere is an upstream that is down."""
    cache = await sim(MISSING)
    cache.fault("*", Status(302, b"", {"Location": location}))
    proxy = await start(cache)
    assert_ours(await quickly(proxy, MISSING.narinfo_path), 404)
    assert_ours(await quickly(proxy, FILES[0]), 404)


# --- two upstreams ----------------------------------------------------------------------------


@troubled
@pytest.mark.parametrize("preferred", [0, 1], ids=["the other one first", "the troubled one first"])
async def test_another_upstream_has_it(
    preferred: int, trouble: Trouble, sim: StartSimulator, start: StartProxy, key: SigningKey
) -> None:
    """While one upstream is in trouble, what another one has is 200, wherever it stands."""
    healthy, ill = await sim(MISSING), await sim(MISSING)
    trouble(ill, key)
    proxy = await start(*([ill, healthy] if preferred else [healthy, ill]), strict=True)
    received = await quickly(proxy, MISSING.narinfo_path)
    assert received.status == 200
    assert received.headers["X-Upstream"] == f"up{preferred}"
    nar_url = await proxy.nar_url(MISSING.hash_part)
    assert (await proxy.pull(nar_url)).body == bytes(MISSING.file)


async def test_unknown_and_absent(sim: StartSimulator, start: StartProxy) -> None:
    """While one upstream is down, what the other has not is unknown, so it is not remembered."""
    down, empty = await sim(MISSING), await sim()
    down.down()
    proxy = await start(down, empty)
    for asked in (1, 2):
        assert_ours(await quickly(proxy, MISSING.narinfo_path), 404)
        assert empty.gets(MISSING.narinfo_path) == asked
    down.up()
    assert await proxy.nar_url(MISSING.hash_part)


async def test_keys_are_a_set(sim: StartSimulator, start: StartProxy, key: SigningKey) -> None:
    """A path signed by another upstream's key is accepted: caches pass on what others signed."""
    other = SigningKey("other-cache-1")
    cache, elsewhere = await sim(MISSING, CACHED, key=other), await sim(OTHER)
    proxy = await start(cache, elsewhere, keys=[key.public, other.public])
    for entry in (MISSING, CACHED, OTHER):
        nar_url = await proxy.nar_url(entry.hash_part)
        assert (await proxy.pull(nar_url)).body == bytes(entry.file)


# --- the daemon -------------------------------------------------------------------------------


def test_daemon_without_upstream(daemon: RunDaemon, threaded_sim: RunSimulator) -> None:
    """The daemon starts, is ready and answers with no upstream to be reached, and finds it later."""
    cache = threaded_sim(MISSING)
    cache.down()
    proxy = daemon(cache.url, config='[policy]\nlookup_budget = "1s"')
    assert proxy.get("/readyz") == b"ready\n"
    assert b"StoreDir: /nix/store" in proxy.get("/nix-cache-info")
    assert _status(proxy.url + MISSING.narinfo_path) == 404
    cache.up()
    assert _status(proxy.url + MISSING.narinfo_path) == 200


def test_daemon_keys_are_a_set(
    daemon: RunDaemon, threaded_sim: RunSimulator, key: SigningKey
) -> None:
    """``[trust] keys`` hold for every upstream, and an upstream's own ``keys`` replace them."""
    other = SigningKey("other-cache-1")
    cache = threaded_sim(MISSING, key=other)
    both = daemon(cache.url, keys=[key.public, other.public])
    assert _status(both.url + MISSING.narinfo_path) == 200
    own = f'[[upstream]]\nname = "own"\nurl = "{cache.url}"\nkeys = ["{key.public}"]'
    neither = daemon(keys=[key.public, other.public], config=own)
    assert _status(neither.url + MISSING.narinfo_path) == 404


def test_daemon_strictness(daemon: RunDaemon, threaded_sim: RunSimulator) -> None:
    """``upstream_down`` decides between 404 and 502."""
    cache = threaded_sim(MISSING)
    cache.fault("*", Status(503, GIVEN_AWAY, TELLTALE))
    lenient = daemon(cache.url, config='[policy]\nupstream_down = "not-found"')
    strict = daemon(cache.url, config='[policy]\nupstream_down = "error"')
    assert _status(lenient.url + MISSING.narinfo_path) == 404
    assert _status(strict.url + MISSING.narinfo_path) == 502


def _status(url: str) -> int:
    try:
        with urllib.request.urlopen(url, timeout=60) as answer:  # noqa: S310  # our own
            status: int = answer.status
    except urllib.error.HTTPError as error:
        with error:
            return error.code
    return status
