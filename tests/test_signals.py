"""SIGTERM, SIGINT and death: how a daemon ends, and what it finishes first."""

from __future__ import annotations

import random
import re
import signal
import socket
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from http.client import HTTPConnection, HTTPException, IncompleteRead
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.closures import StoreEntry
from tests.conftest import RunDaemon, RunSimulator
from tests.daemon import DaemonProcess
from tests.faults import Gate

LARGE = StoreEntry.make("large-1.0", random.Random(1).randbytes(1 << 20), compression="none")

SHUTDOWN_TIMEOUT = 5.0
"""What `DaemonProcess` configures."""

STOP_SIGNALS = pytest.mark.parametrize(
    "stop", [signal.SIGTERM, signal.SIGINT], ids=lambda s: s.name
)


def nar_url(proxy: DaemonProcess, entry: StoreEntry) -> str:
    """Ask for a narinfo, and return the path of its NAR."""
    found = re.search(r"^URL: (.*)$", proxy.get(entry.narinfo_path).decode(), re.MULTILINE)
    assert found is not None
    return f"/{found[1]}"


@contextmanager
def connected(proxy: DaemonProcess) -> Iterator[HTTPConnection]:
    """Yield a connection of our own."""
    place = urlsplit(proxy.url)
    connection = HTTPConnection(place.hostname or "", place.port, timeout=30)
    try:
        yield connection
    finally:
        connection.close()


class Download:
    """A NAR being downloaded, of which the first bytes have arrived."""

    def __init__(self, proxy: DaemonProcess, threads: ThreadPoolExecutor) -> None:
        answer = urllib.request.urlopen(  # noqa: S310 - http, on loopback
            proxy.url + nar_url(proxy, LARGE), timeout=30
        )
        with_first = answer.read(1000)

        def rest() -> bytes:
            with answer:
                body: bytes = with_first + answer.read()
            return body

        self.body: Future[bytes] = threads.submit(rest)


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    """Return threads for clients."""
    with ThreadPoolExecutor() as pool:
        yield pool


@pytest.fixture
def slow(
    threaded_sim: RunSimulator, daemon: RunDaemon, threads: ThreadPoolExecutor
) -> Iterator[tuple[DaemonProcess, Download, Gate]]:
    """Return a daemon, a download through it that stands half way, and the gate it stands at."""
    upstream = threaded_sim(LARGE)
    gate = Gate(500_000)
    upstream.fault("/nar/", gate)
    proxy = daemon(upstream.url)
    yield proxy, Download(proxy, threads), gate
    gate.open()


def until_refused(proxy: DaemonProcess) -> None:
    """Return once the daemon takes no more connections."""
    place = urlsplit(proxy.url)
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            socket.create_connection((place.hostname or "", place.port or 0), timeout=5).close()
        except ConnectionRefusedError:
            return
        time.sleep(0.01)
    raise AssertionError("it still takes connections")


# --- the end ------------------------------------------------------------------------------------


@STOP_SIGNALS
def test_an_idle_daemon_stops_at_once(stop: signal.Signals, daemon: RunDaemon) -> None:
    """Told to stop with nothing to do, it ends within moments, with status 0."""
    proxy = daemon()
    began = time.monotonic()
    proxy.signal(stop)
    assert proxy.wait() == 0
    assert time.monotonic() - began < 3
    assert proxy.logged("stopping")


def test_idle_connections_hold_nobody_up(daemon: RunDaemon) -> None:
    """Clients that keep connections open, used or never used, do not delay the end."""
    proxy = daemon()
    with connected(proxy) as used, connected(proxy) as unused:
        used.request("GET", "/nix-cache-info")
        assert used.getresponse().read()
        unused.connect()
        began = time.monotonic()
        assert proxy.stop() == 0
        assert time.monotonic() - began < 3


@STOP_SIGNALS
def test_a_download_under_way_is_finished(
    stop: signal.Signals, slow: tuple[DaemonProcess, Download, Gate]
) -> None:
    """Told to stop in the middle of a download, it delivers the rest of it, then ends with 0."""
    proxy, download, gate = slow
    proxy.signal(stop)
    until_refused(proxy)
    gate.open()
    assert download.body.result(timeout=30) == bytes(LARGE.nar)
    assert proxy.wait() == 0


def test_what_was_finished_while_stopping_is_kept(
    slow: tuple[DaemonProcess, Download, Gate],
) -> None:
    """A NAR that arrived whole while the daemon stopped is in the store afterwards."""
    proxy, download, gate = slow
    proxy.signal(signal.SIGTERM)
    until_refused(proxy)
    gate.open()
    assert download.body.result(timeout=30) == bytes(LARGE.nar)
    assert proxy.wait() == 0
    assert [file.read_bytes() for file in proxy.store.glob("nar/*")] == [bytes(LARGE.nar)]
    assert [file.name for file in proxy.store.glob("*.narinfo")] == [f"{LARGE.hash_part}.narinfo"]


