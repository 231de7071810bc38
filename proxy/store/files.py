"""Files as the rest of the proxy holds them: open for reading, or partial and growing.

Whoever reads or writes a file holds a shared flock(2) on it, which the kernel takes back when the last
descriptor is closed, also of a process that dies; so `in_use` sees all of them, whatever process they are in.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Self

from proxy.errors import DamagedError, StoreError
from proxy.store.pages import STRIDE, ask_for, bring_in_beginning, look_at, read_in_memory

_DAMAGE = frozenset({errno.EIO, errno.EUCLEAN, errno.EBADMSG})
"""What the kernel says of what cannot be read any more: bad blocks, inconsistency, a wrong checksum."""

BEGINNING = 2**14
"""Bytes of a file at hand that are read in any case: they are sent with what goes before them."""

BLOCK = 512
"""The unit of ``st_blocks`` (stat(2)), whatever the file system's own block size is."""


def disk_usage(status: os.stat_result) -> int:
    """Return the bytes that a file takes on the disk."""
    return status.st_blocks * BLOCK


@contextlib.contextmanager
def disk(what: str) -> Iterator[None]:
    """Translate what the operating system says of the disk; ``what`` could not be done."""
    try:
        yield
    except OSError as error:
        raise StoreError(f"{what}: {error.strerror or error}") from error


@contextlib.contextmanager
def reading(what: str) -> Iterator[None]:
    """As `disk`, of a complete file: what cannot be read any more is damaged."""
    try:
        yield
    except OSError as error:
        raise unreadable(what, error) from error


def unreadable(what: str, error: OSError) -> StoreError:
    """Say what the operating system says of a complete file: `reading`."""
    kind = DamagedError if error.errno in _DAMAGE else StoreError
    return kind(f"{what}: {error.strerror or error}")


def flush(path: str | Path) -> None:
    """Wait until a file, or the names in a folder, have reached the disk.

    Raises:
        OSError: The disk failed.
    """
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def in_use(path: Path) -> bool:
    """Tell whether anybody reads or writes a file, where files can be locked (on NFS they cannot be).

    Raises:
        OSError: It cannot be opened.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(fd)
    return False


def _claim(fd: int) -> None:
    """Let `in_use` know. Where files cannot be locked, an evicted one is still read to its end."""
    with contextlib.suppress(OSError):
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)


class OpenFile:
    """A complete file, open for reading. Whoever has it closes it.

    Args:
        fd: The descriptor, owned from now on.
        size: Bytes in the file.
    """

    __slots__ = ("fd", "size")

    def __init__(self, fd: int, size: int) -> None:
        self.fd = fd
        self.size = size

    @classmethod
    def at(cls, path: str | Path) -> Self | None:
        """Open ``path``, or return None when there is no such file.

        Raises:
            StoreError: Something other than absence.
        """
        with reading(f"cannot read {os.path.basename(path)}"):
            try:
                fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError:
                return None
            _claim(fd)
            return cls(fd, os.fstat(fd).st_size)

    @classmethod
    def at_hand(cls, path: str, size: int, whole: int) -> tuple[bytearray, Self | None] | None:
        """Read what is to be sent at once, if it is as long as it should be and in memory.

        Nothing keeps it from being evicted, which takes it from nobody who has it open.

        Args:
            path: The file.
            size: Bytes that it should have.
            whole: Bytes up to which all of it is read.

        Returns:
            All of it; or the first `BEGINNING` bytes, and the file for the rest.

        Raises:
            BlockingIOError: It is not in memory, and the disk was asked for it: it may be there soon.
        """
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return None
        try:
            if size <= max(whole, BEGINNING):
                content = read_in_memory(fd, 0, size + 1)
                if len(content) == size:
                    return content, None
                look_at(fd, 0, size)  # perhaps there is more on the disk
            else:
                content = read_in_memory(fd, 0, BEGINNING)
                if size > STRIDE:
                    look_at(fd, STRIDE, size)
                if len(content) == BEGINNING and len(read_in_memory(fd, size - 1, 2)) == 1:
                    rest, fd = cls(fd, size), -1
                    return content, rest
        except BlockingIOError:
            if ask_for(fd, size):
                raise
        except OSError:
            pass
        finally:
            if fd >= 0:
                os.close(fd)
        return None

    async def check(self, size: int | None) -> None:
        """See that the file is as long as it should be, and that its beginning can be read.

        Args:
            size: How long it should be; None where that is not known, though never empty.

        Raises:
            DamagedError: It is not, or cannot.
            StoreError: The disk does not answer.
        """
        if self.size != size and (size is not None or self.size == 0):
            wanted = "some" if size is None else size
            raise DamagedError(f"the file has {self.size} bytes instead of {wanted}")
        await bring_in_beginning(self.fd)
        with reading("cannot read the file"):
            os.pread(self.fd, 1, 0)

    @classmethod
    def holding(cls, content: bytes) -> Self:
        """Make a file of memory that holds something small which the disk did not take.

        Raises:
            StoreError: There are no descriptors left.
        """
        with disk("cannot use memory"):
            file = cls(os.memfd_create("file", os.MFD_CLOEXEC), len(content))
            os.pwrite(file.fd, content, 0)
            return file

    async def wait_beyond(self, _position: int) -> int:
        """Return how far the file may be read: a complete one to its end."""
        return self.size

    async def size_known(self) -> int:
        """Return the size, which a complete file has."""
        return self.size

    def read_at_once(self) -> bytes | bytearray:
        """Return the beginning of the file, as far as it can be read without waiting for a disk.

        For what was read just before: a file system that cannot tell (no ``RWF_NOWAIT``) is believed
        to have it in memory.

        Raises:
            StoreError: The disk failed.
        """
        with disk("cannot read"):
            try:
                return read_in_memory(self.fd, 0, self.size)
            except BlockingIOError:
                return b""
            except OSError as error:
                if error.errno != errno.EOPNOTSUPP:
                    raise
                return os.pread(self.fd, self.size, 0)

    def close(self) -> None:
        """Close the descriptor; safe to repeat."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@contextlib.contextmanager
