"""Memory does not grow with the size of a NAR nor with the number of its readers."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from http.client import HTTPConnection, HTTPResponse
from urllib.parse import urlsplit

import pytest

from tests.closures import StoreEntry
from tests.conftest import RunDaemon, RunSimulator
from tests.daemon import DaemonProcess
from tests.faults import Gate

pytestmark = pytest.mark.timeout(110)

MIB = 1 << 20

IS_FULL = any(os.environ.get(name, "") not in {"", "0", "false"} for name in ("CI", "NCP_FULL"))

SIZE = (2048 if IS_FULL else 256) * MIB
"""Bytes of the NAR: half of it is more than `MOST`, so that it shows when it stays in memory."""

MOST = 120 * MIB
"""Bytes of memory that the daemon may have had at any moment."""

READERS = 50

TO_THE_END = 2
"""Readers that read it all: fifty would be a test of loopback."""

PART = 20 * MIB
"""Bytes after which the others leave."""

BUFFER = 256 * 1024


@pytest.fixture
def removed(daemon: RunDaemon) -> Iterator[RunDaemon]:
    """Return a function that runs a daemon whose store is removed at the end: it is large."""
    daemons: list[DaemonProcess] = []

    def run(*upstreams: str) -> DaemonProcess:
        daemons.append(daemon(*upstreams))
        return daemons[-1]

    yield run  # type: ignore[misc]
    for process in daemons:
        process.kill()
        for path in process.store.rglob("*"):
            if path.is_file():
                path.unlink()


class Download:
    """One client, in a thread of its own."""

    def __init__(self, url: str, path: str, everybody: threading.Barrier) -> None:
        self._address = urlsplit(url).netloc
        self._path = path
        self._everybody = everybody

    def read(self, most: int | None) -> tuple[int, str]:
        """Read the first byte, wait until everybody has, and read on; return size and SHA-256."""
        with closing(HTTPConnection(self._address, timeout=60)) as connection:
            connection.request("GET", self._path)
            answer = connection.getresponse()
            assert answer.status == 200
            digest = hashlib.sha256(answer.read(1))
            self._everybody.wait(60)
            return 1 + _read_on(answer, digest, most), digest.hexdigest()


def _read_on(answer: HTTPResponse, digest: hashlib._Hash, most: int | None) -> int:
    """Read at most so many bytes, or all there are, with a small buffer."""
    buffer = memoryview(bytearray(BUFFER))
    total = 0
    while most is None or total + 1 < most:
        room = BUFFER if most is None else min(BUFFER, most - total - 1)
        count = answer.readinto(buffer[:room])
        if not count:
            break
        digest.update(buffer[:count])
        total += count
    return total


@pytest.mark.parametrize(("compression", "size"), [("none", SIZE), ("zstd", SIZE // 2)])
def test_fifty_readers_of_one_cold_nar(
    compression: str, size: int, removed: RunDaemon, threaded_sim: RunSimulator
) -> None:
    """Fifty clients pull one large cold NAR at the same time, in less than 120 MB of memory.

    All of them are attached before the upstream goes on. Two read it whole, and the others leave
    after a part.
    """
    entry = StoreEntry.huge("huge-1.0", size, compression=compression)
    cache = threaded_sim(entry)
    gate = Gate(after=MIB)
    cache.fault(entry.nar_path, gate)
    proxy = removed(cache.url)
    narinfo = proxy.get(entry.narinfo_path).decode().splitlines()
    (url,) = (line.removeprefix("URL: ") for line in narinfo if line.startswith("URL: "))
    everybody = threading.Barrier(READERS, action=gate.open)
    download = Download(proxy.url, f"/{url}", everybody)
    limits = [None] * TO_THE_END + [PART] * (READERS - TO_THE_END)
    with ThreadPoolExecutor(READERS) as threads:
        results = list(threads.map(download.read, limits))
    proxy.wait_for_log("fetched")
    part = hashlib.sha256(bytes(entry.file[:PART])).hexdigest()
    whole = (len(entry.file), entry.file.sha256.hex())
    assert results == [whole] * TO_THE_END + [(PART, part)] * (READERS - TO_THE_END)
    assert cache.count(entry.nar_path) == 1
    assert proxy.rss < MOST, f"{proxy.rss / MIB:.0f} MiB"
