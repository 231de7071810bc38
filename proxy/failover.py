"""Which upstream's answer to take.

All upstreams are asked at once. The most preferred one that has the thing wins; when a less preferred one
has it and a more preferred one is still silent, that one gets a moment longer and is then passed over;
so is one that has failed before and is on probation. Who is passed over has until the end of the budget to
show that it lives: its breaker wants to know.
"Absent" is said only when every upstream said it; anything less is "unknown". Before that is said of a
narinfo, those whose answer was cut off are asked once more (aiohttp does so where none had begun).

What decides (`choose`) is pure; `Failover` obeys it.
"""

from __future__ import annotations

import asyncio
import enum
import time
from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from proxy.asking import Asker, Question
from proxy.errors import (
    NotFoundError,
    ProxyError,
    TrustError,
    UnverifiableError,
    UpstreamBrokeOffError,
    UpstreamError,
    UpstreamLiedError,
    UpstreamTimeoutError,
)
from proxy.events import Asked, Observer, Rejected
from proxy.nix import narinfo
from proxy.nix.decoders import READABLE
from proxy.nix.narinfo import VerifiedNarInfo
from proxy.nix.signature import Keyring
from proxy.nix.store_path import HashPart
from proxy.nix.trust import Trust
from proxy.upstream.names import NameFilter
from proxy.upstream.remote import Upstream

T = TypeVar("T")

GRACE = 0.25
"""Part of the budget that a more preferred upstream gets once a less preferred one has answered."""


NOBODY = Keyring(())

EVERY_NAME = NameFilter()


class State(enum.Enum):
    """How far one upstream's answer is."""

    PENDING = enum.auto()
    HAS = enum.auto()
    ABSENT = enum.auto()
    FAILED = enum.auto()


class Verdict(enum.Enum):
    """What to do when no upstream is chosen (yet)."""

    WAIT = enum.auto()
    ABSENT = enum.auto()
    UNKNOWN = enum.auto()


def choose(states: Sequence[State], *, patient: bool) -> int | Verdict:
    """Decide from what the upstreams said so far.

    Args:
        states: One for each upstream, the most preferred first.
        patient: False once waiting for more preferred upstreams has to end.

    Returns:
        The position of the upstream to take, or what else to do.
    """
    for position, state in enumerate(states):
        if state is State.HAS:
            return position
        if state is State.PENDING and patient:
            return Verdict.WAIT
    if State.PENDING in states:
        return Verdict.WAIT
    return Verdict.UNKNOWN if State.FAILED in states else Verdict.ABSENT


@dataclass(frozen=True, slots=True)
class Source:
    """An upstream and what it is trusted with.

    ``keyring`` is None for an upstream that is believed without signatures; ``names`` are those of the paths
    that it is asked for.
    """

    upstream: Upstream
    keyring: Keyring | None
    names: NameFilter = EVERY_NAME


@dataclass(frozen=True, slots=True)
class Offer(Generic[T]):
    """What an upstream has: the answer that was chosen."""

    upstream: Upstream
    value: T


@dataclass(frozen=True, slots=True)
class Narinfo:
    """A verified narinfo and the upstream's own text of it."""

    info: VerifiedNarInfo
    text: bytes


