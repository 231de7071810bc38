"""The lines of keys: right in every document that tomllib accepts."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from itertools import count

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.config.key_lines import key_lines
from proxy.config.wording import Key

SCALARS = st.sampled_from(
    [
        *("1", "-1_000", "0xff", "+1.5e-3", "inf", "true", "1979-05-27", "07:32:00.5"),
        *("1979-05-27 07:32:00", "1979-05-27T07:32:00Z"),
        *('""', '"no = 1"', '"[no]"', r'"\" # \\"', '"{,}"', r'"\u005d"'),
        *("''", "'no = 1 # '", r"'\'", "'\"'"),
        *('""""""', '"""\nno = 1\n[no]\n"""', '""""""""', '"""\\""" """', '"""a""b\\\n  """""'),
        *("''''''", "'''\n[[no]]\n# '''", "''''a''\n'b'''''", r"'''\'''"),
    ]
)
BLANKS = st.sampled_from(["", " ", "\t "])
GAPS = st.sampled_from(["", " ", "\n", ' # no, ] } "\n', "\n\n# '''\n\t"])
STYLES = st.sampled_from(["{}", '"{}"', "'{}'", '"\\u0020{}.a # ["', "' {}.a # ['"])


class DocumentWriter:
    """Writes a document by chance, and down where each key went."""

    def __init__(self, data: st.DataObject) -> None:
        self.text = ""
        self.lines: dict[Key, int] = {}
        self._draw = data.draw
        self._numbers = count()
        self._arrays: dict[
            tuple[str, ...], Key
        ] = {}  # names of arrays of tables → their last table

    def write(self) -> str:
        """Write some statements."""
        table: Key = ()
        for _ in range(self._draw(st.integers(0, 8))):
            self.text += self._draw(GAPS)
            if self._draw(st.booleans()):
                table = self._header()
            else:
                self._pair(table, depth=0)
            self.text += self._draw(st.sampled_from(["\n", " # no = 1\n"]))
        return self.text

    def _line(self) -> int:
        return len(self.text.split("\n"))

    def _new_name(self) -> str:
        """Return a name as it is written: each only once, so nothing is ever defined twice."""
        return self._draw(STYLES).format(f"k{next(self._numbers)}")

    def _header(self) -> Key:
        line = self._line()
        names, is_array = self._header_names()
        key: Key = ()
        for length in range(1, len(names) + 1):
            known = self._arrays.get(names[:length])
            key = (*key, _meaning(names[length - 1])) if known is None else known
            self.lines.setdefault(key, line)
        if is_array:
            key = self._next_table(names, key)
            self.lines[key] = line
        dot = f"{self._draw(BLANKS)}.{self._draw(BLANKS)}"
        path = f"{self._draw(BLANKS)}{dot.join(names)}{self._draw(BLANKS)}"
        self.text += f"[[{path}]]" if is_array else f"[{path}]"
        return key

    def _header_names(self) -> tuple[tuple[str, ...], bool]:
        """Return a path: a known array for one more table of it, or something new somewhere."""
        parent: tuple[str, ...] = self._draw(st.sampled_from([(), *self._arrays]))
        one_more = self._draw(st.booleans())
        if parent and one_more:
            return parent, True
        new = [self._new_name() for _ in range(self._draw(st.integers(1, 2)))]
        return (*parent, *new), self._draw(st.booleans())

    def _next_table(self, names: tuple[str, ...], key: Key) -> Key:
        """Return the key of one more table of an array, new or known."""
        known = self._arrays.get(names)
        table: Key = (*key, 0) if known is None else (*known[:-1], int(known[-1]) + 1)
        inside = [other for other in self._arrays if other[: len(names)] == names]
        for other in inside:
            del self._arrays[other]
        self._arrays[names] = table
        return table

    def _pair(self, table: Key, depth: int) -> None:
        names = [self._new_name() for _ in range(self._draw(st.integers(1, 3)))]
        key = table
        for name in names:
            key = (*key, _meaning(name))
            self.lines[key] = self._line()
        self.text += f"{self._draw(BLANKS)}.{self._draw(BLANKS)}".join(names)
        self.text += f"{self._draw(BLANKS)}={self._draw(BLANKS)}"
        self._value(key, depth)

    def _value(self, key: Key, depth: int) -> None:
        kinds = [self._scalar, self._array, self._inline_table]
        self._draw(st.sampled_from(kinds if depth < 3 else kinds[:1]))(key, depth + 1)

    def _scalar(self, key: Key, depth: int) -> None:
        self.text += self._draw(SCALARS)

    def _array(self, key: Key, depth: int) -> None:
        length = self._draw(st.integers(0, 3))
        self.text += "["
        for index in range(length):
            self.text += self._draw(GAPS)
            self.lines[(*key, index)] = self._line()
            self._value((*key, index), depth)
            self.text += self._draw(GAPS)
            self.text += "," if index < length - 1 else self._draw(st.sampled_from(["", ","]))
        self.text += self._draw(GAPS) + "]"

    def _inline_table(self, key: Key, depth: int) -> None:
        self.text += "{" + self._draw(BLANKS)
        for index in range(self._draw(st.integers(0, 3))):
            self.text += "," + self._draw(BLANKS) if index else ""
            self._pair(key, depth)
            self.text += self._draw(BLANKS)
        self.text += "}"


