"""What is installed and shipped: the locks and the wheel."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
GROUPS = PYPROJECT["dependency-groups"]
LOCKS = {
    "requirements.lock": PYPROJECT["project"]["dependencies"] + GROUPS["build"],
    "requirements-dev.lock": PYPROJECT["project"]["dependencies"] + GROUPS["build"] + GROUPS["dev"],
}
"""Each lock, and what it has to satisfy."""


def _pins(lock: str) -> dict[str, str]:
    text = (ROOT / lock).read_text()
    return {
        canonicalize_name(name): version
        for name, version in re.findall(r"(?m)^([\w.-]+)==([\w.]+)(?: ;.*)? \\$", text)
    }


@pytest.mark.parametrize("lock", LOCKS)
def test_lock_is_hashed(lock: str) -> None:
    """Every line of a lock is a pinned package or one of its hashes; no host is named."""
    lines = (ROOT / lock).read_text().splitlines()
    hashes = [line for line in lines if re.fullmatch(r"    --hash=sha256:[0-9a-f]{64}( \\)?", line)]

    assert len(_pins(lock)) + len(hashes) == len(lines)
    assert len(hashes) > len(_pins(lock))


@pytest.mark.parametrize(("lock", "requirements"), LOCKS.items(), ids=LOCKS)
def test_lock_satisfies_pyproject(lock: str, requirements: list[str]) -> None:
    """Each lock has everything that pyproject.toml asks for, in a version that it allows."""
    pins = _pins(lock)

    unmet = [
        str(wanted)
        for wanted in map(Requirement, requirements)
        if not wanted.specifier.contains(pins.get(canonicalize_name(wanted.name), "0"))
    ]
    assert unmet == []


def test_tests_run_against_what_is_shipped() -> None:
    """The development lock has the versions of the runtime lock, and more."""
    assert _pins("requirements.lock").items() < _pins("requirements-dev.lock").items()


def test_wheel_holds_the_program(tmp_path: Path) -> None:
    """A wheel is built without network, and holds every module, the licence and the command."""
    source = tmp_path / "source"
    shutil.copytree(ROOT / "proxy", source / "proxy", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)

    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-index", "--no-deps"]
    subprocess.run([*pip, "--no-build-isolation", "--wheel-dir", tmp_path, source], check=True)

    (built,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(built) as wheel:
        names = set(wheel.namelist())
        (entry_points,) = (name for name in names if name.endswith("/entry_points.txt"))
        assert "nix-cache-proxy=proxy.__main__:main" in wheel.read(entry_points).decode()
    modules = {path.relative_to(source).as_posix() for path in source.glob("proxy/**/*.py")}
    assert {name for name in names if name.startswith("proxy/")} == modules
    assert any(name.endswith("/licenses/LICENSE") for name in names)
