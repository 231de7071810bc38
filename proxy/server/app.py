"""Answer requests: from resource to answer, and from error to status.

What Nix makes of a status decides which one it gets. 404 is "ask the next cache"; a 5xx, a 401 or a 429 on
a narinfo aborts the build or makes it wait. So 404 it is for everything that cannot be had, unless the
operator asked to be told (``policy.upstream_down = "error"``). Once a byte of a body has been sent there is
no status left to say: the connection is cut, so that nobody takes a part for the whole.
"""

from __future__ import annotations

import contextlib
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from aiohttp import HttpVersion11, web

from proxy import errors
from proxy.answers import Content
from proxy.errors import DamagedError, ProxyError, RangeError
from proxy.events import Fault, Observer, RequestServed, Result
from proxy.nix import resource
from proxy.nix.cache_info import CacheInfo
from proxy.nix.nar_name import NarName
from proxy.nix.resource import CacheInfoFile, ForeignNar, NarFile, NarinfoFile, SideFile
from proxy.server.backend import Audience, Cache, Operations
from proxy.server.body import Delivery
from proxy.server.connection import Connection
from proxy.server.fastlane import FastLane
from proxy.server.headers import NAR_TYPE, SOFTWARE, file_headers, is_had, narinfo_headers
from proxy.server.outflow import ClientGoneError, Outflow
from proxy.server.page import render
from proxy.server.ranges import ByteRange, Span
from proxy.store.files import OpenFile

NOT_HERE = 404
NEVER = 500

STATUSES: Mapping[type[ProxyError], int] = {
    errors.ProxyError: NEVER,
    errors.ParseError: NEVER,
    errors.ConfigError: NEVER,
    errors.ListenError: NEVER,
    errors.StoreLockedError: NEVER,
    errors.CommandError: NEVER,
    errors.NotRunningError: NEVER,
    errors.RequestError: 400,
    errors.RangeError: 416,
    errors.NotFoundError: NOT_HERE,
    errors.OfflineError: NOT_HERE,
    errors.TrustError: NOT_HERE,
    errors.SignatureError: NOT_HERE,
    errors.WrongPathError: NOT_HERE,
    errors.HashMismatchError: NOT_HERE,
    errors.SizeMismatchError: NOT_HERE,
    errors.DecodeError: NOT_HERE,
    errors.DecodeMemoryError: NOT_HERE,
    errors.UnverifiableError: NOT_HERE,
    errors.UpstreamError: NOT_HERE,
    errors.UpstreamUnavailableError: NOT_HERE,
    errors.UpstreamBrokeOffError: NOT_HERE,
    errors.UpstreamBusyError: NOT_HERE,
    errors.UpstreamSkippedError: NOT_HERE,
    errors.UpstreamTimeoutError: NOT_HERE,
    errors.UpstreamDeniedError: NOT_HERE,
    errors.UpstreamProtocolError: NOT_HERE,
    errors.UpstreamLiedError: NOT_HERE,
    errors.StoreError: NOT_HERE,
    errors.DamagedError: NOT_HERE,
}
"""Every error, and what a client gets; `NEVER` marks those that are raised only where no client is."""

UNKNOWN = (errors.UpstreamError, errors.TrustError, errors.StoreError)
"""Errors that do not mean "nobody has it"; ``upstream_down = "error"`` tells clients so, with 502."""

READ_ROUTES = frozenset({"narinfo", "nar", "file"})
"""Routes on which Nix takes a 5xx for a reason to give up."""

Route = Literal["page", "metrics", "health", "cache_info", "narinfo", "nar", "file", "other"]


