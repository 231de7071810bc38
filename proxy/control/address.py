"""The name of a Unix socket, of which the kernel takes 107 bytes (unix(7)), however deep it lies."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

LONGEST = 107
"""Bytes of ``sun_path`` without the null byte at its end."""


@contextlib.contextmanager
def socket_name(path: Path) -> Iterator[str]:
    """Yield a name by which ``path`` can be bound or connected to, for as long as the context lasts.

    One that is too long is reached through a descriptor of its folder.

    Raises:
        OSError: The folder cannot be opened.
    """
    if len(os.fsencode(path)) <= LONGEST:
        yield str(path)
        return
    folder = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{folder}/{path.name}"
    finally:
        os.close(folder)
