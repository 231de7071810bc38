"""What an upstream sends: bodies as they arrive, content codings undone, errors as ours."""

from __future__ import annotations

import asyncio
import contextlib
import email.utils
import os
import re
import time
from collections.abc import Callable, Iterator

import aiohttp

from proxy.errors import (
    TrustError,
    UpstreamBrokeOffError,
    UpstreamProtocolError,
    UpstreamTimeoutError,
    UpstreamUnavailableError,
)
from proxy.nix.decoders import decoder
from proxy.upstream.carriage import Head
from proxy.upstream.resume import beginning

MAX_FILE = 256 * 2**20
"""Bytes of a decoded log, listing, …: nobody reads more, and a small body could unpack to anything."""

ENOUGH = 64 * 2**10
"""Bytes that are worth the steps that a piece takes on its way to the disk."""

LULL = 0.005
"""Seconds in which more may come, where there is less than that: a closure is thousands of small files, and
dozens of them arrive at once, all in small pieces."""

DRAIN_TIMEOUT = 1.0
"""Seconds for that; the status is known already."""

MAX_DRAIN = 64 * 2**10
"""Bytes of an error's body that are read to keep its connection alive."""


class Body:
    """The body of an answer, as the upstream sends it.

    Args:
        upstream: The upstream's name, for errors.
        response: The answer, whose status is 200 or 206.

    Raises:
        UpstreamProtocolError: It is a part, and does not say which.
    """

    def __init__(self, upstream: str, response: aiohttp.ClientResponse) -> None:
        self._upstream = upstream
        self._response = response
        try:
            self.begins = beginning(response.status, response.headers, response.content_length)
        except ValueError as error:
            raise UpstreamProtocolError(upstream, str(error)) from error
        self.size = self.begins.size
        """Bytes of the whole that the upstream announced, or None."""

    async def read(self) -> bytes:
        """Return what has arrived, at most some 512 KiB; ``b""`` at the end of a complete body.

        Raises:
            UpstreamError: The connection broke, or no byte came in time.
        """
        with translated(self._upstream, UpstreamBrokeOffError):
            content = self._response.content
            data = await content.readany()
            if 0 < len(data) < ENOUGH and not content.at_eof():
                await asyncio.sleep(LULL)
                if content.exception() is None:  # else the next call raises it
                    data += content.read_nowait()
            return data

    async def read_decoded(self, limit: int) -> bytes:
        """Read everything, undo its content coding, and return it.

        Raises:
            UpstreamProtocolError: The coding is unknown or damaged, or more than ``limit`` bytes came out.
            UpstreamError: The connection broke, or no byte came in time.
        """
        pieces: list[bytes] = []
        if _compression_of(self._response) != "identity":
            await self.copy_decoded(pieces.append, limit=limit)
            return b"".join(pieces)
        total = 0
        while data := await self.read():
            total += len(data)
            if total > limit:
                raise self._too_much(limit)
            pieces.append(data)
        return b"".join(pieces)

    async def copy_decoded(self, sink: Callable[[bytes], object], *, limit: int = MAX_FILE) -> None:
        """Read everything and undo its content coding.

        That is done on a worker thread, because a small body can unpack to seconds of work; ``sink`` is
        called there with the pieces, and is not called any more when this has returned.

        Raises:
            UpstreamProtocolError: The coding is unknown or damaged, or more than ``limit`` bytes came out.
            UpstreamError: The connection broke, or no byte came in time.
        """
        total = 0

        def take(piece: bytes) -> None:
            nonlocal total
            total += len(piece)
            if total > limit:
                raise self._too_much(limit)
            sink(piece)

        try:
            coding = decoder(_compression_of(self._response), take)
            while data := await self.read():
                await _on_thread(coding.feed, data)
            await _on_thread(coding.finish)
        except TrustError as error:
            raise UpstreamProtocolError(self._upstream, f"bad Content-Encoding: {error}") from error

    def _too_much(self, limit: int) -> UpstreamProtocolError:
        return UpstreamProtocolError(self._upstream, f"sent more than {limit} bytes")


@contextlib.contextmanager
def translated(
    upstream: str, broken: type[UpstreamUnavailableError] = UpstreamUnavailableError
) -> Iterator[None]:
    """Turn what the HTTP client raises into our own errors: into ``broken`` where a connection died."""
    try:
        yield
    except TimeoutError as error:  # aiohttp's own timeouts derive from it
        raise UpstreamTimeoutError(upstream, "no answer in time") from error
    except aiohttp.ClientPayloadError as error:
        raise broken(upstream, f"the answer was cut off: {error}") from error
    except aiohttp.ClientConnectorError as error:  # its own text names the whole connection key
        reason = str(error.os_error) or type(error).__name__
        raise UpstreamUnavailableError(
            upstream, f"cannot connect to {error.host}: {reason}"
        ) from error
    except (aiohttp.ClientConnectionError, OSError) as error:
        reason = str(error) or type(error).__name__
        raise broken(upstream, reason) from error
    except (aiohttp.ClientError, ValueError) as error:  # yarl and idna raise ValueError
        # Not its text, which quotes what the upstream sent, or a URL that may hold a secret.
        raise UpstreamProtocolError(upstream, f"not HTTP ({type(error).__name__})") from error


def _reason(error: OSError) -> str:
    """Say what the system says, without the addresses that asyncio puts around it."""
    known = isinstance(error.errno, int) and error.errno > 0
    return os.strerror(error.errno or 0).lower() if known else str(error.strerror or error)


async def _on_thread(step: Callable[..., None], *args: object) -> None:
    """Do a step on a worker thread, and see it end even when nobody wants it any more."""
    job = asyncio.ensure_future(asyncio.to_thread(step, *args))
    try:
        await asyncio.shield(job)
    except asyncio.CancelledError:
        await asyncio.gather(job, return_exceptions=True)
        raise


async def drain(response: aiohttp.ClientResponse) -> None:
    """Read a short body that nobody needs, so that the connection can be used again; never fails."""
    if (response.content_length or 0) > MAX_DRAIN:
        return
    with contextlib.suppress(TimeoutError, aiohttp.ClientError, OSError, ValueError):
        async with asyncio.timeout(DRAIN_TIMEOUT):
            for _ in range(MAX_DRAIN // 1024):
                if not await response.content.read(1024):
                    return


def retry_after(response: Head) -> float:
    """Return the seconds of ``Retry-After`` (RFC 9110 §10.2.3); 0 when there are none to be read."""
    text = response.headers.get("Retry-After", "").strip()
    if re.fullmatch(r"[0-9]{1,9}", text, re.ASCII):
        return float(text)
    try:
        moment = email.utils.parsedate_to_datetime(text)
        return max(0.0, moment.timestamp() - time.time())
    except (ValueError, OverflowError):
        return 0.0


def _compression_of(response: aiohttp.ClientResponse) -> str:
    """Name the content coding as Nix names compressions."""
    coding = response.headers.get("Content-Encoding", "identity").strip().lower()
    return {"x-gzip": "gzip"}.get(coding, coding)
