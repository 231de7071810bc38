"""What the core and its workers say to each other, and how that is written: typed MessagePack.

Nothing here can make the other side run code, as pickled objects could; what does not fit its type is not
read at all.
"""

from __future__ import annotations

from typing import Final, Literal, TypeAlias, TypeVar, get_args

from msgspec import DecodeError, Raw, msgpack

from proxy.events import Event, Result
from proxy.server.page import Facts
from proxy.wire import Failed, Message

M = TypeVar("M", bound="Message")


# --- a worker asks ------------------------------------------------------------------------------


class AskNarinfo(Message, frozen=True):
    """Answered with `Narinfo`, `Absent` or `Failed`."""

    hash_part: str


class AskFile(Message, frozen=True):
    """Answered with `Given`, `Announced` (for a head) or `Failed`.

    ``kind`` says what ``name`` is: of a NAR, of a NAR elsewhere, or the path of another file. ``number`` is
    how the worker knows what is told later of a file that arrives.
    """

    kind: Literal["nar", "foreign", "side"]
    name: str
    head: bool = False
    number: int = 0


class AskStore(Message, frozen=True):
    """Answered with `StoreState`."""


class AskFacts(Message, frozen=True):
    """Answered with `PageFacts`."""


class AskMetrics(Message, frozen=True):
    """Answered with `Metrics`."""


# --- the core answers ---------------------------------------------------------------------------


class Narinfo(Message, frozen=True):
    """A verified narinfo."""

    body: bytes
    nar_name: str
    etag: str
    origin: str
    kept: bool
    size: int | None
    result: Result


class Absent(Message, frozen=True):
    """Nobody has it; true for so many more seconds."""

    reason: str
    seconds: float


class Given(Message, frozen=True):
    """A file, whose descriptor comes along. Not ``whole``: it arrives, and `Progress` tells how far."""

    whole: bool
    released: int
    size: int | None
    etag: str | None
    result: Result
    upstream: str


class Announced(Message, frozen=True):
    """A file that was not to be opened."""

    size: int | None
    etag: str | None
    result: Result
    upstream: str


class PageFacts(Message, frozen=True):
    """What the page says."""

    facts: Facts


class StoreState(Message, frozen=True):
    """Why the disk keeps nothing; an empty text while it does."""

    reason: str


class Metrics(Message, frozen=True):
    """The rendered metrics."""

    body: bytes
    content_type: str


class Done(Message, frozen=True):
    """It was done."""


# --- the core asks, and tells -------------------------------------------------------------------


class Rules(Message, frozen=True):
    """What SIGHUP can change; answered with `Done`.

    Attributes:
        keyrings: Public keys, of which any keyring will do; None believes without signatures.
        strict: Whether to answer 502 instead of 404 when an upstream failed.
    """

    keyrings: tuple[tuple[str, ...] | None, ...]
    strict: bool


class Setup(Message, frozen=True):
    """What a worker is told before it begins."""

    store: str
    cache_info: bytes
    shutdown_timeout: float
    rules: Rules


class Flush(Message, frozen=True):
    """Tell everything that was counted; answered with `Done`."""


class Stop(Message, frozen=True):
    """Take no more connections, and end when those that there are have been served."""


class Hurry(Message, frozen=True):
    """Do not wait for them any longer."""


class Forget(Message, frozen=True):
    """A path's narinfo is known no longer."""

    hash_part: str


class Ahead(Message, frozen=True):
    """A NAR is fetched that no client has asked for: the core wants to know who is the first."""

    name: str


class Progress(Message, frozen=True):
    """So many bytes of a file that arrives may be read."""

    number: int
    released: int
    size: int | None


class Segment(Message, frozen=True):
    """From ``start`` on, a file that arrives is in the memory whose descriptor comes along."""

    number: int
    start: int


class Whole(Message, frozen=True):
    """A file has arrived, and is what was signed."""

    number: int
    size: int


class Broken(Message, frozen=True):
    """A file does not arrive."""

    number: int
    failure: Failed


# --- a worker tells -----------------------------------------------------------------------------


class Listening(Message, frozen=True):
    """It accepts connections."""


class Passed(Message, frozen=True):
    """No reader of a file that arrives needs what was before its second `Segment` any more."""

    number: int


class Release(Message, frozen=True):
    """Nobody reads a file any more that arrives."""

    number: int


class Used(Message, frozen=True):
    """A NAR of the store was given to a client."""

    name: str


class PathsUsed(Message, frozen=True):
    """The narinfos of paths were given to clients."""

    hash_parts: tuple[str, ...]


class Damaged(Message, frozen=True):
    """A NAR of the store turned out to be damaged."""

    name: str
    reason: str


class Connected(Message, frozen=True):
    """A client has opened a connection."""

    client: str


class Disconnected(Message, frozen=True):
    """A client has closed a connection."""

    client: str


class AskedPath(Message, frozen=True):
    """A client was given a narinfo."""

    client: str
    hash_part: str


class AskedNar(Message, frozen=True):
    """A client has asked for a NAR."""

    client: str


class Happened(Message, frozen=True):
    """An event: its class and its fields."""

    kind: str
    fields: Raw

    @classmethod
    def of(cls, event: Event) -> Happened:
        """Write down an event."""
        return cls(type(event).__name__, Raw(msgpack.encode(event)))

    def event(self) -> Event:
        """Return the event."""
        event: Event = msgpack.decode(self.fields, type=_EVENTS[self.kind])
        return event


# --- envelopes ----------------------------------------------------------------------------------

Question: TypeAlias = AskNarinfo | AskFile | AskStore | AskFacts | AskMetrics | Rules | Flush
Answer: TypeAlias = (
    Narinfo | Absent | Given | Announced | PageFacts | StoreState | Metrics | Failed | Done
)
Note: TypeAlias = (
    Stop
    | Hurry
    | Forget
    | Ahead
    | Progress
    | Segment
    | Whole
    | Broken
    | Listening
    | Passed
    | Release
    | Used
    | PathsUsed
    | Damaged
    | Connected
    | Disconnected
    | AskedPath
    | AskedNar
    | Happened
)


class Call(Message, frozen=True):
    """A question, with the number that its answer will have."""

    serial: int
    question: Question


class Reply(Message, frozen=True):
    """The answer to a question."""

    serial: int
    answer: Answer


class Notes(Message, frozen=True):
    """What takes no answer, in the order in which it was told."""

    notes: tuple[Note, ...]


Envelope: TypeAlias = Call | Reply | Notes

encode: Final = msgpack.Encoder().encode
"""Write an envelope, or a `Setup`."""

_envelopes: Final = msgpack.Decoder(Envelope)

read_setup: Final = msgpack.Decoder(Setup).decode
"""Read what a worker is told before it begins."""


def decode(frame: bytes) -> Envelope:
    """Read an envelope.

    Raises:
        ValueError: The other side runs another version of us, which was installed meanwhile.
    """
    try:
        envelope: Envelope = _envelopes.decode(frame)
    except DecodeError as error:
        raise ValueError(str(error)) from error
    return envelope


def expect(kind: type[M], answer: Answer) -> M:
    """Return an answer that is of the right kind; anything else is a fault of ours."""
    if not isinstance(answer, kind):
        raise TypeError(f"{type(answer).__name__} is no answer where {kind.__name__} is wanted")
    return answer


_EVENTS: Final = {kind.__name__: kind for kind in get_args(Event)}
