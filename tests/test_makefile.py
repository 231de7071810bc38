"""The Makefile: it sets up what is missing, and once that is done it stays off the network."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import require_tool

ROOT = Path(__file__).parent.parent


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder in which make finds its rules, and nothing is installed."""
    require_tool("make")
    folder = tmp_path / "checkout"
    folder.mkdir()
    for name in ("Makefile", "pyproject.toml", "requirements.lock", "requirements-dev.lock"):
        shutil.copy2(ROOT / name, folder)
    return folder


def _make(checkout: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["make", "--no-print-directory", *arguments],
        check=False,
        cwd=checkout,
        env={"PATH": os.environ["PATH"]},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_make_run_when_installed_only_serves(checkout: Path) -> None:
    """Once installed, `make run` only starts the daemon, so it needs no network."""
    _pretend_installed(checkout)

    assert _make(checkout, "--dry-run", "run").stdout == ".venv/bin/nix-cache-proxy serve \n"


def test_make_run_follows_the_lock(checkout: Path) -> None:
    """A newer lock is installed before the daemon starts, with every hash checked."""
    _pretend_installed(checkout)
    stamp = (checkout / ".venv" / ".runtime").stat().st_mtime
    os.utime(checkout / "requirements.lock", (stamp + 1, stamp + 1))

    install, *_, serve = _make(checkout, "--dry-run", "run").stdout.splitlines()
    assert "--require-hashes --only-binary :all: -r requirements.lock" in install
    assert serve.startswith(".venv/bin/nix-cache-proxy serve")


def test_make_run_renews_a_moved_venv(checkout: Path, tmp_path: Path) -> None:
    """A .venv of another folder, whose programs would run that folder's code, is made anew."""
    _pretend_installed(checkout)
    moved = checkout.rename(tmp_path / "moved")

    assert _make(moved, "--dry-run", "run").stdout.startswith("command -v python3")


def _pretend_installed(checkout: Path) -> None:
    sources = ("requirements.lock", "requirements-dev.lock", "pyproject.toml")
    later = 1 + max((checkout / source).stat().st_mtime for source in sources)
    programs = checkout / ".venv" / "bin"
    programs.mkdir(parents=True)
    (programs / "python").symlink_to(sys.executable)
    for stamp in (".created", ".runtime", ".development"):
        path = checkout / ".venv" / stamp
        path.write_text(f"{checkout}\n")
        os.utime(path, (later, later))


@pytest.mark.parametrize(
    ("flaw", "advice"),
    [
        ("sys.version_info = (3, 10)", "Python 3.11 or newer is needed"),
        ("sys.modules['ensurepip'] = None", "apt-get install python3-venv"),
    ],
)
def test_make_says_what_python_lacks(checkout: Path, flaw: str, advice: str) -> None:
    """A Python that cannot be used is refused with what to do about it, and no .venv is left."""
    python = checkout / "flawed-python"
    python.write_text(f"#!{sys.executable}\nimport sys\n{flaw}\nexec(sys.argv[2])\n")
    python.chmod(0o755)

    made = _make(checkout, "run", f"PYTHON={python}")

    assert made.returncode != 0
    assert advice in made.stdout
    assert "Traceback" not in made.stdout
    assert not (checkout / ".venv").exists()


def test_make_says_that_python_is_missing(checkout: Path) -> None:
    """Where there is no Python, make says which package has it."""
    made = _make(checkout, "run", "PYTHON=no-such-python")

    assert made.returncode != 0
    assert "apt-get install python3" in made.stdout
