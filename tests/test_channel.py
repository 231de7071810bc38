"""What one process puts into an outbox the other one gets: in order, and few frames."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator
from contextlib import contextmanager

from hypothesis import given
from hypothesis import strategies as st
from msgspec import msgpack

from proxy.channel import NONE, Channel, Outbox
from tests.wire import until


@contextmanager
def connected() -> Iterator[tuple[Outbox[object], Channel, list[list[object]]]]:
    """Yield an outbox, its channel, and the batches that arrive at the other end."""
    batches: list[list[object]] = []
    ours, theirs = socket.socketpair()

    def nothing() -> None:
        pass

    def take(frame: bytes, fd: int) -> None:
        assert fd == NONE
        batches.append(msgpack.decode(frame))

    sender = Channel(ours, on_frame=take, on_drained=nothing, on_end=nothing)
    receiver = Channel(theirs, on_frame=take, on_drained=nothing, on_end=nothing)
    try:
        yield Outbox(sender, msgpack.encode), sender, batches
    finally:
        sender.close()
        receiver.close()


@given(st.lists(st.lists(st.binary(max_size=10_000), max_size=20), max_size=20))
def test_a_turn_is_a_frame(turns: list[list[bytes]]) -> None:
    """All that is put in during one turn of the event loop arrives together, and in order."""

    async def play() -> list[list[object]]:
        with connected() as (outbox, _, batches):
            for items in turns:
                for item in items:
                    outbox.put(item)
                await asyncio.sleep(0)
            wanted = sum(map(bool, turns))
            await until(lambda: len(batches) == wanted)
            return batches

    assert asyncio.run(play()) == [items for items in turns if items]


async def test_what_the_other_end_does_not_take_waits() -> None:
    """More than the kernel holds arrives whole once there is somebody to read, and in order."""
    with connected() as (outbox, sender, batches):
        items = [bytes([number]) * 2**20 for number in range(8)]
        for item in items:
            outbox.put(item)
        await asyncio.sleep(0)
        outbox.put("last")
        assert not sender.is_drained
        await until(lambda: len(batches) == 2)
        assert batches == [items, ["last"]]
        assert sender.is_drained


async def test_putting_into_a_closed_one() -> None:
    """What is put in when the other end has gone is lost, and that is no error."""
    with connected() as (outbox, sender, batches):
        outbox.put("before")
        await until(lambda: bool(batches))
        outbox.put("lost")
        sender.close()
        outbox.put("lost, too")
        await asyncio.sleep(0)
        assert batches == [["before"]]
