"""Start processes of our own."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys


async def spawn(
    module: str, *sockets: socket.socket, stdin: bytes = b""
) -> asyncio.subprocess.Process:
    """Run a module of ours in another process, which ignores what else happens to us.

    Args:
        module: Its name.
        sockets: They are passed on; their descriptors are its arguments.
        stdin: What it can read.

    Raises:
        OSError: It cannot be started.
    """
    fds = [each.fileno() for each in sockets]
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-P",  # modules come from where ours do, and never from the current folder
        "-m",
        module,
        *map(str, fds),
        stdin=asyncio.subprocess.PIPE,
        pass_fds=fds,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    if process.stdin is not None:  # as it is, having been asked for
        process.stdin.write(stdin)
        process.stdin.close()
    return process


def ending(status: int) -> str:
    """Say how a process has ended."""
    if status >= 0:
        return f"it ended with status {status}"
    try:
        return f"it was ended by {signal.Signals(-status).name}"
    except ValueError:
        return f"it was ended by signal {-status}"
