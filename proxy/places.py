"""Where a NAR is, where it should not be looked for, and who wants it: what a transfer is told."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection
from dataclasses import dataclass
from typing import Protocol

from proxy.nix.hashes import Hash
from proxy.nix.nar_name import NarName
from proxy.recent import Recent
from proxy.store.incoming import Leftover
from proxy.supply import Promise
from proxy.upstream.remote import Upstream

BLAMED = 10_000
"""NARs of which it is remembered who sent something else."""

BLAME_LASTS = 600.0
"""Seconds. Nix asks again within seconds when a download was cut, five times in all."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where an upstream keeps a NAR.

    Attributes:
        upstream: The upstream.
        url: As its narinfo says.
        file_hash: Of the file there, if the narinfo says.
        promise: What the file has to be.
        fresh: Whether the upstream said so just now; what is remembered may have gone out of date.
        forget: Know this no longer, because it led nowhere, or to something else.
        blame: What came from there was not what was signed: go elsewhere, if possible, for a while.
    """

    upstream: Upstream
    url: str
    file_hash: Hash | None
    promise: Promise
    fresh: bool
    forget: Callable[[], None]
    blame: Callable[[], None]

    def has_rest_of(self, leftover: Leftover) -> bool:
        """Tell whether what was left of a download is the beginning of the file here, as far as is known."""
        origin = leftover.origin
        if origin.size is not None and leftover.size > origin.size:
            return False
        if self.file_hash is not None:
            return str(self.file_hash) == origin.file_hash
        return origin.upstream == self.upstream.name and origin.validator is not None


class Find(Protocol):
    """Find a place."""

    def __call__(self, without: Collection[str], file_hash: Hash | None) -> Awaitable[Place]:
        """Look for a place of a file at an upstream other than these.

        Args:
            without: Names of upstreams.
            file_hash: The FileHash that it has to have; None for any.

        Raises:
            NotFoundError: Nobody else has it.
            UpstreamError: Nobody else has it, as far as could be found out.
        """
        ...


class Readers(Protocol):
    """What those who read a transfer have: `proxy.fetch.Fetch`."""

    @property
    def released(self) -> int:
        """Bytes that they may have read."""
        ...

    @property
    def committed(self) -> int:
        """Bytes that they may have read by the time that all is looked at that was passed on."""
        ...

    @property
    def are_waiting(self) -> bool:
        """Whether there are any yet."""
        ...

    @property
    def landing(self) -> str | None:
        """Where the whole file may be put, if that is a way to get it."""
        ...

    @property
    def leftover(self) -> Leftover | None:
        """What is here of an earlier download."""
        ...

    def read_back(self, position: int, count: int) -> bytes:
        """Return some of these bytes."""
        ...


class Blame:
    """Who sent other bytes than were signed, of which NAR, and for how long that is held against them.

    An upstream is not left alone for that, as for a failure: it is only asked last for this NAR.

    Args:
        clock: Seconds on a monotonic clock.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._until: Recent[NarName, dict[str, float]] = Recent(BLAMED)

    def add(self, name: NarName, upstream: str) -> None:
        """Remember who sent something else under a NAR's name."""
        others = {other: until for other, until in self._of(name).items() if other != upstream}
        self._until.put(name, {**others, upstream: self._clock() + BLAME_LASTS})

    def of(self, name: NarName) -> list[str]:
        """Return the names of those who are to blame, who was blamed last at the end."""
        now = self._clock()
        return [upstream for upstream, until in self._of(name).items() if now < until]

    def clear(self) -> None:
        """Hold nothing against anybody any more."""
        self._until.clear()

    def _of(self, name: NarName) -> dict[str, float]:
        return self._until.get(name) or {}
