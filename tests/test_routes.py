"""What the proxy answers itself, where nothing is, and what HEAD and errors look like everywhere."""

from __future__ import annotations

import inspect
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from proxy import errors
from proxy.errors import ProxyError
from proxy.events import RequestServed
from proxy.server import listening
from proxy.server.app import STATUSES
from proxy.server.page import Facts, render
from tests.closures import SigningKey, StoreEntry
from tests.conftest import RunSimulator, StartSimulator
from tests.daemon import DaemonProcess
from tests.faults import Body, Chunked, Fault, Html, Redirect, Reset, Status
from tests.inside import InsideProxy
from tests.simulator import BinaryCacheSimulator
from tests.wire import Answer, Wire, until

ENTRY = StoreEntry.make("hello-2.12.1", b"hello\n" * 10_000)
OTHER = StoreEntry.make("other-1.0", b"other\n" * 10_000, compression="zstd", scheme="uuid")
UNSIZED = StoreEntry.make("unsized-1.0", fields={"FileHash": None, "FileSize": None})
HASH = ENTRY.hash_part
BUILD_ID = "8fd2ca19a4f0f1d5b53bb1ab0a4b7c62e6ee0a4e"
SIDE_FILES = {
    f"/{HASH}.ls": b'{"root":{"type":"regular"},"version":1}',
    f"/log/{HASH}-hello-2.12.1.drv": b"building\n",
    f"/realisations/sha256:{'0' * 64}!out.doi": b'{"outPath":"x"}',
    f"/build-trace-v2/{HASH}-hello-2.12.1.drv/out.doi": b'{"outPath":"x"}',
    f"/debuginfo/{BUILD_ID}": b'{"archive":"../nar/x.nar.xz","member":"lib/debug/x.debug"}',
}

CACHE_INFO = b"StoreDir: /nix/store\nWantMassQuery: 1\nPriority: 30\n"


@dataclass
class Served:
    """A proxy and the cache behind it."""

    proxy: InsideProxy
    cache: BinaryCacheSimulator

    async def ask(self, target: str, *headers: str, method: str = "GET") -> Answer:
        """Make one request on a connection of its own."""
        async with Wire(self.proxy.url) as wire:
            return await wire.ask(target, *headers, method=method)


@pytest.fixture
async def served(
    tmp_path: Path, sim: StartSimulator, key: SigningKey, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Served]:
    """Return a proxy in front of a cache that has a file of every kind."""
    monkeypatch.setattr(listening, "LINGER", 0)  # no request is on its way when a test ends
    cache = await sim(ENTRY, OTHER, UNSIZED)
    cache.files |= {path: (body, {}) for path, body in SIDE_FILES.items()}
    async with InsideProxy(tmp_path / "store", cache.url, keys=[key.public]) as proxy:
        yield Served(proxy, cache)


# --- nix-cache-info -----------------------------------------------------------------------------

LIES: dict[str, Fault] = {
    "other store": Body(b"StoreDir: /gnu/store\nWantMassQuery: 0\nPriority: 1\n"),
    "unknown fields": Body(b"StoreDir: /nix/store\nGetNarInfosV1: /q\nBloomFilter: /b\n"),
    "no number": Body(b"StoreDir: /nix/store\nPriority: x\n"),
    "page": Html(),
    "redirect": Redirect("http://127.0.0.1:1/"),
    "absent": Status(404),
    "denied": Status(401),
    "busy": Status(429, headers={"Retry-After": "3600"}),
    "broken": Status(500),
    "reset": Reset(),
}


@pytest.mark.parametrize("lie", LIES.values(), ids=LIES)
async def test_cache_info_is_our_own(served: Served, lie: Fault) -> None:
    """Whatever upstreams say of themselves, clients hear of us three fields and nothing else."""
    served.cache.fault("*", lie)
    await served.ask(f"/{HASH}.narinfo")  # which may find out something about the upstream
    answer = await served.ask("/nix-cache-info")
    assert (answer.status, answer.body) == (200, CACHE_INFO)
    assert answer.headers["content-type"] == "text/x-nix-cache-info"
    assert served.cache.count("/nix-cache-info") == 0


async def test_cache_info_without_upstream(served: Served) -> None:
    """The first thing that Nix asks is answered when no upstream can be reached, at once."""
    served.cache.down()
    answer = await served.ask("/nix-cache-info")
    assert (answer.status, answer.body) == (200, CACHE_INFO)


async def test_cache_info_without_any_upstream(tmp_path: Path) -> None:
    """… and when none is configured."""
    async with InsideProxy(tmp_path / "store") as proxy:
        assert (await proxy.get("/nix-cache-info"))[::2] == (200, CACHE_INFO)


# --- health and metrics -------------------------------------------------------------------------


