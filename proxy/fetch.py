"""One download in flight: one writer, many readers.

A fetch is a task of the daemon, not of any request: no client can cancel it, slow it down or corrupt it.
The writer appends to a partial file and says how far it is; each reader reads the file at a position of
its own, so that readers cost no memory and do not notice each other.

What the verifier has seen may be read at once, except for the last `HELD_BACK` bytes of it; the `FIRST` bytes
of a file do not wait for those behind them, and its last ones are released when the whole has been verified,
so a reader of a bad file never gets it complete. A file of `WHOLE` bytes or less is released whole or not at
all, and so is one that another process fetches (`proxy.carriage`).
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager

from proxy.errors import (
    ProxyError,
    SizeMismatchError,
    StoreError,
    TrustError,
    UpstreamError,
    UpstreamUnavailableError,
)
from proxy.events import FetchEnded, FetchStarted, Observer, Rejected
from proxy.reader import Reader
from proxy.store.incoming import Incoming, Leftover
from proxy.store.leftovers import MIN_SIZE
from proxy.supply import WHOLE, Supply, Verifier, read_ahead

HELD_BACK = 64 * 2**10
"""Bytes that readers are behind the verifier. A chunk of LZMA2 is no longer, and where it ends shows whether
it was damaged, so that most damage of an xz file is noticed before it gets out."""

FIRST = 4 * 2**10
"""Bytes that readers get at once, of a larger file: who waits for an answer sees that it has begun."""

PIECE = 2**20
"""Bytes that are read at once of what was left of a download."""

IN_TURN = ThreadPoolExecutor(2, thread_name_prefix="verify-in-turn")
"""Verify what needs up to 128 MiB each, once it is here: so no slow upstream keeps the others waiting."""

LAG = 5.0
"""Seconds that readers wait for a slower one, where memory is all there is; then it is left behind."""


class Fetch:
    """A file on its way from an upstream to its readers and to the store.

    Readers attach from the moment it is made, before anybody knows whether there is such a file.

    Args:
        what: The file's name, for events.
        open_supply: Finds out where the file is, and connects; is given the fetch, whose readers it has
            to consider. What goes wrong with the file in the end is raised inside of it.
        incoming: Where it is written to.
        executor: Worker threads for writing and verifying.
        observer: Told of start and end.
    """

    def __init__(
        self,
        what: str,
        *,
        open_supply: OpenSupply,
        incoming: Incoming,
        executor: Executor,
        observer: Observer,
    ) -> None:
        self.what = what
        self.upstream = ""
        """Where it comes from; empty until that is known."""
        self.size: int | None = None
        """Bytes of the whole file; None until somebody says."""
        self.error: ProxyError | None = None
        """Why the fetch failed."""
        self._open_supply = open_supply
        self._incoming = incoming
        self._executor = executor
        self._observer = observer
        self._taken = self._judged = 0
        self._verified = False
        self._published = False
        self._given_up = False
        self._changed = asyncio.Event()
        self._moved = asyncio.Event()
        self._closed = asyncio.Event()
        self._loop = asyncio.get_running_loop()

    def __repr__(self) -> str:
        return f"<Fetch {self.what} {self._incoming.size}/{self.size} from {self.upstream!r}>"

    @property
    def released(self) -> int:
        """Bytes that may be read."""
        return self._incoming.size if self._verified else self._released_of(self._judged)

    @property
    def committed(self) -> int:
        """Bytes that will have been released, at most, once what was taken so far has been looked at."""
        return self._released_of(self._taken)

    @property
    def can_be_joined(self) -> bool:
        """Whether the beginning is still there; it is not for long where the disk does not take it."""
        return self._incoming.begin == 0

    def attach(self) -> Reader:
        """Make a reader, which whoever asked for it closes; possible until the fetch is closed.

        Raises:
            StoreError: The beginning is not there any more.
        """
        return Reader(self, self._incoming.cursor())

    async def wait_beyond(self, position: int) -> int:
        """Wait until bytes behind ``position`` may be read.

        Returns:
            How far the file may be read; ``position`` or less at its end.

        Raises:
            ProxyError: The fetch failed.
        """
        while self.released <= position and not self._verified:
            await self._change()
        return self.released

    @property
    def are_waiting(self) -> bool:
        """Whether anybody reads it yet."""
        return self._incoming.is_read

    @property
    def landing(self) -> str | None:
        """Where somebody else may put the whole file; None where that is no way to get it."""
        return self._incoming.landing

    @property
    def leftover(self) -> Leftover | None:
        """What is here of an earlier download."""
        return self._incoming.leftover

    def read_back(self, position: int, count: int) -> bytes:
        """Return some of what was released.

        Raises:
            StoreError: The disk failed.
        """
        return self._incoming.read_back(position, count)

    async def size_known(self) -> int:
        """Wait until the size is known: until the end, where neither narinfo nor upstream says it.

        Raises:
            ProxyError: The fetch failed before that.
        """
        while self.size is None:
            await self._change()
        return self.size

    async def ended(self) -> None:
        """Wait until the file is whole and verified, or never will be.

        Raises:
            ProxyError: The fetch failed.
        """
        while not self._verified:
            await self._change()

    async def over(self) -> None:
        """Wait until the file is in the store, or never will be.

        Raises:
            ProxyError: The fetch failed.
        """
        await self._closed.wait()
        if self.error is not None:
            raise self.error

    async def run(self) -> None:
        """Find, download, verify, publish. What fails is told to the readers and in `error`."""
        try:
            async with self._open_supply(self) as supply:
                await self._take(supply)
        except ProxyError as error:
            self._fail(error)
        except BaseException:
            # Cancelled, or a fault of our own; nobody shall wait for what will never come.
            self._fail(UpstreamUnavailableError(self.upstream, "the fetch was given up"))
            raise
        else:
            publish, partial = supply.promise.publish, self._incoming.kept
            if publish is not None and partial is not None:
                self._published = True
                await publish(partial)

    def close(self) -> None:
        """Let go of the file; readers have descriptors of their own."""
        if self._published:
            self._incoming.close()
        elif isinstance(self.error, UpstreamError):
            self._incoming.leave()
        else:
            self._incoming.discard()
        self._closed.set()

    def moved(self) -> None:
        """A reader has got further, or has left: there may be room for more."""
        self._moved.set()

    async def _take(self, supply: Supply) -> None:
        """Download and verify."""
        began = time.monotonic()
        self.upstream = supply.upstream
        self._observer(FetchStarted(self.what, self.upstream))
        reason: str | None = "given up"
        try:
            await self._download(supply)
            reason = None
        except ProxyError as error:
            reason = str(error)
            raise
        finally:
            seconds = time.monotonic() - began
            self._observer(
                FetchEnded(self.what, self.upstream, self._incoming.size, seconds, reason)
            )

    async def _download(self, supply: Supply) -> None:
        """Take attempts until one is what was promised; as long as nobody has got any of it."""
        if self._incoming.leftover is not None and not supply.resumed:
            await self._work(self._incoming.start_over)
        while True:
            try:
                await self._attempt(supply)
            except TrustError as error:
                self._taken = self._judged
                if not await supply.reject(error):
                    raise
                self._report(error)
                await self._work(self._incoming.start_over)
            else:
                break
        self.upstream = supply.upstream
        self.size = self._incoming.size
        self._verified = True
        self._wake()

    async def _attempt(self, supply: Supply) -> None:
        self.upstream = supply.upstream
        if (path := await supply.carry()) is not None:
            self._incoming.adopt(path)
            return
        self.upstream = supply.upstream
        finished, verifier = False, await self._begin(supply)
        async with contextlib.aclosing(read_ahead(supply)) as pieces:
            async for data in pieces:
                if data is None:
                    await self._work(self._incoming.start_over)
                    verifier = await self._begin(supply)
                else:
                    self._taken += len(data)
                    finished = self._taken == self.size
                    await self._work(self._absorb, verifier, data, finished)
                    self._release()
                    await self._room()
        if self.size is not None and self._incoming.size != self.size:
            raise SizeMismatchError(f"{self._incoming.size} bytes arrived instead of {self.size}")
        if verifier.put_off:
            await self._work(self._reread, verifier, executor=IN_TURN)
        elif not finished:
            await self._work(verifier.finish)

    async def _begin(self, supply: Supply) -> Verifier:
        """Go on with what was left of an earlier download, or make one that can be left."""
        self._taken = self._judged = 0
        self.size = supply.promise.agreed_size(supply.size)
        verifier = supply.promise.verifier()
        if (leftover := self._incoming.leftover) is None:
            if supply.origin is not None and (self.size or 0) >= MIN_SIZE:
                self._incoming.keep(supply.origin)
            return verifier
        while (left := leftover.size - self._taken) > 0:
            await self._work(self._recall, verifier, min(PIECE, left))
            self._taken = self._incoming.size
            self._release()
        return verifier

    def _recall(self, verifier: Verifier, count: int) -> None:
        """Verify what is on the disk. On a worker thread."""
        data = self._incoming.recall(count)
        if not data:
            raise SizeMismatchError("what was left of the download is shorter now")
        verifier.feed(data)

    def _absorb(self, verifier: Verifier, data: bytes, last: bool) -> None:  # noqa: FBT001
        """Write and verify. On a worker thread.

        The ``last`` piece is judged with the whole: for a small file a second step would cost as much.
        """
        self._incoming.append(data)
        verifier.feed(data)
        if verifier.put_off and not self._incoming.keeps:  # now or never
            before = self._incoming.pieces(PIECE, self._incoming.size - len(data))
            verifier.reread(itertools.chain(before, (data,)))
        if last and not verifier.put_off:
            verifier.finish()

    def _release(self) -> None:
        """Let the readers have what the verifier has seen, but for what is held back."""
        before, self._judged = self.released, self._taken
        if self.released > before:
            self._wake()

    def _released_of(self, count: int) -> int:
        """Return how many of the first ``count`` bytes are released before the verdict."""
        end = count if self.size is None else self.size
        return 0 if end <= WHOLE else max(min(count, FIRST), min(count, end) - HELD_BACK)

    def _reread(self, verifier: Verifier) -> None:
        """Verify what was put off, from its beginning. On a thread of `IN_TURN`."""
        pieces = self._incoming.pieces(PIECE, self._incoming.size)
        verifier.reread(itertools.takewhile(lambda _: not self._given_up, pieces))
        verifier.finish()

    async def _room(self) -> None:
        """Wait for the readers, where memory is all there is.

        Raises:
            StoreError: Nobody reads what cannot be kept.
        """
        while self._incoming.crowded:
            if not self._incoming.is_read:
                raise StoreError("nobody reads it, and it cannot be kept")
            self._moved.clear()
            try:
                async with asyncio.timeout(LAG):
                    await self._moved.wait()
            except TimeoutError:
                if self._incoming.is_awaited(self.released):
                    self._incoming.leave_behind()

    async def _work(
        self, step: Callable[..., None], *args: object, executor: Executor | None = None
    ) -> None:
        """Do a step on a worker thread; nothing is closed under its hands, even on cancellation."""
        job = self._loop.run_in_executor(executor or self._executor, step, *args)
        try:
            await asyncio.shield(job)
        except asyncio.CancelledError:
            self._given_up = True
            await asyncio.gather(job, return_exceptions=True)
            raise

    def _fail(self, error: ProxyError) -> None:
        self.error = error
        if isinstance(error, TrustError):
            self._report(error)
        self._wake()

    def _report(self, error: TrustError) -> None:
        self._observer(Rejected(self.upstream, self.what, error.kind, str(error)))

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def _change(self) -> None:
        if self.error is not None:
            raise self.error
        await self._changed.wait()


OpenSupply = Callable[[Fetch], AbstractAsyncContextManager[Supply]]
"""Finds out where a file is, and connects."""
