"""From the text of a file to its tables: TOML, and nothing but the keys and types there are.

The only module that knows tomllib's and msgspec's errors. Both say what is wrong in words of their
own; here they become words about a TOML file, with the line and the nearest valid name.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from types import NoneType
from typing import Any, TypeGuard, get_args

import msgspec

from proxy.config.source import Source
from proxy.config.tables import Document, Table
from proxy.config.wording import Key, alternatives, did_you_mean, dotted, quote
from proxy.errors import ConfigError

_WORDS = {
    "array": "an array",
    "bool": "true or false",
    "date": "a date",
    "datetime": "a date and time",
    "float": "a number with a fraction",
    "int": "a whole number",
    "object": "a table",
    "str": "a string",
    "time": "a time",
}
"""msgspec's word for a type → ours."""

_POSITION = re.compile(r" - at `\$((?:\.\w+|\[\d+\])*)`$")
_STEP = re.compile(r"\.(\w+)|\[(\d+)\]")
_MISSING = re.compile(r"Object missing required field `(.+)`")
_MISMATCH = re.compile(r"Expected `(.+?)(?: \| null)?`, got `(.+)`")
_OUT_OF_RANGE = re.compile(r"Expected `int` (>=|<=) (\d+)")


def read_toml(text: str, source: Source) -> dict[str, Any]:
    """The document as tomllib reads it.

    Raises:
        ConfigError: It is not TOML.
    """
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        message, _, position = str(error).rpartition(" (at ")
        found = re.match(r"line (\d+), column (\d+)", position)
        if found is None:  # "end of document"
            last_line = text.rstrip().count("\n") + 1
            raise source.error(f"not TOML: {message}, at the end", line=last_line) from None
        reason = f"not TOML: {message}, column {found[2]}"
        raise source.error(reason, line=int(found[1])) from None
    except ValueError:  # int() has a limit of its own, and TOML has not
        raise source.error("not TOML: a number has too many digits") from None


def read_tables(document: dict[str, Any], source: Source) -> Document:
    """The tables that there are in the document, with defaults for what it leaves out.

    Raises:
        ConfigError: A key is unknown or missing, or its value has another type.
    """
    try:
        return msgspec.convert(document, Document)
    except msgspec.ValidationError as error:
        raise _explained(str(error), document, source) from None


def _explained(message: str, document: dict[str, Any], source: Source) -> ConfigError:
    """A message of msgspec's, which is about the first thing that is wrong, as a ConfigError."""
    if message.startswith("Object contains unknown field"):
        return _unknown(document, source)
    position = _POSITION.search(message)
    assert position is not None, message  # noqa: S101 - only what stands at a key can be wrong
    key = _key(position[1])
    message = message[: position.start()]

    if missing := _MISSING.fullmatch(message):
        return source.error("is missing, and has no default", (*key, missing[1]))
    if mismatch := _MISMATCH.fullmatch(message):
        return source.error(_mismatch(key, expected=mismatch[1], got=mismatch[2]), key)
    if limit := _OUT_OF_RANGE.fullmatch(message):
        return source.error(f"must be at {'least' if limit[1] == '>=' else 'most'} {limit[2]}", key)
    return source.error(_not_allowed(_value_at(document, key), get_args(_type_at(key))), key)


def _unknown(document: dict[str, Any], source: Source) -> ConfigError:
    key, known = next(_unknown_keys(document, Document))
    what = "table" if _is_tabular(_value_at(document, key)) else "key"
    return source.error(f"unknown {what}{did_you_mean(str(key[-1]), known)}", key)


def _unknown_keys(value: object, kind: Any, at: Key = ()) -> Iterator[tuple[Key, list[str]]]:
    """The keys that no table has, each with the names that its table does have.

    msgspec tells the name, but not in a way that survives a name with backticks in it.
    """
    if isinstance(value, list):
        for index, item in enumerate(value):
            yield from _unknown_keys(item, _step_into(kind, index), (*at, index))
    elif isinstance(value, dict) and _is_table(kind):
        known = [field.name for field in msgspec.structs.fields(kind)]
        for name, item in value.items():
            if name in known:
                yield from _unknown_keys(item, _step_into(kind, name), (*at, name))
            else:
                yield (*at, name), known


def _mismatch(key: Key, *, expected: str, got: str) -> str:
    words = " or ".join(_WORDS.get(word, word) for word in expected.split(" | "))
    kind = _type_at(key)
    if _is_table(kind) and len(key) == 1:
        words += f", [{dotted(key)}]"
    elif any(map(_is_table, get_args(kind))):
        words += f" of tables, [[{dotted(key)}]]"
    return f"expected {words}, not {_WORDS.get(got, got)}"


def _not_allowed(value: str, allowed: tuple[str, ...]) -> str:
    nearest = did_you_mean(value, allowed)
    return f"{quote(value)} is not {alternatives(allowed)}{nearest}"


def _key(path: str) -> Key:
    """The key of a path of msgspec's, ``.upstream[1].url``."""
    steps = _STEP.finditer(path)
    return tuple(step[1] if step[1] is not None else int(step[2]) for step in steps)


def _value_at(document: dict[str, Any], key: Key) -> Any:
    value: Any = document
    for step in key:
        value = value[step]
    return value


def _type_at(key: Key) -> Any:  # a class, a Literal, tuple[…]
    kind: Any = Document
    for step in key:
        kind = _step_into(kind, step)
    return kind


def _step_into(kind: Any, step: str | int) -> Any:
    """The type of a table's field, or of an array's items; of ``X | None`` it is X."""
    if _is_table(kind):
        kind = next(field.type for field in msgspec.structs.fields(kind) if field.name == step)
        kinds = get_args(kind)
        return kinds[0] if NoneType in kinds else kind
    return next(iter(get_args(kind)), object)


def _is_table(kind: object) -> TypeGuard[type[Table]]:
    return isinstance(kind, type) and issubclass(kind, Table)


def _is_tabular(value: object) -> bool:
    match value:
        case dict() | [dict(), *_]:
            return True
        case _:
            return False
