"""What a service manager is told and what it passes: sd_notify(3) and sd_listen_fds(3)."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import sys
import tempfile
import time
import urllib.request
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.closures import SigningKey, StoreEntry
from tests.conftest import RunDaemon, RunSimulator
from tests.daemon import DaemonProcess

ENTRY = StoreEntry.make("hello-1.0")

PASSING = """
import os, sys
count, descriptors = int(sys.argv[1]), [int(number) for number in sys.argv[2].split(",")]
high = [os.dup2(fd, 100 + place) for place, fd in enumerate(descriptors)]  # none is overwritten
for place, fd in enumerate(high):
    os.dup2(fd, 3 + place)
    os.close(fd)
os.environ["LISTEN_FDS"], os.environ["LISTEN_PID"] = str(count), str(os.getpid())
os.execvp(sys.argv[3], sys.argv[3:])
"""
"""What systemd does between fork and exec: descriptors from 3 on, and two variables."""


def passing(*sockets: socket.socket) -> dict[str, Any]:
    """Return options of a daemon that gets these sockets as systemd passes them."""
    numbers = [each.fileno() for each in sockets]
    listed = ",".join(map(str, numbers))
    wrapper = (sys.executable, "-c", PASSING, str(len(numbers)), listed)
    return {"wrapper": wrapper, "pass_fds": numbers}


class Manager:
    """The end of ``NOTIFY_SOCKET`` that the service manager holds."""

    def __init__(self, channel: socket.socket, address: str) -> None:
        channel.settimeout(30)
        self._channel = channel
        self.environment = {"NOTIFY_SOCKET": address}

    def next(self) -> list[str]:
        """Wait for the next message; return its lines."""
        return self._channel.recv(4096).decode().split("\n")

    def rest(self) -> list[list[str]]:
        """Return the messages that have come already."""
        messages = []
        self._channel.settimeout(0)
        with contextlib.suppress(BlockingIOError):
            while True:
                messages.append(self._channel.recv(4096).decode().split("\n"))
        self._channel.settimeout(30)
        return messages


@pytest.fixture
def manager(request: pytest.FixtureRequest) -> Iterator[Manager]:
    """Return a service manager that listens on a path, or else on an abstract address."""
    with (
        tempfile.TemporaryDirectory(prefix="ncp") as folder,
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel,
    ):
        name = f"ncp-{uuid.uuid4().hex}"
        by_path = getattr(request, "param", "path") == "path"
        bound = f"{folder}/notify" if by_path else f"\0{name}"
        channel.bind(bound)
        yield Manager(channel, bound.replace("\0", "@"))


def status(url: str) -> int:
    """Return the status of an answer that is no failure."""
    with urllib.request.urlopen(url, timeout=30) as answer:  # noqa: S310 - http, on loopback
        return int(answer.status)


# --- sd_notify ----------------------------------------------------------------------------------


@pytest.mark.parametrize("manager", ["path", "abstract"], indirect=True)
def test_ready_is_told_when_it_answers(manager: Manager, daemon: RunDaemon) -> None:
    """``READY=1`` comes when clients are answered, and not before."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = "127.0.0.1:{1}".format(*listener.getsockname())
        daemon(environment=manager.environment, ready=False, **passing(listener))
        assert manager.next() == ["READY=1"]
        assert status(f"http://{address}/readyz") == 200


def test_ready_is_told_once(manager: Manager, daemon: RunDaemon) -> None:
    """Nothing but ``READY=1`` is told by a start."""
    proxy = daemon(environment=manager.environment)
    proxy.get("/readyz")
    assert manager.next() == ["READY=1"]
    assert manager.rest() == []


def test_stopping_is_told(manager: Manager, daemon: RunDaemon) -> None:
    """``STOPPING=1`` comes with SIGTERM, before the end."""
    proxy = daemon(environment=manager.environment)
    assert manager.next() == ["READY=1"]
    assert proxy.stop() == 0
    assert manager.rest() == [["STOPPING=1"]]


def test_a_reload_is_told_from_beginning_to_end(manager: Manager, daemon: RunDaemon) -> None:
    """SIGHUP tells ``RELOADING=1`` with the time of it, then ``READY=1``: Type=notify-reload."""
    proxy = daemon(environment=manager.environment)
    assert manager.next() == ["READY=1"]
    before = time.monotonic_ns() // 1000
    proxy.signal(signal.SIGHUP)
    reloading, moment = manager.next()
    assert reloading == "RELOADING=1"
    name, _, microseconds = moment.partition("=")
    assert name == "MONOTONIC_USEC"
    assert before <= int(microseconds) <= time.monotonic_ns() // 1000
    assert manager.next() == ["READY=1"]


def test_a_reload_that_fails_is_told_as_ended(manager: Manager, daemon: RunDaemon) -> None:
    """After a bad file ``READY=1`` comes, too: the old configuration is in force and serves."""
    proxy = daemon(environment=manager.environment)
    assert manager.next() == ["READY=1"]
    proxy.config_file.write_text("nonsense")
    proxy.signal(signal.SIGHUP)
    assert manager.next()[0] == "RELOADING=1"
    assert manager.next() == ["READY=1"]
    assert proxy.get("/readyz") == b"ready\n"


