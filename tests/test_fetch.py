"""A fetch: what its readers see while the file arrives, and what is left when it ends."""

from __future__ import annotations

import asyncio
import itertools
import os
import random
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager, asynccontextmanager, closing
from pathlib import Path
from typing import Any, TypeVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.errors import (
    HashMismatchError,
    NotFoundError,
    ProxyError,
    SizeMismatchError,
    UpstreamUnavailableError,
)
from proxy.events import Event, FetchEnded, FetchStarted, Rejected
from proxy.fetch import HELD_BACK, Fetch
from proxy.nix.hashes import Hash
from proxy.nix.nar import NarVerifier
from proxy.store.files import Partial
from proxy.store.incoming import Incoming
from proxy.supply import WHOLE, OneAnswer, Promise, Supply, Unverified, Verifier

E = TypeVar("E", bound=Event)

pytestmark = pytest.mark.timeout(60)

PATIENCE = 10.0
"""Seconds after which nothing is waited for any more."""

LARGE = random.Random(1).randbytes(WHOLE + HELD_BACK + 123)
SMALL = random.Random(2).randbytes(WHOLE)


class ScriptedBody:
    """What an upstream sends: these pieces, when `gate` opens an end or an error behind them.

    Attributes:
        is_open: Whether the connection to the upstream is open.
        failed_with: What was raised while it was open.
        waiting: Set when all pieces have been read.
        gate: Stands before the end; open unless closed by the test.
    """

    def __init__(
        self,
        *pieces: bytes,
        size: int | None = None,
        error: ProxyError | None = None,
        gated: bool = False,
    ) -> None:
        self.size = size
        self.failed_with: BaseException | None = None
        self.is_open = False
        self.waiting = asyncio.Event()
        self.gate = asyncio.Event()
        if not gated:
            self.gate.set()
        self._pieces = iter(pieces)
        self._error = error

    async def read(self) -> bytes:
        """Return the next piece."""
        await asyncio.sleep(0)
        for piece in self._pieces:
            return piece
        self.waiting.set()
        await self.gate.wait()
        if self._error:
            raise self._error
        return b""

    @asynccontextmanager
    async def open(self) -> AsyncIterator[ScriptedBody]:
        """Connect."""
        self.is_open = True
        try:
            yield self
        except BaseException as error:
            self.failed_with = error
            raise
        finally:
            self.is_open = False


class Nowhere(AbstractAsyncContextManager[Supply]):
    """Finds out that the file cannot be had."""

    def __init__(self, error: ProxyError) -> None:
        self._error = error

    async def __aenter__(self) -> Supply:
        await asyncio.sleep(0)
        raise self._error

    async def __aexit__(self, *_: object) -> None:
        """Nothing is open."""


class ThoughtfulVerifier(Unverified):
    """Finds everything right, as soon as it is allowed to: the thread waits as one that computes.

    Attributes:
        asked: Set when the verdict is asked for.
        answer: Lets the verdict be given.
    """

    def __init__(self, *, in_feed: bool = False) -> None:
        self.asked = threading.Event()
        self.answer = threading.Event()
        self._in_feed = in_feed

    def feed(self, data: bytes) -> None:
        """Take the next bytes."""
        if self._in_feed:
            self._think()

    def finish(self) -> None:
        """Give the verdict."""
        self._think()

    def _think(self) -> None:
        self.asked.set()
        assert self.answer.wait(PATIENCE)


class DemandingVerifier(Unverified):
    """Needs so much memory that it is put off.

    Attributes:
        at_work: Released when it has its turn.
        answer: Lets it end.
        seen: What it has read again.
    """

    put_off = True

    def __init__(self, at_work: threading.Semaphore, answer: threading.Event) -> None:
        self.at_work = at_work
        self.answer = answer
        self.seen = b""

    def reread(self, pieces: Iterable[bytes]) -> None:
        """Take all of it."""
        self.at_work.release()
        assert self.answer.wait(PATIENCE)
        self.seen = b"".join(pieces)


class BrokenVerifier(Unverified):
    """Has a fault that nobody foresaw."""

    def feed(self, data: bytes) -> None:
        """Fail."""
        raise ZeroDivisionError


class Choking(Unverified):
    """Cannot read what it is fed from some byte on, as a decompressor of damaged data."""

    def __init__(self, at: int) -> None:
        self._left = at

    def feed(self, data: bytes) -> None:
        """Count."""
        self._left -= len(data)
        if self._left <= 0:
            raise HashMismatchError("damaged")


