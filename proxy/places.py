"""Where a NAR is, and who wants it: what a transfer is told."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection
from dataclasses import dataclass
from typing import Protocol

from proxy.nix.hashes import Hash
from proxy.store.incoming import Leftover
from proxy.supply import Promise
from proxy.upstream.remote import Upstream


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
    """

    upstream: Upstream
    url: str
    file_hash: Hash | None
    promise: Promise
    fresh: bool
    forget: Callable[[], None]


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
    def leftover(self) -> Leftover | None:
        """What is here of an earlier download."""
        ...

    def read_back(self, position: int, count: int) -> bytes:
        """Return some of these bytes."""
        ...
