"""So many requests at the same time, and who goes first when there are more.

Whether a request is urgent is a property of the task that makes it, and of the tasks that this one begins:
a context variable, because everything between whoever knows and the connection has no use for it.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable, Iterator
from contextvars import ContextVar

IsUrgent = Callable[[], bool]
"""Tells whether a client waits for a request; a speculative one becomes urgent when its client comes."""


_URGENT: ContextVar[IsUrgent] = ContextVar("urgent", default=lambda: True)


@contextlib.contextmanager
def urgent_when(is_urgent: IsUrgent) -> Iterator[None]:
    """Let the tasks that are begun meanwhile go behind others, except while ``is_urgent``."""
    token = _URGENT.set(is_urgent)
    try:
        yield
    finally:
        _URGENT.reset(token)


class Slots:
    """Slots for requests: urgent requests go first, and each kind in the order in which it came.

    Args:
        count: How many there are.
    """

    def __init__(self, count: int) -> None:
        self._free = count
        self._waiting: deque[tuple[asyncio.Future[None], IsUrgent]] = deque()

    def take_free(self) -> bool:
        """Take a slot if one is free."""
        if self._free == 0:
            return False
        self._free -= 1
        return True

    async def take(self) -> None:
        """Take a slot, as soon as there is one."""
        if self.take_free():
            return
        granted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        waiter = (granted, _URGENT.get())
        self._waiting.append(waiter)
        try:
            await granted
        except asyncio.CancelledError:
            if granted.cancelled():
                self._waiting.remove(waiter)
            else:
                self.give_back()  # it was granted in the moment of being cancelled
            raise

    def give_back(self) -> None:
        """Give a slot to whoever is next."""
        chosen = None
        for waiter in self._waiting:
            granted, is_urgent = waiter
            if granted.done():
                continue  # cancelled a moment ago, and about to leave
            if is_urgent():
                chosen = waiter
                break
            chosen = chosen or waiter
        if chosen is None:
            self._free += 1
            return
        self._waiting.remove(chosen)
        chosen[0].set_result(None)
