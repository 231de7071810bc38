"""config.example.toml: complete, true and usable, because it is what operators read."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, get_args

import msgspec
import pytest

from proxy.config import Config, load, parse
from proxy.config.key_lines import key_lines
from proxy.config.tables import Document, Table

EXAMPLE = Path(__file__).parent.parent / "config.example.toml"
LINES = EXAMPLE.read_text().split("\n")
COMMENTED_OUT = [number for number, line in enumerate(LINES) if re.match(r"# [a-z_.]+ = ", line)]
"""Where a line is a key that could be set."""


def _with(number: int) -> str:
    """Return the example with one line no longer commented out."""
    return "\n".join([*LINES[:number], LINES[number].removeprefix("# "), *LINES[number + 1 :]])


def _table_in(kind: Any) -> type[Table] | None:
    """Return the table in ``X``, ``X | None`` or ``tuple[X, ...]``, if X is one."""
    kinds = [kind, *get_args(kind)]
    return next((k for k in kinds if isinstance(k, type) and issubclass(k, Table)), None)


def _all_keys(table: type[Table], prefix: str = "") -> Iterator[str]:
    """Yield every key that a file can have, as ``upstream.auth.netrc``."""
    for field in msgspec.structs.fields(table):
        inner = _table_in(field.type)
        if inner is not None:
            yield from _all_keys(inner, f"{prefix}{field.name}.")
        if inner is None:
            yield f"{prefix}{field.name}"


def _keys_in(text: str) -> set[str]:
    """Return every key that a file has, without the indices of arrays."""
    return {".".join(step for step in key if isinstance(step, str)) for key in key_lines(text)}


@pytest.fixture
def environ(tmp_path: Path) -> dict[str, str]:
    """Return the environment of a service whose credentials are all there."""
    for name in re.findall(r"\$CREDENTIALS_DIRECTORY/([\w.-]+)", EXAMPLE.read_text()):
        (tmp_path / name).touch()
    return {"CREDENTIALS_DIRECTORY": str(tmp_path), "HOME": "/home/me"}


def test_example_shows_the_defaults() -> None:
    """Used as it is, the example changes nothing but where the store is."""
    config, defaults = load(EXAMPLE, environ={}), load(None, environ={"HOME": "/home/me"})

    assert config.store.path == Path("/var/cache/nix-cache-proxy")
    assert replace(config, store=replace(config.store, path=defaults.store.path)) == defaults


def test_example_names_every_key() -> None:
    """No key has to be found in the source."""
    named = set().union(*(_keys_in(_with(number)) for number in COMMENTED_OUT))

    assert set(_all_keys(Document)) - named == set()


def test_example_sets_every_key_that_has_a_default() -> None:
    """Only what belongs to an [[upstream]] is commented out: it has no default for all of them."""
    unset = set(_all_keys(Document)) - _keys_in(EXAMPLE.read_text())

    assert {key.partition(".")[0] for key in unset} == {"upstream"}


@pytest.mark.parametrize("number", COMMENTED_OUT, ids=lambda number: LINES[number])
def test_commented_out_lines_are_right(number: int, environ: dict[str, str]) -> None:
    """A line can be used by removing its ``#``; it is the default unless it says "example"."""
    config, defaults = parse(_with(number), EXAMPLE.name, environ=environ), load(EXAMPLE)

    assert (config == defaults) != _is_example(number)


def test_nothing_is_said_to_be_without_effect() -> None:
    """All that can be set does something, so no comment says that it does not."""
    assert not re.search("without effect|not in force|no effect", EXAMPLE.read_text())


def test_every_value_of_the_program_comes_from_a_key() -> None:
    """The values have the names of the keys, so messages, file and source speak of the same."""
    tables = {field.name: _table_in(field.type) for field in msgspec.structs.fields(Document)}
    config = load(None, environ={"HOME": "/home/me"})

    for name, table in tables.items():
        assert table is not None
        (value,) = {type(each) for each in _values(config, name)}
        assert {field.name for field in fields(value)} == set(table.__struct_fields__)


def test_every_table_is_explained() -> None:
    """Each table has a comment above its header, or begins with one."""
    tables = tomllib.loads(EXAMPLE.read_text())

    for name in tables:
        assert _comments_of(f"[{name}]" if f"[{name}]" in LINES else f"[[{name}]]")


def _values(config: Config, name: str) -> tuple[Any, ...]:
    return config.upstreams if name == "upstream" else (getattr(config, name),)


def _is_example(number: int) -> bool:
    """Tell whether the comment above a commented-out key begins with "Example"."""
    while number in COMMENTED_OUT:
        number -= 1
    while LINES[number - 1].startswith("# "):
        number -= 1
    return LINES[number].startswith("# Example")


def _comments_of(header: str) -> str:
    """Return the comment above or below a header."""
    number = LINES.index(header)
    around = [LINES[number - 1], LINES[number + 1]]
    return "\n".join(line for line in around if line.startswith("#"))
