"""Who we are to an upstream: the ``Authorization`` header for a host.

Sources: netrc as curl and Nix use it (keyed by host, whatever the port), and the bearer tokens of Cachix.
"""

from __future__ import annotations

import base64
import netrc
from collections.abc import Callable
from pathlib import Path

Credentials = Callable[[str, bool], str | None]
"""``(host, is_own)`` → the ``Authorization`` header, or None.

``is_own`` tells whether the request goes to the configured origin: after a redirect it does not, and only
netrc may still have something to say, because its entries name the host they are for.
"""


def anonymous(_host: str, _is_own: bool) -> None:  # noqa: FBT001  # as Credentials says
    """No credentials."""


def bearer(token: str) -> Credentials:
    """A token, for the upstream's own origin only."""
    return _own(f"Bearer {token}")


def basic(user: str, password: str) -> Credentials:
    """User and password (RFC 7617), for the upstream's own origin only."""
    return _own(_basic_header(user, password))


def from_netrc(path: Path) -> Credentials:
    """The entries of a netrc file, each for its own host; ``default`` for the upstream's own origin.

    Raises:
        OSError: The file cannot be read.
        ValueError: It is no netrc file; says file and line.
    """
    try:
        entries = netrc.netrc(str(path)).hosts
    except netrc.NetrcParseError as error:
        raise ValueError(f"{path}:{error.lineno}: {error.msg}") from error
    headers = {
        host.lower(): _basic_header(login, password)
        for host, (login, _, password) in entries.items()
    }
    default = headers.pop("default", None)
    return lambda host, is_own: headers.get(host.lower(), default if is_own else None)


def _own(header: str) -> Credentials:
    return lambda _host, is_own: header if is_own else None


def _basic_header(user: str, password: str | None) -> str:
    return "Basic " + base64.b64encode(f"{user}:{password or ''}".encode()).decode()
