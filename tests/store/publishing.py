"""What gets published in the tests of the store, and a program that publishes, to be traced."""

from __future__ import annotations

import asyncio
import json
import sys
import threading
from concurrent.futures import wait
from pathlib import Path
from types import TracebackType
from typing import Self

from proxy.errors import StoreError
from proxy.events import ignore
from proxy.nix.cache_info import CacheInfo
from proxy.nix.nar_name import NarName
from proxy.store.folder import Store
from proxy.store.publisher import Publication, Publisher, Rename
from tests.blobs import EXTENSIONS
from tests.closures import SigningKey, StoreEntry, closure

PATIENCE = 30.0
"""Seconds after which nobody waits any more."""

KEY = SigningKey("test-cache-1")


def nar_name(entry: StoreEntry) -> NarName:
    """Return the name that the NAR of `entry` has in the store."""
    extension = EXTENSIONS[entry.compression]
    return NarName.parse(f"{entry.hash_part}-{entry.nar_hash}.nar{extension}")


def narinfo_text(entry: StoreEntry) -> bytes:
    """Return the signed narinfo of `entry` as it lies in the store, next to its NAR."""
    return entry.but(fields={"URL": f"nar/{nar_name(entry)}"}).narinfo(KEY)


async def publish(store: Store, entry: StoreEntry, *, origin: str = "up0") -> None:
    """Write the NAR of `entry`, and publish it with its narinfo."""
    partial = store.partial()
    partial.append(bytes(entry.file))
    partial.close()
    await store.publish_nar(nar_name(entry), partial, narinfo_text(entry), origin=origin)


class HeldPublisher:
    """A publisher that stands still until released: what is submitted meanwhile makes one batch.

    It publishes from ``<folder>/partial`` to ``<folder>/store`` and ``<folder>/store/nar``.

    Attributes:
        published: What was reported as published, in order, without the one that holds the others up.
    """

    def __init__(self, folder: Path) -> None:
        """Make the folders and the publisher, and wait until it stands still."""
        self.partials = folder / "partial"
        self.root = folder / "store"
        self.nars = self.root / "nar"
        for each in (self.partials, self.nars):
            each.mkdir(parents=True, exist_ok=True)
        self.published: list[Publication] = []
        self._standing = threading.Event()
        self._released = threading.Event()
        self.publisher = Publisher(self._on_published)
        self._first = self.file("first")
        self.publisher.submit(self._first)
        assert self._standing.wait(PATIENCE)

    def _on_published(self, publication: Publication) -> None:
        if self._standing.is_set():
            self.published.append(publication)
            return
        self._standing.set()
        self._released.wait(PATIENCE)

    def nar(self, name: str) -> Publication:
        """Write a NAR and a narinfo that can be published."""
        renames = (
            _rename(self.partials / f"{name}.nar", self.nars),
            _rename(self.partials / f"{name}.narinfo", self.root),
        )
        return Publication(renames, origin="up0")

    def file(self, name: str) -> Publication:
        """Write a file that can be published."""
        return Publication((_rename(self.partials / name, self.root),), origin="up0")

    def submit(self, *publications: Publication) -> None:
        """Queue some."""
        for publication in publications:
            self.publisher.submit(publication)

    def release(self) -> None:
        """Let it go on."""
        self._released.set()

    def publish(self, *publications: Publication) -> None:
        """Publish all of them in one batch, and wait for the outcomes."""
        self.submit(*publications)
        self.release()
        pending = wait([each.done for each in publications], PATIENCE).not_done
        assert not pending

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.release()
        self.publisher.close()


def _rename(source: Path, folder: Path) -> Rename:
    """Write a file, whose content is its name, that is to go to a folder."""
    source.write_text(source.name)
    return Rename(str(source), str(folder / source.name))


def failures(*publications: Publication) -> dict[str, str]:
    """Return what became of those that were not published: the name, and why."""
    return {
        Path(each.renames[0].target).name: str(error)
        for each in publications
        if (error := each.done.exception(PATIENCE)) is not None
    }


def _publish_batch(folder: Path, count: int) -> dict[str, str]:
    with HeldPublisher(folder) as held:
        publications = [held.nar(f"{number}") for number in range(count)]
        publications.append(held.file("alone"))
        held.publish(*publications)
    return failures(*publications)


async def _publish_closure(folder: Path, count: int) -> dict[str, str]:
    store = Store(folder, CacheInfo(), ignore)
    entries = closure(count, depth=1 if count == 1 else 2, sizes=(100, 1000))
    outcomes = await asyncio.gather(
        *(publish(store, entry) for entry in entries), return_exceptions=True
    )
    await store.close()
    return {
        str(nar_name(entry)): str(outcome)
        for entry, outcome in zip(entries, outcomes, strict=True)
        if isinstance(outcome, StoreError)
    }


def main() -> None:
    """Publish so many NARs in a folder, all together, and print the failures as JSON.

    ``closure`` does it as the daemon does, by a `Store`; ``batch`` by a `HeldPublisher`, in one batch
    to which one file that is no NAR belongs, too.
    """
    what, folder, count = sys.argv[1:]
    if what == "closure":
        failed = asyncio.run(_publish_closure(Path(folder), int(count)))
    else:
        failed = _publish_batch(Path(folder), int(count))
    print(json.dumps(failed))  # noqa: T201 - that is what it is for


if __name__ == "__main__":
    main()
