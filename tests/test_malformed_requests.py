"""Requests that no Nix sends: a clear 4xx, no upstream asked, no traceback, and the server lives on.

Byte for byte over a socket, because no HTTP library would send most of them.
"""

from __future__ import annotations

import logging
import random
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from proxy.server import listening
from tests.closures import SigningKey, StoreEntry
from tests.conftest import RunSimulator, StartSimulator
from tests.daemon import DaemonProcess
from tests.inside import InsideProxy
from tests.simulator import BinaryCacheSimulator
from tests.wire import Answer, Wire, until

ENTRY = StoreEntry.make("hello-2.12.1", b"hello\n" * 10_000)
HASH = ENTRY.hash_part
NARINFO = f"/{HASH}.narinfo"
OURS = f"{HASH}-{ENTRY.nar_hash}.nar.xz"
HEX = ENTRY.file.sha256.hex()

CACHE_INFO = b"StoreDir: /nix/store\nWantMassQuery: 1\nPriority: 30\n"

TARGETS = {
    "31 characters": f"/{HASH[1:]}.narinfo",
    "33 characters": f"/{HASH}0.narinfo",
    "no characters": "/.narinfo",
    "e": f"/e{HASH[1:]}.narinfo",
    "o": f"/o{HASH[1:]}.narinfo",
    "u": f"/u{HASH[1:]}.narinfo",
    "t": f"/t{HASH[1:]}.narinfo",
    "upper case": f"/{HASH.upper()}.narinfo",
    "narinfo with a query": f"{NARINFO}?x=y",
    "narinfo in a folder": f"/x{NARINFO}",
    "NAR of 31 characters": f"/nar/{OURS[1:]}",
    "NAR of 33 characters": f"/nar/0{OURS}",
    "NAR with e": f"/nar/e{OURS[1:]}",
    "NAR in upper case": f"/nar/{HASH.upper()}-{ENTRY.nar_hash.upper()}.nar.xz",
    "NAR of an unknown compression": f"/nar/{OURS}x",
    "NAR hash of 53 characters": f"/nar/{ENTRY.nar_hash}0.nar.xz",
    "NAR hash with t": f"/nar/t{ENTRY.nar_hash[1:]}.nar.xz",
    "hex hash with g": f"/nar/g{HEX[1:]}.nar.xz",
    "parent folder": f"/..{NARINFO}",
    "parent of a folder": f"/nar/..{NARINFO}",
    "parents": "/nar/../../../../etc/passwd",
    "parent of log": "/log/../nix-cache-info",
    "encoded parent": f"/%2e%2e{NARINFO}",
    "encoded parent in nar": "/nar/%2e%2e/%2E%2E/etc/passwd",
    "half encoded parent": "/nar/.%2e/x.nar",
    "encoded slash": "/nar/..%2f..%2fetc%2fpasswd",
    "encoded backslash": "/nar/..%5c..%5cetc",
    "two slashes": f"/{NARINFO}",
    "two slashes in nar": "/nar//x.nar",
    "only slashes": "//",
    "host after slashes": "//evil.example/x.narinfo",
    "bracket after slashes": "//[::1/x",
    "encoded NUL": f"/{HASH}%00.narinfo",
    "encoded NUL in nar": "/nar/x%00.nar",
    "encoded line break": "/nar/x%0d%0aX-Injected:%201",
    "encoded letter": "/%6eix-cache-info",
    "encoded é": "/nar/%c3%a9.nar",
    "broken encoding": "/nar/%zz.nar",
    "backslash": "/nar\\..\\x.nar",
    "backslash in nar": "/nar/..\\x.nar",
    "fragment": "/nix-cache-info#x",
    "absolute": f"http://evil.example{NARINFO}",
    "absolute https": f"https://evil.example{NARINFO}",
    "absolute without path": "http://evil.example",
    "absolute with a port": f"http://evil.example:1/nar/{OURS}",
    "2 kB": "/nar/" + "x" * 2_000,
    "2 kB of dots": "/" + "../" * 700,
    "state": "/.state/index.sqlite",
    "lock": "/.state/lock",
    "empty nar": "/nar/",
    "nar": "/nar",
    "empty log": "/log/",
    "log of no store path": "/log/hello.drv",
    "short build id": f"/debuginfo/{HEX[:39]}",
    "upper case realisation": f"/realisations/sha256:{HEX.upper()}!out.doi",
    "proposal": "/get-narinfos-v1",
    "another server's page": "/index.php?-d+allow_url_include%3d1",
}
"""Targets of well-formed requests: each is 400 or 404."""

