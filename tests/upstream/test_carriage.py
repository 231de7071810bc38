"""An upstream whose files the porter fetches: every decision is still the daemon's."""

from __future__ import annotations

import ssl
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path

import pytest

from proxy.errors import (
    NotFoundError,
    ProxyError,
    UpstreamBusyError,
    UpstreamProtocolError,
    UpstreamUnavailableError,
)
from proxy.nix.hashes import Hash
from proxy.upstream.carriage import Cargo
from proxy.upstream.credentials import bearer
from proxy.upstream.remote import MAX_REDIRECTS, Upstream
from tests.closures import SCHEMES, StoreEntry
from tests.conftest import StartSimulator
from tests.faults import Redirect, Status
from tests.porters import WatchedPorter
from tests.simulator import BinaryCacheSimulator
from tests.upstream.conftest import OpenUpstream
from tests.upstream.servers import Authority, ForwardProxy, forwards_to, serving

ENTRY = StoreEntry.make("hello-1.0", b"hello\n" * 5_000)
FILE = bytes(ENTRY.file)
TOKEN = "Bearer token"


class Carried:
    """A porter, and a place for what it brings.

    Args:
        porter: It is at hand.
        landing: The place.
    """

    def __init__(self, porter: WatchedPorter, landing: Path) -> None:
        self.porter = porter
        self._landing = landing

    async def by(self, upstream: Upstream, reference: str = ENTRY.nar_path) -> bytes:
        """Have the file of `ENTRY` carried, and return it."""
        nar_hash, file_hash = (Hash("sha256", blob.sha256) for blob in (ENTRY.nar, ENTRY.file))
        where, size, nar_size = str(self._landing), len(FILE), len(ENTRY.nar)
        cargo = Cargo(where, size, ENTRY.compression, nar_hash, nar_size, file_hash)
        try:
            upstream.carrier = self.porter
            await upstream.carry(reference, cargo, lambda: True)
        except ProxyError:
            assert not self._is_there()
            raise
        return self._taken()

    async def fails(self, error: type[ProxyError], upstream: Upstream) -> ProxyError:
        """See that nothing is brought, and return why."""
        with pytest.raises(error) as caught:
            await self.by(upstream)
        assert type(caught.value) is error
        return caught.value

    def _is_there(self) -> bool:
        return self._landing.exists()

    def _taken(self) -> bytes:
        data = self._landing.read_bytes()
        self._landing.unlink()
        return data


@pytest.fixture
async def carried(tmp_path: Path) -> AsyncIterator[Carried]:
    """Return what asks upstreams by a porter."""
    async with aclosing(WatchedPorter()) as porter:
        await porter.ready()
        yield Carried(porter, tmp_path / "landing")


def authorizations(cache: BinaryCacheSimulator) -> list[str | None]:
    """Return who we said we are, with each request."""
    return [request.headers.get("Authorization") for request in cache.requests]


@pytest.mark.parametrize("scheme", SCHEMES)
async def test_every_url(
    scheme: str,
    sim: StartSimulator,
    upstream: OpenUpstream,
    carried: Carried,
) -> None:
    """URLs of every form go out byte by byte as the narinfo has them, in the same words as ever."""
    entry = ENTRY.but(scheme=scheme)
    cache = await sim(entry, prefix="/cache")
    asked = upstream(cache.url)
    reference = entry.url(cache.url)
    if scheme == "rooted":
        reference = f"/cache{reference}"
    assert await carried.by(asked, reference) == FILE
    async with asked.nar(reference) as body:
        while await body.read():
            pass
    theirs, ours = cache.requests
    assert theirs == ours


