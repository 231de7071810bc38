"""Python's garbage collector, set up for a process that keeps a lot and has clients waiting.

What refers to itself is garbage that only the collector finds; all else is freed at once, without it. A
full collection looks at everything that is kept, and stops the event loop meanwhile: 60 ms with the hot
narinfos all there. By default it comes whenever that has grown by a quarter, so again and again while they
fill up.

What decides when to look is how many more objects there are, not how many are new. Where hot narinfos take
the place of others there are twenty new ones for each that there is more of; so collections are many and
small.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
from typing import Final

YOUNG: Final = 500
"""More objects after which the youngest are looked at: two milliseconds at most."""

YOUNGER: Final = 2
"""Such collections after which those that outlived one are looked at, too: no more than that."""

FULL: Final = 800
"""Those after which everything is: a million objects that outlived both, so that garbage has a bound."""


@contextlib.contextmanager
def resting() -> Iterator[None]:
    """Do not look while modules are imported: what they make stays, and it is a tenth of the time."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def settle() -> None:
    """Never look again at what is there now: modules, code, and what was made at start.

    Some of it is garbage, a few hundred kB, that would take a tenth of the start to find.
    """
    gc.freeze()
    gc.set_threshold(YOUNG, YOUNGER, FULL)
