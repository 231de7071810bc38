"""Tests of `proxy.nix.resource`."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.errors import NotFoundError, RequestError
from proxy.nix.hashes import NIX32_ALPHABET
from proxy.nix.nar_name import NarName
from proxy.nix.resource import (
    MAX_TARGET,
    CacheInfoFile,
    ForeignNar,
    NarFile,
    NarinfoFile,
    Resource,
    SideFile,
    parse,
)
from proxy.nix.store_path import MAX_NAME_LENGTH, HashPart
from tests.nix.strategies import NAME_CHARACTERS, hash_parts, nar_names

HASH_PART = HashPart("w9yy7v61ipb5rx6i35zq1mvc2iqfmps1")
NAR_HASH = "0mdqa9w1p6cmli6976v4wi0sw9r4p5prkj7lzfd1877wk11c9c73"
HEX = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
OURS = f"{HASH_PART}-{NAR_HASH}.nar"
UUID = "d0c36585-7d2b-4a4e-8d2f-0d3d1d9f6a55"
DRV = f"{HASH_PART}-hello-2.12.1.drv"
BUILD_ID = "8fd2ca19a4f0f1d5b53bb1ab0a4b7c62e6ee0a4e"

JSON = "application/json"
TEXT = "text/plain; charset=utf-8"

MAX_FILE_NAME = 255
"""Bytes; of ext4, xfs, btrfs, zfs and tmpfs."""


# --- every form that a client of a binary cache asks for -----------------------------------------


def test_cache_info() -> None:
    """The first thing that Nix asks for is known by its one name."""
    assert parse("/nix-cache-info") == CacheInfoFile()


@given(hash_parts)
def test_narinfo(hash_part: HashPart) -> None:
    """Each hash part has a narinfo."""
    assert parse(f"/{hash_part}.narinfo") == NarinfoFile(hash_part)


@given(nar_names)
def test_our_own_nar(name: NarName) -> None:
    """Each NAR URL that the proxy issues is understood when it comes back."""
    assert parse(f"/nar/{name}") == NarFile(name)


@pytest.mark.parametrize(
    "reference",
    [
        f"nar/{NAR_HASH}.nar",
        f"nar/{NAR_HASH}.nar.xz",
        f"nar/{HEX}.nar.zst",
        f"nar/{HEX.upper()}.nar.zst",
        f"nar/{UUID}.nar.zst",
        f"nar/{NAR_HASH}.nar?hash={HASH_PART}",
        f"nar/{OURS}?hash={HASH_PART}",
        f"nar/{HASH_PART}-hello-2.12.1",
        "nar/a%20b%2Bc+d/x.nar.xz?x=%2F&y",
        "nar/deep/er/and/deeper.nar",
        "nar/percent%25.nar",
        "nar/!$&'()*+,;=:@.nar",
        "nar/...",
    ],
)
def test_foreign_nar(reference: str) -> None:
    """A NAR URL of another cache keeps every byte, query and percent-encoding included."""
    assert parse(f"/{reference}") == ForeignNar(reference)


@pytest.mark.parametrize(
    ("path", "content_type"),
    [
        (f"{HASH_PART}.ls", JSON),
        (f"log/{DRV}", TEXT),
        (f"log/{HASH_PART}-a+b-c.d_e?f=g.drv", TEXT),
        (f"realisations/sha256:{HEX}!out.doi", JSON),
        (f"build-trace-v2/{DRV}/out.doi", JSON),
        (f"debuginfo/{BUILD_ID}", JSON),
        (f"debuginfo/{BUILD_ID}.debug", JSON),
    ],
)
def test_side_file(path: str, content_type: str) -> None:
    """Listings, logs, realisations and debug info are kept under the name they are asked by."""
    assert parse(f"/{path}") == SideFile(path, content_type)


# --- what is none of these ----------------------------------------------------------------------

LETTERS_NIX32_HAS_NOT = "eotu"


@pytest.mark.parametrize(
    "hash_part",
    [
        "",
        HASH_PART[1:],
        HASH_PART + "0",
        HASH_PART.upper(),
        *(HASH_PART[:-1] + letter for letter in LETTERS_NIX32_HAS_NOT),
        HASH_PART[:-1] + "-",
        HASH_PART[:-1] + ".",
        HASH_PART[:-1] + "\N{SUPERSCRIPT TWO}",
        HASH_PART + "%00",
        HASH_PART + "\0",
        HASH_PART + "\n",
        ".." + HASH_PART[2:],
    ],
)
def test_malformed_hash_part(hash_part: str) -> None:
    """A narinfo of what is no hash is the client's mistake, not an absence."""
    with pytest.raises(RequestError):
        parse(f"/{hash_part}.narinfo")