class Server:
    """The request handler of the daemon.

    Args:
        cache: Where answers come from.
        prefetch: Told what clients ask for.
        cache_info: What ``nix-cache-info`` says.
        observer: Told of every answer.
        operations: What operators are told.
    """

    def __init__(
        self,
        cache: Cache,
        *,
        prefetch: Audience,
        cache_info: CacheInfo,
        observer: Observer,
        operations: Operations,
    ) -> None:
        self._cache = cache
        self._cache_info = cache_info.format()
        self.observer = observer
        self.prefetch = prefetch
        self.lane = FastLane(cache, observer, prefetch)
        self._operations = operations
        self.strict = False
        """Answer 502 instead of 404 when an upstream failed and nobody has the path."""
        self.draining = False
        """Stop keeping connections open; the daemon is about to stop."""

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        """Answer a request, whatever happens."""
        began = time.monotonic()
        outcome = _Outcome()
        try:
            response = await self._answer(request, outcome)
        except ProxyError as error:
            response = self._refusal(error)
        except Exception:  # noqa: BLE001  # a fault of ours has to be found, and must not stop Nix
            self.observer(Fault(f"{request.method} {request.raw_path}", traceback.format_exc()))
            status = NOT_HERE if outcome.route in READ_ROUTES else NEVER
            response = _text(status, "something went wrong")
        if not response.prepared:
            response.headers["Server"] = SOFTWARE
            if self.draining:
                response.force_close()
        if isinstance(response, web.Response) and request.method != "HEAD":
            outcome.body_bytes = len(response.body) if isinstance(response.body, bytes) else 0
        self.observer(
            RequestServed(
                route=outcome.route,
                method=request.method,
                code=response.status,
                result=outcome.result,
                body_bytes=outcome.body_bytes,
                complete=outcome.complete,
                seconds=time.monotonic() - began,
            )
        )
        return response

    def refuse(self, status: int) -> web.Response:
        """Answer what never became a request: no HTTP, or too much of it."""
        words = "this is not an HTTP request" if status < NEVER else "something went wrong"
        self.observer(
            RequestServed("other", "other", status, "", len(words), complete=True, seconds=0.0)
        )
        response = _text(status, words, {"Server": SOFTWARE})
        response.force_close()
        return response

    async def _answer(self, request: web.BaseRequest, outcome: _Outcome) -> web.StreamResponse:
        if request.method not in ("GET", "HEAD"):
            response = _text(405, "this cache is read-only", {"Allow": "GET, HEAD"})
            response.force_close()  # a body may follow, and nobody reads it
            return response
        wanted = ByteRange.parse(request.headers.get("Range", ""))
        if request.method == "HEAD":
            wanted = None  # RFC 9110 §14.2: ranges are for GET
        plain, _, _ = request.raw_path.partition("?")
        match plain:
            case "/":
                outcome.route = "page"
                return await self._page(request)
            case "/metrics":
                outcome.route = "metrics"
                self.lane.flush()
                body, content_type = await self._operations.metrics()
                return web.Response(body=body, headers={"Content-Type": content_type})
            case "/healthz":
                outcome.route = "health"
                return _text(200, "ok")
            case "/readyz":
                outcome.route = "health"
                return await self._readiness()
            case _:
                return await self._resource(request, wanted, outcome)

    async def _resource(
        self, request: web.BaseRequest, wanted: ByteRange | None, outcome: _Outcome
    ) -> web.StreamResponse:
        is_head = request.method == "HEAD"
        match resource.parse(request.raw_path):
            case CacheInfoFile():
                outcome.route = "cache_info"
                return web.Response(body=self._cache_info, content_type="text/x-nix-cache-info")
            case NarinfoFile(hash_part):
                outcome.route = "narinfo"
                text = await self._cache.narinfo(hash_part)
                outcome.result = text.result
                self.lane.used_path(hash_part)
                self.prefetch.asked_path(_client_of(request), hash_part)
                headers = narinfo_headers(text.result, text.upstream)
                return web.Response(body=text.body, headers=headers)
            case NarFile(name):
                outcome.route = "nar"
                if not is_head:
                    self.prefetch.asked_nar(_client_of(request))
                    if unchanged := await self._not_modified(request, outcome, name):
                        return unchanged
                nar = await (self._cache.nar_head(name) if is_head else self._cache.nar(name))
                with nar:
                    response = await self._deliver(request, outcome, nar, NAR_TYPE, wanted)
                    if outcome.damage and isinstance(nar.file, OpenFile):
                        self._cache.damaged(name, outcome.damage)
                    elif outcome.complete and outcome.body_bytes == nar.size:
                        self.lane.keep(request.raw_path, name, nar)
                    return response
            case ForeignNar(reference):
                outcome.route = "nar"
                pass_on = self._cache.foreign_nar_head if is_head else self._cache.foreign_nar
                with await pass_on(reference) as nar:
                    return await self._deliver(request, outcome, nar, NAR_TYPE, wanted)
            case SideFile(path, content_type):
                outcome.route = "file"
                with await self._cache.file(path) as file:
                    return await self._deliver(request, outcome, file, content_type, wanted)

    async def _not_modified(
        self, request: web.BaseRequest, outcome: _Outcome, name: NarName
    ) -> web.Response | None:
        """Answer who has a NAR already, without fetching it for that."""
        condition = _condition_of(request)
        if condition:
            with contextlib.suppress(ProxyError), await self._cache.nar_head(name) as nar:
                if is_had(nar.etag, condition):
                    outcome.result = nar.result
                    headers = file_headers(NAR_TYPE, nar.etag, nar.result, nar.upstream)
                    return web.Response(status=304, headers=headers)
        return None

    async def _deliver(
        self,
        request: web.BaseRequest,
        outcome: _Outcome,
        content: Content,
        content_type: str,
        wanted: ByteRange | None,
    ) -> web.StreamResponse:
        """Send a file, or the wanted part of it, or only its headers."""
        outcome.result = content.result
        headers = file_headers(content_type, content.etag, content.result, content.upstream)
        if is_had(content.etag, _condition_of(request)):
            return web.Response(status=304, headers=headers)
        response = web.StreamResponse(headers=headers)
        if self.draining:
            response.force_close()
        if request.headers.get("If-Range", content.etag) != content.etag:
            wanted = None  # the client has a part of something else
        if content.file is not None and (wanted is not None or request.version < HttpVersion11):
            await content.file.size_known()
        span = _span(response, wanted, content.size)
        if content.file is not None and request.method != "HEAD":
            if span is None:
                response.enable_chunked_encoding()
            delivery = Delivery(request, response, content.file, _outflow_of(request))
            await self._send(delivery, span, outcome)
        return response

    async def _send(self, delivery: Delivery, span: Span | None, outcome: _Outcome) -> None:
        """Send a body, and cut the connection when it cannot be completed."""
        try:
            await delivery.run(span)
        except (ClientGoneError, ProxyError) as error:
            outcome.complete = False
            outcome.damage = str(error) if isinstance(error, DamagedError) else ""
            delivery.cut()
        except BaseException:
            outcome.complete = False
            delivery.cut()
            raise
        finally:
            outcome.body_bytes = delivery.sent

    def _refusal(self, error: ProxyError) -> web.Response:
        status = STATUSES[type(error)]
        if self.strict and isinstance(error, UNKNOWN):
            status = 502
        headers = (
            {"Content-Range": f"bytes */{error.size}"} if isinstance(error, RangeError) else {}
        )
        # What clients see is about their request; what is wrong with upstreams or disk is in the log.
        private = isinstance(error, UNKNOWN) or status == NEVER
        return _text(status, "it could not be fetched" if private else str(error), headers)

    async def _page(self, request: web.BaseRequest) -> web.Response:
        page = render(await self._operations.facts(), request.headers.get("Host"))
        return web.Response(text=page, content_type="text/html")

    async def _readiness(self) -> web.Response:
        """Tell whether we serve. We do so without a disk, too, and an operator has to know."""
        if self.draining:
            return _text(503, "stopping")
        reason = await self._operations.check_store()
        return _text(200, f"ready, but not keeping: {reason}" if reason else "ready")


