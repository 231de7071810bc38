"""What a binary cache may do wrong, one class each.

A fault changes the `Reply` that the simulator is about to give: its status, headers and body, or
what happens on the way. Several faults given together all apply, in order. Offsets count bytes of
the body as it is sent, after a Range was cut out of it; damage (`Corrupt`, `Shorter`, `Longer`) is
done to the whole file before that.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from multidict import CIMultiDict

from tests.blobs import Blob, compress


class Request(NamedTuple):
    """A request as it came over the wire.

    Attributes:
        method: ``GET``, ``HEAD`` …
        raw_path: Path and query below the simulator's URL, percent-encoding untouched.
        headers: Case-insensitive, to see what leaked and what was asked for.
    """

    method: str
    raw_path: str
    headers: CIMultiDict[str]


class Connection(Protocol):
    """What a fault may do to the connection."""

    async def cut(self, *, reset: bool) -> None:
        """End it at once; with `reset` by RST, which may also lose bytes on their way."""
        ...


Action = Callable[[Connection], Awaitable[None]]


@dataclass(eq=False)
class Reply:
    """The answer about to be given.

    Attributes:
        status: The status code.
        headers: Without the framing ones, which are made from the fields below.
        body: What is sent, and what Content-Length says.
        chunked: Send no Content-Length.
        missing: How many bytes of the body are not sent although they were announced.
        ranges: Range requests are obeyed, and announced by Accept-Ranges.
        before: What happens before the headers.
        stops: What happens after so many bytes of the body.
        pace: Bytes per second and bytes at a time, where it is slow.
    """

    status: int
    headers: CIMultiDict[str]
    body: Blob
    chunked: bool = False
    missing: int = 0
    ranges: bool = True
    before: list[Action] = field(default_factory=list)
    stops: list[tuple[int, Action]] = field(default_factory=list)
    pace: tuple[float, int] | None = None

    def replace(self, status: int, body: Blob | bytes, headers: Mapping[str, str]) -> None:
        """Forget the file and answer something else, of which no range can be had."""
        self.status, self.body, self.ranges = status, Blob.of(body), False
        self.headers = CIMultiDict(headers)


class Fault(Protocol):
    """Something that goes wrong with a reply."""

    def shape(self, reply: Reply, request: Request) -> None:
        """Change `reply` to `request`."""
        ...


class Latch:
    """An event that any loop and any thread may set or wait for; once set, it stays so."""

    def __init__(self) -> None:
        """Make one that is not set."""
        self._flag = threading.Event()
        self._waiters: list[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = []

    def set(self) -> None:
        """Let everyone through who waits or will wait."""
        self._flag.set()
        for loop, event in tuple(self._waiters):
            loop.call_soon_threadsafe(event.set)

    def is_set(self) -> bool:
        """Return whether it was set."""
        return self._flag.is_set()

    async def wait(self) -> None:
        """Wait in a coroutine, on whatever loop it runs."""
        waiter = (asyncio.get_running_loop(), asyncio.Event())
        self._waiters.append(waiter)
        try:
            if not self._flag.is_set():  # looked at after queueing up, so no set() is missed
                await waiter[1].wait()
        finally:
            self._waiters.remove(waiter)

    def block(self, timeout: float = 30) -> None:
        """Wait in a thread, `timeout` seconds at most.

        Raises:
            TimeoutError: It was not set in time.
        """
        if not self._flag.wait(timeout):
            message = f"nothing happened for {timeout} s"
            raise TimeoutError(message)


class Waitable(Protocol):
    """A `Latch` or an `asyncio.Event` of the simulator's own loop."""

    async def wait(self) -> object:
        """Wait until it is set."""
        ...


# --- other answers ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Status:
    """Answer with a status code and a short body."""

    code: int
    body: bytes = b"fault\n"
    headers: Mapping[str, str] = field(default_factory=dict)

    def shape(self, reply: Reply, request: Request) -> None:
        """Answer `code` instead of the file."""
        reply.replace(self.code, self.body, {"Content-Type": "text/plain", **self.headers})


@dataclass(frozen=True)
class Html:
    """Answer 200 with a page for people, as captive portals and error pages do."""

    body: bytes = (
        b"<!DOCTYPE html>\n<html><body>Please log in: http://portal.example/</body></html>\n"
    )
    code: int = 200

    def shape(self, reply: Reply, request: Request) -> None:
        """Answer the page instead of the file."""
        reply.replace(self.code, self.body, {"Content-Type": "text/html; charset=utf-8"})


@dataclass(frozen=True)
class Redirect:
    """Send the client elsewhere; `location` may be made from the request."""

    location: str | Callable[[Request], str]
    code: int = 302

    def shape(self, reply: Reply, request: Request) -> None:
        """Answer `code` with a Location."""
        location = self.location if isinstance(self.location, str) else self.location(request)
        reply.replace(self.code, b"", {"Location": location})


@dataclass(frozen=True)
class Body:
    """Send other bytes under the same headers."""

    data: bytes | Blob

    def shape(self, reply: Reply, request: Request) -> None:
        """Replace the body."""
        reply.body = Blob.of(self.data)


