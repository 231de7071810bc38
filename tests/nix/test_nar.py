"""Tests of `proxy.nix.nar`."""

from __future__ import annotations

import hashlib
import lzma
from collections.abc import Callable, Iterable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.errors import (
    DecodeError,
    DecodeMemoryError,
    HashMismatchError,
    SizeMismatchError,
    TrustError,
    UnverifiableError,
)
from proxy.nix.decoders import READABLE
from proxy.nix.hashes import Hash
from proxy.nix.nar import NarVerifier
from proxy.nix.nar_name import EXTENSIONS
from tests.nix.strategies import contents, cuts, pieces, sha256, single_file_nar
from tests.nix.test_decoders import BOMB_SIZE, ENCODERS, bomb

NAR = single_file_nar(b"hello\n" * 1000)
READABLE_IN_NARINFO = sorted(READABLE & EXTENSIONS.keys())
UNREADABLE = sorted(EXTENSIONS.keys() - READABLE)

every_readable = pytest.mark.parametrize("compression", READABLE_IN_NARINFO)


def promise(compression: str, nar: bytes = NAR, **changes: Any) -> NarVerifier:
    """Make the verifier of a narinfo that tells the truth about ``nar``, but for ``changes``."""
    file = ENCODERS[compression](nar)
    truth: dict[str, Any] = {
        "compression": compression,
        "nar_hash": sha256(nar),
        "nar_size": len(nar),
        "file_hash": sha256(file),
        "file_size": len(file),
    }
    return NarVerifier(**(truth | changes))


def run(verifier: NarVerifier, stream: Iterable[bytes]) -> None:
    """Feed all of a stream."""
    for piece in stream:
        verifier.feed(piece)
    verifier.finish()


def verdict(verifier: NarVerifier, stream: Iterable[bytes]) -> bool:
    """Tell whether a stream is accepted."""
    try:
        run(verifier, stream)
    except TrustError:
        return False
    return True


def test_nar_vector() -> None:
    """A NAR with the hash that Nix gave it is accepted."""
    nar_hash = Hash.parse("sha256:04zwf782yjwnh3q6hz5izfd6jyip8kgw6g6yj43fiqhbyhdd0dqw")
    verifier = NarVerifier(compression="none", nar_hash=nar_hash, nar_size=120)
    run(verifier, [single_file_nar(b"hello\n")])
    assert verifier.decoded


@every_readable
@given(data=st.data())
def test_the_promised_nar_is_accepted(compression: str, data: st.DataObject) -> None:
    """The promised NAR is accepted however it is cut and whatever the narinfo does not tell."""
    nar = single_file_nar(data.draw(contents))
    untold = dict.fromkeys(data.draw(st.sets(st.sampled_from(["file_hash", "file_size"]))))
    file = ENCODERS[compression](nar)
    run(promise(compression, nar, **untold), data.draw(cuts(file)))


@every_readable
@given(data=st.data())
def test_the_verdict_does_not_depend_on_the_cutting(compression: str, data: st.DataObject) -> None:
    """Of a damaged file, the verdict is the same whole, byte by byte and cut anywhere."""
    nar = single_file_nar(data.draw(contents))
    file = bytearray(ENCODERS[compression](nar))
    start = data.draw(st.integers(0, len(file)))
    end = data.draw(st.integers(start, min(len(file), start + 8)))
    file[start:end] = data.draw(st.binary(max_size=8))
    untold = data.draw(st.sampled_from([{}, {"file_hash": None, "file_size": None}]))

    verdicts = {
        verdict(promise(compression, nar, **untold), stream)
        for stream in (
            [bytes(file)],
            pieces(bytes(file), list(range(1, len(file)))),
            data.draw(cuts(bytes(file))),
        )
    }
    assert len(verdicts) == 1
    if bytes(file) == ENCODERS[compression](nar):
        assert verdicts == {True}
    elif not untold:
        assert verdicts == {False}


@every_readable
def test_memoryviews_are_taken(compression: str) -> None:
    """Pieces may be views of a buffer that is used again for the next piece."""
    verifier = promise(compression)
    buffer = bytearray(100)
    for piece in pieces(file := ENCODERS[compression](NAR), list(range(100, len(file), 100))):
        buffer[: len(piece)] = piece
        verifier.feed(memoryview(buffer)[: len(piece)])
        buffer[:] = bytes(100)
    verifier.finish()


LIES: dict[str, tuple[dict[str, Any], type[TrustError]]] = {
    "another NarHash": ({"nar_hash": sha256(b"")}, HashMismatchError),
    "another FileHash": ({"file_hash": sha256(b"")}, HashMismatchError),
    "another FileHash in SHA-1": ({"file_hash": Hash("sha1", bytes(20))}, HashMismatchError),
    "NarSize too large": ({"nar_size": len(NAR) + 1}, SizeMismatchError),
    "NarSize too small": ({"nar_size": len(NAR) - 1}, SizeMismatchError),
    "FileSize too large": ({"file_size": 10**6}, SizeMismatchError),
    "FileSize too small": ({"file_size": 10}, SizeMismatchError),
}


@every_readable
@pytest.mark.parametrize("lie", LIES)
def test_each_lie_is_told_apart(compression: str, lie: str) -> None:
    """What differs from the promise is refused, with the error that says in what it differs."""
    changes, error = LIES[lie]
    with pytest.raises(error):
        run(promise(compression, **changes), [ENCODERS[compression](NAR)])


