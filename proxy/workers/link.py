"""Questions, answers and notes between the core and one worker, both ways."""

from __future__ import annotations

import asyncio
import itertools
import socket
import traceback
from collections.abc import Awaitable, Callable
from typing import Final

from proxy.channel import NONE, Channel, close
from proxy.errors import ProxyError
from proxy.wire import Failed
from proxy.workers.messages import (
    Answer,
    Call,
    Note,
    Notes,
    Question,
    Reply,
    decode,
    encode,
)

MOST_NOTES: Final = 100_000
"""Notes that wait for a process that does not take any; later ones are dropped."""


class LinkClosedError(Exception):
    """The other process has gone."""


class Link:
    """One end. Made inside of a running event loop.

    Notes are sent together, at the end of each turn of the event loop; a question or an answer never
    overtakes the notes that were told before it.

    Args:
        sock: A connected Unix socket, owned from now on.
        answer: Answers a question; with a descriptor to send along, or `NONE`.
        hear: Takes a note, and the descriptor that came along, which is then its own, or `NONE`.
    """

    def __init__(
        self,
        sock: socket.socket,
        *,
        answer: Callable[[Question], Awaitable[tuple[Answer, int]]],
        hear: Callable[[Note, int], None],
    ) -> None:
        self._answer = answer
        self._hear = hear
        self._loop = asyncio.get_running_loop()
        self._serial = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[tuple[Answer, int]]] = {}
        self._answering: set[asyncio.Task[None]] = set()
        self._notes: list[Note] = []
        self._drained = asyncio.Event()
        self.ended = asyncio.Event()
        """Set when the other process has gone."""
        self._channel = Channel(
            sock, on_frame=self._on_frame, on_drained=self._on_drained, on_end=self._on_end
        )

    async def ask(self, question: Question) -> tuple[Answer, int]:
        """Ask, and return the answer and the descriptor that came along, which is then the caller's.

        Raises:
            ProxyError: What was raised over there.
            LinkClosedError: The other process has gone.
        """
        if self.ended.is_set():
            raise LinkClosedError
        serial = next(self._serial)
        answered = self._waiting[serial] = self._loop.create_future()
        self._send(Call(serial, question))
        try:
            answer, fd = await answered
        except asyncio.CancelledError:
            if answered.done() and not answered.cancelled() and answered.exception() is None:
                close(answered.result()[1])
            raise
        finally:
            del self._waiting[serial]
        if isinstance(answer, Failed):
            raise answer.error()
        return answer, fd

    def tell(self, note: Note) -> None:
        """Tell something that takes no answer."""
        if not self._notes:
            self._loop.call_soon(self._flush)
        if len(self._notes) < MOST_NOTES:
            self._notes.append(note)

    def hand_over(self, note: Note, fd: int) -> None:
        """Tell something, and send along a descriptor, which is closed here."""
        notes, self._notes = self._notes, []
        self._channel.send(encode(Notes((*notes, note))), fd)

    async def drained(self) -> None:
        """Wait until the kernel has taken everything that was told."""
        self._flush()
        while not self._channel.is_drained:
            self._drained.clear()
            await self._drained.wait()

    async def close(self) -> None:
        """Stop answering, and close the socket."""
        self._channel.close()
        for task in self._answering:
            task.cancel()
        await asyncio.gather(*self._answering, return_exceptions=True)
        self._on_end()

    def _send(self, envelope: Call | Reply, fd: int = NONE) -> None:
        notes, self._notes = self._notes, []
        if notes:
            self._channel.send(encode(Notes(tuple(notes))))
        self._channel.send(encode(envelope), fd)

    def _flush(self) -> None:
        """Send notes, unless those before them are still on their way: then later, and together."""
        if self._notes and self._channel.is_drained:
            notes, self._notes = self._notes, []
            self._channel.send(encode(Notes(tuple(notes))))

    def _on_drained(self) -> None:
        self._flush()
        self._drained.set()

    def _on_frame(self, frame: bytes, fd: int) -> None:
        try:
            envelope = decode(frame)
        except ValueError:
            close(fd)
            self._channel.close()  # there is no talking with it; the other side sees the end, too
            self._on_end()
            return
        match envelope:
            case Notes(notes):
                for note in notes[:-1]:
                    self._hear(note, NONE)
                self._hear(notes[-1], fd)  # what comes along belongs to the last one
            case Call(serial, question):
                task = asyncio.create_task(self._reply(serial, question))
                self._answering.add(task)
                task.add_done_callback(self._answering.discard)
            case Reply(serial, answer):
                answered = self._waiting.get(serial)
                if answered is None or answered.done():
                    close(fd)  # whoever asked does not wait any more
                else:
                    answered.set_result((answer, fd))

    async def _reply(self, serial: int, question: Question) -> None:
        answer: Answer
        fd = NONE
        try:
            answer, fd = await self._answer(question)
        except ProxyError as error:
            answer = Failed.of(error)
        except Exception:  # noqa: BLE001  # whoever asked reports it
            answer = Failed("", traceback.format_exc())
        self._send(Reply(serial, answer), fd)

    def _on_end(self) -> None:
        self.ended.set()
        self._drained.set()
        for answered in self._waiting.values():
            if not answered.done():
                answered.set_exception(LinkClosedError())
