"""What is counted: every event as documented, under labels that nobody outside can make up."""

from __future__ import annotations

import contextlib
import http.client
import random
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import get_args
from urllib.parse import urlsplit

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.openmetrics.parser import (
    text_string_to_metric_families as parse_openmetrics,
)
from prometheus_client.parser import text_string_to_metric_families as parse_text

from proxy import errors
from proxy.errors import TrustError, UpstreamError
from proxy.events import (
    Asked,
    ConfigReloaded,
    Event,
    FastlaneClosed,
    FastlaneServed,
    FetchEnded,
    Mode,
    Rejected,
    RequestServed,
    Result,
    StoreFailed,
    UpstreamAnswered,
)
from proxy.metrics import METHODS, Metrics
from proxy.server.app import Route
from tests.blobs import Blob
from tests.closures import SigningKey, StoreEntry
from tests.conftest import RunDaemon, RunSimulator, require_tool
from tests.daemon import DaemonProcess
from tests.faults import Body, Corrupt, Gate, Html, Longer, Reset, Shorter, Stall, Status
from tests.waiting import eventually

PREFIX = "nix_cache_proxy_"

ENTRY = StoreEntry.make("counted-1.0", random.Random(5).randbytes(50_000), compression="none")
OTHER = StoreEntry.make("other-1.0", random.Random(6).randbytes(50_000), compression="none")
ABSENT = StoreEntry.make("absent-1.0")

Labels = frozenset[tuple[str, str]]
Series = dict[tuple[str, Labels], float]
"""Name without prefix and labels → value."""


def series(text: str) -> Series:
    """Return our own metrics of an exposition."""
    return {
        (sample.name.removeprefix(PREFIX), frozenset(sample.labels.items())): sample.value
        for family in parse_text(text)
        for sample in family.samples
        if sample.name.startswith(PREFIX)
    }


def rendered(metrics: Metrics) -> Series:
    """Return what a scrape would get."""
    return series(metrics.render()[0].decode())


def one(name: str, **labels: str) -> tuple[str, Labels]:
    """Name one series."""
    return name, frozenset(labels.items())


# --- events -----------------------------------------------------------------------------------


def _served(**changes: object) -> RequestServed:
    values: dict[str, object] = {
        "route": "narinfo",
        "method": "GET",
        "code": 200,
        "result": "HIT",
        "body_bytes": 100,
        "complete": True,
        "seconds": 0.1,
        **changes,
    }
    return RequestServed(**values)  # type: ignore[arg-type]


def _requests(**changes: str) -> tuple[str, Labels]:
    labels = {"route": "narinfo", "method": "GET", "code": "200", "result": "HIT", **changes}
    return one("requests_total", **labels)


COUNTED: list[tuple[Event, Mapping[tuple[str, Labels], float]]] = [
    (_served(), {_requests(): 1, one("response_bytes_total", result="HIT"): 100}),
    (
        _served(result="MISS", route="nar", body_bytes=7),
        {_requests(route="nar", result="MISS"): 1, one("response_bytes_total", result="MISS"): 7},
    ),
    (
        _served(complete=False, body_bytes=5),
        {
            _requests(): 1,
            one("response_bytes_total", result="HIT"): 5,
            one("responses_cut_total"): 1,
        },
    ),
    (
        FastlaneServed("nar", 200, "HIT", 1_000, 5_000),
        {_requests(route="nar"): 1_000, one("response_bytes_total", result="HIT"): 5_000},
    ),
    (FastlaneServed("narinfo", 404, "", 7, 0), {_requests(result="", code="404"): 7}),
    (FastlaneClosed("aiohttp has no _waiter"), {}),
    (_served(result="", code=404), {_requests(result="", code="404"): 1}),
    (_served(result="", method="BREW"), {_requests(result="", method="other"): 1}),
    (_served(result="", method="get"), {_requests(result="", method="other"): 1}),
    (
        UpstreamAnswered("up0", "narinfo", "x.narinfo", "hit"),
        {one("upstream_requests_total", upstream="up0", kind="narinfo", outcome="hit"): 1},
    ),
    (
        UpstreamAnswered("up0", "nar", "x.nar", "timeout", "no answer in time"),
        {one("upstream_requests_total", upstream="up0", kind="nar", outcome="timeout"): 1},
    ),
    (
        FetchEnded("x.nar", "up0", 1234, 0.5, None),
        {one("upstream_bytes_total", upstream="up0"): 1234},
    ),
    (
        FetchEnded("x.nar", "up0", 12, 0.5, "it was cut"),
        {one("upstream_bytes_total", upstream="up0"): 12},
    ),
    *(
        (
            Rejected("up0", "x.nar", failure.kind, "a reason"),
            {one("verification_failures_total", kind=failure.kind): 1.0},
        )
        for failure in TrustError.__subclasses__()
    ),
    (StoreFailed("x.nar", "no space left"), {one("store_failures_total"): 1}),
    (ConfigReloaded("it is wrong"), {one("config_last_reload_successful"): -1}),
]