class Failover:
    """Upstreams in the order of preference.

    Args:
        sources: The most preferred one first.
        budget: Seconds in which a question is answered, one way or the other.
        observer: Told of every answer.
        keyring: Trusted, besides the upstreams' own, for what is kept already.
        clock: Seconds on a monotonic clock, for the breakers.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        *,
        budget: float,
        observer: Observer,
        keyring: Keyring = NOBODY,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.sources = tuple(sources)
        self.trust = Trust((keyring, *(source.keyring for source in self.sources)))
        """Whose signatures count where nobody remembers the upstream."""
        self._budget = budget
        self._grace = budget * GRACE
        self._observer = observer
        self.asker = Asker(observer, patience=self._grace, budget=budget, clock=clock)
        self._passed_over: set[asyncio.Task[None]] = set()

    async def close(self) -> None:
        """Ask nothing more, and drop all connections."""
        for task in self._passed_over:
            task.cancel()
        await asyncio.gather(*self._passed_over, return_exceptions=True)
        for source in self.sources:
            await source.upstream.close()

    @property
    def filters(self) -> bool:
        """Whether some upstream is used for paths of some names only."""
        return not all(source.names.is_open for source in self.sources)

    async def narinfo(
        self,
        hash_part: HashPart,
        accept: Callable[[VerifiedNarInfo], bool] = lambda _info: True,
        without: Collection[str] = (),
        name: str | None = None,
    ) -> Offer[Narinfo]:
        """Ask for a narinfo; only one that verifies, and that ``accept`` takes, counts as an answer.

        Args:
            hash_part: Of the path.
            accept: What is asked for.
            without: Names of upstreams that are not asked.
            name: Of the path, where it is known; upstreams that are not used for it are not asked.

        Raises:
            NotFoundError: All upstreams said that they do not have it.
            UpstreamError: Nobody has it, but not everybody could be asked, or somebody lied.
        """

        async def ask(source: Source) -> Narinfo:
            info, text = await source.upstream.narinfo(hash_part)
            verified = narinfo.verify(info, hash_part=hash_part, keyring=source.keyring)
            if info.file_hash is None and info.compression not in READABLE:
                raise UnverifiableError(
                    f"nothing reads {info.compression}, and no FileHash is given"
                )
            if not source.names.passes(verified.store_path.name):
                raise NotFoundError(f"{source.upstream.name} is not used for paths of this name")
            if not accept(verified):
                raise NotFoundError(f"{source.upstream.name} has other contents under this path")
            return Narinfo(verified, text)

        sources = [
            source
            for source in self.sources
            if source.upstream.name not in without and (name is None or source.names.passes(name))
        ]
        return await self.first(ask, "narinfo", f"{hash_part}.narinfo", sources=sources)

    async def first(
        self,
        ask: Callable[[Source], Awaitable[T]],
        asked: Asked,
        what: str,
        *,
        discard: Callable[[T], Awaitable[None]] | None = None,
        sources: Sequence[Source] | None = None,
    ) -> Offer[T]:
        """Ask all upstreams at once, and take the most preferred one's answer.

        Args:
            ask: Asks one upstream; raises `NotFoundError`, `UpstreamError` or `TrustError`.
            asked: What kind of thing it is, for the observer.
            what: Its name, for errors and the observer.
            discard: Disposes of an answer that was not taken.
            sources: Those that are asked, if not all are.

        Raises:
            NotFoundError: All upstreams said that they do not have it.
            UpstreamError: Nobody has it, but not everybody could be asked, or somebody lied.
        """
        self.asker.refuse_offline(what)
        made_up = asked != "narinfo"  # what else is asked of all has its URL from a client
        sources = self.sources if sources is None else sources
        questions = [Question(asked, what, made_up=made_up) for _ in sources]
        tasks = [
            asyncio.create_task(self._ask(ask, source, question))
            for source, question in zip(sources, questions, strict=True)
        ]
        deadline = asyncio.get_running_loop().time() + self._budget
        chosen: int | Verdict = Verdict.WAIT
        try:
            chosen = await self._wait(tasks, questions, deadline)
            in_time = asyncio.get_running_loop().time() < deadline
            if chosen is Verdict.UNKNOWN and in_time and not made_up:
                for at in _cut_off(tasks):  # nobody else has it, as far as is known
                    questions[at] = Question(asked, what)
                    tasks[at] = asyncio.create_task(self._ask(ask, sources[at], questions[at]))
                chosen = await self._wait(tasks, questions, deadline)
            if isinstance(chosen, int):
                return Offer(sources[chosen].upstream, tasks[chosen].result())
            if chosen is Verdict.ABSENT:
                raise NotFoundError(f"no upstream has {what}")
            raise self._reason(sources, tasks)
        finally:
            last = chosen if isinstance(chosen, int) else len(tasks) * (chosen is Verdict.UNKNOWN)
            passed = [at for at in range(last) if not tasks[at].done()]
            self._see_out([(tasks[at], questions[at]) for at in passed], deadline, discard)
            losers = [task for at, task in enumerate(tasks) if at not in passed and at != chosen]
            await _dismiss(losers, discard)

    async def _wait(
        self, tasks: Sequence[asyncio.Task[T]], questions: Sequence[Question], deadline: float
    ) -> int | Verdict:
        loop = asyncio.get_running_loop()
        probation_ends = loop.time() + self._grace
        patience_ends = deadline
        while True:
            now = loop.time()
            states = [
                _state(task, on_probation=question.probe and now >= probation_ends)
                for task, question in zip(tasks, questions, strict=True)
            ]
            if State.HAS in states:
                patience_ends = min(patience_ends, now + self._grace)
            verdict = choose(states, patient=now < patience_ends)
            if verdict is not Verdict.WAIT:
                return verdict
            if now >= deadline:
                return Verdict.UNKNOWN
            pending = [task for task in tasks if not task.done()]
            ends = min(end for end in (probation_ends, patience_ends, deadline) if end > now)
            await asyncio.wait(pending, timeout=ends - now, return_when=asyncio.FIRST_COMPLETED)

    def _see_out(
        self,
        losers: Sequence[tuple[asyncio.Task[T], Question]],
        deadline: float,
        discard: Callable[[T], Awaitable[None]] | None,
    ) -> None:
        """Let who was passed over answer until the deadline; silence beyond it is a failure."""

        async def see_out() -> None:
            tasks = [task for task, _ in losers]
            left = deadline - asyncio.get_running_loop().time()
            try:
                _, silent = await asyncio.wait(tasks, timeout=max(0.0, left))
                for task, question in losers:
                    question.overdue = task in silent
            finally:
                await _dismiss(tasks, discard)

        if losers:
            seeing_out = asyncio.create_task(see_out())
            self._passed_over.add(seeing_out)
            seeing_out.add_done_callback(self._passed_over.discard)

    async def _ask(
        self, ask: Callable[[Source], Awaitable[T]], source: Source, question: Question
    ) -> T:
        """Ask one upstream; an answer that is not what was signed is a failure of it."""
        async with self.asker.asking(source.upstream, question):
            try:
                return await ask(source)
            except TrustError as error:
                name = source.upstream.name
                self._observer(Rejected(name, question.what, error.kind, str(error)))
                raise UpstreamLiedError(name, str(error)) from error

    def _reason(self, sources: Sequence[Source], tasks: Sequence[asyncio.Task[T]]) -> ProxyError:
        """Say why we do not know: the most preferred upstream's own error, else that time ran out."""
        for task in tasks:
            if task.done() and isinstance(error := task.exception(), UpstreamError):
                return error
        silent = next(
            source.upstream.name
            for source, task in zip(sources, tasks, strict=True)
            if not task.done()
        )
        return UpstreamTimeoutError(silent, f"no answer in {self._budget:g} s")


def _state(task: asyncio.Task[T], *, on_probation: bool) -> State:
    if not task.done():
        return State.FAILED if on_probation else State.PENDING
    error = task.exception()
    if error is None:
        return State.HAS
    if isinstance(error, NotFoundError):
        return State.ABSENT
    if isinstance(error, UpstreamError):
        return State.FAILED
    raise error


def _cut_off(tasks: Sequence[asyncio.Task[T]]) -> list[int]:
    """Return the positions of questions to which an answer began, so that another one may end."""
    return [
        at
        for at, task in enumerate(tasks)
        if task.done() and isinstance(task.exception(), UpstreamBrokeOffError)
    ]


async def _dismiss(
    tasks: Sequence[asyncio.Task[T]], discard: Callable[[T], Awaitable[None]] | None
) -> None:
    """End what is still asking, and dispose of answers that nobody took."""
    if not tasks:
        return
    for task in tasks:
        task.cancel()
    for outcome in await asyncio.gather(*tasks, return_exceptions=True):
        if discard is not None and not isinstance(outcome, BaseException):
            await discard(outcome)