RANGES = [
    "bytes",
    "bytes=",
    "bytes=-",
    "bytes=5",
    "bytes=5-2",
    "bytes=a-b",
    "bytes=0-1-2",
    "bytes=--1",
    "bytes=1.5-",
    "bytes=0-" + "9" * 1000,
    "bytes=\xb2-",
    "bytes=0-1,9-3",
]
"""Range headers that claim to be byte ranges and are none: each is 400."""


def request(line: str, *headers: str, body: bytes = b"") -> bytes:
    """Write a request with a Host and whatever else."""
    head = "".join(f"{text}\r\n" for text in (line, "Host: cache.example", *headers))
    return f"{head}\r\n".encode("latin-1") + body


GET = "GET /nix-cache-info HTTP/1.1"
HIDDEN = request(f"GET {NARINFO} HTTP/1.1")
"""A request that must not be found inside of another one."""

MESSAGES = {
    "empty request line": b" \r\n\r\n",
    "TLS": bytes.fromhex("160301020001fc0303") + b"\x80" * 64 + b"\r\n\r\n",
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "SSH": b"SSH-2.0-OpenSSH_9.2\r\n\r\n",
    "version": request("GET /nix-cache-info HTTP/9.9"),
    "no version": request("GET /nix-cache-info HTTP"),
    "no target": request("GET  HTTP/1.1"),
    "space in target": request("GET /nar/a b.nar HTTP/1.1"),
    "tab in target": request("GET /nar/a\tb.nar HTTP/1.1"),
    "NUL in target": request(f"GET /{HASH}\0.narinfo HTTP/1.1"),
    "NUL in header": request(GET, "X: a\0b"),
    "NUL in name": request(GET, "X\0: ab"),
    "utf-8": request("GET /nar/é.nar HTTP/1.1".encode().decode("latin-1")),
    "latin-1": request("GET /nar/\xe9\xff.nar HTTP/1.1"),
    "relative": request("GET nix-cache-info HTTP/1.1"),
    "backslash": request("GET \\nix-cache-info HTTP/1.1"),
    "asterisk": request("GET * HTTP/1.1"),
    "another scheme": request("GET file:///etc/passwd HTTP/1.1"),
    "broken address": request("GET http://[::1 HTTP/1.1"),
    "port out of range": request("GET http://x:99999/x HTTP/1.1"),
    "10 kB path": request(f"GET /nar/{'x' * 10_000} HTTP/1.1"),
    "100 kB path": request(f"GET /{'../' * 33_000} HTTP/1.1"),
    "20 kB header": request(GET, f"X: {'x' * 20_000}"),
    "1,000 headers": request(GET, *(f"X-{number}: x" for number in range(1_000))),
    "unknown method": request("STEAL /nix-cache-info HTTP/1.1"),
    "method in lower case": request("get /nix-cache-info HTTP/1.1"),
    "header without colon": request(GET, "Nonsense"),
    "header without name": request(GET, ": x"),
    "space before colon": request(GET, "X : x"),
    "folded header": request(GET, "X: x\r\n y"),
    "bare line feeds": request(GET).replace(b"\r\n", b"\n"),
    "bare carriage return": request(GET, "X: a\rb"),
    "no Host": b"GET /nix-cache-info HTTP/1.1\r\n\r\n",
    "two Hosts": request(GET, "Host: evil.example"),
    "two lengths": request(GET, "Content-Length: 5", "Content-Length: 0", body=HIDDEN),
    "two equal lengths": request(GET, "Content-Length: 5", "Content-Length: 5", body=b"hello"),
    "list of lengths": request(GET, "Content-Length: 0, 0", body=HIDDEN),
    "negative length": request(GET, "Content-Length: -1", body=HIDDEN),
    "signed length": request(GET, "Content-Length: +0", body=HIDDEN),
    "length in hex": request(GET, "Content-Length: 0x0", body=HIDDEN),
    "huge length": request(GET, f"Content-Length: {'9' * 30}", body=HIDDEN),
    "CL.TE": request(
        GET, "Content-Length: 5", "Transfer-Encoding: chunked", body=b"0\r\n\r\n" + HIDDEN
    ),
    "TE.CL": request(
        "POST / HTTP/1.1", "Transfer-Encoding: chunked", "Content-Length: 4", body=b"5\r\n" + HIDDEN
    ),
    "two codings": request(
        GET, "Transfer-Encoding: chunked", "Transfer-Encoding: identity", body=b"0\r\n\r\n" + HIDDEN
    ),
    "chunked is not last": request(GET, "Transfer-Encoding: chunked, identity", body=HIDDEN),
    "unknown coding": request(GET, "Transfer-Encoding: xchunked", body=HIDDEN),
    "vertical tab": request(GET, "Transfer-Encoding: \x0bchunked", body=b"0\r\n\r\n" + HIDDEN),
    "broken chunk": request(GET, "Transfer-Encoding: chunked", body=b"zz\r\n" + HIDDEN),
    "negative chunk": request(GET, "Transfer-Encoding: chunked", body=b"-1\r\n" + HIDDEN),
    "chunk without end": request(GET, "Transfer-Encoding: chunked", body=b"1\r\nxx\r\n" + HIDDEN),
}
"""Bytes that are no HTTP request, or that two servers would take for two different ones."""