@pytest.mark.parametrize(
    ("event", "changes"), COUNTED, ids=[f"{n} {type(e[0]).__name__}" for n, e in enumerate(COUNTED)]
)
def test_every_event(event: Event, changes: Mapping[tuple[str, Labels], float]) -> None:
    """An event is counted once, where it belongs and nowhere else."""
    metrics = Metrics(["up0"])
    before = rendered(metrics)
    metrics(event)
    after = rendered(metrics)
    assert {name: after[name] - before.get(name, 0) for name in after} == {
        name: changes.get(name, 0) for name in after
    }
    assert changes.keys() <= after.keys()


def test_reload() -> None:
    """A reload that worked is the newest one, and mends one that did not."""
    metrics = Metrics(["up0"])
    metrics(ConfigReloaded("it is wrong"))
    failed = rendered(metrics)
    metrics(ConfigReloaded(None))
    worked = rendered(metrics)
    state = one("config_last_reload_successful")
    when = one("config_last_reload_success_timestamp_seconds")
    assert (failed[state], worked[state]) == (0, 1)
    assert abs(worked[when] - time.time()) < 60
    assert worked[when] >= failed[when]


def test_series_exist_before_anything_happens() -> None:
    """What can be alerted on is there as 0 from the start, so that its first increase is seen."""
    found = rendered(Metrics(["up0", "up1"]))
    for name in ("up0", "up1"):
        assert found[one("upstream_bytes_total", upstream=name)] == 0
        for kind in get_args(Asked):
            for outcome in ("hit", "absent"):
                labels = {"upstream": name, "kind": kind, "outcome": outcome}
                assert found[one("upstream_requests_total", **labels)] == 0
    for failure in TrustError.__subclasses__():
        assert found[one("verification_failures_total", kind=failure.kind)] == 0
    for result in get_args(Result):
        assert found[one("response_bytes_total", result=result)] == 0


def test_kinds_and_outcomes_are_words() -> None:
    """Every error that becomes a label has a word of its own."""
    for family, attribute in ((TrustError, "kind"), (UpstreamError, "outcome")):
        words = [getattr(error, attribute) for error in family.__subclasses__()]
        assert len(set(words)) == len(words) > 3
        assert all(word.isidentifier() for word in words)
    assert errors.UpstreamDeniedError.outcome == "denied"


def test_gauges() -> None:
    """A gauge is read when somebody looks."""
    metrics, values = Metrics(["up0"]), iter([1.0, 5.0])
    metrics.gauge("store_bytes", "Bytes on disk.", lambda: next(values))
    assert [rendered(metrics)[one("store_bytes")] for _ in range(2)] == [1, 5]


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1), max_size=20))
def test_methods_are_bounded(methods: list[str]) -> None:
    """However many methods clients make up, there is one more series for all of them."""
    metrics = Metrics(["up0"])
    before = len(rendered(metrics))
    for method in methods:
        metrics(_served(method=method, result=""))
    made_up = set(methods) - METHODS
    assert len(rendered(metrics)) - before == len(set(methods) & METHODS) + bool(made_up)


# --- the daemon -------------------------------------------------------------------------------

DOCUMENTED = {
    "requests_total": {"route", "method", "code", "result"},
    "response_bytes_total": {"result"},
    "upstream_requests_total": {"upstream", "kind", "outcome"},
    "fetches_in_flight": set(),
    "verification_failures_total": {"kind"},
    "store_bytes": set(),
    "store_paths": set(),
}
"""What the first form of the metrics was to have, with its labels."""


def scrape(proxy: DaemonProcess) -> Series:
    """Return the daemon's metrics."""
    return series(proxy.get("/metrics").decode())


