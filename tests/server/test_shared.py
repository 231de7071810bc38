"""Answers in files of memory: the same as others, never changed on their way, bounded, and closed in time."""

from __future__ import annotations

import contextlib
import email.utils
import errno
import os
import random
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from proxy.server import fastlane, shared
from proxy.server.connection import REGULAR
from proxy.server.connection import Server as Connections
from proxy.server.fastlane import SMALL_NAR
from proxy.server.shared import FILES, LEAST, MOST, OFTEN, SharedAnswer, SharedAnswers
from proxy.store import files as store_files
from tests.closures import StoreEntry
from tests.conftest import StartSimulator
from tests.inside import InsideProxy
from tests.server.hot import hot_proxy
from tests.server.lane import the_long_way
from tests.server.piecewise import (
    Piecewise,
    answers,
    connections,
    dates,
    plain,
    through_the_lane,
    turns,
)

pytestmark = pytest.mark.timeout(60)

ENTRIES = [
    StoreEntry.make(f"shared-{n}", random.Random(n).randbytes(30_000), compression="none")
    for n in range(6)
]
TARGETS = [f"/nar/{entry.hash_part}-{entry.nar_hash}.nar" for entry in ENTRIES]
BODIES = [bytes(entry.file) for entry in ENTRIES]


@pytest.fixture
async def proxy(sim: StartSimulator, tmp_path: Path) -> AsyncIterator[InsideProxy]:
    """Return a proxy that has the NARs in its store."""
    async with hot_proxy(tmp_path, await sim(*ENTRIES)) as running:
        for entry in ENTRIES:
            url = await running.nar_url(entry.hash_part)
            for _ in range(2):
                await running.pull(url)
                await running.idle()
        running.server.lane.forget_nars()  # and the files that they have got for that
        yield running


@pytest.fixture
async def server(proxy: InsideProxy) -> AsyncIterator[Connections]:
    """Return connections on which plain requests take the fast lane."""
    made = connections(proxy.server)
    async with Piecewise(made) as teacher:
        await teacher.ask(plain("/healthz"))
    yield made
    await made.shutdown(1)


class Calendar:
    """What time it is for the fast lane: one and the same second, until a test says otherwise."""

    def __init__(self) -> None:
        self.now = 1_800_000_000.0

    @property
    def date(self) -> bytes:
        """The time as it stands in headers."""
        return email.utils.formatdate(self.now, usegmt=True).encode()


@pytest.fixture(autouse=True)
def calendar(monkeypatch: pytest.MonkeyPatch) -> Calendar:
    """Return the calendar of the fast lane."""
    made = Calendar()
    monkeypatch.setattr(fastlane, "time", SimpleNamespace(time=lambda: made.now))
    return made


@pytest.fixture(autouse=True)
def in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have a NAR taken into memory when it is asked for the first time."""
    monkeypatch.setattr(store_files, "BEGINNING", SMALL_NAR)


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the first request of a second for an answer lead to a file."""
    monkeypatch.setattr(fastlane, "OFTEN", 1)


def files() -> int:
    """Count the files of answers that this process has open."""
    found = 0
    for fd in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):  # the descriptor of this very folder
            found += str(fd.readlink()).startswith("/memfd:answer")
    return found


# --- the same answers -------------------------------------------------------------------------


@pytest.mark.parametrize("tcp", [True, False])
async def test_the_same_bytes(proxy: InsideProxy, server: Connections, *, tcp: bool) -> None:
    """An answer gets a file when many ask for it; it stays the same for all of them, and all are counted."""
    right = await the_long_way(proxy, TARGETS[0])
    async with Piecewise(server, tcp=tcp) as client:
        for number in range(1, 3 * OFTEN):
            before = through_the_lane(proxy)
            assert answers(await client.ask(plain(TARGETS[0]))) == [right]
            assert through_the_lane(proxy) == before + 1
            assert files() == (number >= OFTEN)


