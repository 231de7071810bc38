"""The proxy in the test's own event loop: real store, upstreams, cache and server, on loopback.

For what a test wants to see from inside (events, the store, the clock). What a user sees is tested
with `tests.daemon.DaemonProcess`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

import aiohttp
import yarl

from proxy.cache import Cache
from proxy.events import Event
from proxy.failover import Failover, Source
from proxy.nix.cache_info import CacheInfo
from proxy.nix.signature import Keyring, PublicKey
from proxy.porter.porter import Porter
from proxy.prefetch import LookAhead, Prefetch
from proxy.server.app import Server
from proxy.server.listening import listening
from proxy.server.page import Facts
from proxy.store.eviction import UNLIMITED, Limits
from proxy.store.folder import Store
from proxy.store.publisher import Publisher
from proxy.upstream.credentials import Credentials, anonymous
from proxy.upstream.names import NameFilter
from proxy.upstream.remote import Upstream

E = TypeVar("E", bound=Event)

PATIENCE = 20.0
"""Seconds after which nothing is waited for any more."""


@dataclass(frozen=True, slots=True)
class Received:
    """What a client got: the body as far as it came, and whether that was all."""

    status: int
    headers: Mapping[str, str]
    body: bytes
    complete: bool


class Clock:
    """A clock that goes when it is told to."""

    def __init__(self) -> None:
        self.now = 1_000.0

    def __call__(self) -> float:
        """Return the seconds so far."""
        return self.now


class _Events(list[Event]):
    """What was observed; whoever waits is woken by each event."""

    def __init__(self, events: Iterable[Event] = ()) -> None:
        super().__init__(events)
        self._more = asyncio.Event()

    def append(self, event: Event) -> None:
        super().append(event)
        self._more.set()
        self._more = asyncio.Event()

    async def more(self) -> None:
        """Wait for the next event."""
        await self._more.wait()


NO_LOOK_AHEAD = LookAhead(narinfos=False, nars=False)
"""What most tests want: nothing is asked of an upstream but what a client asked for."""


class InsideProxy:
    """A proxy in this event loop, for ``async with``.

    Attributes:
        url: Where it listens, while it runs.
        events: Everything that was observed, oldest first.
        store: The open store.
        cache: The cache.
        server: The request handler.
        clock: What negative answers age by, and how long upstreams that fail are left alone.
    """

    def __init__(
        self,
        folder: Path,
        *upstreams: str,
        keys: Sequence[str] = (),
        trust: bool = True,
        budget: float = 8.0,
        connect_timeout: float = 5.0,
        read_timeout: float = 30.0,
        negative_ttl: float = 60.0,
        strict: bool = False,
        credentials: Credentials = anonymous,
        look_ahead: LookAhead = NO_LOOK_AHEAD,
        limits: Limits = UNLIMITED,
        max_connections: int = 32,
        names: Sequence[NameFilter] = (),
        porter: Porter | None = None,
    ) -> None:
        """Take URLs, the most preferred first; ``trust=False`` believes them unsigned.

        A ``porter`` is closed by whoever made it, when this has stopped.
        """
        self.folder = folder
        self.events = _Events()
        self.clock = Clock()
        self.url = ""
        self._upstreams = upstreams
        self._keyring = Keyring([PublicKey.parse(key) for key in keys]) if trust else None
        self._budget = budget
        self._timeouts = (connect_timeout, read_timeout)
        self._negative_ttl = negative_ttl
        self._strict = strict
        self._credentials = credentials
        self._look_ahead = look_ahead
        self._limits = limits
        self._max_connections = max_connections
        self._names = names
        self._porter = porter

    async def start(self) -> Self:
        """Open the store and serve."""
        cache_info = CacheInfo()
        publisher = Publisher if self._porter is None else self._porter.publisher
        self.store = Store(self.folder, cache_info, self.observe, self._limits, publisher)
        self.failover = self.make_failover(*self._upstreams)
        self.cache = Cache(
            self.store,
            self.failover,
            negative_ttl=self._negative_ttl,
            observer=self.observe,
            clock=self.clock,
        )
        self.prefetch = Prefetch(self.cache, self._look_ahead)
        self.server = Server(
            self.cache,
            prefetch=self.prefetch,
            cache_info=cache_info,
            observer=self.observe,
            operations=self,
        )
        self.server.strict = self._strict
        self._listening = listening(
            self.server, [("127.0.0.1", 0)], shutdown_timeout=1.0, linger=0.0
        )
        (address,) = await self._listening.__aenter__()
        self.url = f"http://{address}"
        self.session = aiohttp.ClientSession(auto_decompress=False)
        return self

    async def stop(self) -> None:
        """Stop serving and close the store."""
        await self.session.close()
        await self._listening.__aexit__(None, None, None)
        await self.prefetch.close()
        await self.cache.close()
        await self.failover.close()
        await self.store.close()

    def observe(self, event: Event) -> None:
        """Take an event: an `proxy.events.Observer`."""
        self.events.append(event)

    async def facts(self) -> Facts:
        """Return what the page says."""
        return Facts(list(self._upstreams), [], 0, 0, "test")

    async def metrics(self) -> tuple[bytes, str]:
        """Return no metrics."""
        return b"# none\n", "text/plain"

    async def check_store(self) -> str:
        """Return what the store says."""
        return await self.store.check()

    def make_failover(self, *upstreams: str) -> Failover:
        """Make upstreams named ``up0``, ``up1`` and so on."""
        connect, read = self._timeouts
        return Failover(
            [
                Source(
                    Upstream(
                        f"up{number}",
                        url,
                        connect_timeout=connect,
                        read_timeout=read,
                        max_connections=self._max_connections,
                        credentials=self._credentials,
                        carrier=self._porter,
                    ),
                    self._keyring,
                    self._names[number] if self._names else NameFilter(),
                )
                for number, url in enumerate(upstreams)
            ],
            budget=self._budget,
            observer=self.observe,
            clock=self.clock,
        )

    def observed(self, kind: type[E]) -> list[E]:
        """Return the events of one kind."""
        return [event for event in self.events if isinstance(event, kind)]

    @property
    def kept(self) -> set[str]:
        """Files in the store folder that came from an upstream, relative to it."""
        files = (path.relative_to(self.folder) for path in self.folder.rglob("*") if path.is_file())
        return {str(path) for path in files if path.parts[0] not in {".state", "nix-cache-info"}}

    @property
    def partials(self) -> list[Path]:
        """Files that are neither complete nor given up."""
        return list(self.store.layout.partials.iterdir())

    async def until(self, condition: Callable[[], object]) -> None:
        """Wait until what was observed makes ``condition`` true."""
        async with asyncio.timeout(PATIENCE):
            while not condition():
                await self.events.more()

    async def idle(self) -> None:
        """Wait until nothing is under way any more, be it asked for or ahead."""
        ahead = self.prefetch
        async with asyncio.timeout(PATIENCE):
            while tasks := self.cache.tasks | ahead._lookups | ahead._downloads:
                await asyncio.wait(tasks)

    async def eventually(self, condition: Callable[[], object]) -> None:
        """Wait until a condition is true of which no event tells."""
        async with asyncio.timeout(PATIENCE):
            while not condition():  # noqa: ASYNC110  # nothing tells, so there is no event
                await asyncio.sleep(0.001)

    async def pull(
        self, path: str, headers: Mapping[str, str] | None = None, method: str = "GET"
    ) -> Received:
        """Return what came, also when it was cut off; the path goes out as it is."""
        target = yarl.URL(f"{self.url}{path}", encoded=True)
        async with self.session.request(method, target, headers=headers) as answer:
            body = bytearray()
            complete = True
            try:
                async for piece in answer.content.iter_any():
                    body += piece
            except (aiohttp.ClientError, ConnectionError):
                complete = False
            return Received(answer.status, answer.headers, bytes(body), complete)

    async def get(
        self, path: str, headers: dict[str, str] | None = None, method: str = "GET"
    ) -> tuple[int, dict[str, str], bytes]:
        """Return status, headers and body; raises what aiohttp raises when it is cut off."""
        async with self.session.request(method, f"{self.url}{path}", headers=headers) as answer:
            return answer.status, dict(answer.headers), await answer.read()

    async def nar_url(self, hash_part: str) -> str:
        """Ask for a narinfo, and return the path of its NAR."""
        status, _, body = await self.get(f"/{hash_part}.narinfo")
        assert status == 200, (status, body)
        lines = dict(line.split(": ", 1) for line in body.decode().splitlines())
        return "/" + lines["URL"]

    async def __aenter__(self) -> Self:
        return await self.start()

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.stop()