@pytest.mark.parametrize("code", [301, 302, 303, 307, 308])
async def test_redirect(
    code: int, sim: StartSimulator, upstream: OpenUpstream, carried: Carried
) -> None:
    """A redirect to another host is followed, and our credentials stay where they belong."""
    cache, other = await sim(), await sim(ENTRY)
    cache.require_auth = TOKEN
    cache.fault("/nar/", Redirect(f"/elsewhere{ENTRY.nar_path}", code))
    cache.fault("/elsewhere/", Redirect(f"{other.url}{ENTRY.nar_path}", code))
    asked = upstream(cache.url, credentials=bearer("token"))
    assert await carried.by(asked) == FILE
    assert authorizations(cache) == [TOKEN, TOKEN]
    assert authorizations(other) == [None]
    assert [heading.status for heading in carried.porter.headings] == [code, code, 200]


async def test_credentials_of_two(
    sim: StartSimulator, upstream: OpenUpstream, carried: Carried
) -> None:
    """Two upstreams whose files one process fetches are each told who we are to them, and no more."""
    first, second, third = await sim(ENTRY), await sim(ENTRY), await sim(ENTRY)
    caches = (first, second, third)
    upstreams = [
        upstream(first.url, credentials=bearer("one")),
        upstream(second.url, credentials=bearer("two")),
        upstream(third.url),
    ]
    for asked in (*upstreams, *upstreams):
        assert await carried.by(asked) == FILE
    assert list(map(authorizations, caches)) == [["Bearer one"] * 2, ["Bearer two"] * 2, [None] * 2]


async def test_redirect_limit(
    sim: StartSimulator, upstream: OpenUpstream, carried: Carried
) -> None:
    """Five redirects are followed, and no sixth."""
    cache = await sim(ENTRY)
    cache.fault("/nar/", Redirect(f"{ENTRY.nar_path}?again"), times=MAX_REDIRECTS)
    cache.files[f"{ENTRY.nar_path}?again"] = cache.files[ENTRY.nar_path]
    assert await carried.by(upstream(cache.url)) == FILE
    cache.heal()
    cache.reset_counts()
    cache.fault("/nar/", Redirect(f"{ENTRY.nar_path}?again"))
    error = await carried.fails(UpstreamProtocolError, upstream(cache.url))
    assert "redirects" in str(error)
    assert len(cache.requests) == MAX_REDIRECTS + 1


async def test_what_it_asks_for(
    sim: StartSimulator, upstream: OpenUpstream, carried: Carried
) -> None:
    """How long an upstream wants to be left alone is heard in the daemon, too."""
    cache = await sim(ENTRY)
    cache.fault("/nar/", Status(503, headers={"Retry-After": "17"}))
    error = await carried.fails(UpstreamBusyError, upstream(cache.url))
    assert isinstance(error, UpstreamBusyError)
    assert error.retry_after == 17
    cache.withdraw(ENTRY)
    cache.heal()
    await carried.fails(NotFoundError, upstream(cache.url))


async def test_tls(
    authority: Authority,
    tls: ssl.SSLContext,
    sim: StartSimulator,
    upstream: OpenUpstream,
    carried: Carried,
) -> None:
    """Who is vouched for by ``ca_file`` is asked, nobody else, and nothing leads from https to http."""
    cache = await sim(ENTRY)
    async with serving(forwards_to(cache.port), tls) as port:
        url = f"https://127.0.0.1:{port}"
        trusting = upstream(url, ca_file=authority.certificate)
        assert await carried.by(trusting) == FILE
        await carried.fails(UpstreamUnavailableError, upstream(url))
        assert len(cache.requests) == 1
        other = await sim(ENTRY)
        cache.fault("/nar/", Redirect(f"{other.url}{ENTRY.nar_path}"))
        error = await carried.fails(UpstreamProtocolError, trusting)
        assert "leads to 'http'" in str(error)
        assert other.requests == []


async def test_forward_proxy(
    sim: StartSimulator,
    upstream: OpenUpstream,
    carried: Carried,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The forward proxy that the environment names is used for what is carried, too."""
    cache = await sim(ENTRY)
    forward = ForwardProxy()
    async with serving(forward.answer) as port:
        monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{port}")
        assert await carried.by(upstream(cache.url)) == FILE
    assert forward.targets == [f"{cache.url}{ENTRY.nar_path}"]