async def test_health_does_not_depend_on_upstreams(served: Served) -> None:
    """A dead upstream is no reason to restart us, or to take us out of service."""
    served.cache.down()
    assert (await served.ask(f"/{HASH}.narinfo")).status == 404
    for target in ("/healthz", "/readyz", "/healthz?verbose", "/readyz?x"):
        assert (await served.ask(target)).status == 200
    assert served.cache.requests == []


async def test_ready_without_a_disk(served: Served) -> None:
    """With a store that cannot be written we serve, and say why nothing is kept, until it is."""
    partials = served.proxy.store.layout.partials
    partials.rmdir()
    partials.touch()
    answer = await served.ask("/readyz")
    assert (answer.status, answer.body.partition(b": ")[0]) == (200, b"ready, but not keeping")
    assert (await served.ask("/healthz")).status == 200
    partials.unlink()
    assert (await served.ask("/readyz")).body == b"ready\n"


async def test_not_ready_while_stopping(served: Served) -> None:
    """Who is about to stop says so, and closes the connections that it has answered."""
    served.proxy.server.draining = True
    async with Wire(served.proxy.url) as wire:
        answer = await wire.ask("/readyz")
        assert answer.status == 503
        assert answer.headers["connection"] == "close"
        assert await wire.rest() == b""


def test_metrics(tmp_path: Path, threaded_sim: RunSimulator, key: SigningKey) -> None:
    """The daemon's metrics tell what was asked, in a form that Prometheus reads."""
    cache = threaded_sim(ENTRY)
    with DaemonProcess(tmp_path, upstreams=[cache.url], keys=[key.public]) as daemon:
        daemon.get(f"/{HASH}.narinfo")
        daemon.get("/nix-cache-info")
        lines = daemon.get("/metrics").decode().splitlines()
        assert daemon.metric("requests_total", route="narinfo", code="200") == 1
        assert daemon.metric("requests_total", route="cache_info", code="200") == 1
        assert daemon.metric("upstream_requests_total", upstream="up0") == 1
        assert daemon.stop() == 0
    named = [line for line in lines if line.startswith("nix_cache_proxy_")]
    assert named
    for line in named:
        float(line.rpartition(" ")[2])


