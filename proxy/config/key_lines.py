"""On which line each key of a TOML document stands, which tomllib does not tell.

A scanner, not a second parser: it reads only what tomllib has accepted, so it checks nothing and
looks at values just closely enough to know where they end. It follows the grammar of TOML 1.0
(https://toml.io/en/v1.0.0) in how keys come about: table headers, arrays of tables, dotted and
quoted keys, inline tables. Elements of arrays have lines, too.
"""

from __future__ import annotations

import re
import tomllib

from proxy.config.wording import Key

_BLANK = re.compile(r"(?:[ \t\n]+|#[^\n]*)*")
_NAME = re.compile(r"""[A-Za-z0-9_-]+|"(?:\\.|[^"\\])*"|'[^']*'""")
_SCALAR = re.compile(
    r'''
      """ (?: \\. | [^\\] )*? "{3,5}    # up to two quotes may stand before the closing three
    | \'\'\' .*? '{3,5}
    | " (?: \\. | [^"\\] )* "
    | ' [^']* '
    | [^,\]}\#\n]+                      # numbers, booleans; dates may have a blank inside
    ''',
    re.VERBOSE | re.DOTALL,
)


def key_lines(text: str) -> dict[Key, int]:
    """The 1-based line of each table, key and array element.

    A table has the line of its header. One that only longer headers or dotted keys imply has the
    line of the first of these. An array of tables has the line of its first header.

    Args:
        text: A document that tomllib accepts.
    """
    return _Scanner(text).scan()


class _Scanner:
    def __init__(self, text: str) -> None:
        self._text = text.replace("\r\n", "\n")
        self._position = 0
        self._lines: dict[Key, int] = {}
        self._table_counts: dict[Key, int] = {}

    def scan(self) -> dict[Key, int]:
        table: Key = ()
        while character := self._peek():
            if character == "[":
                table = self._header()
            else:
                self._pair(table)
        return self._lines

    def _header(self) -> Key:
        """``[table]`` or ``[[array of tables]]``; returns what the pairs below it belong to."""
        line = self._line()
        brackets = 2 if self._text.startswith("[[", self._position) else 1
        self._position += brackets
        *parents, name = self._names()
        self._position += brackets

        key: Key = ()
        for parent in parents:
            key = self._latest((*key, parent))
            self._lines.setdefault(key, line)
        key = (*key, name)
        if brackets == 2:  # noqa: PLR2004 - [[ ]]
            self._lines.setdefault(key, line)
            self._table_counts[key] = self._table_counts.get(key, 0) + 1
            key = self._latest(key)
        self._lines[key] = line
        return key

    def _latest(self, key: Key) -> Key:
        """A header inside of an array of tables means the array's last table."""
        count = self._table_counts.get(key)
        return key if count is None else (*key, count - 1)

    def _pair(self, table: Key) -> None:
        line = self._line()
        key = table
        for name in self._names():
            key = (*key, name)
            self._lines.setdefault(key, line)
        self._position += 1  # =
        self._value(key)

    def _value(self, key: Key) -> None:
        match self._peek():
            case "[":
                self._array(key)
            case "{":
                self._inline_table(key)
            case _:
                self._match(_SCALAR)

    def _array(self, key: Key) -> None:
        self._position += 1
        index = 0
        while self._peek() != "]":
            self._lines[*key, index] = self._line()
            self._value((*key, index))
            index += 1
            self._comma()
        self._position += 1

    def _inline_table(self, key: Key) -> None:
        self._position += 1
        while self._peek() != "}":
            self._pair(key)
            self._comma()
        self._position += 1

    def _comma(self) -> None:
        if self._peek() == ",":
            self._position += 1

    def _names(self) -> list[str]:
        """The parts of a dotted key."""
        names = [self._name()]
        while self._peek() == ".":
            self._position += 1
            names.append(self._name())
        return names

    def _name(self) -> str:
        self._peek()
        name = self._match(_NAME)
        return next(iter(tomllib.loads(f"{name} = 0")))  # which knows all escapes

    def _peek(self) -> str:
        """The next character that is no blank and no comment, or nothing at the end."""
        self._match(_BLANK)
        return self._text[self._position : self._position + 1]

    def _match(self, pattern: re.Pattern[str]) -> str:
        found = pattern.match(self._text, self._position)
        assert found is not None, "tomllib has accepted the document"  # noqa: S101
        self._position = found.end()
        return found[0]

    def _line(self) -> int:
        """The line of the position. Counted anew each time: this is for one error in one file."""
        return self._text.count("\n", 0, self._position) + 1
