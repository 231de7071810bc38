r"""Narinfo: parse, write, fingerprint, verify.

Read exactly as Nix and Lix read it (``NarInfo::NarInfo`` in ``src/libstore/nar-info.cc``), so that
what passes here is understood there, and means the same:

- a name reaches to the next colon, *over line breaks*: a blank line makes the following field
  unknown; one byte after the colon is skipped, whatever it is; the value reaches to the line break
  after that. ``Key:value`` loses a character, and ``Key:\n`` swallows the next line;
- the text ends in exactly one line break;
- of a scalar given twice the last counts; References and CA may not be given twice;
- names and values are not trimmed.

Stricter than Nix where nobody honest differs: numbers are ASCII digits, the URL is printable ASCII,
NarHash is SHA-256 (the one that is signed), and the store is ``/nix/store``.

Written is the upstream's text, signatures and unknown fields and all, with another URL, and without
the lines that make some Nix version refuse the whole. All of those are unsigned and optional, so a
path without them is worth more than no path:

- a Sig that is none (Nix ≥ 2.34 throws; every version throws on a length other than 64);
- a Deriver that is empty or no store path;
- a CA of an unknown or experimental kind. Without CA a client needs a signature, which is what we
  verify anyway; with it, the client could not even parse the narinfo;
- all URLs but the last.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Final, NewType

from proxy.errors import ParseError, SignatureError, TrustError, WrongPathError
from proxy.nix.hashes import Hash
from proxy.nix.nar_name import EXTENSIONS, NarName
from proxy.nix.signature import Keyring, Signature
from proxy.nix.store_path import HashPart, StorePath

_LARGEST_SIZE: Final = 2**63 - 1
"""What a file's size can be (``off_t``), and SQLite's integers."""

_NUMBER: Final = re.compile(r"[0-9]{1,19}")
_URL: Final = re.compile(r"[!-~]+")
_CONTENT_ADDRESS: Final = re.compile(r"(?:text:(?=sha256:)|fixed:(?:r:)?)([a-z0-9]+:.+)")
_NAME: Final = re.compile(r"[A-Za-z-]{1,32}")
_DEFAULT_COMPRESSION: Final = "bzip2"
_UNKNOWN_DERIVER: Final = "unknown-deriver"


@dataclass(frozen=True, slots=True)
class NarInfo:
    """What a binary cache says about one store path.

    Attributes:
        store_path: The path.
        nar_hash: SHA-256 of the NAR before compression.
        nar_size: Bytes of the NAR before compression, at least 1.
        references: Paths that it needs, itself perhaps among them; sorted, none twice.
        signatures: The well-formed ones, in the order of the text.
        url: Where the NAR is, relative to the cache, absolute, or with a query: opaque.
        compression: A key of `proxy.nix.nar_name.EXTENSIONS`.
        file_hash: Of the file at ``url``.
        file_size: Bytes of the file at ``url``.
        deriver: Base name of the derivation that built it.
        ca: What its path was computed from, if from its content.
        fields: The text: each name and value that is written again, in order; the URL's value is
            only in ``url``.
        nar_name: The name under which this proxy issues the NAR.
    """

    # Signed
    store_path: StorePath
    nar_hash: Hash
    nar_size: int
    references: tuple[StorePath, ...]

    signatures: tuple[Signature, ...]

    # Unsigned
    url: str
    compression: str
    file_hash: Hash | None
    file_size: int | None
    deriver: str | None
    ca: str | None

    fields: tuple[tuple[str, str], ...]

    nar_name: NarName = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Name the NAR."""
        name = NarName(self.store_path.hash_part, self.nar_hash, self.compression)
        object.__setattr__(self, "nar_name", name)

    @property
    def fingerprint(self) -> bytes:
        """What is signed (``ValidPathInfo::fingerprint`` in ``src/libstore/path-info.cc``)."""
        references = ",".join(map(str, self.references))
        return f"1;{self.store_path};{self.nar_hash};{self.nar_size};{references}".encode()

    @property
    def size_on_disk(self) -> int | None:
        """Bytes of the NAR as it is served; None where nobody says."""
        return self.nar_size if self.compression == "none" else self.file_size


VerifiedNarInfo = NewType("VerifiedNarInfo", NarInfo)
"""A narinfo that `verify` let through. Only that can be stored or served."""