@pytest.mark.usefixtures("at_once")
async def test_on_a_hot_connection(proxy: InsideProxy, server: Connections) -> None:
    """A connection that is read past its transport gets the same."""
    right = await the_long_way(proxy, TARGETS[0])
    async with Piecewise(server, tcp=True) as client:
        for _ in range(2 * REGULAR):
            client.send(plain(TARGETS[0]))
            await client.settled()
            assert answers(client.received()) == [right]
        assert len(server.hot) == 1


@pytest.mark.usefixtures("at_once")
async def test_the_date(server: Connections, calendar: Calendar) -> None:
    """The date is that of the answer, also when the clock is put back and forth."""
    async with Piecewise(server) as client:
        for step in (0.0, 0.5, 0.4, 0.2, 1.0, -1.0, 1.0, -3_600.0, 86_400.0):
            calendar.now += step
            for _ in range(2):
                assert dates(await client.ask(plain(TARGETS[0]))) == [calendar.date]


# --- on their way -----------------------------------------------------------------------------


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize("tcp", [True, False])
async def test_what_is_on_its_way(
    proxy: InsideProxy, server: Connections, calendar: Calendar, *, tcp: bool
) -> None:
    """What a client has not read yet is not changed by the headers of the next seconds."""
    before = through_the_lane(proxy)
    async with Piecewise(server, tcp=tcp) as late, Piecewise(server, tcp=tcp) as prompt:
        given = []
        for _ in range(3):
            late.feed(plain(TARGETS[0]))
            given.append(calendar.date)
            calendar.now += 1
            assert dates(await prompt.ask(plain(TARGETS[0]))) == [calendar.date]
        assert through_the_lane(proxy) == before + 6
        await late.settled()
        received = late.received()
    assert dates(received) == given
    assert [answer.body for answer in answers(received)] == [BODIES[0]] * 3


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize("tcp", [True, False])
async def test_a_nar_that_is_forgotten(
    proxy: InsideProxy, server: Connections, *, tcp: bool
) -> None:
    """What a client has not read yet arrives, also when the NAR was removed from memory and store."""
    async with Piecewise(server, tcp=tcp) as client:
        client.feed(plain(TARGETS[0]))
        assert files() == 1
        (proxy.folder / TARGETS[0][1:]).unlink()
        proxy.server.lane.forget_nars()
        assert files() == 0
        await client.settled()
        assert [answer.body for answer in answers(client.received())] == [BODIES[0]]


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize("taken", [0, 1, 100, 250, 4_096, 29_999, None])
async def test_a_socket_that_takes_a_part(
    proxy: InsideProxy, server: Connections, monkeypatch: pytest.MonkeyPatch, taken: int | None
) -> None:
    """Wherever a socket stops taking an answer, in the headers or behind, the rest follows in order."""
    right = await the_long_way(proxy, TARGETS[0])
    real = os.sendfile
    asked = 0

    def sendfile(out: int, file: int, offset: int, count: int) -> int:
        nonlocal asked
        asked += 1
        if not taken:
            error = errno.EAGAIN if taken == 0 else errno.EBADF
            raise OSError(error, os.strerror(error))
        return real(out, file, offset, min(count, taken))

    monkeypatch.setattr(os, "sendfile", sendfile)
    async with Piecewise(server) as client:
        for _ in range(3):
            assert answers(await client.ask(plain(TARGETS[0]))) == [right]
    assert asked == 3


@pytest.mark.usefixtures("at_once")
async def test_a_client_that_does_not_read(
    proxy: InsideProxy, server: Connections, calendar: Calendar
) -> None:
    """What a client does not read stops the fast lane, and is sent in order when it reads again."""
    async with Piecewise(server, send_buffer=4_096) as client:
        before = through_the_lane(proxy)
        asked = 0
        while not client.protocol._paused:
            client.feed(plain(TARGETS[asked % 6]))
            asked += 1
            calendar.now += 1
            assert asked < 50
        assert client.transport.get_write_buffer_size() < 2 * MOST
        for _ in range(6):
            client.feed(plain(TARGETS[asked % 6]))
            asked += 1
            await turns(2)
        assert through_the_lane(proxy) == before + asked - 6
        found = answers(await client.ask())
    assert [answer.body for answer in found] == [BODIES[number % 6] for number in range(asked)]


