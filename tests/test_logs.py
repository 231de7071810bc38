"""What an operator reads: each trouble once, no secrets, and one line for one thing."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import dataclasses
import json
import pickle
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import get_args
from urllib.error import HTTPError
from urllib.parse import urlsplit

import pytest

from proxy.events import (
    AskedAhead,
    BreakerClosed,
    BreakerOpened,
    ConfigReloaded,
    Event,
    Evicted,
    FastlaneClosed,
    FastlaneServed,
    Fault,
    FetchedAhead,
    FetchEnded,
    FetchingAhead,
    FetchStarted,
    Forgotten,
    ModeChanged,
    NotDecoded,
    PorterEnded,
    Published,
    Quarantined,
    Rejected,
    RequestServed,
    StoreChanged,
    StoreFailed,
    UpstreamAnswered,
    WorkerEnded,
    WorkerStarted,
)
from tests.closures import StoreEntry
from tests.conftest import RunDaemon, RunSimulator
from tests.daemon import DaemonProcess
from tests.faults import Body, Html, Redirect, Status
from tests.faults import Fault as Trouble
from tests.simulator import BinaryCacheSimulator
from tests.upstream.servers import says, serving

ENTRIES = [StoreEntry.make(f"logged-{number}", b"x" * 5_000) for number in range(4)]

_TELL = """
import pickle, sys
from proxy.cli.logs import EventLog, set_up_logs
from proxy.config.sections import LogConfig
set_up_logs(LogConfig(level=sys.argv[1], format=sys.argv[2]))
tell = EventLog()
for event in pickle.load(sys.stdin.buffer):
    tell(event)
"""


def tell(events: Sequence[Event], *, level: str = "debug", form: str = "json") -> list[bytes]:
    """Return the lines that a process of its own logs of these events."""
    written = subprocess.run(
        [sys.executable, "-c", _TELL, level, form],
        input=pickle.dumps(list(events)),
        cwd=Path(__file__).parents[1],
        capture_output=True,
        check=True,
    )
    assert written.stdout == b""
    return written.stderr.split(b"\n")[:-1]


def levels(events: Sequence[Event]) -> list[str]:
    """Return how loudly each event is told."""
    return [json.loads(line)["level"] for line in tell(events)]


# --- how loudly -------------------------------------------------------------------------------


def answered(*outcomes: str, upstream: str = "up0") -> list[Event]:
    """Make what is observed when an upstream is asked again and again."""
    return [
        UpstreamAnswered(upstream, "narinfo", f"{number}.narinfo", outcome, "a reason")
        for number, outcome in enumerate(outcomes)
    ]


def _served(code: int = 200) -> RequestServed:
    return RequestServed("nar", "GET", code, "HIT", 100, complete=True, seconds=0.1)


LOUDNESS: list[tuple[Event, str]] = [
    (Rejected("up0", "x.narinfo", "signature", "unsigned"), "warning"),
    (NotDecoded("x.nar", "lrzip"), "warning"),
    (BreakerOpened("up0", "reset", 1.0), "warning"),
    (BreakerOpened("up0", "reset", 2.0), "debug"),
    (BreakerClosed("up0"), "info"),
    (ModeChanged("offline"), "warning"),
    (FetchStarted("x.nar", "up0"), "debug"),
    (FetchingAhead("x.nar"), "debug"),
    (FetchedAhead("x.nar", 100), "debug"),
    (AskedAhead("x.nar", 100), "debug"),
    (FetchEnded("x.nar", "up0", 100, 0.5, None), "info"),
    (FetchEnded("x.nar", "up0", 100, 0.5, "it was cut"), "warning"),
    (StoreFailed("x.nar", "no space left"), "error"),
    (StoreChanged("no space left"), "error"),
    (StoreChanged(""), "info"),
    (Quarantined("x.nar", "5 bytes instead of 10"), "error"),
    (Published("x.nar", "up0"), "debug"),
    (Evicted("x.nar", 100), "debug"),
    (_served(), "debug"),
    (_served(404), "debug"),
    (FastlaneServed("nar", 200, "HIT", 1_000, 5_000_000), "debug"),
    (Forgotten("0" * 32), "debug"),
    (WorkerStarted(1, 4711), "info"),
    (WorkerEnded(1, 4711, "it was ended by SIGKILL", 0.1), "error"),
    (PorterEnded(4711, "it was ended by SIGKILL"), "error"),
    (FastlaneClosed("aiohttp has no _waiter"), "warning"),
    (ConfigReloaded(None), "info"),
    (ConfigReloaded("line 3: it is wrong"), "error"),
    (Fault("GET /x", "Traceback …"), "error"),
    *((event, "debug") for event in answered("hit", "absent", "cancelled")),
    *((event, "warning") for event in answered("unavailable")),
]


def test_loudness() -> None:
    """What an operator has to know is a warning or an error, and what happens all day is debug."""
    for (event, level), told in zip(LOUDNESS, levels([e for e, _ in LOUDNESS]), strict=True):
        assert told == level, event


def test_every_event_is_told() -> None:
    """There is no event of which nothing is logged."""
    assert {type(event) for event, _ in LOUDNESS} == set(get_args(Event))


RECOVERIES = [
    (["hit", "absent"], ["debug", "debug"]),
    (["unavailable"] * 4, ["warning", "debug", "debug", "debug"]),
    (["timeout", "denied", "protocol"], ["warning", "debug", "debug"]),
    (["timeout", "hit", "hit"], ["warning", "info", "debug"]),
    (["timeout", "absent", "hit"], ["warning", "info", "debug"]),
    (["denied", "hit", "denied"], ["warning", "info", "warning"]),
    (["timeout", "cancelled", "timeout"], ["warning", "debug", "debug"]),
    (["timeout", "rejected", "timeout"], ["warning", "debug", "debug"]),
]
"""What comes of asking an upstream again and again, and how loudly each time is told."""


def test_failure_and_recovery() -> None:
    """An upstream's failure is a warning once, and its recovery is said once."""
    events = [
        event
        for number, (outcomes, _) in enumerate(RECOVERIES)
        for event in answered(*outcomes, upstream=f"up{number}")
    ]
    expected = [level for _, told in RECOVERIES for level in told]
    for event, level, right in zip(events, levels(events), expected, strict=True):
        assert level == right, event