def verify(info: NarInfo, *, hash_part: HashPart, keyring: Keyring | None) -> VerifiedNarInfo:
    """Let through what is about the requested path and signed by a trusted key.

    Args:
        info: What an upstream or the disk said.
        hash_part: What was asked for.
        keyring: Whom to trust; None if whoever said it is trusted without signatures.

    Raises:
        WrongPathError: If it is about another path.
        SignatureError: If no trusted key signed it.
    """
    if info.store_path.hash_part != hash_part:
        raise WrongPathError(f"asked for {hash_part}, but got {info.store_path}")
    if keyring is not None:
        keyring.verify(info.fingerprint, info.signatures)
    return VerifiedNarInfo(info)


def verify_by_any(
    info: NarInfo, *, hash_part: HashPart, keyrings: Iterable[Keyring | None]
) -> VerifiedNarInfo:
    """Let through what one of several keyrings does; for what was kept, and nobody remembers of whom.

    Raises:
        TrustError: If none of them do.
    """
    error: TrustError = SignatureError("there is nobody whose keys could be trusted")
    for keyring in keyrings:
        try:
            return verify(info, hash_part=hash_part, keyring=keyring)
        except TrustError as reason:
            error = reason
    raise error


def format(info: NarInfo, url: str | None = None) -> bytes:  # noqa: A001  # read as narinfo.format
    """Write the upstream's text again; `parse` reads the same from it.

    Args:
        info: What `parse` gave.
        url: What to put in the URL line instead of the upstream's.

    Raises:
        ParseError: If ``url`` cannot stand there.
    """
    url = info.url if url is None else _parse_url(url)
    return "".join(
        f"{name}: {url if name == 'URL' else value}\n" for name, value in info.fields
    ).encode()


def parse(text: bytes) -> NarInfo:
    """Read a narinfo.

    Raises:
        ParseError: If some Nix would refuse it, or it is none; with line and field.
    """
    draft = _Draft()
    for line, name, value in _split(_decode(text)):
        draft.add(line, name, value)
    return draft.finish()


def _decode(text: bytes) -> str:
    if (end := text.find(b"\0")) >= 0:
        raise ParseError("narinfo", "a null byte", line=1 + text.count(b"\n", 0, end))
    try:
        return text.decode()
    except UnicodeDecodeError as error:
        line = 1 + text.count(b"\n", 0, error.start)
        raise ParseError("narinfo", "not UTF-8", line=line) from None


def _split(text: str) -> Iterator[tuple[int, str, str]]:
    """Cut the text into line number, name and value, exactly as Nix does."""
    start, line = 0, 1
    while start < len(text):
        colon = text.find(":", start)
        if colon < 0:
            raise ParseError("narinfo", "no colon", line=line)
        name = text[start:colon]
        line += name.count("\n")
        end = text.find("\n", colon + 2)
        if end < 0:
            shown = name if _NAME.fullmatch(name) else None
            raise ParseError("narinfo", "no line break at the end", line=line, field=shown)
        yield line, name, text[colon + 2 : end]
        line += text.count("\n", colon, end + 1)
        start = end + 1


