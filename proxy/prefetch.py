"""Look ahead: a client that asks for a narinfo is pulling a closure, and will ask for more.

Two things are done ahead of clients, each of which can be turned off:

- **References are walked**: what a narinfo refers to is looked up before the client gets there. Nix asks
  level by level, and each level costs it a round trip to the upstream otherwise.
- **NARs are fetched** of paths whose narinfo a client itself has asked for. A client has a budget, because
  it may be one that only asks (``nix path-info``); small ones are fetched first for it, since those are bound
  by round trips and not by bandwidth. A client's first NAR request shows that it wants them all; from then on
  they are fetched in the order in which Nix can use them, what others refer to first. A budget that was spent
  on a client that only asks is not given again until it fetches a NAR.

All of it is bounded: by a part of the upstream's connections, so that clients' own requests always find one
free; by the room in the store, so that nothing is evicted for it; and it ends when its client has left.
"""

from __future__ import annotations

import asyncio
import bisect
import itertools
import sys
from collections import OrderedDict, deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

from proxy.cache import Cache
from proxy.errors import ProxyError
from proxy.known import KnownPath
from proxy.nix.nar_name import NarName
from proxy.nix.store_path import HashPart
from proxy.recent import Recent

SHARE = 3 / 8
"""Part of an upstream's connections for lookups, and again for NARs; a quarter is left to clients."""

CLIENTS = 1_000
"""Clients that have left and whose spent budget is remembered."""

WALKED = 100_000
"""Paths that are walked for one client, and that it is remembered to have asked for."""

FEWEST = 4
"""Connections below which none is to spare."""


@dataclass(frozen=True, slots=True)
class LookAhead:
    """What may be done ahead of clients.

    Attributes:
        narinfos: Whether to walk References.
        nars: Whether to fetch NARs.
        budget: Bytes for a client before its first NAR request.
        connections: Connections that each upstream may have.
    """

    narinfos: bool = True
    nars: bool = True
    budget: int = 64 * 2**20
    connections: int = 32

    @property
    def most(self) -> int:
        """Downloads at the same time; and lookups, but those may have both shares while nothing else can."""
        return int(self.connections * SHARE) if self.connections >= FEWEST else 0


@dataclass(slots=True, eq=False)
class Client:
    """What one client has asked for, and may still cause.

    ``asked`` has the references of each path. ``wanted`` are NARs, sorted by size. Of a client that
    ``fetches``, those that find room go to ``lined_up``, of which the last is the next; and ``budget``, in
    bytes, is of no account any more.
    ``to_walk`` begins with what the client will ask for next, as far as anybody can tell.
    """

    budget: int
    connections: int = 1
    fetches: bool = False
    asked: dict[HashPart, tuple[HashPart, ...]] = field(default_factory=dict)
    wanted: list[tuple[int, int, NarName]] = field(default_factory=list)
    lined_up: list[tuple[int, int, NarName]] = field(default_factory=list)
    heights: dict[HashPart, int] = field(default_factory=dict)
    walked: set[HashPart] = field(default_factory=set)
    to_walk: OrderedDict[HashPart, None] = field(default_factory=OrderedDict)

    def take(self, room: int) -> tuple[int, NarName] | None:
        """Return the size and the name of the NAR to fetch next, or None while none may be.

        Args:
            room: Bytes that may be kept without evicting anything.
        """
        if self.fetches:
            return self._take_lined_up(room)
        if not self.wanted or self.wanted[0][0] > min(room, self.budget):
            return None
        size, _, name = self.wanted.pop(0)
        self.budget -= size
        return size, name

    def _take_lined_up(self, room: int) -> tuple[int, NarName] | None:
        while self.lined_up or self._line_up(room):
            wish = size, _, name = self.lined_up.pop()
            if size <= room:
                return size, name
            bisect.insort(self.wanted, wish)
        return None

    def _line_up(self, room: int) -> bool:
        """Put what finds room in the order in which Nix can use it, a path after all that it refers to.

        Returns:
            Whether there is any.
        """
        fitting = bisect.bisect_right(self.wanted, room, key=lambda wish: wish[0])
        wishes, self.wanted[:fitting] = self.wanted[:fitting], []
        self.lined_up = sorted(
            wishes, key=lambda wish: (-self._height(wish[2].hash_part), -wish[1])
        )
        return bool(self.lined_up)

    def _height(self, path: HashPart) -> int:
        """Return the length of the longest way down from a path, by references that were asked for.

        Where they go round in circles, which paths of Nix do not, it is some number.
        """
        asked, heights, stack = self.asked, self.heights, [path]
        while stack:
            each = stack[-1]
            height = heights.get(each)
            if height is None:
                heights[each] = 0  # until those below are known
                stack += [below for below in asked[each] if below in asked and below not in heights]
                continue
            stack.pop()
            if height == 0:
                below = (heights.get(reference, 0) for reference in asked[each])
                heights[each] = 1 + max(below, default=0)
        return heights[path]

    @property
    def wishes(self) -> int:
        """How many NARs might be fetched for it."""
        return len(self.wanted) + len(self.lined_up)

    def drop_wishes(self) -> None:
        """Fetch nothing more for it."""
        self.wanted.clear()
        self.lined_up.clear()

    def forget(self) -> None:
        """Forget what it has asked for."""
        self.drop_wishes()
        self.asked.clear()
        self.heights.clear()

    def give_back(self, size: int) -> None:
        """What `take` gave costs nothing: it is here, or on its way for somebody else."""
        self.budget += 0 if self.fetches else size

    def will_ask(self, references: Sequence[HashPart]) -> None:
        """Note what is to be looked up, before all that was to be until now.

        Depth first, as Nix goes: what follows from where it is comes before the rest of what follows from
        where it was.
        """
        for hash_part in reversed(references):
            if hash_part not in self.walked and len(self.walked) < WALKED:
                self.walked.add(hash_part)
                self.to_walk[hash_part] = None
            if hash_part in self.to_walk:
                self.to_walk.move_to_end(hash_part, last=False)


