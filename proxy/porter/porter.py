"""The daemon's end: start the porter when there is something to carry, and let it go when there is not.

Where it is not at hand, because it is starting, or has ended by itself, the daemon does everything by itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import socket
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

from proxy.channel import Channel, Outbox
from proxy.errors import StoreError
from proxy.events import Observer, PorterEnded
from proxy.porter.messages import (
    Carried,
    Carry,
    Outcome,
    Ping,
    Pong,
    Publish,
    Published,
    Refused,
    Task,
    encode,
    read_outcomes,
)
from proxy.spawn import ending, spawn
from proxy.store.publisher import Publication, Publisher
from proxy.upstream.carriage import Cargo, Heading, Order

IDLE: Final = 60.0
"""Seconds without a task after which the process is ended: it takes 45 to 70 MB."""

ANSWER_TIMEOUT: Final = 10.0
"""Seconds in which it has to say that it lives, as long as anything is waited for."""

WORTH_IT: Final = 8
"""Tasks, with less than `IDLE` between them, for which it is started: for a few, the daemon is enough."""

MANY: Final = 8
"""Files that are carried at the same time when a closure is on its way, and not a path or two."""

PAUSE: Final = 10.0
"""Seconds before it is started again when it has ended by itself."""

GONE: Final = "the process that carries files has ended"


class _GoneError(Exception):
    """The process has ended, and with it what it was told to do; how far that was done is not known."""


@dataclass(frozen=True, slots=True)
class _Carriage:
    answered: asyncio.Future[Heading]
    path: str


class Porter:
    """Made inside of a running event loop; closed with `aclose`.

    Args:
        observer: Told when the process ends by itself.
    """

    def __init__(self, observer: Observer) -> None:
        self._observer = observer
        self._loop = asyncio.get_running_loop()
        self._numbers = itertools.count()
        self._carrying: dict[int, _Carriage] = {}
        self._publishing: dict[int, Callable[[Exception | None], None]] = {}
        self._tasks: Outbox[Task] | None = None
        self._running: asyncio.Task[None] | None = None
        self._pinged: float | None = None
        self._not_before = 0.0
        self._last = 0.0
        self._wanted = 0
        self._closed = False
        self._process: asyncio.subprocess.Process | None = None
        self._channel: Channel | None = None

    @property
    def at_hand(self) -> bool:
        """Whether it takes tasks now. If not, it is started, when it was wanted often enough."""
        if self._tasks is not None:
            return True
        now = self._loop.time()
        self._wanted = self._wanted + 1 if now - self._last <= IDLE else 1
        self._last = now
        due = self._wanted >= WORTH_IT and now >= self._not_before
        if due and self._running is None and not self._closed:
            self._running = asyncio.create_task(self._run())
        return False

    @property
    def has_many(self) -> bool:
        """Whether it carries many files at the moment: `proxy.upstream.carriage.Carrier.has_many`."""
        return len(self._carrying) >= MANY

    @property
    def pid(self) -> int | None:
        """The process, if it runs."""
        return None if self._process is None else self._process.pid

    async def carry(self, order: Order, cargo: Cargo) -> Heading:
        """Fetch a file: `proxy.upstream.carriage.Carrier.carry`."""
        number = next(self._numbers)
        self._last = self._loop.time()
        self._send(Carry(number, order, cargo))
        carriage = self._carrying[number] = _Carriage(self._loop.create_future(), cargo.path)
        try:
            return await carriage.answered
        except asyncio.CancelledError:
            if carriage.answered.done() and not carriage.answered.cancelled():
                _remove(carriage.path)  # it came at the same moment
            raise

    def publisher(self, on_published: Callable[[Publication], None]) -> PorterPublisher:
        """Make what gives final names in the store, as `proxy.store.publisher.Publisher` does."""
        return PorterPublisher(self, on_published)

    def publish(self, publication: Publication, done: Callable[[Exception | None], None]) -> bool:
        """Have files published, if the process runs; say how that ended."""
        if self._tasks is None:
            return False
        number = next(self._numbers)
        self._last = self._loop.time()
        self._publishing[number] = done
        renames = tuple((each.source, each.target, each.content) for each in publication.renames)
        self._send(Publish(number, renames, publication.origin, publication.superseded))
        return True

    async def aclose(self) -> None:
        """End the process; what it has not done yet fails."""
        self._closed = True
        if self._running is not None:
            self._running.cancel()
            await asyncio.gather(self._running, return_exceptions=True)

    def _send(self, task: Task) -> None:
        if self._tasks is None:
            raise StoreError(GONE)
        self._tasks.put(task)

    async def _run(self) -> None:
        """Run the process until it ends, or is not needed any more."""
        ours, theirs = socket.socketpair()
        channel = Channel(
            ours, on_frame=self._on_frame, on_drained=lambda: None, on_end=lambda: None
        )
        try:
            with theirs:
                process = await spawn("proxy.porter", theirs)
        except OSError as error:
            channel.close()
            self._running = None
            self._ended(0, f"it cannot be started: {error.strerror}")
            return
        except BaseException:
            channel.close()
            raise
        ended = asyncio.create_task(process.wait())
        self._process, self._channel, self._tasks = process, channel, Outbox(channel, encode)
        self._pinged = None
        try:
            while not ended.done() and not self._is_idle:
                if self._is_busy and self._pinged is None:
                    self._pinged = self._loop.time()
                    self._send(Ping())
                await asyncio.wait((ended,), timeout=min(ANSWER_TIMEOUT, IDLE) / 2)
                if self._is_stuck:  # by a disk that does not answer, or by somebody who stopped it
                    self._kill()
                    await asyncio.wait((ended,))
            if ended.done():
                self._ended(process.pid, ending(ended.result()))
        finally:
            self._kill()  # before it sees the end and goes by itself: else two wait for it
            self._process = self._channel = self._tasks = None
            channel.close()
            try:
                await asyncio.shield(ended)
            finally:
                self._running = None
                self._fail_all()

    def _kill(self) -> None:
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()

    @property
    def _is_idle(self) -> bool:
        return not self._is_busy and self._loop.time() - self._last > IDLE

    @property
    def _is_busy(self) -> bool:
        return bool(self._carrying or self._publishing)

    @property
    def _is_stuck(self) -> bool:
        pinged = self._pinged
        return pinged is not None and self._loop.time() - pinged >= ANSWER_TIMEOUT

    def _ended(self, pid: int, reason: str) -> None:
        self._not_before = self._loop.time() + PAUSE
        self._observer(PorterEnded(pid, reason))

    def _fail_all(self) -> None:
        """Nobody shall wait for a process that is gone; until then it might have gone on writing."""
        for number in (*self._carrying, *self._publishing):
            self._settle(number, _GoneError(GONE))

    def _on_frame(self, frame: bytes, _fd: int) -> None:
        try:
            outcomes = read_outcomes(frame)
        except ValueError:
            if self._channel is not None:
                self._channel.close()  # there is no talking with it; it ends when it sees that
            return
        for outcome in outcomes:
            self._on_outcome(outcome)

    def _on_outcome(self, outcome: Outcome) -> None:
        match outcome:
            case Pong():
                self._pinged = None
            case Refused(number, failure):
                self._settle(number, failure.error())
            case Published(number):
                self._settle(number, None)
            case Carried(number, heading):
                carriage = self._carrying.pop(number)
                if not carriage.answered.done():
                    carriage.answered.set_result(heading)
                else:  # whoever ordered it has given up
                    _remove(carriage.path)

    def _settle(self, number: int, error: Exception | None) -> None:
        if number in self._publishing:
            self._publishing.pop(number)(error)
        elif error is not None:
            carriage = self._carrying.pop(number)
            if isinstance(error, _GoneError):
                _remove(carriage.path)  # it may have got that far
                error = StoreError(GONE)
            if not carriage.answered.done():
                carriage.answered.set_exception(error)


class PorterPublisher:
    """Gives final names in the store, in the porter's process if that runs, and else in ours.

    Args:
        porter: The porter.
        on_published: As for `proxy.store.publisher.Publisher`.
    """

    def __init__(self, porter: Porter, on_published: Callable[[Publication], None]) -> None:
        self._porter = porter
        self._on_published = on_published
        self._loop = asyncio.get_running_loop()
        self._own = Publisher(on_published)
        self._pending: set[asyncio.Future[None]] = set()

    def submit(self, publication: Publication) -> Future[None] | asyncio.Future[None]:
        """Queue a publication, on the event loop, and return its future, which nobody may cancel."""
        done: asyncio.Future[None] = self._loop.create_future()
        ended = partial(self._ended, publication, done)
        if not self._porter.publish(publication, ended):
            return self._own.submit(publication)
        self._pending.add(done)
        return done

    def close(self) -> None:
        """Publish what is queued. Blocks; call it off the event loop."""
        asyncio.run_coroutine_threadsafe(self._drained(), self._loop).result()
        self._own.close()

    async def _drained(self) -> None:
        while self._pending:
            await asyncio.wait(self._pending)

    def _ended(
        self, publication: Publication, done: asyncio.Future[None], error: Exception | None
    ) -> None:
        if isinstance(error, _GoneError):
            self._publish_here(publication, done)
            return
        self._pending.discard(done)
        if error is None:
            try:
                self._on_published(publication)
            except Exception as fault:  # noqa: BLE001  # nobody may wait for ever
                error = StoreError(f"cannot publish: {fault!r}")
        if error is None:
            done.set_result(None)
        else:
            done.set_exception(error)

    def _publish_here(self, publication: Publication, done: asyncio.Future[None]) -> None:
        """Begin anew; where something has its final name already, this fails, and can be made good later."""
        for rename in publication.renames:
            if rename.content is not None:
                _remove(rename.source)  # it is written here
        ours = asyncio.wrap_future(self._own.submit(publication))
        ours.add_done_callback(
            lambda ours: self._ended_here(done, None if ours.cancelled() else ours.exception())
        )

    def _ended_here(self, done: asyncio.Future[None], error: BaseException | None) -> None:
        self._pending.discard(done)
        if error is None:
            done.set_result(None)
        else:
            done.set_exception(error)


def _remove(path: Path | str) -> None:
    with contextlib.suppress(OSError):
        Path(path).unlink(missing_ok=True)
