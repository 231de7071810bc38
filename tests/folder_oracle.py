"""Whether a store folder is a valid binary cache, found out without a line of the code under test.

Written from the manual's description of the narinfo and of the ``file://`` store, with the libraries of
the compressions themselves.
"""

from __future__ import annotations

import base64
import bz2
import gzip
import lzma
import re
from collections.abc import Callable, Iterable
from pathlib import Path

import brotli
import lz4.frame
import zstandard
from nacl.signing import VerifyKey

from tests.blobs import EXTENSIONS
from tests.closures import SigningKey, nix32, sha256

FOLDERS = {"nar", "log", "realisations", "build-trace-v2", "debuginfo", "pins"}


def _unzstd(data: bytes) -> bytes:
    return zstandard.ZstdDecompressor().decompressobj(read_across_frames=True).decompress(data)


def _unlz4(data: bytes) -> bytes:
    return bytes(lz4.frame.decompress(data))


def _unbrotli(data: bytes) -> bytes:
    return bytes(brotli.decompress(data))


_DECOMPRESSORS: dict[str, Callable[[bytes], bytes]] = {
    "none": bytes,
    "xz": lzma.decompress,
    "bzip2": bz2.decompress,
    "gzip": gzip.decompress,
    "zstd": _unzstd,
    "br": _unbrotli,
    "lz4": _unlz4,
}

_COMPRESSIONS = {EXTENSIONS[name]: name for name in _DECOMPRESSORS}

_NAR_NAME = re.compile(r"[0-9a-z]{32}-([0-9a-z]{52})\.nar(\.\w+)?")


def complete_paths(root: Path, keys: Iterable[SigningKey]) -> set[str]:
    """Check all files under final names, and return the hash parts of the paths that are there whole.

    The daemon may be at work meanwhile.

    Raises:
        AssertionError: One of them is not what a binary cache has, or is not complete.
    """
    top = list(root.iterdir())
    narinfos = [path for path in top if path.suffix == ".narinfo"]
    nars = {nar.name: _check_nar(nar) for nar in (root / "nar").iterdir()}  # there before them
    others = {path.name for path in top if path not in narinfos}
    assert others - FOLDERS == {"nix-cache-info", ".state"}
    assert (root / "nix-cache-info").read_text().startswith("StoreDir: /nix/store\n")
    for narinfo in narinfos:
        _check_narinfo(narinfo, nars, list(keys))
    return {narinfo.stem for narinfo in narinfos}


def _check_nar(path: Path) -> bytes:
    """Return the archive behind a NAR whose name tells its NarHash."""
    match = _NAR_NAME.fullmatch(path.name)
    assert match, path.name
    archive = _DECOMPRESSORS[_COMPRESSIONS[match[2] or ""]](path.read_bytes())
    assert nix32(sha256(archive)) == match[1], f"{path.name} has another NarHash"
    return archive


def _check_narinfo(path: Path, nars: dict[str, bytes], keys: list[SigningKey]) -> None:
    text = path.read_text()
    assert text.endswith("\n"), f"{path.name} is torn"
    lines = [line.split(": ", 1) for line in text.splitlines()]
    fields = {name: value for name, value in lines if name != "Sig"}
    folder, _, name = fields["URL"].partition("/")
    assert folder == "nar"
    assert name in nars, f"{path.name} leads to nothing"
    file, archive = (path.parent / fields["URL"]).read_bytes(), nars[name]

    assert fields["StorePath"].startswith(f"/nix/store/{path.stem}-")
    assert fields["NarHash"] == f"sha256:{nix32(sha256(archive))}"
    assert fields["NarSize"] == str(len(archive))
    assert fields["FileHash"] in {
        f"sha256:{nix32(sha256(file))}",
        f"sha256:{sha256(file).hex()}",
    }
    assert fields["FileSize"] == str(len(file))
    assert any(_verifies(value, fields, keys) for kind, value in lines if kind == "Sig")


def _verifies(signature: str, fields: dict[str, str], keys: list[SigningKey]) -> bool:
    """Check one signature; a wrong one of a known key raises nacl's BadSignatureError."""
    references = ",".join(f"/nix/store/{name}" for name in fields["References"].split())
    signed = ("1", fields["StorePath"], fields["NarHash"], fields["NarSize"], references)
    name, _, value = signature.partition(":")
    publics = dict(key.public.split(":", 1) for key in keys)
    if name not in publics:
        return False
    verifier = VerifyKey(base64.b64decode(publics[name]))
    verifier.verify(";".join(signed).encode(), base64.b64decode(value))
    return True
