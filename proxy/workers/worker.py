"""One worker process: accepts clients, and serves them from the store and from what the core gives it.

It obeys the core alone: signals that reach the whole group of processes (Ctrl-C, systemd's SIGTERM) are for
the core. When the core has gone, the worker goes too.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from proxy import collector
from proxy.channel import NONE
from proxy.events import Event, Fault
from proxy.nix.cache_info import CacheInfo
from proxy.nix.signature import Keyring, PublicKey
from proxy.nix.store_path import HashPart
from proxy.server.app import Server
from proxy.server.listening import listening
from proxy.server.page import Facts
from proxy.store.reader import StoreReader
from proxy.workers.audience import Audience
from proxy.workers.link import Link
from proxy.workers.messages import (
    Ahead,
    Answer,
    AskFacts,
    AskMetrics,
    AskStore,
    Broken,
    Done,
    Flush,
    Forget,
    Happened,
    Hurry,
    Listening,
    Metrics,
    Note,
    PageFacts,
    Progress,
    Question,
    Rules,
    Segment,
    Setup,
    Stop,
    StoreState,
    Whole,
    expect,
    read_setup,
)
from proxy.workers.remote import RemoteCache

IGNORED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""What they mean, the core decides."""


class Worker:
    """One worker. Made inside of a running event loop.

    Args:
        setup: What the core wants.
        core: The socket that leads to the core.
        listeners: Sockets that listen.
    """

    def __init__(
        self, setup: Setup, core: socket.socket, listeners: Sequence[socket.socket]
    ) -> None:
        self._shutdown_timeout = setup.shutdown_timeout
        self._listeners = listeners
        self._link = Link(core, answer=self._answer, hear=self._hear)
        self._cache = RemoteCache(
            StoreReader(Path(setup.store)), self._link, _keyrings(setup.rules)
        )
        self._server = Server(
            self._cache,
            prefetch=Audience(self._link.tell),
            cache_info=CacheInfo.parse(setup.cache_info),
            observer=self._observe,
            operations=self,
        )
        self._server.strict = setup.rules.strict
        self._stop = asyncio.Event()
        self._hurry = asyncio.Event()

    async def run(self) -> None:
        """Serve until the core says stop, or has gone."""
        asyncio.get_running_loop().set_exception_handler(self._on_fault)
        serving = asyncio.create_task(self._serve())
        orphaned = asyncio.create_task(self._link.ended.wait())
        await asyncio.wait((serving, orphaned), return_when=asyncio.FIRST_COMPLETED)
        if not serving.done():
            os._exit(1)  # at once: there is nothing to tidy up, and nobody to serve for
        orphaned.cancel()
        await serving

    async def _serve(self) -> None:
        async with listening(
            self._server,
            self._listeners,
            shutdown_timeout=self._shutdown_timeout,
            hurry=self._hurry,
        ):
            self._link.tell(Listening())
            await self._stop.wait()
        await self._link.drained()

    async def facts(self) -> Facts:
        """Return what the page says, from the core."""
        answer, _ = await self._link.ask(AskFacts())
        return expect(PageFacts, answer).facts

    async def metrics(self) -> tuple[bytes, str]:
        """Return the metrics of all processes, from the core."""
        answer, _ = await self._link.ask(AskMetrics())
        metrics = expect(Metrics, answer)
        return metrics.body, metrics.content_type

    async def check_store(self) -> str:
        """Find out why the disk keeps nothing, from the core."""
        answer, _ = await self._link.ask(AskStore())
        return expect(StoreState, answer).reason

    def _observe(self, event: Event) -> None:
        self._link.tell(Happened.of(event))

    def _on_fault(self, _loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        error = context.get("exception")
        trace = "".join(traceback.format_exception(error)) if error else ""
        self._observe(Fault(str(context["message"]), trace))

    async def _answer(self, question: Question) -> tuple[Answer, int]:
        match question:
            case Rules(strict=strict):
                self._server.strict = strict
                self._cache.use(_keyrings(question))
                self._server.lane.forget_nars()
            case Flush():
                self._server.lane.flush()
            case _:
                raise TypeError(f"a worker is not asked {type(question).__name__}")
        return Done(), NONE

    def _hear(self, note: Note, fd: int) -> None:
        match note:
            case Progress() | Segment() | Whole() | Broken():
                self._cache.hear(note, fd)
            case Forget(hash_part):
                self._cache.forget(HashPart(hash_part))
            case Ahead(name):
                self._cache.ahead(name)
            case Stop():
                self._stop.set()
            case Hurry():
                self._hurry.set()
            case _:
                raise TypeError(f"a worker is not told {type(note).__name__}")


def _keyrings(rules: Rules) -> tuple[Keyring | None, ...]:
    return tuple(
        None if keys is None else Keyring(map(PublicKey.parse, keys)) for keys in rules.keyrings
    )


def main() -> None:
    """Run a worker.

    Its arguments are the descriptors of the socket to the core, and of those that listen; its standard
    input is a `Setup`.
    """
    for number in IGNORED:
        signal.signal(number, signal.SIG_IGN)
    setup = read_setup(sys.stdin.buffer.read())
    core, *listeners = (socket.socket(fileno=int(text)) for text in sys.argv[1:])

    async def run() -> None:
        worker = Worker(setup, core, listeners)
        collector.settle()
        await worker.run()

    asyncio.run(run())
