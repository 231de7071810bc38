"""What a daemon does for pins by itself: fetch again what is missing of them, and say what is wrong."""

from __future__ import annotations

import asyncio
import contextlib
import random

from proxy.cli.logs import log
from proxy.errors import StoreError
from proxy.pins import Pins
from proxy.sizes import paths, readable

FIRST_PAUSE = 30.0
"""Seconds, at most, until it is tried again to fetch what is missing; twice as many after each failure."""

LONGEST_PAUSE = 3600.0
"""Seconds that the pauses grow to, and, at most, between two looks at pins of which all was here."""


async def keep_whole(
    pins: Pins, *, first_pause: float = FIRST_PAUSE, longest_pause: float = LONGEST_PAUSE
) -> None:
    """Keep pins whole until cancelled."""
    with contextlib.suppress(StoreError):
        if excess := await pins.excess():
            log.warning("more is pinned than max_size leaves room for", excess=readable(excess))
    before, pause = 0, first_pause
    while True:
        with contextlib.suppress(StoreError):  # a disk that fails is told of elsewhere
            missing = await pins.mend()
            if missing and not before:
                log.warning("pins are not whole", missing=paths(missing))
            elif before and not missing:
                log.info("pins are whole again")
            pause = min(longest_pause, 2 * pause) if missing and before else first_pause
            before = missing
        longest = pause if before else longest_pause
        await asyncio.sleep(longest * random.uniform(0.5, 1.0))  # noqa: S311  # no secret
