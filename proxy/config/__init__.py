"""The configuration file, parsed into the values that the program uses.

Only the command line reads it: what lies below takes plain constructor arguments. Everything that
is wrong with a configuration is a `proxy.errors.ConfigError` that names the file, the line and the
key, and the nearest valid name where a name is wrong; no text of a secret is ever part of one.

From text to values, each step in its own module::

    text ─ document ─→ tables ─ server, store, upstream, … ─→ Config
             │            │          │
             TOML, shape  defaults   meaning: sizes, addresses, keys, files

``config.example.toml`` is the reference for operators; a test holds it to what is read here.
"""

from __future__ import annotations

from proxy.config.addresses import Listen, TcpListen, UnixListen
from proxy.config.auth import Auth, BasicAuth, BearerAuth, NetrcAuth, Secret
from proxy.config.configuration import Config, load, parse
from proxy.config.sections import (
    LogConfig,
    PolicyConfig,
    PrefetchConfig,
    ServerConfig,
    StoreConfig,
    TrustConfig,
)
from proxy.config.upstreams import UpstreamConfig

__all__ = [
    "Auth",
    "BasicAuth",
    "BearerAuth",
    "Config",
    "Listen",
    "LogConfig",
    "NetrcAuth",
    "PolicyConfig",
    "PrefetchConfig",
    "Secret",
    "ServerConfig",
    "StoreConfig",
    "TcpListen",
    "TrustConfig",
    "UnixListen",
    "UpstreamConfig",
    "load",
    "parse",
]