# --- bounds -----------------------------------------------------------------------------------


@pytest.mark.usefixtures("at_once")
async def test_so_many_files(
    server: Connections, monkeypatch: pytest.MonkeyPatch, calendar: Calendar
) -> None:
    """There are so many files and no more; all are closed when their second is over, and at the end."""
    monkeypatch.setattr(shared, "FILES", 4)
    async with Piecewise(server) as client:
        for _ in range(3):
            for number, target in enumerate(TARGETS, 1):
                assert answers(await client.ask(plain(target)))[0].body == BODIES[number - 1]
                assert files() == min(number, 4)
            calendar.now += 1
            await client.ask(plain("/healthz"))
            assert files() == 0
        await client.ask(plain(TARGETS[0]))
        assert files() == 1


async def test_none_is_left(sim: StartSimulator, tmp_path: Path) -> None:
    """A proxy that has stopped has no file open."""
    async with hot_proxy(tmp_path, await sim(*ENTRIES)) as proxy:
        proxy.server.lane.shared.share(bytearray(LEAST))
        assert files() == 1
    assert files() == 0


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize("error", [errno.EMFILE, errno.ENOMEM, errno.ENOSYS])
async def test_without_files(
    proxy: InsideProxy, server: Connections, monkeypatch: pytest.MonkeyPatch, error: int
) -> None:
    """Where there can be no more files, answers are the same without."""

    def refuse(_name: str) -> int:
        raise OSError(error, os.strerror(error))

    right = await the_long_way(proxy, TARGETS[0])
    monkeypatch.setattr(os, "memfd_create", refuse)
    async with Piecewise(server) as client:
        for _ in range(3):
            before = through_the_lane(proxy)
            assert answers(await client.ask(plain(TARGETS[0]))) == [right]
            assert through_the_lane(proxy) == before + 1


@pytest.fixture
def answers_of_a_second() -> Iterator[SharedAnswers]:
    """Return an empty set of shared answers."""
    made = SharedAnswers()
    yield made
    made.close()


@pytest.mark.parametrize(
    ("size", "is_shared"), [(LEAST - 1, False), (LEAST, True), (MOST, True), (MOST + 1, False)]
)
def test_how_large(answers_of_a_second: SharedAnswers, size: int, *, is_shared: bool) -> None:
    """Only answers for which it is a gain get files."""
    answer = bytearray(size)
    made = answers_of_a_second.share(answer)
    assert isinstance(made, SharedAnswer) == is_shared
    assert files() == is_shared
    assert is_shared or made is answer


@pytest.mark.parametrize("written", [0, 1, LEAST - 1, None])
def test_a_file_that_is_not_whole(
    answers_of_a_second: SharedAnswers, monkeypatch: pytest.MonkeyPatch, written: int | None
) -> None:
    """Where memory does not take all of an answer, there is no file."""

    def write(_fd: int, _data: bytearray) -> int:
        if written is None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return written

    answer = bytearray(LEAST)
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", write)
        assert answers_of_a_second.share(answer) is answer
    assert files() == 0


def test_nothing_is_sent_from_a_closed_one() -> None:
    """The descriptor of a file that was closed is forgotten, since it may be another's."""
    answer = SharedAnswers().share(bytearray(LEAST))
    assert isinstance(answer, SharedAnswer)
    assert answer.file >= 0
    answer.close()
    answer.close()
    assert (answer.file, files()) == (-1, 0)


def test_bounds() -> None:
    """Files of memory are few, and take little."""
    assert FILES <= 256
    assert FILES * MOST <= 2**24
