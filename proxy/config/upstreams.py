"""What ``[[upstream]]`` means: the remote binary caches, most preferred first."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import Literal

from proxy.config.auth import Auth, read_auth
from proxy.config.paths import existing_file
from proxy.config.quantities import parse_timeout
from proxy.config.sections import TrustConfig, read_keys
from proxy.config.source import Source
from proxy.config.tables import TrustMode, UpstreamTable
from proxy.config.urls import parse_url
from proxy.config.wording import Key, quote
from proxy.nix.signature import PublicKey
from proxy.upstream.names import check_glob

MAX_NAME = 32
"""Characters of a name, which is a label of metrics and part of file names."""

_NAME = re.compile(rf"[a-z0-9][a-z0-9_-]{{0,{MAX_NAME - 1}}}")
_NOT_IN_NAME = re.compile(r"[^a-z0-9_]+")


@dataclass(frozen=True, slots=True)
class UpstreamConfig:
    """One remote binary cache.

    Attributes:
        name: A word that no other upstream has; the ``upstream`` label of metrics.
        url: ``http`` or ``https``, without user, query, fragment and slash at the end.
        keys: Whose signatures count here instead of those in ``[trust]``; None for these.
        trust: ``none`` takes unsigned narinfos as they come: whoever runs this upstream, or can
            change what it sends on the way, decides what gets into the store of every client that
            leaves checking signatures to us. NARs still have to match their narinfos.
        priority: Lower is preferred.
        connect_timeout: Seconds until a connection has to be there, TLS included.
        read_timeout: Seconds without a byte after which an answer is given up.
        max_connections: Connections at the same time.
        auth: How to authenticate, if at all.
        ca_file: The certificates of the authorities to trust, in PEM, instead of the system's.
        allow: Globs over names of store paths, one of which has to match; None for all names.
        deny: Globs, none of which may match.
    """

    name: str
    url: str
    keys: tuple[PublicKey, ...] | None
    trust: TrustMode
    priority: int
    connect_timeout: float
    read_timeout: float
    max_connections: int
    auth: Auth | None
    ca_file: Path | None
    allow: tuple[str, ...] | None
    deny: tuple[str, ...]

    def trusted_keys(self, trust: TrustConfig) -> tuple[PublicKey, ...] | None:
        """Whose signatures count for what this upstream says; None when none is asked for."""
        if self.trust == "none":
            return None
        return trust.keys if self.keys is None else self.keys


def read_upstreams(
    tables: Sequence[UpstreamTable], trust: TrustConfig, source: Source
) -> tuple[UpstreamConfig, ...]:
    """The upstreams, most preferred first; of the same priority in the order of the file.

    Raises:
        ConfigError: A value is wrong, a name or url stands there twice, or nothing that an upstream
            says could ever be trusted.
    """
    upstreams: list[UpstreamConfig] = []
    for index, table in enumerate(tables):
        upstream = _read_upstream(table, index, source)
        _refuse_second("name", upstream, upstreams, source)
        _refuse_second("url", upstream, upstreams, source)
        _refuse_untrustable(upstream, index, trust, source)
        upstreams.append(upstream)
    return tuple(sorted(upstreams, key=attrgetter("priority")))


def upstream_tables(urls: Sequence[str], source: Source) -> tuple[UpstreamTable, ...]:
    """Tables for upstreams of which only the URLs are given: the names are made from these.

    Raises:
        ConfigError: One is no URL.
    """
    tables: list[UpstreamTable] = []
    for text in urls:
        url, _ = source.read((), parse_url, text)
        name = _unused_name(url.partition("://")[2], {table.name for table in tables})
        tables.append(UpstreamTable(name=name, url=text))
    return tuple(tables)


def _read_upstream(table: UpstreamTable, index: int, source: Source) -> UpstreamConfig:
    key: Key = ("upstream", index)
    url, user = source.read((*key, "url"), parse_url, table.url)
    if user is not None and table.auth is not None:
        raise source.error("the url has a user already", (*key, "auth"))
    auth = user if table.auth is None else read_auth(table.auth, (*key, "auth"), source)
    return UpstreamConfig(
        name=source.read((*key, "name"), _parse_name, table.name),
        url=url,
        keys=None if table.keys is None else read_keys(table.keys, (*key, "keys"), source),
        trust=table.trust,
        priority=index + 1 if table.priority is None else table.priority,
        connect_timeout=source.read(
            (*key, "connect_timeout"), parse_timeout, table.connect_timeout
        ),
        read_timeout=source.read((*key, "read_timeout"), parse_timeout, table.read_timeout),
        max_connections=table.max_connections,
        auth=auth,
        ca_file=None
        if table.ca_file is None
        else source.read(
            (*key, "ca_file"), partial(existing_file, environ=source.environ), table.ca_file
        ),
        allow=None if table.allow is None else _read_allow(table.allow, (*key, "allow"), source),
        deny=_read_globs(table.deny, (*key, "deny"), source),
    )


def _read_allow(texts: Sequence[str], key: Key, source: Source) -> tuple[str, ...]:
    if not texts:
        raise source.error("allows nothing; without this key every name is allowed", key)
    return _read_globs(texts, key, source)


def _read_globs(texts: Sequence[str], key: Key, source: Source) -> tuple[str, ...]:
    return tuple(source.read((*key, index), check_glob, text) for index, text in enumerate(texts))


def _parse_name(text: str) -> str:
    if not _NAME.fullmatch(text):
        raise ValueError(
            f'{quote(text)} is not a name: a to z, 0 to 9, "_" and "-", at most {MAX_NAME}, '
            "a letter or digit first"
        )
    return text


def _refuse_second(
    field: Literal["name", "url"],
    upstream: UpstreamConfig,
    earlier: Sequence[UpstreamConfig],
    source: Source,
) -> None:
    value = getattr(upstream, field)
    if any(getattr(other, field) == value for other in earlier):
        key = ("upstream", len(earlier), field)
        raise source.error(f"{quote(value)} is given twice", key)


def _refuse_untrustable(
    upstream: UpstreamConfig, index: int, trust: TrustConfig, source: Source
) -> None:
    if upstream.trust == "none" and upstream.keys is not None:
        raise source.error('trust = "none" asks for no keys', ("upstream", index, "keys"))
    if upstream.trusted_keys(trust) == ():
        reason = 'nothing it says can be trusted: no keys here or in [trust], and trust is "signed"'
        raise source.error(reason, ("upstream", index, "keys"))


def _unused_name(place: str, taken: set[str]) -> str:
    """A name for a place: of ``cache.example.org/team`` it is ``cache-example-org-team``."""
    word = _NOT_IN_NAME.sub("-", place.lower()).strip("-_") or "upstream"
    name, count = word[:MAX_NAME], 1
    while name in taken:
        count += 1
        suffix = f"-{count}"
        name = word[: MAX_NAME - len(suffix)] + suffix
    return name
