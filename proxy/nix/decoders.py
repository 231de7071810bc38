"""Decompress a stream as it passes, in bounded memory, whatever it claims to contain.

Rules:

- a piece given to the sink has at most `PIECE_SIZE` bytes, however much a bomb expands to, so a
  sink that counts can stop it; what the sink raises passes through unchanged;
- a stream that asks for a larger window than it may have is refused before anything is allocated;
- formats that may be concatenated are: zstd frames, gzip members, xz and bzip2 streams, lz4 frames
  (Nix ≥ 2.35 writes zstd NARs as frames of 16 MiB);
- what follows the end and is not another stream, and an end that is missing, is damage. An empty
  file is a missing end.

The libraries release the GIL while they work, so decoders are worth a thread each.
"""

from __future__ import annotations

import bz2
import lzma
import zlib
from collections.abc import Callable
from functools import partial
from typing import Final, Protocol

import brotli
import lz4.frame
import zstandard

from proxy.errors import DecodeError, DecodeMemoryError, UnverifiableError

Sink = Callable[[bytes], object]
"""Takes the content, piece by piece."""

Data = bytes | memoryview
"""A piece of a compressed stream."""

PIECE_SIZE: Final = 256 * 1024
"""Bytes given to the sink at once, at most: two zstd blocks, and it fits a core's L2 cache."""

MODEST_WINDOW: Final = 16 << 20
"""Bytes of what came before that a stream may refer to by default: as much as ``zstd -19``, ``xz -7`` and the
frames of Nix ≥ 2.35 need. HTTP allows 8 MiB (RFC 9659)."""

LARGEST_WINDOW: Final = 128 << 20
"""What ``zstd --long`` uses, and what its decoder accepts without being told to; ``xz -9`` needs half."""

_LZMA_EXTRA: Final = 1 << 20
"""What a decoder of lzma takes besides its window, and more."""

# The standard library's decompressors copy what they do not consume, and a stream may be 14 bytes
# long: small inputs keep the copying of a thousand concatenated streams from becoming quadratic.
_INPUT_SIZE: Final = 64 * 1024


class Decoder(Protocol):
    """Takes a compressed stream in pieces and gives its content to a sink."""

    def feed(self, data: Data) -> None:
        """Take the next piece of the stream.

        Raises:
            DecodeError: If the stream is damaged.
            DecodeMemoryError: If it needs a larger window than it may have.
        """

    def finish(self) -> None:
        """Say that the stream is over.

        Raises:
            DecodeError: If it is not: something is missing.
        """


def decoder(compression: str, sink: Sink, window: int = MODEST_WINDOW) -> Decoder:
    """Make a decoder.

    Args:
        compression: As narinfos and ``Content-Encoding`` name it; one of `READABLE`.
        sink: Called with each piece of the content, in order.
        window: Bytes of what came before that the stream may refer to, where the format lets it choose.

    Raises:
        UnverifiableError: If nothing here reads that compression.
    """
    make = _DECODERS.get(compression)
    if make is None:
        raise UnverifiableError(f"nothing here reads the compression {compression[:20]!r}")
    return make(sink, window)


class _Identity:
    """No compression: only cuts the stream into pieces."""

    def __init__(self, sink: Sink, _window: int) -> None:
        self._sink = sink

    def feed(self, data: Data) -> None:
        if isinstance(data, bytes) and len(data) <= PIECE_SIZE:
            self._sink(data)
            return
        view = memoryview(data)
        for start in range(0, len(view), PIECE_SIZE):
            self._sink(bytes(view[start : start + PIECE_SIZE]))

    def finish(self) -> None:
        pass


