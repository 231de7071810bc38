"""The name under which this proxy issues a NAR: ``<hash part>-<NarHash in nix32>.nar[.ext]``.

It names the path and the content, and nothing that could get lost: with all state gone, the narinfo
is looked up again by its hash part, must have the same NarHash, and leads to whatever URL the
upstream uses. Every character is unreserved in URLs (RFC 3986 §2.3), so that no Nix version and no
server in between rewrites it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Final, Self

from proxy.errors import ParseError
from proxy.nix.hashes import NIX32_ALPHABET, Hash, nix32_decode
from proxy.nix.store_path import HashPart

EXTENSIONS: Final = {
    "none": "",
    "xz": ".xz",
    "bzip2": ".bz2",
    "gzip": ".gz",
    "zstd": ".zst",
    "br": ".br",
    "lz4": ".lz4",
    "lzip": ".lzip",
    "lzma": ".lzma",
    "compress": ".Z",
    "grzip": ".grz",
    "lrzip": ".lrz",
    "lzop": ".lzo",
}
"""Every compression that Nix knows (``compression-algo.hh``), with the extension that tells it."""

_COMPRESSIONS: Final = {extension: compression for compression, extension in EXTENSIONS.items()}
_FORM: Final = re.compile(
    rf"([{NIX32_ALPHABET}]{{32}})-([{NIX32_ALPHABET}]{{52}})\.nar(\.[A-Za-z0-9]+)?"
)


@dataclass(frozen=True, slots=True, eq=False)
class NarName:
    """A NAR as this proxy names it.

    Attributes:
        hash_part: Of the store path that the NAR was asked for.
        nar_hash: SHA-256 of the NAR before compression.
        compression: A key of `EXTENSIONS`.
        text: The name, which says all of that; what `str` gives.
    """

    hash_part: HashPart
    nar_hash: Hash
    compression: str
    text: str = field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Write the name: it is asked for ten times while the NAR is fetched."""
        text = f"{self.hash_part}-{self.nar_hash.nix32}.nar{EXTENSIONS[self.compression]}"
        object.__setattr__(self, "text", text)

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read a name, without any folder in front.

        Raises:
            ParseError: If it is not one that `str` of this class gives.
        """
        match = _FORM.fullmatch(text)
        if match is None:
            raise ParseError("NAR name", "not <hash part>-<NarHash>.nar[.ext]")
        hash_part, nar_hash, extension = match.groups(default="")
        if extension not in _COMPRESSIONS:
            raise ParseError("NAR name", f"unknown extension {extension[:20]!r}")
        return cls(
            HashPart(hash_part),
            Hash("sha256", nix32_decode(nar_hash)),
            _COMPRESSIONS[extension],
        )

    def __str__(self) -> str:
        """Return the name."""
        return self.text

    def __eq__(self, other: object) -> bool:
        """Tell whether it is the same name."""
        return isinstance(other, NarName) and self.text == other.text

    def __hash__(self) -> int:
        """Hash the name."""
        return hash(self.text)