def request(proxy: DaemonProcess, path: str, method: str = "GET") -> tuple[int, bytes]:
    """Return status and body, as far as it came."""
    connection = http.client.HTTPConnection(urlsplit(proxy.url).netloc, timeout=30)
    with contextlib.closing(connection):
        connection.request(method, path)
        answer = connection.getresponse()
        try:
            return answer.status, answer.read()
        except http.client.IncompleteRead as cut:
            return answer.status, cut.partial


def nar_path(entry: StoreEntry) -> str:
    """Return the URL that the proxy gives to an entry's NAR."""
    return f"/nar/{entry.hash_part}-{entry.nar_hash}.nar"


def pull(proxy: DaemonProcess, entry: StoreEntry) -> int:
    """Get a path whole, and return the bytes of its narinfo and NAR."""
    status, narinfo = request(proxy, entry.narinfo_path)
    assert status == 200
    status, nar = request(proxy, nar_path(entry))
    assert (status, nar) == (200, bytes(entry.file))
    return len(narinfo) + len(nar)


def test_documented_metrics(daemon: RunDaemon, threaded_sim: RunSimulator) -> None:
    """All that was promised is there, under its name and labels, after a pull."""
    proxy = daemon(threaded_sim(ENTRY).url)
    pull(proxy, ENTRY)
    labels: dict[str, set[str]] = {}
    for name, pairs in scrape(proxy):
        labels.setdefault(name, {label for label, _ in pairs})
    assert labels == {**labels, **DOCUMENTED}


def test_promtool(daemon: RunDaemon, threaded_sim: RunSimulator, tmp_path: Path) -> None:
    """Prometheus's own linter has nothing to say about names, types and help."""
    require_tool("promtool")
    proxy = daemon(threaded_sim(ENTRY).url)
    pull(proxy, ENTRY)
    checked = subprocess.run(
        ["promtool", "check", "metrics"],
        input=proxy.get("/metrics"),
        capture_output=True,
        check=False,
    )
    assert (checked.returncode, checked.stdout + checked.stderr) == (0, b"")


ACCEPTS = [
    "",
    "*/*",
    "text/plain",
    "text/plain;version=0.0.4;q=0.5,*/*;q=0.1",
    "application/openmetrics-text;version=1.0.0,application/openmetrics-text;version=0.0.1;q=0.75",
    "application/openmetrics-text; version=1.0.0; escaping=allow-utf-8",
    "application/openmetrics-text",
    "application/openmetrics-text;version",
    "application/openmetrics-text;version=abc",
    "application/openmetrics-text;version=",
    "application/openmetrics-text;version=1.0.0.0.0",
    "text/plain;version=abc",
    "text/plain;;;=;=",
    "application/vnd.google.protobuf;proto=io.prometheus.client.MetricFamily",
    ",;,;",
]


def test_every_accept_header(daemon: RunDaemon) -> None:
    """Whatever a scraper accepts, it gets metrics in the format that the content type names."""
    proxy = daemon()
    for accept in ACCEPTS:
        connection = http.client.HTTPConnection(urlsplit(proxy.url).netloc, timeout=30)
        with contextlib.closing(connection):
            connection.request("GET", "/metrics", headers={"Accept": accept})
            answer = connection.getresponse()
            content_type, body = answer.headers["Content-Type"], answer.read().decode()
        assert answer.status == 200, accept
        parse = parse_openmetrics if "openmetrics" in content_type else parse_text
        names = {family.name for family in parse(body)}
        assert any(name.startswith(PREFIX) for name in names), accept


def test_hits_and_misses(daemon: RunDaemon, threaded_sim: RunSimulator) -> None:
    """Requests and bytes are counted by where they came from."""
    proxy = daemon(threaded_sim(ENTRY, OTHER).url)
    missed = pull(proxy, ENTRY)
    eventually(lambda: scrape(proxy)[one("store_paths")] == 1)
    hit = pull(proxy, ENTRY) + pull(proxy, ENTRY)
    eventually(lambda: proxy.metric("requests_total", route="nar") == 3)
    found = scrape(proxy)
    for route in ("narinfo", "nar"):
        assert found[_requests(route=route, result="MISS")] == 1
        assert found[_requests(route=route, result="HIT")] == 2
    assert found[one("response_bytes_total", result="MISS")] == missed
    assert found[one("response_bytes_total", result="HIT")] == hit
    assert found[one("response_bytes_total", result="COALESCED")] == 0


