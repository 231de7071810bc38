"""What happened, as frozen values, for whoever wants to know.

The core calls an `Observer` with one of these and goes on; metrics and logs are observers, and the core
imports neither. Observers are called on the event loop and must neither block nor raise.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Literal

Asked = Literal["narinfo", "nar", "file"]
"""What was asked of an upstream; ``file`` is everything that is neither narinfo nor NAR."""

Mode = Literal["auto", "offline", "strict"]
"""How upstreams are treated: asked; not asked at all; asked, and what they do wrong is told to clients."""

Result = Literal["HIT", "MISS", "COALESCED", "PREFETCHED"]
"""Where an answer came from, as ``X-Cache`` says it."""

HIT: Final[Result] = "HIT"
MISS: Final[Result] = "MISS"
COALESCED: Final[Result] = "COALESCED"
PREFETCHED: Final[Result] = "PREFETCHED"


@dataclass(frozen=True, slots=True)
class UpstreamAnswered:
    """An upstream was asked something, and this came of it.

    ``outcome`` is ``hit``, ``absent``, ``cancelled`` (another one was taken, or time ran out) or an
    `UpstreamError.outcome`; ``reason`` says more of the latter.
    """

    upstream: str
    asked: Asked
    what: str
    outcome: str
    reason: str = ""


@dataclass(frozen=True, slots=True)
class BreakerOpened:
    """An upstream has failed too often in a row, and is left alone for so many seconds."""

    upstream: str
    reason: str
    seconds: float


@dataclass(frozen=True, slots=True)
class BreakerClosed:
    """An upstream that was left alone answers again."""

    upstream: str


@dataclass(frozen=True, slots=True)
class ModeChanged:
    """Upstreams are treated otherwise from now on."""

    mode: Mode


@dataclass(frozen=True, slots=True)
class Rejected:
    """Something was refused because it is not what a trusted key signed.

    ``kind`` is a `TrustError.kind`; ``what`` the narinfo, NAR or file in question.
    """

    upstream: str
    what: str
    kind: str
    reason: str


@dataclass(frozen=True, slots=True)
class NotDecoded:
    """A NAR was checked by its FileHash alone, because nothing here reads its compression."""

    what: str
    compression: str


@dataclass(frozen=True, slots=True)
class FetchStarted:
    """A download from an upstream began."""

    what: str
    upstream: str


@dataclass(frozen=True, slots=True)
class FetchingAhead:
    """A download began that no client has asked for yet."""

    what: str


@dataclass(frozen=True, slots=True)
class FetchedAhead:
    """A download that was begun ahead of clients is whole."""

    what: str
    size: int


@dataclass(frozen=True, slots=True)
class AskedAhead:
    """A client has come, for the first time, for what was fetched ahead."""

    what: str
    size: int


@dataclass(frozen=True, slots=True)
class FetchEnded:
    """A download ended: whole and verified, or with ``error``."""

    what: str
    upstream: str
    size: int
    seconds: float
    error: str | None


@dataclass(frozen=True, slots=True)
class StoreFailed:
    """The local disk refused; clients were served all the same where possible."""

    what: str
    reason: str


@dataclass(frozen=True, slots=True)
class StoreChanged:
    """The disk keeps nothing any more, for ``reason``, and clients are served uncached; or it does again."""

    reason: str


@dataclass(frozen=True, slots=True)
class Quarantined:
    """Something in the store was not what had been put there, and was taken out of it."""

    what: str
    reason: str


@dataclass(frozen=True, slots=True)
class Published:
    """A verified NAR and its narinfo, or another file, are in the store for good."""

    what: str
    origin: str


@dataclass(frozen=True, slots=True)
class Evicted:
    """A file, and the narinfo of a NAR, were removed to make room. ``size`` is bytes on disk."""

    what: str
    size: int


@dataclass(frozen=True, slots=True)
class RequestServed:
    """A client was answered. ``result`` is empty where caching plays no part."""

    route: str
    method: str
    code: int
    result: Result | Literal[""]
    body_bytes: int
    complete: bool
    seconds: float


@dataclass(frozen=True, slots=True)
class FastlaneServed:
    """So many clients were answered by the fast lane, all in the same way."""

    route: str
    code: int
    result: Result | Literal[""]
    requests: int
    body_bytes: int


@dataclass(frozen=True, slots=True)
class FastlaneClosed:
    """The fast lane is not used, for a reason; everything works, at the speed of aiohttp."""

    reason: str


@dataclass(frozen=True, slots=True)
class Forgotten:
    """What was known of a path is so no longer: it led nowhere, or the path was evicted."""

    hash_part: str


@dataclass(frozen=True, slots=True)
class WorkerStarted:
    """A process that accepts clients was started."""

    number: int
    pid: int


@dataclass(frozen=True, slots=True)
class WorkerEnded:
    """A process that accepts clients ended by itself, and is started again in ``pause`` seconds."""

    number: int
    pid: int
    reason: str
    pause: float


@dataclass(frozen=True, slots=True)
class PorterEnded:
    """The process that carries small NARs ended by itself; meanwhile the daemon does its work."""

    pid: int
    reason: str


@dataclass(frozen=True, slots=True)
class ConfigReloaded:
    """SIGHUP came: the new configuration is in force, or ``error`` says why the old one stays."""

    error: str | None


@dataclass(frozen=True, slots=True)
class Fault:
    """A fault of our own: something was raised that nobody expected. ``trace`` is for its finder."""

    where: str
    trace: str


Event = (
    UpstreamAnswered
    | BreakerOpened
    | BreakerClosed
    | ModeChanged
    | Rejected
    | NotDecoded
    | FetchStarted
    | FetchingAhead
    | FetchedAhead
    | AskedAhead
    | FetchEnded
    | StoreFailed
    | StoreChanged
    | Quarantined
    | Published
    | Evicted
    | RequestServed
    | FastlaneServed
    | FastlaneClosed
    | Forgotten
    | WorkerStarted
    | WorkerEnded
    | PorterEnded
    | ConfigReloaded
    | Fault
)

Observer = Callable[[Event], None]


def ignore(_event: Event) -> None:
    """An observer that does nothing."""