class Prefetch:
    """The look-ahead. Made inside of a running event loop; closed with `close`.

    Args:
        cache: Where what is found goes.
        rules: What may be done.
    """

    def __init__(self, cache: Cache, rules: LookAhead) -> None:
        self._cache = cache
        self._rules = rules
        self._clients: dict[str, Client] = {}
        self._left: Recent[str, int] = Recent(CLIENTS)
        self._walking: deque[Client] = deque()
        self._wanting: deque[Client] = deque()
        self._order = itertools.count()
        self._lookups: set[asyncio.Task[None]] = set()
        self._downloads: set[asyncio.Task[None]] = set()

    def configure(self, rules: LookAhead) -> None:
        """Go by other rules from now on; what they do not allow and has not begun is dropped."""
        self._rules = rules
        for client in self._clients.values():
            if not rules.narinfos:
                client.to_walk.clear()
            if not rules.nars:
                client.drop_wishes()

    async def close(self) -> None:
        """End everything that is under way."""
        self._clients.clear()
        self._walking.clear()
        self._wanting.clear()
        tasks = [*self._lookups, *self._downloads]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def connected(self, name: str) -> None:
        """A client has opened a connection."""
        client = self._clients.get(name)
        if client is None:
            budget = self._left.get(name)
            self._clients[name] = Client(self._rules.budget if budget is None else budget)
        else:
            client.connections += 1

    def disconnected(self, name: str) -> None:
        """A client has closed a connection; with the last one it has left."""
        client = self._clients.get(name)
        if client is None:
            return
        client.connections -= 1
        if client.connections == 0:
            del self._clients[name]
            client.drop_wishes()
            client.to_walk.clear()
            self._left.put(name, self._rules.budget if client.fetches else client.budget)

    def asked_path(self, name: str, hash_part: HashPart) -> None:
        """A client was given a path's narinfo, just now: `asked_narinfo`."""
        known = self._cache.hot_narinfo(hash_part)
        if known is not None:
            self.asked_narinfo(name, known)

    def asked_narinfo(self, name: str, known: KnownPath) -> None:
        """A client was given a narinfo."""
        client = self._clients.get(name)
        hash_part = known.info.store_path.hash_part
        if client is None or hash_part in client.asked:
            return
        if len(client.asked) >= WALKED:
            client.forget()
        references = (sys.intern(each.hash_part) for each in known.info.references)
        client.asked[hash_part] = tuple(
            map(HashPart, references)
        )  # one text for all who refer to it
        if self._rules.nars and not known.kept:
            size = known.info.file_size or known.info.nar_size
            bisect.insort(client.wanted, (size, next(self._order), known.info.nar_name))
            if client not in self._wanting:
                self._wanting.append(client)
        self._walk_from(client, known)
        self._pump()

    def asked_nar(self, name: str) -> None:
        """A client has asked for a NAR: it wants what it asked narinfos for."""
        client = self._clients.get(name)
        if client is not None and not client.fetches:
            client.fetches = True
            self._pump()

    def _walk_from(self, client: Client, known: KnownPath) -> None:
        if not self._rules.narinfos or known.kept:
            return  # of what is here, so is most of what it refers to
        client.will_ask([each.hash_part for each in known.info.references])
        if client.to_walk and client not in self._walking:
            self._walking.append(client)

    def _pump(self) -> None:
        """Start as much as there are connections for; clients take turns.

        Lookups have the connections of downloads as well, as long as there is nothing to download.
        """
        most = self._rules.most
        if not self._wanting:
            most = max(most, 2 * most - self._cache.fetches_in_flight)
        while self._walking and len(self._lookups) < most:
            client = self._walking.popleft()
            if client.to_walk:
                hash_part, _ = client.to_walk.popitem(last=False)
                self._start(self._lookups, partial(self._look_up, client, hash_part))
                self._walking.append(client)
        self._pump_downloads()

    def _pump_downloads(self) -> None:
        most = min(self._rules.most, 2 * self._rules.most - len(self._lookups))
        if not self._wanting or len(self._downloads) >= most:
            return
        room = self._cache.room
        unable = 0  # clients in a row that may have nothing at the moment
        while unable < len(self._wanting) and len(self._downloads) < most:
            client = self._wanting.popleft()
            if not client.wishes:
                continue  # it has left
            wish = client.take(room)
            if wish is None:
                unable += 1
            else:
                unable = 0
                size, name = wish
                if self._cache.lacks(name):
                    room -= size
                    self._start(self._downloads, partial(self._cache.fetch_ahead, name, size))
                else:
                    client.give_back(size)
            if client.wishes:
                self._wanting.append(client)

    def _start(self, tasks: set[asyncio.Task[None]], work: Callable[[], Awaitable[None]]) -> None:
        task = asyncio.create_task(_unless_it_fails(work))
        tasks.add(task)

        def ended(task: asyncio.Task[None]) -> None:
            tasks.discard(task)
            self._pump()

        task.add_done_callback(ended)

    async def _look_up(self, client: Client, hash_part: HashPart) -> None:
        known = await self._cache.look_ahead(hash_part)
        if client.connections > 0:
            self._walk_from(client, known)


async def _unless_it_fails(work: Callable[[], Awaitable[None]]) -> None:
    """What fails ahead of a client fails again, and is told, when the client asks."""
    try:
        await work()
    except ProxyError:
        return
