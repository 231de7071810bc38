"""Addresses to listen on: ``host:port``, ``[v6]:port`` and ``unix:/path``."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from proxy.config.paths import absolute
from proxy.config.wording import quote

MAX_UNIX_PATH = 107
"""Bytes that fit in ``sun_path`` with the zero after them: unix(7)."""

_MAX_PORT = 65535
_TCP = re.compile(r"(?:\[(?P<v6>[^\]]*)\]|(?P<name>[A-Za-z0-9._-]+)):(?P<port>[0-9]{1,5})")
_EVERY = re.compile(r"\*?:[0-9]+")
_FORMS = "expected host:port, [v6]:port or unix:/path"


@dataclass(frozen=True, slots=True)
class TcpListen:
    """A TCP address.

    Attributes:
        host: A name, or an address without brackets.
        port: 0 lets the kernel choose a free one.
    """

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@dataclass(frozen=True, slots=True)
class UnixListen:
    """A Unix domain socket."""

    path: Path

    def __str__(self) -> str:
        return f"unix:{self.path}"


Listen = TcpListen | UnixListen


def parse_listen(text: str, environ: Mapping[str, str]) -> Listen:
    """The address; a socket's path may name variables.

    Raises:
        ValueError: It has none of the three forms, or cannot exist.
    """
    if text.startswith("unix:"):
        return _unix(text.removeprefix("unix:"), environ)
    return _tcp(text)


def _unix(text: str, environ: Mapping[str, str]) -> UnixListen:
    path = absolute(text, environ)
    if len(bytes(path)) > MAX_UNIX_PATH:
        raise ValueError(
            f"{quote(str(path))} is too long: a socket has at most {MAX_UNIX_PATH} bytes"
        )
    return UnixListen(path)


def _tcp(text: str) -> TcpListen:
    found = _TCP.fullmatch(text)
    if found is None:
        every = ': every interface is "0.0.0.0" or "[::]"' if _EVERY.fullmatch(text) else ""
        raise ValueError(f"{quote(text)} is not an address, {_FORMS}{every}")
    if int(found["port"]) > _MAX_PORT:
        raise ValueError(f"{quote(text)}: a port is at most {_MAX_PORT}")
    if found["v6"] is not None:
        _check_v6(text, found["v6"])
    return TcpListen(found["v6"] or found["name"], int(found["port"]))


def _check_v6(text: str, address: str) -> None:
    try:
        ipaddress.IPv6Address(address)
    except ValueError:
        raise ValueError(f"{quote(text)}: what is in brackets is not an IPv6 address") from None
