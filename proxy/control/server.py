"""The daemon's end: takes commands from its own user and from root, and from nobody else.

A client can neither hold anybody up nor cost much: what it may send, how long it may take, and how many
there are is bounded, and one that does not read its answer is dropped.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import struct
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

from proxy.control.address import socket_name
from proxy.errors import CommandError, ListenError, ProxyError
from proxy.events import Fault, Observer

REQUEST_BYTES = 4 * 2**20
"""The longest request: 50,000 store paths to pin at once."""

REQUEST_TIMEOUT = 5.0
"""Seconds that a client may take to say what it wants."""

ANSWER_TIMEOUT = 10.0
"""Seconds without taking a byte after which a client is dropped."""

HEARTBEAT = 5.0
"""Seconds of silence after which a client is told that its command goes on."""

LOOK_EVERY = 2.0
"""Seconds until it is noticed that somebody has removed the socket."""

CLIENTS = 16
"""Commands at the same time."""

_MODE = 0o600
_CREDENTIALS = struct.Struct("3i")  # struct ucred of unix(7): pid, uid, gid

Tell = Callable[[Mapping[str, Any]], Awaitable[None]]
"""Tells the client of progress, and waits until it has taken it."""

Command = Callable[[Mapping[str, Any], Tell], Awaitable[Mapping[str, Any]]]
"""Carries out a command: from its arguments to its result; raises `ProxyError` when it cannot."""


@contextlib.asynccontextmanager
async def taking_commands(
    path: Path, commands: Mapping[str, Command], observer: Observer
) -> AsyncIterator[None]:
    """Take commands on a Unix socket. At the end those under way are cancelled, and the file is gone.

    Args:
        path: The socket. Whatever has this name is replaced: the caller holds the store's lock.
        commands: What can be asked for, by name.
        observer: Told of faults.

    Raises:
        ListenError: There can be no socket.
    """
    clients = _Clients(commands, observer)
    door = _Door(path, clients)
    try:
        await door.open()
    except OSError as error:
        raise ListenError(f"cannot take commands at {path}: {error.strerror or error}") from error
    keeping = asyncio.create_task(door.keep_open())
    try:
        yield
    finally:
        keeping.cancel()
        await asyncio.gather(keeping, return_exceptions=True)
        door.close()
        await clients.close()


class _Door:
    """The socket that clients come by."""

    def __init__(self, path: Path, clients: _Clients) -> None:
        self._path = path
        self._clients = clients
        self._server: asyncio.Server | None = None

    async def open(self) -> None:
        """Bind the socket, and let clients in; those who came by an earlier one stay.

        Raises:
            OSError: There can be no socket.
        """
        listener = _listener(self._path)
        server = await asyncio.start_unix_server(
            self._clients.serve, sock=listener, limit=REQUEST_BYTES, start_serving=True
        )
        if self._server is not None:
            self._server.close()
        self._server = server

    async def keep_open(self) -> None:
        """Bind it again whenever somebody has removed it, as with all that can be derived."""
        while True:
            await asyncio.sleep(LOOK_EVERY)
            if not await asyncio.to_thread(os.path.exists, self._path):
                with contextlib.suppress(OSError):  # its folder may be made later
                    await self.open()

    def close(self) -> None:
        """Let nobody in any more."""
        if self._server is not None:
            self._server.close()
        _remove(self._path)


def _listener(path: Path) -> socket.socket:
    """Bind a socket that is its user's alone from the beginning."""
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        os.fchmod(listener.fileno(), _MODE)  # before it has a name: Linux makes the file with it
        with socket_name(path) as name:
            listener.bind(name)
    except BaseException:
        listener.close()
        raise
    return listener


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink()


