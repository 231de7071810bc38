"""A porter that shows what it is asked for, for tests that want to see who did the work."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

from proxy.events import Event
from proxy.porter.messages import Outcome
from proxy.porter.porter import Porter
from proxy.store.publisher import Publication
from proxy.upstream.carriage import Cargo, Heading, Order
from tests.wire import until


class WatchedPorter(Porter):
    """A porter, with its process, that writes down what it does.

    Attributes:
        events: What it told its observer.
        orders: What it was to carry, oldest first.
        headings: How those answers began that came.
        publications: What it took to be published.
        on_outcome: Called when the process has told an outcome, and that has been taken in.
    """

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.orders: list[Order] = []
        self.headings: list[Heading] = []
        self.publications: list[Publication] = []
        self.on_outcome: Callable[[Outcome], None] = lambda _outcome: None
        super().__init__(self.events.append)

    async def carry(self, order: Order, cargo: Cargo) -> Heading:
        """Carry, and write it down."""
        self.orders.append(order)
        heading = await super().carry(order, cargo)
        self.headings.append(heading)
        return heading

    def publish(self, publication: Publication, done: Callable[[Exception | None], None]) -> bool:
        """Publish, and write it down if the process takes it."""
        taken = super().publish(publication, done)
        if taken:
            self.publications.append(publication)
        return taken

    async def ready(self) -> int:
        """Wait until it takes orders; return its process."""
        await until(lambda: self.at_hand)
        assert self.pid is not None
        return self.pid

    def signal(self, number: signal.Signals) -> None:
        """Send the process a signal, if it runs."""
        if self.pid is not None:
            os.kill(self.pid, number)

    @property
    def busy(self) -> bool:
        """Whether the process has something to do."""
        return bool(self._carrying or self._publishing)

    def _on_outcome(self, outcome: Outcome) -> None:
        super()._on_outcome(outcome)
        self.on_outcome(outcome)


def is_alive(pid: int) -> bool:
    """Tell whether a process runs; one that has ended and that nobody has waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False
