"""The tables of the file as they are written, with the defaults as an operator would write them.

A field that is an `object` is a quantity: `proxy.config.quantities` looks at it, because it has
more to say about a wrong one than its type. What the values mean is said where they are read.
"""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta, Struct, field

Priority = Annotated[int, Meta(ge=0, le=2**31 - 1)]
"""Lower is preferred. Nix reads an ``int``."""

TrustMode = Literal["signed", "none"]
Mode = Literal["auto", "offline", "strict"]
UpstreamDown = Literal["not-found", "error"]
PrefetchNars = Literal["off", "wanted"]
LogLevel = Literal["debug", "info", "warning", "error"]
LogFormat = Literal["auto", "console", "json"]


class Table(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A table with known keys."""


class ServerTable(Table, frozen=True):
    """``[server]``."""

    listen: tuple[str, ...] = ("127.0.0.1:8627",)
    workers: int | str = 1
    priority: Priority = 30
    shutdown_timeout: object = "20s"


class StoreTable(Table, frozen=True):
    """``[store]``."""

    path: str | None = None
    max_size: object = "50GiB"
    min_free: object = "1GiB"


class TrustTable(Table, frozen=True):
    """``[trust]``."""

    keys: tuple[str, ...] = (
        "nanna-coder.cachix.org-1:U/8OwBxzrmKhrghm7KtNA3cRnYR5ioKlB637gbc2BF4=",
        "cache.nixos.org-1:6NCHdD59X431o0gWypbMrAURkbJ16ZPMQFGspcDShjY=",
    )


class AuthTable(Table, frozen=True):
    """``auth`` of an upstream: one way in."""

    bearer: str | None = None
    bearer_file: str | None = None
    netrc: str | None = None
    user: str | None = None
    password: str | None = None
    password_file: str | None = None


class UpstreamTable(Table, frozen=True):
    """``[[upstream]]``."""

    name: str
    url: str
    keys: tuple[str, ...] | None = None
    trust: TrustMode = "signed"
    priority: Priority | None = None
    connect_timeout: object = "5s"
    read_timeout: object = "30s"
    max_connections: Annotated[int, Meta(ge=2)] = 128
    auth: AuthTable | None = None
    ca_file: str | None = None
    allow: tuple[str, ...] | None = None
    deny: tuple[str, ...] = ()


class PolicyTable(Table, frozen=True):
    """``[policy]``."""

    mode: Mode = "auto"
    upstream_down: UpstreamDown = "not-found"
    negative_ttl: object = "60s"
    lookup_budget: object = "8s"


class PrefetchTable(Table, frozen=True):
    """``[prefetch]``."""

    narinfos: bool = True
    nars: PrefetchNars = "wanted"
    budget: object = "64MiB"


class LogTable(Table, frozen=True):
    """``[log]``."""

    level: LogLevel = "info"
    format: LogFormat = "auto"


class Document(Table, frozen=True):
    """The whole file."""

    server: ServerTable = field(default_factory=ServerTable)
    store: StoreTable = field(default_factory=StoreTable)
    trust: TrustTable = field(default_factory=TrustTable)
    upstream: tuple[UpstreamTable, ...] = (
        UpstreamTable(name="nanna-coder", url="https://nanna-coder.cachix.org"),
        UpstreamTable(name="nixos", url="https://cache.nixos.org"),
    )
    policy: PolicyTable = field(default_factory=PolicyTable)
    prefetch: PrefetchTable = field(default_factory=PrefetchTable)
    log: LogTable = field(default_factory=LogTable)
