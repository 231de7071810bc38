"""The real ``nix`` as the peer: closures installed through the proxy, and what spoils none."""

from __future__ import annotations

import json
import random
import shutil
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.closures import SigningKey, StoreEntry, closure
from tests.conftest import RunDaemon, RunSimulator
from tests.faults import Corrupt, Cut, Encoded, Fault, Html, Stall, Status
from tests.nix_client import Completed, NixClient

pytestmark = pytest.mark.needs("nix", "nix-store")

CLOSURE = closure(60)
"""Of every compression that this Nix reads."""

ROOT = CLOSURE[0].store_path

SMALL = StoreEntry.make("small-1.0", b"hello\n")
LARGE = StoreEntry.make("large-1.0", random.Random(1).randbytes(400_000), compression="none")

NewClient = Callable[[], NixClient]


@pytest.fixture
def client(tmp_path: Path, key: SigningKey) -> NewClient:
    """Return a function that makes Nix clients, each with an empty store and no memory."""

    def make() -> NixClient:
        folder = tmp_path / f"client{len(list(tmp_path.glob('client*')))}"
        folder.mkdir()
        return NixClient(folder, keys=[key.public])

    return make


def assert_succeeded(completed: Completed) -> None:
    """Say what a command of Nix said when it has failed."""
    assert completed.returncode == 0, completed.stderr


def assert_installed(nix: NixClient, entries: Sequence[StoreEntry] = CLOSURE) -> None:
    """Exactly these paths are valid, and each has its true contents."""
    assert nix.installed() == {entry.base_name for entry in entries}
    for entry in entries:
        assert nix.dump(entry.store_path) == bytes(entry.nar), entry.name


# --- a closure ----------------------------------------------------------------------------------


def test_nix_copy_installs_a_closure_of_all_compressions(
    client: NewClient, threaded_sim: RunSimulator, daemon: RunDaemon
) -> None:
    """``nix copy --from`` the proxy installs a closure, and every path has its true contents."""
    upstream = threaded_sim(*CLOSURE)
    proxy = daemon(upstream.url)
    nix = client()
    assert_succeeded(nix.copy_from(proxy.url, ROOT))
    assert_installed(nix)
    asked = [request.raw_path for request in upstream.requests]
    wanted = [path for entry in CLOSURE for path in (entry.narinfo_path, entry.nar_path)]
    assert sorted(asked) == sorted(wanted)


def test_nix_store_realise_substitutes_a_closure(
    client: NewClient, threaded_sim: RunSimulator, daemon: RunDaemon
) -> None:
    """With the proxy as the substituter, ``nix-store --realise`` installs the same closure."""
    proxy = daemon(threaded_sim(*CLOSURE).url)
    nix = client()
    assert_succeeded(nix.realise(ROOT, substituters=[proxy.url]))
    assert_installed(nix)


def test_the_second_pull_touches_no_upstream(
    client: NewClient, threaded_sim: RunSimulator, daemon: RunDaemon
) -> None:
    """A second, fresh client gets the whole closure without a single request to the upstream."""
    upstream = threaded_sim(*CLOSURE)
    proxy = daemon(upstream.url)
    assert_succeeded(client().copy_from(proxy.url, ROOT))
    upstream.reset_counts()
    second = client()
    assert_succeeded(second.copy_from(proxy.url, ROOT))
    assert_installed(second)
    assert upstream.requests == []


def test_a_cached_closure_needs_no_upstream(
    client: NewClient, threaded_sim: RunSimulator, daemon: RunDaemon
) -> None:
    """With the upstream gone, a cached closure still installs, also from a restarted proxy."""
    upstream = threaded_sim(*CLOSURE)
    proxy = daemon(upstream.url)
    assert_succeeded(client().copy_from(proxy.url, ROOT))
    upstream.down()
    second, third = client(), client()
    assert_succeeded(second.realise(ROOT, substituters=[proxy.url]))
    assert_installed(second)
    assert proxy.stop() == 0
    proxy.start()
    assert_succeeded(third.realise(ROOT, substituters=[proxy.url]))
    assert_installed(third)


