"""What import-linter cannot say: homes of third parties, size of modules, the code map."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(ROOT.glob("proxy/**/*.py"))
}
HOMES = {
    "aiohttp": ("proxy.porter.process", "proxy.server", "proxy.upstream"),
    "aiohttp.web": ("proxy.server",),
    "msgspec": ("proxy.config", "proxy.porter.messages", "proxy.wire", "proxy.workers.messages"),
    "nacl": ("proxy.nix.signature",),
    "prometheus_client": ("proxy.metrics",),
    "structlog": ("proxy.cli",),
    "typer": ("proxy.cli",),
}
"""Where a third party is imported, and with it where its exceptions become ours."""


def _imports(path: Path) -> Iterator[str]:
    """Yield the full name of whatever a module imports, also of ``aiohttp.web`` used as such."""
    for node in ast.walk(ast.parse(path.read_bytes())):
        match node:
            case ast.Import(names=names):
                yield from (alias.name for alias in names)
            case ast.ImportFrom(module=str(module), names=names):
                yield from (f"{module}.{alias.name}" for alias in names)
            case ast.Attribute(value=ast.Name(id="aiohttp"), attr=attribute):
                yield f"aiohttp.{attribute}"
            case _:
                pass


def _is_within(name: str, package: str) -> bool:
    # aiohttp.web is spread over aiohttp.web_request and its like.
    return name == package or name.startswith((f"{package}.", f"{package}_"))


@pytest.mark.parametrize("third_party", HOMES)
def test_third_party_stays_at_home(third_party: str) -> None:
    """A third party is imported in its home, and nowhere else."""
    importers = {
        module
        for module, path in MODULES.items()
        if any(_is_within(name, third_party) for name in _imports(path))
    }

    strangers = {
        importer
        for importer in importers
        if not any(_is_within(importer, home) for home in HOMES[third_party])
    }
    assert importers
    assert strangers == set()


def test_dependencies_are_what_is_imported() -> None:
    """Nothing is imported that is not declared, and nothing declared that is not imported."""
    tops = {name.partition(".")[0] for path in MODULES.values() for name in _imports(path)}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = {re.split(r"[<>=!~ ]", each)[0] for each in project["dependencies"]}

    third_parties = tops - sys.stdlib_module_names - {"proxy"}
    distributions = packages_distributions()
    imported = {re.sub(r"[-_.]+", "-", distributions[name][0]).lower() for name in third_parties}
    assert imported == declared


@pytest.mark.parametrize("module", MODULES)
def test_module_is_short(module: str) -> None:
    """No module is longer than 400 lines: what is longer does two jobs."""
    assert len(MODULES[module].read_text().splitlines()) <= 400


def test_code_map_is_complete() -> None:
    """ARCHITECTURE.md is short, names every module, and names none that is gone."""
    text = (ROOT / "ARCHITECTURE.md").read_text()
    named = set(re.findall(r"\w+\.py\b", text))

    assert len(text.splitlines()) <= 150
    assert named == {path.name for path in MODULES.values() if path.name != "__init__.py"}
    packages = {path.parent.name for path in MODULES.values() if path.name == "__init__.py"}
    assert {package for package in packages if f"{package}/" not in text} == set()


def test_commands_load_no_daemon() -> None:
    """A command that a running daemon carries out does without what a daemon is made of: it takes long."""
    loaded = subprocess.run(
        [sys.executable, "-c", "import sys, proxy.cli; print(*sys.modules)"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    assert {"proxy.cli.status", "proxy.cli.asking", "typer"} <= {*loaded}
    assert {"proxy.cli.daemon", "proxy.cache", "aiohttp", "structlog"}.isdisjoint(loaded)
