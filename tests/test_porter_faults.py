"""Whatever an upstream does, a client cannot tell whether it was asked by the porter or by the daemon."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass, replace
from operator import sub
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import pytest_asyncio

from proxy import patience
from proxy.events import BreakerOpened, Rejected
from tests.closures import SigningKey, StoreEntry
from tests.faults import (
    Body,
    Chunked,
    Corrupt,
    Cut,
    Encoded,
    Fault,
    Headers,
    Html,
    Longer,
    Redirect,
    Reset,
    ShortBody,
    Shorter,
    Stall,
    Status,
)
from tests.folder_oracle import complete_paths
from tests.inside import InsideProxy
from tests.porters import WatchedPorter
from tests.simulator import BinaryCacheSimulator

pytestmark = pytest.mark.asyncio(loop_scope="module")

NAR = StoreEntry.make("small-1.0", random.Random(3).randbytes(60_000), compression="none")
FILE = bytes(NAR.file)
SIZE = len(FILE)
MIDDLE = SIZE // 2


@dataclass(frozen=True)
class Outcome:
    """What clients and operators see of a download, and what is left of it."""

    status: int
    right: bool
    complete: bool
    upstream: str | None
    rejected: list[tuple[str, str]]
    """Who was caught with something else than was signed, and what it was."""
    breakers: list[str]
    """Who is left alone from now on."""
    kept: set[str]
    partials: int


@dataclass(frozen=True)
class Case:
    """An upstream that does something wrong, and who helps.

    Attributes:
        faults: What goes wrong; nothing stands for an upstream where nobody listens.
        times: How often; None is for ever.
        helped: Whether there is another upstream that has the file.
    """

    faults: tuple[Fault, ...]
    times: int | None
    helped: bool


@pytest.fixture(autouse=True)
def _hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits long until something is tried again."""
    monkeypatch.setattr(patience, "FIRST_PAUSE", 0.01)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared() -> AsyncIterator[WatchedPorter]:
    """Return a porter for all tests of this module: to start one takes longer than most of them."""
    async with aclosing(WatchedPorter()) as made:
        yield made


@pytest_asyncio.fixture(loop_scope="module")
async def porter(shared: WatchedPorter) -> WatchedPorter:
    """Return the porter, which is at hand."""
    await shared.ready()
    return shared


async def play(
    case: Case, folder: Path, key: SigningKey, porter: WatchedPorter | None
) -> tuple[Outcome, list[int]]:
    """Have one client ask for a file, and see what comes of it.

    Returns:
        That, and how often each upstream was asked for it.
    """
    async with AsyncExitStack() as stack:
        ill = await stack.enter_async_context(BinaryCacheSimulator([NAR], key=key))
        others = [NAR] if case.helped else []
        well = await stack.enter_async_context(BinaryCacheSimulator(others, key=key))
        proxy = await stack.enter_async_context(
            InsideProxy(
                folder,
                *(ill.url, well.url),
                keys=[key.public],
                read_timeout=0.6,
                strict=True,
                porter=porter,
            )
        )
        url = await proxy.nar_url(NAR.hash_part)
        if not case.faults:
            ill.down()
        ill.fault("/nar/", *case.faults, times=case.times)
        answer = await proxy.pull(url)
        await proxy.idle()
        complete_paths(folder, [key])
        outcome = Outcome(
            answer.status,
            answer.body == FILE,
            answer.complete,
            answer.headers.get("X-Upstream"),
            [(event.upstream, event.kind) for event in proxy.observed(Rejected)],
            [event.upstream for event in proxy.observed(BreakerOpened)],
            proxy.kept,
            len(proxy.partials),
        )
        return outcome, [cache.gets(NAR.nar_path) for cache in (ill, well)]


FAULTS: dict[str, tuple[Fault, ...]] = {
    "refused": (),
    "404": (Status(404),),
    "403": (Status(403),),
    "405": (Status(405),),
    "206": (Status(206),),
    "429": (Status(429, headers={"Retry-After": "60"}),),
    "500": (Status(500),),
    "503 with a date": (Status(503, headers={"Retry-After": "Wed, 21 Oct 2099 07:28:00 GMT"}),),
    "503 in many bytes": (Status(503, b"x" * 200_000),),
    "page": (Html(),),
    "page with 503": (Html(code=503),),
    "gzip": (Encoded(),),
    "identity": (Headers({"Content-Encoding": "identity"}),),
    "no type": (Headers({"Content-Type": None}),),
    "damaged first byte": (Corrupt(0),),
    "damaged last byte": (Corrupt(-1),),
    "nothing": (Body(b""),),
    "another file": (Body(bytes(StoreEntry.make("other-1.0", b"y" * 60_000).nar)),),
    "shorter": (Shorter(7),),
    "longer": (Longer(7),),
    "much longer": (Longer(5 * 2**20),),
    "chunks": (Chunked(),),
    "chunks, shorter": (Chunked(), Shorter(7)),
    "chunks, longer": (Chunked(), Longer(7)),
    "chunks, damaged": (Chunked(), Corrupt(MIDDLE)),
    "chunks, no end": (Chunked(), Cut(SIZE)),
    "chunks, silence at the end": (Chunked(), Stall(SIZE)),
    "chunks, cut": (Chunked(), Cut(MIDDLE)),
    "cut before the first byte": (Cut(0),),
    "cut in the middle": (Cut(MIDDLE),),
    "cut before the last byte": (Cut(SIZE - 1),),
    "closed in good order": (ShortBody(1_000),),
    "reset in the middle": (Cut(MIDDLE, reset=True),),
    "reset instead of an answer": (Reset(),),
    "silence": (Stall(None),),
    "silence before the first byte": (Stall(0),),
    "silence in the middle": (Stall(MIDDLE),),
    "redirect": (Redirect("/nar/elsewhere"),),
    "redirect to itself": (Redirect(NAR.nar_path),),
    "redirect to nowhere": (Redirect(""),),
    "redirect to another protocol": (Redirect("ftp://127.0.0.1/x"),),
    "redirect that is no URL": (Redirect("http://[/"),),
}
BROKEN_OFF = {
    "chunks, shorter",
    "chunks, cut",
    "cut in the middle",
    "cut before the last byte",
    "closed in good order",
    "reset in the middle",
    "silence in the middle",
}
"""What the porter has of these is thrown away: the daemon begins again, and that is one request more."""

HELP = {"alone": (None, False), "once": (1, False), "helped": (None, True)}


@pytest.mark.parametrize("fault", FAULTS)
async def test_it_makes_no_difference(
    fault: str, porter: WatchedPorter, tmp_path: Path, key: SigningKey
) -> None:
    """Clients, operators and the store see the same, and upstreams are asked no more often."""

    async def compare(name: str) -> None:
        case = Case(FAULTS[fault], *HELP[name])
        ours, asked = await play(case, tmp_path / f"{name} with", key, porter)
        theirs, asked_without = await play(case, tmp_path / f"{name} without", key, None)
        if fault in BROKEN_OFF:
            asked_without[0] += 1
            ours, theirs = replace(ours, breakers=[]), replace(theirs, breakers=[])
        assert (name, ours) == (name, theirs)
        assert (name, max(map(sub, asked, asked_without))) <= (name, 0)
        assert ours.partials == 0
        assert (ours.right, ours.complete) == (True, True) or not case.helped

    before = len(porter.orders)
    async with asyncio.TaskGroup() as comparisons:
        for name in HELP:
            comparisons.create_task(compare(name))
    asked = {urlsplit(order.url).port for order in porter.orders[before:]}
    assert len(asked) >= len(HELP)
    assert porter.events == []
