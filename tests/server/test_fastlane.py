"""What the fast lane answers: the same as the long way, and only as long as that would answer it."""

from __future__ import annotations

import asyncio
import contextlib
import email.utils
import errno
import http.client
import os
import random
import signal
import sqlite3
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlsplit

import pytest

from proxy import known
from proxy.events import Evicted, FastlaneServed, Fault, Rejected, RequestServed
from proxy.server import fastlane
from proxy.server.fastlane import LARGEST_NAR, NAR_BYTES, SMALL_NAR
from proxy.store import index, room
from proxy.store.database import Database
from proxy.store.eviction import Limits
from proxy.store.files import in_use
from tests.closures import SigningKey, StoreEntry, closure
from tests.conftest import RunDaemon, RunSimulator, StartSimulator
from tests.faults import Corrupt
from tests.inside import InsideProxy
from tests.server.hot import (
    ABSENT,
    HOT,
    KEY,
    LARGE,
    LARGE_NAR,
    MISSING,
    NAR,
    NARINFO,
    SMALL,
    UNASKED,
    heat,
    hot_proxy,
)
from tests.server.lane import Lane, the_long_way
from tests.server.piecewise import (
    Answer,
    plain,
    through_the_lane,
)
from tests.simulator import BinaryCacheSimulator
from tests.wire import Wire

pytestmark = pytest.mark.timeout(60)


def kept(proxy: InsideProxy) -> list[str]:
    """Return the targets of the NARs in memory, and check that no file is open for them."""
    folder = f"{proxy.folder}/nar/"
    for fd in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):  # the descriptor of this very folder
            assert not str(fd.readlink()).startswith(folder)
    return sorted(target.decode() for target, _ in proxy.server.lane._nars.items())


def nar_url(entry: StoreEntry) -> str:
    """Return the URL that the proxy gives the NAR of an uncompressed path."""
    return f"/nar/{entry.hash_part}-{entry.nar_hash}.nar"


async def warm(proxy: InsideProxy, *entries: StoreEntry) -> None:
    """Bring NARs into the store, and ask for them once more."""
    for entry in entries:
        url = await proxy.nar_url(entry.hash_part)
        for _ in range(2):
            assert (await proxy.pull(url)).body == bytes(entry.file)
            await proxy.idle()


# --- the same answers -------------------------------------------------------------------------


@pytest.mark.parametrize("target", HOT)
async def test_the_same_bytes(proxy: InsideProxy, target: str) -> None:
    """Status line, headers and body are byte for byte those of the long way."""
    right = await the_long_way(proxy, target)
    async with Lane(proxy) as lane:
        for _ in range(3):
            assert await lane.ask(target) == (right, True)


async def test_the_headers(proxy: InsideProxy) -> None:
    """What clients rely on is there: length, kind, provenance, ETag; and no encoding."""
    async with Lane(proxy) as lane:
        nar, _ = await lane.ask(NAR)
        narinfo, _ = await lane.ask(NARINFO)
        absent, _ = await lane.ask(ABSENT)
    assert nar == Answer(
        b"HTTP/1.1 200 OK",
        tuple(
            sorted(
                [
                    b"Content-Type: application/x-nix-nar",
                    b"Accept-Ranges: bytes",
                    b'ETag: "%s"' % SMALL.file_hash.encode(),
                    b"Content-Length: %d" % len(SMALL.file),
                    b"Server: nix-cache-proxy",
                    b"X-Cache: HIT",
                    b"X-Upstream: up0",
                ]
            )
        ),
        bytes(SMALL.file),
    )
    assert narinfo.status == b"HTTP/1.1 200 OK"
    assert set(narinfo.headers) == {
        b"Content-Type: text/x-nix-narinfo",
        b"Content-Length: %d" % len(narinfo.body),
        b"Server: nix-cache-proxy",
        b"X-Cache: HIT",
        b"X-Upstream: up0",
    }
    assert f"URL: {NAR[1:]}\n".encode() in narinfo.body
    assert absent.status == b"HTTP/1.1 404 Not Found"
    assert absent.body == f"no upstream has {ABSENT[1:]}\n".encode()
    assert set(absent.headers) == {
        b"Content-Type: text/plain; charset=utf-8",
        b"Content-Length: %d" % len(absent.body),
        b"Server: nix-cache-proxy",
    }