def test_the_store_is_a_binary_cache_of_its_own(
    client: NewClient, threaded_sim: RunSimulator, daemon: RunDaemon
) -> None:
    """``nix copy --from file://<store>`` installs the closure, the proxy running or not."""
    proxy = daemon(threaded_sim(*CLOSURE).url)
    assert_succeeded(client().copy_from(proxy.url, ROOT))
    proxy.wait_for_log("stored", len(CLOSURE))  # happens off the client's path
    beside, after = client(), client()
    assert_succeeded(beside.copy_from(f"file://{proxy.store}", ROOT))
    assert_installed(beside)
    assert proxy.stop() == 0
    shutil.rmtree(proxy.store / ".state")
    assert_succeeded(after.copy_from(f"file://{proxy.store}", ROOT))
    assert_installed(after)


def test_two_clients_at_once_share_each_download(
    client: NewClient, threaded_sim: RunSimulator, daemon: RunDaemon
) -> None:
    """Two real clients that pull a closure at once both get it, and each thing is fetched once."""
    upstream = threaded_sim(*CLOSURE)
    proxy = daemon(upstream.url)
    clients = [client(), client()]
    with ThreadPoolExecutor() as threads:
        pulls = [threads.submit(nix.copy_from, proxy.url, ROOT) for nix in clients]
        for pull in pulls:
            assert_succeeded(pull.result())
    for nix in clients:
        assert_installed(nix)
    for entry in CLOSURE:
        assert upstream.gets(entry.narinfo_path) == 1
        assert upstream.gets(entry.nar_path) == 1


def test_a_remembered_url_outlives_all_we_had(
    client: NewClient, threaded_sim: RunSimulator, daemon: RunDaemon
) -> None:
    """A client that remembers our narinfos installs after our store was emptied and we restarted."""
    upstream = threaded_sim(*CLOSURE)
    proxy = daemon(upstream.url)
    nix = client()
    assert_succeeded(nix.path_info("--recursive", ROOT, store=proxy.url))
    assert proxy.stop() == 0
    shutil.rmtree(proxy.store)
    proxy.listen = (proxy.addresses[0],)
    proxy.configure(upstreams=[upstream.url], keys=[upstream.keys[0].public])
    proxy.start()
    assert_succeeded(nix.copy_from(proxy.url, ROOT))
    assert_installed(nix)


# --- other commands -----------------------------------------------------------------------------


def test_nix_path_info_tells_the_truth(
    client: NewClient, threaded_sim: RunSimulator, daemon: RunDaemon
) -> None:
    """``nix path-info`` of the proxy says what the upstream signed."""
    entry = CLOSURE[0]
    proxy = daemon(threaded_sim(*CLOSURE).url)
    told = client().path_info(entry.store_path, store=proxy.url)
    assert_succeeded(told)
    (info,) = json.loads(told.stdout)
    assert info["path"] == entry.store_path
    assert info["narSize"] == len(entry.nar)
    assert sorted(info["references"]) == sorted(f"/nix/store/{name}" for name in entry.references)
    assert [signature.partition(":")[0] for signature in info["signatures"]] == ["test-cache-1"]


def test_nix_store_ls_lists_a_path(
    client: NewClient, threaded_sim: RunSimulator, daemon: RunDaemon
) -> None:
    """``nix store ls`` and ``nix store cat`` look into a path that is only in the upstream."""
    entry = StoreEntry.make("tree-1.0", {"bin": {"run": b"#!/bin/sh\n"}, "empty": b""})
    proxy = daemon(threaded_sim(entry).url)
    nix = client()
    listed = nix.run("nix", "store", "ls", "-R", "--store", proxy.url, entry.store_path)
    assert_succeeded(listed)
    assert listed.stdout.split() == ["./bin", "./bin/run", "./empty"]
    shown = nix.run("nix", "store", "cat", "--store", proxy.url, f"{entry.store_path}/bin/run")
    assert_succeeded(shown)
    assert shown.stdout == "#!/bin/sh\n"


def test_nix_log_shows_a_build_log(
    client: NewClient, threaded_sim: RunSimulator, daemon: RunDaemon
) -> None:
    """``nix log`` finds the log of a path's build, also where the upstream sends it compressed."""
    entry = CLOSURE[0]
    upstream = threaded_sim(entry)
    upstream.files[f"/log/{entry.deriver}"] = (b"compiling\ndone\n", {"Content-Type": "text/plain"})
    upstream.fault("/log/", Encoded("br"))
    proxy = daemon(upstream.url)
    nix = client()
    for _ in range(2):
        shown = nix.run("nix", "log", "--store", proxy.url, entry.store_path)
        assert_succeeded(shown)
        assert shown.stdout == "compiling\ndone\n"
        upstream.down()


