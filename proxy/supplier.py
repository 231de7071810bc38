"""Where the bytes of a NAR come from, and what is to become of them.

A NAR's URL names the path and the NarHash. A narinfo that says the same, remembered or asked for again,
leads to wherever an upstream keeps the file today.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Collection, Iterator
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from typing import TypeVar

from proxy.asking import Question
from proxy.errors import (
    DamagedError,
    NotFoundError,
    StoreError,
    UpstreamDeniedError,
    UpstreamError,
)
from proxy.events import NotDecoded, Observer, StoreFailed
from proxy.failover import Failover
from proxy.known import KnownPath, KnownPaths
from proxy.nix.decoders import READABLE
from proxy.nix.hashes import Hash
from proxy.nix.nar import NarVerifier
from proxy.nix.nar_name import NarName
from proxy.nix.narinfo import VerifiedNarInfo
from proxy.nix.store_path import HashPart
from proxy.places import Blame, Place, Readers
from proxy.store.files import OpenFile, Partial, closed_on_failure
from proxy.store.folder import Store
from proxy.store.leftovers import MIN_SIZE
from proxy.supply import OneAnswer, Promise, Supply, Unverified
from proxy.tasks import Tasks
from proxy.transfer import Transfer
from proxy.upstream.answer import Body as UpstreamBody
from proxy.upstream.carriage import Cargo

T = TypeVar("T")

CARRIED = MIN_SIZE
"""Bytes from which a file is not fetched by another process, which has all of it in memory: from there on it
can be left unfinished and continued."""

UNPACKED = 16 * 2**20
"""Bytes of such a NAR, unpacked: another one may wait for as long as it takes to judge it."""


class Supplier:
    """Connects fetches with upstreams, and with the store.

    Args:
        store: Where verified NARs go.
        failover: Whom to ask.
        known: What is known already, and learns what is found out.
        observer: Told of what cannot be kept or not be decoded.
        tasks: Where a narinfo is asked for once, for all who want it.
        clock: Seconds on a monotonic clock.
    """

    def __init__(
        self,
        store: Store,
        failover: Failover,
        known: KnownPaths,
        observer: Observer,
        *,
        tasks: Tasks,
        clock: Callable[[], float],
    ) -> None:
        self._store = store
        self._failover = failover
        self._known = known
        self._observer = observer
        self._tasks = tasks
        self._blame = Blame(clock)

    def use(self, failover: Failover) -> None:
        """Ask other upstreams from now on."""
        self._failover = failover
        self._blame.clear()

    async def look_up(self, hash_part: HashPart) -> KnownPath:
        """Ask the upstreams for a narinfo, once for all who want to know.

        Raises:
            NotFoundError: No upstream has the path.
            UpstreamError: Nobody has it, as far as could be found out.
        """

        async def ask() -> KnownPath:
            name = self._known.name_of(hash_part)
            return self._known.learn(await self._failover.narinfo(hash_part, name=name))

        return await self._tasks.once(f"{hash_part}.narinfo", ask)

    @contextlib.asynccontextmanager
    async def nar(self, name: NarName, readers: Readers) -> AsyncIterator[Supply]:
        """Find out where a NAR is, and connect.

        Raises:
            NotFoundError: No upstream has this path with these contents.
            UpstreamError: Nobody has it, as far as could be found out.
        """

        async def find(without: Collection[str], file_hash: Hash | None) -> Place:
            return await self._best_place(name, without, file_hash)

        transfer = Transfer(str(name), find, self._failover.asker, readers)
        verified = False
        try:
            await transfer.start()
            yield transfer
            verified = True
        finally:
            await transfer.close(verified=verified)

    async def _best_place(
        self, name: NarName, without: Collection[str], file_hash: Hash | None = None
    ) -> Place:
        """Find a place at an upstream that is not to blame for anything, if possible: `places.Find`."""
        blamed = [each for each in self._blame.of(name) if each not in without]
        while True:
            try:
                return await self._place(name, {*without, *blamed}, file_hash)
            except (NotFoundError, UpstreamError):
                if not blamed:
                    raise
                del blamed[0]  # better than nobody

    async def _place(
        self, name: NarName, without: Collection[str], file_hash: Hash | None
    ) -> Place:
        """Find out where an upstream has a NAR: from what is remembered, else by asking."""

        def fits(info: VerifiedNarInfo) -> bool:
            return info.nar_name == name and file_hash in (None, info.file_hash)

        for known in self._known.elsewhere(name):
            if known.origin not in without and fits(known.info):
                return self._at(name, known, fresh=False)
        if not without and file_hash is None:
            known = await self.look_up(name.hash_part)
            if fits(known.info):
                return self._at(name, known, fresh=True)
            without = {known.origin}
        path_name = self._known.name_of(name.hash_part)
        offer = await self._failover.narinfo(name.hash_part, fits, without, path_name)
        return self._at(name, self._known.learn(offer), fresh=True)

    def _at(self, name: NarName, known: KnownPath, *, fresh: bool) -> Place:
        return Place(
            upstream=known.source,
            url=known.info.url,
            file_hash=known.info.file_hash,
            promise=self._promise(name, known),
            fresh=fresh,
            forget=lambda: self._known.forget(known),
            blame=lambda: self._blame.add(name, known.origin),
        )

    async def announced_size(self, name: NarName) -> tuple[str, int | None]:
        """Find out who has a NAR, and how many bytes: by the narinfo, else by the answer to a HEAD.

        Returns:
            The upstream's name, and the size; None when nobody says.

        Raises:
            NotFoundError: No upstream has this path with these contents.
            UpstreamError: Nobody has it, as far as could be found out.
        """
        tried: set[str] = set()
        doubt: UpstreamError | None = None
        while True:
            try:
                place = await self._best_place(name, tried)
            except NotFoundError as error:
                raise doubt or error from None
            try:
                return place.upstream.name, await self._size_at(name, place)
            except (NotFoundError, UpstreamError) as error:
                if isinstance(error, UpstreamError):
                    doubt = doubt or error
                if isinstance(error, NotFoundError | UpstreamDeniedError):
                    place.forget()  # it has been moved since that was said
                if place.fresh or not isinstance(error, NotFoundError | UpstreamDeniedError):
                    tried.add(place.upstream.name)

    async def _size_at(self, name: NarName, place: Place) -> int | None:
        """Ask for the size of a NAR at one place, where nothing but a signed URL for GET may be."""
        said = place.promise.size
        async with self._failover.asker.asking(place.upstream, Question("nar", str(name))):
            try:
                announced = await place.upstream.nar_size(place.url)
            except UpstreamDeniedError:
                if said is None:
                    raise
                return said
        return announced if said is None else said

    def _promise(self, name: NarName, known: KnownPath) -> Promise:
        info = known.info

        def verifier() -> NarVerifier:
            made = NarVerifier(
                compression=info.compression,
                nar_hash=info.nar_hash,
                nar_size=info.nar_size,
                file_hash=info.file_hash,
                file_size=info.file_size,
                again=True,
            )
            if not made.decoded:
                self._observer(NotDecoded(str(name), info.compression))
            return made

        async def publish(partial: Partial) -> None:
            with self._reported(str(name)):
                await self._store.publish_nar(name, partial, known.body, origin=known.origin)
                known.kept = True

        return Promise(verifier, info.file_size, publish, _cargo(info))

    @contextlib.asynccontextmanager
    async def foreign_nar(self, reference: str) -> AsyncIterator[Supply]:
        """Find out which upstream has a NAR by a URL that is not ours, and connect."""
        offer = await self._failover.first(
            lambda source: opened(source.upstream.nar(reference)), "nar", reference, discard=closed
        )
        stack, body = offer.value
        async with stack:
            yield OneAnswer(offer.upstream.name, body, Promise(Unverified, None, None))

    async def publish_narinfo(self, name: NarName, known: KnownPath) -> None:
        """Publish the narinfo of a NAR that is in the store; a failure is reported, not raised."""
        with self._reported(str(name)):
            await self._store.publish_narinfo(name, known.body, origin=known.origin)
            known.kept = True

    async def kept_nar(self, name: NarName) -> OpenFile | None:
        """Open a NAR of the store, if it looks sound: hashing it for every reader would take too long."""
        try:
            file = self._if_readable(name, self._store.open_nar)
            if file is not None:
                with closed_on_failure(file):
                    await file.check(self._known.kept_size(name))
        except DamagedError as error:
            await self.take_out(name, str(error))
            return None
        return file

    def nar_at_hand(
        self, name: NarName, most: int, whole: int
    ) -> tuple[bytearray, OpenFile | None, KnownPath] | None:
        """Return a NAR of the store if it can be sent without waiting, and nothing else is to be done.

        Args:
            name: The NAR.
            most: Bytes that it may have.
            whole: Bytes up to which all of it is read.

        Returns:
            All of it, or its beginning and the file for the rest; and what is known of the path.

        Raises:
            BlockingIOError: The disk was asked for it, and may have it in memory soon.
        """
        known = self._known.hot(name.hash_part)
        if known is None or not known.kept or known.info.nar_name != name:
            return None
        size = known.info.size_on_disk
        if size is None or size > most or not self._store.has_narinfo(name.hash_part):
            return None
        content = self._store.nar_at_hand(name, size, whole)
        return None if content is None else (*content, known)

    def kept_file(self, path: str) -> OpenFile | None:
        """Open another file of the store."""
        try:
            return self._if_readable(path, self._store.open_file)
        except DamagedError as error:
            self._observer(StoreFailed(path, str(error)))
            return None

    async def take_out(self, name: NarName, reason: str) -> None:
        """A NAR of the store is damaged: have it no longer."""
        await asyncio.to_thread(self._store.take_out, name.hash_part, name, reason)
        self._known.taken_out(name.hash_part)

    def _if_readable(self, what: T, open_it: Callable[[T], OpenFile | None]) -> OpenFile | None:
        """Open what is in the store; what the disk cannot read is reported, and asked for upstream.

        Raises:
            DamagedError: It is not what was put there.
        """
        try:
            return open_it(what)
        except DamagedError:
            raise
        except StoreError as error:
            self._observer(StoreFailed(str(what), str(error)))
            return None

    async def keep_file(self, path: str) -> bytes | None:
        """Download a file that is neither narinfo nor NAR, and publish it.

        Returns:
            What is in it, where the disk did not take it; else None.

        Raises:
            NotFoundError: No upstream has it.
            UpstreamError: Nobody has it, as far as could be found out.
            StoreError: The disk did not take it, and it is too much for memory.
        """
        offer = await self._failover.first(
            lambda source: opened(source.upstream.file(path)), "file", path, discard=closed
        )
        stack, body = offer.value
        incoming = self._store.incoming()
        try:
            async with stack:
                incoming.append(b"")  # of an empty body nothing else arrives
                await body.copy_decoded(incoming.append)
            if incoming.kept is None:
                return incoming.read_all()
            try:
                await self._store.publish_file(path, incoming.kept, origin=offer.upstream.name)
            except StoreError as error:
                self._observer(StoreFailed(path, str(error)))
                return incoming.read_all()
            return None
        finally:
            incoming.discard()

    @contextlib.contextmanager
    def _reported(self, what: str) -> Iterator[None]:
        """A disk that keeps nothing is no reason not to serve."""
        try:
            yield
        except StoreError as error:
            self._observer(StoreFailed(what, str(error)))


def _cargo(info: VerifiedNarInfo) -> Callable[[str], Cargo] | None:
    """Say what a small NAR has to be, if that is all that it takes to judge it."""
    size, nar_size = info.file_size, info.nar_size
    small = size is not None and size < CARRIED and nar_size < UNPACKED
    if size is None or not small or info.compression not in READABLE:
        return None
    return lambda path: Cargo(
        path=path,
        size=size,
        compression=info.compression,
        nar_hash=info.nar_hash,
        nar_size=nar_size,
        file_hash=info.file_hash,
    )


async def opened(
    answer: AbstractAsyncContextManager[UpstreamBody],
) -> tuple[AsyncExitStack, UpstreamBody]:
    """Enter an answer's context, and return it with what leaves it: for `Failover.first`."""
    stack = AsyncExitStack()
    return stack, await stack.enter_async_context(answer)


async def closed(answer: tuple[AsyncExitStack, UpstreamBody]) -> None:
    """Leave the context of an answer that was not taken."""
    await answer[0].aclose()
