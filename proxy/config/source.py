"""Where values were written, so that what is wrong with one can be said there."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

from proxy.config.key_lines import key_lines
from proxy.config.wording import Key, dotted
from proxy.errors import ConfigError

Written = TypeVar("Written")
Value = TypeVar("Value")


class Source:
    """A configuration file or a command-line flag.

    Args:
        name: The file as the operator named it, or the flag (``"--listen"``); None for no file.
        text: The file's text; None for a flag, which has neither lines nor keys.
        environ: The environment variables that paths may name.
    """

    def __init__(self, name: str | None, text: str | None, environ: Mapping[str, str]) -> None:
        self._name = name
        self._text = text
        self.environ = environ

    def read(self, key: Key, parse: Callable[[Written], Value], written: Written) -> Value:
        """What `parse` makes of the value that stands at the key.

        Raises:
            ConfigError: `parse` raised ValueError (`proxy.errors.ParseError` is one).
        """
        try:
            return parse(written)
        except ValueError as error:
            raise self.error(str(error), key) from None  # the cause could show a secret

    def error(self, reason: str, key: Key = (), *, line: int | None = None) -> ConfigError:
        """The error to raise for what stands at the key, or at a line of no key."""
        if self._text is None:
            return ConfigError(reason, file=self._name)
        return ConfigError(
            reason,
            file=self._name,
            line=line or self._line(self._text, key),
            key=dotted(key) or None,
        )

    @staticmethod
    def _line(text: str, key: Key) -> int | None:
        """The line of the key, or of the nearest table around it when the key is missing."""
        lines = key_lines(text) if key else {}
        around = (key[:length] for length in range(len(key), 0, -1))
        return next((lines[part] for part in around if part in lines), None)
