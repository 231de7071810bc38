"""What a daemon does for pins by itself."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path

import pytest

from proxy.cli.upkeep import keep_whole
from proxy.nix.store_path import StorePath
from proxy.pins import FromUpstreams, Pins, Progress
from proxy.store.eviction import UNLIMITED, Limits
from tests.closures import SigningKey, StoreEntry
from tests.conftest import StartSimulator
from tests.faults import Reset
from tests.inside import InsideProxy
from tests.store.publishing import nar_name

ENTRY = StoreEntry.make("pinned-1", b"x" * 100_000, compression="none")

PATH = StorePath.parse(ENTRY.store_path)


async def _ignore(_progress: Progress) -> None:
    """Take no notice."""


@pytest.mark.parametrize("limits", [UNLIMITED, Limits(max_size=10_000_000)], ids=["all", "10MB"])
async def test_what_gets_lost_is_fetched_again(
    limits: Limits, tmp_path: Path, sim: StartSimulator, key: SigningKey
) -> None:
    """What is taken out of a pin is tried again and again while upstreams fail, and then it is here."""
    upstream = await sim(ENTRY)
    async with InsideProxy(tmp_path / "store", upstream.url, keys=[key.public]) as proxy:
        pins = Pins(proxy.store, FromUpstreams(proxy.cache, proxy.store), limits)
        await pins.pin("mine", [PATH], _ignore)
        upstream.fault("/", Reset())
        await proxy.cache.take_out(nar_name(ENTRY), "somebody found out")
        keeping = asyncio.create_task(keep_whole(pins, first_pause=0.001, longest_pause=0.01))
        try:
            await proxy.eventually(lambda: pins._reasons)
            (state,) = await pins.all()
            ((path, reason),) = state.lacking
            assert (state.missing, str(path)) == (1, ENTRY.store_path)
            assert reason.startswith(f"cannot keep {ENTRY.store_path}: ")
            upstream.heal()
            proxy.clock.now += 1_000  # it is not left alone any more
            await proxy.eventually(lambda: proxy.store.has_nar(nar_name(ENTRY)))
            await proxy.eventually(lambda: not pins._reasons)
        finally:
            keeping.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await keeping
        assert (await pins.all())[0].missing == 0


async def test_what_does_not_fit_is_left(
    tmp_path: Path, sim: StartSimulator, key: SigningKey
) -> None:
    """What would exceed a limit that was made smaller is not fetched, and the reason is told."""
    upstream = await sim(ENTRY)
    async with InsideProxy(tmp_path / "store", upstream.url, keys=[key.public]) as proxy:
        source = FromUpstreams(proxy.cache, proxy.store)
        await Pins(proxy.store, source, UNLIMITED).pin("mine", [PATH], _ignore)
        await proxy.cache.take_out(nar_name(ENTRY), "somebody found out")
        pins = Pins(proxy.store, source, Limits(max_size=50_000))
        upstream.reset_counts()
        assert await pins.mend() == 1
        assert upstream.gets(ENTRY.nar_path) == 0
        (state,) = await pins.all()
        assert "does not fit below max_size" in state.lacking[0][1]
