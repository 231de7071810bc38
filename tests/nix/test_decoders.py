"""Tests of `proxy.nix.decoders`."""

from __future__ import annotations

import bz2
import gc
import gzip
import lzma
import resource
import weakref
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Protocol

import brotli
import lz4.frame
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from proxy.errors import DecodeError, DecodeMemoryError, UnverifiableError
from proxy.nix.decoders import LARGEST_WINDOW, MODEST_WINDOW, PIECE_SIZE, READABLE, decoder
from proxy.nix.nar_name import EXTENSIONS
from tests.nix.strategies import contents, cuts, pieces

ENCODERS: dict[str, Callable[[bytes], bytes]] = {
    "none": bytes,
    "identity": bytes,
    "xz": lambda data: lzma.compress(data, preset=0),
    "lzma": lambda data: lzma.compress(data, lzma.FORMAT_ALONE, preset=0),
    "bzip2": bz2.compress,
    "gzip": lambda data: gzip.compress(data, mtime=0),
    "deflate": zlib.compress,
    "zstd": lambda data: zstandard.ZstdCompressor(write_checksum=True).compress(data),
    "br": lambda data: brotli.compress(data, quality=5),
    "lz4": lambda data: bytes(lz4.frame.compress(data, content_checksum=True)),
}
"""Another implementation than the one under test: the one-shot functions of the libraries."""

UNCOMPRESSED = {"none", "identity"}
COMPRESSED = sorted(ENCODERS.keys() - UNCOMPRESSED)
CONCATENABLE = ["bzip2", "gzip", "lz4", "xz", "zstd"]
SINGLE = ["br", "deflate", "lzma"]
TEXT = b"store path " * 40

every_compression = pytest.mark.parametrize("compression", sorted(ENCODERS))
every_compressed = pytest.mark.parametrize("compression", COMPRESSED)


def deflate_nakedly(content: bytes) -> bytes:
    """Compress without any header (RFC 1951)."""
    compressor = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    return compressor.compress(content) + compressor.flush()


def decode(compression: str, stream: Iterable[bytes], window: int = MODEST_WINDOW) -> bytes:
    """Decode all of a stream that comes in pieces."""
    content = bytearray()
    decoding = decoder(compression, content.extend, window)
    for piece in stream:
        decoding.feed(piece)
    decoding.finish()
    return bytes(content)


def test_names() -> None:
    """Every compression of Nix that a library reads is read, and what HTTP adds."""
    assert ENCODERS.keys() == READABLE
    assert READABLE - EXTENSIONS.keys() == {"identity", "deflate"}


@pytest.mark.parametrize("compression", [*sorted(EXTENSIONS.keys() - READABLE), "", "XZ", "x" * 99])
def test_what_no_library_reads_is_unverifiable(compression: str) -> None:
    """A compression that nothing here reads is refused before the first byte."""
    with pytest.raises(UnverifiableError):
        decoder(compression, lambda _: None)


@every_compression
@given(data=st.data())
def test_any_cutting_gives_the_content(compression: str, data: st.DataObject) -> None:
    """Whole, byte by byte or cut anywhere: the content comes out."""
    content = data.draw(contents)
    stream = ENCODERS[compression](content)
    assert decode(compression, data.draw(cuts(stream))) == content


@every_compression
def test_large_content_comes_in_small_pieces(compression: str) -> None:
    """Content larger than a piece, given in one piece as a memoryview, comes in bounded ones."""
    content = b"".join(number.to_bytes(4) for number in range(400_000))
    seen: list[bytes] = []
    decoding = decoder(compression, seen.append)
    decoding.feed(memoryview(ENCODERS[compression](content)))
    decoding.finish()
    assert b"".join(seen) == content
    assert max(map(len, seen)) <= PIECE_SIZE