@pytest.mark.parametrize(
    "name",
    [
        f"{HASH_PART[1:]}-{NAR_HASH}.nar",
        f"{HASH_PART}0-{NAR_HASH}.nar.xz",
        f"{HASH_PART.upper()}-{NAR_HASH}.nar",
        f"{HASH_PART}-{NAR_HASH[1:]}.nar",
        f"{HASH_PART}-{NAR_HASH}0.nar",
        f"{HASH_PART}-{NAR_HASH.upper()}.nar",
        f"{HASH_PART}-z{NAR_HASH[1:]}.nar",
        f"{HASH_PART}-{NAR_HASH}.nar.exe",
        *(f"{letter}{HASH_PART[1:]}-{NAR_HASH}.nar" for letter in LETTERS_NIX32_HAS_NOT),
        f"{NAR_HASH[1:]}.nar.xz",
        f"{NAR_HASH}0.nar.xz",
        f"e{NAR_HASH[1:]}.nar.xz",
        f"{NAR_HASH.upper()}.nar.xz",
        f"{HEX[1:]}.nar.xz",
        f"{HEX}0.nar.xz",
        f"g{HEX[1:]}.nar.xz",
    ],
)
def test_malformed_nar_hash(name: str) -> None:
    """A NAR named by what is nearly a hash is the client's mistake, and nobody is asked for it."""
    with pytest.raises(RequestError):
        parse(f"/nar/{name}")


@pytest.mark.parametrize(
    "target",
    [
        "",
        "*",
        "nix-cache-info",
        f"http://cache.example/{HASH_PART}.narinfo",
        f"https://cache.example/{HASH_PART}.narinfo",
        "cache.example:443",
        "\\nix-cache-info",
        "/nar/",
        "/nar/.",
        "/nar/..",
        "/nar/../nix-cache-info",
        f"/nar/../{HASH_PART}.narinfo",
        "/nar/./x.nar",
        "/nar/x/../../y.nar",
        "/nar/x/",
        "/nar//x.nar",
        "/nar///etc/passwd",
        "/nar/%2e%2e/x.nar",
        "/nar/%2E./x.nar",
        "/nar/..%2fx.nar",
        "/nar/x%2F..%2Fy.nar",
        "/nar/..%5cx.nar",
        "/nar/x%00.nar",
        "/nar/x%0d%0aHost:y",
        "/nar/x%7f.nar",
        "/nar/%c3%a9.nar",
        "/nar/%zz.nar",
        "/nar/x%",
        "/nar/x\\y.nar",
        "/nar/x\0.nar",
        "/nar/x y.nar",
        "/nar/x\ty.nar",
        "/nar/x\n.nar",
        "/nar/é.nar",
        "/nar/\udce9.nar",
        "/nar/<script>.nar",
        "/nar/x.nar#fragment",
        "/nar/x.nar?a#b",
        "/nar/x.nar?a b",
        "/nar/x.nar?\0",
        "/nar/x.nar?é",
        "/" + "x" * MAX_TARGET,
        "/nar/" + "x" * 10_000,
    ],
)
def test_impossible(target: str) -> None:
    """What cannot be the URL of anything is refused, in whatever way it is written."""
    with pytest.raises(RequestError):
        parse(target)


