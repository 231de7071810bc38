"""Start workers, start them again, and end them."""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
from collections.abc import AsyncIterator, Sequence
from typing import Final

from proxy.errors import ProxyError
from proxy.events import Event, FetchingAhead, Forgotten, WorkerEnded, WorkerStarted
from proxy.server.listening import LINGER, Address
from proxy.spawn import ending, spawn
from proxy.workers.link import LinkClosedError
from proxy.workers.messages import (
    Ahead,
    Flush,
    Forget,
    Hurry,
    Note,
    Question,
    Rules,
    Setup,
    Stop,
    encode,
)
from proxy.workers.restarts import Restarts
from proxy.workers.service import Core, Service
from proxy.workers.sockets import Listeners

ANSWER_TIMEOUT: Final = 1.0
"""Seconds that a worker has to tell its numbers, or to take new rules."""

GRACE: Final = 2.0
"""Seconds that a worker has to end, besides those that it was given for its clients."""


class Supervisor:
    """The workers. Made inside of a running event loop; see `supervised`.

    Args:
        core: What workers ask for.
        listeners: What they listen on.
        workers: How many.
        setup: What each is told; the rules may change later.
    """

    def __init__(self, core: Core, listeners: Listeners, workers: int, setup: Setup) -> None:
        self._core = core
        self._listeners = listeners
        self._setup = setup
        self._services: dict[int, Service] = {}
        self._processes: dict[int, asyncio.subprocess.Process] = {}
        self._listening = [asyncio.Event() for _ in range(workers)]
        self._stopping = asyncio.Event()
        self._keepers = [asyncio.create_task(self._keep(number)) for number in range(workers)]

    @property
    def addresses(self) -> list[str]:
        """Where clients find us."""
        return self._listeners.texts

    @property
    def pids(self) -> list[int]:
        """The processes that run."""
        return [process.pid for process in self._processes.values()]

    async def all_listen(self) -> None:
        """Wait until every worker has accepted connections once."""
        for listening in self._listening:
            await listening.wait()

    async def use(self, rules: Rules) -> None:
        """Have all workers go by other rules, and wait for that, but not for long."""
        self._setup = Setup(
            self._setup.store, self._setup.cache_info, self._setup.shutdown_timeout, rules
        )
        await self._ask_all(rules)

    async def flush(self) -> None:
        """Have all workers tell what they have counted, and wait for that, but not for long."""
        await self._ask_all(Flush())

    def observe(self, event: Event) -> None:
        """Tell workers what has happened that they have to know: an `proxy.events.Observer`."""
        match event:
            case Forgotten(hash_part):
                self._tell_all(Forget(hash_part))
            case FetchingAhead(what):
                self._tell_all(Ahead(what))
            case _:
                pass

    async def stop(self, hurry: asyncio.Event) -> None:
        """End all workers: by themselves when their clients are served, or else by force.

        Args:
            hurry: Set when clients are not to be waited for any longer.
        """
        self._stopping.set()
        self._listeners.close()
        self._tell_all(Stop())
        ended = asyncio.gather(*self._keepers)
        hurrying = asyncio.create_task(hurry.wait())
        patience = self._setup.shutdown_timeout + LINGER + GRACE
        await asyncio.wait((ended, hurrying), timeout=patience, return_when=asyncio.FIRST_COMPLETED)
        hurrying.cancel()
        if not ended.done():
            self._tell_all(Hurry())
            await asyncio.wait((ended,), timeout=LINGER + GRACE)
        for process in self._processes.values():
            with contextlib.suppress(ProcessLookupError):
                process.kill()
        await ended

    async def _keep(self, number: int) -> None:
        """Run one worker, and run it again when it ends by itself."""
        loop = asyncio.get_running_loop()
        restarts = Restarts()
        while not self._stopping.is_set():
            began = loop.time()
            pid, reason = await self._run(number)
            if self._stopping.is_set():
                return
            restarts = restarts.after(loop.time() - began)
            pause = restarts.pause(random.random())  # noqa: S311  # nobody has to be unable to guess
            self._core.observer(WorkerEnded(number, pid, reason, pause))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause):
                    await self._stopping.wait()

    async def _run(self, number: int) -> tuple[int, str]:
        """Run one worker until it ends; return its process id, and what became of it."""
        ours, theirs = socket.socketpair()
        service = Service(self._core, ours, self._listening[number].set)
        try:
            with theirs:
                listeners = self._listeners.of(number)
                process = await spawn(
                    "proxy.workers", theirs, *listeners, stdin=encode(self._setup)
                )
        except OSError as error:
            await service.close()
            return 0, f"it cannot be started: {error.strerror}"
        self._services[number], self._processes[number] = service, process
        if self._stopping.is_set():
            service.link.tell(Stop())
        self._core.observer(WorkerStarted(number, process.pid))
        try:
            status = await process.wait()
        finally:
            del self._services[number], self._processes[number]
            await service.close()
        return process.pid, ending(status)

    def _tell_all(self, note: Note) -> None:
        for service in self._services.values():
            service.link.tell(note)

    async def _ask_all(self, question: Question) -> None:
        asking = [self._ask(service, question) for service in self._services.values()]
        await asyncio.gather(*asking)

    async def _ask(self, service: Service, question: Question) -> None:
        with contextlib.suppress(LinkClosedError, ProxyError, TimeoutError):
            async with asyncio.timeout(ANSWER_TIMEOUT):
                await service.link.ask(question)


@contextlib.asynccontextmanager
async def supervised(
    core: Core, addresses: Sequence[Address], workers: int, setup: Setup, *, hurry: asyncio.Event
) -> AsyncIterator[Supervisor]:
    """Run workers until the block ends; they may not listen yet when it begins.

    Raises:
        ListenError: An address cannot be listened on.
    """
    supervisor = Supervisor(core, Listeners(addresses, workers), workers, setup)
    try:
        yield supervisor
    finally:
        await supervisor.stop(hurry)