@pytest.mark.parametrize("compression", [*sorted(ENCODERS), "naked deflate"])
@pytest.mark.parametrize("more", [-1, 0, 1, 2, 64, 128, 200, 257, 258, 259])
def test_nothing_is_held_back_at_the_end(compression: str, more: int) -> None:
    """Content that ends about where a piece does comes out whole, although no input is left."""
    content = bytes(PIECE_SIZE + more)
    stream = ENCODERS.get(compression, deflate_nakedly)(content)
    assert decode(compression.removeprefix("naked "), [stream]) == content


@pytest.mark.parametrize("compression", CONCATENABLE)
@given(data=st.data())
def test_concatenated_streams(compression: str, data: st.DataObject) -> None:
    """Streams one after another, empty ones too, decode to their contents one after another."""
    parts = data.draw(st.lists(contents, min_size=1, max_size=4))
    stream = b"".join(map(ENCODERS[compression], parts))
    assert decode(compression, data.draw(cuts(stream))) == b"".join(parts)


@pytest.mark.parametrize("compression", SINGLE)
@pytest.mark.parametrize("step", [1, 1000])
def test_what_cannot_be_concatenated_ends(compression: str, step: int) -> None:
    """Formats without a magic number hold one stream; a second one is something that follows."""
    stream = ENCODERS[compression](TEXT)
    with pytest.raises(DecodeError):
        decode(compression, pieces(stream * 2, list(range(step, 2 * len(stream), step))))


@every_compressed
@pytest.mark.parametrize("garbage", [b"\0", b"x", b"garbage!" * 10, b"\0" * 4096])
def test_trailing_garbage(compression: str, garbage: bytes) -> None:
    """What follows the end and is no stream is damage (but for xz's padding)."""
    if compression == "xz" and garbage == bytes(4096):
        assert decode(compression, [ENCODERS[compression](TEXT), garbage]) == TEXT
        return
    for stream in ([ENCODERS[compression](TEXT), garbage], [ENCODERS[compression](TEXT) + garbage]):
        with pytest.raises(DecodeError):
            decode(compression, stream)


@every_compressed
def test_truncation_anywhere_is_noticed(compression: str) -> None:
    """However many bytes are missing at the end, the stream is damaged; all of them too."""
    stream = ENCODERS[compression](TEXT)
    for end in range(len(stream)):
        with pytest.raises(DecodeError, match=compression):
            decode(compression, [stream[:end]])


@pytest.mark.parametrize("compression", CONCATENABLE)
def test_truncation_of_a_later_stream_is_noticed(compression: str) -> None:
    """A second stream that is cut short is damage, although the first was complete."""
    first, second = ENCODERS[compression](TEXT), ENCODERS[compression](TEXT[::-1])
    for end in range(1, len(second)):
        with pytest.raises(DecodeError):
            decode(compression, [first + second[:end]])


@every_compressed
@given(data=st.data())
def test_damage_raises_nothing_else(compression: str, data: st.DataObject) -> None:
    """A stream with bytes changed is decoded or refused; no library's own error gets out."""
    stream = bytearray(ENCODERS[compression](data.draw(contents)))
    for place in data.draw(st.lists(st.integers(0, len(stream) - 1), min_size=1, max_size=4)):
        stream[place] = data.draw(st.integers(0, 255))
    try:
        decode(compression, data.draw(cuts(bytes(stream))))
    except DecodeError as error:
        assert str(error).startswith(f"{compression}: ")  # noqa: PT017  # decoding may also work


@every_compressed
@given(stream=st.binary(max_size=500))
def test_arbitrary_bytes_raise_nothing_else(compression: str, stream: bytes) -> None:
    """Bytes that are no stream at all are decoded or refused, too."""
    try:
        decode(compression, [stream])
    except DecodeError as error:
        assert str(error).startswith(f"{compression}: ")  # noqa: PT017  # decoding may also work