@pytest.mark.parametrize(
    "target",
    [
        "/",
        "//",
        "/nar",
        "/nix-cache-info?",
        "/nix-cache-info/",
        "//nix-cache-info",
        "/NIX-CACHE-INFO",
        "/%6eix-cache-info",
        "/../nix-cache-info",
        f"/{HASH_PART}",
        f"/{HASH_PART}.narinfo?",
        f"/{HASH_PART}.narinfo/",
        f"/{HASH_PART}.narinf%6f",
        f"//{HASH_PART}.narinfo",
        f"/./{HASH_PART}.narinfo",
        f"/x/../{HASH_PART}.narinfo",
        f"/%2e%2e/{HASH_PART}.narinfo",
        f"/{HASH_PART}.LS",
        f"/{HASH_PART[1:]}.ls",
        f"/{HASH_PART.upper()}.ls",
        f"/{HASH_PART}.ls\n",
        "/log/",
        "/log/..",
        "/log/../nix-cache-info",
        "/log/hello.drv",
        f"/log/{HASH_PART}",
        f"/log/{HASH_PART}-",
        f"/log/{HASH_PART}-x/y",
        f"/log/{HASH_PART}-x%2fy",
        f"/log/{HASH_PART}-x\0",
        f"/log/{HASH_PART}-é",
        f"/log/{HASH_PART}-" + "x" * (MAX_NAME_LENGTH + 1),
        f"/realisations/sha256:{HEX}!.doi",
        f"/realisations/sha256:{HEX}!out",
        f"/realisations/sha256:{HEX}!a/b.doi",
        f"/realisations/sha256:{HEX.upper()}!out.doi",
        f"/realisations/sha256:{HEX[1:]}!out.doi",
        f"/realisations/sha256%3A{HEX}%21out.doi",
        f"/realisations/sha512:{HEX}!out.doi",
        f"/build-trace-v2/{DRV}",
        f"/build-trace-v2/{DRV}/",
        f"/build-trace-v2/{DRV}/..",
        f"/build-trace-v2/../{DRV}/out.doi",
        f"/debuginfo/{BUILD_ID[1:]}",
        f"/debuginfo/{BUILD_ID}0",
        f"/debuginfo/{BUILD_ID.upper()}",
        f"/debuginfo/{BUILD_ID}.debug.debug",
        "/debuginfo/../nar/x.nar",
        "/.state",
        "/.state/index.sqlite",
        "/.state/lock",
        "/etc/passwd",
        "/favicon.ico",
        "/\u0660.ls",
    ],
)
def test_nothing_there(target: str) -> None:
    """What is the URL of nothing in a binary cache is absent, and nobody has to be asked."""
    with pytest.raises(NotFoundError):
        parse(target)


def test_longest_target() -> None:
    """A target may be as long as the limit, and not a character longer."""
    longest = "/nar/".ljust(MAX_TARGET, "x")
    assert parse(longest) == ForeignNar(longest[1:])
    with pytest.raises(RequestError, match=str(MAX_TARGET)):
        parse(longest + "x")


# --- properties ---------------------------------------------------------------------------------

SPECIAL = [
    *("/", "//", ".", "..", "%2e", "%2f", "%00", "%", "?", "#", "\\", "\0", "\n", " ", ":", "!"),
    *("http://x", "nar/", "log/", "realisations/sha256:", "build-trace-v2/", "debuginfo/"),
    *(".narinfo", ".ls", ".nar", ".xz", ".doi", ".drv", ".debug", "nix-cache-info", ".state/"),
    *(HASH_PART, HASH_PART + "-", NAR_HASH, HEX, BUILD_ID, DRV, UUID, "é", "\udcff", "x" * 200),
]