@dataclass(slots=True)
class _Draft:
    """What the lines read so far say.

    The methods that read a field return whether its line is written again.
    """

    store_path: StorePath | None = None
    nar_hash: Hash | None = None
    nar_size: int = 0
    references: tuple[StorePath, ...] = ()
    signatures: list[Signature] = field(default_factory=list)
    url: str = ""
    compression: str = ""
    file_hash: Hash | None = None
    file_size: int = 0
    deriver: str | None = None
    ca: str | None = None

    fields: list[tuple[str, str]] = field(default_factory=list)
    lines: dict[str, int] = field(default_factory=dict)
    url_index: int = 0

    def add(self, line: int, name: str, value: str) -> None:
        read = _READERS.get(name)
        try:
            written = read is None or read(self, value)
        except ParseError as error:
            raise ParseError("narinfo", error.reason, line=line, field=name) from None
        if written:
            self.fields.append((name, value))
            self.lines[name] = line

    def finish(self) -> NarInfo:
        if self.store_path is None:
            raise self._refusal("StorePath", "missing")
        if self.nar_hash is None:
            raise self._refusal("NarHash", "missing")
        if self.nar_size == 0:
            raise self._refusal("NarSize", "missing or zero")
        try:
            url = _parse_url(self.url)
        except ParseError as error:
            raise self._refusal("URL", error.reason) from None
        return NarInfo(
            store_path=self.store_path,
            nar_hash=self.nar_hash,
            nar_size=self.nar_size,
            references=self.references,
            signatures=tuple(self.signatures),
            url=url,
            compression=self.compression or _DEFAULT_COMPRESSION,
            file_hash=self.file_hash,
            # Nix itself holds 0 for "not told"; no NAR takes no bytes.
            file_size=self.file_size or None,
            deriver=self.deriver,
            ca=self.ca,
            fields=tuple(self._fields_of_one_url()),
        )

    def _fields_of_one_url(self) -> Iterator[tuple[str, str]]:
        for index, (name, value) in enumerate(self.fields):
            if name != "URL":
                yield name, value
            elif index == self.url_index:
                yield name, ""

    def _refusal(self, name: str, reason: str) -> ParseError:
        return ParseError("narinfo", reason, line=self.lines.get(name), field=name)

    def read_store_path(self, value: str) -> bool:
        self.store_path = StorePath.parse(value)
        return True

    def read_url(self, value: str) -> bool:
        self.url = value
        self.url_index = len(self.fields)
        return True

    def read_compression(self, value: str) -> bool:
        if value and value not in EXTENSIONS:
            raise ParseError("narinfo", f"unknown compression {value[:20]!r}")
        self.compression = value
        return True

    def read_file_hash(self, value: str) -> bool:
        self.file_hash = Hash.parse(value)
        return True

    def read_file_size(self, value: str) -> bool:
        self.file_size = _parse_size(value)
        return True

    def read_nar_hash(self, value: str) -> bool:
        nar_hash = Hash.parse(value)
        if nar_hash.algorithm != "sha256":
            raise ParseError("narinfo", f"{nar_hash.algorithm} instead of sha256")
        self.nar_hash = nar_hash
        return True

    def read_nar_size(self, value: str) -> bool:
        self.nar_size = _parse_size(value)
        return True

    def read_references(self, value: str) -> bool:
        if self.references:
            raise ParseError("narinfo", "given twice")
        names = {name for name in value.split(" ") if name}
        self.references = tuple(sorted(map(StorePath.parse_base_name, names)))
        return True

    def read_deriver(self, value: str) -> bool:
        if value == _UNKNOWN_DERIVER:
            return True
        try:
            self.deriver = StorePath.parse_base_name(value).base_name
        except ParseError:
            return False
        return True

    def read_signature(self, value: str) -> bool:
        try:
            self.signatures.append(Signature.parse(value))
        except ParseError:
            return False
        return True

    def read_ca(self, value: str) -> bool:
        if self.ca is not None:
            raise ParseError("narinfo", "given twice")
        if not value:
            return True
        if not _is_content_address(value):
            return False
        self.ca = value
        return True


_READERS: Final[dict[str, Callable[[_Draft, str], bool]]] = {
    "StorePath": _Draft.read_store_path,
    "URL": _Draft.read_url,
    "Compression": _Draft.read_compression,
    "FileHash": _Draft.read_file_hash,
    "FileSize": _Draft.read_file_size,
    "NarHash": _Draft.read_nar_hash,
    "NarSize": _Draft.read_nar_size,
    "References": _Draft.read_references,
    "Deriver": _Draft.read_deriver,
    "Sig": _Draft.read_signature,
    "CA": _Draft.read_ca,
}
"""All other fields are kept unread: System, Provenance, and what is yet to come."""


def _parse_size(value: str) -> int:
    if not _NUMBER.fullmatch(value) or (size := int(value)) > _LARGEST_SIZE:
        raise ParseError("narinfo", f"not a number of bytes: {value[:20]!r}")
    return size


def _parse_url(value: str) -> str:
    if not value:
        raise ParseError("narinfo", "missing or empty")
    if not _URL.fullmatch(value):
        raise ParseError("narinfo", "white space, control or non-ASCII characters")
    return value


def _is_content_address(value: str) -> bool:
    """Tell whether every Nix can read it (``src/libstore/content-address.cc``)."""
    match = _CONTENT_ADDRESS.fullmatch(value)
    if match is None:
        return False
    try:
        Hash.parse(match.group(1))
    except ParseError:
        return False
    return True
