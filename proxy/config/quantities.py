"""Sizes and durations as a configuration writes them: ``"50GiB"``, ``"500ms"``.

A unit says what is meant, so a number without one has to be a TOML number: bytes, or seconds.
``G`` alone is not a unit, because half of the world means 10⁹ and the other half 2³⁰.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from decimal import Decimal

from proxy.config.wording import alternatives, quote

SIZE_UNITS: Mapping[str, int] = {
    "B": 1,
    **{f"{prefix}B": 1000**power for power, prefix in enumerate("kMGTP", start=1)},
    **{f"{prefix}iB": 1024**power for power, prefix in enumerate("KMGTP", start=1)},
}
"""Bytes in a unit. Upper and lower case are the same: nobody configures a cache in bits."""

DURATION_UNITS: Mapping[str, Decimal] = {
    "ms": Decimal("0.001"),
    "s": Decimal(1),
    "m": Decimal(60),
    "h": Decimal(3600),
    "d": Decimal(86400),
}
"""Seconds in a unit."""

MAX_SIZE = 2**63 - 1
"""What SQLite and every file system can count."""

MAX_DURATION = 10 * 365 * 86400.0
"""Ten years: more is a slip, and clocks overflow somewhere above."""

_QUANTITY = re.compile(r"(?P<number>[0-9]{1,30}(?:\.[0-9]{1,30})?) ?(?P<unit>[A-Za-z]*)")


def parse_size(value: object) -> int:
    """Bytes: a whole number, or a string with a unit. A fraction of a byte is dropped.

    Raises:
        ValueError: It is neither, or more than `MAX_SIZE`.
    """
    match value:
        case int() if not isinstance(value, bool):
            size = value
        case str():
            size = int(_with_unit(value, SIZE_UNITS, 'a size like "50GiB"'))
        case _:
            raise ValueError('expected a size like "50GiB", or a whole number of bytes')
    if size < 0:
        raise ValueError("must not be negative")
    if size > MAX_SIZE:
        raise ValueError(f"must be at most {MAX_SIZE} bytes, as file systems count no further")
    return size


def parse_duration(value: object) -> float:
    """Seconds: a number, or a string with a unit.

    Raises:
        ValueError: It is neither, or more than `MAX_DURATION`.
    """
    match value:
        case int() | float() if not isinstance(value, bool):
            seconds = value
        case str():
            seconds = float(_with_unit(value, DURATION_UNITS, 'a duration like "60s"'))
        case _:
            raise ValueError('expected a duration like "60s", or a number of seconds')
    if seconds < 0:
        raise ValueError("must not be negative")
    if not seconds <= MAX_DURATION:  # nor is NaN
        raise ValueError("must be at most ten years")
    return float(seconds)


def parse_timeout(value: object) -> float:
    """Seconds to wait for something that takes time, so more than none.

    Raises:
        ValueError: It is no duration, or zero.
    """
    seconds = parse_duration(value)
    if seconds == 0:
        raise ValueError("must be more than 0: nothing answers in no time")
    return seconds


def _with_unit(
    text: str, units: Mapping[str, int] | Mapping[str, Decimal], example: str
) -> Decimal:
    if text.startswith("-"):
        raise ValueError("must not be negative")
    found = _QUANTITY.fullmatch(text)
    if found is None:
        raise ValueError(f"{quote(text)} is not {example}")
    if not found["unit"]:
        raise ValueError(
            f"{quote(text)} has no unit: expected {example}, or a number without quotes"
        )
    factors = {unit.lower(): factor for unit, factor in units.items()}
    factor = factors.get(found["unit"].lower())
    if factor is None:
        raise ValueError(f"{quote(text)} has an unknown unit: expected {alternatives(units)}")
    return Decimal(found["number"]) * factor
