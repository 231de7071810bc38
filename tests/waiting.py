"""Wait for what nothing announces."""

from __future__ import annotations

import time
from collections.abc import Callable

PATIENCE = 60.0
"""Seconds; many times what anything takes on a busy machine."""


def eventually(holds: Callable[[], object]) -> None:
    """Return once ``holds()`` is true.

    Raises:
        AssertionError: It was not for `PATIENCE`.
    """
    deadline = time.monotonic() + PATIENCE
    while not holds():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.005)