def test_upstreams_by_themselves() -> None:
    """The failure of one upstream does not hide that of another."""
    events = [*answered("timeout"), *answered("timeout", upstream="up1"), *answered("hit")]
    assert levels([*events, *answered("timeout", upstream="up1")]) == [
        *("warning", "warning", "info", "debug")
    ]


def test_why(daemon: RunDaemon, threaded_sim: RunSimulator) -> None:
    """A failure is told with the upstream's name, what was asked for, and the reason."""
    cache = threaded_sim()
    cache.fault("*", Status(503))
    proxy = daemon(cache.url)
    assert status(proxy, ENTRIES[0].narinfo_path) == 404
    (line,) = proxy.wait_for_log("upstream fails")
    assert line["upstream"] == "up0"
    assert line["what"] == f"{ENTRIES[0].hash_part}.narinfo"
    assert "503" in line["reason"]


def test_level() -> None:
    """What is less severe than the configured level is not logged."""
    events = [event for event, _ in LOUDNESS]
    order = ["debug", "info", "warning", "error"]
    for number, least in enumerate(order):
        told = [json.loads(line)["level"] for line in tell(events, level=least)]
        assert set(told) == set(order[number:])


# --- one line for one thing -------------------------------------------------------------------

HOSTILE = [
    'x\n{"event": "injected", "level": "error"}',
    "x\r\n2026-01-01T00:00:00Z [error    ] injected",
    "x\x1b[2K\x1b[31minjected",
    "x\x1b[2K injected",
    "x\x00\x07\x08\x0b\x0c\x7f",
    "x\x9b31m\x85injected",
    "x\udcff\udc80",
    'x"} injected={"',
    "",
]


def _with_text(event: Event, text: str) -> Event:
    """Put hostile text wherever an event has text."""
    texts = {
        field.name: text
        for field in dataclasses.fields(event)
        if isinstance(getattr(event, field.name), str)
    }
    return dataclasses.replace(event, **texts)  # type: ignore[arg-type]


@pytest.mark.parametrize("form", ["json", "console"])
def test_hostile_text(form: str) -> None:
    """Whatever an event says, it stays on its line, and no terminal obeys it."""
    events = [_with_text(event, text) for event, _ in LOUDNESS for text in HOSTILE]
    lines = tell(events, form=form)
    assert len(lines) == len(events)
    for line in lines:
        assert not any(sign < 0x20 or sign == 0x7F for sign in line), line
        assert not any(0x80 <= ord(sign) < 0xA0 for sign in line.decode()), line
        if form == "json":
            assert json.loads(line).keys() >= {"event", "level", "timestamp"}


def send(proxy: DaemonProcess, data: bytes) -> None:
    """Send anything, and read to the end whatever comes back."""
    parts = urlsplit(proxy.url)
    connection = socket.create_connection((parts.hostname, parts.port), timeout=30)
    with connection, contextlib.suppress(ConnectionError):
        connection.sendall(data)
        connection.shutdown(socket.SHUT_WR)
        while connection.recv(65536):
            pass


