"""Check a NAR's size and hashes while it streams past.

Two streams are checked at once: the file as it is served, against FileHash and FileSize, which are
nobody's promise (unsigned) but catch damage early; and the NAR inside it, against NarHash and
NarSize, which a trusted key signed. Nothing is kept, so memory does not grow with the NAR.

A stream may refer to what came up to 128 MiB before, and a decoder has to keep that. Few do, but a single
upstream could make all of its NARs so; hence whoever verifies many at once, and can read a file again, has
those judged one after the other, when they are there.

Meant to run on a worker thread: hashing and decompressing release the GIL.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

from proxy.errors import (
    DecodeMemoryError,
    HashMismatchError,
    SizeMismatchError,
    UnverifiableError,
)
from proxy.nix.decoders import LARGEST_WINDOW, MODEST_WINDOW, READABLE, Decoder, decoder
from proxy.nix.hashes import Hash


class NarVerifier:
    """Takes the file of a NAR in pieces of any size, and says whether it is the promised one.

    Args:
        compression: As the narinfo names it.
        nar_hash: Of the NAR before compression.
        nar_size: Bytes of the NAR before compression; None if only its hash is known.
        file_hash: Of the file as served; None if the narinfo does not tell.
        file_size: Bytes of the file as served; None if the narinfo does not tell.
        again: Whether the file can be read again; then one that needs much memory is put off.

    Attributes:
        put_off: Whether the NAR can only be judged by `reread`.
        decoded: Whether the NAR itself is checked. False for a compression that no library here
            reads: then FileHash has to vouch for it.

    Raises:
        UnverifiableError: If nothing reads the compression and there is no FileHash.
    """

    def __init__(
        self,
        *,
        compression: str,
        nar_hash: Hash,
        nar_size: int | None,
        file_hash: Hash | None = None,
        file_size: int | None = None,
        again: bool = False,
    ) -> None:
        self.put_off = False
        self.decoded = compression in READABLE
        if not self.decoded and file_hash is None:
            raise UnverifiableError(f"nothing here reads {compression}, and there is no FileHash")
        if compression == "none" and file_hash == nar_hash:
            file_hash = None  # The file is the NAR: once is enough.
        self._file = _Tally("File", file_hash, file_size)
        self._nar = _Tally("Nar", nar_hash, nar_size)
        self._compression = compression
        self._again = again
        self._decoder: Decoder | None = None
        if self.decoded:
            window = MODEST_WINDOW if again else LARGEST_WINDOW
            self._decoder = decoder(compression, self._nar.add, window)

    def feed(self, data: bytes | memoryview) -> None:
        """Take the next piece of the file.

        Raises:
            SizeMismatchError: At the first byte more than promised.
            DecodeError: If the compressed stream is damaged or needs too much memory.
        """
        self._file.add(data)
        if self._decoder is not None:
            try:
                self._decoder.feed(data)
            except DecodeMemoryError:
                if not self._again:
                    raise
                self.put_off = True
                self._decoder = None

    def reread(self, pieces: Iterable[bytes]) -> None:
        """Take the whole file once more, for a NAR that was put off.

        Raises:
            SizeMismatchError: At the first byte of the NAR more than promised.
            DecodeError: If the compressed stream is damaged or needs too much memory.
        """
        self._nar = self._nar.afresh()
        self._decoder = decoder(self._compression, self._nar.add, LARGEST_WINDOW)
        for piece in pieces:
            self._decoder.feed(piece)
        self.put_off = False

    def finish(self) -> None:
        """Say that the file is over; returning means that it is the promised one.

        Raises:
            SizeMismatchError: If the file or the NAR is shorter than promised.
            DecodeError: If the compressed stream is truncated.
            HashMismatchError: If the file or the NAR is another one.
        """
        if self.put_off:
            raise DecodeMemoryError("the NAR has been put off, and is not judged yet")
        self._file.check()
        if self._decoder is not None:
            self._decoder.finish()
            self._nar.check()


class _Tally:
    """Counts and hashes one of the two streams against what was promised."""

    def __init__(self, what: str, expected: Hash | None, size: int | None) -> None:
        self._what = what
        self._expected = expected
        self._size = size
        self._seen = 0
        # FileHash may be MD5 or SHA-1: a checksum here, not a promise.
        self._digest = (
            hashlib.new(expected.algorithm, usedforsecurity=False) if expected is not None else None
        )

    def afresh(self) -> _Tally:
        return _Tally(self._what, self._expected, self._size)

    def add(self, data: bytes | memoryview) -> None:
        self._seen += len(data)
        if self._size is not None and self._seen > self._size:
            raise SizeMismatchError(f"{self._what}Size: more than the {self._size} bytes promised")
        if self._digest is not None:
            self._digest.update(data)

    def check(self) -> None:
        if self._size is not None and self._seen != self._size:
            reason = f"{self._what}Size: {self._seen} bytes instead of {self._size}"
            raise SizeMismatchError(reason)
        if self._expected is None or self._digest is None:
            return
        actual = Hash(self._expected.algorithm, self._digest.digest())
        if actual != self._expected:
            raise HashMismatchError(f"{self._what}Hash: {actual} instead of {self._expected}")
