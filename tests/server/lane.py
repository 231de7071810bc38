"""The two ways that a request can take: a connection that prefers the fast lane, and one without it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Self

from proxy.events import Fault, Quarantined
from tests.inside import InsideProxy
from tests.server.piecewise import (
    Answer,
    Piecewise,
    answers,
    connections,
    dates,
    plain,
    through_the_lane,
)


class Lane:
    """A connection whose requests take the fast lane whenever they can."""

    def __init__(self, proxy: InsideProxy) -> None:
        self._proxy = proxy
        self._server = connections(proxy.server)

    async def __aenter__(self) -> Self:
        self._client = await Piecewise(self._server).__aenter__()
        await self._client.ask(plain("/healthz"))
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._client.__aexit__(None, None, None)
        await self._server.shutdown(1)

    async def ask(self, target: str) -> tuple[Answer, bool]:
        """Return an answer, and whether it came through the fast lane."""
        before = through_the_lane(self._proxy)
        (answer,) = answers(await self._client.ask(plain(target)))
        return answer, through_the_lane(self._proxy) > before

    async def dated(self, target: str) -> str:
        """Return the date of an answer that came through the fast lane."""
        before = through_the_lane(self._proxy)
        (date,) = dates(await self._client.ask(plain(target)))
        assert through_the_lane(self._proxy) == before + 1
        return date.decode()


async def the_long_way(proxy: InsideProxy, target: str) -> Answer:
    """Return the answer of a proxy without a fast lane."""
    server = connections(proxy.server, lane=False)
    async with Piecewise(server) as client:
        (answer,) = answers(await client.ask(plain(target)))
    await server.shutdown(1)
    return answer


def cut(nar: Path) -> None:
    """Take the last byte from a NAR."""
    os.truncate(nar, nar.stat().st_size - 1)


def lengthen(nar: Path) -> None:
    """Give a NAR another byte."""
    with nar.open("ab") as file:
        file.write(b"\0")


HARMS = (cut, lengthen, Path.unlink)
"""What the lane has to see of a NAR in the store."""


async def is_made_good(proxy: InsideProxy, target: str, harm: Callable[[Path], None]) -> None:
    """Check that a harmed NAR takes the long way, which makes it good, and then the fast lane again."""
    nar = proxy.folder / target[1:]
    file = nar.read_bytes()
    harm(nar)
    async with Lane(proxy) as lane:
        answer, took_it = await lane.ask(target)
        assert (answer.body, took_it) == (file, False)
        await proxy.idle()
        assert nar.read_bytes() == file
        answer, took_it = await lane.ask(target)
        assert (answer.body, took_it) == (file, True)
    assert bool(proxy.observed(Quarantined)) == (harm in (cut, lengthen))
    assert not proxy.observed(Fault)
