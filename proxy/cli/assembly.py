"""From configured values to the parts that take plain arguments."""

from __future__ import annotations

from pathlib import Path

import aiofiles

from proxy.config import (
    Auth,
    BasicAuth,
    BearerAuth,
    Config,
    NetrcAuth,
    Secret,
    TrustConfig,
    UpstreamConfig,
)
from proxy.config.auth import parse_password, parse_token
from proxy.errors import ConfigError
from proxy.events import Observer
from proxy.failover import Failover, Source
from proxy.nix.cache_info import CacheInfo
from proxy.nix.signature import Keyring, PublicKey
from proxy.nix.trust import Trust
from proxy.prefetch import LookAhead
from proxy.upstream.carriage import Carrier
from proxy.upstream.credentials import Credentials, anonymous, basic, bearer, from_netrc
from proxy.upstream.names import NameFilter
from proxy.upstream.remote import Upstream


def cache_info(config: Config) -> CacheInfo:
    """What ``nix-cache-info`` says; it is made here and never passed through from an upstream."""
    return CacheInfo(want_mass_query=True, priority=config.server.priority)


async def failover(config: Config, observer: Observer, carrier: Carrier | None = None) -> Failover:
    """Make the upstreams. They are open, and their owner closes them.

    Args:
        config: Which.
        observer: Told of what they answer.
        carrier: Another process that may ask them, too.

    Raises:
        ConfigError: A file with credentials or certificates cannot be used.
    """
    sources: list[Source] = []
    try:
        for upstream in config.upstreams:
            sources.append(await _source(upstream, config.trust, carrier))  # noqa: PERF401  # closed below
    except BaseException:
        for source in sources:
            await source.upstream.close()
        raise
    made = Failover(
        sources,
        budget=config.policy.lookup_budget,
        observer=observer,
        keyring=Keyring(config.trust.keys),
    )
    made.asker.offline = config.policy.mode == "offline"
    return made


def trusted_keys(config: Config) -> list[tuple[PublicKey, ...] | None]:
    """Return whose signatures count for what is kept: any keys will do, and None needs no signature."""
    upstreams = (upstream.trusted_keys(config.trust) for upstream in config.upstreams)
    return [config.trust.keys, *(None if keys is None else tuple(keys) for keys in upstreams)]


def trust(config: Config) -> Trust:
    """Whose signatures count for what is kept already."""
    return Trust(None if keys is None else Keyring(keys) for keys in trusted_keys(config))


def look_ahead(config: Config) -> LookAhead:
    """What may be done ahead of clients."""
    return LookAhead(
        narinfos=config.prefetch.narinfos,
        nars=config.prefetch.nars == "wanted",
        budget=config.prefetch.budget,
        connections=min((each.max_connections for each in config.upstreams), default=1),
    )


def public_keys(config: Config) -> list[str]:
    """Return every public key that a client needs to trust what comes from here."""
    keys = [
        key for upstream in config.upstreams for key in upstream.trusted_keys(config.trust) or ()
    ]
    return list(dict.fromkeys(map(str, keys)))


async def _source(config: UpstreamConfig, trust: TrustConfig, carrier: Carrier | None) -> Source:
    try:
        upstream = Upstream(
            config.name,
            config.url,
            connect_timeout=config.connect_timeout,
            read_timeout=config.read_timeout,
            max_connections=config.max_connections,
            credentials=await _credentials(config.auth),
            ca_file=config.ca_file,
            carrier=carrier,
        )
    except (OSError, ValueError) as error:
        raise ConfigError(str(error), key=f"upstream {config.name}") from error
    keys = config.trusted_keys(trust)
    names = NameFilter(config.allow, config.deny)
    return Source(upstream, None if keys is None else Keyring(keys), names)


async def _credentials(auth: Auth | None) -> Credentials:
    match auth:
        case None:
            return anonymous
        case BearerAuth(token):
            return bearer(parse_token((await _text(token)).strip()).text)
        case BasicAuth(user, password):
            return basic(user, parse_password((await _text(password)).rstrip("\r\n")).text)
        case NetrcAuth(path):
            return from_netrc(path)


async def _text(secret: Secret | Path) -> str:
    if isinstance(secret, Secret):
        return secret.text
    async with aiofiles.open(secret, encoding="utf-8") as file:
        return await file.read()
