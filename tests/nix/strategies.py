"""Values of the domain for hypothesis, and the small pieces that tests are put together from."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator

from hypothesis import strategies as st

from proxy.nix.hashes import DIGEST_SIZES, NIX32_ALPHABET, Hash
from proxy.nix.nar_name import EXTENSIONS, NarName
from proxy.nix.signature import SecretKey
from proxy.nix.store_path import HashPart, StorePath

NAME_CHARACTERS = "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ+-._?="

hash_parts = st.text(NIX32_ALPHABET, min_size=32, max_size=32).map(HashPart)

names = (
    st.text(NAME_CHARACTERS, min_size=1, max_size=40)
    # Not the names that Nix forbids: "." and "..", alone or before a dash.
    .filter(lambda name: name.split("-")[0] not in {".", ".."})
)

store_paths = st.builds(StorePath, hash_parts, names)

hashes = st.sampled_from(sorted(DIGEST_SIZES)).flatmap(
    lambda algorithm: st.builds(
        Hash,
        st.just(algorithm),
        st.binary(min_size=DIGEST_SIZES[algorithm], max_size=DIGEST_SIZES[algorithm]),
    )
)

sha256_hashes = st.builds(Hash, st.just("sha256"), st.binary(min_size=32, max_size=32))

compressions = st.sampled_from(sorted(EXTENSIONS))

nar_names = st.builds(NarName, hash_parts, sha256_hashes, compressions)

seeds = st.binary(min_size=32, max_size=32)

key_names = st.text(NAME_CHARACTERS + "/@é", min_size=1, max_size=20)

secret_keys = st.builds(SecretKey.from_seed, key_names, seeds)

contents = st.one_of(
    st.binary(max_size=2000),
    # Repetitive, so that compressors have something to refer back to.
    st.builds(lambda unit, times: unit * times, st.binary(max_size=50), st.integers(0, 500)),
)


@st.composite
def cuts(draw: st.DrawFn, data: bytes) -> list[bytes]:
    """Cut ``data`` into pieces: whole, byte by byte, or anywhere."""
    places = draw(
        st.one_of(
            st.just([]),
            st.just(list(range(1, len(data)))),
            st.lists(st.integers(0, len(data)), max_size=8).map(sorted),
        )
    )
    return list(pieces(data, places))


def pieces(data: bytes, places: list[int]) -> Iterator[bytes]:
    """Cut ``data`` at ``places``, which ascend."""
    for start, end in zip([0, *places], [*places, len(data)], strict=True):
        yield data[start:end]


def single_file_nar(content: bytes) -> bytes:
    """Write the NAR of one file that cannot be executed."""
    tokens = (b"nix-archive-1", b"(", b"type", b"regular", b"contents", content, b")")
    return b"".join(map(_nar_token, tokens))


def _nar_token(token: bytes) -> bytes:
    return struct.pack("<Q", len(token)) + token + bytes(-len(token) % 8)


def sha256(data: bytes) -> Hash:
    """Hash without the code under test."""
    return Hash("sha256", hashlib.sha256(data).digest())


@st.composite
def narinfo_texts(draw: st.DrawFn) -> bytes:
    """Write a narinfo that `proxy.nix.narinfo.parse` takes, in one of the many ways there are."""
    references: list[StorePath] = draw(st.lists(store_paths, max_size=4))
    nar_hash = draw(sha256_hashes)
    fields: list[tuple[str, str]] = [
        ("StorePath", str(draw(store_paths))),
        ("URL", draw(urls)),
        ("NarHash", draw(st.sampled_from([str(nar_hash), f"sha256:{nar_hash.hex}", nar_hash.sri]))),
        ("NarSize", str(draw(st.integers(1, 2**63 - 1)))),
    ]
    optional = (
        st.tuples(st.just("URL"), st.just("") | urls),
        st.tuples(st.just("Compression"), compressions | st.just("")),
        st.tuples(st.just("FileHash"), hashes.map(str)),
        st.tuples(st.just("FileSize"), st.integers(0, 2**63 - 1).map(str)),
        st.tuples(st.just("Deriver"), store_paths.map(lambda path: path.base_name)),
        st.tuples(st.just("Deriver"), st.sampled_from(["", "unknown-deriver", "/nix/store/x"])),
        st.tuples(st.just("Sig"), secret_keys.map(lambda key: str(key.sign(b"")))),
        st.tuples(st.just("Sig"), st.sampled_from(["", "garbage", "a:", "a:b"])),
        st.tuples(st.sampled_from(["System", "Provenance", "\nSig", "sig", ""]), single_lines),
    )
    fields[2:2] = draw(st.lists(st.one_of(*optional), max_size=8))
    with_references: bool = draw(st.booleans())
    if references or with_references:
        fields.append(("References", " ".join(path.base_name for path in references)))
    if draw(st.booleans()):
        content_addresses = ["", "text:" + str(sha256(b"")), "fixed:r:" + str(sha256(b"")), "x:y"]
        fields.append(("CA", draw(st.sampled_from(content_addresses))))
    fields = draw(st.permutations(fields))
    last_url = max(index for index, (name, _) in enumerate(fields) if name == "URL")
    fields[last_url] = ("URL", draw(urls))
    return "".join(f"{name}: {value}\n" for name, value in fields).encode()


urls = st.text(st.characters(min_codepoint=0x21, max_codepoint=0x7E), min_size=1, max_size=40)

single_lines = st.text(st.characters(codec="utf-8", exclude_characters="\0\n"), max_size=20)
