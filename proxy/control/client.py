"""A command's end: asks the daemon, and waits for the answer."""

from __future__ import annotations

import contextlib
import json
import socket
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from proxy.control.address import socket_name
from proxy.errors import CommandError, NotRunningError

PATIENCE = 30.0
"""Seconds of silence after which the daemon is given up; it says every few that it is at work."""

Progress = Callable[[Mapping[str, Any]], None]
"""Called with what the daemon tells meanwhile."""


def ask(
    path: Path, command: str, arguments: Mapping[str, Any], progress: Progress
) -> Mapping[str, Any]:
    """Have the running daemon carry out a command. Blocks.

    Args:
        path: The daemon's socket.
        command: The command's name.
        arguments: What it takes.
        progress: Called with what the daemon tells meanwhile.

    Returns:
        The command's result.

    Raises:
        NotRunningError: Nobody listens there.
        CommandError: It could not be done, or the daemon does not let us, or went away meanwhile.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(PATIENCE)
        _connect(connection, path)
        try:
            request = {"command": command, "arguments": arguments}
            with contextlib.suppress(ConnectionError):  # who refuses us may hang up before that
                connection.sendall(json.dumps(request).encode() + b"\n")
            with connection.makefile("rb") as lines:
                for line in lines:
                    match json.loads(line):
                        case {"progress": dict(told)}:
                            if told:
                                progress(told)
                        case {"result": dict(result)}:
                            return result
                        case {"error": str(reason)}:
                            raise CommandError(reason)
                        case _:
                            raise CommandError("the daemon answered something that is no answer")
        except TimeoutError:
            raise CommandError(f"the daemon has said nothing for {PATIENCE:g} s") from None
        except (OSError, ValueError):
            pass
    raise CommandError("the daemon went away before it was done")


def _connect(connection: socket.socket, path: Path) -> None:
    try:
        with socket_name(path) as name:
            connection.connect(name)
    except (FileNotFoundError, NotADirectoryError, ConnectionRefusedError):
        raise NotRunningError(f"no daemon runs on {path.parent.parent}") from None
    except OSError as error:
        raise CommandError(
            f"the daemon of {path.parent.parent} cannot be asked: {error.strerror or error}"
        ) from None
