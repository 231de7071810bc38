"""SIGHUP: a new configuration comes into force whole, or not at all, and disturbs nobody."""

from __future__ import annotations

import random
import re
import signal
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection

import pytest

from tests.closures import SigningKey, StoreEntry
from tests.conftest import RunDaemon, RunSimulator
from tests.daemon import DaemonProcess
from tests.faults import Gate, Status

FIRST = StoreEntry.make("first-1.0")
SECOND = StoreEntry.make("second-1.0")
LARGE = StoreEntry.make("large-1.0", random.Random(1).randbytes(1 << 20), compression="none")

TAKEN = "the configuration was read again and is in force"
REFUSED = "the new configuration was not taken; the old one is in force"


def reload(proxy: DaemonProcess) -> None:
    """Send SIGHUP, and wait until the daemon has said what came of it."""
    count = len(proxy.logged(TAKEN))
    proxy.signal(signal.SIGHUP)
    proxy.wait_for_log(TAKEN, count + 1)


def refused_reload(proxy: DaemonProcess) -> str:
    """Send SIGHUP, and return why the configuration was refused."""
    count = len(proxy.logged(REFUSED))
    proxy.signal(signal.SIGHUP)
    return str(proxy.wait_for_log(REFUSED, count + 1)[-1]["reason"])


def status(proxy: DaemonProcess, path: str) -> int:
    """Return the status of an answer."""
    try:
        with urllib.request.urlopen(proxy.url + path, timeout=30) as answer:  # noqa: S310 - http
            return int(answer.status)
    except urllib.error.HTTPError as error:
        with error:
            return error.code


def nar_url(proxy: DaemonProcess, entry: StoreEntry) -> str:
    """Ask for a narinfo, and return the path of its NAR."""
    found = re.search(r"^URL: (.*)$", proxy.get(entry.narinfo_path).decode(), re.MULTILINE)
    assert found is not None
    return f"/{found[1]}"


# --- what comes into force ----------------------------------------------------------------------


def test_new_upstreams_are_asked(
    threaded_sim: RunSimulator, daemon: RunDaemon, key: SigningKey
) -> None:
    """After SIGHUP the new upstreams are asked and the old ones are not, also about absent paths."""
    old, new = threaded_sim(FIRST), threaded_sim(SECOND)
    proxy = daemon(old.url)
    assert status(proxy, SECOND.narinfo_path) == 404
    proxy.configure(upstreams=[new.url], keys=[key.public])
    reload(proxy)
    old.reset_counts()
    assert status(proxy, SECOND.narinfo_path) == 200
    assert status(proxy, "/00000000000000000000000000000000.narinfo") == 404
    assert old.requests == []
    assert proxy.get(nar_url(proxy, SECOND)) == bytes(SECOND.file)


def test_new_keys_are_trusted(
    threaded_sim: RunSimulator, daemon: RunDaemon, key: SigningKey
) -> None:
    """A path that was refused for its signer is served once its signer is trusted."""
    upstream = threaded_sim(FIRST)
    proxy = daemon(upstream.url, keys=[SigningKey("other-1").public])
    assert status(proxy, FIRST.narinfo_path) == 404
    proxy.configure(upstreams=[upstream.url], keys=[key.public])
    reload(proxy)
    assert status(proxy, FIRST.narinfo_path) == 200
    assert key.public.encode() in proxy.get("/")


@pytest.mark.parametrize("stored", [False, True], ids=["narinfo", "nar"])
def test_keys_taken_away_are_trusted_no_more(
    stored: bool,  # noqa: FBT001 - pytest gives it by name
    threaded_sim: RunSimulator,
    daemon: RunDaemon,
) -> None:
    """What was kept on the word of a key is not served once the key is gone."""
    upstream = threaded_sim(FIRST)
    proxy = daemon(upstream.url)
    url = nar_url(proxy, FIRST)
    if stored:
        proxy.get(url)
        proxy.wait_for_log("stored")
    proxy.configure(upstreams=[upstream.url], keys=[SigningKey("other-1").public])
    reload(proxy)
    assert status(proxy, FIRST.narinfo_path) == 404


