"""Commands that go with a daemon, as a user types them."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from proxy import __version__
from tests.closures import StoreEntry
from tests.conftest import RunDaemon, RunSimulator, let_everybody_in
from tests.test_cli import assert_failed, run

ENTRY = StoreEntry.make("hello-1.0")


AS_NOBODY = """
import contextlib, io, os, sys
from proxy import cli
arguments = sys.argv
sys.argv = [arguments[0], "status", "--store", "/dev/null"]
with contextlib.suppress(SystemExit), contextlib.redirect_stderr(io.StringIO()):
    cli.main()  # imports whatever is imported late, as long as we may read it
sys.argv = arguments
os.setgroups([])
os.setgid(65534)
os.setuid(65534)
cli.main()
"""


def run_as_nobody(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run a command as a user that owns nothing; skips the test where only root could."""
    if os.geteuid() != 0:
        pytest.skip("only root can be another user")
    return subprocess.run(
        [sys.executable, "-c", AS_NOBODY, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
        cwd=Path(__file__).parents[1],
    )


# --- reaching the daemon ------------------------------------------------------------------------


def test_status_of_a_running_daemon(
    daemon: RunDaemon, threaded_sim: RunSimulator, tmp_path: Path
) -> None:
    """``status`` finds the daemon by its configuration, and says what it is and has."""
    upstream = threaded_sim(ENTRY)
    proxy = daemon(upstream.url)

    shown = run("status", "--config", proxy.config_file, cwd=tmp_path)
    assert (shown.returncode, shown.stderr) == (0, "")
    for word in (str(proxy.process.pid), __version__, proxy.addresses[0], upstream.url):
        assert word in shown.stdout

    told = json.loads(run("status", "--store", proxy.store, "--json", cwd=tmp_path).stdout)
    assert (told["pid"], told["store"]) == (proxy.process.pid, str(proxy.store))
    assert told["upstreams"] == [{"name": "up0", "url": upstream.url}]


def test_no_daemon_is_said(daemon: RunDaemon, tmp_path: Path) -> None:
    """Without a daemon, and after one was killed, ``status`` ends with 1 and one line."""
    nowhere = tmp_path / "nowhere"
    done = run("status", "--store", nowhere, cwd=tmp_path)
    assert_failed(done, 1, f"no daemon runs on {nowhere}")
    assert not nowhere.exists()

    proxy = daemon()
    proxy.kill()
    done = run("status", "--store", proxy.store, cwd=tmp_path)
    assert_failed(done, 1, f"no daemon runs on {proxy.store}")
    proxy.start()
    assert run("status", "--store", proxy.store, cwd=tmp_path).returncode == 0


def test_a_daemon_that_stops_leaves_no_socket(daemon: RunDaemon) -> None:
    """A daemon that was stopped in good order takes its socket along."""
    proxy = daemon()
    assert (proxy.store / ".state" / "control.sock").is_socket()
    assert proxy.stop() == 0
    assert not (proxy.store / ".state" / "control.sock").exists()


def test_a_store_with_a_long_name_has_commands(daemon: RunDaemon, tmp_path: Path) -> None:
    """A store folder whose name no socket can have is reached like any other."""
    store = tmp_path.joinpath(*["long" * 20] * 10)
    daemon(arguments=["serve", "--listen", "127.0.0.1:0", "--store", str(store)])
    done = run("status", "--store", store, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")


def test_somebody_elses_daemon_is_out_of_reach(daemon: RunDaemon, tmp_path: Path) -> None:
    """Another user's command is turned away with 1 and one line."""
    proxy = daemon()
    let_everybody_in(proxy.store / ".state")
    done = run_as_nobody("status", "--store", proxy.store)
    assert_failed(done, 1, "cannot be asked", "Permission denied")


def test_without_a_socket_it_serves_all_the_same(daemon: RunDaemon) -> None:
    """Where no socket can be made the daemon says so, and serves."""
    proxy = daemon(ready=False)
    proxy.kill()
    blocker = proxy.store / ".state" / "control.sock"
    blocker.unlink(missing_ok=True)
    blocker.mkdir(parents=True, exist_ok=True)
    proxy.start()
    assert proxy.logged("commands cannot reach this daemon")
    assert proxy.get("/readyz") == b"ready\n"


def test_a_foreign_socket_is_no_daemon(tmp_path: Path) -> None:
    """What answers something else than a daemon would is not believed."""
    store = tmp_path / "store"
    (store / ".state").mkdir(parents=True)
    with socket.socket(socket.AF_UNIX) as foreign:
        foreign.bind(str(store / ".state" / "control.sock"))
        assert foreign.fileno() >= 0  # bound, and nobody listens
        done = run("status", "--store", store, cwd=tmp_path)
    assert_failed(done, 1, "no daemon runs on")
