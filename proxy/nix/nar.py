"""Check a NAR's size and hashes while it streams past.

Two streams are checked at once: the file as it is served, against FileHash and FileSize, which are
nobody's promise (unsigned) but catch damage early; and the NAR inside it, against NarHash and
NarSize, which a trusted key signed. Nothing is kept, so memory does not grow with the NAR.

Meant to run on a worker thread: hashing and decompressing release the GIL.
"""

from __future__ import annotations

import hashlib

from proxy.errors import HashMismatchError, SizeMismatchError, UnverifiableError
from proxy.nix.decoders import READABLE, decoder
from proxy.nix.hashes import Hash


class NarVerifier:
    """Takes the file of a NAR in pieces of any size, and says whether it is the promised one.

    Args:
        compression: As the narinfo names it.
        nar_hash: Of the NAR before compression.
        nar_size: Bytes of the NAR before compression; None if only its hash is known.
        file_hash: Of the file as served; None if the narinfo does not tell.
        file_size: Bytes of the file as served; None if the narinfo does not tell.

    Attributes:
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
    ) -> None:
        self.decoded = compression in READABLE
        if not self.decoded and file_hash is None:
            raise UnverifiableError(f"nothing here reads {compression}, and there is no FileHash")
        if compression == "none" and file_hash == nar_hash:
            file_hash = None  # The file is the NAR: once is enough.
        self._file = _Tally("File", file_hash, file_size)
        self._nar = _Tally("Nar", nar_hash, nar_size)
        self._decoder = decoder(compression, self._nar.add) if self.decoded else None

    def feed(self, data: bytes | memoryview) -> None:
        """Take the next piece of the file.

        Raises:
            SizeMismatchError: At the first byte more than promised.
            DecodeError: If the compressed stream is damaged or needs too much memory.
        """
        self._file.add(data)
        if self._decoder is not None:
            self._decoder.feed(data)

    def finish(self) -> None:
        """Say that the file is over; returning means that it is the promised one.

        Raises:
            SizeMismatchError: If the file or the NAR is shorter than promised.
            DecodeError: If the compressed stream is truncated.
            HashMismatchError: If the file or the NAR is another one.
        """
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
