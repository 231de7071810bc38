"""What a worker tells the look-ahead of its clients: each thing once, so that hits stay cheap."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from proxy.nix.store_path import HashPart
from proxy.workers.messages import AskedNar, AskedPath, Connected, Disconnected, Note

MOST_ASKED: Final = 100_000
"""Paths for which it is remembered that one client was given them; then all are told again."""


@dataclass(slots=True)
class _Client:
    connections: int = 0
    fetches: bool = False
    asked: set[HashPart] = field(default_factory=set)


class Audience:
    """Tells the core what clients do.

    Args:
        tell: Takes a note to the core.
    """

    def __init__(self, tell: Callable[[Note], None]) -> None:
        self._tell = tell
        self._clients: dict[str, _Client] = {}

    def connected(self, name: str) -> None:
        """A client has opened a connection."""
        self._clients.setdefault(name, _Client()).connections += 1
        self._tell(Connected(name))

    def disconnected(self, name: str) -> None:
        """A client has closed a connection."""
        client = self._clients.get(name)
        if client is None:
            return
        client.connections -= 1
        if client.connections == 0:
            del self._clients[name]
        self._tell(Disconnected(name))

    def asked_path(self, name: str, hash_part: HashPart) -> None:
        """A client was given a narinfo."""
        client = self._clients.get(name)
        if client is None or hash_part in client.asked:
            return
        if len(client.asked) >= MOST_ASKED:
            client.asked.clear()
        client.asked.add(hash_part)
        self._tell(AskedPath(name, hash_part))

    def asked_nar(self, name: str) -> None:
        """A client has asked for a NAR."""
        client = self._clients.get(name)
        if client is not None and not client.fetches:
            client.fetches = True
            self._tell(AskedNar(name))
