"""Bytes that may be too many to hold, and the compressions a binary cache uses for them.

A `Blob` is a sequence of blocks, each with a repeat count. A small file is one block; a NAR of two
gigabytes is a header, one block repeated two thousand times, and a trailer. Slicing and joining
keep that form, so ranges, damage and truncation cost no memory either.
"""

from __future__ import annotations

import bz2
import gzip
import hashlib
import lzma
import zlib
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import brotli
import lz4.frame
import zstandard

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

PIECE = 64 * 1024
"""How many bytes are handled at a time: what a pipe or a socket buffer holds."""

Segment = tuple[bytes, int]
"""A block, and how often it is repeated."""


@dataclass(frozen=True, eq=False)
class Blob:
    """An immutable run of bytes: blocks, each repeated.

    Attributes:
        segments: The blocks in order, with their repeat counts.
    """

    segments: tuple[Segment, ...]

    @classmethod
    def of(cls, data: bytes | Blob) -> Blob:
        """Make a blob of `data`, which may be one already."""
        return data if isinstance(data, Blob) else cls(((data, 1),) if data else ())

    def __len__(self) -> int:
        """Return the number of bytes."""
        return sum(len(block) * count for block, count in self.segments)

    def __add__(self, other: Blob | bytes) -> Blob:
        """Return these bytes followed by those of `other`."""
        return Blob(self.segments + Blob.of(other).segments)

    def __getitem__(self, index: slice) -> Blob:
        """Return a run of these bytes; a step is not supported."""
        start, stop, _ = index.indices(len(self))
        return Blob(tuple(self._cut(start, stop)))

    def __bytes__(self) -> bytes:
        """Return all bytes at once."""
        return b"".join(block * count for block, count in self.segments)

    def __repr__(self) -> str:
        """Say how many bytes there are, not which."""
        return f"<Blob of {len(self)} bytes>"

    @cached_property
    def sha256(self) -> bytes:
        """The SHA-256 digest of all bytes, computed once."""
        digest = hashlib.sha256()
        for piece in self.pieces(1 << 20):
            digest.update(piece)
        return digest.digest()

    def pieces(self, size: int = PIECE) -> Iterator[bytes]:
        """Yield the bytes in order, at most `size` at a time."""
        for block, count in self.segments:
            for _ in range(count):
                for start in range(0, len(block), size):
                    yield block[start : start + size]

    def map(self, change: Callable[[bytes], bytes]) -> Blob:
        """Return a blob with `change` applied once to each block, repeat counts kept."""
        return Blob(tuple((change(block), count) for block, count in self.segments))

    def _cut(self, start: int, stop: int) -> Iterator[Segment]:
        for block, count in self.segments:
            length = len(block) * count
            yield from _cut_segment(block, max(start, 0), min(stop, length))
            start, stop = start - length, stop - length


def _cut_segment(block: bytes, start: int, stop: int) -> Iterator[Segment]:
    """Yield the at most three segments that make the bytes from `start` to `stop`."""
    if start >= stop:
        return
    first, head = divmod(start, len(block))
    last, tail = divmod(stop, len(block))
    if first == last:
        yield block[head:tail], 1
        return
    if head:
        yield block[head:], 1
        first += 1
    if last > first:
        yield block, last - first
    if tail:
        yield block[:tail], 1


def _zstd(data: bytes) -> bytes:
    return zstandard.ZstdCompressor(level=3).compress(data)


def _brotli(data: bytes) -> bytes:
    return bytes(brotli.compress(data, quality=4))


def _lz4(data: bytes) -> bytes:
    return bytes(lz4.frame.compress(data))


COMPRESSORS: dict[str, Callable[[bytes], bytes]] = {
    "none": lambda data: data,
    "identity": lambda data: data,
    "xz": lambda data: lzma.compress(data, preset=0),
    "lzma": lambda data: lzma.compress(data, format=lzma.FORMAT_ALONE, preset=0),
    "bzip2": bz2.compress,
    "gzip": lambda data: gzip.compress(data, compresslevel=6, mtime=0),
    "deflate": zlib.compress,
    "zstd": _zstd,
    "br": _brotli,
    "lz4": _lz4,
}
"""Nix's names of compressions, and HTTP's names of content codings, to a compressor."""

EXTENSIONS: dict[str, str] = {
    "none": "",
    "xz": ".xz",
    "lzma": ".lzma",
    "bzip2": ".bz2",
    "gzip": ".gz",
    "zstd": ".zst",
    "br": ".br",
    "lz4": ".lz4",
}
"""What a NAR's file name ends in."""

_ONE_STREAM = frozenset({"br", "lzma", "deflate"})


def compress(data: bytes | Blob, compression: str, *, streams: int = 1) -> Blob:
    """Compress `data`; a blob of several blocks gives as many frames, streams or members.

    Args:
        data: What to compress. A repeated block is compressed once.
        compression: A key of `COMPRESSORS`.
        streams: How many pieces to split plain bytes into first.

    Raises:
        ValueError: Several streams of a compression that knows only one.
    """
    blob = Blob.of(data)
    if streams > 1:
        size = max(1, -(-len(blob) // streams))
        whole = bytes(blob)
        blob = Blob(tuple((whole[at : at + size], 1) for at in range(0, len(whole), size)))
    if compression in _ONE_STREAM and sum(count for _, count in blob.segments) > 1:
        message = f"{compression} cannot be concatenated: it has one stream only"
        raise ValueError(message)
    if not blob.segments:
        return Blob.of(COMPRESSORS[compression](b""))
    return blob.map(COMPRESSORS[compression])