def test_garbage_from_clients(daemon: RunDaemon, threaded_sim: RunSimulator) -> None:
    """Clients that speak no HTTP, or bad HTTP, leave nothing but JSON in the log."""
    proxy = daemon(threaded_sim().url)
    for garbage in (
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"GET / HTTP/1.1\r\nno colon here\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b'G\nT / HTTP/1.1\r\n{"event": "injected"}\r\n\r\n',
        b"GET /\n{injected} HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET /log/%0a%0d{injected} HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET /nar/\x1b[31m.nar HTTP/1.1\r\nHost: x\r\n\r\n",
        b"PUT /x HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
        b"GET /" + b"x" * 100_000 + b" HTTP/1.1\r\n\r\n",
        b"\r\n" * 1_000,
        b"\xff\xfe" * 1_000,
    ):
        send(proxy, garbage)
    assert proxy.get("/healthz") == b"ok\n"
    assert proxy.stop() == 0
    assert not any("not JSON" in line["event"] for line in proxy.log)
    assert not any("injected" in line["event"] for line in proxy.log)


INJECTED = b'x\n{"event": "injected"}\x1b[31m'
OK = b"HTTP/1.1 200 OK\r\n"


GARBAGE = [
    INJECTED,
    b"HTTP/1.1 503 \x1b[31minjected\r\n\r\n",
    OK + b"\r\n" + INJECTED,
    OK + b"\r\nStorePath: " + INJECTED,
    OK + b"Content-Encoding: \x1b[31minjected\r\n\r\n",
    OK + INJECTED + b"\r\n\r\n",
    OK + b"Transfer-Encoding: chunked\r\n\r\n\x1b[31minjected\r\n",
    b"HTTP/1.1 302 x\r\nLocation: http://127.0.0.1:1/\x1b[31minjected\r\n\r\n",
    b"HTTP/1.1 302 x\r\nLocation: http://\x9b31minjected/\r\n\r\n",
    b"HTTP/1.1 302 x\r\nLocation: http://injected..x/\r\n\r\n",
]


async def test_garbage_from_upstreams(daemon: RunDaemon) -> None:
    """Upstreams that answer garbage leave one line of JSON each, which no terminal obeys."""
    async with contextlib.AsyncExitStack() as stack:
        ports = [await stack.enter_async_context(serving(says(answer))) for answer in GARBAGE]
        proxy = await asyncio.to_thread(daemon, *(f"http://127.0.0.1:{port}" for port in ports))
        assert await asyncio.to_thread(status, proxy, ENTRIES[0].narinfo_path) == 404
    assert await asyncio.to_thread(proxy.stop) == 0
    lines = {line["upstream"]: line["reason"] for line in proxy.logged("upstream fails")}
    assert lines.keys() == {f"up{number}" for number in range(len(GARBAGE))}
    assert len(proxy.logged("upstream fails")) == len(GARBAGE)
    assert all(reason.isprintable() for reason in lines.values()), lines
    assert not any("injected" in line["event"] for line in proxy.log)


# --- the daemon -------------------------------------------------------------------------------


def status(proxy: DaemonProcess, path: str) -> int:
    """Return the status of an answer."""
    try:
        proxy.get(path)
    except HTTPError as error:
        with error:
            return error.code
    return 200


def told(proxy: DaemonProcess, event: str) -> list[str]:
    """Return how loudly something was told each time, but for debug."""
    return [line["level"] for line in proxy.logged(event) if line["level"] != "debug"]


def until_asked_again(proxy: DaemonProcess, path: str, times: int) -> None:
    """Ask until an upstream is no longer left alone, for so many times in its life."""
    deadline = time.monotonic() + 20
    while len(proxy.logged("upstream asked again")) < times:
        assert time.monotonic() < deadline
        status(proxy, path)
        time.sleep(0.05)


def test_said_once(daemon: RunDaemon, threaded_sim: RunSimulator) -> None:
    """However many requests an upstream fails, the log has one warning, and one line of relief."""
    cache = threaded_sim(*ENTRIES)
    proxy = daemon(cache.url, config='[policy]\nnegative_ttl = "0s"')
    for outage in range(2):
        cache.down()
        for entry in ENTRIES:
            assert status(proxy, entry.narinfo_path) == 404
            assert status(proxy, f"/{entry.hash_part}.ls") == 404
        cache.up()
        until_asked_again(proxy, f"/{'0' * 32}.narinfo", outage + 1)
        for entry in ENTRIES:
            assert status(proxy, f"/{entry.hash_part}.ls") == 404
    proxy.stop()
    assert told(proxy, "upstream fails") == ["warning", "warning"]
    assert told(proxy, "upstream answers") == ["info", "info"]
    assert told(proxy, "upstream left alone") == ["warning", "warning"]
    assert told(proxy, "upstream asked again") == ["info", "info"]


