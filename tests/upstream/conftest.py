"""Fixtures for one upstream."""

from __future__ import annotations

import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from typing import Any

import pytest

from proxy.upstream.remote import Upstream
from tests.conftest import require_tool
from tests.upstream.servers import Authority

OpenUpstream = Callable[..., Upstream]
"""Make an `Upstream` named ``up`` at a URL, which is closed at the end; options are those of the class."""


@pytest.fixture
async def upstream(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[OpenUpstream]:
    """Return a function that makes upstreams; the developer's own forward proxy is not used."""
    for scheme in ("http", "https", "all", "no"):
        monkeypatch.delenv(f"{scheme}_proxy", raising=False)
        monkeypatch.delenv(f"{scheme}_PROXY".upper(), raising=False)
    async with AsyncExitStack() as stack:

        def make(url: str, **options: Any) -> Upstream:
            made = Upstream("up", url, **options)
            stack.push_async_callback(made.close)
            return made

        yield make


@pytest.fixture(scope="session")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    """Return a private certificate authority."""
    require_tool("openssl")
    return Authority.make(tmp_path_factory.mktemp("authority") / "ca")


@pytest.fixture
def tls(authority: Authority) -> ssl.SSLContext:
    """Return what makes a server of loopback one that `authority` vouches for."""
    return authority.server_context()
