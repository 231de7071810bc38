"""What `proxy.server.connection` looks at inside of aiohttp, and whether this version of it has that."""

from __future__ import annotations

from typing import Final

from aiohttp import web

_SLOTS: Final = (
    "_close",
    "_force_close",
    "_messages",
    "_loop",
    "_next_keepalive_close_time",
    "_paused",
    "_request_in_progress",
    "_upgraded",
    "_waiter",
)
"""What is looked at of `web.RequestHandler` and its bases."""


def missing_slots() -> list[str]:
    """Return what is looked at in aiohttp and is not there."""
    slots = {slot for kind in web.RequestHandler.__mro__ for slot in getattr(kind, "__slots__", ())}
    return [slot for slot in _SLOTS if slot not in slots]