SECRETS = ("s3cr3t-word", "s3cr3t-user", base64.b64encode(b"s3cr3t-user:s3cr3t-word").decode())


def _auths(folder: Path) -> list[str]:
    """Return every way to configure an upstream's credentials."""
    netrc, token = folder / "netrc", folder / "token"
    netrc.write_text("machine 127.0.0.1 login s3cr3t-user password s3cr3t-word\n")
    token.write_text("s3cr3t-word\n")
    return [
        'bearer = "s3cr3t-word"',
        f"bearer_file = {json.dumps(str(token))}",
        f"netrc = {json.dumps(str(netrc))}",
        'user = "s3cr3t-user", password = "s3cr3t-word"',
        f'user = "s3cr3t-user", password_file = {json.dumps(str(token))}',
    ]


def _upset(proxy: DaemonProcess, cache: BinaryCacheSimulator) -> None:
    """Let everything go wrong that may make somebody talk."""
    troubles: list[Trouble] = [
        Status(401, headers={"WWW-Authenticate": "Basic"}),
        Status(500),
        Html(),
        Body(b"\xff"),
        Redirect("http://a..b/"),
        Redirect(f"http://user:password@127.0.0.1:{cache.port}/x"),
        Redirect("gopher://x/"),
        Redirect(lambda request: request.raw_path),
    ]
    for number, fault in enumerate(troubles):
        rule = cache.fault("*", fault)
        status(proxy, f"/{number}{ENTRIES[0].hash_part[1:]}.narinfo")
        status(proxy, f"/nar/{number}.nar.xz")
        rule.lift()
    cache.down()
    status(proxy, ENTRIES[1].narinfo_path)
    cache.up()
    assert status(proxy, ENTRIES[2].narinfo_path) == 200


def test_no_secrets(daemon: RunDaemon, threaded_sim: RunSimulator, tmp_path: Path) -> None:
    """Credentials are in no line of the log, at any level, on no page and in no metric."""
    caches = [threaded_sim(*ENTRIES) for _ in range(6)]
    tables = [
        f'[[upstream]]\nname = "n{number}"\nurl = "{cache.url}"\nauth = {{ {auth} }}'
        for number, (cache, auth) in enumerate(zip(caches, _auths(tmp_path), strict=False))
    ]
    with_user = caches[-1].url.replace("//", "//s3cr3t-user:s3cr3t-word@")
    tables.append(f'[[upstream]]\nname = "url"\nurl = "{with_user}"')
    proxy = daemon(config="\n".join(tables))
    for cache in caches:
        _upset(proxy, cache)
    shown = proxy.get("/") + proxy.get("/metrics")
    proxy.signal(signal.SIGHUP)
    proxy.wait_for_log("the configuration was read again and is in force")
    proxy.stop()
    heard = {
        request.headers.get("Authorization", "") for cache in caches for request in cache.requests
    }
    assert heard == {"Bearer s3cr3t-word", f"Basic {SECRETS[2]}"}
    text = json.dumps(proxy.log) + shown.decode()
    for secret in SECRETS:
        assert secret not in text


def test_no_secrets_of_redirects(daemon: RunDaemon, threaded_sim: RunSimulator) -> None:
    """What an object store signed into a URL is a key to it, and is in no line of the log."""
    cache = threaded_sim(*ENTRIES)
    proxy = daemon(cache.url)
    signed = "X-Amz-Signature=s3cr3t-word"
    for number, location in enumerate(
        (
            f"http://127.0.0.1:1/x?{signed}",
            f"gopher://127.0.0.1/x?{signed}",
            f"http://127.0.0.1:99999/x?{signed}",
            f"http://s3cr3t-user:s3cr3t-word@127.0.0.1:{cache.port}/x",
            f"http://a..b/x?{signed}",
            f"{cache.url}/nowhere?{signed}",
        )
    ):
        rule = cache.fault("*.narinfo", Redirect(location))
        assert status(proxy, f"/{number}{ENTRIES[0].hash_part[1:]}.narinfo") == 404
        rule.lift()
    proxy.stop()
    text = json.dumps(proxy.log)
    for secret in SECRETS:
        assert secret not in text
