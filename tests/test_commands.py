"""Commands that go with a daemon, as a user types them."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from proxy import __version__
from tests.closures import SigningKey, StoreEntry, closure
from tests.conftest import RunDaemon, RunSimulator, let_everybody_in
from tests.daemon import DaemonProcess
from tests.faults import Reset
from tests.folder_oracle import complete_paths
from tests.nix_client import NixClient
from tests.test_cli import ABSENT, assert_failed, run, status
from tests.waiting import eventually

ENTRY = StoreEntry.make("hello-1.0")


AS_NOBODY = """
import contextlib, io, os, sys
from proxy import cli
from proxy.cli import alone, daemon  # imported late, and here as long as we may read them
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
    assert told["upstreams"] == [{"name": "up0", "url": upstream.url, "asked": True}]


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


def test_commands_work_again_after_the_state_was_deleted(
    daemon: RunDaemon, threaded_sim: RunSimulator
) -> None:
    """Who deletes .state under a daemon has lock and socket again in a moment, and nothing is lost."""
    proxy = daemon(threaded_sim(*CLOSURE).url)
    keep_all(proxy)
    shutil.rmtree(proxy.store / ".state")
    lock, control = (proxy.store / ".state" / name for name in ("lock", "control.sock"))
    eventually(lambda: lock.exists() and control.exists())
    assert "fetching  0" in on(proxy, "status").stdout
    assert pins_of(proxy)["mine"]["missing"] == 0
    assert proxy.get(ROOT.narinfo_path)
    assert_failed(on(proxy, "serve"), 1, f"(process {proxy.process.pid})", lines=3)

    proxy.stop()
    assert not control.exists()
    assert pins_of(proxy.start())["mine"]["missing"] == 0


def test_a_foreign_socket_is_no_daemon(tmp_path: Path) -> None:
    """What answers something else than a daemon would is not believed."""
    store = tmp_path / "store"
    (store / ".state").mkdir(parents=True)
    with socket.socket(socket.AF_UNIX) as foreign:
        foreign.bind(str(store / ".state" / "control.sock"))
        assert foreign.fileno() >= 0  # bound, and nobody listens
        done = run("status", "--store", store, cwd=tmp_path)
    assert_failed(done, 1, "no daemon runs on")


# --- modes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [1, 2])
def test_the_mode_can_change(workers: int, daemon: RunDaemon, threaded_sim: RunSimulator) -> None:
    """Offline, nobody is asked from then on; auto, they are again; and a reload takes the file's word."""
    upstream = threaded_sim(ENTRY)
    proxy = daemon(upstream.url, workers=workers)
    assert on(proxy, "mode").stdout == "auto\n"

    assert on(proxy, "mode", "offline").stdout == "offline\n"
    assert status(proxy.url + ENTRY.narinfo_path) == 404
    assert upstream.requests == []
    assert on(proxy, "mode").stdout == "offline\n"
    assert "mode      offline" in on(proxy, "status").stdout

    assert on(proxy, "mode", "auto").returncode == 0
    assert proxy.get(ENTRY.narinfo_path)

    on(proxy, "mode", "strict")
    upstream.fault("/", Reset())
    assert status(proxy.url + ABSENT) == 502
    proxy.signal(signal.SIGHUP)
    proxy.wait_for_log("the configuration was read again and is in force")
    assert on(proxy, "mode").stdout == "auto\n"


def test_modes_that_there_are(daemon: RunDaemon, tmp_path: Path) -> None:
    """Another word is wrong usage; without a daemon there is no mode."""
    assert_failed(on(daemon(), "mode", "airplane"), 2, "airplane", "offline", lines=5)
    assert_failed(run("mode", "--store", tmp_path / "x", cwd=tmp_path), 1, "no daemon runs")


# --- pins ---------------------------------------------------------------------------------------

CLOSURE = closure(12, depth=4, sizes=(1_000, 60_000))
ROOT = CLOSURE[0]
OTHER = StoreEntry.make("other-1.0", b"x" * 300_000, compression="none")


