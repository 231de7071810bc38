"""The whole cache against a model, in an order that nobody has thought of.

Two upstreams come and go, lie, stall and heal; clients ask, join, read parts and leave; the clock jumps;
the store is too small, and the proxy is stopped, or killed, and started again. Whatever the order: a
client gets the signed bytes or no complete answer; what is here is served, without asking anybody; a NAR
that arrives is fetched once; and the index counts what the disk holds.

`make soak` runs the same for minutes (``SOAK_EXAMPLES``).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import shutil
import tempfile
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar
from unittest import mock

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from proxy import patience
from proxy.events import Evicted
from proxy.fetch import HELD_BACK
from proxy.store import index
from proxy.store.eviction import Limits
from proxy.upstream.breaker import State
from tests.closures import SigningKey, StoreEntry
from tests.faults import (
    Body,
    Chunked,
    Corrupt,
    Cut,
    Encoded,
    Fault,
    Gate,
    Html,
    Longer,
    NoRanges,
    Redirect,
    Request,
    Reset,
    ShortBody,
    Shorter,
    Status,
)
from tests.folder_oracle import complete_paths
from tests.inside import PATIENCE, InsideProxy, Received
from tests.simulator import BinaryCacheSimulator
from tests.store.test_index import on_disk
from tests.store.test_making_room import cached

T = TypeVar("T")

EXAMPLES = int(os.environ.get("SOAK_EXAMPLES", "40"))

pytestmark = pytest.mark.timeout(60 + 10 * EXAMPLES)

KEY = SigningKey("test-cache-1")
STRANGER = SigningKey("stranger-1")
NEGATIVE_TTL = 60.0


def _noise(name: str, size: int) -> bytes:
    return random.Random(name).randbytes(size)


SMALL = StoreEntry.make("small-1.0", b"small\n")
LARGE = StoreEntry.make("large-1.0", _noise("large", 400_000), compression="none")
BOTH = StoreEntry.make("both-1.0", _noise("both", 60_000), compression="zstd")
"""The second upstream compresses it in another way."""

FIRST = (SMALL, LARGE, BOTH)
SECOND = (SMALL, LARGE, BOTH.but(compression="xz"))
SHORTER = (
    (index, "COMMIT_INTERVAL", 0.005),
    (patience, "LONGEST_PAUSE", 0.005),
    (patience, "LONGEST_RETRY_AFTER", 0.005),
)
"""Seconds that would be spent waiting, for upstreams whose healing is up to us."""

PATHS = sorted({entry.hash_part for entry in FIRST})

ROOM = 450_000
"""Bytes of the store: not all of it fits."""


def our_url(entry: StoreEntry) -> str:
    """Return where the proxy has the NAR of `entry`."""
    extension = {"none": "", "zstd": ".zst", "xz": ".xz"}[entry.compression]
    return f"/nar/{entry.hash_part}-{entry.nar_hash}.nar{extension}"


NARS = {our_url(entry): entry for entry in (*FIRST, *SECOND)}


# Lists, so that hypothesis can name what it chose.
NARINFO_LIES: dict[str, Callable[[StoreEntry], Fault]] = {
    "status 500": lambda _: Status(500),
    "status 403": lambda _: Status(403),
    "a page": lambda _: Html(),
    "reset": lambda _: Reset(),
    "cut": lambda _: Cut(50),
    "of another path": lambda entry: Body(
        (SMALL if entry.hash_part != SMALL.hash_part else LARGE).narinfo(KEY)
    ),
    "by a stranger": lambda entry: Body(
        StoreEntry.make("evil", b"evil").but(hash_part=entry.hash_part).narinfo(STRANGER)
    ),
    "redirect loop": lambda _: Redirect(lambda request: request.raw_path),
}
NAR_LIES: dict[str, Callable[[int], Fault]] = {
    "status 500": lambda _: Status(500),
    "status 403": lambda _: Status(403),
    "a page": lambda _: Html(),
    "reset": lambda _: Reset(),
    "cut": Cut,
    "cut by reset": lambda at: Cut(at, reset=True),
    "short of what was announced": lambda at: ShortBody(at + 1),
    "shorter": lambda at: Shorter(at + 1),
    "longer": lambda at: Longer(at + 1),
    "corrupt": Corrupt,
    "corrupt end": lambda _: Corrupt(-1),
    "encoded": lambda _: Encoded(),
}
OTHER_BYTES = {"a page", "corrupt", "corrupt end", "encoded"}
"""Lies after which a client may get other bytes than the right ones, but never the last of them."""

HARMLESS: dict[str, Callable[[], Fault]] = {"chunked": Chunked, "no ranges": NoRanges}

paths = st.sampled_from(PATHS)
nars = st.sampled_from(sorted(NARS))
upstreams = st.integers(0, 1)
offsets = st.sampled_from([0, 1, 17, 20_000, 45_000, 140_000, 350_000])


class Check(Protocol):
    """Judges an answer."""

    def __call__(self, answer: Received, *, due: bool) -> None:
        """Fail unless `answer` is right; with `due` only a complete one is."""
        ...


@dataclass(eq=False)
class Ask:
    """A request of a client, and what may come of it.

    Attributes:
        path: The hash part it is about.
        task: Waits for the answer.
        check: Judges the answer.
        epoch: What the world was like when it was sent.
        evicted: How much had been evicted then.
        due: Only a complete answer will do, as long as the world stays as it was.
    """

    path: str
    task: asyncio.Task[Received]
    check: Check
    epoch: int
    evicted: int
    due: bool


class WholeCache(RuleBasedStateMachine):
    """Clients, proxy and upstreams in one event loop, which runs while a rule does."""

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.folders = tempfile.TemporaryDirectory(prefix="whole-cache-")
        self.generation = 0
        self.asks: list[Ask] = []
        self.gates: list[tuple[str, Gate]] = []
        self.lying: set[tuple[int, str]] = set()
        self.down: set[int] = set()
        self.failing: set[int] = set()
        self.has_failed: set[int] = set()
        self.tainted: set[str] = set()
        self.doubtful: set[str] = set()
        self.epoch = 0
        self.run(self._start())

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Let the world go on until `work` is done."""
        return self.runner.run(work)

    async def _start(self) -> None:
        self.patches = contextlib.ExitStack()
        for module, name, seconds in SHORTER:
            self.patches.enter_context(mock.patch.object(module, name, seconds))
        self.sims = [BinaryCacheSimulator(entries, key=KEY) for entries in (FIRST, SECOND)]
        self.asked_in_vain: list[str] = []
        for sim in self.sims:
            await sim.__aenter__()
            sim.fault(self._is_for_what_is_here)
        self.proxy = await self._proxy().start()

    def _is_for_what_is_here(self, request: Request) -> bool:
        """See a request come to an upstream; note it when its answer lies in the store."""
        here = {entry.nar_path: our_url(entry)[1:] for entry in NARS.values()}.get(request.raw_path)
        if request.method == "GET" and here is not None and self._is_here(here):
            self.asked_in_vain.append(request.raw_path)
        return False

    def _proxy(self) -> InsideProxy:
        return InsideProxy(
            self.folder,
            *(sim.url for sim in self.sims),
            keys=[KEY.public],
            negative_ttl=NEGATIVE_TTL,
            limits=Limits(max_size=ROOM),
        )

    @property
    def folder(self) -> Path:
        """Where the store is."""
        return Path(self.folders.name) / f"store{self.generation}"

    def teardown(self) -> None:
        """See what becomes of what is under way, and whether the folder is a binary cache."""
        try:
            self.run(self._finish())
            self.run(self._stop())
            assert self.proxy.store.totals.bytes == cached(self.proxy.store.layout)
            complete_paths(self.folder, [KEY])
        finally:
            self.patches.close()
            self.runner.close()
            self.folders.cleanup()

    async def _stop(self) -> None:
        await self.proxy.stop()
        for sim in self.sims:
            await sim.__aexit__(None, None, None)

    # --- clients

    @rule(path=paths)
    def ask_narinfo(self, path: str) -> None:
        """A narinfo comes as it was signed, or not at all."""
        truths = {_fields(_rewritten(entry)) for entry in NARS.values() if entry.hash_part == path}

        def check(answer: Received, *, due: bool) -> None:
            assert answer.status in ((200,) if due else (200, 404))
            if answer.status == 200:
                assert answer.complete
                assert _fields(answer.body) in truths

        due = self._is_here(f"{path}.narinfo") or self._all_is_well(path)
        self._ask(path, f"/{path}.narinfo", {}, check, due=due)

    @rule(url=nars)
    def ask_nar(self, url: str) -> None:
        """A NAR comes as it was signed, or its end never comes."""
        truth = bytes(NARS[url].file)

        def check(answer: Received, *, due: bool) -> None:
            assert answer.status in ((200,) if due else (200, 404))
            if answer.status == 200:
                assert answer.headers["Content-Length"] == str(len(truth))
                assert answer.complete or not due
                if answer.complete:
                    assert answer.body == truth
                else:  # the end of it is missing, and the rest is right unless an upstream gave other bytes
                    assert len(answer.body) <= len(truth) - HELD_BACK
                    assert url in self.tainted or truth.startswith(answer.body)

        self._ask_nar(url, {}, check)

    @rule(url=nars)
    def ask_nar_once_more(self, url: str) -> None:
        """The same, so that it is done as often as something is done to it."""
        self.ask_nar(url)

    @rule(url=nars, start=offsets, length=st.sampled_from([1, 1_000, 200_000]))
    def ask_range(self, url: str, start: int, length: int) -> None:
        """A range is that part of the NAR, or its end never comes."""
        truth = bytes(NARS[url].file)
        part = truth[start : start + length]
        right = 206 if part else 416

        def check(answer: Received, *, due: bool) -> None:
            assert answer.status in ((right,) if due else (right, 404))
            if answer.status == 206:
                last = start + len(part) - 1
                assert answer.headers["Content-Range"] == f"bytes {start}-{last}/{len(truth)}"
                assert answer.complete or not due
                assert not answer.complete or answer.body == part
                assert url in self.tainted or part.startswith(answer.body)

        self._ask_nar(url, {"Range": f"bytes={start}-{start + length - 1}"}, check)

    @rule(url=nars)
    def ask_head(self, url: str) -> None:
        """HEAD says how long the NAR is, and has no body."""
        size = str(len(NARS[url].file))
        honest = self._is_honest(NARS[url].hash_part)

        def check(answer: Received, *, due: bool) -> None:
            assert answer.status in ((200,) if due else (200, 404))
            assert answer.body == b""
            if answer.status == 200 and honest:
                assert answer.headers.get("Content-Length", size) == size

        self._ask_nar(url, {}, check, method="HEAD")

    @rule(which=st.integers(0, 9))
    def leave(self, which: int) -> None:
        """A client that waits leaves, and takes nothing with it."""
        if self.asks:
            ask = self.asks.pop(which % len(self.asks))
            self.run(_cancelled(ask.task))

    @rule()
    def finish(self) -> None:
        """Whoever is held up goes on."""
        self.run(self._finish())

    def _ask_nar(
        self,
        url: str,
        headers: dict[str, str],
        check: Check,
        method: str = "GET",
    ) -> None:
        path = NARS[url].hash_part
        due = self._is_here(url[1:])
        fetched = self._fetches(url)
        arriving = any(gate.reached.is_set() for held, gate in self.gates if held == url)
        evicted = self._evicted
        since = [ask for ask in self.asks if ask.path == path and ask.epoch == self.epoch]
        quiet = due or (arriving and bool(since))  # what has broken off meanwhile is fetched again
        due = due or (self._all_is_well(path) and self._has_variant(url))
        self._ask(path, url, headers, check, due=due, method=method)
        if quiet and self._fetches(url) != fetched:
            excused = self.run(self._have_evicted_since(evicted))
            assert excused, "what is here, or arrives, was fetched again"

    def _ask(
        self,
        path: str,
        url: str,
        headers: dict[str, str],
        check: Check,
        *,
        due: bool,
        method: str = "GET",
    ) -> None:
        """Send a request, and wait until it is answered or held up."""

        async def send() -> None:
            task = asyncio.ensure_future(self.proxy.pull(url, headers, method))
            ask = Ask(path, task, check, self.epoch, self._evicted, due)
            self.asks.append(ask)
            held = [asyncio.ensure_future(gate.reached.wait()) for _, gate in self.gates]
            done, _ = await asyncio.wait(
                {task, *held}, timeout=PATIENCE, return_when=asyncio.FIRST_COMPLETED
            )
            assert done, "neither answered nor held up"
            for waiting in held:
                await _cancelled(waiting)
            await asyncio.wait({task}, timeout=0.02)  # it may be held up, or not
            await self._judge_answered()

        self.doubtful.add(path)
        self.run(send())

    async def _finish(self) -> None:
        for _, gate in self.gates:
            gate.open()
        self.gates.clear()
        await asyncio.wait_for(self._everything(), PATIENCE)
        await self._judge_answered()
        assert not self.asks
        await self._agreed()

    async def _agreed(self) -> None:
        """Wait until the index counts what the disk holds, which is no more than it may."""

        def agrees() -> bool:
            store = self.proxy.store
            with contextlib.suppress(FileNotFoundError):  # it is being evicted
                within = store.index.used_bytes <= ROOM or store.totals.bytes == 0
                return within and store.totals == on_disk(self.folder)
            return False

        try:
            await self.proxy.eventually(agrees)
        except TimeoutError:
            used = self.proxy.store.index.used_bytes
            counted, there = self.proxy.store.totals, on_disk(self.folder)
            pytest.fail(f"the index counts {counted} of {there}, and {used} of {ROOM} bytes")

    async def _everything(self) -> None:
        await asyncio.gather(*(ask.task for ask in self.asks), return_exceptions=True)
        await self.proxy.idle()

    async def _judge_answered(self) -> None:
        for ask in [ask for ask in self.asks if ask.task.done()]:
            self.asks.remove(ask)
            answer = ask.task.result()
            due = ask.due and ask.epoch == self.epoch
            if due and not (answer.complete and answer.status in (200, 206, 416)):
                due = not await self._have_evicted_since(ask.evicted)
            ask.check(answer, due=due)
            asked_by_others = any(other.path == ask.path for other in self.asks)
            if answer.status in (200, 206) and answer.complete and not asked_by_others:
                self.doubtful.discard(ask.path)

    # --- upstreams

    @rule(which=upstreams)
    def go_down(self, which: int) -> None:
        """An upstream refuses connections, and resets those it has."""
        self.epoch += 1
        self.down.add(which)
        self.has_failed.add(which)
        self.run(_soon(self.sims[which].down))

    @rule(which=upstreams)
    def come_up(self, which: int) -> None:
        """An upstream is there again."""
        self.epoch += 1
        self.down.discard(which)
        self.run(_soon(self.sims[which].up))

    @rule(which=upstreams, path=paths, lie=st.sampled_from(sorted(NARINFO_LIES)))
    def lie_about_narinfo(self, which: int, path: str, lie: str) -> None:
        """An upstream gives something else for a narinfo."""
        entry = self._entry(which, path)
        self._fault(which, path, entry.narinfo_path, NARINFO_LIES[lie](entry))

    @rule(which=upstreams, path=paths, lie=st.sampled_from(sorted(NAR_LIES)), at=offsets)
    def lie_about_nar(self, which: int, path: str, lie: str, at: int) -> None:
        """An upstream gives something else for a NAR, and somebody wants it."""
        entry = self._entry(which, path)
        if lie in OTHER_BYTES:
            self.tainted.add(our_url(entry))
        self._fault(which, path, entry.nar_path, NAR_LIES[lie](at))
        self.ask_nar(our_url(entry))

    @rule(which=upstreams, path=paths, change=st.sampled_from(sorted(HARMLESS)))
    def change(self, which: int, path: str, change: str) -> None:
        """An upstream gives the right bytes in another way."""
        self.epoch += 1
        self.sims[which].fault(self._entry(which, path).nar_path, HARMLESS[change]())

    @rule(which=upstreams, path=paths, after=st.sampled_from([None, 0, 100, 30_000]))
    def hold_up(self, which: int, path: str, after: int | None) -> None:
        """An upstream goes silent in the middle of a NAR, for as long as we like."""
        self.epoch += 1
        entry = self._entry(which, path)
        gate = Gate(after)
        self.gates.append((our_url(entry), gate))
        self.sims[which].fault(_gets(entry.nar_path), gate, times=1)

    @rule(which=upstreams, path=paths)
    def withdraw(self, which: int, path: str) -> None:
        """An upstream has a path no longer."""
        self.epoch += 1
        self.lying.add((which, path))
        self.sims[which].withdraw(self._entry(which, path))

    @rule(which=upstreams)
    def heal(self, which: int) -> None:
        """An upstream does all it should again."""
        self.epoch += 1
        self.lying = {(other, path) for other, path in self.lying if other != which}
        self.failing.discard(which)
        sim = self.sims[which]
        sim.heal()
        sim.fault(self._is_for_what_is_here)
        sim.publish(*(FIRST, SECOND)[which])

    def _fault(self, which: int, path: str, target: str, fault: Fault) -> None:
        self.epoch += 1
        self.lying.add((which, path))
        self.failing.add(which)
        self.has_failed.add(which)
        self.sims[which].fault(target, fault)

    # --- the proxy

    @rule(seconds=st.sampled_from([1.0, NEGATIVE_TTL, 86_400.0]))
    def time_passes(self, seconds: float) -> None:
        """The clock jumps."""
        self.epoch += 1
        self.proxy.clock.now += seconds
        if seconds >= NEGATIVE_TTL:
            self.doubtful = {ask.path for ask in self.asks}

    @rule(by_kill=st.booleans(), index_is_lost=st.booleans())
    def restart(self, *, by_kill: bool, index_is_lost: bool) -> None:
        """The proxy is stopped, or killed, and started on what it left behind."""
        self.epoch += 1
        for ask in self.asks:
            self.run(_cancelled(ask.task))
        self.asks.clear()
        left = self.folder
        if by_kill:
            self.generation += 1
            _copy(left, self.folder)
        self.run(self.proxy.stop())
        complete_paths(self.folder, [KEY])
        if index_is_lost:
            for file in (self.folder / ".state").glob("index*"):
                file.unlink()
        now = self.proxy.clock.now
        self.proxy = self._proxy()
        self.proxy.clock.now = now
        self.run(self.proxy.start())
        self.doubtful.clear()
        self.has_failed = self.failing | self.down

    # --- what is true of it all

    @invariant()
    def nobody_waits_who_is_not_held_up(self) -> None:
        """Without an upstream that is silent, every request has been answered."""
        held = any(gate.arrivals for _, gate in self.gates)
        assert held or not self.asks

    @invariant()
    def what_is_here_is_not_fetched(self) -> None:
        """No upstream has been asked for a NAR that was in the store at that moment."""
        assert self.asked_in_vain == []

    @invariant()
    def nobody_is_left_alone_without_a_reason(self) -> None:
        """An upstream that has done no worse than to be slow, or not to have a path, is asked."""
        assert self._left_alone <= self.has_failed

    @property
    def _left_alone(self) -> set[int]:
        """The upstreams whose breakers are not closed."""
        breakers = (source.upstream.breaker for source in self.proxy.failover.sources)
        return {
            which for which, breaker in enumerate(breakers) if breaker.state is not State.CLOSED
        }

    @property
    def _evicted(self) -> int:
        return len(self.proxy.observed(Evicted))

    async def _have_evicted_since(self, count: int) -> bool:
        """Tell whether room was made meanwhile: the thread that does it says so before it answers."""
        if self._evicted == count:
            await asyncio.wrap_future(self.proxy.store.index.ask(lambda _database: None))
        return self._evicted > count

    def _entry(self, which: int, path: str) -> StoreEntry:
        return next(entry for entry in (FIRST, SECOND)[which] if entry.hash_part == path)

    def _fetches(self, url: str) -> int:
        """Count the downloads of a NAR from any upstream."""
        return sum(sim.gets(NARS[url].nar_path) for sim in self.sims)

    def _is_here(self, name: str) -> bool:
        return (self.folder / name).exists()

    def _is_honest(self, path: str) -> bool:
        return not any(liar == path for _, liar in self.lying)

    def _all_is_well(self, path: str) -> bool:
        """Tell whether nothing excuses a refusal: all upstreams are there, asked, and say the truth."""
        idle = not self.proxy.cache.tasks
        asked = not self.down and not self._left_alone
        return idle and asked and self._is_honest(path) and path not in self.doubtful

    def _has_variant(self, url: str) -> bool:
        """Tell whether the narinfo that counts, the first upstream's, leads to this file."""
        return url in {our_url(entry) for entry in FIRST}


def _gets(target: str) -> Callable[[Request], bool]:
    return lambda request: request.method == "GET" and request.raw_path == target


def _rewritten(entry: StoreEntry) -> bytes:
    return entry.narinfo(KEY).replace(entry.url("").encode(), our_url(entry)[1:].encode())


def _fields(text: bytes) -> frozenset[str]:
    return frozenset(text.decode().splitlines())


def _copy(folder: Path, to: Path) -> None:
    """Copy a folder as it is at one moment, although threads are at work in it: what kill -9 leaves."""

    def look() -> dict[Path, tuple[int, int]]:
        return {path: (path.stat().st_size, path.stat().st_mtime_ns) for path in folder.rglob("*")}

    while True:
        with contextlib.suppress(OSError, shutil.Error):
            before = look()
            shutil.copytree(folder, to)
            if look() == before:
                return
        shutil.rmtree(to, ignore_errors=True)


async def _soon(action: Callable[[], None]) -> None:
    action()


async def _cancelled(task: asyncio.Future[Any]) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


TestWholeCache = WholeCache.TestCase
TestWholeCache.settings = settings(
    max_examples=EXAMPLES,
    stateful_step_count=30,
    suppress_health_check=list(HealthCheck),
)