class _Clients:
    """Those who are connected."""

    def __init__(self, commands: Mapping[str, Command], observer: Observer) -> None:
        self._commands = commands
        self._observer = observer
        self._tasks: set[asyncio.Task[None]] = set()

    def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Take in a client that has connected."""
        client = _Client(reader, writer)
        if len(self._tasks) >= CLIENTS:
            work = client.refuse("too many commands are under way; try again later")
        elif not _is_permitted(writer):
            work = client.refuse("only root and the user of the daemon may give it commands")
        else:
            work = self._converse(client)
        task = asyncio.create_task(client.within(work))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def close(self) -> None:
        """Cancel all commands."""
        tasks = tuple(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _converse(self, client: _Client) -> None:
        try:
            command, arguments = _parse(await client.request(), self._commands)
            result = await client.while_there(command(arguments, client.tell))
        except ProxyError as error:
            await client.refuse(str(error))
        except (OSError, TimeoutError, asyncio.IncompleteReadError):
            raise  # it has left, or does not read
        except Exception:  # noqa: BLE001  # a fault of ours has to be found, and ends no daemon
            self._observer(Fault("a command", traceback.format_exc()))
            await client.refuse("a fault of the proxy itself, which its log tells more of")
        else:
            await client.send({"result": result})


class _Client:
    """One connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._turn = asyncio.Lock()

    async def within(self, work: Awaitable[None]) -> None:
        """Do what is to be done for the client, and hang up."""
        try:
            await work
        except (OSError, TimeoutError, asyncio.IncompleteReadError):
            self._writer.transport.abort()
        finally:
            self._writer.close()

    async def request(self) -> bytes:
        """Wait for what it wants.

        Raises:
            CommandError: It is too long.
            TimeoutError: It takes too long.
        """
        async with asyncio.timeout(REQUEST_TIMEOUT):
            try:
                return await self._reader.readuntil(b"\n")
            except asyncio.LimitOverrunError:
                raise CommandError(f"a command has at most {REQUEST_BYTES} bytes") from None

    async def while_there(self, work: Awaitable[Mapping[str, Any]]) -> Mapping[str, Any]:
        """Carry out a command for as long as the client waits for it.

        Raises:
            ConnectionError: It has left.
            ProxyError: What the command raises.
        """
        working = asyncio.ensure_future(work)
        leaving = asyncio.ensure_future(self._reader.read(1))
        try:
            while not working.done():
                await asyncio.wait(
                    (working, leaving), timeout=HEARTBEAT, return_when=asyncio.FIRST_COMPLETED
                )
                if working.done():
                    break
                if leaving.done():
                    raise ConnectionAbortedError
                await self.tell({})
            return working.result()
        finally:
            for task in (working, leaving):
                task.cancel()
            await asyncio.gather(working, leaving, return_exceptions=True)

    async def tell(self, progress: Mapping[str, Any]) -> None:
        """Tell how far a command is.

        Raises:
            OSError: It has left, or does not read.
        """
        await self.send({"progress": progress})

    async def refuse(self, reason: str) -> None:
        """Tell why there will be no result."""
        await self.send({"error": reason})

    async def send(self, message: Mapping[str, Any]) -> None:
        """Send one line, and wait until the client takes it."""
        async with self._turn, asyncio.timeout(ANSWER_TIMEOUT):
            self._writer.write(json.dumps(message).encode() + b"\n")
            await self._writer.drain()


def _is_permitted(writer: asyncio.StreamWriter) -> bool:
    """Tell whether the other end is root or our own user: what the file's mode says, once more."""
    peer: socket.socket = writer.get_extra_info("socket")
    credentials = peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    _, uid, _ = _CREDENTIALS.unpack(credentials)
    return uid in {0, os.geteuid()}


def _parse(line: bytes, commands: Mapping[str, Command]) -> tuple[Command, Mapping[str, Any]]:
    """Read a request.

    Raises:
        CommandError: It is none.
    """
    try:
        request = json.loads(line)
    except (ValueError, RecursionError):
        request = None
    match request:
        case {"command": str(name), "arguments": dict(arguments)}:
            pass
        case _:
            raise CommandError('a command is {"command": NAME, "arguments": {…}} on a line')
    if name not in commands:
        raise CommandError(f"the daemon knows no command {name[:40]!r}; is it of another version?")
    return commands[name], arguments