def on(proxy: DaemonProcess, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run a command for a daemon's store, running or not."""
    return run(*arguments, "--config", proxy.config_file, cwd=proxy.folder)


def pins_of(proxy: DaemonProcess) -> dict[str, dict[str, Any]]:
    """Return what is pinned, by name."""
    told = json.loads(on(proxy, "pins", "--json").stdout)
    return {pin["name"]: pin for pin in told["pins"]}


def keep_all(proxy: DaemonProcess) -> None:
    """Pin the closure."""
    done = on(proxy, "pin", "mine", ROOT.store_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"pinned mine: {len(CLOSURE)} paths, ")


def test_a_pin_keeps_a_whole_closure(
    daemon: RunDaemon, threaded_sim: RunSimulator, nix: NixClient
) -> None:
    """What is pinned is fetched, survives any gc, and is all that Nix needs when upstreams are gone."""
    upstream = threaded_sim(*CLOSURE, OTHER)
    proxy = daemon(upstream.url)
    keep_all(proxy)
    assert proxy.get(f"/nar/{OTHER.hash_part}-{OTHER.nar_hash}.nar")
    done = on(proxy, "gc", "--max-size", "0")
    assert OTHER.store_path in done.stdout
    assert "removed 1 file," in done.stdout

    upstream.fault("/", Reset())
    assert nix.copy_from(proxy.url, ROOT.store_path).returncode == 0
    assert len(nix.installed()) == len(CLOSURE)
    assert complete_paths(proxy.store, [SigningKey("test-cache-1")]) == {
        each.hash_part for each in CLOSURE
    }


def test_a_pin_survives_everything_but_unpin(daemon: RunDaemon, threaded_sim: RunSimulator) -> None:
    """Pins are there after kill -9, and after .state was deleted; unpin ends them."""
    proxy = daemon(threaded_sim(*CLOSURE).url)
    keep_all(proxy)
    proxy.kill()
    shutil.rmtree(proxy.store / ".state")
    assert on(proxy, "gc", "--max-size", "0").stdout.startswith("removed 0 files")
    proxy.start()
    assert on(proxy, "gc", "--max-size", "0").stdout.startswith("removed 0 files")
    assert pins_of(proxy)["mine"]["missing"] == 0

    assert on(proxy, "unpin", "mine").stdout == "unpinned mine\n"
    assert pins_of(proxy) == {}
    assert f"removed {len(CLOSURE)} files" in on(proxy, "gc", "--max-size", "0").stdout
    assert not list(proxy.store.glob("*.narinfo"))


def test_pins_are_listed(daemon: RunDaemon, threaded_sim: RunSimulator) -> None:
    """The list says names, roots, sizes as du counts them, and what is missing."""
    proxy = daemon(threaded_sim(*CLOSURE, OTHER).url)
    assert on(proxy, "pins").stdout == ""
    keep_all(proxy)
    on(proxy, "pin", "other", OTHER.store_path)
    files = [*proxy.store.glob("*.narinfo"), *(proxy.store / "nar").iterdir()]
    shown = pins_of(proxy)

    assert shown["mine"]["roots"] == [ROOT.store_path]
    assert shown["mine"]["paths"] == len(CLOSURE)
    assert sum(pin["bytes"] for pin in shown.values()) == sum(
        path.stat().st_blocks * 512 for path in files
    )
    text = on(proxy, "pins").stdout
    for word in ("mine ", "other", ROOT.store_path, f"{len(CLOSURE)} paths", "1 path"):
        assert word in text


def test_what_is_missing_of_a_pin_is_said_and_fetched_again(
    daemon: RunDaemon, threaded_sim: RunSimulator
) -> None:
    """Where somebody deleted a part of a pin, the list names it, and the next daemon fetches it again."""
    upstream = threaded_sim(*CLOSURE)
    proxy = daemon(upstream.url)
    keep_all(proxy)
    proxy.stop()
    leaf = CLOSURE[-1]
    (proxy.store / f"{leaf.hash_part}.narinfo").unlink()
    shutil.rmtree(proxy.store / "nar")
    shutil.rmtree(proxy.store / ".state")

    shown = on(proxy, "pins").stdout
    assert f"{len(CLOSURE)} of them missing" in shown
    assert f"missing: {leaf.store_path}\n" in shown

    nar = upstream.files.pop(leaf.nar_path)
    proxy.start()
    (warning,) = proxy.wait_for_log("pins are not whole")
    assert (warning["level"], warning["missing"]) == ("warning", "1 path")
    assert f"missing: cannot keep {leaf.store_path}: " in on(proxy, "pins").stdout
    assert [each["path"] for each in pins_of(proxy)["mine"]["lacking"]] == [leaf.store_path]
    proxy.stop()

    upstream.files[leaf.nar_path] = nar
    proxy.start()
    eventually(lambda: not pins_of(proxy)["mine"]["missing"])
    assert pins_of(proxy)["mine"]["lacking"] == []


def test_a_pin_that_cannot_be_made_changes_nothing(
    daemon: RunDaemon, threaded_sim: RunSimulator
) -> None:
    """When one path of a closure cannot be had, the reason names it, and the old pin stays."""
    upstream = threaded_sim(*CLOSURE, OTHER)
    proxy = daemon(upstream.url)
    on(proxy, "pin", "mine", OTHER.store_path)
    before = pins_of(proxy)
    leaf = CLOSURE[-1]
    del upstream.files[leaf.nar_path]

    done = on(proxy, "pin", "mine", ROOT.store_path)
    assert_failed(done, 1, "cannot keep", leaf.store_path)
    assert pins_of(proxy) == before
    assert on(proxy, "gc", "--max-size", "0").returncode == 0
    assert pins_of(proxy)["mine"]["missing"] == 0


def test_a_pin_too_large_for_the_limits_is_refused(
    daemon: RunDaemon, threaded_sim: RunSimulator
) -> None:
    """What does not fit below max_size is refused with one line and before anything is fetched."""
    upstream = threaded_sim(OTHER)
    proxy = daemon(upstream.url, limits="max_size = 300000")
    done = on(proxy, "pin", "other", OTHER.store_path)
    assert_failed(done, 1, "cannot pin other", "max_size = 293.0 KiB")
    assert upstream.gets("/nar/") == 0
    assert pins_of(proxy) == {}


def test_limits_smaller_than_what_is_pinned_are_said(
    daemon: RunDaemon, threaded_sim: RunSimulator
) -> None:
    """A limit that was made smaller than the pins is a warning at start, and nothing pinned goes."""
    upstream = threaded_sim(OTHER)
    proxy = daemon(upstream.url)
    on(proxy, "pin", "other", OTHER.store_path)
    proxy.stop()
    proxy.configure(
        upstreams=[upstream.url],
        keys=[SigningKey("test-cache-1").public],
        limits="max_size = 300000",
    )
    proxy.start()
    (warning,) = proxy.wait_for_log("more is pinned than max_size leaves room for")
    assert warning["level"] == "warning"
    assert pins_of(proxy)["other"]["missing"] == 0
    assert proxy.get("/readyz") == b"ready\n"


def test_a_pin_without_a_daemon(daemon: RunDaemon, threaded_sim: RunSimulator) -> None:
    """Without a daemon what is here can be pinned, and what is not says that it takes one."""
    proxy = daemon(threaded_sim(*CLOSURE, OTHER).url)
    keep_all(proxy)
    proxy.stop()
    assert on(proxy, "unpin", "mine").returncode == 0
    keep_all(proxy)
    done = on(proxy, "pin", "other", OTHER.store_path)
    assert_failed(done, 1, OTHER.store_path, "no daemon runs")
    assert set(pins_of(proxy)) == {"mine"}


def test_links_and_files_in_paths_are_pinned(
    daemon: RunDaemon, threaded_sim: RunSimulator, tmp_path: Path
) -> None:
    """A link such as ./result, and something inside of a path, stand for the store path."""
    proxy = daemon(threaded_sim(OTHER).url)
    link = tmp_path / "result"
    link.symlink_to(OTHER.store_path)
    for path in (str(link), f"{OTHER.store_path}/bin/x", f"{OTHER.store_path}/"):
        assert on(proxy, "pin", "other", path).returncode == 0
        assert pins_of(proxy)["other"]["roots"] == [OTHER.store_path]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["pin", "a/b", OTHER.store_path], ["a/b", "no name for a pin"]),
        (["pin", ".hidden", OTHER.store_path], [".hidden"]),
        (["pin", "x" * 101, OTHER.store_path], ["at most 100"]),
        (["pin", "name", "/etc/passwd"], ["/etc/passwd", "no store path"]),
        (["pin", "name"], ["PATH"]),
        (["gc", "--max-size", "much"], ["--max-size", "much"]),
        (["gc", "--older-than", "-1d"], ["--older-than"]),
    ],
    ids=["slash", "dot", "long", "path", "none", "size", "age"],
)
def test_wrong_usage(arguments: list[str], words: list[str], tmp_path: Path) -> None:
    """What cannot be meant ends with 2 before any daemon is asked."""
    done = run(*arguments, "--store", tmp_path / "store", cwd=tmp_path)
    assert_failed(done, 2, *words, lines=5)
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("/nix/store/short", "32 digits"),
        (f"/nix/store/{OTHER.hash_part}-another-name", OTHER.store_path),
        (f"/nix/store/{'0' * 32}-absent", "no upstream has"),
    ],
    ids=["malformed", "other-name", "absent"],
)
def test_what_cannot_be_pinned_is_said(
    path: str, reason: str, daemon: RunDaemon, threaded_sim: RunSimulator
) -> None:
    """A path that is none, has another name, or is nowhere: one line, exit 1."""
    proxy = daemon(threaded_sim(OTHER).url)
    assert_failed(on(proxy, "pin", "name", path), 1, path, reason)
    assert pins_of(proxy) == {}


