"""Signed store paths, made from scratch: an oracle that shares no code with the proxy.

Everything a binary cache publishes is made here a second time, from the manual of Nix and not from
our own sources: nix32, NARs, fingerprints, signatures and narinfos. Pure and deterministic: the
same seed gives the same closure.
"""

from __future__ import annotations

import base64
import hashlib
import random
import uuid
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, TypeAlias
from urllib.parse import quote

from nacl.signing import SigningKey as _Ed25519Key

from tests.blobs import EXTENSIONS, Blob, compress

ALPHABET = "0123456789abcdfghijklmnpqrsvwxyz"
COMPRESSIONS = ("xz", "zstd", "none", "bzip2", "gzip", "br", "lz4")
"""What every Nix since 2.4 decodes."""


def nix32(data: bytes) -> str:
    """Write `data` in Nix's base 32: least significant bit first, digits most significant first."""
    number = int.from_bytes(data, "little")
    digits = (len(data) * 8 - 1) // 5 + 1
    return "".join(ALPHABET[number >> 5 * place & 31] for place in reversed(range(digits)))


def sha256(data: bytes) -> bytes:
    """Return the SHA-256 digest of `data`."""
    return hashlib.sha256(data).digest()


# --- NAR --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Symlink:
    """A symbolic link in a tree."""

    target: str


@dataclass(frozen=True)
class Executable:
    """A regular file in a tree that may be executed."""

    contents: bytes


Tree: TypeAlias = "bytes | Executable | Symlink | Mapping[str, Tree]"
"""A file, a link, or a directory of trees by name."""

_MAGIC = b"nix-archive-1"


def nar(tree: Tree) -> bytes:
    """Write `tree` as a Nix archive (manual: protocols/nix-archive)."""
    return _strings(_MAGIC) + _node(tree)


def huge_nar(block: bytes, count: int) -> Blob:
    """Write a NAR of one regular file, `count` times `block`, without holding it."""
    length = len(block) * count
    head = _strings(_MAGIC, b"(", b"type", b"regular", b"contents") + _length(length)
    tail = bytes(-length % 8) + _strings(b")")
    return Blob(((head, 1), (block, count), (tail, 1)))


def _node(tree: Tree) -> bytes:
    match tree:
        case bytes():
            fields = _strings(b"type", b"regular", b"contents", tree)
        case Executable(contents):
            fields = _strings(b"type", b"regular", b"executable", b"", b"contents", contents)
        case Symlink(target):
            fields = _strings(b"type", b"symlink", b"target", target.encode())
        case _:
            fields = _strings(b"type", b"directory") + _entries(tree)
    return _strings(b"(") + fields + _strings(b")")


def _entries(directory: Mapping[str, Tree]) -> bytes:
    written = b""
    for name in sorted(directory, key=str.encode):
        node = _node(directory[name])
        written += _strings(b"entry", b"(", b"name", name.encode(), b"node") + node + _strings(b")")
    return written


def _strings(*strings: bytes) -> bytes:
    return b"".join(_length(len(s)) + s + bytes(-len(s) % 8) for s in strings)


def _length(number: int) -> bytes:
    return number.to_bytes(8, "little")


# --- signatures -------------------------------------------------------------------------------


class SigningKey:
    """An Ed25519 key with a name; the same name always gives the same key."""

    def __init__(self, name: str, seed: bytes | None = None) -> None:
        """Derive the key from `seed` (32 bytes), or else from its name."""
        self.name = name
        self._key = _Ed25519Key(seed or sha256(name.encode()))

    @property
    def public(self) -> str:
        """What goes into ``trusted-public-keys``: ``name:base64``."""
        return f"{self.name}:{_base64(bytes(self._key.verify_key))}"

    @property
    def secret(self) -> str:
        """What ``nix-store --generate-binary-cache-key`` writes: ``name:base64`` of 64 bytes."""
        return f"{self.name}:{_base64(bytes(self._key) + bytes(self._key.verify_key))}"

    def sign(self, fingerprint: bytes) -> str:
        """Return the value of a ``Sig:`` line: ``name:base64``."""
        return f"{self.name}:{_base64(self._key.sign(fingerprint).signature)}"


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