def test_errors_say_which_and_how() -> None:
    """The messages name the field, what was promised and what came."""
    with pytest.raises(HashMismatchError, match=f"NarHash: {sha256(NAR)} instead of sha256:0"):
        run(promise("xz", nar_hash=Hash("sha256", bytes(32))), [ENCODERS["xz"](NAR)])
    with pytest.raises(SizeMismatchError, match=f"FileSize: 10 bytes instead of {len(NAR)}"):
        run(promise("none"), [NAR[:10]])
    with pytest.raises(SizeMismatchError, match="NarSize: more than the 10 bytes promised"):
        run(promise("none", nar_size=10), [NAR])


@every_readable
def test_another_nar_of_the_same_size(compression: str) -> None:
    """One byte changed before compressing is noticed by NarHash alone."""
    other = NAR.replace(b"hello", b"jello", 1)
    verifier = promise(compression, file_hash=None, file_size=None)
    with pytest.raises(HashMismatchError, match="NarHash"):
        run(verifier, [ENCODERS[compression](other)])


@pytest.mark.parametrize("compression", [name for name in READABLE_IN_NARINFO if name != "none"])
def test_truncation_without_file_size(compression: str) -> None:
    """A stream cut short is refused even where its content happens to be complete."""
    verifier = promise(compression, file_hash=None, file_size=None)
    with pytest.raises(DecodeError):
        run(verifier, [ENCODERS[compression](NAR)[:-1]])


def test_uncompressed_file_is_the_nar() -> None:
    """Without compression FileHash and NarHash are of the same bytes, and both are checked."""
    run(promise("none", file_hash=sha256(NAR)), [NAR])
    run(promise("none", file_hash=Hash("md5", hashlib.md5(NAR).digest())), [NAR])  # noqa: S324
    with pytest.raises(HashMismatchError, match="FileHash"):
        run(promise("none", file_hash=sha256(b"")), [NAR])


@pytest.mark.parametrize("compression", ["xz", "none"])
def test_the_first_byte_too_many_stops_it(compression: str) -> None:
    """At FileSize + 1 bytes the verifier stops, not at the end."""
    file = ENCODERS[compression](NAR)
    verifier = promise(compression, file_hash=None)
    verifier.feed(file)
    with pytest.raises(SizeMismatchError, match="FileSize"):
        verifier.feed(b"\0")


@pytest.mark.parametrize("compression", ["zstd", "xz", "br", "gzip"])
def test_a_bomb_stops_at_nar_size(compression: str) -> None:
    """A bomb is stopped by the first piece that goes beyond NarSize, long before its end."""
    stream = bomb(compression)
    verifier = NarVerifier(compression=compression, nar_hash=sha256(b""), nar_size=BOMB_SIZE // 8)
    with pytest.raises(SizeMismatchError, match="NarSize"):
        verifier.feed(stream[: len(stream) // 2])


DEMANDING = lzma.compress(NAR, preset=9)
"""NAR, so that reading it takes 65 MiB."""


@given(data=st.data())
def test_what_needs_much_memory_is_put_off(data: st.DataObject) -> None:
    """Where the file can be read again, it is judged by that, however it comes; and never before."""
    file: dict[str, Any] = {"file_hash": sha256(DEMANDING), "file_size": len(DEMANDING)}
    verifier = promise("xz", **file, again=True)
    for piece in data.draw(cuts(DEMANDING)):
        verifier.feed(piece)
    assert verifier.put_off
    with pytest.raises(DecodeMemoryError):
        verifier.finish()
    verifier.reread(data.draw(cuts(DEMANDING)))
    verifier.finish()


@pytest.mark.parametrize("lie", LIES)
def test_each_lie_is_found_in_what_was_put_off(lie: str) -> None:
    """What is judged later is judged as strictly, with the same errors."""
    changes, error = LIES[lie]
    truth: dict[str, Any] = {"file_hash": sha256(DEMANDING), "file_size": len(DEMANDING)}
    with pytest.raises(error):  # noqa: PT012  # when it is found does not matter
        verifier = promise("xz", **(truth | changes), again=True)
        verifier.feed(DEMANDING)
        verifier.reread([DEMANDING])
        verifier.finish()


def test_what_cannot_be_read_again_is_judged_at_once() -> None:
    """Then it gets the memory that it needs, up to 128 MiB."""
    verifier = promise("xz", file_hash=None, file_size=None)
    run(verifier, [DEMANDING])
    assert not verifier.put_off


@pytest.mark.parametrize("compression", UNREADABLE)
def test_unreadable_compressions_rest_on_file_hash(compression: str) -> None:
    """What no library reads is checked by FileHash and FileSize alone, and says so."""
    file = b"compressed by who knows what"
    make: Callable[..., NarVerifier] = lambda **told: NarVerifier(  # noqa: E731
        compression=compression, nar_hash=sha256(b""), nar_size=1, **told
    )
    verifier = make(file_hash=sha256(file), file_size=len(file))
    assert not verifier.decoded
    run(verifier, [file[:5], file[5:]])
    with pytest.raises(HashMismatchError, match="FileHash"):
        run(make(file_hash=sha256(file)), [file + b"!"])
    with pytest.raises(SizeMismatchError, match="FileSize"):
        run(make(file_hash=sha256(file), file_size=len(file)), [file + b"!"])
    with pytest.raises(UnverifiableError, match=compression):
        make(file_size=len(file))


def test_nothing_at_all_is_refused() -> None:
    """A body of no bytes is never a NAR."""
    for compression in READABLE_IN_NARINFO:
        with pytest.raises((SizeMismatchError, DecodeError)):
            run(promise(compression, file_hash=None, file_size=None), [])