# --- upstreams that lie, die and are silent -----------------------------------------------------


def flipped(field: str) -> Callable[[bytes], bytes]:
    """Change one character of a field of a narinfo after it was signed."""

    def tamper(narinfo: bytes) -> bytes:
        at = narinfo.index(f"{field}: ".encode()) + len(field) + 40
        changed = b"0" if narinfo[at : at + 1] != b"0" else b"1"
        return narinfo[:at] + changed + narinfo[at + 1 :]

    return tamper


LIES = {
    "narhash": SMALL.but(tamper=flipped("NarHash")),
    "name": SMALL.but(tamper=lambda text: text.replace(b"-small-1.0\n", b"-smell-1.0\n")),
    "unknown-signer": SMALL.but(signers=(SigningKey("mallory-1"),)),
    "unsigned": SMALL.but(signers=()),
    "other-path": SMALL.but(tamper=lambda _: LARGE.narinfo(SigningKey("test-cache-1"))),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_tampered_narinfo_makes_nix_ask_the_next_cache(
    lie: str, client: NewClient, threaded_sim: RunSimulator, daemon: RunDaemon
) -> None:
    """A narinfo that is not what was signed is as good as none: Nix takes the next substituter."""
    liar, honest = threaded_sim(LIES[lie]), threaded_sim(SMALL)
    proxy = daemon(liar.url)
    nix = client()
    assert_succeeded(nix.realise(SMALL.store_path, substituters=[proxy.url, honest.url]))
    assert_installed(nix, [SMALL])
    assert honest.gets(SMALL.nar_path) == 1
    assert proxy.metric("verification_failures_total") == 1
    assert list(proxy.store.glob("nar/*")) == []


NAR_LIES: dict[str, Sequence[Fault]] = {
    "first-byte": [Corrupt(0)],
    "last-byte": [Corrupt(-1)],
    "html": [Html()],
    "other": [],
}


@pytest.mark.parametrize("entry", [SMALL, LARGE], ids=lambda entry: str(entry.name))
@pytest.mark.parametrize("lie", NAR_LIES)
def test_a_tampered_nar_makes_nix_ask_the_next_cache(
    lie: str, entry: StoreEntry, client: NewClient, threaded_sim: RunSimulator, daemon: RunDaemon
) -> None:
    """A NAR that is not what was signed is never installed: Nix takes it from the next cache."""
    liar, honest = threaded_sim(entry), threaded_sim(entry)
    if NAR_LIES[lie]:
        liar.fault("/nar/", *NAR_LIES[lie])
    else:  # another NAR of the same size, whole and decodable
        other = entry.but(nar=StoreEntry.make("x", bytes(len(entry.nar) - 112)).nar)
        assert len(other.nar) == len(entry.nar)
        liar.publish(entry.but(served=other.file))
    proxy = daemon(liar.url)
    nix = client()
    assert_succeeded(nix.realise(entry.store_path, substituters=[proxy.url, honest.url]))
    assert_installed(nix, [entry])
    assert honest.gets(entry.nar_path) == 1
    assert list(proxy.store.glob("nar/*")) == []


def test_wrong_bytes_are_not_installed_where_there_is_no_other_cache(
    client: NewClient, threaded_sim: RunSimulator, daemon: RunDaemon
) -> None:
    """With the lying upstream's proxy alone, Nix installs nothing at all, and says so."""
    liar = threaded_sim(LARGE)
    liar.fault("/nar/", Corrupt(200_000))
    proxy = daemon(liar.url)
    nix = client()
    assert nix.copy_from(proxy.url, LARGE.store_path).returncode != 0
    assert nix.installed() == set()
    liar.heal()
    assert_succeeded(nix.copy_from(proxy.url, LARGE.store_path))
    assert_installed(nix, [LARGE])


@pytest.mark.parametrize("code", [401, 429, 503])
def test_an_upstream_that_refuses_stops_nobody(
    code: int, client: NewClient, threaded_sim: RunSimulator, daemon: RunDaemon
) -> None:
    """Whatever status an upstream fails with, Nix goes on to its next substituter at once."""
    failing, honest = threaded_sim(SMALL), threaded_sim(SMALL)
    failing.fault("/", Status(code, headers={"Retry-After": "600"}))
    proxy = daemon(failing.url)
    nix = client()
    began = time.monotonic()
    assert_succeeded(nix.realise(SMALL.store_path, substituters=[proxy.url, honest.url]))
    assert time.monotonic() - began < 8
    assert_installed(nix, [SMALL])


def test_a_dead_upstream_costs_a_closure_no_retries(
    client: NewClient, threaded_sim: RunSimulator, daemon: RunDaemon
) -> None:
    """With nothing cached and the upstream down, Nix gets its closure from the next cache, fast."""
    dead, honest = threaded_sim(*CLOSURE), threaded_sim(*CLOSURE)
    dead.down()
    proxy = daemon(dead.url)
    nix = client()
    began = time.monotonic()
    assert_succeeded(nix.realise(ROOT, substituters=[proxy.url, honest.url]))
    assert time.monotonic() - began < 15  # one retry of Nix alone would take it 4 s for each path
    assert_installed(nix)


def test_a_silent_upstream_costs_nix_the_lookup_budget(
    client: NewClient, threaded_sim: RunSimulator, daemon: RunDaemon
) -> None:
    """An upstream that accepts and never answers delays a path by ``lookup_budget``, and no more."""
    silent, honest = threaded_sim(SMALL), threaded_sim(SMALL)
    silent.fault("/", Stall(None))
    proxy = daemon(silent.url, config='[policy]\nlookup_budget = "500ms"')
    nix = client()
    began = time.monotonic()
    assert_succeeded(nix.realise(SMALL.store_path, substituters=[proxy.url, honest.url]))
    assert time.monotonic() - began < 5
    assert_installed(nix, [SMALL])


def test_a_nar_that_is_gone_upstream_sends_nix_on(
    client: NewClient, threaded_sim: RunSimulator, daemon: RunDaemon
) -> None:
    """An upstream that has a narinfo but lost its NAR sends Nix to the next substituter."""
    upstream, honest = threaded_sim(SMALL), threaded_sim(SMALL)
    del upstream.files[SMALL.nar_path]
    proxy = daemon(upstream.url)
    nix = client()
    assert_succeeded(nix.realise(SMALL.store_path, substituters=[proxy.url, honest.url]))
    assert_installed(nix, [SMALL])


@pytest.mark.parametrize("reset", [False, True], ids=["closed", "reset"])
def test_a_cut_in_the_middle_of_a_nar_is_survived(
    reset: bool,  # noqa: FBT001 - pytest gives it by name
    client: NewClient,
    threaded_sim: RunSimulator,
    daemon: RunDaemon,
) -> None:
    """An upstream that dies in the middle of a NAR, once, costs no more than a retry of Nix."""
    upstream = threaded_sim(LARGE)
    upstream.fault("/nar/", Cut(200_000, reset=reset), times=1)
    proxy = daemon(upstream.url)
    nix = client()
    assert_succeeded(nix.realise(LARGE.store_path, substituters=[proxy.url]))
    assert_installed(nix, [LARGE])


def test_an_upstream_that_always_cuts_makes_nix_ask_the_next_cache(
    client: NewClient, threaded_sim: RunSimulator, daemon: RunDaemon
) -> None:
    """An upstream that dies in every NAR is passed over; nothing partial is installed or kept."""
    dying, honest = threaded_sim(*CLOSURE, LARGE), threaded_sim(*CLOSURE, LARGE)
    dying.fault("/nar/", Cut(500))
    proxy = daemon(dying.url)
    nix = client()
    for path in (CLOSURE[-1], LARGE):
        done = nix.realise(path.store_path, substituters=[proxy.url, honest.url])
        assert_succeeded(done)
    assert nix.dump(LARGE.store_path) == bytes(LARGE.nar)
    assert_succeeded(nix.verify())
    assert list(proxy.store.glob("nar/*")) == []


def test_a_nix_that_knows_the_cache_survives_its_upstream(
    client: NewClient, threaded_sim: RunSimulator, daemon: RunDaemon
) -> None:
    """A client that has used the proxy before is not stopped by an upstream that died since."""
    upstream, honest = threaded_sim(SMALL, LARGE), threaded_sim(SMALL, LARGE)
    proxy = daemon(upstream.url)
    nix = client()
    assert_succeeded(nix.realise(SMALL.store_path, substituters=[proxy.url, honest.url]))
    upstream.down()
    assert_succeeded(nix.realise(LARGE.store_path, substituters=[proxy.url, honest.url]))
    assert_installed(nix, [SMALL, LARGE])