class _Zstd:
    """Zstandard frames (RFC 8878).

    The library's stream writer goes on across frames, but does not say whether one has ended.
    `finish` finds out by feeding one more frame: only a decoder that waits for a frame answers with
    exactly its content; in the middle of one, the same bytes are an impossible block, a wrong
    checksum, or content or a skippable frame that goes on.
    """

    # In two parts, because libzstd (1.5.7) decodes a whole frame that comes in one, even where the
    # header of an earlier one is still incomplete.
    _PROBE = (bytes.fromhex("28b5"), bytes.fromhex("2ffd 20 01 090000 21"))
    _PROBE_CONTENT = b"!"

    def __init__(self, sink: Sink, window: int) -> None:
        self._started = False
        self._target = _WriteTarget(sink)
        self._writer = zstandard.ZstdDecompressor(max_window_size=window).stream_writer(
            self._target,  # type: ignore[arg-type]  # typed as a file; calls nothing but write
            write_size=PIECE_SIZE,
            closefd=False,
        )

    def feed(self, data: Data) -> None:
        if not data:
            return
        self._started = True
        try:
            self._writer.write(data)
        except zstandard.ZstdError as error:
            raise _refusal("zstd", error) from error

    def finish(self) -> None:
        answer: list[bytes] = []
        self._target.sink = answer.append
        try:
            for part in self._PROBE:
                self._writer.write(part)
        except zstandard.ZstdError:
            answer.clear()
        if not self._started or b"".join(answer) != self._PROBE_CONTENT:
            raise DecodeError("zstd: the stream is truncated")


class _WriteTarget:
    """A sink as zstandard wants it: with a method ``write``.

    Not the decoder itself: the library's writer holds it, and is invisible to Python's garbage
    collector, so that together they would never be freed.
    """

    def __init__(self, sink: Sink) -> None:
        self.sink = sink

    def write(self, piece: bytes) -> int:
        self.sink(piece)
        return len(piece)


class _Stream(Protocol):
    """One compressed stream, in the words of the standard library's ``lzma`` and ``bz2``."""

    @property
    def eof(self) -> bool:
        """Whether the end of the stream has been reached."""

    @property
    def needs_input(self) -> bool:
        """Whether all the content of the input so far has been returned."""

    @property
    def unused_data(self) -> bytes | None:
        """What came after the end of the stream; lz4 says None for nothing."""

    def decompress(self, data: Data, max_length: int, /) -> bytes:
        """Return at most ``max_length`` bytes of content."""


class _Streams:
    """Compressed streams, one after another.

    Args:
        name: The format, for error messages.
        start: Makes the decompressor of one stream that may have a window of so many bytes.
        several: Whether another stream may follow.
        padding: Null bytes may stand between streams in groups of this many; 0 forbids them.
    """

    def __init__(
        self,
        sink: Sink,
        window: int,
        *,
        name: str,
        start: Callable[[int], _Stream],
        several: bool = True,
        padding: int = 0,
    ) -> None:
        self._sink = sink
        self._name = name
        self._start = partial(start, window)
        self._several = several
        self._padding = padding
        self._padded = 0
        self._stream: _Stream | None = self._start()  # None between streams

    def feed(self, data: Data) -> None:
        view = memoryview(data)
        for start in range(0, len(view), _INPUT_SIZE):
            rest: Data = view[start : start + _INPUT_SIZE]
            while rest:
                stream = self._stream
                rest = self._between(rest) if stream is None else self._inside(stream, rest)

    def finish(self) -> None:
        if self._stream is not None or self._misaligned:
            raise DecodeError(f"{self._name}: the stream is truncated")

    def _inside(self, stream: _Stream, data: Data) -> bytes:
        """Decompress; return what lies behind the end of the stream."""
        while True:
            try:
                piece = stream.decompress(data, PIECE_SIZE)
            except _DAMAGE as error:
                raise _refusal(self._name, error) from error
            if piece:
                self._sink(piece)
            if stream.eof:
                self._stream = None
                return stream.unused_data or b""
            if stream.needs_input:
                return b""
            data = b""

    def _between(self, data: Data) -> bytes:
        """Skip padding and start the next stream; return where it begins."""
        rest = bytes(data).lstrip(b"\0") if self._padding else bytes(data)
        self._padded += len(data) - len(rest)
        if rest:
            if not self._several or self._misaligned:
                raise DecodeError(f"{self._name}: something follows the end of the stream")
            self._stream = self._start()
        return rest

    @property
    def _misaligned(self) -> bool:
        return self._padded % (self._padding or 1) != 0


class _Zlib:
    """A stream of zlib's, as a `_Stream`.

    Args:
        wbits: Which of its three formats (see `zlib.decompressobj`).
    """

    def __init__(self, wbits: int) -> None:
        self._stream = zlib.decompressobj(wbits)
        self.needs_input = True

    @property
    def eof(self) -> bool:
        return self._stream.eof

    @property
    def unused_data(self) -> bytes:
        return self._stream.unused_data

    def decompress(self, data: Data, max_length: int, /) -> bytes:
        piece = self._stream.decompress(data or self._stream.unconsumed_tail, max_length)
        self.needs_input = len(piece) < max_length
        return piece


