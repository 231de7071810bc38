"""What a fetch takes: bytes from somewhere, and what they have to be."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

from proxy.errors import SizeMismatchError, TrustError
from proxy.store.files import Partial
from proxy.store.leftovers import Origin
from proxy.upstream.carriage import Cargo

WHOLE = 256 * 2**10
"""Bytes of a file that is not worth streaming: as long as nobody has any of it, another upstream may deliver
it instead."""


class Body(Protocol):
    """What arrives from an upstream: `proxy.upstream.answer.Body`."""

    size: int | None

    async def read(self) -> bytes:
        """Return the next bytes, or ``b""`` at the end of a complete body."""


class Verifier(Protocol):
    """What judges the bytes: `proxy.nix.nar.NarVerifier`."""

    put_off: bool
    """Whether it needs so much memory that it can only judge by `reread`, when its turn comes."""

    def feed(self, data: bytes) -> None:
        """Take the next bytes; raise `TrustError` as soon as they cannot be right."""

    def reread(self, pieces: Iterable[bytes]) -> None:
        """Take all of the bytes once more; raise `TrustError`."""

    def finish(self) -> None:
        """Judge the whole; raise `TrustError`."""


class Unverified:
    """Judges nothing: for bytes that are passed on and not kept."""

    put_off = False

    def feed(self, data: bytes) -> None:
        """Take any bytes."""

    def reread(self, pieces: Iterable[bytes]) -> None:
        """Take any bytes."""

    def finish(self) -> None:
        """Take any end."""


@dataclass(frozen=True, slots=True)
class Promise:
    """What a file has to be, and what is to become of it.

    Attributes:
        verifier: Makes what judges it, on a worker thread.
        size: Bytes it must have, when that is known beforehand.
        publish: Takes over the verified partial file; None for a file that nobody keeps.
        cargo: Says for another process what it has to be, at a place on the disk; None where it is too
            large for that, or where its size is not known beforehand.
    """

    verifier: Callable[[], Verifier]
    size: int | None
    publish: Callable[[Partial], Awaitable[None]] | None
    cargo: Callable[[str], Cargo] | None = None

    def agreed_size(self, announced: int | None) -> int | None:
        """Take the upstream's word for the size, unless the narinfo's word is another.

        Raises:
            SizeMismatchError: It is.
        """
        if self.size is None or announced in (None, self.size):
            return announced if self.size is None else self.size
        raise SizeMismatchError(
            f"the upstream announces {announced} bytes, the narinfo {self.size}"
        )


class Supply(Protocol):
    """Where the bytes come from: `proxy.transfer.Transfer`."""

    size: int | None
    """Bytes that were announced, or None."""

    @property
    def upstream(self) -> str:
        """The upstream's name."""
        ...

    @property
    def origin(self) -> Origin | None:
        """What a download that is left unfinished has to know to go on; None where it cannot."""
        ...

    @property
    def resumed(self) -> bool:
        """Whether it begins behind what was left of an earlier download."""
        ...

    @property
    def promise(self) -> Promise:
        """What the file has to be."""
        ...

    async def carry(self) -> str | None:
        """Have the whole file put somewhere, verified; None when it has to be read instead.

        Raises:
            TrustError: What came is not what was promised.
            NotFoundError: It is nowhere.
            UpstreamError: It cannot be had.
        """

    async def read(self) -> bytes | None:
        """Return the next bytes, ``b""`` at the end, None when what came so far is void."""

    async def reject(self, error: TrustError) -> bool:
        """Start over, because of what is wrong with the bytes; return False where that is impossible."""
        ...


class OneAnswer:
    """A supply of one body that comes whole or not at all.

    Args:
        upstream: The upstream's name.
        body: What arrives.
        promise: What it has to be.
    """

    def __init__(self, upstream: str, body: Body, promise: Promise) -> None:
        self.upstream = upstream
        self.promise = promise
        self.size = body.size
        self.origin = None
        self.resumed = False
        self._body = body

    async def carry(self) -> None:
        """It has to be read."""

    async def read(self) -> bytes | None:
        """Return the next bytes, or ``b""`` at the end."""
        return await self._body.read()

    async def reject(self, _error: TrustError) -> bool:
        """There is no other."""
        return False


async def read_ahead(supply: Supply) -> AsyncGenerator[bytes | None, None]:
    """Iterate over what comes, reading the next piece while the last one is being worked on."""
    following = asyncio.ensure_future(supply.read())
    try:
        while (data := await following) != b"":
            following = asyncio.ensure_future(supply.read())
            yield data
    finally:
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)