class Bench:
    """Makes fetches of partial files in a folder.

    Attributes:
        events: Everything that was observed, oldest first.
    """

    def __init__(self, folder: Path, executor: ThreadPoolExecutor) -> None:
        self.events: list[Event] = []
        self._folder = folder
        self._executor = executor
        self._names = map(str, itertools.count())
        self.path = folder

    def fetch(
        self,
        body: ScriptedBody,
        *,
        verifier: Verifier | None = None,
        expected_size: int | None = None,
        publish: Callable[[Partial], Awaitable[None]] | None = None,
    ) -> Fetch:
        """Make a fetch; `path` is its partial file."""

        @asynccontextmanager
        async def supply() -> AsyncIterator[Supply]:
            async with body.open():
                promise = Promise(lambda: verifier or Unverified(), expected_size, publish)
                yield OneAnswer("up", body, promise)

        return self.fetch_from(supply)

    def fetch_from(self, supply: Callable[[], AbstractAsyncContextManager[Supply]]) -> Fetch:
        """Make a fetch of whatever is supplied."""
        self.path = path = self._folder / next(self._names)
        return Fetch(
            "thing",
            open_supply=lambda _fetch: supply(),
            incoming=Incoming(lambda: Partial(path), lambda _error: None),
            executor=self._executor,
            observer=self.events.append,
        )

    def observed(self, kind: type[E]) -> list[E]:
        """Return the events of one kind."""
        return [event for event in self.events if isinstance(event, kind)]

    @property
    def descriptors(self) -> int:
        """How often the partial file is open in this process."""
        links = (_target(fd) for fd in Path("/proc/self/fd").iterdir())
        return sum(link.removesuffix(" (deleted)") == str(self.path) for link in links)


def _target(descriptor: Path) -> str:
    try:
        return str(descriptor.readlink())
    except FileNotFoundError:  # the one by which the folder is listed
        return ""


@pytest.fixture(scope="module")
def executor() -> Iterator[ThreadPoolExecutor]:
    """Return worker threads."""
    with ThreadPoolExecutor(4) as threads:
        yield threads


@pytest.fixture
def bench(tmp_path: Path, executor: ThreadPoolExecutor) -> Bench:
    """Return a maker of fetches."""
    return Bench(tmp_path, executor)


def verifier_of(data: bytes) -> NarVerifier:
    """Return a verifier that wants exactly these bytes."""
    return NarVerifier(compression="none", nar_hash=Hash.sha256(data), nar_size=len(data))


async def read(fetch: Fetch, start: int = 0) -> tuple[bytes, ProxyError | None]:
    """Read from `start` as a client does; return what came, and what ended it if not the end."""
    got = bytearray()
    with closing(fetch.attach()) as reader:
        while True:
            position = start + len(got)
            try:
                end = await reader.wait_beyond(position)
            except ProxyError as error:
                return bytes(got), error
            if end <= position:
                return bytes(got), None
            piece = os.pread(reader.fd, end - position, position)
            assert len(piece) == end - position, "released, but not there"
            got += piece


