"""Fixtures that all tests share, and the rule for tools that a machine may lack."""

from __future__ import annotations

import json
import os
import shutil
import socket
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, ExitStack
from pathlib import Path
from typing import Any, Protocol

import pytest
from hypothesis import HealthCheck, settings

from tests.closures import SigningKey, StoreEntry
from tests.daemon import DaemonProcess
from tests.inside import InsideProxy
from tests.nix_client import NixClient
from tests.simulator import BinaryCacheSimulator, running

# `make test` plays the same examples everywhere, and a machine that is busy takes its time: pytest-timeout
# catches what really hangs. `make soak` plays others each time (`--hypothesis-profile random`).
_PATIENT = settings(deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("random", _PATIENT, derandomize=False)
settings.register_profile("repeatable", _PATIENT, derandomize=True)
settings.load_profile("repeatable")


def pytest_configure(config: pytest.Config) -> None:
    """Register our markers."""
    config.addinivalue_line("markers", "needs(*tools): programs without which the test is skipped")


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Run two tests on each core with ``-n auto``: half of their time they wait for what is to happen."""
    return 2 * len(os.sched_getaffinity(0))


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Look for the programs that a test marked with ``needs`` runs."""
    for marker in item.iter_markers("needs"):
        require_tool(*marker.args)


def require_tool(*names: str) -> None:
    """Skip the test, or fail it in CI, where one of the programs is not on PATH."""
    missing = [name for name in names if shutil.which(name) is None]
    if not missing:
        return
    reason = f"not installed: {', '.join(missing)}"
    if os.environ.get("CI", "").lower() not in {"", "0", "false"}:
        pytest.fail(f"{reason}, and CI has to have it", pytrace=False)
    pytest.skip(reason)


def let_everybody_in(folder: Path) -> None:
    """Let every user of this machine reach a folder of a test."""
    temporary = Path(tempfile.gettempdir())
    for each in (folder, *folder.parents):
        if temporary in each.parents:
            each.chmod(0o755)


@pytest.fixture(autouse=True)
def _no_forward_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything is on this machine, whatever way out the developer's environment names."""
    for name in os.environ:
        if name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)


class StartSimulator(Protocol):
    """Start a simulator that lasts as long as the test; options are those of the class."""

    def __call__(self, *entries: StoreEntry, **options: Any) -> Awaitable[BinaryCacheSimulator]:
        """Publish `entries`, signed by the fixture `key` unless another one is given."""
        ...


class RunSimulator(Protocol):
    """As `StartSimulator`, in a thread."""

    def __call__(self, *entries: StoreEntry, **options: Any) -> BinaryCacheSimulator:
        """Publish `entries`, signed by the fixture `key` unless another one is given."""
        ...


class StartProxy(Protocol):
    """Start a proxy in the loop of the test that lasts as long as it; options are those of the class."""

    def __call__(
        self, *upstreams: BinaryCacheSimulator | str, **options: Any
    ) -> Awaitable[InsideProxy]:
        """Give it these upstreams, the test's own store, and the fixture `key`."""
        ...


class RunDaemon(Protocol):
    """Run the daemon in a process and a folder of its own; options are those of the class."""

    def __call__(self, *upstreams: str, ready: bool = True, **options: Any) -> DaemonProcess:
        """Give it these upstreams and the fixture `key`; unless told not to, wait for it."""
        ...


@pytest.fixture
def key() -> SigningKey:
    """Return the key that the simulated caches sign with."""
    return SigningKey("test-cache-1")


@pytest.fixture
async def sim(key: SigningKey) -> AsyncIterator[StartSimulator]:
    """Return a function that starts caches in the loop of the test."""
    async with AsyncExitStack() as stack:

        async def start(*entries: StoreEntry, **options: Any) -> BinaryCacheSimulator:
            cache = BinaryCacheSimulator(entries, **{"key": key, **options})
            return await stack.enter_async_context(cache)

        yield start


@pytest.fixture
async def start(tmp_path: Path, key: SigningKey) -> AsyncIterator[StartProxy]:
    """Return a function that starts proxies with the same store, one after the other."""
    async with AsyncExitStack() as stack:

        async def run(*upstreams: BinaryCacheSimulator | str, **options: Any) -> InsideProxy:
            urls = [cache if isinstance(cache, str) else cache.url for cache in upstreams]
            proxy = InsideProxy(tmp_path / "store", *urls, **{"keys": [key.public], **options})
            return await stack.enter_async_context(proxy)

        yield run


@pytest.fixture
def threaded_sim(key: SigningKey) -> Iterator[RunSimulator]:
    """Return a function that starts caches in threads, for tests that run other programs."""
    with ExitStack() as stack:

        def start(*entries: StoreEntry, **options: Any) -> BinaryCacheSimulator:
            cache = BinaryCacheSimulator(entries, **{"key": key, **options})
            return stack.enter_context(running(cache))

        yield start


@pytest.fixture
def daemon(tmp_path: Path, key: SigningKey) -> Iterator[RunDaemon]:
    """Return a function that runs daemons until the test ends; they may only have logged JSON."""
    daemons: list[DaemonProcess] = []

    def run(*upstreams: str, ready: bool = True, **options: Any) -> DaemonProcess:
        folder = tmp_path / f"daemon{len(daemons)}"
        defaults = {"upstreams": upstreams, "keys": [key.public]}
        daemons.append(DaemonProcess(folder, **{**defaults, **options}))
        daemons[-1].launch()
        return daemons[-1].await_ready() if ready else daemons[-1]

    yield run
    for process in daemons:
        if process.process.poll() is None:
            process.kill()
        process.wait()
    lines = [line for process in daemons for line in process.log]
    complaints = [
        line for line in lines if line["event"] == "not JSON" or "Traceback" in json.dumps(line)
    ]
    if complaints:
        pytest.fail(f"a daemon complained: {complaints}", pytrace=False)


@pytest.fixture
def nix(tmp_path: Path, key: SigningKey) -> NixClient:
    """Return a real Nix client with an empty store that trusts `key`."""
    require_tool("nix", "nix-store")
    folder = tmp_path / "nix"
    folder.mkdir()
    return NixClient(folder, keys=[key.public])


@pytest.fixture
def free_port() -> Callable[[], int]:
    """Return a function that finds a port of loopback nobody listens on at the moment."""

    def find() -> int:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            return int(probe.getsockname()[1])

    return find
