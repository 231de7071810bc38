"""The bytes of one NAR, from as many attempts and upstreams as it takes.

Rules:

- What breaks off is continued where it stands: at the same upstream, if what it has is still the same
  (``If-Range``), then at another whose narinfo has the same FileHash.
- Who sends the whole file again instead is compared with what readers have, and followed from there on.
- As long as readers have nothing, it may also start over, with another file of the same NarHash.
- Retries are bounded (`proxy.patience`), and respect breakers.
- Whether the bytes are right is for whoever takes them to judge: it starts over, or stops, by `reject`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Collection
from contextlib import AsyncExitStack
from dataclasses import dataclass

from proxy.asking import Asker, Question
from proxy.carriage import carry, landing_for
from proxy.errors import (
    NotFoundError,
    ProxyError,
    StoreError,
    TrustError,
    UpstreamBrokeOffError,
    UpstreamBusyError,
    UpstreamDeniedError,
    UpstreamError,
    UpstreamProtocolError,
    UpstreamSkippedError,
    UpstreamUnavailableError,
)
from proxy.patience import Patience
from proxy.places import Find, Place, Readers
from proxy.store.leftovers import Origin
from proxy.supply import Promise
from proxy.upstream import resume
from proxy.upstream.answer import Body
from proxy.upstream.breaker import Ticket
from proxy.upstream.remote import Upstream

LEFT = ""
"""Stands for an earlier download among the names of upstreams."""

GETS_SOMEWHERE = 2**18
"""Bytes after which an answer that breaks off does not count against its upstream: it does deliver."""


class Transfer:
    """One NAR on its way. `start` it, `read` it, and `close` it.

    Args:
        what: The NAR's name.
        find: Finds places.
        asker: Asks upstreams.
        readers: What has been passed on.
    """

    def __init__(self, what: str, find: Find, asker: Asker, readers: Readers) -> None:
        self._what = what
        self._find = find
        self._asker = asker
        self._readers = readers
        self._landing: str | None = None
        self._patience = Patience(time.monotonic())
        self._place: Place | None = None
        self._answer: _Answer | None = None
        self._pending = b""
        self._offset = 0
        self._brought = 0
        self._validators: dict[str, str | None] = {}
        self._givers: set[str] = set()
        self._places: dict[str, Place] = {}
        self._strikes: dict[str, int] = {}
        self._excluded: set[str] = set()
        self._whole_only: set[str] = set()
        self._doubt: UpstreamError | None = None
        self._restarted = False
        self.resumed = False
        """Whether it begins behind what was left of an earlier download."""
        self.size: int | None = None
        """Bytes of the whole file, as far as upstreams have said."""

    @property
    def upstream(self) -> str:
        """The name of the upstream that is asked now, or was last."""
        return self._at.upstream.name

    @property
    def promise(self) -> Promise:
        """What the file has to be."""
        return self._at.promise

    @property
    def _at(self) -> Place:
        if self._place is None:
            raise NotFoundError(f"nobody was asked for {self._what}")
        return self._place

    @property
    def origin(self) -> Origin:
        """What a download that is left unfinished has to know to go on."""
        place, name = self._at, self.upstream
        file_hash = None if place.file_hash is None else str(place.file_hash)
        return Origin(name, self._validators.get(name), file_hash, self.size)

    async def start(self) -> None:
        """Find the NAR, and connect.

        Raises:
            NotFoundError: No upstream has this path with these contents.
            UpstreamError: Nobody has it, as far as could be found out.
        """
        self._place = await self._find((), None)
        self._resume(self._place)
        self._landing = None if self._offset else landing_for(self._place, self._readers)
        if self._landing is None and (self._offset == 0 or self._offset != self.size):
            await self._connect()
        self.resumed = self.resumed and not self._restarted
        self._restarted = False

    async def carry(self) -> str | None:
        """Have the whole file put somewhere: `Supply.carry`. Once, and never from a second choice."""
        landing, self._landing = self._landing, None
        if landing is None:
            return None
        self._places[self.upstream] = self._at
        self._givers.add(self.upstream)
        try:
            await carry(self._asker, self._what, self._at, self._readers, landing)
        except (StoreError, UpstreamBrokeOffError):
            pass  # it can be read, and if it breaks off then, continued
        except (NotFoundError, UpstreamError) as error:
            await self._go_on(error)
        else:
            return landing
        self._givers.clear()
        await self._connect()
        self._restarted = False
        return None

    async def read(self) -> bytes | None:
        """Return the next bytes, ``b""`` at the end, None when what came so far is void.

        Raises:
            UpstreamError: It broke off, and cannot be continued.
        """
        while True:
            if self._pending:
                data, self._pending = self._pending, b""
                return self._gave(data)
            answer = self._answer
            if answer is None and self._offset == self.size:
                return b""  # all of it had been left
            if answer is None:
                raise UpstreamUnavailableError(self.upstream, "the transfer is over")
            try:
                data = await answer.body.read()
                if not data and self.size is not None and self._offset < self.size:
                    raise UpstreamUnavailableError(self.upstream, "the answer ends too early")
            except UpstreamError as error:
                if self._offset == self.size:
                    return b""  # cut behind the last byte
                await self._hang_up(error)
                await self._go_on(error)
                await self._connect()
                if self._restarted:
                    self._restarted = False
                    return None
                continue
            return self._gave(data) if data else b""

    async def reject(self, error: TrustError) -> bool:
        """The bytes are not what was promised: start over elsewhere; return whether that is possible."""
        givers, self._givers = self._givers, set()
        await self._hang_up(error if len(givers) <= 1 else None)
        if LEFT not in givers:  # else the disk may be to blame
            self._at.forget()
            self._at.blame()
            for name in givers - {self.upstream}:
                self._places[name].blame()  # one of them it was
            self._excluded.add(self.upstream)
        if self._readers.released:
            return False
        self._start_over()
        place = await self._elsewhere(self._excluded)
        if place is None:
            return False
        self._place = place
        try:
            await self._connect()
        except (NotFoundError, UpstreamError):
            return False
        self._restarted = False
        return True

    async def close(self, *, verified: bool) -> None:
        """Hang up; say whether all of it came, and was right."""
        if verified and self._answer is not None:
            self._asker.ended(self._answer.upstream, self._answer.ticket, None)
        await self._hang_up(None)

    def _resume(self, place: Place) -> None:
        """Go on with what was left of an earlier download, where that is of the same file."""
        leftover = self._readers.leftover
        if leftover is None or not place.has_rest_of(leftover):
            return
        origin = leftover.origin
        self.resumed = True
        self.size = origin.size
        self._offset = leftover.size
        self._validators = {origin.upstream: origin.validator}
        self._givers.add(LEFT)

    def _gave(self, data: bytes) -> bytes:
        self._offset += len(data)
        self._brought += len(data)
        self._givers.add(self.upstream)
        if self._readers.released:
            self._strikes.clear()
        self._patience.heard(time.monotonic(), len(data))
        return data

    async def _connect(self) -> None:
        """Get an answer that continues what is here, or starts over."""
        while True:
            try:
                await self._open(self._at)
            except (NotFoundError, UpstreamError) as error:
                await self._hang_up(error)
                await self._go_on(error)
            else:
                return

    async def _open(self, place: Place) -> None:
        name = place.upstream.name
        self._places[name] = place
        received = resume.Received(self._offset, self.size, self._validators.get(name))
        ask_whole = name in self._whole_only
        wanted = {} if ask_whole else resume.headers(received, vouched=place.file_hash is not None)
        stack = AsyncExitStack()
        try:
            async with self._asker.asking(place.upstream, Question("nar", self._what)) as ticket:
                answer = place.upstream.nar(place.url, wanted)
                body = await stack.enter_async_context(answer)
        except BaseException:
            await stack.aclose()
            raise
        self._brought = 0
        self._answer = _Answer(place.upstream, ticket, stack, body)
        match resume.fit(received, body.begins):
            case resume.Fit.CONTINUES:
                pass
            case resume.Fit.COMPARE:
                await self._follow(body)
            case resume.Fit.CHANGED:
                self._changed(name, body)
        size = self.size if body.size is None else body.size
        self.size = place.promise.size if size is None else size
        self._validators = {name: body.begins.validator}

    async def _follow(self, body: Body) -> None:
        """Let the whole file pass up to where we are, or start over with it."""
        if self._readers.committed == 0:
            self._start_over()
            return
        released = self._readers.released
        position = 0
        while position < self._offset:
            data = await body.read()
            if not data:
                raise UpstreamUnavailableError(self.upstream, "the answer ends too early")
            known = data[: max(0, released - position)]
            if known:
                kept = await asyncio.to_thread(self._readers.read_back, position, len(known))
                if kept != known:
                    self._excluded.add(self.upstream)
                    raise UpstreamProtocolError(self.upstream, "has another file now")
            self._pending = data[max(0, self._offset - position) :]
            position += len(data)
            self._patience.heard(time.monotonic(), 0)

    def _changed(self, name: str, body: Body) -> None:
        """Decide what to do with an answer that is not the rest of what is here."""
        if body.begins.whole and self._readers.committed == 0:
            self._start_over()
            return
        if body.begins.whole:
            self._excluded.add(name)
        self._whole_only.add(name)
        raise UpstreamProtocolError(name, "has another file now, or sent another part of it")

    def _start_over(self) -> None:
        """What came so far is void; nobody has got any of it."""
        self._restarted = True
        self._offset = 0
        self._pending = b""
        self._givers.clear()
        self._validators.clear()
        self.size = None

    async def _go_on(self, error: ProxyError) -> None:
        """Decide where to try again, and wait until it is time.

        Raises:
            NotFoundError: All upstreams said that they do not have it.
            UpstreamError: It cannot be had.
        """
        place, name = self._at, self.upstream
        gone = isinstance(error, NotFoundError | UpstreamDeniedError)
        if isinstance(error, UpstreamError):
            self._doubt = self._doubt or error
        if gone:
            place.forget()
            if place.fresh or self._strikes.get(name):
                self._excluded.add(name)
        self._strikes[name] = self._strikes.get(name, 0) + 1
        usable = name not in self._excluded and not gone
        committed = self._readers.committed > 0
        skipped = isinstance(error, UpstreamSkippedError)
        once_more = usable and not skipped and self._offset > 0 and self._strikes[name] == 1
        wish = self._wish(error)
        pause = self._patience.failed(time.monotonic(), committed=committed, wish=wish)
        if not once_more or (pause is None and not committed):
            tried = {each for each in self._strikes if not (gone and each == name)}
            other = await self._elsewhere({*self._excluded, *tried})
            if other is not None:
                self._move_to(other)
                if not committed:
                    return  # a second choice, at once
                pause = 0.0 if pause is not None else None
            elif once_more:  # where some of it came, more may, however long nothing did
                pause = 0.0
            elif not usable or not (committed or isinstance(error, UpstreamUnavailableError)):
                raise self._final(error)
            else:
                self._place = self._least_tried()
        if pause is None:
            raise self._final(error)
        await asyncio.sleep(pause)

    def _move_to(self, place: Place) -> None:
        if place.file_hash is None or place.file_hash != self._at.file_hash:
            self._start_over()
        self._place = place

    def _least_tried(self) -> Place:
        """Return the place that has failed least since something arrived, the last one if in doubt."""
        usable = [
            place
            for name, place in self._places.items()
            if name not in self._excluded and place.file_hash == self._at.file_hash
        ]
        return min(usable, key=lambda place: self._strikes.get(place.upstream.name, 0))

    def _wish(self, error: ProxyError) -> float:
        """Return the seconds for which an upstream, or its breaker, asks to be left alone."""
        wish = error.retry_after if isinstance(error, UpstreamBusyError) else 0.0
        return max(wish, self._asker.pause(self._at.upstream))

    async def _elsewhere(self, without: Collection[str]) -> Place | None:
        """Find another place; once readers have something, one with the same file."""
        same = self._at.file_hash
        if self._readers.committed and same is None:
            return None
        try:
            return await self._find(without, same if self._readers.committed else None)
        except NotFoundError:
            return None
        except UpstreamError as error:
            self._doubt = self._doubt or error
            return None

    def _final(self, error: ProxyError) -> ProxyError:
        """Absent is only what nobody was in doubt about."""
        return self._doubt if isinstance(error, NotFoundError) and self._doubt else error

    async def _hang_up(self, error: ProxyError | None) -> None:
        if self._answer is None:
            return
        answer, self._answer = self._answer, None
        harmless = isinstance(error, UpstreamError) and self._brought >= GETS_SOMEWHERE
        if error is not None and not harmless:
            self._asker.ended(answer.upstream, answer.ticket, error)
        await answer.stack.aclose()


@dataclass(frozen=True, slots=True)
class _Answer:
    """An answer that is open, and what is owed to it."""

    upstream: Upstream
    ticket: Ticket
    stack: AsyncExitStack
    body: Body