# --- store paths ------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class StoreEntry:
    """A store path as a binary cache publishes it. Use `but` to make a variant, also a lying one.

    Attributes:
        hash_part: The 32 nix32 characters.
        name: What follows them and the hyphen.
        nar: The archive; what is signed is always its true hash and size.
        references: Base names of other paths, or of itself.
        compression: Nix's name of it.
        streams: How many frames or streams the file is compressed in.
        scheme: How the URL is made: a key of `SCHEMES`.
        deriver: Base name of the derivation.
        served: The file really served, where that is not the compressed NAR: a lie under a valid
            signature. FileHash and FileSize then tell the truth about this file.
        fields: Narinfo lines to put instead of the true ones, *after* signing; None omits the line.
        extra: Raw lines to append, for example unknown fields or further ``Sig:`` lines.
        signers: Who signs, instead of the keys of the cache that publishes it.
        tamper: The last change to the text of the narinfo.
    """

    hash_part: str
    name: str
    nar: Blob
    references: tuple[str, ...] = ()
    compression: str = "xz"
    streams: int = 1
    scheme: str = "filehash"
    deriver: str | None = None
    served: Blob | None = None
    fields: Mapping[str, str | None] = field(default_factory=dict)
    extra: tuple[str, ...] = ()
    signers: tuple[SigningKey, ...] | None = None
    tamper: Callable[[bytes], bytes] | None = None

    @classmethod
    def make(
        cls, name: str, tree: Tree = b"hello\n", *, seed: int = 0, **options: Any
    ) -> StoreEntry:
        """Make a path of that name and content; `options` are attributes of the class."""
        hash_part = random_hash_part(random.Random(f"{name}/{seed}"))
        return cls(hash_part, name, Blob.of(nar(tree)), **options)

    @classmethod
    def huge(cls, name: str, size: int, **options: Any) -> StoreEntry:
        """Make a path with a file of about `size` bytes (whole MiB), never held in memory."""
        source = random.Random(name)
        archive = huge_nar(source.randbytes(1 << 20), max(1, size >> 20))
        return cls(random_hash_part(source), name, archive, **{"compression": "none", **options})

    def but(self, **changes: Any) -> StoreEntry:
        """Return the same path with some attributes changed."""
        return replace(self, **changes)

    @property
    def base_name(self) -> str:
        """``<hash>-<name>``, as in References."""
        return f"{self.hash_part}-{self.name}"

    @property
    def store_path(self) -> str:
        """The full path."""
        return f"/nix/store/{self.base_name}"

    @property
    def nar_hash(self) -> str:
        """The true NarHash in nix32, without prefix."""
        return nix32(self.nar.sha256)

    @cached_property
    def file(self) -> Blob:
        """The bytes behind the URL."""
        if self.served is not None:
            return self.served
        return compress(self.nar, self.compression, streams=self.streams)

    @property
    def file_hash(self) -> str:
        """The true FileHash in nix32, without prefix."""
        return nix32(self.file.sha256)

    @property
    def fingerprint(self) -> bytes:
        """What is signed."""
        references = ",".join(sorted(f"/nix/store/{name}" for name in self.references))
        signed = ("1", self.store_path, f"sha256:{self.nar_hash}", str(len(self.nar)), references)
        return ";".join(signed).encode()

    @property
    def narinfo_path(self) -> str:
        """Where the narinfo is, below the URL of the cache."""
        return f"/{self.hash_part}.narinfo"

    @property
    def nar_path(self) -> str:
        """Where the NAR is, below the URL of the cache; raw, with its query."""
        return "/" + self.url("").lstrip("/")

    def url(self, base: str) -> str:
        """Return the value of ``URL:`` in a cache that is at `base` (for absolute ones only)."""
        return SCHEMES[self.scheme](self).format(base=base)

    def narinfo(self, *keys: SigningKey, base: str = "") -> bytes:
        """Return the narinfo, signed by `keys` unless the entry has its own `signers`."""
        lines = [*self._true_lines(base), *self._sig_lines(keys)]
        lines = [(name, self.fields.get(name, value)) for name, value in lines]
        known = {name for name, _ in lines}
        lines += [(name, value) for name, value in self.fields.items() if name not in known]
        written = [f"{name}: {value}" for name, value in lines if value is not None]
        text = "".join(f"{line}\n" for line in (*written, *self.extra)).encode()
        return self.tamper(text) if self.tamper else text

    def _true_lines(self, base: str) -> list[tuple[str, str | None]]:
        in_hex = self.scheme == "cachix"
        return [
            ("StorePath", self.store_path),
            ("URL", self.url(base)),
            ("Compression", self.compression),
            ("FileHash", "sha256:" + (self.file.sha256.hex() if in_hex else self.file_hash)),
            ("FileSize", str(len(self.file))),
            ("NarHash", f"sha256:{self.nar_hash}"),
            ("NarSize", str(len(self.nar))),
            ("References", " ".join(self.references)),
            ("Deriver", self.deriver),
        ]

    def _sig_lines(self, keys: Sequence[SigningKey]) -> list[tuple[str, str | None]]:
        signers = keys if self.signers is None else self.signers
        return [("Sig", key.sign(self.fingerprint)) for key in signers]


def _extension(entry: StoreEntry) -> str:
    return ".nar" + EXTENSIONS[entry.compression]


def _uuid(entry: StoreEntry) -> str:
    return str(uuid.UUID(bytes=sha256(entry.hash_part.encode())[:16], version=4))


def _wrong_extension(entry: StoreEntry) -> str:
    return ".nar" if EXTENSIONS[entry.compression] else ".nar.xz"


