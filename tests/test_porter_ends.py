"""The porter's process comes and goes, in whatever way; nobody but the log notices."""

from __future__ import annotations

import asyncio
import functools
import random
import resource
import signal
import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path

import pytest

from proxy.errors import StoreError
from proxy.events import PorterEnded, StoreFailed
from proxy.nix.hashes import Hash
from proxy.porter import porter as daemons_end
from proxy.porter.messages import Carried, Outcome, Refused
from proxy.upstream.carriage import Cargo, Order
from proxy.upstream.session import HEADERS
from tests.closures import SigningKey, StoreEntry, closure
from tests.conftest import StartProxy, StartSimulator
from tests.faults import Corrupt, Gate
from tests.folder_oracle import complete_paths
from tests.inside import InsideProxy
from tests.porters import WatchedPorter, is_alive
from tests.simulator import BinaryCacheSimulator
from tests.small_disk import fill, small_disk
from tests.wire import PATIENCE, until

ENTRIES = closure(30, seed=8, sizes=(100, 30_000))
SMALL = StoreEntry.make("small-1.0", random.Random(6).randbytes(50_000), compression="none")
FILE = bytes(SMALL.file)
MIDDLE = len(FILE) // 2


@pytest.fixture(autouse=True)
def _no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who has ended is started again at once."""
    monkeypatch.setattr(daemons_end, "PAUSE", 0.0)


@pytest.fixture
async def porter() -> AsyncIterator[WatchedPorter]:
    """Return a porter that is at hand."""
    async with aclosing(WatchedPorter()) as made:
        await made.ready()
        yield made


@pytest.fixture
def start(porter: WatchedPorter, start: StartProxy) -> StartProxy:
    """Return a function that starts proxies, as everywhere, which have the porter."""
    return functools.partial(start, porter=porter)


def order(cache: BinaryCacheSimulator, path: Path) -> tuple[Order, Cargo]:
    """Order `SMALL` from an upstream, to be put at a path."""
    asked = Order("up0", f"{cache.url}{SMALL.nar_path}", dict(HEADERS), None, None, 5.0, 30.0)
    nar_hash, file_hash = (Hash("sha256", blob.sha256) for blob in (SMALL.nar, SMALL.file))
    cargo = Cargo(str(path), len(FILE), SMALL.compression, nar_hash, len(SMALL.nar), file_hash)
    return asked, cargo


async def right(proxy: InsideProxy, *entries: StoreEntry) -> None:
    """Pull all of these at once, and see that clients get the right bytes."""

    async def pull(entry: StoreEntry) -> None:
        answer = await proxy.pull(await proxy.nar_url(entry.hash_part))
        assert (answer.status, answer.complete) == (200, True)
        assert answer.body == bytes(entry.file)

    await asyncio.gather(*map(pull, entries))


def hash_parts(*entries: StoreEntry) -> set[str]:
    """Return the hash parts of paths."""
    return {entry.hash_part for entry in entries}


async def nothing_is_left(proxy: InsideProxy) -> None:
    """See that no partial file stays; a failure has the disk probed with one, for a moment."""
    await proxy.eventually(lambda: not proxy.partials)


async def it_carries(
    porter: WatchedPorter, proxy: InsideProxy, cache: BinaryCacheSimulator
) -> None:
    """See that there is a process, and that it works."""
    await porter.ready()
    later = StoreEntry.make(f"later-{len(porter.headings)}", b"later")
    cache.publish(later)
    carried = len(porter.headings)
    await right(proxy, later)
    assert len(porter.headings) == carried + 1


# --- killed -------------------------------------------------------------------------------------


@pytest.mark.parametrize("after", [0, 1, 10, 29, 45])
async def test_killed_at_any_time(
    after: int, sim: StartSimulator, start: StartProxy, porter: WatchedPorter, key: SigningKey
) -> None:
    """However much of a closure it has carried and published: clients get everything, nothing is half."""
    cache = await sim(*ENTRIES)
    gate = Gate(None)
    if after == 0:
        cache.fault("/nar/", gate)
    outcomes = 0

    def kill(_outcome: Outcome) -> None:
        nonlocal outcomes
        outcomes += 1
        if outcomes == after:
            porter.signal(signal.SIGKILL)

    porter.on_outcome = kill
    proxy = await start(cache)
    pulling = asyncio.create_task(right(proxy, *ENTRIES))
    if after == 0:
        await gate.reached.wait()
        porter.signal(signal.SIGKILL)
        gate.open()
    await pulling
    await proxy.idle()
    await until(lambda: bool(porter.events))
    (ended,) = porter.events
    assert isinstance(ended, PorterEnded)
    assert ended.reason == "it was ended by SIGKILL"
    assert not porter.busy
    assert complete_paths(proxy.folder, [key]) <= hash_parts(*ENTRIES)
    await it_carries(porter, proxy, cache)
    await right(proxy, *ENTRIES)
    await proxy.idle()
    assert complete_paths(proxy.folder, [key]) > hash_parts(*ENTRIES)
    await nothing_is_left(proxy)


async def test_killed_with_everything_to_publish(
    sim: StartSimulator, start: StartProxy, porter: WatchedPorter, key: SigningKey
) -> None:
    """What it was to publish, the daemon publishes: nothing has to be fetched again."""
    cache = await sim(*ENTRIES)
    proxy = await start(cache)
    pid = await porter.ready()
    stopped = False

    def stop(outcome: Outcome) -> None:
        nonlocal stopped
        if isinstance(outcome, Carried) and not stopped:
            stopped = True
            porter.signal(signal.SIGSTOP)

    porter.on_outcome = stop
    pulling = asyncio.create_task(right(proxy, *ENTRIES))
    await until(lambda: len(porter.publications) > 0)
    assert is_alive(pid)
    porter.signal(signal.SIGKILL)
    await pulling
    await proxy.idle()
    assert proxy.observed(StoreFailed) == []
    assert complete_paths(proxy.folder, [key]) == hash_parts(*ENTRIES)
    await nothing_is_left(proxy)


async def test_it_is_not_started_again_at_once(
    sim: StartSimulator,
    start: StartProxy,
    porter: WatchedPorter,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Who has just ended is left alone for a while, in which the daemon does everything."""
    monkeypatch.setattr(daemons_end, "PAUSE", 3600.0)
    cache = await sim(SMALL)
    proxy = await start(cache)
    porter.signal(signal.SIGKILL)
    await until(lambda: bool(porter.events))
    await right(proxy, SMALL)
    await proxy.idle()
    assert not porter.at_hand
    assert (porter.pid, porter.orders) == (None, [])
    assert len(proxy.kept) == 2