def test_a_new_policy_is_in_force(
    threaded_sim: RunSimulator, daemon: RunDaemon, key: SigningKey
) -> None:
    """``upstream_down`` may be changed, there and back."""
    upstream = threaded_sim(FIRST)
    upstream.fault("/", Status(500))
    proxy = daemon(upstream.url)
    answers = []
    for policy in ("not-found", "error", "not-found"):
        proxy.configure(
            upstreams=[upstream.url],
            keys=[key.public],
            config=f'[policy]\nupstream_down = "{policy}"',
        )
        reload(proxy)
        answers.append(status(proxy, FIRST.narinfo_path))
    assert answers == [404, 502, 404]


def test_what_is_cached_stays_hot(
    threaded_sim: RunSimulator, daemon: RunDaemon, key: SigningKey
) -> None:
    """What is in the store is served after SIGHUP without asking anyone."""
    upstream = threaded_sim(FIRST)
    proxy = daemon(upstream.url)
    url = nar_url(proxy, FIRST)
    assert proxy.get(url) == bytes(FIRST.file)
    proxy.wait_for_log("stored")
    reload(proxy)
    upstream.reset_counts()
    assert proxy.get(url) == bytes(FIRST.file)
    assert status(proxy, FIRST.narinfo_path) == 200
    assert upstream.requests == []


# --- what goes on -------------------------------------------------------------------------------


@pytest.mark.parametrize("reloads", [1, 3])
def test_downloads_go_on_undisturbed(
    reloads: int, threaded_sim: RunSimulator, daemon: RunDaemon, key: SigningKey
) -> None:
    """A download from an upstream that is configured no more is finished, and kept."""
    old, new = threaded_sim(LARGE), threaded_sim()
    gate = Gate(500_000)
    old.fault("/nar/", gate)
    proxy = daemon(old.url)
    url = nar_url(proxy, LARGE)
    with ThreadPoolExecutor() as threads:
        download = threads.submit(proxy.get, url)
        gate.reached.block()
        proxy.configure(upstreams=[new.url], keys=[key.public])
        for _ in range(reloads):
            reload(proxy)
        assert status(proxy, "/readyz") == 200
        assert not download.done()
        gate.open()
        assert download.result(timeout=30) == bytes(LARGE.nar)
    proxy.wait_for_log("stored")
    assert proxy.get(url) == bytes(LARGE.nar)
    assert old.gets("/nar/") == 1


def test_a_lookup_under_way_is_answered_by_whom_it_asked(
    threaded_sim: RunSimulator, daemon: RunDaemon, key: SigningKey
) -> None:
    """A narinfo asked for before SIGHUP is answered from the upstream that was asked."""
    old, new = threaded_sim(FIRST), threaded_sim()
    gate = Gate(None)
    old.fault("*.narinfo", gate)
    proxy = daemon(old.url)
    with ThreadPoolExecutor() as threads:
        answer = threads.submit(status, proxy, FIRST.narinfo_path)
        gate.reached.block()
        proxy.configure(upstreams=[new.url], keys=[key.public])
        reload(proxy)
        gate.open()
        assert answer.result(timeout=30) == 200


def test_connections_are_kept(daemon: RunDaemon) -> None:
    """SIGHUP closes no client's connection."""
    proxy = daemon()
    connection = HTTPConnection(proxy.addresses[0], timeout=30)
    connection.connect()
    before = connection.sock
    for _ in range(2):
        connection.request("GET", "/nix-cache-info")
        assert connection.getresponse().read()
        reload(proxy)
    assert connection.sock is before
    connection.close()