async def test_every_kind_of_path(sim: StartSimulator, tmp_path: Path) -> None:
    """All paths of a closure, in every compression, are the same both ways, and whole."""
    entries = closure(21, seed=3, sizes=(1, 30_000))
    async with hot_proxy(tmp_path, await sim(*entries)) as proxy:
        urls = {entry: await proxy.nar_url(entry.hash_part) for entry in entries}
        for _ in range(2):
            for url in urls.values():
                await proxy.pull(url)
            await proxy.idle()
        async with Lane(proxy) as lane:
            for entry, url in urls.items():
                for target in (entry.narinfo_path, url):
                    assert await lane.ask(target) == (await the_long_way(proxy, target), True)
                assert (await lane.ask(url))[0].body == bytes(entry.file)


async def test_after_a_restart(cache: BinaryCacheSimulator, tmp_path: Path) -> None:
    """What was read from the store is the same both ways, too, and says where it came from."""
    async with hot_proxy(tmp_path, cache) as proxy:
        await heat(proxy)
    async with hot_proxy(tmp_path, cache) as proxy:
        await heat(proxy)
        async with Lane(proxy) as lane:
            for target in HOT:
                right = await the_long_way(proxy, target)
                assert await lane.ask(target) == (right, True)
                assert (b"X-Upstream: up0" in right.headers) == (target != ABSENT)


@pytest.mark.parametrize("size", [SMALL_NAR, LARGEST_NAR])
@pytest.mark.parametrize("excess", [-1, 0, 1])
async def test_how_large(sim: StartSimulator, tmp_path: Path, excess: int, size: int) -> None:
    """A NAR of just the largest size takes the fast lane, and one that is larger does not."""
    overhead = len(StoreEntry.make("sized-1.0", b"x" * 8_000).nar) - 8_000
    wanted = size - overhead + 8 * excess
    entry = StoreEntry.make("sized-1.0", random.Random(3).randbytes(wanted), compression="none")
    assert len(entry.file) == size + 8 * excess
    async with hot_proxy(tmp_path, await sim(entry)) as proxy:
        await warm(proxy, entry)
        async with Lane(proxy) as lane:
            answer, took_it = await lane.ask(nar_url(entry))
            assert answer == await the_long_way(proxy, nar_url(entry))
            assert answer.body == bytes(entry.file)
            assert took_it == (len(entry.file) <= LARGEST_NAR)
            assert len(proxy.server.lane._nars) == (len(entry.file) <= SMALL_NAR)


NOT_QUITE = [
    "/",
    "/nix-cache-info",
    "/nar/",
    LARGE_NAR,
    f"{NAR}?",
    f"{NAR}#",
    f"{NAR}/",
    f"/{NAR}",
    NAR[:-1],
    NAR.upper(),
    NAR.replace(".nar", ".nar.xz"),
    f"{NARINFO}?",
    NARINFO.upper(),
    NARINFO.replace(".narinfo", ".narinf0"),
    f"/{'e' * 32}.narinfo",
    f"/{'/' * 32}.narinfo",
    f"/log/{'a' * 28}.narinfo",
    f"/nar/{'a' * 28}.narinfo",
    f"/{'%' * 32}.narinfo",
]


@pytest.mark.parametrize("target", NOT_QUITE)
async def test_not_quite_hot(proxy: InsideProxy, target: str) -> None:
    """What is not exactly the name of something hot gets the answer of the long way, every time."""
    await the_long_way(proxy, target)  # which may have to ask the upstream
    right = await the_long_way(proxy, target)
    async with Lane(proxy) as lane:
        for _ in range(3):
            assert (await lane.ask(target))[0] == right


