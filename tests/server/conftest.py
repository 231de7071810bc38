"""What the tests of the server share."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.conftest import StartSimulator
from tests.server.hot import LARGE, SMALL, UNASKED, InMemoryProxy, heat, hot_proxy
from tests.simulator import BinaryCacheSimulator


@pytest.fixture
async def cache(sim: StartSimulator) -> BinaryCacheSimulator:
    """Return an upstream that has everything but what is missing."""
    return await sim(SMALL, LARGE, UNASKED)


@pytest.fixture
async def proxy(cache: BinaryCacheSimulator, tmp_path: Path) -> AsyncIterator[InMemoryProxy]:
    """Return a proxy in front of `cache` in which everything is hot."""
    async with hot_proxy(tmp_path, cache) as running:
        await heat(running)
        yield running