def test_store_size(daemon: RunDaemon, threaded_sim: RunSimulator) -> None:
    """The store's bytes and paths grow with what is kept, and survive a restart."""
    proxy = daemon(threaded_sim(ENTRY, OTHER).url)
    eventually(lambda: scrape(proxy)[one("store_scanned")] == 1)
    empty = scrape(proxy)
    pull(proxy, ENTRY)
    eventually(lambda: scrape(proxy)[one("store_paths")] == 1)
    first = scrape(proxy)
    pull(proxy, OTHER)
    eventually(lambda: scrape(proxy)[one("store_paths")] == 2)
    second = scrape(proxy)
    size = one("store_bytes")
    assert first[size] - empty[size] >= len(ENTRY.file)
    assert second[size] - first[size] >= len(OTHER.file)
    assert proxy.stop() == 0
    proxy.start()
    eventually(lambda: scrape(proxy)[one("store_paths")] == 2)
    assert scrape(proxy)[size] == second[size]


def test_upstream_outcomes(daemon: RunDaemon, threaded_sim: RunSimulator) -> None:
    """Every question to an upstream is counted by what came of it, narinfos and NARs alike."""
    cache = threaded_sim(ENTRY)
    config = (
        f'[[upstream]]\nname = "one"\nurl = "{cache.url}"\n'
        'read_timeout = "400ms"\nconnect_timeout = "100ms"\n[policy]\nnegative_ttl = "0s"'
    )
    proxy = daemon(config=config)

    def count(kind: str, outcome: str) -> float:
        return proxy.metric("upstream_requests_total", upstream="one", kind=kind, outcome=outcome)

    assert request(proxy, ABSENT.narinfo_path)[0] == 404
    assert count("narinfo", "absent") == 1
    assert request(proxy, ENTRY.narinfo_path)[0] == 200
    assert count("narinfo", "hit") == 1
    for trouble, outcome in (
        (Status(503), "unavailable"),
        (Reset(), "unavailable"),
        (Status(401), "denied"),
        (Html(), "protocol"),
        (Stall(None), "timeout"),
    ):
        rule = cache.fault("*", trouble)
        path = OTHER.narinfo_path
        before = count("narinfo", outcome)
        assert request(proxy, path)[0] == 404
        assert count("narinfo", outcome) == before + 1, trouble
        rule.lift()
        assert request(proxy, path)[0] == 404  # it answers, so it is not left alone
    cache.fault("/nar/", Status(503), times=1)
    pull(proxy, ENTRY)
    assert count("nar", "unavailable") == 1
    assert count("nar", "hit") == 1
    assert proxy.metric("upstream_bytes_total", upstream="one") == len(ENTRY.file)


def test_fetches_in_flight(daemon: RunDaemon, threaded_sim: RunSimulator) -> None:
    """A download counts while it goes on, once however many wait for it."""
    cache = threaded_sim(ENTRY)
    gate = Gate(100)
    cache.fault("/nar/", gate)
    proxy = daemon(cache.url)
    in_flight = one("fetches_in_flight")
    assert scrape(proxy)[in_flight] == 0
    parts = urlsplit(proxy.url)
    waiting = [socket.create_connection((parts.hostname, parts.port)) for _ in range(3)]
    try:
        head = f"GET {nar_path(ENTRY)} HTTP/1.1\r\nHost: x\r\n\r\n".encode()
        for connection in waiting:
            connection.sendall(head)
        gate.reached.block()
        assert scrape(proxy)[in_flight] == 1
        gate.open()
        eventually(lambda: scrape(proxy)[in_flight] == 0)
    finally:
        for connection in waiting:
            connection.close()


