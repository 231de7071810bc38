"""README.md and CONTRIBUTING.md: what they tell people to type exists, and what they list is all there is."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families as parse_metrics

from proxy.config import TcpListen, load, parse
from tests.conftest import RunDaemon
from tests.nix_client import NixClient

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PAGES = sorted(path.name for path in ROOT.glob("*.md"))
DEFAULTS = load(None, environ={"HOME": "/home/me"})
PREFIX = "nix_cache_proxy_"


def blocks(language: str, text: str = README) -> list[str]:
    """Return the fenced blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def commands(text: str, program: str) -> Iterator[list[str]]:
    """Yield the arguments of every ``program …`` in blocks of shell and between backticks."""
    lines = "\n".join(blocks("sh", text)).splitlines() + re.findall(r"`([^`\n]+)`", text)
    for line in lines:
        words = shlex.split(line, comments=True)
        if words and words[0] == program:
            yield words[1:]


def section(title: str) -> str:
    """Return what stands below a heading of the README."""
    return README.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


# --- what people are told to type ---------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES)
def test_make_targets_exist(page: str) -> None:
    """Each `make` target that a page names is one of the Makefile's."""
    rules = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    named = {words[0] for words in commands((ROOT / page).read_text(), "make") if words}

    assert named <= set(rules)
    assert page not in {"README.md", "CONTRIBUTING.md"} or {"run", "test"} <= named


def test_commands_and_flags_exist() -> None:
    """Each subcommand of ours in the README exists, and has the flags that it is given there."""
    named = list(commands(README, ".venv/bin/nix-cache-proxy"))
    assert {words[0] for words in named} == set(_commands())

    for command, *arguments in named:
        assert _flags(arguments) <= _flags(_help(command).split())


def test_arguments_for_make_run_are_flags() -> None:
    """What the README puts into ARGS are flags of `serve`."""
    given = [words[1].partition("=")[2] for words in commands(README, "make") if words[1:]]

    assert given
    assert {flag for each in given for flag in _flags(each.split())} <= _flags(
        _help("serve").split()
    )


def _commands() -> list[str]:
    """Return every subcommand there is."""
    return re.findall(r"^  ([a-z][a-z-]*)  ", _help(), re.MULTILINE)


def _help(*command: str) -> str:
    return subprocess.run(
        [sys.executable, "-m", "proxy", *command, "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        timeout=30,
    ).stdout


def _flags(words: list[str]) -> set[str]:
    return {word for word in words if word.startswith("--")}


# --- what people copy ---------------------------------------------------------------------------


def test_configuration_example_is_right() -> None:
    """The TOML can be used as it stands, and puts a cache with a token before all the default ones."""
    (example,) = blocks("toml")
    config = parse(example, "README.md", environ={"HOME": "/home/me"})

    first, *others = config.upstreams
    assert first.auth is not None
    assert [each.url for each in others] == [each.url for each in DEFAULTS.upstreams]
    assert set(DEFAULTS.trust.keys) < set(config.trust.keys)


def test_settings_named_in_passing_are_right() -> None:
    """A line of configuration in a sentence can be put into the table that the sentence names."""
    settings = re.findall(r"`(\w+ = [^`]+)`\s+in\s+`(\[\w+\])`", README)

    assert settings
    for line, table in settings:
        parse(f"{table}\n{line}\n", "README.md", environ={"HOME": "/home/me"})


def test_public_keys_are_the_default_ones() -> None:
    """Every published key in the README is one that the proxy trusts by itself, and none is missing."""
    keys = set(re.findall(r"[\w.-]+-\d:[A-Za-z0-9+/]{43}=", README))

    assert {key for key in keys if ":AAAA" not in key} == {str(k) for k in DEFAULTS.trust.keys}


def test_default_upstreams_are_named() -> None:
    """The README says whom the proxy asks when nobody has configured it."""
    sentence = README.partition("Without any configuration it asks")[2].partition(".\n")[0]

    hosts = [each.url.removeprefix("https://") for each in DEFAULTS.upstreams]
    assert re.findall(r"`([^`]+)`", sentence) == hosts


def test_default_address_and_store_are_named() -> None:
    """Every URL of ours in the README is where the proxy listens unless told otherwise."""
    (address,) = DEFAULTS.server.listen
    assert isinstance(address, TcpListen)

    urls = set(re.findall(r"http://127\.0\.0\.1[:\d]*", README))
    assert urls == {f"http://{address.host}:{address.port}"}
    assert f"`~/{DEFAULTS.store.path.relative_to('/home/me')}`" in section("Run it")
    assert f"`Priority: {DEFAULTS.server.priority}`" in section("Point Nix at it")


def test_nix_conf_is_understood(nix: NixClient) -> None:
    """The real Nix takes the nix.conf of the README, and means by it what the README says."""
    (snippet,) = blocks("ini")
    for name in ("substituters", "trusted-public-keys"):
        del nix.settings[name]  # they would win against the file
    (nix.home / "conf" / "nix.conf").write_text(snippet)

    shown = nix.run("nix", "show-config")
    settings = dict(line.split(" = ", 1) for line in shown.stdout.splitlines() if " = " in line)

    assert "warning" not in shown.stderr
    assert settings["substituters"] == "http://127.0.0.1:8627"
    assert set(settings["trusted-public-keys"].split()) == set(map(str, DEFAULTS.trust.keys))


@pytest.mark.parametrize("number", range(2))
def test_nix_expressions_parse(number: int, nix: NixClient, tmp_path: Path) -> None:
    """The NixOS module and the flake are Nix, and lead to the proxy with keys that are published."""
    file = tmp_path / "snippet.nix"
    file.write_text(blocks("nix")[number])

    parsed = nix.run("nix-instantiate", "--parse", file)

    assert parsed.returncode == 0, parsed.stderr
    assert '"http://127.0.0.1:8627"' in parsed.stdout
    assert len(blocks("nix")) == 2


# --- what people look up ------------------------------------------------------------------------


def test_metrics_table_is_complete(daemon: RunDaemon) -> None:
    """The table of the README has every metric of ours, with its labels, and no other."""
    proxy = daemon("http://127.0.0.1:1")
    proxy.get("/nix-cache-info")  # or else no request has a label
    families = parse_metrics(proxy.get("/metrics").decode())
    ours = [family for family in families if family.name.startswith(PREFIX)]
    exported = {
        (family.name + "_total" * (family.type == "counter")).removeprefix(PREFIX): {
            label for sample in family.samples for label in sample.labels
        }
        for family in ours
    }

    assert dict(_documented_metrics()) == exported


def _documented_metrics() -> Iterator[tuple[str, set[str]]]:
    """Yield name and labels of each metric in the table, where a row may name several."""
    table = section("Watch it").partition("| metric |")[2]
    for row in re.findall(r"^\| (`.*) \|$", table, re.MULTILINE):
        names, labels, _ = row.split("|", 2)
        for name in re.findall(r"`(\w+)`", names):
            yield name, set(re.findall(r"`(\w+)`", labels))


def test_urls_to_watch_answer(daemon: RunDaemon) -> None:
    """Each URL in the table answers 200."""
    proxy = daemon("http://127.0.0.1:1")
    named = re.findall(r"^\| `(/\w+)` \|", section("Watch it"), re.MULTILINE)

    assert len(named) == 3
    for path in named:
        assert proxy.get(path)


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    """Each relative link leads to a file of the repository."""
    links = re.findall(r"\]\(([^)\s]+)\)", (ROOT / page).read_text())

    missing = [link for link in links if "://" not in link and not (ROOT / link).exists()]
    assert not missing
    assert page != "README.md" or len(links) >= 7
