"""A mapping that keeps what was used most recently, and no more than a number of things."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from typing import Generic, TypeVar

K = TypeVar("K")
V = TypeVar("V")


class Recent(Generic[K, V]):
    """The things used last, as many as may be kept.

    Args:
        most: How many to keep, or how much of them by ``weigh``.
        on_drop: Called with each thing that is kept no longer.
        weigh: How much a thing counts.
    """

    def __init__(
        self,
        most: int,
        on_drop: Callable[[V], object] | None = None,
        weigh: Callable[[V], int] = lambda _thing: 1,
    ) -> None:
        self._most = most
        self._on_drop = on_drop
        self._weigh = weigh
        self._weight = 0
        self._things: OrderedDict[K, V] = OrderedDict()

    def __len__(self) -> int:
        return len(self._things)

    @property
    def peek(self) -> Callable[[K], V | None]:
        """Returns what is kept under a key, or None; counts as no use, and costs next to nothing."""
        return self._things.get

    def get(self, key: K) -> V | None:
        """Return what is kept under ``key``, which counts as a use, or None."""
        thing = self._things.get(key)
        if thing is not None:
            self._things.move_to_end(key)
        return thing

    def put(self, key: K, thing: V) -> None:
        """Keep ``thing``, and drop what was not used for longest when there are too many."""
        self.drop(key)
        self._things[key] = thing
        self._weight += self._weigh(thing)
        while self._weight > self._most:
            self.drop(next(iter(self._things)))

    def drop(self, key: K) -> None:
        """Forget what is kept under ``key``, if anything."""
        dropped = self._things.pop(key, None)
        if dropped is not None:
            self._weight -= self._weigh(dropped)
            if self._on_drop is not None:
                self._on_drop(dropped)

    def clear(self) -> None:
        """Forget everything."""
        for key in tuple(self._things):
            self.drop(key)

    def values(self) -> Iterable[V]:
        """Everything that is kept, in no particular order; this counts as no use."""
        return self._things.values()

    def items(self) -> Sequence[tuple[K, V]]:
        """Everything that is kept now, with its key; this counts as no use."""
        return tuple(self._things.items())
