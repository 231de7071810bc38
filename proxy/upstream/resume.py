"""How to ask for the rest of a file, and whether an answer is that rest: RFC 9110 §13.1.5, §14.

Pure: what is known goes in, what to do comes out.
"""

from __future__ import annotations

import email.utils
import enum
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta

_CONTENT_RANGE = re.compile(r"bytes ([0-9]{1,18})-([0-9]{1,18})/([0-9]{1,18}|\*)", re.ASCII)
_STRONG_ETAG = re.compile(r'"[\x21\x23-\x7e]*"')
_SURELY = timedelta(seconds=1)


@dataclass(frozen=True, slots=True)
class Beginning:
    """How an answer begins.

    Attributes:
        start: The byte of the file that comes first.
        size: Bytes of the whole file; None when the upstream does not say.
        validator: What ``If-Range`` may say of it: a strong ETag, or a date; None when there is neither.
        whole: Whether the whole file follows.
    """

    start: int
    size: int | None
    validator: str | None
    whole: bool = True


@dataclass(frozen=True, slots=True)
class Received:
    """What of a file is here already.

    Attributes:
        offset: Bytes.
        size: Bytes of the whole file; None when nobody says.
        validator: Of the upstream that is asked for the rest; None when it gave none, or is another one.
    """

    offset: int
    size: int | None
    validator: str | None


class Fit(enum.Enum):
    """What an answer is to what is here."""

    CONTINUES = enum.auto()
    """It begins where that ends."""
    COMPARE = enum.auto()
    """It is the whole file, whose beginning has to be what is here."""
    CHANGED = enum.auto()
    """It is something else."""


def headers(received: Received, *, vouched: bool) -> dict[str, str]:
    """Return the headers to ask for the rest with, none of which means for the whole.

    Args:
        received: What is here.
        vouched: Whether a FileHash says that every place has the same file.
    """
    if received.offset == 0 or (received.validator is None and not vouched):
        return {}
    wanted = {"Range": f"bytes={received.offset}-"}
    return wanted if received.validator is None else {**wanted, "If-Range": received.validator}


def fit(received: Received, beginning: Beginning) -> Fit:
    """Decide what an answer is."""
    if None not in (received.size, beginning.size) and received.size != beginning.size:
        return Fit.CHANGED
    if beginning.whole:
        return Fit.COMPARE if received.offset else Fit.CONTINUES
    known = received.validator is not None and beginning.validator is not None
    if beginning.start != received.offset or (known and received.validator != beginning.validator):
        return Fit.CHANGED
    return Fit.CONTINUES


def beginning(status: int, fields: Mapping[str, str], length: int | None) -> Beginning:
    """Read how an answer with status 200 or 206 begins.

    Raises:
        ValueError: It is a part, and does not say which.
    """
    validator = _validator(fields)
    if status != 206:  # noqa: PLR2004  # Partial Content
        return Beginning(0, length, validator)
    match = _CONTENT_RANGE.fullmatch(fields.get("Content-Range", ""))
    if match is None:
        raise ValueError("a part without Content-Range")
    first, last, size = match.groups()
    start, count = int(first), int(last) - int(first) + 1
    if count <= 0 or (length is not None and length != count):
        raise ValueError("a part that is not what Content-Range says")
    return Beginning(start, None if size == "*" else int(size), validator, whole=False)


def _validator(fields: Mapping[str, str]) -> str | None:
    """A weak ETag, or a date of the same second, may be that of other bytes (RFC 9110 §8.8)."""
    etag = fields.get("ETag", "")
    if _STRONG_ETAG.fullmatch(etag):
        return etag
    modified = fields.get("Last-Modified", "")
    changed, sent = _date(modified), _date(fields.get("Date", ""))
    if changed is None or sent is None or sent - changed < _SURELY:
        return None
    return modified


def _date(text: str) -> datetime | None:
    try:
        return email.utils.parsedate_to_datetime(text).replace(tzinfo=None)
    except (ValueError, OverflowError):
        return None
