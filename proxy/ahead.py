"""What was done ahead of clients, and whether one has come for it since."""

from __future__ import annotations

from proxy.events import AskedAhead, FetchedAhead, FetchingAhead, Observer
from proxy.recent import Recent

MOST = 100_000
"""NARs fetched ahead of clients that are remembered until a client asks for them."""


class Ahead:
    """Lookups and downloads that no client has asked for yet, by name.

    Args:
        observer: Told of what is fetched ahead, and of who comes for it.
    """

    def __init__(self, observer: Observer) -> None:
        self._observer = observer
        self._unasked: Recent[str, int] = Recent(MOST)
        self._lookups: set[str] = set()
        self.unasked_bytes = 0
        """Bytes of NARs that were fetched ahead, and that no client has asked for since."""

    def begin(self, nar: str) -> None:
        """A NAR is being fetched, and no client has asked for it."""
        self._unasked.put(nar, 0)
        self._observer(FetchingAhead(nar))

    def landed(self, nar: str, size: int) -> None:
        """It is here."""
        self._observer(FetchedAhead(nar, size))
        if self.is_unasked(nar):
            self._unasked.put(nar, size)
            self.unasked_bytes += size
        else:
            self._observer(AskedAhead(nar, size))

    def failed(self, nar: str) -> None:
        """It could not be fetched."""
        self._unasked.drop(nar)

    def is_unasked(self, nar: str) -> bool:
        """Tell whether a NAR was fetched, or is being fetched, and no client has come for it."""
        return self._unasked.get(nar) is not None

    def asked(self, nar: str) -> bool:
        """A client asks for a NAR; tell whether it is the first, and comes for what was fetched ahead."""
        size = self._unasked.get(nar)
        if size is None:
            return False
        self._unasked.drop(nar)
        if size > 0:  # else it is still arriving
            self.unasked_bytes -= size
            self._observer(AskedAhead(nar, size))
        return True

    def begin_lookup(self, narinfo: str) -> None:
        """A narinfo is being looked up, and no client has asked for it."""
        self._lookups.add(narinfo)

    def is_unasked_lookup(self, narinfo: str) -> bool:
        """Tell whether a narinfo is being looked up for nobody yet."""
        return narinfo in self._lookups

    def end_lookup(self, narinfo: str) -> None:
        """It is there, or a client has asked for it."""
        self._lookups.discard(narinfo)
