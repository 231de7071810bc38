"""Files of the store: open for reading, or partial and growing."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from proxy.errors import StoreError
from proxy.store.files import OpenFile, Partial, disk


@contextmanager
def _largest_file(size: int) -> Iterator[None]:
    """Let no file grow beyond `size` bytes: the kernel refuses the rest, as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def _is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


# --- reading ----------------------------------------------------------------------------------


def test_absent_file_is_none(tmp_path: Path) -> None:
    """A file that is not there is no error."""
    assert OpenFile.at(tmp_path / "absent") is None


def test_open_file_has_a_size(tmp_path: Path) -> None:
    """An open file knows its size, and reads from its start."""
    path = tmp_path / "file"
    path.write_bytes(b"hello")

    with OpenFile.at(path) or pytest.fail("absent") as file:
        assert (file.size, os.pread(file.fd, 10, 0)) == (5, b"hello")


def test_open_file_survives_its_name(tmp_path: Path) -> None:
    """What was opened can be read to its end after somebody removed the file."""
    path = tmp_path / "file"
    path.write_bytes(b"hello")

    with OpenFile.at(path) or pytest.fail("absent") as file:
        path.unlink()
        assert os.pread(file.fd, 10, 0) == b"hello"


def test_open_file_is_closed_once(tmp_path: Path) -> None:
    """The descriptor is closed at the end of the block; closing again closes nobody else's."""
    path = tmp_path / "file"
    path.touch()
    with OpenFile.at(path) or pytest.fail("absent") as file:
        fd = file.fd
    assert not _is_open(fd)

    other = os.open(path, os.O_RDONLY)  # has the number that became free
    file.close()
    assert _is_open(other)
    os.close(other)


def test_descriptors_are_not_inherited(tmp_path: Path) -> None:
    """No program that is started from here gets our files."""
    partial = Partial(tmp_path / "partial")
    with OpenFile.at(partial.path) or pytest.fail("absent") as file:
        reader = partial.reader()
        assert not any(os.get_inheritable(fd) for fd in (file.fd, reader))
        os.close(reader)
    partial.discard()


def test_other_failures_are_store_errors(tmp_path: Path) -> None:
    """A failure that is not absence is a `StoreError` of one line, with the system's reason."""
    (tmp_path / "file").touch()

    with pytest.raises(StoreError, match=r"^cannot read below: Not a directory$"):
        OpenFile.at(tmp_path / "file" / "below")


def test_disk_translates_system_errors_only() -> None:
    """What the disk says becomes a `StoreError`; a mistake of ours stays what it is."""
    with pytest.raises(StoreError, match=r"^cannot do it: reason$") as caught, disk("cannot do it"):
        raise OSError(5, "reason")
    assert isinstance(caught.value.__cause__, OSError)

    with pytest.raises(ValueError, match="ours"), disk("cannot do it"):
        raise ValueError("ours")


# --- writing ----------------------------------------------------------------------------------


def test_partial_grows(tmp_path: Path) -> None:
    """What was appended is in the file, in order, and counted."""
    partial = Partial(tmp_path / "partial")
    for data in (b"one", b"", b"two"):
        partial.append(data)
    partial.flush()

    assert (partial.size, Path(partial.path).read_bytes()) == (6, b"onetwo")
    partial.discard()


def test_partial_never_takes_a_name_that_is_taken(tmp_path: Path) -> None:
    """Nobody's file is opened for writing, neither a file nor what a link points to."""
    precious = tmp_path / "precious"
    precious.write_bytes(b"precious")
    (tmp_path / "link").symlink_to(precious)

    for name in ("precious", "link"):
        with pytest.raises(StoreError, match=r"^cannot start a file: File exists$"):
            Partial(tmp_path / name)
    assert precious.read_bytes() == b"precious"


def test_partial_needs_its_folder(tmp_path: Path) -> None:
    """A file that cannot be made is a `StoreError`."""
    with pytest.raises(StoreError, match=r"^cannot start a file: No such file"):
        Partial(tmp_path / "absent" / "partial")


def test_readers_do_not_move_the_writer(tmp_path: Path) -> None:
    """A reader reads what was written so far, as often as it likes, and the writer goes on behind it."""
    partial = Partial(tmp_path / "partial")
    partial.append(b"one")
    reader = partial.reader()
    assert [os.pread(reader, 10, 0), os.pread(reader, 10, 1)] == [b"one", b"ne"]
    partial.append(b"two")

    assert os.pread(reader, 10, 0) == b"onetwo"
    os.close(reader)
    partial.discard()


def test_readers_outlive_the_file(tmp_path: Path) -> None:
    """Who has a reader can read to the end after the file was given up."""
    partial = Partial(tmp_path / "partial")
    partial.append(b"one")
    reader = partial.reader()
    partial.discard()

    assert not Path(partial.path).exists()
    assert os.pread(reader, 10, 0) == b"one"
    os.close(reader)


def test_partial_that_is_refused(tmp_path: Path) -> None:
    """A refused write is a `StoreError`, also when the first part of it was taken."""
    partial = Partial(tmp_path / "partial")
    partial.append(b"x" * 1000)
    with _largest_file(4096), pytest.raises(StoreError, match=r"^cannot write: File too large$"):
        partial.append(b"y" * 8192)

    assert partial.size == 1000
    partial.discard()
    assert not Path(partial.path).exists()


def test_close_keeps_and_discard_removes(tmp_path: Path) -> None:
    """Both can be repeated; after a close the file is still there, after a discard it is gone."""
    partial = Partial(tmp_path / "partial")
    for _ in range(2):
        partial.close()
        assert Path(partial.path).exists()
    for _ in range(2):
        partial.discard()
        assert not Path(partial.path).exists()


def test_discard_leaves_the_published_file_alone(tmp_path: Path) -> None:
    """A file that got its final name is no longer the partial's to remove."""
    partial = Partial(tmp_path / "partial")
    partial.append(b"one")
    published = Path(partial.path).replace(tmp_path / "published")
    partial.discard()

    assert published.read_bytes() == b"one"
