"""One remote binary cache over HTTP.

Rules:

- URLs go out as they came in: nothing is decoded, normalised or encoded again (`yarl.URL(encoded=True)`),
  because an upstream may sign, query or file by every byte of them.
- A NAR's bytes arrive as the upstream sends them: no content coding is asked for, and none is accepted.
- Redirects are followed here, not by the client: at most 5, never from https to http, and the upstream's
  credentials stay with its own origin.
- 404 and 410 mean absent (`NotFoundError`). Whatever else is not the answer that was asked for is an
  `UpstreamError`: we do not know.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import urllib.parse
import urllib.request
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import yarl

from proxy.errors import (
    NotFoundError,
    ParseError,
    StoreError,
    UpstreamBusyError,
    UpstreamDeniedError,
    UpstreamProtocolError,
    UpstreamSkippedError,
    UpstreamUnavailableError,
)
from proxy.nix import narinfo
from proxy.nix.narinfo import NarInfo
from proxy.nix.store_path import HashPart
from proxy.upstream.answer import Body, drain, retry_after, translated
from proxy.upstream.breaker import Breaker
from proxy.upstream.carriage import OK, PAGE, Cargo, Carrier, Head, Order
from proxy.upstream.credentials import Credentials, anonymous
from proxy.upstream.reference import resolved
from proxy.upstream.session import HEADERS, session
from proxy.upstream.slots import Slots

MAX_REDIRECTS = 5

MAX_NARINFO = 4 * 2**20
"""Bytes; a path with 10,000 references has a narinfo of about 600 kB."""

NAR_SHARE = 0.5
"""Part of an upstream's connections that NARs may take, so that a narinfo never waits for a NAR."""

SLOT_TIMEOUT = 240.0
"""Seconds to wait for a connection; Nix gives up a download after 300 s without a byte."""

_PARTIAL = 206
_SERVER_ERRORS = 500
_ABSENT = {404, 410}
_DENIED = {401, 403, 407}
_NOT_THAT_WAY = 405
_REDIRECTS = {301, 302, 303, 307, 308}
_BUSY = {408, 429}
_SCHEMES_AFTER = {"https": ("https",), "http": ("http", "https")}
_PLAIN_URL = re.compile(r"[!-~]+")
_SIMPLE = re.compile(r"[\w+=-][\w.+=-]*(?:/[\w+=-][\w.+=-]*)*", re.ASCII)
"""A reference that there is nothing to resolve in, as nearly all are: no dots, scheme, authority or query."""