@pytest.mark.parametrize("name", ["../" + "o" * 29, "\0" + "0" * 31, "nar/../" + "0" * 25])
async def test_names_of_files_elsewhere(proxy: InsideProxy, name: str) -> None:
    """No target leads to a file that is not a narinfo of the store; such a file is not touched."""
    elsewhere = proxy.folder.parent / f"{'o' * 29}.narinfo"
    elsewhere.write_text("not a narinfo\n")
    right = await the_long_way(proxy, f"/{name}.narinfo")
    assert right.code in (400, 404)
    async with Lane(proxy) as lane:
        assert await lane.ask(f"/{name}.narinfo") == (right, False)
    assert elsewhere.read_text() == "not a narinfo\n"
    assert not proxy.observed(Fault)


# --- the date ---------------------------------------------------------------------------------


class Calendar:
    """What time it is for the fast lane."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, now: float) -> None:
        self.now = now
        monkeypatch.setattr(fastlane, "time", SimpleNamespace(time=lambda: self.now))


@pytest.mark.parametrize("target", HOT)
async def test_the_date(proxy: InsideProxy, monkeypatch: pytest.MonkeyPatch, target: str) -> None:
    """The date is that of the answer, to the second."""
    calendar = Calendar(monkeypatch, 1_800_000_000.0)
    async with Lane(proxy) as lane:
        for step in (0.0, 0.2, 0.79, 0.02, 0.98, 0.01, 3.0, 86_400.0, 0.5):
            calendar.now += step
            assert await lane.dated(target) == email.utils.formatdate(
                int(calendar.now), usegmt=True
            )


async def test_the_date_of_a_clock_that_is_put_back(
    proxy: InsideProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When the clock of the machine is put right, answers are dated right at once."""
    calendar = Calendar(monkeypatch, 1_800_000_000.0)
    async with Lane(proxy) as lane:
        for step in (0.0, -3_600.0, 0.5, -0.6):
            calendar.now += step
            assert await lane.dated(NARINFO) == email.utils.formatdate(
                int(calendar.now), usegmt=True
            )


async def test_the_date_is_today(proxy: InsideProxy) -> None:
    """The date is that of the machine."""
    async with Lane(proxy) as lane:
        earliest = int(time.time())
        date = email.utils.parsedate_to_datetime(await lane.dated(NAR)).timestamp()
        assert earliest <= date <= time.time()


# --- hot no more ------------------------------------------------------------------------------


async def test_an_absence_is_over(proxy: InsideProxy, cache: BinaryCacheSimulator) -> None:
    """A 404 is remembered for `negative_ttl`, and not a second longer."""
    async with Lane(proxy) as lane:
        proxy.clock.now += 59
        assert (await lane.ask(ABSENT))[1]
        cache.publish(MISSING)
        proxy.clock.now += 1
        answer, took_it = await lane.ask(ABSENT)
    assert (answer.code, took_it) == (200, False)


async def test_an_absence_that_is_none(proxy: InsideProxy, cache: BinaryCacheSimulator) -> None:
    """What has come in the meantime is there, although it was remembered as absent."""
    cache.publish(MISSING)
    url = f"/nar/{MISSING.hash_part}-{MISSING.nar_hash}.nar.xz"
    assert (await proxy.pull(url)).status == 200
    async with Lane(proxy) as lane:
        answer, _ = await lane.ask(ABSENT)
        assert (answer.code, answer) == (200, await the_long_way(proxy, ABSENT))