def test_verification_failures(
    daemon: RunDaemon, threaded_sim: RunSimulator, key: SigningKey
) -> None:
    """What was not what was signed is counted by what was wrong with it, once each."""
    cache = threaded_sim(ENTRY)
    packed = StoreEntry.make("packed-1.0", b"packed\n" * 1_000, compression="gzip")
    garbled = packed.but(served=Blob.of(b"not gzip at all"))
    cache.publish(garbled)
    proxy = daemon(cache.url, config='[policy]\nnegative_ttl = "0s"')

    def failures() -> dict[str, float]:
        return {
            kind: proxy.metric("verification_failures_total", kind=kind)
            for kind in ("signature", "store_path", "hash", "size", "encoding", "unverifiable")
        }

    expected = dict.fromkeys(failures(), 0.0)
    for kind, text in (
        ("signature", ENTRY.narinfo(SigningKey("unknown-1"))),
        ("signature", ENTRY.narinfo()),
        ("store_path", OTHER.narinfo(key)),
    ):
        rule = cache.fault(ENTRY.narinfo_path, Body(text))
        assert request(proxy, ENTRY.narinfo_path)[0] == 404
        expected[kind] += 1
        assert failures() == expected
        rule.lift()
        assert request(proxy, OTHER.narinfo_path)[0] == 404  # it answers, so it is not left alone
    for kind, fault in (("hash", Corrupt()), ("size", Longer()), ("size", Shorter())):
        rule = cache.fault(ENTRY.nar_path, fault)
        _, nar = request(proxy, nar_path(ENTRY))
        assert len(nar) < len(ENTRY.file)
        expected[kind] += 1
        eventually(lambda: failures() == expected)
        rule.lift()
        assert request(proxy, OTHER.narinfo_path)[0] == 404
    assert request(proxy, nar_path(garbled) + ".gz")[0] == 404
    expected["encoding"] += 1
    eventually(lambda: failures() == expected)


# --- bounds -----------------------------------------------------------------------------------

KNOWN_METHODS = "GET HEAD PUT POST DELETE OPTIONS TRACE PATCH PROPFIND MKCOL M-SEARCH PURGE COPY"
ALPHABET = "abcXYZ019-_.~%!$&'()*+,;=:@/?\"{}\\\x7f\xe9\n"


def _hostile_requests(count: int) -> Iterator[bytes]:
    """Make requests that no Nix sends, always the same ones."""
    source = random.Random(7)
    paths = [ENTRY.narinfo_path, nar_path(ENTRY), "/metrics", "/", "/log/x", "/nar/", "/x.narinfo"]
    for number in range(count):
        method = source.choice([*KNOWN_METHODS.split(), f"X{number}", 'A"}', "get", "G\xc9T"])
        made_up = "/" + "".join(source.choices(ALPHABET, k=source.randint(0, 60)))
        path = source.choice([made_up, source.choice(paths) + made_up, source.choice(paths)])
        extra = source.choice(
            ["Range: bytes=9-1", 'X-Cache: "} 1', f"X-{number}: 1", "Accept: nothing"]
        )
        head = (
            f"{method} {path} HTTP/1.1\r\nHost: h{number}\r\n{extra}\r\nConnection: close\r\n\r\n"
        )
        yield head.encode("latin-1")


def test_bounded_labels(daemon: RunDaemon, threaded_sim: RunSimulator) -> None:
    """Nothing that a client makes up becomes a label, however long it tries."""
    cache = threaded_sim(ENTRY)
    cache.fault("/log/", Status(503))
    proxy = daemon(cache.url, config='[policy]\nnegative_ttl = "0s"')
    address = (urlsplit(proxy.url).hostname, urlsplit(proxy.url).port)
    for head in _hostile_requests(600):
        with socket.create_connection(address, timeout=30) as connection:
            connection.sendall(head)
            with contextlib.suppress(ConnectionError):
                while connection.recv(65536):
                    pass
    allowed: dict[str, set[str]] = {
        "route": set(get_args(Route)),
        "method": {*METHODS, "other"},
        "code": {"200", "206", "400", "404", "405", "414", "416"},
        "result": {*get_args(Result), ""},
        "upstream": {"up0"},
        "mode": set(get_args(Mode)),
        "kind": {*get_args(Asked), *(failure.kind for failure in TrustError.__subclasses__())},
        "outcome": {
            *("hit", "absent", "rejected", "cancelled"),
            *(failure.outcome for failure in UpstreamError.__subclasses__()),
        },
    }
    found = scrape(proxy)
    assert sum(value for (name, _), value in found.items() if name == "requests_total") > 150
    for name, labels in found:
        for label, value in labels:
            if name != "build_info":
                assert value in allowed[label], (name, label, value)
    assert len(found) < 200
    assert found.get(one("faults_total"), 0) == 0
