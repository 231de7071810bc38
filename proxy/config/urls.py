"""URLs of upstreams, and the user and password that may stand in one."""

from __future__ import annotations

import ipaddress
import re
from urllib.parse import SplitResult, unquote, urlsplit

from proxy.config.auth import BasicAuth, parse_password, parse_user
from proxy.config.wording import quote

_DEFAULT_PORTS = {"http": 80, "https": 443}
_VISIBLE = re.compile(r"[!-~]+")
_HOST_AND_PORT = re.compile(
    r"(\[[0-9a-f:.]+\]|\w([\w.-]*[\w.])?)(:[0-9]+)?", re.ASCII | re.IGNORECASE
)
_USER = re.compile(r"^([a-z]+://)?.*@", re.IGNORECASE | re.DOTALL)
_NO_HOST = "has no valid host and port"


def parse_url(text: str) -> tuple[str, BasicAuth | None]:
    """The URL of a binary cache in its one spelling, and the authentication that was part of it.

    Raises:
        ValueError: It is none. The message has nothing of what stands before an ``@``.
    """
    try:
        parts = _split(text)
        auth = _auth(parts)
    except ValueError as error:
        shown = quote(_USER.sub(r"\1…@", text))
        raise ValueError(f"{shown} {error}") from None
    host = f"[{parts.hostname}]" if ":" in str(parts.hostname) else parts.hostname
    port = "" if parts.port in {None, _DEFAULT_PORTS[parts.scheme]} else f":{parts.port}"
    return f"{parts.scheme}://{host}{port}{parts.path.rstrip('/')}", auth


def _split(text: str) -> SplitResult:
    """The parts of a URL that has all it needs and nothing else."""
    if not _VISIBLE.fullmatch(text):
        raise ValueError("is not a URL: only visible ASCII characters can be part of one")
    if "?" in text:
        raise ValueError('has a query: what Nix says by "?priority=" is a key of its own here')
    if "#" in text:
        raise ValueError("has a fragment")
    try:
        parts = urlsplit(text)
        port = parts.port
        if ":" in (parts.hostname or ""):
            ipaddress.IPv6Address(parts.hostname or "")  # urllib looks only since Python 3.11.4
    except ValueError:  # urllib quotes what it takes for a port, and that may be half a password
        raise ValueError(_NO_HOST) from None
    if parts.scheme not in _DEFAULT_PORTS:
        raise ValueError('does not begin with "http://" or "https://"')
    if port == 0 or not _HOST_AND_PORT.fullmatch(parts.netloc.rpartition("@")[2]):
        raise ValueError(_NO_HOST)
    return parts


def _auth(parts: SplitResult) -> BasicAuth | None:
    if parts.username is None:
        return None
    user, password = _decode(parts.username), _decode(parts.password or "")
    return BasicAuth(parse_user(user), parse_password(password))


def _decode(text: str) -> str:
    try:
        return unquote(text, errors="strict")
    except UnicodeDecodeError:  # which tells a byte of the password
        raise ValueError("has a user or password that is not UTF-8") from None