@pytest.mark.parametrize("compression", ["bzip2", "gzip", "lz4", "xz", "zstd"])
def test_checksums_are_checked(compression: str) -> None:
    """A bit flipped anywhere in the last bytes, where the checksum is, is damage."""
    stream = bytearray(ENCODERS[compression](TEXT))
    stream[-1] ^= 0x80
    with pytest.raises(DecodeError):
        decode(compression, [bytes(stream)])


@every_compression
def test_what_the_sink_raises_passes_through(compression: str) -> None:
    """The sink can stop the stream with an exception of its own, of whatever type."""

    def stop(piece: bytes) -> None:
        raise reason

    for reason in (KeyError("enough"), ValueError("enough"), OSError("enough"), RuntimeError()):
        decoding = decoder(compression, stop)
        with pytest.raises(type(reason)) as caught:
            decoding.feed(ENCODERS[compression](TEXT))
        assert caught.value is reason


@every_compression
def test_nothing_is_left_behind(compression: str) -> None:
    """A decoder that is dropped is freed at once, before its end or after, with all its buffers."""

    class Sink:
        def __call__(self, piece: bytes) -> None:
            pass

    for ended in (False, True):
        sink = Sink()
        alive = weakref.ref(sink)
        decoding = decoder(compression, sink)
        decoding.feed(ENCODERS[compression](TEXT))
        if ended:
            decoding.finish()
        del sink, decoding
        assert alive() is None


@pytest.mark.parametrize("groups", [1, 2, 1000])
def test_xz_padding(groups: int) -> None:
    """Null bytes in groups of four may stand between and after xz streams, however they come."""
    padding = bytes(4 * groups)
    stream = lzma.compress(b"one ") + padding + lzma.compress(b"two") + padding
    assert decode("xz", [stream]) == b"one two"
    assert decode("xz", [bytes([byte]) for byte in stream]) == b"one two"


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_xz_padding_of_another_size(size: int) -> None:
    """Padding that is not in groups of four is damage, between streams and at the end."""
    stream = lzma.compress(TEXT) + bytes(size)
    for pieces_of_it in ([stream], [stream + lzma.compress(TEXT)]):
        with pytest.raises(DecodeError):
            decode("xz", pieces_of_it)


@given(content=contents, data=st.data())
def test_naked_deflate(content: bytes, data: st.DataObject) -> None:
    """HTTP's deflate is read without zlib's header, too, as some servers send it."""
    assert decode("deflate", data.draw(cuts(deflate_nakedly(content)))) == content


@pytest.mark.parametrize("compression", ["zstd", "lz4"])
def test_skippable_frames(compression: str) -> None:
    """Frames that carry something else than content (RFC 8878 §3.1.2) are skipped."""
    skippable = bytes.fromhex("502a4d18 03000000") + b"abc"
    frame = ENCODERS[compression](TEXT)
    assert decode(compression, [skippable + frame + skippable + frame + skippable]) == TEXT * 2


def test_zstd_window_is_limited() -> None:
    """A frame that wants a window of 16 MiB is read; one of up to 128 MiB only where that is allowed."""

    def frame(window_log: int) -> bytes:
        descriptor = bytes([(window_log - 10) << 3])
        return bytes.fromhex("28b52ffd 00") + descriptor + bytes.fromhex("090000") + b"!"

    assert decode("zstd", [frame(24)]) == b"!"
    with pytest.raises(DecodeMemoryError):
        decode("zstd", [frame(25)])
    with pytest.raises(DecodeMemoryError):
        decode("zstd", [frame(24), frame(25)])
    assert decode("zstd", [frame(27)], LARGEST_WINDOW) == b"!"
    with pytest.raises(DecodeMemoryError):
        decode("zstd", [frame(28)], LARGEST_WINDOW)