# --- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    ['[server]\nlissten = ["127.0.0.1:0"]\n', "this is not TOML", None],
    ids=["unknown-key", "not-toml", "missing"],
)
def test_a_bad_file_leaves_the_old_one_in_force(
    text: str | None, threaded_sim: RunSimulator, daemon: RunDaemon, key: SigningKey
) -> None:
    """A configuration that cannot be used is logged with its place; the old one goes on."""
    upstream = threaded_sim(FIRST)
    proxy = daemon(upstream.url)
    assert proxy.metric("config_last_reload_successful") == 1
    if text is None:
        proxy.config_file.unlink()
    else:
        proxy.config_file.write_text(text)
    assert str(proxy.config_file) in refused_reload(proxy)
    assert proxy.metric("config_last_reload_successful") == 0
    assert status(proxy, FIRST.narinfo_path) == 200
    assert proxy.get("/readyz") == b"ready\n"
    proxy.configure(upstreams=[upstream.url], keys=[key.public])
    reload(proxy)
    assert proxy.metric("config_last_reload_successful") == 1


def test_credentials_that_are_gone_are_refused(
    threaded_sim: RunSimulator, daemon: RunDaemon, key: SigningKey
) -> None:
    """A file of a secret that is not there any more is a bad configuration, and stops nobody."""
    upstream = threaded_sim(FIRST)
    proxy = daemon(upstream.url)
    secret = proxy.folder / "token"
    proxy.configure(
        upstreams=[],
        keys=[key.public],
        config=f'[[upstream]]\nname = "up0"\nurl = "{upstream.url}"\n'
        f'auth = {{ bearer_file = "{secret}" }}',
    )
    assert "token" in refused_reload(proxy)
    assert status(proxy, FIRST.narinfo_path) == 200
    secret.write_text("s3cret\n")
    reload(proxy)
    upstream.require_auth = "Bearer s3cret"
    assert status(proxy, "/00000000000000000000000000000000.narinfo") == 404
    assert proxy.metric("upstream_requests_total", outcome="denied") == 0
    assert upstream.requests[-1].headers["Authorization"] == "Bearer s3cret"
    assert all("s3cret" not in str(line) for line in proxy.log)


def test_what_needs_a_restart_is_named(
    threaded_sim: RunSimulator, daemon: RunDaemon, key: SigningKey
) -> None:
    """Changes that SIGHUP cannot bring into force are named in the log; the rest comes into force."""
    old, new = threaded_sim(FIRST), threaded_sim(SECOND)
    proxy = daemon(old.url)
    proxy.listen = ("127.0.0.2:0",)
    proxy.store = proxy.folder / "elsewhere"
    proxy.configure(upstreams=[new.url], keys=[key.public])
    reload(proxy)
    warnings = [line for line in proxy.log if line["level"] == "warning"]
    assert {line.get("table") for line in warnings} == {"server", "store"}
    assert not proxy.store.exists()
    assert status(proxy, SECOND.narinfo_path) == 200


def test_an_unchanged_file_is_no_reason_for_warnings(
    threaded_sim: RunSimulator, daemon: RunDaemon
) -> None:
    """SIGHUP without a change warns about nothing and is counted as a success."""
    proxy = daemon(threaded_sim(FIRST).url)
    before = proxy.metric("config_last_reload_success_timestamp_seconds")
    reload(proxy)
    assert [line for line in proxy.log if line["level"] in {"warning", "error"}] == []
    assert proxy.metric("config_last_reload_success_timestamp_seconds") > before


def test_many_signals_at_once_are_survived(
    threaded_sim: RunSimulator, daemon: RunDaemon, key: SigningKey
) -> None:
    """Signals that come faster than the file is read leave the last file in force."""
    old, new = threaded_sim(FIRST), threaded_sim(SECOND)
    proxy = daemon(old.url)
    for _ in range(20):
        proxy.signal(signal.SIGHUP)
    proxy.configure(upstreams=[new.url], keys=[key.public])
    reload(proxy)
    proxy.signal(signal.SIGHUP)  # whatever was merged, one more comes after the file
    reload(proxy)
    assert status(proxy, SECOND.narinfo_path) == 200
    assert proxy.stop() == 0