# --- the page -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "host", ["cache.lan", "cache.lan:8627", "192.0.2.1:80", "[2001:db8::1]:80"]
)
async def test_page_names_us_as_the_reader_does(served: Served, host: str) -> None:
    """The page shows the substituter under the name by which its reader came."""
    async with Wire(served.proxy.url) as wire:
        await wire.send(f"GET / HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
        answer = await wire.answer()
    assert answer.status == 200
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    assert f"http://{host}".encode() in answer.body
    assert served.cache.requests == []


HOSTILE = [
    "<script>alert(1)</script>",
    '"onmouseover="alert(1)',
    "'><img/src=x>",
    "evil.example/<b>",
    "evil.example#",
    "user@evil.example",
    "evil.example:80:80",
    "evil.example:8o",
    "a b",
    "{url}",
    "{0.__class__}",
    "%s%n",
    "[<b>]",
    "evil\xe9.example",
    "x\\y",
    "&lt;b&gt;",
]


@pytest.mark.parametrize("host", HOSTILE)
async def test_page_shows_no_hostile_host(served: Served, host: str) -> None:
    """A Host that is no name of ours is not repeated, escaped or not."""
    async with Wire(served.proxy.url) as wire:
        await wire.send(f"GET / HTTP/1.1\r\nHost: {host}\r\n\r\n".encode("latin-1"))
        answer = await wire.answer()
    assert answer.status in (200, 400)
    assert host.encode("latin-1") not in answer.body
    assert b"evil" not in answer.body
    assert b"alert" not in answer.body


async def test_page_without_host(served: Served) -> None:
    """An HTTP/1.0 client that names no host gets the page, too."""
    async with Wire(served.proxy.url) as wire:
        await wire.send(b"GET / HTTP/1.0\r\n\r\n")
        answer = await wire.answer()
    assert answer.status == 200
    assert b"<h1>nix-cache-proxy</h1>" in answer.body


def test_page_escapes_what_it_is_told() -> None:
    """Names of upstreams and keys are text, whatever they hold."""
    nasty = '<b>&"{}'
    page = render(Facts([nasty], [nasty], 1234, 5 * 2**30, nasty), "cache.lan")
    assert "<b>" not in page
    assert page.count("&lt;b&gt;&amp;&quot;{}") >= 3
    assert "1,234 paths, 5.0 GiB" in page


async def test_page_loads_nothing_from_elsewhere(served: Served) -> None:
    """The page works in an office without internet, and tells nobody that it was read."""
    page = (await served.ask("/")).body.decode().lower()
    assert "src=" not in page
    assert "<script" not in page
    assert "<link" not in page
    assert "url(" not in page


# --- nothing there, nothing to be done ----------------------------------------------------------

NOTHING = [
    "/favicon.ico",
    "/robots.txt",
    "/index.html",
    "/nix-cache-info/",
    "/healthz/",
    "/healthz/x",
    "/metrics/",
    "/nar",
    "/log",
    f"/{HASH}",
    f"/{HASH}.narinfo/",
    f"/x/{HASH}.narinfo",
    "/api/v1/cache/x/narinfo",
]


@pytest.mark.parametrize("target", NOTHING)
async def test_nothing_there(served: Served, target: str) -> None:
    """What a binary cache does not have is 404 in a few words, and no upstream is asked."""
    answer = await served.ask(target)
    assert answer.status == 404
    assert answer.headers["content-type"].startswith("text/plain")
    assert 0 < len(answer.body) < 200
    assert served.cache.requests == []


@pytest.mark.parametrize("target", ["/", "/healthz", "/metrics", "/nix-cache-info", "/nar/x", "/x"])
@pytest.mark.parametrize("method", ["PUT", "POST", "DELETE", "OPTIONS", "PATCH"])
async def test_read_only(served: Served, method: str, target: str) -> None:
    """Whatever else than reading is 405 everywhere, says what is possible, and asks no upstream."""
    answer = await served.ask(target, "Content-Length: 0", method=method)
    assert answer.status == 405
    assert answer.headers["allow"] == "GET, HEAD"
    assert served.cache.requests == []


# --- HEAD ---------------------------------------------------------------------------------------

VARYING = ("date", "x-cache")
"""Headers that say when and from where, not what."""

OURS = {
    entry.name: f"/nar/{entry.hash_part}-{entry.nar_hash}.nar{extension}"
    for entry, extension in ((ENTRY, ".xz"), (OTHER, ".zst"), (UNSIZED, ".xz"))
}

HEADS = {
    "page": "/",
    "healthz": "/healthz",
    "readyz": "/readyz",
    "metrics": "/metrics",
    "cache info": "/nix-cache-info",
    "narinfo": f"/{HASH}.narinfo",
    "NAR": OURS[ENTRY.name],
    "NAR at a UUID": OURS[OTHER.name],
    "NAR without FileSize": OURS[UNSIZED.name],
    "foreign NAR": ENTRY.nar_path,
    **{path.split("/")[1].split(":")[0]: path for path in SIDE_FILES},
    "absent narinfo": f"/{'0' * 32}.narinfo",
    "absent NAR": f"/nar/{'0' * 32}-{ENTRY.nar_hash}.nar",
    "absent foreign NAR": "/nar/x.nar",
    "absent log": f"/log/{'0' * 32}-x.drv",
    "malformed": "/x.narinfo",
    "nowhere": "/x",
}


@pytest.mark.parametrize("target", HEADS.values(), ids=HEADS)
async def test_head(served: Served, target: str) -> None:
    """HEAD has the headers of GET and no body: before it was fetched, and when it is here."""
    async with Wire(served.proxy.url) as wire:
        early = await wire.ask(target, method="HEAD")
        get = await wire.ask(target)
        await until(lambda: served.proxy.cache.fetches_in_flight == 0)
        late = await wire.ask(target, method="HEAD")
        again = await wire.ask(target)
    assert get.complete
    assert early.status == get.status == late.status == again.status
    assert late.without(*VARYING) == again.without(*VARYING)
    if get.status == 200:
        assert early.without(*VARYING, "x-upstream") == get.without(*VARYING, "x-upstream")
    assert get.headers["content-length"] == str(len(get.body))


@pytest.mark.parametrize("entry", [ENTRY, OTHER, UNSIZED], ids=["plain", "uuid", "unsized"])
async def test_head_of_a_nar_fetches_nothing(served: Served, entry: StoreEntry) -> None:
    """To ask whether a NAR is there does not download it."""
    answer = await served.ask(OURS[entry.name], method="HEAD")
    assert answer.status == 200
    assert answer.headers["content-length"] == str(len(entry.file))
    assert served.cache.gets("/nar/") == 0


@pytest.mark.parametrize("method", ["HEAD", "GET"])
@pytest.mark.parametrize("target", [HEADS[name] for name in HEADS if name.startswith("absent")])
async def test_absence_is_remembered(served: Served, target: str, method: str) -> None:
    """What no upstream has is asked for once in a while, and not by every HEAD or GET."""
    statuses = {(await served.ask(target, method=method)).status for _ in range(5)}
    assert statuses == {404}
    assert len(served.cache.requests) == 1


@pytest.mark.parametrize("version", ["1.0", "1.1"])
async def test_head_of_a_nar_of_unknown_size(served: Served, version: str) -> None:
    """Where neither narinfo nor upstream knows the size, HEAD says nothing of it, in any HTTP."""
    served.cache.fault("/nar/", Chunked())
    async with Wire(served.proxy.url) as wire:
        target = OURS[UNSIZED.name]
        await wire.send(wire.request(target, method="HEAD", version=version))
        answer = await wire.answer("HEAD")
        assert answer.status == 200
        assert "content-length" not in answer.headers
        if version == "1.0":
            assert await wire.rest() == b""
        else:
            assert (await wire.ask("/healthz")).body == b"ok\n"


async def test_heads_leave_no_bytes_behind(served: Served) -> None:
    """Many HEADs and GETs on one connection, sent at once, are answered one for one."""
    async with Wire(served.proxy.url) as wire:
        asked = [(target, method) for target in HEADS.values() for method in ("HEAD", "GET")]
        await wire.send(b"".join(wire.request(target, method=method) for target, method in asked))
        answers = {pair: await wire.answer(pair[1]) for pair in asked}
        assert (await wire.ask("/healthz")).body == b"ok\n"
    for target in HEADS.values():
        assert answers[target, "HEAD"].status == answers[target, "GET"].status
        assert answers[target, "GET"].complete


# --- errors and statuses ------------------------------------------------------------------------


def below(kind: type[ProxyError]) -> Iterator[type[ProxyError]]:
    """Yield the class and all that are derived from it."""
    yield kind
    for child in kind.__subclasses__():
        yield from below(child)


@pytest.mark.parametrize("kind", list(below(ProxyError)))
def test_every_error_has_a_status(kind: type[ProxyError]) -> None:
    """What a client gets is decided for each class of error by itself, inherited by none."""
    assert kind in STATUSES


def test_all_errors_are_where_they_are_looked_for() -> None:
    """Each class of `proxy.errors` is one of ours, so that the table above is complete."""
    classes = {kind for _, kind in inspect.getmembers(errors, inspect.isclass)}
    ours = {kind for kind in classes if kind.__module__ == errors.__name__}
    assert ours == set(below(ProxyError))
    assert set(STATUSES) == ours


def test_no_status_stops_nix() -> None:
    """None is a status that Nix retries, waits for or gives up on where it could ask elsewhere."""
    can_happen = {status for kind, status in STATUSES.items() if status != 500}
    assert can_happen == {400, 404, 416}
    for kind in (errors.NotFoundError, errors.UpstreamError, errors.TrustError, errors.StoreError):
        assert {STATUSES[each] for each in below(kind)} <= {404, 500}


REFUSALS: dict[str, Fault] = {
    "denied": Status(401, b"<html>log in</html>", {"WWW-Authenticate": "Basic"}),
    "forbidden": Status(403, b"<html>AccessDenied</html>"),
    "busy": Status(429, b"<html>slow down</html>", {"Retry-After": "3600"}),
    "broken": Status(503, b"<html>maintenance</html>", {"Retry-After": "3600"}),
    "page": Html(b"<html>please pay</html>"),
    "reset": Reset(),
}


@pytest.mark.parametrize("refusal", REFUSALS.values(), ids=REFUSALS)
async def test_errors_are_our_own(served: Served, refusal: Fault) -> None:
    """Of an upstream's error neither status nor header nor text reaches a client."""
    served.cache.fault("*", refusal)
    for target in (f"/{HASH}.narinfo", OURS[ENTRY.name], OURS[OTHER.name]):
        answer = await served.ask(target)
        assert answer.status == 404
        assert answer.headers["content-type"].startswith("text/plain")
        assert b"html" not in answer.body
        assert not {"retry-after", "www-authenticate"} & set(answer.headers)


async def test_a_bug_of_ours_is_told(served: Served) -> None:
    """What nobody thought of is a short 500, and counted and logged like every other answer."""

    async def broken() -> Facts:
        raise ZeroDivisionError

    served.proxy.facts = broken  # type: ignore[method-assign]
    answer = await served.ask("/")
    assert answer.status == 500
    assert b"ZeroDivision" not in answer.body
    told = [(event.route, event.code) for event in served.proxy.observed(RequestServed)]
    assert told == [("page", 500)]
    assert (await served.ask("/healthz")).status == 200


@pytest.mark.parametrize("path", SIDE_FILES)
async def test_a_page_is_no_side_file(served: Served, path: str) -> None:
    """A login page instead of a log or listing is neither passed on nor kept once it is gone."""
    served.cache.fault(path, Html(), times=1)
    answer = await served.ask(path)
    assert answer.status == 404
    assert b"html" not in answer.body
    assert (await served.ask(path)).body == SIDE_FILES[path]
