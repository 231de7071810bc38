"""The conformance suite in varnishtest's language: one case for each file in ``tests/vtc``.

A case starts the real daemon on a unix socket in a folder of its own, is its upstreams and its clients,
and fails when either side sees what the script does not say. What is published is really signed:
`_macros` makes it, and names it for the scripts. CONTRIBUTING.md says how to write one.
"""

from __future__ import annotations

import gzip
import os
import random
import shlex
import string
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tests.closures import SigningKey, StoreEntry

FOLDER = Path(__file__).parent / "vtc"
CASES = sorted(FOLDER.glob("*.vtc"))

KEY = SigningKey("test-cache-1")
HELLO = StoreEntry.make("hello-1.0", b"Hello, world!\n")
"""Smaller than what is held back until it is verified."""

BLOCK = "".join(random.Random("block").choices(string.ascii_letters, k=509))
"""A macro is at most 511 bytes long; no power of two is a multiple of a prime, so pieces do not fit twice."""

BIG = StoreEntry.make("big-1.0", BLOCK.encode() * 600, compression="none")
"""Large enough to be seen while it arrives: a beginning, 400 blocks (`_macros`: ``big_1``), 40 blocks, 160
blocks and an end, the last two of which hold all that is held back."""

LIMIT = 30
"""Seconds for a case; they take one."""


@pytest.fixture(scope="session")
def macros(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What the scripts can say ``${…}`` for; contents are in files."""
    return _macros(tmp_path_factory.mktemp("vtc"))


@pytest.mark.needs("varnishtest")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.stem)
def test_vtc(case: Path, macros: dict[str, str]) -> None:
    """What the first line of the script promises."""
    definitions = [word for name, value in macros.items() for word in ("-D", f"{name}={value}")]
    # A unix socket's path is at most 107 characters long, and a test's own folder is deep.
    with tempfile.TemporaryDirectory(prefix="vtc-") as folder:
        done = subprocess.run(
            ["varnishtest", "-v", "-t", str(LIMIT), *definitions, case],
            check=False,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={**os.environ, "TMPDIR": folder, "PYTHON": sys.executable, "KEY": KEY.public},
            cwd=FOLDER.parents[1],
            timeout=2 * LIMIT,
        )
    log = done.stdout.decode(errors="replace")
    assert done.returncode == 0, log
    assert "Traceback" not in log


def test_vtc_cases_are_many_and_named() -> None:
    """There are at least forty, each begins with its promise, and each ends its daemon at once."""
    scripts = [case.read_text() for case in CASES]

    assert len(CASES) >= 40
    assert [text for text in scripts if not text.startswith('varnishtest "')] == []
    assert [text for text in scripts if not text.endswith("process p1 -kill KILL -wait\n")] == []
    assert len({text.partition("\n")[0] for text in scripts}) == len(CASES)


def _macros(folder: Path) -> dict[str, str]:
    script = shlex.quote(str(FOLDER / "proxy.sh"))
    whole = bytes(BIG.file)
    begin = whole.index(BLOCK.encode())
    stranger = SigningKey("stranger-1")
    files = {
        "hello_info_gz": gzip.compress(HELLO.narinfo(KEY), mtime=0),
        "hello_info_by_stranger": HELLO.narinfo(stranger),
        "hello_info_moved": HELLO.but(scheme="uuid").narinfo(KEY),
        "hello_info_cut": HELLO.narinfo(KEY)[:100],
        "hello_bad_file": bytes(HELLO.file)[:-1] + b"?",
        "big_1": whole[: begin + 400 * len(BLOCK)],
    }
    for name, entry in (("hello", HELLO), ("big", BIG)):
        files[f"{name}_info"] = entry.narinfo(KEY)
        files[f"{name}_file"] = bytes(entry.file)
        files[f"{name}_answer"] = _answer(entry)
    for name, contents in files.items():
        (folder / name).write_bytes(contents)
    return {
        "proxy": f"exec sh {script}",
        **{name: str(folder / name) for name in files},
        **_names("hello", HELLO),
        **_names("big", BIG),
        "hello_nar_moved": HELLO.but(scheme="uuid").nar_path,
        "block": BLOCK,
        "big_end": whole[begin + 600 * len(BLOCK) :].hex(),
        "big_begin": whole[:begin].hex(),
    }


def _names(name: str, entry: StoreEntry) -> dict[str, str]:
    return {
        name: f"/{entry.hash_part}.narinfo",
        f"{name}_nar": entry.nar_path,
        f"{name}_url": f"/{_our_url(entry)}",
        f"{name}_size": str(len(entry.file)),
        f"{name}_answer_size": str(len(_answer(entry))),
        f"{name}_hash": entry.file_hash,
    }


def _answer(entry: StoreEntry) -> bytes:
    """Return the narinfo as clients get it: the upstream's text with our URL."""
    return entry.narinfo(KEY).replace(entry.url("").encode(), _our_url(entry).encode())


def _our_url(entry: StoreEntry) -> str:
    extension = "" if entry.compression == "none" else f".{entry.compression}"
    return f"nar/{entry.hash_part}-{entry.nar_hash}.nar{extension}"
