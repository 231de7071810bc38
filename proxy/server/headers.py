"""The headers of answers, in one place, because two lanes write them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

from proxy.events import Result

SOFTWARE: Final = "nix-cache-proxy"
NAR_TYPE: Final = "application/x-nix-nar"
NARINFO_TYPE: Final = "text/x-nix-narinfo"
TEXT_TYPE: Final = "text/plain; charset=utf-8"

_TAG: Final = re.compile(r'(?:W/)?("[^"]*")')


def is_had(etag: str | None, condition: str) -> bool:
    """Tell by its If-None-Match whether a client has what an ETag is of (RFC 9110 §13.1.2)."""
    return etag is not None and (condition.strip() == "*" or etag in _TAG.findall(condition))


def provenance(result: Result, upstream: str) -> dict[str, str]:
    """Say where an answer came from."""
    return {"X-Cache": result, "X-Upstream": upstream} if upstream else {"X-Cache": result}


def narinfo_headers(result: Result, upstream: str) -> dict[str, str]:
    """The headers of a narinfo."""
    return {"Content-Type": NARINFO_TYPE, "Server": SOFTWARE, **provenance(result, upstream)}


def file_headers(
    content_type: str, etag: str | None, result: Result, upstream: str
) -> dict[str, str]:
    """The headers of a NAR or another file; never a Content-Encoding."""
    tag = {} if etag is None else {"ETag": etag}
    return {
        "Content-Type": content_type,
        "Accept-Ranges": "bytes",
        "Server": SOFTWARE,
        **tag,
        **provenance(result, upstream),
    }


def error_headers() -> dict[str, str]:
    """The headers of what cannot be had."""
    return {"Content-Type": TEXT_TYPE, "Server": SOFTWARE}


def tail(headers: Mapping[str, str], length: int) -> bytes:
    """Write headers and the empty line: all that follows the status line and ``Date``."""
    lines = [f"{name}: {value}" for name, value in headers.items()]
    return "\r\n".join((*lines, f"Content-Length: {length}", "", "")).encode()
