"""Which requests are plain: a GET of which nothing but the target decides the answer."""

from __future__ import annotations

from typing import Final

from aiohttp import HttpVersion11
from aiohttp.http import RawRequestMessage

_TELLING_HEADERS: Final = frozenset(
    {
        "Authorization",
        "Connection",
        "Content-Length",
        "Expect",
        "If-Match",
        "If-Modified-Since",
        "If-None-Match",
        "If-Range",
        "If-Unmodified-Since",
        "Range",
        "TE",
        "Trailer",
        "Transfer-Encoding",
        "Upgrade",
    }
)
"""Headers that change the answer, or say that more than headers follows."""


def is_plain(message: RawRequestMessage) -> bool:
    """Tell whether a request is a GET of which nothing but the target decides the answer."""
    return (
        message.method == "GET"
        and message.version == HttpVersion11
        and not (message.should_close or message.upgrade or message.chunked)
        and message.compression is None
        and not any(name in message.headers for name in _TELLING_HEADERS)
    )