def test_unpin_of_nothing(daemon: RunDaemon) -> None:
    """A pin that is not there cannot be removed."""
    assert_failed(on(daemon(), "unpin", "nothing"), 1, "there is no pin nothing")


# --- gc -----------------------------------------------------------------------------------------


def test_a_dry_run_says_what_would_go(daemon: RunDaemon, threaded_sim: RunSimulator) -> None:
    """A dry run lists paths and sizes, which are then what goes; du agrees with what was freed."""
    proxy = daemon(threaded_sim(*CLOSURE).url)
    on(proxy, "pin", "mine", ROOT.store_path)
    on(proxy, "unpin", "mine")
    before = files_of(proxy.store)

    planned = json.loads(on(proxy, "gc", "--dry-run", "--max-size", "0", "--json").stdout)
    assert files_of(proxy.store) == before
    assert {each["path"] for each in planned["gone"]} == {each.store_path for each in CLOSURE}
    assert planned["bytes"] == sum(before.values())
    done = json.loads(on(proxy, "gc", "--max-size", "0", "--json").stdout)
    assert (done["gone"], done["bytes"]) == (planned["gone"], planned["bytes"])
    assert files_of(proxy.store) == {}


def files_of(store: Path) -> dict[str, int]:
    """Return the cached files and what they take."""
    files = [*store.glob("*.narinfo"), *(store / "nar").iterdir()]
    return {path.name: path.stat().st_blocks * 512 for path in files}


