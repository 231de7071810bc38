"""What the core and a worker say to each other arrives whole, in order, and as what it was."""

from __future__ import annotations

import asyncio
import os
import random
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

import pytest

from proxy import errors
from proxy.channel import NONE, Channel
from proxy.errors import NotFoundError, ProxyError
from proxy.wire import Failed
from proxy.workers.link import Link, LinkClosedError
from proxy.workers.messages import (
    Absent,
    Answer,
    AskFacts,
    AskNarinfo,
    Connected,
    Done,
    Happened,
    Note,
    Question,
    Segment,
)
from tests.test_logs import LOUDNESS
from tests.wire import until

ERRORS: list[ProxyError] = [
    errors.ProxyError("a"),
    errors.ParseError("narinfo", "b", line=3, field="URL"),
    errors.RequestError("c"),
    errors.RangeError(7),
    errors.NotFoundError("d"),
    errors.TrustError("e"),
    errors.SignatureError("f"),
    errors.WrongPathError("g"),
    errors.HashMismatchError("h"),
    errors.SizeMismatchError("i"),
    errors.DecodeError("j"),
    errors.DecodeMemoryError("j"),
    errors.UnverifiableError("k"),
    errors.UpstreamError("up0", "l"),
    errors.UpstreamUnavailableError("up0", "m"),
    errors.UpstreamTimeoutError("up0", "n"),
    errors.UpstreamDeniedError("up0", "o"),
    errors.UpstreamProtocolError("up0", "p"),
    errors.UpstreamLiedError("up0", "q"),
    errors.UpstreamBrokeOffError("up0", "bb"),
    errors.UpstreamBusyError("up0", "v", retry_after=2.5),
    errors.UpstreamSkippedError("up0", "w"),
    errors.OfflineError("x"),
    errors.StoreError("r"),
    errors.DamagedError("y"),
    errors.CommandError("z"),
    errors.NotRunningError("aa"),
    errors.StoreLockedError("s"),
    errors.ListenError("t"),
    errors.ConfigError("u", file="config.toml", line=1, key="server.workers"),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_errors_stay_what_they_are(error: ProxyError) -> None:
    """An error arrives as the same class, with the same message and attributes."""
    arrived = Failed.of(error).error()
    assert type(arrived) is type(error)
    assert str(arrived) == str(error)
    assert vars(arrived) == vars(error)


def test_there_is_no_other_error() -> None:
    """The test above knows every error there is."""

    def tree(kind: type[ProxyError]) -> Iterator[type[ProxyError]]:
        yield kind
        for below in kind.__subclasses__():
            yield from tree(below)

    assert {type(error) for error in ERRORS} == set(tree(ProxyError))


def test_events_stay_what_they_are() -> None:
    """Every event arrives as it was."""
    for event, _ in LOUDNESS:
        assert Happened.of(event).event() == event


class Side:
    """One end of a link, that writes down what it hears, and answers what it is asked."""

    def __init__(self, sock: socket.socket) -> None:
        self.heard: list[Note | Question] = []
        self.descriptors: list[int] = []
        self.answers: dict[str, Answer | ProxyError] = {}
        self.link = Link(sock, answer=self._answer, hear=self._hear)

    def _hear(self, note: Note, fd: int) -> None:
        self.heard.append(note)
        if fd != NONE:
            self.descriptors.append(fd)

    async def _answer(self, question: Question) -> tuple[Answer, int]:
        self.heard.append(question)
        if not isinstance(question, AskNarinfo):
            raise ZeroDivisionError
        answer = self.answers.get(question.hash_part, Done())
        if isinstance(answer, ProxyError):
            raise answer
        return answer, NONE


@asynccontextmanager
async def linked() -> AsyncIterator[tuple[Side, Side]]:
    """Yield both ends of a link."""
    first, second = map(Side, socket.socketpair())
    try:
        yield first, second
    finally:
        await first.link.close()
        await second.link.close()


async def test_nothing_is_overtaken() -> None:
    """Notes and questions are heard in the order in which they were told."""
    async with linked() as (here, there):
        for name in ("a", "b"):
            here.link.tell(Connected(name))
        await here.link.ask(AskNarinfo("c"))
        here.link.tell(Connected("d"))
        await here.link.ask(AskNarinfo("e"))
        assert there.heard == [
            Connected("a"),
            Connected("b"),
            AskNarinfo("c"),
            Connected("d"),
            AskNarinfo("e"),
        ]


async def test_questions_are_answered() -> None:
    """Each question gets its own answer, error, or the trace of a fault."""
    async with linked() as (here, there):
        there.answers = {"absent": Absent("no", 3.5), "failing": NotFoundError("gone")}
        answers = await asyncio.gather(
            *(here.link.ask(AskNarinfo(name)) for name in ("absent", "failing", "x")),
            here.link.ask(AskFacts()),
            return_exceptions=True,
        )
    assert answers[0] == (Absent("no", 3.5), NONE)
    assert isinstance(answers[1], NotFoundError)
    assert answers[2] == (Done(), NONE)
    assert isinstance(answers[3], RuntimeError)
    assert "ZeroDivisionError" in str(answers[3])


async def test_the_end_is_told_to_whoever_waits() -> None:
    """When the other side goes, nobody waits for its answer, and nobody asks it any more."""
    async with linked() as (here, there):
        asking = asyncio.create_task(here.link.ask(AskNarinfo("x")))
        await asyncio.sleep(0)
        there.link._channel.close()
        with pytest.raises(LinkClosedError):
            await asking
        with pytest.raises(LinkClosedError):
            await here.link.ask(AskNarinfo("y"))
        here.link.tell(Connected("nobody"))
        await here.link.drained()


async def test_what_makes_no_sense_ends_it() -> None:
    """With a side that speaks another language there is no link."""
    async with linked() as (here, there):
        here.link._channel.send(b"\x93\xa7Unknown\x01\x02")
        await there.link.ended.wait()
        await here.link.ended.wait()


async def test_descriptors_come_with_their_notes() -> None:
    """Descriptors arrive in order, each with its note, however much is told between them."""
    async with linked() as (here, there):
        files = [os.memfd_create(str(number)) for number in range(50)]
        inodes = [os.fstat(fd).st_ino for fd in files]
        for number, fd in enumerate(files):
            for _ in range(random.Random(number).randrange(3)):
                here.link.tell(Connected("x" * random.Random(number).randrange(100_000)))
            here.link.hand_over(Segment(number, 0), fd)
        await until(lambda: len(there.descriptors) == len(files))
        assert [os.fstat(fd).st_ino for fd in there.descriptors] == inodes
        for fd in there.descriptors:
            os.close(fd)
        for fd in files:
            with pytest.raises(OSError, match="Bad file descriptor"):
                os.fstat(fd)


async def test_frames_of_any_size_arrive() -> None:
    """Frames arrive one by one and whole, also those that are larger than any buffer."""
    source = random.Random(1)
    frames = [source.randbytes(source.choice((0, 1, 100, 300_000, 2_000_000))) for _ in range(30)]
    arrived: list[bytes] = []
    ours, theirs = socket.socketpair()

    def nothing() -> None:
        pass

    def take(frame: bytes, fd: int) -> None:
        assert fd == NONE
        arrived.append(frame)

    sender = Channel(ours, on_frame=take, on_drained=nothing, on_end=nothing)
    receiver = Channel(theirs, on_frame=take, on_drained=nothing, on_end=nothing)
    for frame in frames:
        sender.send(frame)
    await until(lambda: len(arrived) == len(frames))
    assert arrived == frames
    sender.close()
    receiver.close()


async def test_a_full_table_loses_one_descriptor_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """A descriptor for which there is no room is missing with its own note, and with no other."""
    async with linked() as (here, there):
        heard: list[int] = []
        there.link._hear = lambda _note, fd: heard.append(fd)
        first, second = (os.memfd_create(name) for name in "ab")
        inode = os.fstat(second).st_ino
        received = there.link._channel._socket

        class Full:
            """A socket in a process whose table is full for the first message."""

            def __getattr__(self, name: str) -> object:
                return getattr(received, name)

            def recvmsg(self, size: int, _space: int, flags: int) -> object:
                data, ancillary, got, address = received.recvmsg(
                    size, _space if heard else 0, flags
                )
                return data, ancillary, got, address

        monkeypatch.setattr(there.link._channel, "_socket", Full())
        here.link.hand_over(Segment(1, 0), first)
        await until(lambda: len(heard) == 1)
        here.link.hand_over(Segment(2, 0), second)
        await until(lambda: len(heard) == 2)
        assert heard[0] == NONE
        assert os.fstat(heard[1]).st_ino == inode
        os.close(heard[1])
        monkeypatch.undo()
