"""What each table but ``[[upstream]]`` means."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from proxy.config.addresses import Listen, TcpListen, parse_listen
from proxy.config.paths import absolute, default_store
from proxy.config.quantities import parse_duration, parse_size, parse_timeout
from proxy.config.source import Source
from proxy.config.tables import (
    LogFormat,
    LogLevel,
    LogTable,
    Mode,
    PolicyTable,
    PrefetchNars,
    PrefetchTable,
    ServerTable,
    StoreTable,
    TrustTable,
    UpstreamDown,
)
from proxy.config.wording import Key, quote
from proxy.nix.signature import PublicKey

MOST_WORKERS = 64
"""Processes; beyond, a slip is more likely than a machine that wants them."""


@dataclass(frozen=True, slots=True)
class ServerConfig:
    """``[server]``.

    Attributes:
        listen: Where to listen, besides the sockets that systemd passes; may be empty.
        workers: Processes that accept clients; 1 is the daemon itself.
        priority: What ``nix-cache-info`` says; lower is asked first.
        shutdown_timeout: Seconds that transfers may still take when the daemon is told to stop.
    """

    listen: tuple[Listen, ...]
    workers: int
    priority: int
    shutdown_timeout: float


@dataclass(frozen=True, slots=True)
class StoreConfig:
    """``[store]``.

    Attributes:
        path: The folder, absolute; it need not exist yet.
        max_size: Bytes that the store may have on disk; 0 for no limit.
        min_free: Bytes of the file system that stay free.
    """

    path: Path
    max_size: int
    min_free: int


@dataclass(frozen=True, slots=True)
class TrustConfig:
    """``[trust]``.

    Attributes:
        keys: Whose signatures count, for upstreams without keys of their own; no name twice.
    """

    keys: tuple[PublicKey, ...]


@dataclass(frozen=True, slots=True)
class PolicyConfig:
    """``[policy]``.

    Attributes:
        mode: Whether upstreams are asked, and whether clients are told what these do wrong.
        upstream_down: What Nix is told when nobody has a path and somebody could not be asked.
        negative_ttl: Seconds for which "nobody has it" is remembered; 0 for not at all.
        lookup_budget: Seconds that a narinfo may take to be answered.
    """

    mode: Mode
    upstream_down: UpstreamDown
    negative_ttl: float
    lookup_budget: float


@dataclass(frozen=True, slots=True)
class PrefetchConfig:
    """``[prefetch]``.

    Attributes:
        narinfos: Whether to walk References ahead of the client.
        nars: Which NARs to fetch ahead of the client.
        budget: Bytes for each client before its first request for a NAR.
    """

    narinfos: bool
    nars: PrefetchNars
    budget: int


@dataclass(frozen=True, slots=True)
class LogConfig:
    """``[log]``.

    Attributes:
        level: The least severe that is logged.
        format: ``auto`` is console on a terminal, else json.
    """

    level: LogLevel
    format: LogFormat


def read_server(table: ServerTable, source: Source) -> ServerConfig:
    """What ``[server]`` means.

    Raises:
        ConfigError: A value is wrong.
    """
    return ServerConfig(
        listen=read_listen(table.listen, ("server", "listen"), source),
        workers=source.read(("server", "workers"), _parse_workers, table.workers),
        priority=table.priority,
        shutdown_timeout=source.read(
            ("server", "shutdown_timeout"), parse_duration, table.shutdown_timeout
        ),
    )


def read_store(table: StoreTable, source: Source) -> StoreConfig:
    """What ``[store]`` means.

    Raises:
        ConfigError: A value is wrong.
    """
    key = ("store", "path")
    if table.path is None:
        path = source.read(key, default_store, source.environ)
    else:
        path = source.read(key, partial(absolute, environ=source.environ), table.path)
    return StoreConfig(
        path=path,
        max_size=source.read(("store", "max_size"), parse_size, table.max_size),
        min_free=source.read(("store", "min_free"), parse_size, table.min_free),
    )


def read_trust(table: TrustTable, source: Source) -> TrustConfig:
    """What ``[trust]`` means.

    Raises:
        ConfigError: A value is wrong.
    """
    return TrustConfig(read_keys(table.keys, ("trust", "keys"), source))


def read_policy(table: PolicyTable, source: Source) -> PolicyConfig:
    """What ``[policy]`` means.

    Raises:
        ConfigError: A value is wrong.
    """
    return PolicyConfig(
        mode=table.mode,
        upstream_down=table.upstream_down,
        negative_ttl=source.read(("policy", "negative_ttl"), parse_duration, table.negative_ttl),
        lookup_budget=source.read(("policy", "lookup_budget"), parse_timeout, table.lookup_budget),
    )


def read_prefetch(table: PrefetchTable, source: Source) -> PrefetchConfig:
    """What ``[prefetch]`` means.

    Raises:
        ConfigError: A value is wrong.
    """
    return PrefetchConfig(
        narinfos=table.narinfos,
        nars=table.nars,
        budget=source.read(("prefetch", "budget"), parse_size, table.budget),
    )


def read_log(table: LogTable) -> LogConfig:
    """What ``[log]`` means."""
    return LogConfig(level=table.level, format=table.format)


def read_listen(texts: Sequence[str], key: Key, source: Source) -> tuple[Listen, ...]:
    """The addresses, each once. Port 0 is another port each time.

    Raises:
        ConfigError: One is none, or stands there twice.
    """
    parse = partial(parse_listen, environ=source.environ)
    addresses: list[Listen] = []
    for index, text in enumerate(texts):
        address = source.read((*key, index), parse, text)
        any_port = isinstance(address, TcpListen) and address.port == 0
        if address in addresses and not any_port:
            raise source.error(f"{quote(text)} is given twice", (*key, index))
        addresses.append(address)
    return tuple(addresses)


def read_keys(texts: Sequence[str], key: Key, source: Source) -> tuple[PublicKey, ...]:
    """The public keys, each once.

    Raises:
        ConfigError: One is none, or has the name of another: of a name, only one key can count.
    """
    keys: dict[str, PublicKey] = {}
    for index, text in enumerate(texts):
        public_key = source.read((*key, index), PublicKey.parse, text)
        if keys.setdefault(public_key.name, public_key) != public_key:
            reason = f"another key with the name {quote(public_key.name)} is trusted already"
            raise source.error(reason, (*key, index))
    return tuple(keys.values())


def _parse_workers(value: int | str) -> int:
    if value == "auto":
        return min(len(os.sched_getaffinity(0)), MOST_WORKERS)
    if isinstance(value, int) and 1 <= value <= MOST_WORKERS:
        return value
    raise ValueError(f'expected a whole number from 1 to {MOST_WORKERS}, or "auto"')