SCHEMES: dict[str, Callable[[StoreEntry], str]] = {
    "filehash": lambda e: f"nar/{e.file_hash}{_extension(e)}",
    "cachix": lambda e: f"nar/{e.file.sha256.hex()}{_extension(e)}",
    "uuid": lambda e: f"nar/{_uuid(e)}{_extension(e)}",
    "harmonia": lambda e: f"nar/{e.nar_hash}.nar?hash={e.hash_part}",
    "nix-serve": lambda e: f"nar/{e.hash_part}-{e.nar_hash}.nar",
    "hydra": lambda e: f"nar/{quote(e.base_name)}",
    "absolute": lambda e: f"{{base}}/nar/{e.file_hash}{_extension(e)}",
    "rooted": lambda e: f"/nar/{e.file_hash}{_extension(e)}",
    "folder": lambda e: f"archive/2026/{e.file_hash}{_extension(e)}",
    "percent": lambda e: f"nar/a%20b%2Bc+d/{e.file_hash}{_extension(e)}?x=%2F&y",
    "wrong_extension": lambda e: f"nar/{e.file_hash}{_wrong_extension(e)}",
}
"""How the caches that exist name their NARs; ``{base}`` becomes the URL of the cache."""


# --- closures ---------------------------------------------------------------------------------


def random_hash_part(source: random.Random) -> str:
    """Return a hash part that no derivation gave."""
    return nix32(source.randbytes(20))


def closure(
    n: int,
    *,
    depth: int = 4,
    seed: int = 0,
    sizes: tuple[int, int] = (1_000, 60_000),
    compressions: Sequence[str] = COMPRESSIONS,
    scheme: str = "filehash",
) -> list[StoreEntry]:
    """Make `n` paths that refer to each other; the first one reaches all others.

    Args:
        n: How many; at least `depth`.
        depth: The longest chain of references, counted in paths.
        seed: Another seed, another closure.
        sizes: Least and greatest size of a path's content in bytes, small ones more likely.
        compressions: Taken in turn.
        scheme: The URL scheme of all of them.

    Returns:
        The paths, each before all that it refers to.
    """
    if not 1 <= depth <= n or (depth == 1 and n > 1):
        message = f"{n} paths cannot have a root and be {depth} deep"
        raise ValueError(message)
    source = random.Random(f"closure/{seed}")
    names = [f"{random_hash_part(source)}-{_package_name(source)}" for _ in range(n)]
    references = _references(_levels(n, depth, source), source)
    return [
        StoreEntry(
            hash_part=name[:32],
            name=name[33:],
            nar=Blob.of(nar(_package(name, wanted := [names[r] for r in refs], source, sizes))),
            references=tuple(sorted(wanted)),
            compression=compressions[index % len(compressions)],
            scheme=scheme,
            deriver=f"{random_hash_part(source)}-{name[33:]}.drv",
        )
        for index, (name, refs) in enumerate(zip(names, references, strict=True))
    ]


def _levels(n: int, depth: int, source: random.Random) -> list[int]:
    """Give each path a level: the root alone on level 0, every level taken, ascending."""
    spread = [source.randint(1, depth - 1) for _ in range(n - depth)]
    return sorted([*range(depth), *spread])


def _references(levels: Sequence[int], source: random.Random) -> list[list[int]]:
    """Let someone on the level above refer to each path, and some others from anywhere above."""
    references: list[set[int]] = [set() for _ in levels]
    for child, level in enumerate(levels[1:], start=1):
        above = bisect_left(levels, level)
        parents = [source.randrange(bisect_left(levels, level - 1), above)]
        parents += (source.randrange(above) for _ in range(source.randint(0, 2)))
        for parent in parents:
            references[parent].add(child)
    for index, refs in enumerate(references):
        if source.random() < 0.3:  # many real paths refer to themselves
            refs.add(index)
    return [sorted(refs) for refs in references]


def _package_name(source: random.Random) -> str:
    word = "".join(source.choices("abcdefghijklmnopqrstuvwxyz", k=source.randint(3, 10)))
    return f"{word}-{source.randint(0, 9)}.{source.randint(0, 20)}"


def _package(
    name: str, wanted: Sequence[str], source: random.Random, sizes: tuple[int, int]
) -> Tree:
    """Return a single file, or a tree like that of a package, with its references inside."""
    least, most = sizes
    size = int(least * (most / least) ** source.random())
    contents = "".join(f"/nix/store/{other}\n" for other in wanted).encode() + _contents(
        size, source
    )
    if source.random() < 0.3:
        return contents
    middle = len(contents) // 2
    return {
        "bin": {"run": Executable(contents[:middle]), "alias": Symlink("run")},
        "lib": {"data": contents[middle:], "empty": b""},
        "share": {"doc": {}, "self": Symlink(f"/nix/store/{name}/bin/run")},
    }


def _contents(size: int, source: random.Random) -> bytes:
    """Return bytes of which half can be compressed, like a program."""
    noise = source.randbytes(size // 2)
    return noise + (b"mov %rax, %rbx\n" * (size // 15 + 1))[: size - len(noise)]