def halves(data: bytes) -> Sequence[bytes]:
    """Return the data in two pieces."""
    return data[: len(data) // 2], data[len(data) // 2 :]


# --- what may be read -------------------------------------------------------------------------


@pytest.mark.parametrize("announced", [True, False], ids=["size announced", "size unknown"])
async def test_the_last_piece_waits_for_the_verdict(bench: Bench, *, announced: bool) -> None:
    """All but the last piece may be read while it arrives; that one only once it is verified."""
    verifier = ThoughtfulVerifier()
    body = ScriptedBody(LARGE[:-1], LARGE[-1:], size=len(LARGE) if announced else None)
    fetch = bench.fetch(body, verifier=verifier)
    task = asyncio.create_task(fetch.run())
    await asyncio.to_thread(verifier.asked.wait)
    assert fetch.released == len(LARGE) - HELD_BACK - announced  # of the last byte nothing is known
    verifier.answer.set()
    await task
    assert fetch.released == len(LARGE)
    assert await read(fetch) == (LARGE, None)
    fetch.close()


async def test_what_needs_much_memory_takes_turns(bench: Bench) -> None:
    """All of it is here, and released but the end, before two at a time are judged; none is forgotten."""
    at_work, answer = threading.Semaphore(0), threading.Event()
    verifiers = [DemandingVerifier(at_work, answer) for _ in range(5)]
    fetches = [
        bench.fetch(ScriptedBody(*halves(LARGE), size=len(LARGE)), verifier=each)
        for each in verifiers
    ]
    tasks = [asyncio.create_task(fetch.run()) for fetch in fetches]
    for fetch in fetches:
        await fetch.wait_beyond(len(LARGE) - HELD_BACK - 1)
    for _ in range(2):
        assert await asyncio.to_thread(at_work.acquire, timeout=PATIENCE)
    other = bench.fetch(ScriptedBody(SMALL), verifier=verifier_of(SMALL))
    await other.run()
    assert await read(other) == (SMALL, None), "others are not held up"
    assert not at_work.acquire(blocking=False), "a third one has begun"
    answer.set()
    await asyncio.gather(*tasks)
    for fetch, verifier in zip(fetches, verifiers, strict=True):
        assert verifier.seen == LARGE
        assert await read(fetch) == (LARGE, None)
        fetch.close()
    other.close()


async def test_what_waits_for_its_turn_can_be_given_up(bench: Bench) -> None:
    """At the end of the daemon nobody waits for long: what is being read again stops."""
    at_work, answer = threading.Semaphore(0), threading.Event()
    verifier = DemandingVerifier(at_work, answer)
    fetch = bench.fetch(ScriptedBody(LARGE, size=len(LARGE)), verifier=verifier)
    task = asyncio.create_task(fetch.run())
    assert await asyncio.to_thread(at_work.acquire, timeout=PATIENCE)
    task.cancel()
    await asyncio.sleep(0)
    answer.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert verifier.seen == b""
    fetch.close()


async def test_what_arrived_can_be_read_at_once(bench: Bench) -> None:
    """Readers have the first bytes while the upstream still owes the rest."""
    body = ScriptedBody(LARGE[: 2 * HELD_BACK], size=len(LARGE), gated=True)
    fetch = bench.fetch(body)
    task = asyncio.create_task(fetch.run())
    await fetch.wait_beyond(0)
    assert fetch.size == len(LARGE)
    assert await fetch.wait_beyond(HELD_BACK - 1) == HELD_BACK
    body.gate.set()
    await task
    fetch.close()


async def test_the_very_first_bytes_wait_for_nothing(bench: Bench) -> None:
    """Readers of a large file have its first bytes before any others have come."""
    body = ScriptedBody(LARGE[:1_000], size=len(LARGE), gated=True)
    fetch = bench.fetch(body)
    task = asyncio.create_task(fetch.run())
    assert await asyncio.wait_for(fetch.wait_beyond(0), PATIENCE) == 1_000
    body.gate.set()
    await task
    fetch.close()


@pytest.mark.parametrize("size", [0, 1, WHOLE - 1, WHOLE])
async def test_a_small_file_is_released_whole(bench: Bench, size: int) -> None:
    """Of a small file nothing can be read before it is verified, and then all of it."""
    verifier = ThoughtfulVerifier()
    data = SMALL[:size]
    fetch = bench.fetch(ScriptedBody(*filter(None, halves(data)), size=size), verifier=verifier)
    task = asyncio.create_task(fetch.run())
    await asyncio.to_thread(verifier.asked.wait)
    assert fetch.released == 0
    verifier.answer.set()
    await fetch.wait_beyond(0)
    assert fetch.released == size
    assert await read(fetch) == (data, None)
    await task
    fetch.close()


async def test_a_bad_small_file_is_never_released(bench: Bench) -> None:
    """Of a small file that is not the promised one nobody reads a byte."""
    fetch = bench.fetch(ScriptedBody(*halves(SMALL[::-1])), verifier=verifier_of(SMALL))
    await fetch.run()
    with pytest.raises(HashMismatchError):
        await fetch.wait_beyond(0)
    assert fetch.released == 0
    assert await read(fetch) == (b"", fetch.error)
    fetch.close()


async def test_damage_is_noticed_before_it_gets_out(bench: Bench) -> None:
    """What the verifier chokes on, and what came shortly before that, nobody reads."""
    damaged = LARGE[: 3 * HELD_BACK]
    fetch = bench.fetch(
        ScriptedBody(damaged, LARGE[len(damaged) :], size=len(LARGE)),
        verifier=Choking(at=len(damaged) + 1),
    )
    reading = asyncio.create_task(read(fetch))
    await fetch.run()
    got, error = await reading
    assert got == damaged[: 2 * HELD_BACK]
    assert isinstance(error, HashMismatchError)
    fetch.close()


async def test_whoever_supplies_knows_what_cannot_be_taken_back(bench: Bench) -> None:
    """While a piece is looked at, what of it will be released counts as given to readers."""
    verifier = ThoughtfulVerifier(in_feed=True)
    fetch = bench.fetch(ScriptedBody(LARGE[:-1], size=len(LARGE), gated=True), verifier=verifier)
    task = asyncio.create_task(fetch.run())
    await asyncio.to_thread(verifier.asked.wait)
    assert (fetch.released, fetch.committed) == (0, len(LARGE) - 1 - HELD_BACK)
    task.cancel()
    verifier.answer.set()
    await asyncio.wait([task])
    fetch.close()


async def test_an_unknown_size_is_known_at_the_end(bench: Bench) -> None:
    """Where neither narinfo nor upstream says the size, who needs it waits until the end."""
    body = ScriptedBody(*halves(LARGE), gated=True)
    fetch = bench.fetch(body)
    task = asyncio.create_task(fetch.run())
    asked = asyncio.create_task(fetch.size_known())
    await fetch.wait_beyond(len(LARGE) - HELD_BACK - 1)
    assert fetch.size is None
    assert not asked.done()
    body.gate.set()
    assert await asked == len(LARGE)
    await task
    fetch.close()


async def test_an_unknown_size_stays_unknown_on_failure(bench: Bench) -> None:
    """Who waits for a size that will never be known is told so."""
    error = UpstreamUnavailableError("up", "cut")
    fetch = bench.fetch(ScriptedBody(LARGE, error=error))
    asked = asyncio.create_task(fetch.size_known())
    await fetch.run()
    with pytest.raises(UpstreamUnavailableError):
        await asked
    fetch.close()


# --- what goes wrong --------------------------------------------------------------------------


async def test_an_upstream_that_announces_another_size_is_not_read(bench: Bench) -> None:
    """A Content-Length other than FileSize is the end before the first byte."""
    fetch = bench.fetch(ScriptedBody(LARGE, size=len(LARGE) + 1), expected_size=len(LARGE))
    await fetch.run()
    with pytest.raises(SizeMismatchError):
        await fetch.wait_beyond(0)
    assert [event.kind for event in bench.observed(Rejected)] == ["size"]
    assert not bench.path.exists()
    fetch.close()


@pytest.mark.parametrize("sent", [LARGE[:-1], LARGE + b"!"], ids=["shorter", "longer"])
@pytest.mark.parametrize("known_from", ["narinfo", "upstream"])
async def test_a_body_of_another_size_is_never_whole(
    bench: Bench, sent: bytes, known_from: str
) -> None:
    """Fewer or more bytes than announced fail the fetch, whoever announced them."""
    size = len(LARGE)
    body = ScriptedBody(*halves(sent), size=size if known_from == "upstream" else None)
    fetch = bench.fetch(body, expected_size=size if known_from == "narinfo" else None)
    reading = asyncio.create_task(read(fetch))
    await fetch.run()
    got, error = await reading
    assert isinstance(error, SizeMismatchError)
    assert len(got) <= size - HELD_BACK
    fetch.close()


async def test_an_upstream_that_dies_fails_all_readers(bench: Bench) -> None:
    """Each reader gets what had been released, and then the reason."""
    error = UpstreamUnavailableError("up", "cut")
    fetch = bench.fetch(ScriptedBody(LARGE[:-1], size=len(LARGE), error=error))
    readers = [asyncio.create_task(read(fetch, start)) for start in (0, 1, 70_000, len(LARGE))]
    await fetch.run()
    for start, (got, reason) in zip((0, 1, 70_000), await asyncio.gather(*readers), strict=False):
        assert reason is error
        assert got == LARGE[start : len(LARGE) - 1 - HELD_BACK]
    assert not bench.observed(Rejected)
    fetch.close()


async def test_a_fault_of_our_own_fails_all_readers(bench: Bench) -> None:
    """Whatever ends a fetch, also what nobody foresaw, nobody waits for it for ever."""
    fetch = bench.fetch(ScriptedBody(*halves(LARGE)), verifier=BrokenVerifier())
    reading = asyncio.create_task(read(fetch, len(LARGE)))
    await asyncio.gather(fetch.run(), return_exceptions=True)
    got, error = await asyncio.wait_for(reading, 2)
    assert got == b""
    assert isinstance(error, ProxyError)
    fetch.close()


async def test_readers_wait_for_a_file_that_nobody_has(bench: Bench) -> None:
    """Who attached before it was known that there is no such file is told so."""
    error = NotFoundError("no upstream has it")
    fetch = bench.fetch_from(lambda: Nowhere(error))
    reading = [asyncio.create_task(read(fetch)) for _ in range(3)]
    await fetch.run()
    assert await asyncio.gather(*reading) == [(b"", error)] * 3
    assert not bench.observed(Rejected)
    fetch.close()


async def test_the_supplier_learns_what_was_wrong(bench: Bench) -> None:
    """Whoever supplied a bad file sees why it is bad, and can stop believing what led to it."""
    body = ScriptedBody(LARGE[::-1])
    fetch = bench.fetch(body, verifier=verifier_of(LARGE))
    await fetch.run()
    assert body.failed_with is fetch.error
    assert isinstance(body.failed_with, HashMismatchError)
    fetch.close()


async def test_what_happened_is_told(bench: Bench) -> None:
    """The observer hears of the start, of the verdict, and of the end with its reason."""
    fetch = bench.fetch(ScriptedBody(LARGE[::-1]), verifier=verifier_of(LARGE))
    await fetch.run()
    assert bench.events[0] == FetchStarted("thing", "up")
    (rejected,) = bench.observed(Rejected)
    assert (rejected.upstream, rejected.what, rejected.kind) == ("up", "thing", "hash")
    (ended,) = bench.observed(FetchEnded)
    assert (ended.size, ended.error) == (len(LARGE), rejected.reason)
    assert repr(fetch) == f"<Fetch thing {len(LARGE)}/None from 'up'>"
    fetch.close()


# --- its end ----------------------------------------------------------------------------------


async def test_publishing_takes_the_file_over(bench: Bench) -> None:
    """A verified file is handed on, complete, and is still there after the fetch let go of it."""
    handed: list[bytes] = []

    async def publish(partial: Partial) -> None:
        handed.append(partial.read(0, partial.size))

    fetch = bench.fetch(ScriptedBody(*halves(LARGE)), verifier=verifier_of(LARGE), publish=publish)
    await fetch.run()
    fetch.close()
    assert handed == [LARGE]
    assert bench.path.read_bytes() == LARGE
    assert bench.descriptors == 0


async def test_readers_have_all_before_the_disk_has(bench: Bench) -> None:
    """Nobody waits for the publication: the last piece is released before it."""
    published = asyncio.Event()

    async def publish(_partial: Partial) -> None:
        await published.wait()

    fetch = bench.fetch(ScriptedBody(LARGE), publish=publish)
    task = asyncio.create_task(fetch.run())
    assert await read(fetch) == (LARGE, None)
    assert not task.done()
    published.set()
    await task
    fetch.close()


async def test_a_bad_file_is_not_published(bench: Bench) -> None:
    """What does not verify is handed to nobody and removed."""

    async def publish(_partial: Partial) -> None:
        pytest.fail("it was published")

    fetch = bench.fetch(ScriptedBody(LARGE[::-1]), verifier=verifier_of(LARGE), publish=publish)
    await fetch.run()
    fetch.close()
    assert not bench.path.exists()
    assert bench.descriptors == 0


async def test_a_file_that_nobody_keeps_is_removed(bench: Bench) -> None:
    """Without anyone to publish it, the file goes when the fetch is closed."""
    fetch = bench.fetch(ScriptedBody(LARGE))
    await fetch.run()
    assert bench.path.exists()
    fetch.close()
    assert not bench.path.exists()


async def test_readers_read_on_after_the_fetch_is_closed(bench: Bench) -> None:
    """A slow reader has a descriptor of its own: closing and removing the file takes it no byte."""
    fetch = bench.fetch(ScriptedBody(*halves(LARGE)))
    reader = fetch.attach()
    before = reader.size
    await fetch.run()
    fetch.close()
    assert not bench.path.exists()
    assert await reader.wait_beyond(1000) == reader.size == len(LARGE)
    assert before is None
    assert os.pread(reader.fd, len(LARGE), 0) == LARGE
    for _ in range(2):
        reader.close()
    assert bench.descriptors == 0


async def test_cancelling_closes_everything(bench: Bench) -> None:
    """A cancelled fetch hangs up, tells its readers, and leaves neither file nor descriptor."""
    body = ScriptedBody(LARGE[:-1], size=len(LARGE), gated=True)
    fetch = bench.fetch(body)
    reading = asyncio.create_task(read(fetch))
    task = asyncio.create_task(fetch.run())
    await body.waiting.wait()
    await fetch.wait_beyond(len(LARGE) - HELD_BACK - 2)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    got, error = await reading
    fetch.close()
    assert got == LARGE[: -HELD_BACK - 1]
    assert isinstance(error, ProxyError)
    assert not body.is_open
    assert not bench.path.exists()
    assert bench.descriptors == 0


async def test_cancelling_waits_for_the_worker(bench: Bench) -> None:
    """When a cancelled fetch has ended, no thread is at work on its file any more.

    Else the thread might write to a descriptor that is closed, or is another file's by then.
    """
    verifier = ThoughtfulVerifier(in_feed=True)
    fetch = bench.fetch(ScriptedBody(*halves(LARGE)), verifier=verifier)
    task = asyncio.create_task(fetch.run())
    await asyncio.to_thread(verifier.asked.wait)
    task.cancel()
    ended_early, _ = await asyncio.wait([task], timeout=0.2)
    verifier.answer.set()
    await asyncio.wait([task])
    fetch.close()
    assert not ended_early


# --- whatever the pieces ----------------------------------------------------------------------

_sizes = st.integers(0, WHOLE + 2 * HELD_BACK)
_cuts = st.lists(_sizes, max_size=8)


def _cut(data: bytes, cuts: Sequence[int]) -> Iterator[bytes]:
    """Yield the data in pieces, none of them empty."""
    places = sorted({0, len(data), *(cut for cut in cuts if cut < len(data))})
    return (data[start:stop] for start, stop in itertools.pairwise(places))


def _lies(data: bytes) -> Any:
    """Return other bytes than these: damaged, cut short or longer."""
    damaged = st.integers(0, max(0, len(data) - 1)).map(
        lambda at: data[:at] + bytes(255 - byte for byte in data[at : at + 1]) + data[at + 1 :]
    )
    shorter = st.integers(0, max(0, len(data) - 1)).map(lambda end: data[:end])
    longer = st.binary(min_size=1, max_size=50).map(lambda more: data + more)
    return st.one_of(damaged, shorter, longer) if data else longer


@given(
    size=_sizes,
    cuts=_cuts,
    starts=st.lists(_sizes, min_size=1, max_size=4),
    announced=st.booleans(),
    promised=st.booleans(),
)
async def test_readers_of_a_good_file_read_it(
    tmp_path_factory: pytest.TempPathFactory,
    executor: ThreadPoolExecutor,
    *,
    size: int,
    cuts: Sequence[int],
    starts: Sequence[int],
    announced: bool,
    promised: bool,
) -> None:
    """Whatever the pieces it comes in, each reader reads the truth from its own position on."""
    data = random.Random(size).randbytes(size)
    bench = Bench(tmp_path_factory.mktemp("good"), executor)
    body = ScriptedBody(*_cut(data, cuts), size=size if announced else None)
    fetch = bench.fetch(body, verifier=verifier_of(data), expected_size=size if promised else None)
    readers = [read(fetch, min(start, size)) for start in starts]
    *results, _ = await asyncio.gather(*readers, fetch.run())
    fetch.close()
    for start, result in zip(starts, results, strict=True):
        assert result == (data[start:], None)


@given(
    source=st.data(),
    size=_sizes,
    cuts=_cuts,
    starts=st.lists(_sizes, min_size=1, max_size=4),
    announced=st.booleans(),
)
async def test_readers_of_a_bad_file_never_read_it_whole(
    tmp_path_factory: pytest.TempPathFactory,
    executor: ThreadPoolExecutor,
    *,
    source: st.DataObject,
    size: int,
    cuts: Sequence[int],
    starts: Sequence[int],
    announced: bool,
) -> None:
    """Each reader of a lie gets an error, and of the lie its beginning, never its last piece."""
    data = random.Random(size).randbytes(size)
    lie: bytes = source.draw(_lies(data))
    bench = Bench(tmp_path_factory.mktemp("bad"), executor)
    body = ScriptedBody(*_cut(lie, cuts), size=len(lie) if announced else None)
    fetch = bench.fetch(body, verifier=verifier_of(data))
    readers = [read(fetch, min(start, len(lie))) for start in starts]
    *results, _ = await asyncio.gather(*readers, fetch.run())
    fetch.close()
    assert not bench.path.exists()
    for start, result in zip(starts, results, strict=True):
        assert result is not None
        got, error = result
        assert error is fetch.error
        assert lie[min(start, len(lie)) :].startswith(got)
        assert not got or start + len(got) <= len(lie) - HELD_BACK