async def test_it_cannot_be_started(
    sim: StartSimulator, tmp_path: Path, key: SigningKey, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where no process can be started that is told, and the daemon does everything."""

    async def refuse(*_: object) -> None:
        raise OSError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(daemons_end, "spawn", refuse)
    monkeypatch.setattr(daemons_end, "WORTH_IT", 1)
    cache = await sim(SMALL)
    async with aclosing(WatchedPorter()) as porter:
        assert not porter.at_hand
        await until(lambda: bool(porter.events))
        assert porter.events == [
            PorterEnded(0, "it cannot be started: Resource temporarily unavailable")
        ]
        async with InsideProxy(
            tmp_path / "store", cache.url, keys=[key.public], porter=porter
        ) as proxy:
            await right(proxy, SMALL)


async def test_it_is_worth_it(porter: WatchedPorter) -> None:
    """It is started when it was wanted some times in a row, not for a single small NAR."""
    async with aclosing(WatchedPorter()) as unused:
        for _ in range(daemons_end.WORTH_IT - 1):
            assert not unused.at_hand
        await porter.ready()  # which takes longer than to begin to start another
        assert unused.pid is None
        await unused.ready()


async def test_closed_while_it_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who stops at once does not leave a process behind, nor a socket."""
    monkeypatch.setattr(daemons_end, "WORTH_IT", 1)
    async with aclosing(WatchedPorter()) as porter:
        assert not porter.at_hand
        await asyncio.sleep(0)
    assert porter.pid is None
    assert not porter.at_hand


@pytest.mark.parametrize("side", ["ours", "theirs"])
async def test_another_version(
    side: str,
    sim: StartSimulator,
    start: StartProxy,
    porter: WatchedPorter,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A process that was installed anew meanwhile, and speaks another language, ends; nobody waits."""
    cache = await sim(SMALL)
    proxy = await start(cache)
    if side == "theirs":
        assert porter._tasks is not None
        monkeypatch.setattr(porter._tasks, "_encode", lambda _batch: b"\x91\x92\xa7Unknown\x01")
    else:

        def refuse(_frame: bytes) -> None:
            raise ValueError

        monkeypatch.setattr(daemons_end, "read_outcomes", refuse)
    await right(proxy, SMALL)
    await proxy.idle()
    monkeypatch.undo()
    assert porter.events[0].reason == "it ended with status 0"  # type: ignore[union-attr]
    assert cache.gets(SMALL.nar_path) <= 2
    await nothing_is_left(proxy)


async def test_stuck(
    sim: StartSimulator,
    start: StartProxy,
    porter: WatchedPorter,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Who does not even say that it lives is ended, and the daemon does what it had to do."""
    monkeypatch.setattr(daemons_end, "ANSWER_TIMEOUT", 0.2)
    monkeypatch.setattr(daemons_end, "IDLE", 0.2)
    cache = await sim(*ENTRIES)
    proxy = await start(cache)
    pid = await porter.ready()
    porter.signal(signal.SIGSTOP)
    await right(proxy, *ENTRIES)
    await until(lambda: bool(porter.events))
    (ended,) = porter.events
    assert ended == PorterEnded(pid, "it was ended by SIGKILL")
    await proxy.idle()
    await nothing_is_left(proxy)


# --- let go -------------------------------------------------------------------------------------


async def test_idle(
    sim: StartSimulator, tmp_path: Path, key: SigningKey, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who has nothing to do for a while is ended, quietly, and is there again when it is needed."""
    monkeypatch.setattr(daemons_end, "IDLE", 0.1)
    cache = await sim(SMALL)
    gate = Gate(None)
    cache.fault(SMALL.nar_path, gate)
    async with (
        aclosing(WatchedPorter()) as porter,
        InsideProxy(tmp_path / "store", cache.url, keys=[key.public], porter=porter) as proxy,
    ):
        url = await proxy.nar_url(SMALL.hash_part)
        first = await porter.ready()
        pulling = asyncio.create_task(proxy.pull(url))
        await gate.reached.wait()
        began = time.monotonic()
        await until(lambda: time.monotonic() > began + 5 * daemons_end.IDLE)
        assert porter.pid == first  # it is at work, however long that takes
        gate.open()
        assert (await pulling).body == FILE
        await until(lambda: porter.pid is None)
        await until(lambda: not is_alive(first))
        await it_carries(porter, proxy, cache)
        assert porter.events == []


async def test_closed_with_orders(
    sim: StartSimulator, porter: WatchedPorter, tmp_path: Path
) -> None:
    """What was ordered fails when the porter is closed, and what has been written of it is gone."""
    cache = await sim(SMALL)
    gate = Gate(MIDDLE)
    cache.fault(SMALL.nar_path, gate)
    pid = await porter.ready()
    carrying = asyncio.create_task(porter.carry(*order(cache, tmp_path / "landing")))
    await gate.reached.wait()
    (tmp_path / "landing").write_bytes(FILE)  # as if it had just been written, and nobody told
    await porter.aclose()
    with pytest.raises(StoreError, match="has ended"):
        await carrying
    assert not any(tmp_path.iterdir())  # noqa: ASYNC240 - nothing else waits for this loop
    assert not is_alive(pid)
    with pytest.raises(StoreError, match="has ended"):
        await porter.carry(*order(cache, tmp_path / "landing"))
    assert not porter.busy
    assert porter.events == []


# --- given up -----------------------------------------------------------------------------------


@pytest.mark.parametrize("faulty", [False, True], ids=["a file", "no file"])
async def test_given_up_before_it_came(
    faulty: bool,  # noqa: FBT001
    sim: StartSimulator,
    porter: WatchedPorter,
    tmp_path: Path,
) -> None:
    """What comes when whoever ordered it does not wait any more is removed, and disturbs nobody."""
    cache = await sim(SMALL)
    gate = Gate(MIDDLE)
    cache.fault(SMALL.nar_path, gate, *([Corrupt(0)] if faulty else []))
    told: list[Outcome] = []
    porter.on_outcome = told.append
    carrying = asyncio.create_task(porter.carry(*order(cache, tmp_path / "landing")))
    await gate.reached.wait()
    carrying.cancel()
    await asyncio.gather(carrying, return_exceptions=True)
    gate.open()
    await until(lambda: bool(told))
    assert isinstance(told[0], Refused if faulty else Carried)
    assert not any(tmp_path.iterdir())  # noqa: ASYNC240 - nothing else waits for this loop
    cache.heal()
    await porter.carry(*order(cache, tmp_path / "landing"))
    assert (tmp_path / "landing").read_bytes() == FILE


async def test_given_up_as_it_came(
    sim: StartSimulator, porter: WatchedPorter, tmp_path: Path
) -> None:
    """Who gives up in the very moment in which the file comes leaves nothing either."""
    cache = await sim(SMALL)
    carrying = asyncio.create_task(porter.carry(*order(cache, tmp_path / "landing")))

    def give_up(_outcome: Outcome) -> None:
        carrying.cancel()

    porter.on_outcome = give_up
    with pytest.raises(asyncio.CancelledError):
        await carrying
    assert not any(tmp_path.iterdir())  # noqa: ASYNC240 - nothing else waits for this loop


async def test_stopped_with_orders(
    sim: StartSimulator, porter: WatchedPorter, tmp_path: Path, key: SigningKey
) -> None:
    """A proxy that stops in the middle of everything leaves no partial file in its store."""
    cache = await sim(*ENTRIES)
    gate = Gate(10)
    cache.fault("/nar/", gate)
    proxy = await InsideProxy(
        tmp_path / "store", cache.url, keys=[key.public], porter=porter
    ).start()
    urls = [await proxy.nar_url(entry.hash_part) for entry in ENTRIES]
    pulling = [asyncio.create_task(proxy.pull(url)) for url in urls]
    await gate.reached.wait()
    await until(lambda: len(porter.orders) >= 8)
    for client in pulling:
        client.cancel()
    await asyncio.gather(*pulling, return_exceptions=True)
    await proxy.stop()
    gate.open()
    await until(lambda: not porter.busy)
    await nothing_is_left(proxy)


# --- a disk that refuses ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("limit", "most"),
    [
        pytest.param(resource.RLIMIT_FSIZE, 1_000, id="no room"),
        pytest.param(resource.RLIMIT_NOFILE, 3, id="no descriptors"),
    ],
)
async def test_only_it_cannot(
    limit: int, most: int, sim: StartSimulator, start: StartProxy, porter: WatchedPorter
) -> None:
    """What the process cannot do the daemon does; at most one request more is made for that."""
    cache = await sim(SMALL)
    proxy = await start(cache)
    await it_carries(porter, proxy, cache)
    pid = await porter.ready()
    resource.prlimit(pid, limit, (most, resource.prlimit(pid, limit)[1]))
    await right(proxy, SMALL)
    await proxy.idle()
    assert (len(porter.orders), len(porter.headings)) == (2, 1)
    assert cache.gets(SMALL.nar_path) <= 2
    await nothing_is_left(proxy)


async def test_full_disk(
    sim: StartSimulator, porter: WatchedPorter, tmp_path: Path, key: SigningKey
) -> None:
    """Where the disk takes nothing clients get everything, and the store has nothing half."""
    cache = await sim(*ENTRIES)
    with small_disk(tmp_path / "disk", size=4 * 2**20) as disk:
        async with InsideProxy(
            disk / "store", cache.url, keys=[key.public], porter=porter
        ) as proxy:
            await right(proxy, *ENTRIES[:5])
            await proxy.idle()
            filler = fill(disk)
            await right(proxy, *ENTRIES[5:])
            await proxy.idle()
            assert proxy.observed(StoreFailed)
            assert complete_paths(proxy.folder, [key]) >= hash_parts(*ENTRIES[:5])
            await nothing_is_left(proxy)
            filler.unlink()
            async with asyncio.timeout(PATIENCE):
                while await proxy.store.check():  # the first may be of a probe from before
                    pass
            await right(proxy, *ENTRIES)
            await proxy.idle()
            assert complete_paths(proxy.folder, [key]) == hash_parts(*ENTRIES)
    assert porter.events == []
