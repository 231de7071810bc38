"""Which upstream a path of the store came from: a label on its narinfo, an extended attribute (xattr(7)).

It is for people. Where the file system keeps no attributes, or somebody has copied the file without them,
nobody knows; nothing is decided by it.
"""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path
from typing import Final

ATTRIBUTE: Final = "user.nix-cache-proxy.upstream"

_NAME: Final = re.compile(rb"[a-z0-9_-]{1,64}")
"""What can be the name of an upstream, and a header: anybody may have written to the folder."""


def label(path: str | Path, origin: str) -> None:
    """Write down which upstream a file is from, if that is possible."""
    with contextlib.suppress(OSError):
        os.setxattr(path, ATTRIBUTE, origin.encode())


def origin_of(path: str | Path) -> str:
    """Return the name of the upstream that a file is from; empty when nobody knows."""
    with contextlib.suppress(OSError):
        name = os.getxattr(path, ATTRIBUTE)
        if _NAME.fullmatch(name):
            return name.decode()
    return ""
