"""Which upstream's answer to take.

All upstreams are asked at once. The most preferred one that has the thing wins; when a less preferred one
has it and a more preferred one is still silent, that one gets a moment longer and is then passed over.
"Absent" is said only when every upstream said it; anything less is "unknown".

What decides (`choose`) is pure; `Failover` obeys it.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from proxy.errors import (
    NotFoundError,
    ProxyError,
    TrustError,
    UnverifiableError,
    UpstreamError,
    UpstreamLiedError,
    UpstreamTimeoutError,
)
from proxy.events import Asked, Observer, Rejected, UpstreamAnswered
from proxy.nix import narinfo
from proxy.nix.decoders import READABLE
from proxy.nix.narinfo import VerifiedNarInfo
from proxy.nix.signature import Keyring
from proxy.nix.store_path import HashPart
from proxy.nix.trust import Trust
from proxy.upstream.remote import Upstream

T = TypeVar("T")

GRACE = 0.25
"""Part of the budget that a more preferred upstream gets once a less preferred one has answered."""


NOBODY = Keyring(())


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

    ``keyring`` is None for an upstream that is believed without signatures.
    """

    upstream: Upstream
    keyring: Keyring | None


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
    """

    def __init__(
        self,
        sources: Sequence[Source],
        *,
        budget: float,
        observer: Observer,
        keyring: Keyring = NOBODY,
    ) -> None:
        self.sources = tuple(sources)
        self.trust = Trust((keyring, *(source.keyring for source in self.sources)))
        """Whose signatures count where nobody remembers the upstream."""
        self._budget = budget
        self._observer = observer

    async def narinfo(
        self,
        hash_part: HashPart,
        accept: Callable[[VerifiedNarInfo], bool] = lambda _info: True,
    ) -> Offer[Narinfo]:
        """Ask for a narinfo; only one that verifies, and that ``accept`` takes, counts as an answer.

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
            if not accept(verified):
                raise NotFoundError(f"{source.upstream.name} has other contents under this path")
            return Narinfo(verified, text)

        return await self.first(ask, "narinfo", f"{hash_part}.narinfo")

    async def first(
        self,
        ask: Callable[[Source], Awaitable[T]],
        asked: Asked,
        what: str,
        *,
        discard: Callable[[T], Awaitable[None]] | None = None,
    ) -> Offer[T]:
        """Ask all upstreams at once, and take the most preferred one's answer.

        Args:
            ask: Asks one upstream; raises `NotFoundError`, `UpstreamError` or `TrustError`.
            asked: What kind of thing it is, for the observer.
            what: Its name, for errors and the observer.
            discard: Disposes of an answer that was not taken.

        Raises:
            NotFoundError: All upstreams said that they do not have it.
            UpstreamError: Nobody has it, but not everybody could be asked, or somebody lied.
        """
        tasks = [
            asyncio.create_task(self._observed(ask, source, asked, what)) for source in self.sources
        ]
        chosen: int | Verdict = Verdict.WAIT
        try:
            chosen = await self._wait(tasks)
            if isinstance(chosen, int):
                return Offer(self.sources[chosen].upstream, tasks[chosen].result())
            if chosen is Verdict.ABSENT:
                raise NotFoundError(f"no upstream has {what}")
            raise self._reason(tasks)
        finally:
            losers = [task for position, task in enumerate(tasks) if position != chosen]
            await _dismiss(losers, discard)

    async def _wait(self, tasks: Sequence[asyncio.Task[T]]) -> int | Verdict:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._budget
        patience_ends = deadline
        while True:
            states = [_state(task) for task in tasks]
            now = loop.time()
            if State.HAS in states:
                patience_ends = min(patience_ends, now + self._budget * GRACE)
            verdict = choose(states, patient=now < patience_ends)
            if verdict is not Verdict.WAIT:
                return verdict
            if now >= deadline:
                return Verdict.UNKNOWN
            pending = [task for task in tasks if not task.done()]
            await asyncio.wait(
                pending, timeout=patience_ends - now, return_when=asyncio.FIRST_COMPLETED
            )

    async def _observed(
        self, ask: Callable[[Source], Awaitable[T]], source: Source, asked: Asked, what: str
    ) -> T:
        """Ask one upstream, and tell the observer what came of it."""
        name = source.upstream.name
        with observed(self._observer, name, asked, what):
            try:
                return await ask(source)
            except TrustError as error:
                self._observer(Rejected(name, what, error.kind, str(error)))
                raise UpstreamLiedError(name, str(error)) from error

    def _reason(self, tasks: Sequence[asyncio.Task[T]]) -> ProxyError:
        """Say why we do not know: the most preferred upstream's own error, else that time ran out."""
        for task in tasks:
            if task.done() and isinstance(error := task.exception(), UpstreamError):
                return error
        silent = next(
            source.upstream.name
            for source, task in zip(self.sources, tasks, strict=True)
            if not task.done()
        )
        return UpstreamTimeoutError(silent, f"no answer in {self._budget:g} s")


@contextlib.contextmanager
def observed(observer: Observer, upstream: str, asked: Asked, what: str) -> Iterator[None]:
    """Tell an observer what came of asking an upstream for something."""
    outcome, reason = "cancelled", ""
    try:
        yield
    except NotFoundError:
        outcome = "absent"
        raise
    except UpstreamError as error:
        outcome, reason = error.outcome, error.reason
        raise
    else:
        outcome = "hit"
    finally:
        observer(UpstreamAnswered(upstream, asked, what, outcome, reason))


def _state(task: asyncio.Task[T]) -> State:
    if not task.done():
        return State.PENDING
    error = task.exception()
    if error is None:
        return State.HAS
    if isinstance(error, NotFoundError):
        return State.ABSENT
    if isinstance(error, UpstreamError):
        return State.FAILED
    raise error


async def _dismiss(
    tasks: Sequence[asyncio.Task[T]], discard: Callable[[T], Awaitable[None]] | None
) -> None:
    """End what is still asking, and dispose of answers that nobody took."""
    for task in tasks:
        task.cancel()
    for outcome in await asyncio.gather(*tasks, return_exceptions=True):
        if discard is not None and not isinstance(outcome, BaseException):
            await discard(outcome)