arbitrary_targets = st.text(max_size=100) | st.text(max_size=100).map(lambda text: f"/{text}")

crafted_targets = st.lists(
    st.sampled_from(SPECIAL) | st.text(NAME_CHARACTERS, max_size=5), max_size=8
).map(lambda parts: "/" + "".join(parts))

words = st.text(NAME_CHARACTERS, min_size=1, max_size=250)

side_file_like_targets = st.one_of(
    st.builds("/{}.ls".format, hash_parts),
    st.builds("/log/{}-{}".format, hash_parts, words),
    st.builds(
        "/realisations/sha256:{}!{}.doi".format, st.text("0123456789abcdef", min_size=64), words
    ),
    st.builds("/build-trace-v2/{}-{}/{}.doi".format, hash_parts, words, words),
    st.builds(
        "/debuginfo/{}{}".format, st.text("0123456789abcdef", min_size=40, max_size=40), words
    ),
)

targets = arbitrary_targets | crafted_targets | side_file_like_targets


def parsed(target: str) -> Resource | None:
    """Parse, and let no other errors through than the two that mean something."""
    try:
        return parse(target)
    except (RequestError, NotFoundError):
        return None


@given(targets)
def test_any_target_is_understood_or_refused(target: str) -> None:
    """No target raises anything but a refusal, and the same one always means the same."""
    assert parsed(target) == parsed(target)


@given(targets)
def test_side_files_are_safe_file_names(target: str) -> None:
    """What becomes a path in the store folder stays in it, off our own files, and can be created."""
    resource = parsed(target)
    if not isinstance(resource, SideFile):
        return
    assert resource.path == target[1:]
    *folders, name = resource.path.split("/")
    if folders:
        assert folders[0] in {"log", "realisations", "build-trace-v2", "debuginfo"}
    else:
        assert name.removesuffix(".ls") != name
    for part in (*folders, name):
        assert part.isascii()
        assert part.isprintable()
        assert part not in {"", ".", ".."}
        assert not part.startswith(".")
        assert len(part.encode()) <= MAX_FILE_NAME


@given(targets)
def test_foreign_references_stay_below_nar(target: str) -> None:
    """What is asked of an upstream as it came cannot climb out of the folder it names."""
    resource = parsed(target)
    if not isinstance(resource, ForeignNar):
        return
    assert resource.reference == target[1:]
    path = resource.reference.partition("?")[0]
    assert path.startswith("nar/")
    assert not {"", ".", ".."} & set(path.split("/"))
    assert resource.reference.isascii()
    assert resource.reference.isprintable()
    assert " " not in resource.reference


@pytest.mark.parametrize(
    "target",
    [
        lambda word: f"/log/{HASH_PART}-{word}",
        lambda word: f"/realisations/sha256:{HEX}!{word}.doi",
        lambda word: f"/build-trace-v2/{DRV}/{word}.doi",
        lambda word: f"/build-trace-v2/{HASH_PART}-{word}/out.doi",
    ],
    ids=["log", "realisation", "output", "derivation"],
)
def test_longest_file_names(target: Callable[[str], str]) -> None:
    """The longest name of each kind that is taken is one that a file system takes, too."""
    accepted = [n for n in range(1, 400) if parsed(target("x" * n)) is not None]
    assert accepted == list(range(1, len(accepted) + 1))
    assert len(accepted) >= 160
    longest = target("x" * len(accepted))
    assert max(len(part) for part in longest.split("/")) <= MAX_FILE_NAME


@given(nar_names)
def test_nar_names_are_safe_file_names(name: NarName) -> None:
    """The file of a NAR has a name that every file system takes."""
    text = str(name)
    assert "/" not in text
    assert len(text) <= MAX_FILE_NAME
    assert set(text) <= set(NAME_CHARACTERS)
    assert set(name.hash_part) <= set(NIX32_ALPHABET)