METHODS = ["PUT", "POST", "DELETE", "OPTIONS", "TRACE", "CONNECT", "PATCH", "PROPFIND"]


@dataclass
class Target:
    """A proxy under attack, and the cache behind it that must not notice."""

    proxy: InsideProxy
    cache: BinaryCacheSimulator
    log: pytest.LogCaptureFixture

    async def attack(self, data: bytes) -> Answer:
        """Send ``data`` on a connection of its own, and return the first answer."""
        async with Wire(self.proxy.url) as wire:
            await wire.send(data)
            return await wire.answer()

    async def assert_unharmed(self) -> None:
        """Nobody was asked, and others are answered."""
        async with Wire(self.proxy.url) as wire:
            answer = await wire.ask("/nix-cache-info")
        assert (answer.status, answer.body) == (200, CACHE_INFO)
        assert self.cache.requests == []

    def assert_quiet(self) -> None:
        """Nothing was logged that an operator would have to read."""
        assert [record.getMessage() for record in self.log.records] == []


@pytest.fixture
async def target(
    tmp_path: Path,
    sim: StartSimulator,
    key: SigningKey,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> AsyncIterator[Target]:
    """Return a proxy in front of a cache that has one path."""
    monkeypatch.setattr(listening, "LINGER", 0)  # no request is on its way when a test ends
    caplog.set_level(logging.INFO)
    cache = await sim(ENTRY)
    async with InsideProxy(tmp_path / "store", cache.url, keys=[key.public]) as proxy:
        yield Target(proxy, cache, caplog)


def assert_clear(answer: Answer, *statuses: int) -> None:
    """The answer is one of these, and says in a short plain text what is wrong."""
    assert answer.status in statuses
    assert answer.complete
    assert answer.headers["content-type"].startswith("text/plain")
    assert 3 < len(answer.body) < 1024, "Nix prints shorter bodies to its user"
    assert b"Traceback" not in answer.body


@pytest.mark.parametrize("path", TARGETS.values(), ids=TARGETS)
async def test_targets(target: Target, path: str) -> None:
    """The URL of nothing is 400 or 404, on a connection that goes on, and nobody is asked."""
    async with Wire(target.proxy.url) as wire:
        answer = await wire.ask(path)
        assert_clear(answer, 400, 404)
        assert (await wire.ask(path, method="HEAD")).status == answer.status
        assert (await wire.ask("/nix-cache-info")).body == CACHE_INFO
    await target.assert_unharmed()
    target.assert_quiet()


@pytest.mark.parametrize("header", RANGES)
async def test_malformed_ranges(target: Target, header: str) -> None:
    """A malformed Range is 400, whatever it is of, before anybody is asked."""
    async with Wire(target.proxy.url) as wire:
        for path in (NARINFO, f"/nar/{OURS}", f"/{HASH}.ls", "/nar/x.nar?y"):
            assert_clear(await wire.ask(path, f"Range: {header}"), 400)
        assert (await wire.ask("/nix-cache-info")).body == CACHE_INFO
    await target.assert_unharmed()
    target.assert_quiet()


@pytest.mark.parametrize("header", ["bytes=-0", "bytes=999999-", "bytes=999999-9999999"])
async def test_unsatisfiable_ranges(target: Target, header: str) -> None:
    """A range outside of a file that is here is 416 with its size, and nobody is asked."""
    url = await target.proxy.nar_url(HASH)
    await target.proxy.get(url)
    await until(lambda: target.proxy.cache.fetches_in_flight == 0)
    target.cache.reset_counts()
    async with Wire(target.proxy.url) as wire:
        answer = await wire.ask(url, f"Range: {header}")
        assert_clear(answer, 416)
        assert answer.headers["content-range"] == f"bytes */{len(ENTRY.file)}"
        assert (await wire.ask("/nix-cache-info")).body == CACHE_INFO
    await target.assert_unharmed()
    target.assert_quiet()


@pytest.mark.parametrize("data", MESSAGES.values(), ids=MESSAGES)
async def test_messages(target: Target, data: bytes) -> None:
    """What is no HTTP request is 400 and the end of the connection; nothing hides behind it."""
    async with Wire(target.proxy.url) as wire:
        await wire.send(data)
        answer = await wire.answer()
        assert_clear(answer, 400)
        assert answer.body.strip() not in data, "an echo explains nothing"
        assert await wire.rest() == b""
    await target.assert_unharmed()


async def test_garbage(target: Target) -> None:
    """Random bytes do no harm; where they are answered at all, it is with 400."""
    source = random.Random("garbage")
    for size in (1, 2, 10, 100, 1_000, 5_000) * 5:
        async with Wire(target.proxy.url) as wire:
            await wire.send(source.randbytes(size) + b"\r\n\r\n")
            assert (await wire.answer()).status == 400
    await target.assert_unharmed()
    target.assert_quiet()


async def test_half_a_request(target: Target) -> None:
    """A client that leaves in the middle of its request is forgotten without a word."""
    whole = request(f"GET {NARINFO} HTTP/1.1", "Range: bytes=0-1")
    for size in range(1, len(whole)):
        async with Wire(target.proxy.url) as wire:
            await wire.send(whole[:size])
    await target.assert_unharmed()
    target.assert_quiet()


BODIES = {
    "no body": (),
    "empty body": ("Content-Length: 0",),
    "body": (f"Content-Length: {len(HIDDEN)}",),
    "chunked body": ("Transfer-Encoding: chunked",),
    "Expect": (f"Content-Length: {len(HIDDEN)}", "Expect: 100-continue"),
    "Expect that never comes": ("Content-Length: 99", "Expect: 100-continue"),
}


@pytest.mark.parametrize("headers", BODIES.values(), ids=BODIES)
@pytest.mark.parametrize("method", METHODS)
async def test_methods(target: Target, method: str, headers: tuple[str, ...]) -> None:
    """What is neither GET nor HEAD is 405 at once, without 100 before; its body is no request."""
    body = HIDDEN if f"Content-Length: {len(HIDDEN)}" in headers else b""
    if "Transfer-Encoding: chunked" in headers:
        body = b"%x\r\n%b\r\n0\r\n\r\n" % (len(HIDDEN), HIDDEN)
    for path in ("/", "/nix-cache-info", NARINFO, f"/nar/{OURS}"):
        answer = await target.attack(request(f"{method} {path} HTTP/1.1", *headers, body=body))
        assert_clear(answer, 405)
        assert answer.headers["allow"] == "GET, HEAD"
    await target.assert_unharmed()
    target.assert_quiet()


async def test_probe_of_old_nix(target: Target) -> None:
    """Nix ≤ 2.25 asks by PUT whether it may write: 405, and its next request is answered."""
    probe = request(
        "PUT /nix-cache-info HTTP/1.1",
        "User-Agent: curl/7.88.1 Nix/2.8.0",
        "Content-Type: text/x-nix-cache-info",
        "Content-Length: 21",
        "Expect: 100-continue",
    )
    for body in (b"", b"StoreDir: /nix/store\n"):
        async with Wire(target.proxy.url) as wire:
            assert (await wire.ask("/nix-cache-info")).status == 200
            await wire.send(probe + body)
            answer = await wire.answer()
            assert_clear(answer, 405)
            assert answer.headers["connection"] == "close", "or it sends its body as a request"
    await target.assert_unharmed()
    target.assert_quiet()


async def test_large_upload(target: Target) -> None:
    """Who uploads megabytes without asking reads the 405, and not a reset connection."""
    async with Wire(target.proxy.url) as wire:
        await wire.send(
            request("PUT /nar/x.nar HTTP/1.1", "Content-Length: 4000000", body=b"x" * 4_000_000)
        )
        assert_clear(await wire.answer(), 405)
        assert await wire.rest() == b""
    await target.assert_unharmed()
    target.assert_quiet()


@pytest.mark.parametrize("method", ["CONNECT", "TRACE", "PUT", "POST", "DELETE", "OPTIONS"])
async def test_nothing_hides_behind_a_refused_method(target: Target, method: str) -> None:
    """A request sent behind one that closes the connection is not carried out."""
    async with Wire(target.proxy.url) as wire:
        await wire.send(request(f"{method} /x HTTP/1.1", "X-Secret: mirror") + HIDDEN)
        answer = await wire.answer()
        assert_clear(answer, 405)
        assert b"mirror" not in answer.body
        assert await wire.rest() == b""
    await target.assert_unharmed()
    target.assert_quiet()


@pytest.mark.parametrize(
    "headers",
    [
        ("Content-Length: 0",),
        (f"Content-Length: {len(HIDDEN)}",),
        (f"Content-Length: {len(HIDDEN)}", "Expect: 100-continue"),
        (f"Content-Length: {len(HIDDEN)}", "Content-Type: application/json"),
    ],
)
async def test_body_of_a_get(target: Target, headers: tuple[str, ...]) -> None:
    """A GET may have a body, which is not the next request."""
    body = HIDDEN if str(len(HIDDEN)) in headers[0] else b""
    async with Wire(target.proxy.url) as wire:
        await wire.send(request(GET, *headers, body=body))
        assert (await wire.answer()).body == CACHE_INFO
        assert (await wire.ask("/healthz")).body == b"ok\n"
    await target.assert_unharmed()
    target.assert_quiet()


@pytest.mark.parametrize(
    "headers",
    [
        ("Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Version: 13"),
        ("Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AAMAAABkAAQAAP__"),
        ("Connection: Upgrade", "Upgrade: TLS/1.0"),
        ("Connection: upgrade",),
        ("Upgrade: nothing",),
    ],
)
async def test_upgrades_are_declined(target: Target, headers: tuple[str, ...]) -> None:
    """Who wants another protocol is answered in this one (RFC 9110 §7.8), and so is what follows."""
    async with Wire(target.proxy.url) as wire:
        answer = await wire.ask("/nix-cache-info", *headers)
        assert (answer.status, answer.body) == (200, CACHE_INFO)
        assert (await wire.ask("/healthz")).body == b"ok\n"
        refused = await wire.ask(f"/{HASH.upper()}.narinfo", *headers)
        assert_clear(refused, 400)
        assert (await wire.ask("/healthz")).body == b"ok\n"
    await target.assert_unharmed()
    target.assert_quiet()


async def test_unknown_expectation(target: Target) -> None:
    """An expectation that nobody knows is refused or ignored, and never waited for."""
    answer = await target.attack(request(GET, "Expect: 200-maybe"))
    assert answer.status in (200, 417)
    await target.assert_unharmed()
    target.assert_quiet()


async def test_the_daemon_logs_no_traceback(
    tmp_path: Path, threaded_sim: RunSimulator, key: SigningKey
) -> None:
    """Through all of this the real daemon lives, asks nobody, and logs only lines of JSON."""
    cache = threaded_sim(ENTRY)
    with DaemonProcess(tmp_path, upstreams=[cache.url], keys=[key.public]) as daemon:
        requests = [
            *(request(f"GET {path} HTTP/1.1") for path in TARGETS.values()),
            *(request(f"GET {NARINFO} HTTP/1.1", f"Range: {header}") for header in RANGES),
            *(request(f"{method} {NARINFO} HTTP/1.1") for method in METHODS),
            *MESSAGES.values(),
        ]
        for data in requests:
            async with Wire(daemon.url) as wire:
                await wire.send(data)
                assert 400 <= (await wire.answer()).status < 500
        for data in requests:
            async with Wire(daemon.url) as wire:
                await wire.send(data[: len(data) // 2])
        assert daemon.get("/nix-cache-info") == CACHE_INFO
        assert cache.requests == []
        assert daemon.metric("upstream_requests_total") == 0
        assert daemon.stop() == 0
        daemon.wait_for_log("stopping")  # the last of them
    lines = [str(line) for line in daemon.log]
    assert [line for line in lines if "Traceback" in line or "not JSON" in line] == []
    loud = [line for line in daemon.log if line.get("level") in ("warning", "error", "critical")]
    assert loud == []
