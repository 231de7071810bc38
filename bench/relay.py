"""A long way to a server on this machine: TCP with delay, and a bandwidth that all connections share.

``python -m bench.relay --to PORT --rtt 0.040 --mbit 500`` listens on a free port of 127.0.0.1 and prints
it. Half the round trip is spent in each direction, and a whole one before a new connection carries
anything, as by TCP's handshake. Each direction is a line that sends one piece after the other; connections
take turns on it, so that a small answer does not wait behind all of a large one. There is no loss and no
slow start: this is kinder to whoever opens many connections than the Internet is, and to whoever opens few.
"""

from __future__ import annotations

import argparse
import asyncio
import signal
from collections import deque

HOST = "127.0.0.1"

PIECE = 16 * 1024
"""Bytes sent before the next connection has its turn."""

QUEUE = 256 * 1024
"""Bytes of one connection that wait for the line before its sender is told to pause."""

EARLY = 0.001
"""Seconds that the line may run ahead of the clock, which is how coarse timers are."""


class Line:
    """One direction: pieces go out at a rate, and arrive after a delay.

    Args:
        rate: Bytes per second.
        delay: Seconds.
    """

    def __init__(self, rate: float, delay: float) -> None:
        self._rate = rate
        self._delay = delay
        self._waiting: deque[Flow] = deque()
        self._free_at = 0.0
        self._news = asyncio.Event()

    def take_turns(self, flow: Flow) -> None:
        """Let a flow that has pieces again take part."""
        self._waiting.append(flow)
        self._news.set()

    async def run(self) -> None:
        """Send for ever."""
        loop = asyncio.get_running_loop()
        while True:
            if not self._waiting:
                self._news.clear()
                await self._news.wait()
                self._free_at = max(self._free_at, loop.time())
            flow = self._waiting.popleft()
            piece = flow.next_piece()
            self._free_at += len(piece) / self._rate
            loop.call_at(self._free_at + self._delay, flow.arrive, piece)
            if flow.has_pieces:
                self._waiting.append(flow)
            ahead = self._free_at - loop.time()
            if ahead > EARLY:
                await asyncio.sleep(ahead)


class Flow:
    """The bytes of one connection in one direction; the empty piece is its end.

    Args:
        line: What they go over.
        opens_at: The loop's time before which nothing is sent.
    """

    def __init__(self, line: Line, opens_at: float) -> None:
        self._line = line
        self._opens_at = opens_at
        self._pieces: deque[bytes] = deque()
        self._queued = 0
        self._choked = False
        self.source: asyncio.Transport | None = None
        self.target: asyncio.Transport | None = None

    @property
    def has_pieces(self) -> bool:
        """Whether something waits for the line."""
        return bool(self._pieces)

    def put(self, data: bytes) -> None:
        """Take bytes from the source, or no bytes at its end."""
        if not self._pieces:
            loop = asyncio.get_running_loop()
            loop.call_at(max(self._opens_at, loop.time()), self._line.take_turns, self)
        self._pieces += [data[at : at + PIECE] for at in range(0, len(data), PIECE)] or [b""]
        self._queued += len(data)
        self._balance()

    def next_piece(self) -> bytes:
        """Give a piece to the line."""
        piece = self._pieces.popleft()
        self._queued -= len(piece)
        self._balance()
        return piece

    def arrive(self, piece: bytes) -> None:
        """Give a piece to the target."""
        if self.target is None:
            return
        if piece:
            self.target.write(piece)
        else:
            self.target.close()

    def choke(self, *, choked: bool) -> None:
        """Take in that the target does not read, or does so again."""
        self._choked = choked
        self._balance()

    def _balance(self) -> None:
        """Pause or resume the source."""
        if self.source is None or self.source.is_closing():
            return
        if self._choked or self._queued > QUEUE:
            self.source.pause_reading()
        else:
            self.source.resume_reading()


class End(asyncio.Protocol):
    """One of the two sockets of a connection."""

    def __init__(self, outgoing: Flow, incoming: Flow) -> None:
        self._outgoing = outgoing
        self._incoming = incoming

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Put the socket at the ends of both flows."""
        assert isinstance(transport, asyncio.Transport)  # noqa: S101 - for mypy
        self._outgoing.source = transport
        self._incoming.target = transport

    def data_received(self, data: bytes) -> None:
        """Send it over the line."""
        self._outgoing.put(data)

    def pause_writing(self) -> None:
        """Stop the other side."""
        self._incoming.choke(choked=True)

    def resume_writing(self) -> None:
        """Let the other side go on."""
        self._incoming.choke(choked=False)

    def connection_lost(self, error: Exception | None) -> None:
        """Close the other side, once all that was sent has arrived."""
        del error
        self._incoming.target = None
        self._outgoing.put(b"")


class Relay:
    """Connections to one port, made long.

    Args:
        port: Where they lead.
        rtt: Seconds.
        rate: Bytes per second, in each direction.
    """

    def __init__(self, port: int, *, rtt: float, rate: float) -> None:
        self._port = port
        self._rtt = rtt
        self._up = Line(rate, rtt / 2)
        self._down = Line(rate, rtt / 2)
        self._opening: set[asyncio.Task[object]] = set()

    async def run(self) -> None:
        """Print the port, and relay until it is cancelled."""
        loop = asyncio.get_running_loop()
        server = await loop.create_server(self._accept, HOST, 0, backlog=1024)
        print(server.sockets[0].getsockname()[1], flush=True)
        await asyncio.gather(self._up.run(), self._down.run())

    def _accept(self) -> End:
        loop = asyncio.get_running_loop()
        up = Flow(self._up, loop.time() + self._rtt)
        down = Flow(self._down, 0)
        connect = loop.create_connection(lambda: End(down, up), HOST, self._port)
        task = loop.create_task(connect)
        self._opening.add(task)
        task.add_done_callback(self._opening.discard)
        return End(up, down)


async def main() -> None:
    """Do as the command line says, until SIGTERM."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--to", type=int, required=True, help="port of 127.0.0.1")
    parser.add_argument("--rtt", type=float, default=0.040, help="seconds (%(default)s)")
    parser.add_argument("--mbit", type=float, default=500, help="per second (%(default)s)")
    options = parser.parse_args()
    relay = Relay(options.to, rtt=options.rtt, rate=options.mbit * 1e6 / 8)
    relaying = asyncio.ensure_future(relay.run())
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, relaying.cancel)
    await asyncio.wait([relaying])


if __name__ == "__main__":
    asyncio.run(main())
