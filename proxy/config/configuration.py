"""The whole configuration: read from a file or not, then overridden by flags."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from proxy.config.document import read_tables, read_toml
from proxy.config.paths import expand
from proxy.config.sections import (
    LogConfig,
    PolicyConfig,
    PrefetchConfig,
    ServerConfig,
    StoreConfig,
    TrustConfig,
    read_keys,
    read_listen,
    read_log,
    read_policy,
    read_prefetch,
    read_server,
    read_store,
    read_trust,
)
from proxy.config.source import Source
from proxy.config.upstreams import UpstreamConfig, read_upstreams, upstream_tables
from proxy.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Config:
    """A configuration that can be used as it is.

    Attributes:
        server: Where and how to serve.
        store: What is kept, and where.
        trust: Whose signatures count.
        upstreams: Whom to ask, most preferred first; may be empty, then nothing new arrives.
        policy: What to do when upstreams do not answer.
        prefetch: What to fetch ahead of clients.
        log: What is logged.
    """

    server: ServerConfig
    store: StoreConfig
    trust: TrustConfig
    upstreams: tuple[UpstreamConfig, ...]
    policy: PolicyConfig
    prefetch: PrefetchConfig
    log: LogConfig

    def with_overrides(
        self,
        *,
        listen: Sequence[str] = (),
        store: str | None = None,
        upstreams: Sequence[str] = (),
        trusted_keys: Sequence[str] = (),
        environ: Mapping[str, str] | None = None,
    ) -> Config:
        """This configuration with what flags say; a flag not given changes nothing.

        Args:
            listen: ``--listen``: replaces ``server.listen``.
            store: ``--store``: replaces ``store.path``; may be relative to the working directory.
            upstreams: ``--upstream``: replaces all upstreams by these URLs, preferred in their
                order and named after them; everything else about them is the default.
            trusted_keys: ``--trusted-key``: is added to ``trust.keys``, because who trusts one more
                does not mean to stop trusting the others. Upstreams with keys of their own keep
                to these.
            environ: What the environment variables in paths mean; the process's own by default.

        Raises:
            ConfigError: A value is wrong; its ``file`` is the flag.
        """
        environ = os.environ if environ is None else environ
        config = self
        if listen:
            addresses = read_listen(listen, (), _flag("--listen", environ))
            config = replace(config, server=replace(config.server, listen=addresses))
        if store is not None:
            path = _flag("--store", environ).read((), partial(expand, environ=environ), store)
            config = replace(config, store=replace(config.store, path=path.absolute()))
        if trusted_keys:
            texts = (*map(str, config.trust.keys), *trusted_keys)
            keys = read_keys(texts, (), _flag("--trusted-key", environ))
            config = replace(config, trust=TrustConfig(keys))
        if upstreams:
            flag = _flag("--upstream", environ)
            tables = upstream_tables(upstreams, flag)
            config = replace(config, upstreams=read_upstreams(tables, config.trust, flag))
        return config


def load(path: Path | None, *, environ: Mapping[str, str] | None = None) -> Config:
    """The configuration in a file; without one, the defaults.

    Args:
        path: The file.
        environ: What the environment variables in paths mean; the process's own by default.

    Raises:
        ConfigError: The file cannot be read, or what is in it cannot be used.
    """
    environ = os.environ if environ is None else environ
    if path is None:
        return _read("", Source(None, "", environ))
    return parse(_text(path), str(path), environ=environ)


def parse(text: str, file: str, *, environ: Mapping[str, str] | None = None) -> Config:
    """The configuration in the text of a file.

    Args:
        text: The text.
        file: The file's name, for messages.
        environ: What the environment variables in paths mean; the process's own by default.

    Raises:
        ConfigError: It cannot be used.
    """
    source = Source(file, text, os.environ if environ is None else environ)
    try:
        return _read(text, source)
    except RecursionError:  # tomllib's, of [[[[…
        raise ConfigError("not TOML: nested too deeply", file=file) from None


def _read(text: str, source: Source) -> Config:
    toml = read_toml(text, source)
    tables = read_tables(toml, source)
    trust = read_trust(tables.trust, source)
    return Config(
        server=read_server(tables.server, source),
        store=read_store(tables.store, source),
        trust=trust,
        upstreams=read_upstreams(tables.upstream, trust, source),
        policy=read_policy(tables.policy, source),
        prefetch=read_prefetch(tables.prefetch, source),
        log=read_log(tables.log),
    )


def _flag(name: str, environ: Mapping[str, str]) -> Source:
    return Source(name, None, environ)


def _text(path: Path) -> str:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror}", file=str(path)) from None
    try:
        return data.decode("utf-8-sig")  # editors on Windows begin files with a byte order mark
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ConfigError("is not UTF-8", file=str(path), line=line) from None