@dataclass(slots=True)
class _Outcome:
    """What is to be told of a request besides its status."""

    route: Route = "other"
    result: Result | Literal[""] = ""
    body_bytes: int = 0
    complete: bool = True
    damage: str = ""


def _condition_of(request: web.BaseRequest) -> str:
    return ", ".join(request.headers.getall("If-None-Match", ()))


def _span(response: web.StreamResponse, wanted: ByteRange | None, size: int | None) -> Span | None:
    """Find out what part of a file to send, and say so in the headers; None for all, however much."""
    if size is None:
        return None
    span = Span(0, size)
    if wanted is not None:
        span = wanted.of(size)
        response.set_status(206)
        response.headers["Content-Range"] = f"bytes {span.start}-{span.stop - 1}/{size}"
    response.content_length = span.stop - span.start
    return span


def _client_of(request: web.BaseRequest) -> str:
    """Name the client as its connection does."""
    protocol = request.protocol
    return protocol.client if isinstance(protocol, Connection) else ""


def _outflow_of(request: web.BaseRequest) -> Outflow:
    protocol = request.protocol
    if not isinstance(protocol, Connection):
        raise TypeError(f"a connection that is not ours: {protocol!r}")
    return protocol.outflow


def _text(status: int, text: str, headers: Mapping[str, str] | None = None) -> web.Response:
    return web.Response(status=status, text=f"{text}\n", headers=headers)
