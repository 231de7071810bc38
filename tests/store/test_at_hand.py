"""Files that are sent at once: read or opened only when they are as long as they should be, and in memory."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from proxy.store import files, pages
from proxy.store.files import BEGINNING, OpenFile
from proxy.store.pages import LITTLE, STRIDE

SIZES = [
    *(1, 2, 100, BEGINNING - 1, BEGINNING, BEGINNING + 1, 3 * BEGINNING),
    *(BEGINNING + STRIDE, BEGINNING + STRIDE + 1, LITTLE, LITTLE + 1, 2**20),
]


def make(folder: Path, size: int) -> tuple[str, bytes]:
    """Make a file; return its name and its content."""
    path = folder / "file"
    content = random.Random(size).randbytes(size)
    path.write_bytes(content)
    return str(path), content


def descriptors() -> int:
    """Count what this process has open."""
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.mark.parametrize("whole", [0, BEGINNING, LITTLE])
@pytest.mark.parametrize("size", SIZES)
def test_what_is_read(tmp_path: Path, size: int, whole: int) -> None:
    """Of a small file all is read; of another one the beginning, and the rest is left in the file."""
    path, content = make(tmp_path, size)
    found = OpenFile.at_hand(path, size, whole)
    assert found is not None
    read, file = found
    if size <= max(whole, BEGINNING):
        assert read == content
        assert file is None
    else:
        assert read == content[:BEGINNING]
        assert file is not None
        with file:
            assert file.size == size
            assert os.pread(file.fd, size, BEGINNING) == content[BEGINNING:]


@pytest.mark.parametrize("whole", [0, LITTLE])
@pytest.mark.parametrize("difference", [-1, 1, -4_096, 4_096])
@pytest.mark.parametrize("size", SIZES)
def test_another_length(tmp_path: Path, size: int, difference: int, whole: int) -> None:
    """A file that is shorter or longer than it should be is not at hand, and is closed."""
    path, _ = make(tmp_path, max(0, size + difference))
    before = descriptors()
    try:
        found = OpenFile.at_hand(path, size, whole)
    except BlockingIOError:
        found = None  # who waits in vain takes the long way
    assert found is None
    assert descriptors() == before


@pytest.mark.parametrize("size", [size for size in SIZES if size > BEGINNING])
@pytest.mark.parametrize("missing", ["beginning", "half of it", "end"])
def test_a_page_that_is_missing(
    tmp_path: Path, size: int, missing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file of which some is only on the disk is not at hand, and is closed."""
    real = pages.read_in_memory

    def read(fd: int, start: int, count: int) -> bytearray:
        if missing == "half of it" and count > 2:
            return real(fd, start, count // 2)
        if (missing == "beginning") == (start == 0):
            raise BlockingIOError
        return real(fd, start, count)

    monkeypatch.setattr(files, "read_in_memory", read)
    path, _ = make(tmp_path, size)
    before = descriptors()
    try:
        found = OpenFile.at_hand(path, size, 0)
    except BlockingIOError:
        assert size <= LITTLE  # of which the disk was asked for
        found = None
    assert found is None
    assert descriptors() == before


def test_no_file(tmp_path: Path) -> None:
    """What is not there is not at hand."""
    assert OpenFile.at_hand(str(tmp_path / "file"), 1, 0) is None