@dataclass(frozen=True)
class Headers:
    """Set some response headers; None takes one away."""

    changes: Mapping[str, str | None]

    def shape(self, reply: Reply, request: Request) -> None:
        """Change the headers."""
        for name, value in self.changes.items():
            reply.headers.pop(name, None)
            if value is not None:
                reply.headers[name] = value


@dataclass(frozen=True)
class Corrupt:
    """Flip the bits of one byte; the length stays. A negative offset counts from the end."""

    offset: int = -1

    def shape(self, reply: Reply, request: Request) -> None:
        """Damage the body."""
        at = self.offset % len(reply.body)
        flipped = bytes(byte ^ 0xFF for byte in bytes(reply.body[at : at + 1]))
        reply.body = reply.body[:at] + flipped + reply.body[at + 1 :]


@dataclass(frozen=True)
class Shorter:
    """Leave out the last `n` bytes, with a Content-Length that agrees."""

    n: int = 1

    def shape(self, reply: Reply, request: Request) -> None:
        """Shorten the body."""
        reply.body = reply.body[: max(0, len(reply.body) - self.n)]


@dataclass(frozen=True)
class Longer:
    """Append `n` bytes, with a Content-Length that agrees."""

    n: int = 1

    def shape(self, reply: Reply, request: Request) -> None:
        """Lengthen the body."""
        reply.body += Blob(((b"\0", self.n),)) if self.n < 1024 else _zeros(self.n)


def _zeros(n: int) -> Blob:
    return Blob(((bytes(1024), n // 1024), (bytes(n % 1024), 1)))


@dataclass(frozen=True)
class Encoded:
    """Send the body compressed, and say so in Content-Encoding; ``identity`` only says so."""

    coding: str = "gzip"

    def shape(self, reply: Reply, request: Request) -> None:
        """Encode the body."""
        reply.body = compress(bytes(reply.body), self.coding)
        reply.headers["Content-Encoding"] = self.coding


# --- framing ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Chunked:
    """Send no Content-Length but chunks."""

    def shape(self, reply: Reply, request: Request) -> None:
        """Leave the length out."""
        reply.chunked = True


@dataclass(frozen=True)
class ShortBody:
    """Announce the whole length, send `n` bytes less, then close the connection in good order."""

    n: int = 1

    def shape(self, reply: Reply, request: Request) -> None:
        """Keep the last bytes back."""
        reply.missing = self.n


@dataclass(frozen=True)
class NoRanges:
    """Know no ranges: no Accept-Ranges, and 200 with everything for a Range request."""

    def shape(self, reply: Reply, request: Request) -> None:
        """Ignore Range."""
        reply.ranges = False


# --- time and death ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Cut:
    """End the connection after `after` bytes of the body, all of which arrive.

    With `reset` it ends by RST, and some of them may be lost.
    """

    after: int = 0
    reset: bool = False

    def shape(self, reply: Reply, request: Request) -> None:
        """Plan the cut."""
        reply.stops.append((self.after, lambda connection: connection.cut(reset=self.reset)))


@dataclass(frozen=True)
class Reset:
    """Reset the connection instead of answering."""

    def shape(self, reply: Reply, request: Request) -> None:
        """Plan the reset."""
        reply.before.append(lambda connection: connection.cut(reset=True))


@dataclass(frozen=True)
class Delay:
    """Wait so many seconds before the headers."""

    seconds: float

    def shape(self, reply: Reply, request: Request) -> None:
        """Plan the delay."""

        async def wait(_: Connection) -> None:
            await asyncio.sleep(self.seconds)

        reply.before.append(wait)


@dataclass(frozen=True)
class Slow:
    """Send `chunk` bytes at a time, so that it makes `bytes_per_second`."""

    bytes_per_second: float
    chunk: int = 1024

    def shape(self, reply: Reply, request: Request) -> None:
        """Set the pace."""
        reply.pace = (self.bytes_per_second, self.chunk)


class Gate:
    """Send `after` bytes of the body (None: not even the headers), then wait for `event`.

    The test waits for `reached` before it goes on, and opens the gate by `open`: interleavings
    without sleeping. Closing the simulator or the client's connection ends the wait, too.

    Attributes:
        reached: Set when the first request stands before the gate.
        arrivals: How many requests have stood before it.
    """

    def __init__(self, after: int | None = 0, event: Waitable | None = None) -> None:
        """Make a gate with an event of its own, or with the one given."""
        self.after = after
        self.reached = Latch()
        self.arrivals = 0
        self._latch = Latch()
        self._event: Waitable = event or self._latch

    def open(self) -> None:
        """Let all requests through, for ever (a gate with its own event only)."""
        self._latch.set()

    def shape(self, reply: Reply, request: Request) -> None:
        """Put the gate on the way."""
        if self.after is None:
            reply.before.append(self._pass)
        else:
            reply.stops.append((self.after, self._pass))

    async def _pass(self, _: Connection) -> None:
        self.arrivals += 1
        self.reached.set()
        await self._event.wait()


class Stall(Gate):
    """Go silent after `after` bytes of the body (None: before the headers) until `open`."""