class Upstream:
    """A remote binary cache. Made inside of a running event loop; closed with `close`.

    Args:
        name: The configured name; a word.
        url: Where it is, without a trailing slash: ``https://cache.nixos.org``.
        connect_timeout: Seconds to connect.
        read_timeout: Seconds without a byte after which an answer is given up.
        max_connections: Connections open at once.
        credentials: Who we are to it.
        ca_file: Certificates to trust instead of the system's.
        carrier: Another process that may ask it, too.

    Raises:
        OSError: ``ca_file`` cannot be read or holds no certificate.
    """

    def __init__(
        self,
        name: str,
        url: str,
        *,
        connect_timeout: float = 5.0,
        read_timeout: float = 30.0,
        max_connections: int = 32,
        credentials: Credentials = anonymous,
        ca_file: Path | None = None,
        carrier: Carrier | None = None,
    ) -> None:
        self.name = name
        self.url = url
        self.carrier = carrier
        self.breaker = Breaker()
        """Whether it may be asked: `proxy.asking` obeys."""
        self._origin = yarl.URL(url).origin()
        self._own = f"{self._origin}/"
        self._credentials = credentials
        self._proxies = urllib.request.getproxies()
        self._own_way = self._way_to(yarl.URL(url))
        self._header_timeout = connect_timeout + read_timeout
        self._slots = Slots(max_connections)
        self._nar_slots = Slots(max(1, int(max_connections * NAR_SHARE)))
        self._ca_file = None if ca_file is None else str(ca_file)
        self._timeouts = connect_timeout, read_timeout
        self._session = session(
            ca_file=self._ca_file,
            connect_timeout=connect_timeout,
            read_timeout=read_timeout,
            max_connections=max_connections,
        )

    def __repr__(self) -> str:
        return f"<Upstream {self.name} {self.url}>"

    async def close(self) -> None:
        """Drop all connections."""
        await self._session.close()

    async def narinfo(self, hash_part: HashPart) -> tuple[NarInfo, bytes]:
        """Ask for a narinfo; return it parsed, and its text.

        Raises:
            NotFoundError: The upstream does not have the path.
            UpstreamProtocolError: What came is not a narinfo.
            UpstreamError: Anything else went wrong.
        """
        url = f"{self.url}/{hash_part}.narinfo"
        async with self._slot(self._slots), self._request("GET", url, {}) as response:
            text = await Body(self.name, response).read_decoded(MAX_NARINFO)
        try:
            return narinfo.parse(text), text
        except ParseError as error:
            raise UpstreamProtocolError(self.name, f"not a narinfo: {error}") from error

    @contextlib.asynccontextmanager
    async def file(self, path: str) -> AsyncIterator[Body]:
        """Open another file (log, listing, realisation, …); it may have a content coding.

        Raises:
            NotFoundError: The upstream does not have it.
            UpstreamError: Anything else went wrong.
        """
        headers = {"Accept-Encoding": "zstd, br, gzip"}
        url = f"{self.url}/{path}"
        async with self._slot(self._slots), self._request("GET", url, headers) as response:
            self._refuse_page(response)
            yield Body(self.name, response)

    @contextlib.asynccontextmanager
    async def nar(
        self, reference: str, headers: Mapping[str, str] | None = None
    ) -> AsyncIterator[Body]:
        """Open a NAR by the URL of its narinfo: relative to the upstream, or absolute.

        Args:
            reference: The URL.
            headers: Those of `proxy.upstream.resume.headers`, to get the rest of it.

        Raises:
            NotFoundError: It is not there.
            UpstreamError: Anything else went wrong; also while the body is read.
        """
        url = self.resolve(reference)
        async with (
            self._slot(self._nar_slots),
            self._slot(self._slots),
            self._request("GET", url, dict(headers or {})) as response,
        ):
            self._refuse_page(response)
            self._refuse_coding(response)
            yield Body(self.name, response)

    async def carry(self, reference: str, cargo: Cargo, is_wanted: Callable[[], bool]) -> None:
        """Have a NAR put where it belongs, verified, by another process.

        Args:
            reference: The URL of its narinfo, as for `nar`.
            cargo: What it has to be, and where it goes.
            is_wanted: Tells, when there is a connection for it, whether it is still wanted in that way.

        Raises:
            NotFoundError: It is not there.
            UpstreamError: Anything else went wrong.
            TrustError: What came is not what it has to be.
            StoreError: It could not be written, is not wanted any more, or the carrier is gone.
        """
        if self.carrier is None:
            raise StoreError("nobody carries anything")
        url = self.resolve(reference)
        async with self._slot(self._nar_slots), self._slot(self._slots):
            if not is_wanted():
                raise StoreError("somebody waits for its beginning")
            for _ in range(MAX_REDIRECTS + 1):
                head = await self.carrier.carry(self._order(url), cargo)
                if head.status not in _REDIRECTS:
                    self._check_status(head)
                    self._refuse_page(head)
                    self._refuse_coding(head)
                    return
                url = self._step(url, head.headers.get("Location", ""))
        raise UpstreamProtocolError(self.name, f"more than {MAX_REDIRECTS} redirects")

    def _order(self, url: str) -> Order:
        way = self._way(url)
        headers = {**HEADERS, **way.headers}
        return Order(self.name, url, headers, way.proxy, self._ca_file, *self._timeouts)

    async def nar_size(self, reference: str) -> int | None:
        """Ask how many bytes a NAR has without fetching it; None when the upstream does not say.

        Raises:
            NotFoundError: It is not there.
            UpstreamError: Anything else went wrong.
        """
        url = self.resolve(reference)
        async with self._slot(self._slots), self._request("HEAD", url, {}) as response:
            self._refuse_page(response)
            self._refuse_coding(response)
            return response.content_length

    def resolve(self, reference: str) -> str:
        """Make the URL of a narinfo absolute (RFC 3986 §5, as Nix ≥ 2.32 does).

        Raises:
            UpstreamProtocolError: It is no http(s) URL, or would give up TLS.
        """
        if _SIMPLE.fullmatch(reference):
            return f"{self.url}/{reference}"
        return self._step(f"{self.url}/", reference)

    def _step(self, base: str, reference: str) -> str:
        """Resolve a reference or a redirect against where it was found."""
        if not _PLAIN_URL.fullmatch(reference):
            raise UpstreamProtocolError(self.name, "a URL that is empty or not in plain ASCII")
        try:
            url = resolved(base, reference)
            host = yarl.URL(url, encoded=True).host
        except ValueError as error:  # what yarl says quotes the URL, which may hold a secret
            raise UpstreamProtocolError(self.name, "a URL that is none") from error
        scheme = url.partition(":")[0]
        if not host or scheme not in _SCHEMES_AFTER[base.partition(":")[0]]:
            raise UpstreamProtocolError(self.name, f"a URL that leads to {scheme[:10]!r}")
        return url

    @contextlib.asynccontextmanager
    async def _request(
        self, method: str, url: str, headers: dict[str, str]
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """Send a request, follow redirects, and yield the answer: a 200, or a 206 to a Range."""
        for _ in range(MAX_REDIRECTS + 1):
            with translated(self.name):
                async with asyncio.timeout(self._header_timeout):
                    response = await self._send(method, url, headers)
            try:
                if response.status not in (OK, _PARTIAL):
                    await drain(response)
                if response.status not in _REDIRECTS:
                    if response.status != _PARTIAL or "Range" not in headers:
                        self._check_status(response)
                    yield response
                    return
                url = self._step(url, response.headers.get("Location", ""))
            finally:
                response.release()
        raise UpstreamProtocolError(self.name, f"more than {MAX_REDIRECTS} redirects")

    async def _send(self, method: str, url: str, headers: dict[str, str]) -> aiohttp.ClientResponse:
        if self._session.closed:
            raise UpstreamUnavailableError(self.name, "it is not configured any more")
        way = self._way(url)
        return await self._session.request(
            method,
            yarl.URL(url, encoded=True),
            headers={**headers, **way.headers},
            allow_redirects=False,
            proxy=way.proxy,
        )

    def _way(self, url: str) -> _Way:
        """Find out how to ask under a URL; nearly all are the upstream's own, which begin alike."""
        return (
            self._own_way
            if url.startswith(self._own)
            else self._way_to(yarl.URL(url, encoded=True))
        )

    def _way_to(self, target: yarl.URL) -> _Way:
        host = (target.host or "").lower()
        authorization = self._credentials(host, target.origin() == self._origin)
        headers = {} if authorization is None else {"Authorization": authorization}
        return _Way(headers, self._forward_proxy(target))

    def _forward_proxy(self, url: yarl.URL) -> str | None:
        """Return the proxy that the environment wants for a URL (``https_proxy``, ``no_proxy``, …)."""
        proxy = self._proxies.get(url.scheme)
        if proxy is None or urllib.request.proxy_bypass(f"{url.host}:{url.port}"):
            return None
        return proxy if "://" in proxy else f"http://{proxy}"  # as curl reads it

    def _check_status(self, response: Head) -> None:
        status = response.status
        if status == OK:
            return
        if status in _ABSENT:
            raise NotFoundError(f"{self.name} answered {status}")
        if status == _NOT_THAT_WAY:
            raise UpstreamDeniedError(self.name, f"answered {status}")
        if status in _DENIED:
            raise UpstreamDeniedError(self.name, f"answered {status}; are its credentials right?")
        if status in _BUSY or status >= _SERVER_ERRORS:
            wait = retry_after(response)
            raise UpstreamBusyError(self.name, f"answered {status}", wait)
        raise UpstreamProtocolError(self.name, f"answered {status}")

    def _refuse_page(self, response: Head) -> None:
        """A page, of a login or of maintenance, is no file of a binary cache, whatever its status."""
        if response.content_type == PAGE:
            raise UpstreamProtocolError(self.name, "sent a page of HTML")

    def _refuse_coding(self, response: Head) -> None:
        """A NAR with a content coding has neither the FileHash nor the size of its narinfo."""
        coding = response.headers.get("Content-Encoding", "identity")
        if coding != "identity":
            raise UpstreamProtocolError(self.name, f"sent a NAR with Content-Encoding {coding!r}")

    def _slot(self, slots: Slots) -> _Slot:
        return _Slot(slots, self.name)


@dataclass(frozen=True, slots=True)
class _Way:
    """Who we are to whoever answers under a URL, and the forward proxy in between."""

    headers: dict[str, str]
    proxy: str | None


class _Slot:
    """A slot, for ``async with``.

    Raises:
        UpstreamSkippedError: There was none in time.
    """

    __slots__ = ("_slots", "_upstream")

    def __init__(self, slots: Slots, upstream: str) -> None:
        self._slots = slots
        self._upstream = upstream

    async def __aenter__(self) -> None:
        if self._slots.take_free():
            return
        try:
            async with asyncio.timeout(SLOT_TIMEOUT):
                await self._slots.take()
        except TimeoutError as error:
            raise UpstreamSkippedError(self._upstream, "all its connections are busy") from error

    async def __aexit__(self, *_: object) -> None:
        self._slots.give_back()