def test_gc_goes_to_the_low_mark(daemon: RunDaemon, threaded_sim: RunSimulator) -> None:
    """Without more said, gc goes where eviction would end, and not further."""
    entries = [
        StoreEntry.make(f"path-{n}", os.urandom(200_000), compression="none") for n in range(10)
    ]
    limit = 2_600_000
    proxy = daemon(threaded_sim(*entries).url, limits=f"max_size = {limit}")
    for entry in entries:
        proxy.get(f"/nar/{entry.hash_part}-{entry.nar_hash}.nar")
    proxy.stop()  # no eviction comes in between
    told = json.loads(on(proxy, "gc", "--json").stdout)

    assert told["before"] - told["bytes"] <= limit * 0.9
    assert told["before"] - told["bytes"] > limit * 0.9 - 250_000
    again = json.loads(on(proxy, "gc", "--json").stdout)
    assert again["files"] == 0


def test_gc_by_age(daemon: RunDaemon, threaded_sim: RunSimulator) -> None:
    """What was used within the time that is said stays."""
    proxy = daemon(threaded_sim(OTHER).url)
    proxy.get(f"/nar/{OTHER.hash_part}-{OTHER.nar_hash}.nar")
    proxy.wait_for_log("stored")
    assert on(proxy, "gc", "--older-than", "1h").stdout.startswith("removed 0 files")
    proxy.stop()
    with (
        contextlib.closing(sqlite3.connect(proxy.store / ".state" / "index.sqlite")) as index,
        index,
    ):
        index.execute("UPDATE used SET at = at - 7200")
    assert "removed 1 file," in on(proxy, "gc", "--older-than", "1h").stdout


