"""The socket that commands come by: who may, how much, and what a client that misbehaves can do."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import stat
import subprocess
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, Protocol

import pytest

from proxy.control import client, server
from proxy.control.server import Command, Tell, taking_commands
from proxy.errors import CommandError, ListenError, NotRunningError, StoreError
from proxy.events import Event, Fault
from tests.conftest import let_everybody_in

PATIENCE = 20.0


class Listen(Protocol):
    """Take commands until the test ends."""

    async def __call__(self, path: Path, **commands: Command) -> list[Event]:
        """Return what is observed."""
        ...


@pytest.fixture
async def listen() -> AsyncIterator[Listen]:
    """Return a function that takes commands until the test ends."""
    async with AsyncExitStack() as stack:

        async def start(path: Path, **commands: Command) -> list[Event]:
            events: list[Event] = []
            await stack.enter_async_context(taking_commands(path, commands, events.append))
            return events

        yield start


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Return where the socket is to be."""
    return tmp_path / "control.sock"


def open_to_all(path: Path) -> None:
    """Let every user of this machine connect, as far as files have a say."""
    let_everybody_in(path.parent)
    path.chmod(0o666)


def names(folder: Path) -> list[str]:
    """Return what is in a folder."""
    return [each.name for each in folder.iterdir()]


AS_NOBODY = """
import os, socket, sys
os.setuid(65534)
connection = socket.socket(socket.AF_UNIX)
connection.connect(sys.argv[1])
print(connection.makefile().readline())
"""


def connect_as_nobody(path: Path) -> Any:
    """Return the first thing that a user who owns nothing is told."""
    asked = subprocess.run(
        [sys.executable, "-c", AS_NOBODY, path], capture_output=True, check=True, timeout=PATIENCE
    )
    return json.loads(asked.stdout)


async def echo(arguments: Mapping[str, Any], tell: Tell) -> Mapping[str, Any]:
    """Tell of each argument, and return them all."""
    for name in arguments:
        await tell({"seen": name})
    return arguments


async def ask(path: Path, command: str, **arguments: Any) -> tuple[Mapping[str, Any], list[Any]]:
    """Return the result, and what was told before."""
    told: list[Any] = []
    async with asyncio.timeout(PATIENCE):
        result = await asyncio.to_thread(client.ask, path, command, arguments, told.append)
    return result, told


async def converse(path: Path, sent: bytes) -> list[Any]:
    """Send bytes, and return everything that is answered until the other end hangs up."""
    async with asyncio.timeout(PATIENCE):
        reader, writer = await asyncio.open_unix_connection(path)
        writer.write(sent)
        answer = await reader.read()
        writer.close()
    return [json.loads(line) for line in answer.splitlines()]


async def test_a_command_is_answered(path: Path, listen: Listen) -> None:
    """Arguments go in, progress and the result come out, in order."""
    await listen(path, echo=echo)

    assert await ask(path, "echo", a=1, b=["ü"]) == (
        {"a": 1, "b": ["ü"]},
        [{"seen": "a"}, {"seen": "b"}],
    )


async def test_what_cannot_be_done_is_said(path: Path, listen: Listen) -> None:
    """An error of ours reaches the client as its text."""

    async def fail(_arguments: Mapping[str, Any], _tell: Tell) -> Mapping[str, Any]:
        raise StoreError("the disk is full")

    await listen(path, fail=fail)

    with pytest.raises(CommandError, match=r"^the disk is full$"):
        await ask(path, "fail")


async def test_a_fault_is_reported_and_ends_nothing(path: Path, listen: Listen) -> None:
    """A fault of our own is told to the client in a line, and to the log with its trace."""

    async def break_down(_arguments: Mapping[str, Any], _tell: Tell) -> Mapping[str, Any]:
        raise ZeroDivisionError

    events = await listen(path, break_down=break_down, echo=echo)

    with pytest.raises(CommandError, match="fault of the proxy"):
        await ask(path, "break_down")
    (fault,) = events
    assert isinstance(fault, Fault)
    assert "ZeroDivisionError" in fault.trace
    assert (await ask(path, "echo", x=1))[0] == {"x": 1}


