"""What the daemon and its porter say to each other: batches of typed MessagePack."""

from __future__ import annotations

from typing import Final, TypeAlias, TypeVar

from msgspec import DecodeError, msgpack

from proxy.upstream.carriage import Cargo, Heading, Order
from proxy.wire import Failed, Message

T = TypeVar("T")


class Carry(Message, frozen=True):
    """Fetch a file; ends with `Carried` or `Refused`."""

    number: int
    order: Order
    cargo: Cargo


class Publish(Message, frozen=True):
    """Give files their final names; ends with `Published` or `Refused`.

    ``renames`` are source, target, and what is to be written to the source first, if anything.
    """

    number: int
    renames: tuple[tuple[str, str, bytes | None], ...]
    origin: str
    superseded: tuple[str, ...]


class Ping(Message, frozen=True):
    """Answered with `Pong`, at once."""


class Pong(Message, frozen=True):
    """It is not stuck."""


class Carried(Message, frozen=True):
    """An answer came; what it is, its heading says."""

    number: int
    heading: Heading


class Published(Message, frozen=True):
    """Everything is on the disk, under its name."""

    number: int


class Refused(Message, frozen=True):
    """It could not be done."""

    number: int
    failure: Failed


Task: TypeAlias = Carry | Publish | Ping
Outcome: TypeAlias = Pong | Carried | Published | Refused

encode: Final = msgpack.Encoder().encode
"""Write a batch of tasks, or of outcomes."""

_tasks: Final = msgpack.Decoder(list[Task])
_outcomes: Final = msgpack.Decoder(list[Outcome])


def read_tasks(frame: bytes) -> list[Task]:
    """Read a batch.

    Raises:
        ValueError: The other side runs another version of us, which was installed meanwhile.
    """
    return _read(_tasks, frame)


def read_outcomes(frame: bytes) -> list[Outcome]:
    """Read a batch.

    Raises:
        ValueError: The other side runs another version of us, which was installed meanwhile.
    """
    return _read(_outcomes, frame)


def _read(decoder: msgpack.Decoder[list[T]], frame: bytes) -> list[T]:
    try:
        return decoder.decode(frame)
    except DecodeError as error:
        raise ValueError(str(error)) from error
