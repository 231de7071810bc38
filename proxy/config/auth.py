"""How to authenticate to an upstream. Secrets are in no ``repr`` and in no message."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from msgspec import structs

from proxy.config.paths import existing_file
from proxy.config.source import Source
from proxy.config.tables import AuthTable
from proxy.config.wording import Key

Value = TypeVar("Value")

_WAYS = "one of bearer, bearer_file, netrc, user and password, user and password_file"
_TOKEN = re.compile(r"[!-~]+")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


@dataclass(frozen=True, slots=True)
class Secret:
    """A secret that stood in the configuration itself."""

    text: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class BearerAuth:
    """``Authorization: Bearer`` (RFC 6750).

    Attributes:
        token: The token, or the file that holds it and nothing else but white space around it.
    """

    token: Secret | Path


@dataclass(frozen=True, slots=True)
class BasicAuth:
    """``Authorization: Basic`` (RFC 7617).

    Attributes:
        user: The user; empty for a Cachix token.
        password: The password, or the file that holds it and nothing else but a newline after it.
    """

    user: str
    password: Secret | Path


@dataclass(frozen=True, slots=True)
class NetrcAuth:
    """Basic authentication with what a netrc file has for the upstream's host, as Nix does it."""

    path: Path


Auth = BearerAuth | BasicAuth | NetrcAuth


def read_auth(table: AuthTable, key: Key, source: Source) -> Auth:
    """The one way in that the table says.

    Raises:
        ConfigError: It says none or several, a file is missing, or no header can hold the secret.
    """
    given: dict[str, str] = {
        name: value for name, value in structs.asdict(table).items() if value is not None
    }

    def read(name: str, parse: Callable[[str], Value]) -> Value:
        return source.read((*key, name), parse, given[name])

    def file(text: str) -> Path:
        return existing_file(text, source.environ)

    match [*given]:
        case ["bearer"]:
            return BearerAuth(read("bearer", parse_token))
        case ["bearer_file"]:
            return BearerAuth(read("bearer_file", file))
        case ["netrc"]:
            return NetrcAuth(read("netrc", file))
        case ["user", "password"]:
            return BasicAuth(read("user", parse_user), read("password", parse_password))
        case ["user", "password_file"]:
            return BasicAuth(read("user", parse_user), read("password_file", file))
        case _:
            raise source.error(f"expected {_WAYS}", key)


def parse_user(text: str) -> str:
    """The user of a BasicAuth; it may be empty.

    Raises:
        ValueError: RFC 7617 cannot say it.
    """
    if ":" in text or _CONTROL.search(text):
        raise ValueError('a user has neither ":" nor control characters')
    return text


def parse_password(text: str) -> Secret:
    """The password of a BasicAuth; it may be empty.

    Raises:
        ValueError: RFC 7617 cannot say it.
    """
    if _CONTROL.search(text):
        raise ValueError("a password has no control characters")
    return Secret(text)


def parse_token(text: str) -> Secret:
    """The token of a BearerAuth.

    Raises:
        ValueError: A header cannot hold it.
    """
    if not _TOKEN.fullmatch(text):
        raise ValueError("a token has one visible ASCII character or more, and no others")
    return Secret(text)
