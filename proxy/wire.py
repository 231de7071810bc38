"""What processes of ours say to each other has in common: typed MessagePack, and how errors are told.

Errors arrive as the class that was raised, so that statuses and logs do not depend on which process they
were raised in.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from msgspec import Struct

from proxy.errors import ProxyError


class Message(Struct, frozen=True, array_like=True, tag=True):
    """Something that is said."""


class Failed(Message, frozen=True):
    """An error: its class, its message, its attributes. A ``kind`` that is empty is a fault of ours."""

    kind: str
    message: str
    details: dict[str, str | int | float | None] = {}

    @classmethod
    def of(cls, error: ProxyError) -> Failed:
        """Write down an error."""
        details = {
            name: value
            for name, value in vars(error).items()
            if isinstance(value, str | int | float | None)
        }
        return cls(type(error).__name__, str(error), details)

    def error(self) -> Exception:
        """Return the error as it was raised."""
        kind = _ERRORS.get(self.kind)
        if kind is None:
            return RuntimeError(self.message)
        error = kind.__new__(kind)
        error.args = (self.message,)
        vars(error).update(self.details)
        return error


def _tree(kind: type[ProxyError]) -> Iterator[type[ProxyError]]:
    yield kind
    for below in kind.__subclasses__():
        yield from _tree(below)


_ERRORS: Final = {kind.__name__: kind for kind in _tree(ProxyError)}
