"""Tasks of the daemon: work that goes on whoever asked for it, and is done once for all who ask.

A client that leaves must not take away what others wait for, so nothing here belongs to a request.
"""

from __future__ import annotations

import asyncio
import traceback
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from proxy.errors import ProxyError
from proxy.events import Fault, Observer

T = TypeVar("T")


class Tasks:
    """Work under way. Made inside of a running event loop; ended with `close`.

    Args:
        observer: Told of faults in work whose owner may have left.
    """

    def __init__(self, observer: Observer) -> None:
        self._observer = observer
        self._running: set[asyncio.Task[Any]] = set()
        self._asked: dict[str, asyncio.Task[Any]] = {}

    def __contains__(self, key: str) -> bool:
        return key in self._asked

    @property
    def running(self) -> set[asyncio.Task[Any]]:
        """Everything that is under way."""
        return set(self._running)

    async def close(self) -> None:
        """End everything."""
        for task in self._running:
            task.cancel()
        await asyncio.gather(*self._running, return_exceptions=True)

    async def once(self, key: str, make: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Do something once for all who ask for it meanwhile, and return what came of it."""
        return await asyncio.shield(self._asked.get(key) or self._start_once(key, make))

    async def over(self, key: str) -> None:
        """Wait for what somebody has asked for, if that is still under way."""
        if key in self._asked:
            await asyncio.shield(self._asked[key])

    def ensure(self, key: str, make: Callable[[], Coroutine[Any, Any, object]]) -> None:
        """Do something, unless that is under way; nobody waits for it."""
        if key not in self._asked:
            _ = self._start_once(key, make)

    def start(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Begin some work."""
        task = asyncio.create_task(work)
        self._running.add(task)
        task.add_done_callback(self._ended)
        return task

    def _start_once(self, key: str, make: Callable[[], Coroutine[Any, Any, T]]) -> asyncio.Task[T]:
        task = self._asked[key] = self.start(make())
        task.add_done_callback(lambda _task: self._asked.pop(key))
        return task

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._running.discard(task)
        error = None if task.cancelled() else task.exception()
        if error is not None and not isinstance(error, ProxyError):
            trace = "".join(traceback.format_exception(error))
            self._observer(Fault("a task of the daemon", trace))  # who asked may have left
