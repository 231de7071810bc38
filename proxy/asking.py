"""Ask an upstream, if its breaker lets us, and tell what came of it.

What counts as a failure is decided here (`is_failure`); when failures are enough, in
`proxy.upstream.breaker`.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

from proxy.errors import (
    NotFoundError,
    OfflineError,
    ProxyError,
    UpstreamBusyError,
    UpstreamDeniedError,
    UpstreamError,
    UpstreamLiedError,
    UpstreamProtocolError,
    UpstreamSkippedError,
    UpstreamTimeoutError,
)
from proxy.events import Asked, BreakerClosed, BreakerOpened, Observer, UpstreamAnswered
from proxy.upstream.breaker import Breaker, Ticket
from proxy.upstream.remote import Upstream

_UNLIMITED = contextlib.nullcontext()


@dataclass(slots=True)
class Question:
    """What an upstream is asked.

    Attributes:
        asked: What kind of thing it is.
        what: Its name.
        made_up: Whether a client made up the URL, so that a strange answer says nothing of the upstream.
        probe: Whether this is the question that decides if the upstream is asked again.
        overdue: Set by who gives up waiting before it cancels the question.
    """

    asked: Asked
    what: str
    made_up: bool = False
    probe: bool = False
    overdue: bool = False


class Asker:
    """Guards upstreams with their breakers.

    Args:
        observer: Told of every answer, and when a breaker opens or closes.
        patience: Seconds that a question waits for the outcome of another one that is the probe.
        budget: Seconds that a NAR waits for an upstream that was left alone until now.
        clock: Seconds on a monotonic clock.
    """

    def __init__(
        self,
        observer: Observer,
        *,
        patience: float,
        budget: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._observer = observer
        self._patience = patience
        self._budget = budget
        self._clock = clock
        self.offline = False
        """Ask nobody anything."""
        self._probes: dict[Breaker, asyncio.Event] = {}

    @contextlib.asynccontextmanager
    async def asking(self, upstream: Upstream, question: Question) -> AsyncIterator[Ticket]:
        """Ask inside of this context; what is raised there is the outcome.

        Of a NAR, that is how its answer begins: how it goes on is for `ended`, with the ticket.

        Raises:
            UpstreamSkippedError: The upstream is left alone.
            OfflineError: All are.
        """
        self.refuse_offline(question.what)
        ticket = await self._ticket(upstream)
        question.probe = ticket.probe
        outcome, reason = "cancelled", ""
        try:
            limited = ticket.probe and question.asked == "nar"  # who asks for all else sees to it
            async with asyncio.timeout(self._budget) if limited else _UNLIMITED:
                yield ticket
        except TimeoutError:
            outcome, reason = UpstreamTimeoutError.outcome, "no answer to a probe in time"
            self._fail(upstream, ticket, reason)
            raise UpstreamTimeoutError(upstream.name, reason) from None
        except asyncio.CancelledError:
            if question.overdue:
                outcome, reason = UpstreamTimeoutError.outcome, "no answer in time"
                pause = upstream.breaker.overdue(ticket, self._clock())
                self._tell_opened(upstream, reason, pause)
            raise
        except NotFoundError:
            outcome = "absent"
            self._succeed(upstream, ticket)
            raise
        except UpstreamError as error:
            outcome, reason = error.outcome, error.reason
            self._judge(upstream, ticket, question, error)
            raise
        else:
            outcome = "hit"
            if question.asked == "nar":
                self._tell_closed(upstream, closed=upstream.breaker.reached(ticket))
            else:
                self._succeed(upstream, ticket)
        finally:
            upstream.breaker.withdrawn(ticket)
            if ticket.probe and (verdict := self._probes.pop(upstream.breaker, None)):
                verdict.set()
            self._observer(
                UpstreamAnswered(upstream.name, question.asked, question.what, outcome, reason)
            )

    def refuse_offline(self, what: str) -> None:
        """Raise `OfflineError` where nobody may be asked for anything."""
        if self.offline:
            raise OfflineError(f"{what} is not here, and no upstream may be asked")

    def ended(self, upstream: Upstream, ticket: Ticket, error: ProxyError | None) -> None:
        """Say how the body of a NAR ended: whole and verified, or with an error."""
        if error is None:
            self._succeed(upstream, ticket)
        else:
            self._fail(upstream, ticket, str(error), error)

    def pause(self, upstream: Upstream) -> float:
        """Return the seconds for which an upstream will still be left alone."""
        return upstream.breaker.pause(self._clock())

    async def _ticket(self, upstream: Upstream) -> Ticket:
        """Wait for the verdict of a probe that is under way; it may let everybody in again."""
        breaker = upstream.breaker
        ticket = breaker.admit(self._clock())
        if ticket is None and breaker.probing:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._patience):
                    await self._probes[breaker].wait()
            ticket = breaker.admit(self._clock())
        if ticket is None:
            raise UpstreamSkippedError(upstream.name, "it has failed, and is left alone for now")
        if ticket.probe:
            self._probes[breaker] = asyncio.Event()
        return ticket

    def _judge(
        self, upstream: Upstream, ticket: Ticket, question: Question, error: UpstreamError
    ) -> None:
        if isinstance(error, UpstreamSkippedError):
            return  # it has its hands full with us, and was not asked
        if is_failure(error, made_up=question.made_up):
            self._fail(upstream, ticket, error.reason, error)
        else:
            self._succeed(upstream, ticket)

    def _succeed(self, upstream: Upstream, ticket: Ticket) -> None:
        self._tell_closed(upstream, closed=upstream.breaker.answered(ticket))

    def _fail(
        self, upstream: Upstream, ticket: Ticket, reason: str, error: ProxyError | None = None
    ) -> None:
        retry_after = error.retry_after if isinstance(error, UpstreamBusyError) else 0.0
        pause = upstream.breaker.failed(ticket, self._clock(), retry_after)
        self._tell_opened(upstream, reason, pause)

    def _tell_opened(self, upstream: Upstream, reason: str, pause: float | None) -> None:
        if pause is not None:
            self._observer(BreakerOpened(upstream.name, reason, pause))

    def _tell_closed(self, upstream: Upstream, *, closed: bool) -> None:
        if closed:
            self._observer(BreakerClosed(upstream.name))


def is_failure(error: UpstreamError, *, made_up: bool) -> bool:
    """Tell whether an error speaks against the upstream itself.

    A refusal (401, 403, 407) is an answer: it comes at once, and object stores give it for what they do not
    have. What a client made up may draw any answer at all, so there only silence counts: else one client
    could close an upstream for all.
    """
    if isinstance(error, UpstreamDeniedError):
        return False
    strange = UpstreamBusyError | UpstreamProtocolError | UpstreamLiedError
    return not (made_up and isinstance(error, strange))