def test_a_start_that_fails_tells_nothing(manager: Manager, daemon: RunDaemon) -> None:
    """A daemon that cannot listen never says that it is ready."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = "127.0.0.1:{1}".format(*taken.getsockname())
        proxy = daemon(listen=[address], environment=manager.environment, ready=False)
        assert proxy.wait() == 1
    proxy.log.clear()  # the reason is a line for people, not an entry of the log
    assert manager.rest() == []


def test_a_manager_that_is_gone_stops_nobody(daemon: RunDaemon, tmp_path: Path) -> None:
    """A ``NOTIFY_SOCKET`` on which nobody listens is no reason not to serve."""
    proxy = daemon(environment={"NOTIFY_SOCKET": str(tmp_path / "nobody")})
    assert proxy.get("/readyz") == b"ready\n"
    assert proxy.stop() == 0


# --- socket activation --------------------------------------------------------------------------


def test_a_passed_socket_is_served(threaded_sim: RunSimulator, daemon: RunDaemon) -> None:
    """A listening socket passed as descriptor 3 is served instead of the configured addresses."""
    upstream = threaded_sim(ENTRY)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = "127.0.0.1:{1}".format(*listener.getsockname())
        proxy = daemon(upstream.url, listen=["192.0.2.1:8627"], **passing(listener))
        assert proxy.addresses == [address]
        assert proxy.get(ENTRY.narinfo_path)


def test_several_passed_sockets_are_served(daemon: RunDaemon) -> None:
    """All passed sockets are served, TCP and Unix ones."""
    with (
        tempfile.TemporaryDirectory(prefix="ncp") as folder,
        socket.create_server(("127.0.0.1", 0)) as tcp,
        socket.create_server(("127.0.0.1", 0)) as other,
        socket.socket(socket.AF_UNIX) as unix,
    ):
        unix.bind(f"{folder}/proxy.sock")
        unix.listen()
        proxy = daemon(**passing(tcp, unix, other))
        assert sorted(proxy.addresses) == sorted(
            [
                "127.0.0.1:{1}".format(*tcp.getsockname()),
                "127.0.0.1:{1}".format(*other.getsockname()),
                f"unix:{folder}/proxy.sock",
            ]
        )
        for listener in (tcp, other):
            assert status("http://127.0.0.1:{1}/readyz".format(*listener.getsockname())) == 200
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(f"{folder}/proxy.sock")
            client.sendall(b"GET /readyz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            assert client.makefile("rb").readline() == b"HTTP/1.1 200 OK\r\n"


def test_who_connected_before_the_start_is_served(daemon: RunDaemon) -> None:
    """A client that systemd let in before the daemon ran gets its answer."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        early = socket.create_connection(listener.getsockname(), timeout=30)
        early.sendall(b"GET /nix-cache-info HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        daemon(**passing(listener))
        with early:
            assert early.makefile("rb").readline() == b"HTTP/1.1 200 OK\r\n"


def test_a_passed_socket_outlives_the_daemon(daemon: RunDaemon) -> None:
    """Stopping does not close the socket for its owner: the next start serves on it again."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        proxy = daemon(**passing(listener))
        assert proxy.stop() == 0
        waiting = socket.create_connection(listener.getsockname(), timeout=30)
        waiting.sendall(b"GET /readyz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        proxy.start()
        with waiting:
            assert waiting.makefile("rb").readline() == b"HTTP/1.1 200 OK\r\n"


def test_a_passed_unix_socket_keeps_its_file(daemon: RunDaemon) -> None:
    """The file of a Unix socket that systemd made is systemd's, and stays when we stop."""
    with (
        tempfile.TemporaryDirectory(prefix="ncp") as folder,
        socket.create_server(("127.0.0.1", 0)) as tcp,
        socket.socket(socket.AF_UNIX) as unix,
    ):
        path = Path(folder, "proxy.sock")
        unix.bind(str(path))
        unix.listen()
        proxy = daemon(**passing(tcp, unix))
        assert proxy.stop() == 0
        assert path.is_socket()


def test_sockets_for_another_process_are_not_taken(daemon: RunDaemon) -> None:
    """``LISTEN_PID`` of another process, inherited by mistake, means nothing."""
    environment = {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "1"}
    proxy = daemon(environment=environment)
    assert proxy.addresses[0].startswith("127.0.0.1:")
    assert proxy.get("/readyz") == b"ready\n"


@pytest.mark.needs("systemd-socket-activate")
def test_systemd_socket_activate_starts_it(tmp_path: Path, key: SigningKey) -> None:
    """Under the real ``systemd-socket-activate`` the first connection starts it and is answered."""
    program = shutil.which("systemd-socket-activate")
    assert program is not None
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    proxy = DaemonProcess(
        tmp_path / "daemon",
        keys=[key.public],
        wrapper=(program, f"--listen=127.0.0.1:{port}", "--setenv=PYTHONPATH"),
        environment={"PYTHONPATH": str(Path(__file__).parents[1])},
    )
    proxy.launch()
    try:
        proxy.wait_for_log("not JSON")  # the program's own "Listening on …"
        assert status(f"http://127.0.0.1:{port}/readyz") == 200
        proxy.await_ready()
        assert proxy.addresses == [f"127.0.0.1:{port}"]
        assert proxy.stop() == 0
    finally:
        if proxy.process.poll() is None:
            proxy.kill()