class _Deflate:
    """What HTTP calls deflate, as a `_Stream`.

    It means zlib's format (RFC 9110 §8.4.1.2), but some servers send the naked stream of RFC 1951;
    like curl, this reads both. The first two bytes tell.
    """

    _HEADER_SIZE: Final = 2

    def __init__(self) -> None:
        self._head = b""
        self._stream: _Zlib | None = None

    @property
    def eof(self) -> bool:
        return self._stream is not None and self._stream.eof

    @property
    def needs_input(self) -> bool:
        return self._stream is None or self._stream.needs_input

    @property
    def unused_data(self) -> bytes:
        return self._stream.unused_data if self._stream else b""

    def decompress(self, data: Data, max_length: int, /) -> bytes:
        if self._stream is None:
            self._head += data
            if len(self._head) < self._HEADER_SIZE:
                return b""
            self._stream = _Zlib(zlib.MAX_WBITS if self._is_wrapped() else -zlib.MAX_WBITS)
            data = self._head
        return self._stream.decompress(data, max_length)

    def _is_wrapped(self) -> bool:
        """Tell whether it begins with zlib's header (RFC 1950 §2.2)."""
        header = int.from_bytes(self._head[: self._HEADER_SIZE])
        return (header >> 8) & 0x0F == zlib.DEFLATED and header % 31 == 0


class _Brotli:
    """A Brotli stream (RFC 7932), as a `_Stream`; it cannot be followed by anything."""

    # The library stops growing its buffer once it *exceeds* the limit; from this one, it ends below
    # PIECE_SIZE.
    _LIMIT: Final = PIECE_SIZE // 2

    unused_data: Final = b""

    def __init__(self) -> None:
        self._stream = brotli.Decompressor()
        self.needs_input = True

    @property
    def eof(self) -> bool:
        return bool(self._stream.is_finished())

    def decompress(self, data: Data, _max_length: int, /) -> bytes:
        piece: bytes = self._stream.process(data, output_buffer_limit=self._LIMIT)
        # It may have taken all its input and still hold content back: ask until nothing comes.
        self.needs_input = not piece and self._stream.can_accept_more_data()
        return piece


_DAMAGE: Final = (
    lzma.LZMAError,
    zlib.error,
    brotli.error,
    OSError,  # bz2
    ValueError,  # bz2
    RuntimeError,  # lz4
)
"""What the libraries raise about a stream; caught around their calls only."""

_MEMORY: Final = ("too much memory", "Memory usage limit")
"""What libzstd and liblzma say, and nothing else does, of a window that is too large."""


def _refusal(name: str, error: Exception) -> DecodeError:
    """Make an error of what a library says about a stream."""
    wants_memory = any(words in str(error) for words in _MEMORY)
    return (DecodeMemoryError if wants_memory else DecodeError)(f"{name}: {error}")


def _xz(window: int) -> _Stream:
    return lzma.LZMADecompressor(lzma.FORMAT_XZ, window + _LZMA_EXTRA)


def _lzma(window: int) -> _Stream:
    return lzma.LZMADecompressor(lzma.FORMAT_ALONE, window + _LZMA_EXTRA)


_DECODERS: Final[dict[str, Callable[[Sink, int], Decoder]]] = {
    "none": _Identity,
    "identity": _Identity,
    "zstd": _Zstd,
    "xz": partial(
        _Streams,
        name="xz",
        start=_xz,
        padding=4,
    ),
    "lzma": partial(
        _Streams,
        name="lzma",
        start=_lzma,
        several=False,
    ),
    "bzip2": partial(_Streams, name="bzip2", start=lambda _: bz2.BZ2Decompressor()),
    "gzip": partial(_Streams, name="gzip", start=lambda _: _Zlib(16 + zlib.MAX_WBITS)),
    "deflate": partial(_Streams, name="deflate", start=lambda _: _Deflate(), several=False),
    "br": partial(_Streams, name="br", start=lambda _: _Brotli(), several=False),
    "lz4": partial(_Streams, name="lz4", start=lambda _: lz4.frame.LZ4FrameDecompressor()),
}

READABLE: Final = frozenset(_DECODERS)
"""The compressions that `decoder` knows."""
