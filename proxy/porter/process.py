"""The porter's own process: fetch, verify, write; flush and rename.

It decides nothing: each task says all that it takes, and what it has to be. It ends with the daemon, in
whatever way that ends, so that nobody else's daemon meets it in the store.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import selectors
import signal
import socket
import sys
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from typing import Final

import aiohttp
import yarl

from proxy import collector
from proxy.channel import Channel, Outbox
from proxy.errors import (
    ProxyError,
    SizeMismatchError,
    StoreError,
    UpstreamBrokeOffError,
    UpstreamError,
    UpstreamUnavailableError,
)
from proxy.nix.nar import NarVerifier
from proxy.porter.messages import (
    Carried,
    Carry,
    Outcome,
    Ping,
    Pong,
    Publish,
    Published,
    Refused,
    encode,
    read_tasks,
)
from proxy.store.files import Partial
from proxy.store.publisher import Publication, Publisher, Rename
from proxy.upstream.answer import drain, translated
from proxy.upstream.carriage import LONGEST, TOLD, Cargo, Heading, Order, is_file
from proxy.upstream.session import session
from proxy.wire import Failed

PR_SET_PDEATHSIG: Final = 1
"""prctl(2): which signal a process gets when the one that started it has ended."""


JUDGES: Final = 2
"""Threads for NARs that take long to judge."""

LONG: Final = 2**20
"""Bytes of such a NAR, unpacked; a smaller one takes less time than to wake a thread."""


LULL: Final = 0.002
"""Seconds between two looks at what has come. Dozens of files arrive at once, all in small pieces, and
several of them at a time are less work. To an upstream and back takes much longer."""


class Unhurried(selectors.EpollSelector):
    """Says what has happened to sockets, but not sooner than `LULL` after it has done so."""

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        """Wait, first for company: `selectors.BaseSelector.select`."""
        if timeout is not None and timeout <= LULL:
            time.sleep(max(0.0, timeout))
            return super().select(0)
        time.sleep(LULL)
        return super().select(timeout if timeout is None else timeout - LULL)


class Process:
    """What the process does. Made inside of a running event loop.

    Args:
        daemon: The socket that leads to the daemon.
    """

    def __init__(self, daemon: socket.socket) -> None:
        self._loop = asyncio.get_running_loop()
        self._over = asyncio.Event()
        self._channel = Channel(
            daemon, on_frame=self._on_frame, on_drained=lambda: None, on_end=self._over.set
        )
        self._outcomes: Outbox[Outcome] = Outbox(self._channel, encode)
        self._sessions: dict[tuple[str | None, float, float], aiohttp.ClientSession] = {}
        self._publisher = Publisher(lambda _publication: None)
        self._carrying: set[asyncio.Task[None]] = set()
        self._judges = ThreadPoolExecutor(JUDGES, thread_name_prefix="judge")

    async def run(self) -> None:
        """Do what the daemon says until it has gone."""
        await self._over.wait()
        os._exit(0)  # at once: what is not published yet, nobody waits for

    def _on_frame(self, frame: bytes, _fd: int) -> None:
        try:
            tasks = read_tasks(frame)
        except ValueError:
            self._over.set()  # there is no talking with it
            return
        for task in tasks:
            match task:
                case Carry(number, order, cargo):
                    carrying = self._loop.create_task(self._carry(number, order, cargo))
                    self._carrying.add(carrying)
                    carrying.add_done_callback(self._carrying.discard)
                case Publish():
                    self._publish(task)
                case Ping():
                    self._outcomes.put(Pong())

    def _publish(self, task: Publish) -> None:
        renames = tuple(Rename(*each) for each in task.renames)
        publication = Publication(renames, origin=task.origin, superseded=task.superseded)
        done = self._publisher.submit(publication)
        done.add_done_callback(
            lambda done: self._loop.call_soon_threadsafe(
                self._tell, task.number, Published(task.number), done.exception()
            )
        )

    async def _carry(self, number: int, order: Order, cargo: Cargo) -> None:
        try:
            async with asyncio.timeout(LONGEST):
                heading = await self._fetch(order, cargo)
        except TimeoutError:
            self._tell(number, None, StoreError("it takes too long to be carried"))
        except Exception as error:  # noqa: BLE001  # whoever ordered it reports it
            self._tell(number, None, error)
        else:
            self._tell(number, Carried(number, heading), None)

    def _tell(self, number: int, outcome: Outcome | None, error: BaseException | None) -> None:
        if isinstance(error, ProxyError):
            outcome = Refused(number, Failed.of(error))
        elif error is not None or outcome is None:
            trace = "".join(traceback.format_exception(error))
            outcome = Refused(number, Failed("", trace))
        self._outcomes.put(outcome)

    async def _fetch(self, order: Order, cargo: Cargo) -> Heading:
        """Send a request; verify and write what comes, if it is the file.

        Raises:
            ProxyError: As `proxy.upstream.carriage.Carrier.carry` says.
        """
        with translated(order.upstream):
            async with asyncio.timeout(order.connect_timeout + order.read_timeout):
                response = await self._session(order).request(
                    "GET",
                    yarl.URL(order.url, encoded=True),
                    headers=order.headers,
                    allow_redirects=False,
                    proxy=order.proxy,
                )
        try:
            told = {name: response.headers[name] for name in TOLD if name in response.headers}
            if is_file(response):
                await self._keep(await _whole(response, order.upstream, cargo.size), cargo)
            else:
                await drain(response)
            return Heading(response.status, told, response.content_type)
        finally:
            response.release()

    async def _keep(self, data: bytearray, cargo: Cargo) -> None:
        """Verify a file, and write it: `_keep`."""
        if cargo.nar_size < LONG:
            _keep(data, cargo)
        else:
            job = self._loop.run_in_executor(self._judges, _keep, data, cargo)
            try:
                await asyncio.shield(job)
            except asyncio.CancelledError:
                await asyncio.gather(job, return_exceptions=True)
                Partial.closed(cargo.path, len(data)).discard()  # nobody waits for it now
                raise

    def _session(self, order: Order) -> aiohttp.ClientSession:
        key = order.ca_file, order.connect_timeout, order.read_timeout
        if key not in self._sessions:
            self._sessions[key] = session(
                ca_file=order.ca_file,
                connect_timeout=order.connect_timeout,
                read_timeout=order.read_timeout,
                max_connections=0,  # how many there may be, is for the daemon to see to
            )
        return self._sessions[key]


async def _whole(response: aiohttp.ClientResponse, upstream: str, size: int) -> bytearray:
    """Read a body that has to have ``size`` bytes.

    Raises:
        SizeMismatchError: It has not.
        UpstreamBrokeOffError: It ended, or was silent for too long, when some of it had come.
        UpstreamError: It did so before.
    """
    announced = response.content_length
    if announced not in (None, size):
        raise SizeMismatchError(f"the upstream announces {announced} bytes, the narinfo {size}")
    data, end = bytearray(size), 0
    try:
        with translated(upstream):
            while piece := await response.content.readany():
                begin, end = end, end + len(piece)
                if end > size:
                    raise SizeMismatchError(f"FileSize: more than the {size} bytes promised")
                data[begin:end] = piece
        if end < size:
            raise UpstreamUnavailableError(upstream, "the answer ends too early")
    except UpstreamError as error:
        if end == 0:
            raise
        if end < size:  # else it was cut behind the last byte
            raise UpstreamBrokeOffError(upstream, error.reason) from error
    return data


def _keep(data: bytearray, cargo: Cargo) -> None:
    """Verify a file, and write it.

    Raises:
        TrustError: It is not what it has to be.
        StoreError: The disk refused.
    """
    verifier = NarVerifier(
        compression=cargo.compression,
        nar_hash=cargo.nar_hash,
        nar_size=cargo.nar_size,
        file_hash=cargo.file_hash,
        file_size=cargo.size,
    )
    verifier.feed(memoryview(data))
    verifier.finish()
    file = Partial(cargo.path)
    try:
        file.append(data)
    except BaseException:
        file.discard()
        raise
    file.close()


def main() -> None:
    """Be the porter. The argument is the descriptor of the socket to the daemon."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # what they mean, the daemon decides
    daemon = socket.socket(fileno=int(sys.argv[1]))

    async def run() -> None:
        process = Process(daemon)
        collector.settle()
        await process.run()

    with asyncio.Runner(loop_factory=lambda: asyncio.SelectorEventLoop(Unhurried())) as runner:
        runner.run(run())