@pytest.mark.parametrize(
    "sent",
    [b"\n", b"{}\n", b"[" * 100_000 + b"\n", b'{"command": "echo"}\n', b"\xff\xfe\n", b"1e999\n"],
    ids=["empty", "nothing", "deep", "no-arguments", "no-utf8", "number"],
)
async def test_nonsense_is_refused(sent: bytes, path: Path, listen: Listen) -> None:
    """What is no command gets one line that says what one is."""
    events = await listen(path, echo=echo)

    (answer,) = await converse(path, sent)
    assert "a command is" in answer["error"]
    assert events == []


async def test_a_command_of_another_version_is_refused(path: Path, listen: Listen) -> None:
    """A command that the daemon does not know is named, however long its name is."""
    await listen(path, echo=echo)

    with pytest.raises(CommandError, match=r"no command 'x{40}'"):
        await ask(path, "x" * 1000)


async def test_a_request_is_bounded(
    path: Path, listen: Listen, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A request beyond all measure is refused, and not kept in memory."""
    monkeypatch.setattr(server, "REQUEST_BYTES", 10_000)
    await listen(path, echo=echo)

    reader, writer = await asyncio.open_unix_connection(path)
    writer.write(b"x" * 100_000)
    async with asyncio.timeout(PATIENCE):
        assert "at most" in json.loads(await reader.readline())["error"]
    writer.close()


async def test_who_says_nothing_is_dropped(
    path: Path, listen: Listen, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client that connects and asks for nothing is hung up on."""
    monkeypatch.setattr(server, "REQUEST_TIMEOUT", 0.01)
    await listen(path, echo=echo)

    assert await converse(path, b"{") == []


async def test_there_are_only_so_many_at_once(
    path: Path, listen: Listen, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One client too many is told so at once, and the others go on."""
    monkeypatch.setattr(server, "CLIENTS", 2)
    gate, begun = asyncio.Event(), asyncio.Semaphore(0)

    async def wait(_arguments: Mapping[str, Any], _tell: Tell) -> Mapping[str, Any]:
        begun.release()
        await gate.wait()
        return {}

    await listen(path, wait=wait)
    first = [asyncio.create_task(ask(path, "wait")) for _ in range(2)]
    for _ in first:
        await begun.acquire()

    with pytest.raises(CommandError, match="too many"):
        await ask(path, "wait")
    gate.set()
    assert [result for result, _ in await asyncio.gather(*first)] == [{}, {}]


async def test_who_leaves_takes_its_command_along(path: Path, listen: Listen) -> None:
    """A command whose client is gone is cancelled."""
    begun, cancelled = asyncio.Event(), asyncio.Event()

    async def wait(_arguments: Mapping[str, Any], _tell: Tell) -> Mapping[str, Any]:
        begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()
        return {}

    events = await listen(path, wait=wait)
    _, writer = await asyncio.open_unix_connection(path)
    writer.write(b'{"command": "wait", "arguments": {}}\n')
    async with asyncio.timeout(PATIENCE):
        await begun.wait()
        writer.close()
        await cancelled.wait()
    assert events == []


async def test_who_does_not_read_is_dropped(
    path: Path, listen: Listen, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client that does not take its answers loses the connection, and holds up nobody else."""
    monkeypatch.setattr(server, "ANSWER_TIMEOUT", 0.05)
    stopped = asyncio.Event()

    async def talk(_arguments: Mapping[str, Any], tell: Tell) -> Mapping[str, Any]:
        try:
            while True:
                await tell({"text": "x" * 100_000})
        finally:
            stopped.set()

    events = await listen(path, talk=talk, echo=echo)
    with socket.socket(socket.AF_UNIX) as stuck:
        stuck.connect(str(path))
        stuck.sendall(b'{"command": "talk", "arguments": {}}\n')
        assert (await ask(path, "echo", x=1))[0] == {"x": 1}
        async with asyncio.timeout(PATIENCE):
            await stopped.wait()
    assert events == []


async def test_silence_is_no_reason_to_give_up(
    path: Path, listen: Listen, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A command that takes long without saying anything is waited for, since the daemon lives."""
    monkeypatch.setattr(server, "HEARTBEAT", 0.05)
    monkeypatch.setattr(client, "PATIENCE", 1.0)

    async def take_long(_arguments: Mapping[str, Any], _tell: Tell) -> Mapping[str, Any]:
        await asyncio.sleep(1.5)
        return {"done": True}

    await listen(path, take_long=take_long)
    assert await ask(path, "take_long") == ({"done": True}, [])


async def test_a_daemon_that_says_nothing_is_given_up(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client does not wait for ever for a daemon that hangs."""
    monkeypatch.setattr(client, "PATIENCE", 0.1)
    with socket.socket(socket.AF_UNIX) as hanging:
        hanging.bind(str(path))
        hanging.listen()
        with pytest.raises(CommandError, match="has said nothing"):
            await ask(path, "echo")


@pytest.mark.parametrize("depth", [1, 30], ids=["short", "long"])
async def test_only_its_user_has_the_socket(depth: int, tmp_path: Path, listen: Listen) -> None:
    """The socket is its user's alone, whatever the umask; a path of 1,500 bytes is no obstacle."""
    path = tmp_path.joinpath(*["f" * 50] * depth, "control.sock")
    path.parent.mkdir(parents=True)
    before = os.umask(0)
    try:
        await listen(path, echo=echo)
    finally:
        os.umask(before)

    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert (await ask(path, "echo", x=1))[0] == {"x": 1}


async def test_another_user_is_refused(path: Path, listen: Listen) -> None:
    """Somebody who is neither root nor the daemon's user is refused, even with a socket open to all."""
    if os.geteuid() != 0:
        pytest.skip("only root can be another user")
    await listen(path, echo=echo)
    open_to_all(path)
    answer = await asyncio.to_thread(connect_as_nobody, path)
    assert "only root and the user of the daemon" in answer["error"]


async def test_what_a_dead_daemon_left_is_replaced(path: Path, listen: Listen) -> None:
    """A socket file that nobody listens on any more is in nobody's way."""
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    with pytest.raises(NotRunningError):
        await ask(path, "echo")

    await listen(path, echo=echo)
    assert (await ask(path, "echo", x=1))[0] == {"x": 1}


async def test_nobody_there(path: Path) -> None:
    """Where nobody takes commands, the client says so; at the end there is no socket left."""
    async with taking_commands(path, {"echo": echo}, lambda _event: None):
        assert names(path.parent) == [path.name]
    assert names(path.parent) == []
    for absent in (path, path / "nothing"):
        with pytest.raises(NotRunningError, match="no daemon runs on"):
            await ask(absent, "echo")


async def test_no_socket_can_be_made(tmp_path: Path) -> None:
    """A folder that takes no socket is an error of ours."""
    with pytest.raises(ListenError, match="cannot take commands"):
        async with taking_commands(tmp_path / "no" / "x.sock", {}, lambda _event: None):
            pass


async def test_a_socket_that_was_removed_comes_back(
    path: Path, listen: Listen, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A socket that somebody removes, with its folder, is bound again; a command under way goes on."""
    monkeypatch.setattr(server, "LOOK_EVERY", 0.01)
    path = path.parent / "state" / path.name
    path.parent.mkdir()
    begun, going_on = asyncio.Event(), asyncio.Event()

    async def wait(_arguments: Mapping[str, Any], _tell: Tell) -> Mapping[str, Any]:
        begun.set()
        await going_on.wait()
        return {"done": True}

    await listen(path, echo=echo, wait=wait)
    waiting = asyncio.create_task(ask(path, "wait"))
    await begun.wait()
    path.unlink()
    path.parent.rmdir()
    await asyncio.sleep(0.05)  # it cannot be bound meanwhile
    path.parent.mkdir()
    async with asyncio.timeout(PATIENCE):
        while not path.exists():  # noqa: ASYNC110  # nothing tells
            await asyncio.sleep(0.01)
    assert await ask(path, "echo", a=1) == ({"a": 1}, [{"seen": "a"}])
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    going_on.set()
    assert (await waiting)[0] == {"done": True}
