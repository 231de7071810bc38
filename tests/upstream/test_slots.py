"""Slots for requests: how many, and who goes first."""

from __future__ import annotations

import asyncio
import random

from hypothesis import given
from hypothesis import strategies as st

from proxy.upstream.slots import Slots, urgent_when


async def settle() -> None:
    """Let all tasks go on as far as they can."""
    for _ in range(5):
        await asyncio.sleep(0)


class Queue:
    """Tasks that take a slot and keep it until told otherwise."""

    def __init__(self, count: int) -> None:
        self.slots = Slots(count)
        self.served: list[str] = []
        self.wanted: set[str] = set()
        self._tasks: dict[str, asyncio.Task[None]] = {}

    async def add(self, name: str, *, urgent: bool = True) -> None:
        """Let one more wait for a slot; one that is not urgent becomes so by `wanted`."""
        with urgent_when(lambda: urgent or name in self.wanted):
            self._tasks[name] = asyncio.create_task(self._take(name))
        await settle()

    async def cancel(self, name: str) -> None:
        """End the wait of one."""
        self._tasks[name].cancel()
        await settle()

    async def give_back(self) -> None:
        """End one request."""
        self.slots.give_back()
        await settle()

    async def _take(self, name: str) -> None:
        await self.slots.take()
        self.served.append(name)


async def test_clients_go_first() -> None:
    """What a client waits for goes before what nobody waits for, however long that has been there."""
    queue = Queue(1)
    await queue.add("first")
    await queue.add("ahead 1", urgent=False)
    await queue.add("ahead 2", urgent=False)
    await queue.add("client 1")
    await queue.add("client 2")
    for _ in range(4):
        await queue.give_back()
    assert queue.served == ["first", "client 1", "client 2", "ahead 1", "ahead 2"]


async def test_what_a_client_comes_for_goes_first() -> None:
    """What was queued for nobody has its turn at once when its client comes."""
    queue = Queue(1)
    await queue.add("first")
    for number in range(3):
        await queue.add(f"ahead {number}", urgent=False)
    queue.wanted.add("ahead 2")
    await queue.add("client")
    for _ in range(4):
        await queue.give_back()
    assert queue.served == ["first", "ahead 2", "client", "ahead 0", "ahead 1"]


async def test_who_left_takes_no_slot() -> None:
    """A wait that is given up, also in the moment in which it would end, loses no slot."""
    queue = Queue(1)
    await queue.add("first")
    for name in ("gone", "gone too", "patient"):
        await queue.add(name)
    await queue.cancel("gone")
    queue.slots.give_back()  # granted, and cancelled before it hears of it
    await queue.cancel("gone too")
    assert queue.served == ["first", "patient"]
    await queue.give_back()
    assert queue.slots.take_free()
    assert not queue.slots.take_free()


@given(count=st.integers(1, 4), steps=st.lists(st.integers(0, 3), max_size=60), seed=st.integers())
def test_slots_are_neither_lost_nor_made(count: int, steps: list[int], seed: int) -> None:
    """Whoever comes, leaves and gives back: no more than there are, and none idle while one waits."""

    async def play() -> None:
        queue, chance, taken = Queue(count), random.Random(seed), 0
        waiting: set[str] = set()
        for number, step in enumerate(steps):
            if step <= 1:
                await queue.add(str(number), urgent=step == 1)
                waiting.add(str(number))
            elif step == 2 and waiting:
                name = chance.choice(sorted(waiting))
                waiting.remove(name)
                await queue.cancel(name)
            elif taken:
                taken -= 1
                await queue.give_back()
            taken += len(waiting & set(queue.served))
            waiting -= set(queue.served)
            assert taken == count or not waiting
            assert taken <= count
        for name in waiting:
            await queue.cancel(name)

    asyncio.run(play())