def closed_on_failure(file: OpenFile) -> Iterator[None]:
    """Close a file unless what is done with it succeeds."""
    try:
        yield
    except BaseException:
        file.close()
        raise


class Partial:
    """A file that is still being written, under a name that nothing reads.

    One writer appends; readers take descriptors of their own with `reader` and use positional reads, so
    nobody moves anybody's offset.

    Args:
        path: A name inside of the store's partial folder; a new one, unless ``resume``.
        note: A file that goes when this one goes, or gets its final name.
        resume: Go on with what somebody left under this name.

    Raises:
        StoreError: The file cannot be made, or is not there to go on with.
    """

    __slots__ = ("_fd", "note", "path", "size")

    def __init__(self, path: str | Path, note: Path | None = None, *, resume: bool = False) -> None:
        self.path = os.fspath(path)
        self.note = note
        self.size = 0
        mode = 0 if resume else os.O_CREAT | os.O_EXCL
        with disk("cannot start a file"):
            self._fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | mode, 0o644)
            if resume:
                self.size = os.lseek(self._fd, 0, os.SEEK_END)
        _claim(self._fd)

    @classmethod
    def closed(cls, path: str, size: int) -> Self:
        """Stand for a file that is complete, to be published or discarded."""
        partial = cls.__new__(cls)
        partial.path, partial.size, partial.note, partial._fd = path, size, None, -1  # noqa: SLF001
        return partial

    def append(self, data: bytes | bytearray) -> None:
        """Write all of ``data`` behind what is there.

        Raises:
            StoreError: The disk refused.
        """
        view = memoryview(data)
        with disk("cannot write"):
            while view:
                view = view[os.write(self._fd, view) :]
        self.size += len(data)

    def read(self, position: int, count: int) -> bytes:
        """Return some of what was written; less at the end.

        Raises:
            StoreError: The disk failed.
        """
        with disk("cannot read"):
            return os.pread(self._fd, count, position)

    def flush(self) -> None:
        """Wait until everything written is on the disk.

        Raises:
            StoreError: It is not, and the file must be given up.
        """
        with disk("cannot flush"):
            os.fsync(self._fd)

    def reader(self) -> int:
        """Return a new descriptor of the file, which the caller closes.

        Raises:
            StoreError: There are no descriptors left.
        """
        with disk("cannot read"):
            return os.dup(self._fd)

    def close(self) -> None:
        """Close the writer's descriptor; the file stays."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def discard(self) -> None:
        """Remove the file, wherever it is in its life before publication."""
        self.close()
        self.drop_note()
        with contextlib.suppress(OSError):
            os.unlink(self.path)

    def drop_note(self) -> None:
        """Remove the note; the file cannot be left any more."""
        if self.note is not None:
            with contextlib.suppress(OSError):
                self.note.unlink(missing_ok=True)
