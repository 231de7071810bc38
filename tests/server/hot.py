"""A proxy in which everything is hot that can be, and the targets of it."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Self

from proxy.events import Event, Published
from proxy.nix.store_path import HASH_PART_LENGTH
from tests.closures import SigningKey, StoreEntry
from tests.inside import InsideProxy
from tests.memory import InMemory
from tests.simulator import BinaryCacheSimulator

KEY = SigningKey("test-cache-1")
"""The key that the fixtures trust."""

SMALL = StoreEntry.make("small-1.0", random.Random(1).randbytes(3_000), compression="none")
LARGE = StoreEntry.make("large-1.0", random.Random(2).randbytes(1_200_000), compression="none")
UNASKED = StoreEntry.make("unasked-1.0", b"nobody has asked for this\n", compression="zstd")
MISSING = StoreEntry.make("missing-1.0")

NARINFO = SMALL.narinfo_path
NAR = f"/nar/{SMALL.hash_part}-{SMALL.nar_hash}.nar"
ABSENT = MISSING.narinfo_path
HOT = (NARINFO, NAR, ABSENT)
"""Targets that the fast lane answers once they are hot."""

LARGE_NAR = f"/nar/{LARGE.hash_part}-{LARGE.nar_hash}.nar"


class InMemoryProxy(InsideProxy):
    """A proxy whose NARs stay in memory until it has stopped, so that the fast lane always has them at hand.

    Attributes:
        memory: What keeps them there.
    """

    async def start(self) -> Self:
        """Open the store and serve."""
        self.memory = InMemory(self.folder.glob("nar/*"))
        return await super().start()

    async def stop(self) -> None:
        """Stop serving and close the store."""
        with self.memory:
            await super().stop()

    def observe(self, event: Event) -> None:
        """Keep what was just put away."""
        if isinstance(event, Published):
            for nar in self.folder.glob(f"nar/{event.what[:HASH_PART_LENGTH]}-*"):
                self.memory.keep(nar)
        super().observe(event)


def hot_proxy(
    folder: Path, cache: BinaryCacheSimulator, *, negative_ttl: float = 60
) -> InMemoryProxy:
    """Return a proxy with a store in that folder, which `heat` makes hot once it runs."""
    return InMemoryProxy(folder, cache.url, keys=[KEY.public], negative_ttl=negative_ttl)


async def heat(proxy: InsideProxy) -> None:
    """Ask for everything until it is hot."""
    for entry in (SMALL, LARGE):
        url = await proxy.nar_url(entry.hash_part)
        for _ in range(2):  # once as it arrives, and once from the store
            assert (await proxy.pull(url)).body == bytes(entry.file)
            await proxy.idle()
    assert (await proxy.pull(ABSENT)).status == 404