def test_a_download_that_does_not_end_is_cut(
    slow: tuple[DaemonProcess, Download, Gate],
) -> None:
    """A download that takes longer than ``shutdown_timeout`` is cut, never ended as if complete."""
    proxy, download, _ = slow
    began = time.monotonic()
    assert proxy.stop() == 0
    took = time.monotonic() - began
    assert SHUTDOWN_TIMEOUT * 0.9 < took < SHUTDOWN_TIMEOUT + 3
    with pytest.raises((IncompleteRead, ConnectionError)):
        download.body.result(timeout=30)
    assert list(proxy.store.glob("nar/*")) == []


def test_while_stopping_the_answer_is_not_ready(
    slow: tuple[DaemonProcess, Download, Gate],
) -> None:
    """On a connection that was open before, it still answers, says it is stopping, and closes."""
    proxy, download, gate = slow
    with connected(proxy) as open_before:
        open_before.request("GET", "/nix-cache-info")
        assert open_before.getresponse().read()
        open_before.request("GET", "/readyz")  # on its way when the signal comes
        assert open_before.getresponse().status == 200
        proxy.signal(signal.SIGTERM)
        proxy.wait_for_log("stopping")
        try:
            open_before.request("GET", "/readyz")
            answer = open_before.getresponse()
        except (HTTPException, ConnectionError):
            pass  # idle connections may be closed at once: that is an answer, too
        else:
            assert answer.status == 503
            assert answer.getheader("Connection") == "close"
    gate.open()
    download.body.result(timeout=30)
    assert proxy.wait() == 0


def test_a_second_signal_changes_nothing(slow: tuple[DaemonProcess, Download, Gate]) -> None:
    """Told to stop again and again, it still delivers what is under way."""
    proxy, download, gate = slow
    for _ in range(3):
        proxy.signal(signal.SIGTERM)
        proxy.signal(signal.SIGINT)
        proxy.signal(signal.SIGHUP)
    until_refused(proxy)
    gate.open()
    assert download.body.result(timeout=30) == bytes(LARGE.nar)
    assert proxy.wait() == 0


def test_a_lookup_under_way_is_answered(
    threaded_sim: RunSimulator, daemon: RunDaemon, threads: ThreadPoolExecutor
) -> None:
    """A narinfo that was asked for before the signal is answered after it."""
    upstream = threaded_sim(LARGE)
    gate = Gate(None)
    upstream.fault("*.narinfo", gate)
    proxy = daemon(upstream.url)
    answer = threads.submit(proxy.get, LARGE.narinfo_path)
    gate.reached.block()
    proxy.signal(signal.SIGTERM)
    until_refused(proxy)
    gate.open()
    assert answer.result(timeout=30).startswith(b"StorePath: ")
    assert proxy.wait() == 0


# --- during the start ---------------------------------------------------------------------------


def exists(path: Callable[[DaemonProcess], Path]) -> Callable[[DaemonProcess], None]:
    """Make a function that waits until a file is there."""

    def wait(proxy: DaemonProcess) -> None:
        deadline = time.monotonic() + 30
        while not path(proxy).exists():
            assert time.monotonic() < deadline
            assert proxy.process.poll() is None
            threading.Event().wait(0.001)

    return wait


MOMENTS: dict[str, Callable[[DaemonProcess], None]] = {
    "at-once": lambda _: None,
    "store-made": exists(lambda proxy: proxy.store),
    "store-locked": exists(lambda proxy: proxy.store / ".state" / "lock"),
    "store-described": exists(lambda proxy: proxy.store / "nix-cache-info"),
}


@pytest.mark.parametrize(
    ("moment", "stop"),
    [*((moment, signal.SIGTERM) for moment in MOMENTS), ("store-locked", signal.SIGKILL)],
)
def test_a_signal_during_the_start_is_obeyed(
    moment: str, stop: signal.Signals, daemon: RunDaemon
) -> None:
    """Stopped while it starts, it ends soon and leaves a store that the next start uses."""
    proxy = daemon(ready=False)
    MOMENTS[moment](proxy)
    began = time.monotonic()
    proxy.signal(stop)
    assert proxy.wait() in {0, -stop}
    assert time.monotonic() - began < 5
    proxy.start()
    assert proxy.get("/readyz") == b"ready\n"
    assert proxy.stop() == 0