def _meaning(name: str) -> str:
    """Return the name that is meant by one as written."""
    return name.replace("\\u0020", " ").strip("\"'")


def _keys(value: object, key: Key = ()) -> Iterator[Key]:
    """Yield the keys of everything in a document that tomllib has read."""
    if key:
        yield key
    items = enumerate(value) if isinstance(value, list) else ()
    for step, item in value.items() if isinstance(value, dict) else items:
        yield from _keys(item, (*key, step))


@given(st.data())
def test_lines_are_where_the_keys_were_written(data: st.DataObject) -> None:
    """Whatever a document is made of, each key, table and element has the line it stands on."""
    writer = DocumentWriter(data)
    text = writer.write()

    assert set(_keys(tomllib.loads(text))) == set(writer.lines)  # else the writer is wrong
    assert key_lines(text) == writer.lines
    assert key_lines(text.replace("\n", "\r\n")) == writer.lines


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("", {}),
        ("# a = 1", {}),
        ("\n\na = 1", {("a",): 3}),
        (
            "a.b.c = 1\na.b.d = 2",
            {("a",): 1, ("a", "b"): 1, ("a", "b", "c"): 1, ("a", "b", "d"): 2},
        ),
        # A table has the line of its own header, also when a longer one came first.
        ("[a.b]\n[a]", {("a",): 2, ("a", "b"): 1}),
        ("[[a]]\n[[a]]", {("a",): 1, ("a", 0): 1, ("a", 1): 2}),
        (
            "[[a]]\n[a.b]\nc = 1\n[[a]]\n[a.b]",
            {
                ("a",): 1,
                ("a", 0): 1,
                ("a", 0, "b"): 2,
                ("a", 0, "b", "c"): 3,
                ("a", 1): 4,
                ("a", 1, "b"): 5,
            },
        ),
        (
            "[[a]]\n[[a.b]]\n[[a.b]]\n[[a]]\n[[a.b]]",
            {
                ("a",): 1,
                ("a", 0): 1,
                ("a", 0, "b"): 2,
                ("a", 0, "b", 0): 2,
                ("a", 0, "b", 1): 3,
                ("a", 1): 4,
                ("a", 1, "b"): 5,
                ("a", 1, "b", 0): 5,
            },
        ),
        (
            "a = [\n  1,\n  { b = '''\n''', c = [\n2] },\n]\nd = 0",
            {
                ("a",): 1,
                ("a", 0): 2,
                ("a", 1): 3,
                ("a", 1, "b"): 3,
                ("a", 1, "c"): 4,
                ("a", 1, "c", 0): 5,
                ("d",): 7,
            },
        ),
        # Not a dotted key, not an escape, and an escape.
        ('"a.b" = 1\n\'a\\tb\' = 2\n"a\\tb" = 3', {("a.b",): 1, ("a\\tb",): 2, ("a\tb",): 3}),
        ('a = """\nb = 1\n""""\nc = 2', {("a",): 1, ("c",): 4}),
    ],
)
def test_lines(text: str, lines: dict[Key, int]) -> None:
    """What the generated documents show by chance, by example."""
    assert key_lines(text) == lines