def test_lzma_memory_is_limited() -> None:
    """A stream that wants a dictionary of 4 GiB is refused before anything is allocated."""
    stream = bytearray(lzma.compress(TEXT, lzma.FORMAT_ALONE))
    stream[1:5] = (2**32 - 1).to_bytes(4, "little")
    with pytest.raises(DecodeMemoryError):
        decode("lzma", [bytes(stream)], LARGEST_WINDOW)


def test_xz_memory_is_limited() -> None:
    """The same for xz; level 7 needs no more than is usual, and what the highest makes is read, too."""
    assert decode("xz", [lzma.compress(TEXT, preset=7)]) == TEXT
    highest = lzma.compress(TEXT, preset=9 | lzma.PRESET_EXTREME)
    with pytest.raises(DecodeMemoryError):
        decode("xz", [highest])
    assert decode("xz", [highest], LARGEST_WINDOW) == TEXT
    stream = bytearray(lzma.compress(TEXT))
    header = slice(12, 12 + 4 * stream[12])
    dictionary = header.start + 4  # size, flags, filter, size of its properties
    assert stream[dictionary - 2] == lzma.FILTER_LZMA2
    stream[dictionary] = 40
    stream[header.stop : header.stop + 4] = zlib.crc32(stream[header]).to_bytes(4, "little")
    with pytest.raises(DecodeMemoryError):
        decode("xz", [bytes(stream)], LARGEST_WINDOW)


BOMB_SIZE = 128 << 20
"""Bytes that each bomb expands to."""

BOUND = 32 << 20
"""Bytes by which memory may grow while a bomb goes off: a quarter of it."""


class Compressor(Protocol):
    """What the libraries' streaming compressors have in common."""

    def compress(self, data: bytes, /) -> bytes:
        """Return what is ready."""

    def flush(self) -> bytes:
        """Return the rest."""


COMPRESSORS: dict[str, Callable[[], Compressor]] = {
    "bzip2": lambda: bz2.BZ2Compressor(1),
    "deflate": lambda: zlib.compressobj(1),
    "gzip": lambda: zlib.compressobj(1, wbits=31),
    "lzma": lambda: lzma.LZMACompressor(lzma.FORMAT_ALONE, preset=0),
    "xz": lambda: lzma.LZMACompressor(preset=0),
    "zstd": lambda: zstandard.ZstdCompressor(1).compressobj(),
}


def bomb(compression: str) -> bytes:
    """Compress `BOMB_SIZE` null bytes without ever holding them."""
    block = bytes(1 << 20)
    blocks = [block] * (BOMB_SIZE // len(block))
    match compression:
        case "br":
            brotli_stream = brotli.Compressor(quality=1)
            return b"".join([*map(brotli_stream.process, blocks), brotli_stream.finish()])
        case "lz4":
            lz4_frame = lz4.frame.LZ4FrameCompressor(block_size=lz4.frame.BLOCKSIZE_MAX4MB)
            start = lz4_frame.begin()
            return b"".join([start, *map(lz4_frame.compress, blocks), lz4_frame.flush()])
        case _:
            compressor = COMPRESSORS[compression]()
            return b"".join([*map(compressor.compress, blocks), compressor.flush()])


def resident_memory() -> int:
    """Return the bytes of memory that this process holds, allocated by whomever."""
    pages = Path("/proc/self/statm").read_text().split()[1]
    return int(pages) * resource.getpagesize()


@every_compressed
def test_bombs_take_little_memory(compression: str) -> None:
    """A bomb fed in one piece goes off in small pieces, and memory does not grow with it."""
    stream = bomb(compression)
    assert len(stream) < BOMB_SIZE // 100
    gc.collect()
    before = most = resident_memory()
    seen = 0

    def sink(piece: bytes) -> None:
        nonlocal seen, most
        assert len(piece) <= PIECE_SIZE
        seen += len(piece)
        most = max(most, resident_memory())

    decoding = decoder(compression, sink)
    decoding.feed(stream)
    decoding.finish()
    assert seen == BOMB_SIZE
    assert most - before < BOUND