def test_what_is_being_read_survives_gc(daemon: RunDaemon, threaded_sim: RunSimulator) -> None:
    """A NAR on its way to a client is not removed; it is when the client is done."""
    large = StoreEntry.make("large", os.urandom(20_000_000), compression="none")
    proxy = daemon(threaded_sim(large).url)
    target = f"/nar/{large.hash_part}-{large.nar_hash}.nar"
    proxy.get(target)
    proxy.wait_for_log("stored")
    with urllib.request.urlopen(proxy.url + target, timeout=60) as answer:  # noqa: S310 - http
        begun = answer.read(1_000)
        assert on(proxy, "gc", "--max-size", "0").stdout.startswith("removed 0 files")
        assert begun + answer.read() == bytes(large.file)
    assert "removed 1 file," in on(proxy, "gc", "--max-size", "0").stdout


# --- stores that are somebody else's --------------------------------------------------------------


def test_somebody_elses_store_is_left_alone(tmp_path: Path) -> None:
    """A folder of another user is refused with one line, also where we could write to it."""
    if os.geteuid() != 0:
        pytest.skip("only root can give folders away")
    store = tmp_path / "store"
    store.mkdir(mode=0o777)
    os.chown(store, 65534, 65534)
    done = run("serve", "--listen", "127.0.0.1:0", "--store", store, cwd=tmp_path)
    assert_failed(done, 1, str(store), "belongs to user 65534")
    assert list(store.iterdir()) == []


def test_a_store_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    """A user without the right to write gets one line, and nothing is changed."""
    store = tmp_path / "store"
    store.mkdir()
    let_everybody_in(store)
    done = run_as_nobody("serve", "--listen", "127.0.0.1:0", "--store", store / "below")
    assert_failed(done, 1, str(store), "Permission denied")
    assert list(store.iterdir()) == []


@pytest.mark.parametrize("command", [["gc"], ["pins"], ["verify"], ["pin", "x", OTHER.store_path]])
def test_a_store_that_is_none(command: list[str], tmp_path: Path) -> None:
    """Where there is no store, or a file has its name: one line, and nothing is made or changed."""
    file = tmp_path / "file"
    file.write_text("mine")
    assert_failed(run(*command, "--store", file, cwd=tmp_path), 1, str(file), "is no folder")
    absent = tmp_path / "absent"
    done = run(*command, "--store", absent, cwd=tmp_path)
    assert_failed(done, 1, f"no daemon runs on {absent}, and there is no store")
    assert file.read_text() == "mine"
    assert list(tmp_path.iterdir()) == [file]


def test_the_list_of_commands_is_readable(tmp_path: Path) -> None:
    """Each command has a line of its own that is not cut off."""
    shown = run("--help", cwd=tmp_path).stdout
    assert "verify        Check everything in the store; take out what is damaged." in shown
    assert "..." not in shown.partition("Commands:")[2]


def test_a_size_that_is_none(tmp_path: Path) -> None:
    """A max_size that is no size: one line with file, line and key, and no store is made."""
    file = tmp_path / "config.toml"
    file.write_text(f'[store]\npath = "{tmp_path}/store"\nmax_size = "plenty"\n')
    for command in (["serve"], ["gc"], ["pins"]):
        done = run(*command, "--config", file, cwd=tmp_path)
        assert_failed(done, 2, f"{file}:3: store.max_size:", "plenty")
    assert not (tmp_path / "store").exists()