async def test_an_absence_of_what_the_store_has(
    sim: StartSimulator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the store has is served, also when it was once absent, and is in memory no longer."""
    monkeypatch.setattr(known, "HOT_BYTES", 3_000)  # one narinfo
    cache = await sim(SMALL, LARGE)
    async with hot_proxy(tmp_path, cache) as proxy:
        await heat(proxy)
        cache.publish(MISSING)
        url = f"/nar/{MISSING.hash_part}-{MISSING.nar_hash}.nar.xz"
        assert (await proxy.pull(url)).status == 200
        await proxy.idle()
        assert (await proxy.pull(NARINFO)).status == 200  # and MISSING is in memory no longer
        async with Lane(proxy) as lane:
            answer, _ = await lane.ask(ABSENT)
        assert answer.code == 200
        assert (await the_long_way(proxy, ABSENT)).code == 200


async def test_a_narinfo_that_led_astray(proxy: InsideProxy, cache: BinaryCacheSimulator) -> None:
    """A narinfo whose NAR turns out to be another one is hot no longer, and is asked for again."""
    url = await proxy.nar_url(UNASKED.hash_part)
    async with Lane(proxy) as lane:
        assert (await lane.ask(UNASKED.narinfo_path))[1]
        rule = cache.fault("/nar/*", Corrupt(10))
        assert (await lane.ask(url))[0].code == 404
        assert proxy.observed(Rejected)
        rule.lift()
        asked = cache.gets(UNASKED.narinfo_path)
        answer, took_it = await lane.ask(UNASKED.narinfo_path)
        assert (answer.code, took_it) == (200, False)
        assert cache.gets(UNASKED.narinfo_path) == asked + 1


async def test_a_narinfo_that_led_nowhere(proxy: InsideProxy, cache: BinaryCacheSimulator) -> None:
    """A narinfo whose NAR the upstream has lost is hot no longer."""
    url = await proxy.nar_url(UNASKED.hash_part)
    async with Lane(proxy) as lane:
        assert (await lane.ask(UNASKED.narinfo_path))[1]
        cache.withdraw(UNASKED)
        assert (await lane.ask(url))[0].code == 404
        answer, took_it = await lane.ask(UNASKED.narinfo_path)
    assert (answer.code, took_it) == (404, False)


async def test_keys_that_are_trusted_no_more(
    proxy: InsideProxy, cache: BinaryCacheSimulator
) -> None:
    """With another configuration in force, nothing is answered that was concluded from the old one."""
    async with Lane(proxy) as lane:
        assert (await lane.ask(NARINFO))[1]
        old = proxy.failover
        stranger = InsideProxy(proxy.folder, cache.url, keys=[SigningKey("other-1").public])
        stranger.events = proxy.events
        proxy.failover = stranger.make_failover(cache.url)
        proxy.cache.use(proxy.failover, negative_ttl=60)
        answer, took_it = await lane.ask(NARINFO)
        assert (answer.code, took_it) == (404, False)
    await old.close()


async def test_another_configuration(proxy: InsideProxy, cache: BinaryCacheSimulator) -> None:
    """After a reload what the upstreams said is asked again, and what the store has is served."""
    async with Lane(proxy) as lane:
        for target in HOT:
            assert (await lane.ask(target))[1]
        old, proxy.failover = proxy.failover, proxy.make_failover(cache.url)
        cache.publish(MISSING)
        proxy.cache.use(proxy.failover, negative_ttl=60)
        answer, took_it = await lane.ask(ABSENT)
        assert (answer.code, took_it) == (200, False)
        answer, took_it = await lane.ask(NARINFO)
        assert (answer.code, took_it) == (200, True)
        answer, _ = await lane.ask(NAR)
        assert (answer.code, answer.body) == (200, bytes(SMALL.file))
    await old.close()


def test_an_upstream_that_is_renamed(daemon: RunDaemon, threaded_sim: RunSimulator) -> None:
    """After a reload no answer names an upstream that there is no more; both ways say the same."""
    table = f'[[upstream]]\nname = "%s"\nurl = "{threaded_sim(SMALL).url}"'
    proxy = daemon(config=table % "before")
    client = KeptAlive(proxy.url)
    for _ in range(4):
        client.get(NARINFO)
        assert client.get(NAR) == bytes(SMALL.file)
        proxy.wait_for_log("stored")
    proxy.configure(upstreams=(), keys=[KEY.public], config=table % "after")
    proxy.signal(signal.SIGHUP)
    proxy.wait_for_log("the configuration was read again and is in force")
    for target in (NARINFO, NAR):
        for _ in range(3):
            client.get(target)
            hot = client.headers
            client.get(target, {"Authorization": "Basic eDp5"})
            assert hot == client.headers
            assert (
                hot.get("X-Upstream") == "before"
            )  # where it came from, though nobody has that name now
    client.close()


async def test_a_nar_that_is_removed(proxy: InsideProxy) -> None:
    """A NAR that somebody has removed from the store is answered all the same, and right."""
    async with Lane(proxy) as lane:
        (proxy.folder / NAR[1:]).unlink()
        (proxy.folder / f"{SMALL.hash_part}.narinfo").unlink()
        for _ in range(3):
            answer, _ = await lane.ask(NAR)
            assert (answer.code, answer.body) == (200, bytes(SMALL.file))
        assert (await the_long_way(proxy, NAR)).body == bytes(SMALL.file)
        await proxy.idle()
        for _ in range(3):
            assert (await lane.ask(NAR))[0].body == bytes(SMALL.file)


async def test_nars_that_are_evicted(
    sim: StartSimulator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The URL of a NAR that was hot is answered, and right, when the NAR was evicted to make room."""
    monkeypatch.setattr(room, "overhead", lambda _layout: 0)
    entries = [
        StoreEntry.make(f"evicted-{n}", random.Random(n).randbytes(60_000), compression="none")
        for n in range(12)
    ]
    cache = await sim(*entries)
    limits = Limits(max_size=500_000)
    async with InsideProxy(tmp_path, cache.url, keys=[KEY.public], limits=limits) as proxy:
        await warm(proxy, *entries)
        await proxy.until(lambda: len(proxy.observed(Evicted)) >= 4)
        async with Lane(proxy) as lane:
            for entry in entries:
                answer, _ = await lane.ask(nar_url(entry))
                assert (answer.code, answer.body) == (200, bytes(entry.file))
                assert (await the_long_way(proxy, nar_url(entry))).body == bytes(entry.file)
                assert (await lane.ask(entry.narinfo_path))[0].code == 200
        await proxy.idle()


async def test_a_hot_nar_can_be_evicted(proxy: InsideProxy) -> None:
    """A NAR that is kept open to be at hand is not being read."""
    async with Lane(proxy) as lane:
        assert (await lane.ask(NAR))[1]
        assert not in_use(proxy.folder / NAR[1:])


async def test_a_hot_narinfo_counts_as_use(proxy: InsideProxy) -> None:
    """Who asks for a narinfo uses its path, also where the answer comes from memory."""
    await used_long_ago(proxy)
    async with Lane(proxy) as lane:
        assert (await lane.ask(SMALL.narinfo_path))[1]
    proxy.server.lane.flush()

    assert await noted_use(proxy, NAR[1:]) > LONG_AGO


async def test_a_narinfo_given_the_long_way_counts_as_use(proxy: InsideProxy) -> None:
    """Who asks for a narinfo in a way that only aiohttp understands uses its path, too."""
    await used_long_ago(proxy)
    assert (await the_long_way(proxy, SMALL.narinfo_path)).code == 200
    proxy.server.lane.flush()

    assert await noted_use(proxy, NAR[1:]) > LONG_AGO


LONG_AGO = 1_000


async def used_long_ago(proxy: InsideProxy) -> None:
    """Let the index believe that nothing was used for decades."""
    proxy.server.lane.flush()

    def forget(database: Database) -> None:
        database._connection.execute("UPDATE used SET at = ?", (LONG_AGO,))

    await asyncio.wrap_future(proxy.store.index.ask(forget))


async def noted_use(proxy: InsideProxy, name: str) -> int:
    """Return when a file was used last, as the index has it."""
    await asyncio.wrap_future(proxy.store.index.ask(lambda _database: None))  # notes before that
    candidates = await asyncio.wrap_future(proxy.store.index.ask(lambda each: each.oldest(100)))
    return next(each.used for each in candidates if each.name == name)


async def test_a_nar_that_is_cut_short(proxy: InsideProxy) -> None:
    """A NAR that somebody has cut short is answered from memory or fetched afresh, and never short."""
    async with Lane(proxy) as lane:
        assert (await lane.ask(NAR))[1]
        for size in (1_000, 0):
            os.truncate(proxy.folder / NAR[1:], size)
            answer, took_it = await lane.ask(NAR)
            assert (answer.body, took_it) == (bytes(SMALL.file), True)
            proxy.server.lane.forget_nars()
            answer, took_it = await lane.ask(NAR)
            assert (answer.body, took_it) == (bytes(SMALL.file), False)
            assert b"Content-Length: %d" % len(answer.body) in answer.headers
            await proxy.idle()
            for _ in range(2):
                assert (await lane.ask(NAR))[0].body == bytes(SMALL.file)
    assert not proxy.observed(Fault)


async def test_a_nar_that_was_removed_for_a_reason(
    proxy: InsideProxy, cache: BinaryCacheSimulator
) -> None:
    """What is removed from the store is not answered from memory for longer than until the next account."""
    async with Lane(proxy) as lane:
        assert (await lane.ask(NAR))[1]
        (proxy.folder / NAR[1:]).unlink()
        assert (await lane.ask(NAR))[1]  # and an account is given
        asked = cache.gets("/nar/*")
        answer, took_it = await lane.ask(NAR)
        assert (answer.body, took_it) == (bytes(SMALL.file), False)
        assert cache.gets("/nar/*") == asked + 1
        await proxy.idle()


@pytest.mark.parametrize("error", [errno.EIO, errno.EAGAIN])
async def test_a_disk_that_fails(
    proxy: InsideProxy, monkeypatch: pytest.MonkeyPatch, error: int
) -> None:
    """What cannot be read at once is not taken into memory, and is answered the long way."""

    def fail(fd: int, buffers: object, offset: int, flags: int = 0) -> int:
        raise OSError(error, os.strerror(error))

    async with Lane(proxy) as lane:
        right = await the_long_way(proxy, NAR)
        proxy.server.lane.forget_nars()
        with monkeypatch.context() as patch:
            patch.setattr(os, "preadv", fail)
            for _ in range(2):
                assert await lane.ask(NAR) == (right, False)
        assert await lane.ask(NAR) == (right, True)


async def test_a_file_system_that_cannot_tell(
    proxy: InsideProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the kernel does not say what is in memory, NARs are hot all the same."""
    real = os.preadv

    def preadv(fd: int, buffers: list[bytearray], offset: int, flags: int = 0) -> int:
        if flags:
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
        return real(fd, buffers, offset)

    async with Lane(proxy) as lane:
        right = await the_long_way(proxy, NAR)
        proxy.server.lane.forget_nars()
        monkeypatch.setattr(os, "preadv", preadv)
        assert await lane.ask(NAR) == (right, False)
        assert await lane.ask(NAR) == (right, True)


# --- memory -----------------------------------------------------------------------------------


async def test_memory(sim: StartSimulator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NARs are in memory up to so many bytes, each once, the ones used last; and none after the end."""
    monkeypatch.setattr(fastlane, "NAR_BYTES", 5_000)
    entries = [
        StoreEntry.make(f"many-{n}", random.Random(n).randbytes(900), compression="none")
        for n in range(10)
    ]
    async with hot_proxy(tmp_path, await sim(*entries)) as proxy:
        await warm(proxy, *entries)
        most = len(kept(proxy))
        assert most == len(set(kept(proxy))) in (3, 4)
        async with Lane(proxy) as lane:
            for _ in range(2):
                for entry in entries[-most:]:
                    assert (await lane.ask(nar_url(entry)))[1]
            for _ in range(3):
                for entry in entries:
                    assert (await lane.ask(nar_url(entry)))[0].body == bytes(entry.file)
                    assert len(kept(proxy)) == most
            for headers in ({"Range": "bytes=0-3"}, {"If-Range": '"x"'}):
                for _ in range(3):
                    await proxy.pull(nar_url(entries[5]), headers)
            await proxy.pull(nar_url(entries[5]), method="HEAD")
            assert len(kept(proxy)) == len(set(kept(proxy))) == most
    assert kept(proxy) == []


async def test_large_ones_are_not_in_memory(proxy: InsideProxy) -> None:
    """A NAR that is not small is not held in memory."""
    assert kept(proxy) == [NAR]


@pytest.mark.parametrize("headers", [{"Range": "bytes=0-3"}, {}])
async def test_what_was_not_sent_is_not_kept(proxy: InsideProxy, headers: dict[str, str]) -> None:
    """Only a NAR that was sent whole is taken into memory: of others the pages may be on the disk."""
    proxy.server.lane.forget_nars()
    await proxy.pull(NAR, headers, method="GET" if headers else "HEAD")
    assert kept(proxy) == []
    await proxy.pull(NAR)
    assert kept(proxy) == [NAR]


async def test_names_of_one_nar(proxy: InsideProxy) -> None:
    """However many names clients make up for a NAR, it is in memory once."""
    for number in range(10):
        await proxy.pull(f"{NAR}?{number}")
        await proxy.idle()
    assert kept(proxy) == [NAR]


def test_bounds() -> None:
    """What is in memory, and what is written in one turn of the event loop, is little."""
    assert NAR_BYTES <= 2**25
    assert SMALL_NAR <= 2**18


# --- what is told of it -----------------------------------------------------------------------


async def test_what_is_told(proxy: InsideProxy) -> None:
    """Everything is told once, in bulk, with bytes; and nothing when there is nothing to tell."""
    proxy.server.lane.flush()
    proxy.events.clear()
    async with Lane(proxy) as lane:
        client = lane._client
        counts = {NARINFO: 5, NAR: 3, ABSENT: 2}
        narinfo = await the_long_way(proxy, NARINFO)
        for target, count in counts.items():
            await client.ask(*[plain(target)] * count)
        proxy.server.lane.flush()
        proxy.server.lane.flush()
    assert sorted(map(repr, proxy.observed(FastlaneServed))) == sorted(
        map(
            repr,
            [
                FastlaneServed("narinfo", 200, "HIT", 5, 5 * len(narinfo.body)),
                FastlaneServed("nar", 200, "HIT", 3, 3 * len(SMALL.file)),
                FastlaneServed("narinfo", 404, "", 2, 0),
            ],
        )
    )
    routes = [event.route for event in proxy.observed(RequestServed)]
    assert sorted(routes) == ["health", "narinfo"]  # what taught it, and `the_long_way`


async def test_the_last_is_told(cache: BinaryCacheSimulator, tmp_path: Path) -> None:
    """What was answered just before the end is told, too."""
    async with hot_proxy(tmp_path, cache) as proxy:
        await heat(proxy)
        before = through_the_lane(proxy)
        async with Wire(proxy.url) as wire:
            for _ in range(8):
                assert (await wire.ask(NAR)).body == bytes(SMALL.file)
    assert sum(event.requests for event in proxy.observed(FastlaneServed)) == before + 7


def last_use(proxy: InsideProxy, target: str) -> int:
    """Return when a file was used, as the index of a proxy that has stopped says."""
    with contextlib.closing(sqlite3.connect(proxy.store.layout.index)) as connection:
        (at,) = connection.execute("SELECT at FROM used WHERE name = ?", (target[1:],)).fetchone()
    return int(at)


@pytest.mark.parametrize("used_later", [True, False])
async def test_use_is_noted(
    cache: BinaryCacheSimulator,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    used_later: bool,  # noqa: FBT001  # both ways
) -> None:
    """A use by the fast lane counts for eviction like any other, once; to be kept open is none."""
    later = int(time.time()) + 10_000
    async with hot_proxy(tmp_path, cache) as proxy:
        await heat(proxy)
        async with Lane(proxy) as lane:
            assert (await lane.ask(NAR))[1]  # and it is told at once
            clock = SimpleNamespace(time=lambda: later, monotonic=time.monotonic)
            monkeypatch.setattr(index, "time", clock)
            if used_later:
                assert (await lane.ask(NAR))[1]
            proxy.server.lane.flush()
    assert (last_use(proxy, NAR) == later) == used_later
    assert last_use(proxy, LARGE_NAR) < later


async def test_a_nar_that_is_gone_is_not_in_the_index(proxy: InsideProxy) -> None:
    """The use of a NAR that was removed meanwhile brings nothing back, and harms nothing."""
    async with Lane(proxy) as lane:
        (proxy.folder / NAR[1:]).unlink()
        await lane.ask(NAR)
        proxy.server.lane.flush()
        proxy.server.lane.flush()
    assert not proxy.observed(Fault)
    assert not (proxy.folder / NAR[1:]).exists()


# --- the daemon -------------------------------------------------------------------------------


class KeptAlive:
    """One connection to a daemon, which sends the same headers with every request."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        assert parts.hostname is not None
        self._connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=30)
        self.headers: dict[str, str] = {}
        """Those of the last answer, but for the date."""

    def get(self, target: str, headers: Mapping[str, str] | None = None) -> bytes:
        """Return the body of an answer, whatever its status."""
        self._connection.request("GET", target, headers=headers or {})
        answer = self._connection.getresponse()
        self.headers = {name: text for name, text in answer.headers.items() if name != "Date"}
        return answer.read()

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()


def served(lines: Sequence[dict[str, Any]], route: str) -> int:
    """Return how many requests of a route a log says that took the fast lane."""
    return sum(line["requests"] for line in lines if line["route"] == route)


def test_metrics(daemon: RunDaemon, threaded_sim: RunSimulator) -> None:
    """Every request is in the metrics once it was answered, whichever way it took; so are the bytes."""
    proxy = daemon(threaded_sim(SMALL).url)
    client = KeptAlive(proxy.url)
    narinfos, absences, nars = 40, 30, 20
    size = 0
    for _ in range(narinfos):
        size = len(client.get(NARINFO))
    for _ in range(absences):
        client.get(ABSENT)
    for _ in range(nars):
        assert client.get(NAR) == bytes(SMALL.file)
        proxy.wait_for_log("stored")
    client.close()
    for _ in range(2):  # to look changes nothing
        assert proxy.metric("requests_total", route="narinfo", code="200") == narinfos
        assert proxy.metric("requests_total", route="narinfo", code="404") == absences
        assert proxy.metric("requests_total", route="nar", code="200") == nars
        assert proxy.metric("requests_total", route="nar", method="GET") == nars
        total = proxy.metric("response_bytes_total")
        assert total == narinfos * size + nars * len(SMALL.file)
        assert proxy.metric("responses_cut_total") == 0
    proxy.stop()
    told = proxy.logged("requests")
    assert served(told, "narinfo") == narinfos - 1 + absences - 1
    assert nars - 2 <= served(told, "nar") < nars  # once as it arrives, and once as it is put away


@pytest.mark.parametrize("between", [None, LARGE_NAR, "/healthz", NARINFO])
def test_whatever_is_between(
    daemon: RunDaemon, threaded_sim: RunSimulator, between: str | None
) -> None:
    """On a connection, requests for a NAR of the store take the fast lane, whatever is between."""
    proxy = daemon(threaded_sim(SMALL, LARGE).url)
    warming = KeptAlive(proxy.url)
    for entry in (SMALL, LARGE):
        warming.get(entry.narinfo_path)
        warming.get(nar_url(entry))
    proxy.wait_for_log("stored", 2)
    client = KeptAlive(proxy.url)
    assert client.get(NAR) == bytes(SMALL.file)
    for _ in range(50):
        if between is not None:
            client.get(between)
        assert client.get(NAR) == bytes(SMALL.file)
    for each in (warming, client):
        each.close()
    proxy.stop()
    assert 50 <= served(proxy.logged("requests"), "nar") <= 51  # it may be put away at the first


async def test_a_target_that_leads_out_of_the_store(proxy: InsideProxy) -> None:
    """What is no hash part is no name of a file: nothing outside of the store is read, or taken away."""
    outside = proxy.folder.parent / "victim-12.narinfo"
    outside.write_bytes(b"not ours")
    target = "/../" + "./" * 10 + outside.name
    assert len(target) == len(NARINFO)
    async with Wire(proxy.url) as client:
        await client.ask(NARINFO)  # the lane knows these headers now
        assert (await client.ask(target)).status == 404
        assert (await client.ask("/" + "\0" * 32 + ".narinfo")).status == 400
    assert outside.read_bytes() == b"not ours"
    assert not list(proxy.folder.rglob("*victim*"))
    assert not proxy.observed(Fault)
