"""The core's side of one worker: answers what it asks, and passes on what it tells."""

from __future__ import annotations

import asyncio
import os
import socket
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from proxy.answers import Content
from proxy.cache import Cache
from proxy.channel import NONE
from proxy.errors import NotFoundError
from proxy.events import Observer
from proxy.nix.nar_name import NarName
from proxy.nix.store_path import parse_hash_part
from proxy.prefetch import Prefetch
from proxy.server.backend import Operations
from proxy.store.files import OpenFile, disk
from proxy.workers.follower import Follower
from proxy.workers.link import Link
from proxy.workers.messages import (
    Absent,
    Announced,
    Answer,
    AskedNar,
    AskedPath,
    AskFacts,
    AskFile,
    AskMetrics,
    AskNarinfo,
    AskStore,
    Connected,
    Damaged,
    Disconnected,
    Given,
    Happened,
    Listening,
    Metrics,
    Narinfo,
    Note,
    PageFacts,
    Passed,
    PathsUsed,
    Question,
    Release,
    StoreState,
    Used,
)


@dataclass(frozen=True, slots=True)
class Core:
    """What the core has, and workers ask for.

    Attributes:
        cache: The pull-through cache.
        prefetch: The look-ahead.
        observer: Told of what happens in workers.
        operations: What operators are told.
    """

    cache: Cache
    prefetch: Prefetch
    observer: Observer
    operations: Operations


class Service:
    """Serves one worker. Made inside of a running event loop; closed with `close`.

    Args:
        core: What to serve it with.
        sock: The socket that leads to it.
        on_listening: Called when it accepts connections.
    """

    def __init__(self, core: Core, sock: socket.socket, on_listening: Callable[[], None]) -> None:
        self._core = core
        self._on_listening = on_listening
        self._clients: Counter[str] = Counter()
        self._wanted: set[int] = set()
        self._following: dict[int, tuple[Follower, asyncio.Task[None]]] = {}
        self.link = Link(sock, answer=self._answer, hear=self._hear)

    async def close(self) -> None:
        """The worker has gone: so have its clients."""
        await self.link.close()
        tasks = [task for _, task in self._following.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for client in self._clients.elements():
            self._core.prefetch.disconnected(client)
        self._clients.clear()

    async def _answer(self, question: Question) -> tuple[Answer, int]:
        core = self._core
        match question:
            case AskNarinfo(hash_part):
                return await self._narinfo(hash_part), NONE
            case AskFile():
                return await self._file(question)
            case AskStore():
                return StoreState(await core.operations.check_store()), NONE
            case AskFacts():
                return PageFacts(await core.operations.facts()), NONE
            case AskMetrics():
                return Metrics(*await core.operations.metrics()), NONE
            case _:
                raise TypeError(f"the core is not asked {type(question).__name__}")

    async def _narinfo(self, text: str) -> Answer:
        hash_part = parse_hash_part(text)
        try:
            found = await self._core.cache.narinfo(hash_part)
        except NotFoundError as error:
            return Absent(str(error), self._core.cache.absent_for(f"{hash_part}.narinfo"))
        known = found.known
        about = (known.origin, known.kept, known.info.size_on_disk)
        name = str(known.info.nar_name)
        return Narinfo(known.body, name, known.etag, *about, found.result)

    async def _file(self, question: AskFile) -> tuple[Answer, int]:
        self._wanted.add(question.number)
        try:
            content = await self._opener(question)
        except BaseException:
            self._wanted.discard(question.number)
            raise
        file = content.file
        if file is None or question.head or question.number not in self._wanted:
            self._wanted.discard(question.number)
            with content:
                about = (content.size, content.etag, content.result, content.upstream)
                return Announced(*about), NONE
        try:
            with disk("cannot read"):
                fd = os.dup(file.fd)
            whole = isinstance(file, OpenFile)
            released = file.size if isinstance(file, OpenFile) else 0
            given = Given(
                whole, released or 0, file.size, content.etag, content.result, content.upstream
            )
        except BaseException:
            self._wanted.discard(question.number)
            content.__exit__()
            raise
        if whole:
            self._wanted.discard(question.number)
            file.close()
        else:
            follower = Follower(question.number, file, self.link)
            task = asyncio.create_task(follower.run())
            self._following[question.number] = (follower, task)
            task.add_done_callback(lambda _task: self._unfollow(question.number))
        return given, fd

    def _opener(self, question: AskFile) -> Awaitable[Content]:
        cache, name = self._core.cache, question.name
        if question.kind == "side":
            return cache.file(name)
        if question.kind == "foreign":
            return cache.foreign_nar_head(name) if question.head else cache.foreign_nar(name)
        nar_name = NarName.parse(name)
        return cache.nar_head(nar_name) if question.head else cache.nar(nar_name)

    def _unfollow(self, number: int) -> None:
        self._wanted.discard(number)
        del self._following[number]

    def _hear_of_nar(self, note: Used | PathsUsed | Damaged) -> None:
        cache = self._core.cache
        match note:
            case Used(name):
                cache.used(NarName.parse(name))
            case PathsUsed(hash_parts):
                cache.used_paths([parse_hash_part(each) for each in hash_parts])
            case Damaged(name, reason):
                cache.damaged(NarName.parse(name), reason)

    def _hear(self, note: Note, _fd: int) -> None:
        match note:
            case Happened():
                self._core.observer(note.event())
            case Used() | PathsUsed() | Damaged():
                self._hear_of_nar(note)
            case Connected() | Disconnected() | AskedPath() | AskedNar():
                self._hear_of_client(note)
            case Passed(number):
                if number in self._following:
                    self._following[number][0].passed()
            case Release(number):
                self._wanted.discard(number)
                if number in self._following:
                    self._following[number][1].cancel()
            case Listening():
                self._on_listening()
            case _:
                raise TypeError(f"the core is not told {type(note).__name__}")

    def _hear_of_client(self, note: Connected | Disconnected | AskedPath | AskedNar) -> None:
        prefetch = self._core.prefetch
        match note:
            case Connected(client):
                self._clients[client] += 1
                prefetch.connected(client)
            case Disconnected(client):
                self._clients[client] -= 1
                prefetch.disconnected(client)
            case AskedPath(client, hash_part):
                prefetch.asked_path(client, parse_hash_part(hash_part))
            case AskedNar(client):
                prefetch.asked_nar(client)
