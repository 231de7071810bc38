"""The simulated cache is one that real Nix accepts, and its faults do what they say."""

from __future__ import annotations

import asyncio
import gzip
import hashlib
import json
import random
import socket
import time
import tracemalloc
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import zstandard
from multidict import CIMultiDictProxy
from yarl import URL

from tests.blobs import COMPRESSORS, Blob, compress
from tests.closures import SCHEMES, SigningKey, StoreEntry, closure, nar, nix32, sha256
from tests.conftest import RunSimulator, StartSimulator, require_tool
from tests.faults import (
    Body,
    Chunked,
    Corrupt,
    Cut,
    Delay,
    Encoded,
    Fault,
    Gate,
    Headers,
    Html,
    Longer,
    NoRanges,
    Redirect,
    Reset,
    ShortBody,
    Shorter,
    Slow,
    Stall,
    Status,
)
from tests.nix_client import Completed, NixClient
from tests.simulator import BinaryCacheSimulator, running

CONTENT = random.Random(1).randbytes(200_000)
PLAIN = StoreEntry.make("plain-1.0", CONTENT, compression="none")
FILE = bytes(PLAIN.file)


@dataclass(frozen=True)
class Received:
    """What a client got: the body as far as it came, and whether that was all."""

    status: int
    headers: CIMultiDictProxy[str]
    body: bytes
    complete: bool


class Client:
    """A plain HTTP client that changes nothing in what it asks and gets."""

    def __init__(self, session: aiohttp.ClientSession) -> None:
        self._session = session

    async def ask(self, url: str, method: str = "GET", **headers: str) -> Received:
        """Make one request; ``_`` in the name of a header stands for ``-``."""
        fields = {name.replace("_", "-"): value for name, value in headers.items()}
        target = URL(url, encoded=True)
        async with self._session.request(
            method, target, headers=fields, allow_redirects=False
        ) as response:
            body = bytearray()
            try:
                async for piece in response.content.iter_any():
                    body += piece
            except (aiohttp.ClientError, ConnectionError):
                return Received(response.status, response.headers, bytes(body), complete=False)
            return Received(response.status, response.headers, bytes(body), complete=True)


@pytest.fixture
async def client() -> AsyncIterator[Client]:
    """Return a plain HTTP client."""
    async with aiohttp.ClientSession(auto_decompress=False) as session:
        yield Client(session)


# --- against real Nix -------------------------------------------------------------------------


def _copy(nix: NixClient, url: str, path: str) -> Completed:
    return nix.copy_from(url, path)


def _realise(nix: NixClient, url: str, path: str) -> Completed:
    return nix.realise(path, substituters=[url])


@pytest.mark.parametrize("pull", [_copy, _realise])
def test_nix_pulls_a_closure(
    pull: Callable[[NixClient, str, str], Completed], nix: NixClient, threaded_sim: RunSimulator
) -> None:
    """Real Nix installs thirty signed paths of all compressions, each NAR fetched once."""
    entries = closure(30, seed=1)
    cache = threaded_sim(*entries)
    pulled = pull(nix, cache.url, entries[0].store_path)
    assert pulled.returncode == 0, pulled.stderr
    assert nix.installed() == {entry.base_name for entry in entries}
    assert nix.verify().returncode == 0
    assert all(nix.dump(entry.store_path) == bytes(entry.nar) for entry in entries)
    assert {entry.compression for entry in entries} >= {"xz", "zstd", "none", "bzip2", "br"}
    assert [cache.gets(entry.nar_path) for entry in entries] == [1] * 30


@pytest.mark.parametrize("scheme", sorted(SCHEMES.keys() - {"rooted"}))  # Nix 2.32 and later only
def test_nix_understands_the_url_schemes(
    scheme: str, nix: NixClient, threaded_sim: RunSimulator
) -> None:
    """Real Nix finds the NAR at whatever URL the narinfo says, below a prefix too."""
    entry = StoreEntry.make("named-1.0", CONTENT, scheme=scheme)
    cache = threaded_sim(entry, prefix="/some/cache")
    copied = nix.copy_from(cache.url, entry.store_path)
    assert copied.returncode == 0, copied.stderr
    assert cache.gets(entry.nar_path) == 1


@pytest.mark.parametrize("compression", ["xz", "bzip2", "gzip", "zstd", "lz4"])
def test_nix_reads_several_streams(
    compression: str, nix: NixClient, threaded_sim: RunSimulator
) -> None:
    """A file of several frames, streams or members is one NAR to real Nix."""
    entry = StoreEntry.make("frames-1.0", CONTENT, compression=compression, streams=3)
    copied = nix.copy_from(threaded_sim(entry).url, entry.store_path)
    assert copied.returncode == 0, copied.stderr


LIES: list[tuple[dict[str, Any], str]] = [
    ({"signers": (SigningKey("somebody-else-1"),)}, "lacks a valid signature"),
    ({"fields": {"NarSize": "17"}}, "lacks a valid signature"),
    ({"served": compress(nar(CONTENT[::-1]), "xz")}, "hash mismatch"),
    ({"tamper": lambda text: text.rstrip(b"\n")}, "is corrupt"),
]


@pytest.mark.parametrize(("lie", "complaint"), LIES)
def test_nix_sees_through_lies(
    lie: dict[str, Any], complaint: str, nix: NixClient, threaded_sim: RunSimulator
) -> None:
    """What the simulator lies about is a lie to real Nix, too."""
    entry = StoreEntry.make("lie-1.0", CONTENT)
    cache = threaded_sim(entry.but(**lie))
    copied = nix.copy_from(cache.url, entry.store_path)
    assert copied.returncode != 0
    assert complaint in copied.stderr
    assert nix.installed() == set()


def test_nix_resumes_after_a_cut(nix: NixClient, threaded_sim: RunSimulator) -> None:
    """A NAR that was cut once is resumed by a Range request and arrives whole."""
    cache = threaded_sim(PLAIN)
    cache.fault("/nar/", Cut(100_000), times=1)
    copied = nix.copy_from(cache.url, PLAIN.store_path)
    assert copied.returncode == 0, copied.stderr
    ranges = [r.headers.get("Range") for r in cache.requests if r.raw_path == PLAIN.nar_path]
    assert ranges == [None, "bytes=100000-"]


def test_nix_remembers_narinfos_until_it_forgets(
    nix: NixClient, threaded_sim: RunSimulator
) -> None:
    """The driver shows what Nix knows of a path, and can make it ask again."""
    cache = threaded_sim(PLAIN)
    for _ in range(2):
        known = json.loads(nix.path_info(PLAIN.store_path, store=cache.url).stdout)
        assert known[0]["narSize"] == len(PLAIN.nar)
    assert cache.gets("*.narinfo") == 1
    nix.forget()
    nix.path_info(PLAIN.store_path, store=cache.url)
    assert cache.gets("*.narinfo") == 2


def test_nix_uploads_what_it_pulled(
    nix: NixClient, threaded_sim: RunSimulator, tmp_path: Path
) -> None:
    """What one client copied into a folder another store takes from there."""
    entries = closure(5, depth=3, seed=2)
    folder, other = f"file://{tmp_path}/cache", tmp_path / "other"
    root = entries[0].store_path
    for copied in (
        nix.copy_from(threaded_sim(*entries).url, root),
        nix.copy_to(folder, root),
        nix.copy_from(folder, root, to=other),
    ):
        assert copied.returncode == 0, copied.stderr
    assert len(list(other.glob("nix/store/*-*"))) == 5


# --- the oracle -------------------------------------------------------------------------------


def test_known_hashes() -> None:
    """nix32 and NAR agree with what Nix printed once."""
    assert nix32(sha256(b"")) == "0mdqa9w1p6cmli6976v4wi0sw9r4p5prkj7lzfd1877wk11c9c73"
    hello = nar(b"hello\n")
    assert len(hello) == 120
    assert nix32(sha256(hello)) == "04zwf782yjwnh3q6hz5izfd6jyip8kgw6g6yj43fiqhbyhdd0dqw"


@pytest.mark.parametrize(("n", "depth"), [(1, 1), (2, 2), (30, 4), (12, 12), (200, 6)])
def test_closure_shape(n: int, depth: int) -> None:
    """The root reaches everything, references only point onwards, the depth is as asked for."""
    entries = closure(n, depth=depth, seed=n, sizes=(10, 100))
    depths: dict[str, int] = {}
    for entry in reversed(entries):
        wanted = [depths[name] for name in entry.references if name != entry.base_name]
        depths[entry.base_name] = 1 + max(wanted, default=0)
    reached, waiting = set[str](), {entries[0].base_name}
    by_name = {entry.base_name: entry for entry in entries}
    while waiting:
        reached |= waiting
        waiting = {name for at in waiting for name in by_name[at].references} - reached
    assert depths[entries[0].base_name] == depth
    assert reached == set(by_name)
    assert len(by_name) == n


def test_closure_is_determined_by_its_seed(key: SigningKey) -> None:
    """The same seed gives the same narinfos and files, another seed gives others."""
    texts = [[entry.narinfo(key) for entry in closure(9, seed=seed)] for seed in (7, 7, 8)]
    assert texts[0] == texts[1]
    assert set(texts[0]).isdisjoint(texts[2])


def test_narinfo_lines_can_be_changed(key: SigningKey) -> None:
    """Lines are replaced, left out and added; several keys give several signatures."""
    entry = PLAIN.but(
        scheme="cachix",
        fields={"References": None, "FileSize": None, "Compression": "", "System": "x"},
        extra=("Sig: garbage",),
    )
    lines = entry.narinfo(key, SigningKey("other-1")).decode().splitlines()
    assert [line.partition(":")[0] for line in lines] == [
        *("StorePath", "URL", "Compression", "FileHash", "NarHash", "NarSize"),
        *("Sig", "Sig", "System", "Sig"),
    ]
    assert lines[1] == f"URL: nar/{hashlib.sha256(FILE).hexdigest()}.nar"
    assert lines[3] == f"FileHash: sha256:{hashlib.sha256(FILE).hexdigest()}"
    assert lines[2] == "Compression: "


def test_blobs_are_cut_like_bytes() -> None:
    """Every slice of repeated blocks is the slice of the bytes."""
    blob = Blob(((b"abc", 3), (b"defgh", 2), (b"x", 1)))
    whole = bytes(blob)
    assert whole == b"abcabcabcdefghdefghx"
    assert all(
        bytes(blob[start:stop]) == whole[start:stop]
        for start in range(-25, 25)
        for stop in range(-25, 25)
    )
    assert b"".join(blob.pieces(2)) == whole


async def test_huge_nars_need_no_memory(sim: StartSimulator) -> None:
    """A NAR of 256 MiB is made, hashed and sent with a few MiB; its hashes are right."""
    tracemalloc.start()
    try:
        entry = StoreEntry.huge("huge-1.0", 256 << 20, compression="zstd")
        cache = await sim(entry)
        size, file_hash, nar_hash = await _digest(cache.url + entry.nar_path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert size == len(entry.file) > 256 << 20
    assert (file_hash, nar_hash) == (entry.file_hash, entry.nar_hash)
    assert peak < 32 << 20


async def _digest(url: str) -> tuple[int, str, str]:
    """Download a zstd file of many frames: its size, its hash, the hash of its content."""
    packed, unpacked, size = hashlib.sha256(), hashlib.sha256(), 0
    decoder = zstandard.ZstdDecompressor().decompressobj(read_across_frames=True)
    async with aiohttp.ClientSession() as session, session.get(URL(url, encoded=True)) as response:
        async for piece in response.content.iter_any():
            packed.update(piece)
            unpacked.update(decoder.decompress(piece))
            size += len(piece)
    return size, nix32(packed.digest()), nix32(unpacked.digest())


# --- an honest cache --------------------------------------------------------------------------


async def test_serves_what_it_publishes(
    sim: StartSimulator, client: Client, key: SigningKey
) -> None:
    """Narinfo, NAR and nix-cache-info are there with their types, everything else is 404."""
    cache = await sim(PLAIN)
    info = await client.ask(f"{cache.url}/nix-cache-info")
    assert info.body == b"StoreDir: /nix/store\nWantMassQuery: 1\nPriority: 40\n"
    narinfo = await client.ask(cache.url + PLAIN.narinfo_path)
    assert narinfo.body == PLAIN.narinfo(key)
    assert narinfo.headers["Content-Type"] == "text/x-nix-narinfo"
    file = await client.ask(cache.url + PLAIN.nar_path)
    assert (file.status, file.body, file.complete) == (200, FILE, True)
    assert file.headers["Accept-Ranges"] == "bytes"
    assert (await client.ask(f"{cache.url}/{'0' * 32}.narinfo")).status == 404
    assert (await client.ask(cache.url + PLAIN.nar_path, "PUT")).status == 405


async def test_head_is_get_without_body(sim: StartSimulator, client: Client) -> None:
    """HEAD has the headers of GET and nothing else."""
    cache = await sim(PLAIN)
    got, head = [await client.ask(cache.url + PLAIN.nar_path, m) for m in ("GET", "HEAD")]
    assert head.body == b""
    assert {**head.headers, "Date": ""} == {**got.headers, "Date": ""}


async def test_paths_are_matched_raw(sim: StartSimulator, client: Client) -> None:
    """The query and the percent-encoding are part of the name."""
    entries = [PLAIN.but(scheme=scheme) for scheme in ("harmonia", "percent")]
    cache = await sim(*entries)
    cache.files["/realisations/sha256:00!out.doi"] = (b"{}", {"Content-Type": "application/json"})
    for entry in entries:
        assert (await client.ask(cache.url + entry.nar_path)).body == FILE
        without_query = entry.nar_path.partition("?")[0]
        assert (await client.ask(cache.url + without_query)).status == 404
    assert "%20b%2Bc+" in cache.requests[2].raw_path
    assert (await client.ask(f"{cache.url}/realisations/sha256:00!out.doi")).body == b"{}"
    assert (await client.ask(f"{cache.url}/realisations/sha256%3A00!out.doi")).status == 404


@pytest.mark.parametrize(
    ("wanted", "start", "stop"),
    [
        ("0-0", 0, 1),
        ("100-", 100, len(FILE)),
        ("-7", len(FILE) - 7, len(FILE)),
        ("5-999999999", 5, len(FILE)),
        ("3-9", 3, 10),
    ],
)
async def test_ranges(
    wanted: str, start: int, stop: int, sim: StartSimulator, client: Client
) -> None:
    """A range is answered by 206 with these bytes and the place they have in the file."""
    cache = await sim(PLAIN)
    part = await client.ask(cache.url + PLAIN.nar_path, Range=f"bytes={wanted}")
    assert (part.status, part.body) == (206, FILE[start:stop])
    assert part.headers["Content-Range"] == f"bytes {start}-{stop - 1}/{len(FILE)}"
    assert part.headers["ETag"] == f'"{PLAIN.file_hash}"'


async def test_conditions(sim: StartSimulator, client: Client) -> None:
    """If-Range decides about the range, If-None-Match about 304, the end about 416."""
    cache = await sim(PLAIN)
    url, etag = cache.url + PLAIN.nar_path, f'"{PLAIN.file_hash}"'
    assert (await client.ask(url, Range="bytes=1-", If_Range=etag)).status == 206
    assert (await client.ask(url, Range="bytes=1-", If_Range='"x"')).body == FILE
    assert (await client.ask(url, If_None_Match=etag)).status == 304
    beyond = await client.ask(url, Range=f"bytes={len(FILE)}-")
    assert (beyond.status, beyond.headers["Content-Range"]) == (416, f"bytes */{len(FILE)}")


# --- faults -----------------------------------------------------------------------------------

ANSWERS: list[tuple[Fault, int, bytes]] = [
    (Status(503), 503, b"fault\n"),
    (Status(429, b"", {"Retry-After": "60"}), 429, b""),
    (Html(), 200, Html().body),
    (Body(b"other"), 200, b"other"),
    (Corrupt(0), 200, b"\xf2" + FILE[1:]),
    (Corrupt(-1), 200, FILE[:-1] + b"\xff"),
    (Shorter(5), 200, FILE[:-5]),
    (Longer(5), 200, FILE + bytes(5)),
    (Longer(5000), 200, FILE + bytes(5000)),
    (Chunked(), 200, FILE),
    (Encoded("identity"), 200, FILE),
]


@pytest.mark.parametrize(("fault", "status", "body"), ANSWERS)
async def test_wrong_answers(
    fault: Fault, status: int, body: bytes, sim: StartSimulator, client: Client
) -> None:
    """A wrong answer is a complete one, framed correctly."""
    cache = await sim(PLAIN)
    cache.fault("/nar/", fault)
    got = await client.ask(cache.url + PLAIN.nar_path)
    assert (got.status, got.body, got.complete) == (status, body, True)
    assert got.headers.get("Content-Length") == (
        None if isinstance(fault, Chunked) else str(len(body))
    )


async def test_headers_and_redirects(sim: StartSimulator, client: Client) -> None:
    """Headers are set and taken away; a redirect says where; an encoding says which."""
    cache = await sim(PLAIN)
    url = cache.url + PLAIN.nar_path
    cache.fault("/nar/", Redirect(lambda r: f"http://else.example{r.raw_path}", 307), times=1)
    cache.fault("/nar/", Headers({"ETag": '"x"', "Content-Type": None}), times=1)
    cache.fault("/nar/", Encoded("gzip"), times=1)
    redirect = await client.ask(url)
    assert (redirect.status, redirect.body) == (307, b"")
    assert redirect.headers["Location"] == f"http://else.example{PLAIN.nar_path}"
    assert (await client.ask(url)).headers["ETag"] == '"x"'
    encoded = await client.ask(url)
    assert encoded.headers["Content-Encoding"] == "gzip"
    assert gzip.decompress(encoded.body) == FILE


@pytest.mark.parametrize("coding", ["br", "gzip", "zstd", "deflate", "xz", "bzip2"])
async def test_content_codings(coding: str, sim: StartSimulator, client: Client) -> None:
    """Every coding that Nix ever asked for can be answered."""
    cache = await sim(PLAIN)
    cache.fault("*.narinfo", Encoded(coding))
    got = await client.ask(cache.url + PLAIN.narinfo_path)
    assert got.headers["Content-Encoding"] == coding
    assert got.body == COMPRESSORS[coding](bytes(cache.files[PLAIN.narinfo_path][0]))


BROKEN: list[tuple[tuple[Fault, ...], int]] = [
    ((Cut(70_001),), 70_001),
    ((Chunked(), Cut(70_001)), 70_001),
    ((Cut(0),), 0),
    ((ShortBody(11),), len(FILE) - 11),
    ((Slow(1e9), Cut(3000)), 3000),
]


@pytest.mark.parametrize(("faults", "arrives"), BROKEN)
async def test_broken_transfers(
    faults: tuple[Fault, ...], arrives: int, sim: StartSimulator, client: Client
) -> None:
    """Exactly so many bytes arrive, and the client can tell that it is not all."""
    cache = await sim(PLAIN)
    cache.fault("/nar/", *faults)
    got = await client.ask(cache.url + PLAIN.nar_path)
    assert (got.status, got.complete) == (200, False)
    assert got.body == FILE[:arrives]


async def test_a_cut_counts_from_the_start_of_the_range(
    sim: StartSimulator, client: Client
) -> None:
    """Offsets of cuts and stalls are bytes sent, not places in the file."""
    cache = await sim(PLAIN)
    cache.fault("/nar/", Cut(10))
    got = await client.ask(cache.url + PLAIN.nar_path, Range="bytes=100-")
    assert (got.status, got.body) == (206, FILE[100:110])


@pytest.mark.parametrize("fault", [Reset(), Cut(50_000, reset=True)])
async def test_resets(fault: Fault, sim: StartSimulator) -> None:
    """A reset is an RST: the client's socket says so."""
    cache = await sim(PLAIN)
    cache.fault("*", fault)
    reader, writer = await asyncio.open_connection("127.0.0.1", cache.port)
    writer.write(f"GET {PLAIN.nar_path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
    with pytest.raises(ConnectionResetError):
        await reader.read(-1)
    writer.close()


async def test_no_ranges(sim: StartSimulator, client: Client) -> None:
    """A server without ranges says nothing about them and sends all."""
    cache = await sim(PLAIN)
    cache.fault("/nar/", NoRanges())
    got = await client.ask(cache.url + PLAIN.nar_path, Range="bytes=5-")
    assert (got.status, got.body) == (200, FILE)
    assert "Accept-Ranges" not in got.headers


async def test_stall(sim: StartSimulator) -> None:
    """So many bytes arrive, then nothing, until the stall is opened."""
    cache, stall = await sim(PLAIN), Stall(after=50_000)
    cache.fault("/nar/", stall)
    url = cache.url + PLAIN.nar_path
    async with aiohttp.ClientSession() as session, session.get(url) as response:
        assert await response.content.readexactly(50_000) == FILE[:50_000]
        await stall.reached.wait()
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(response.content.readany(), 0.05)
        stall.open()
        assert await response.read() == FILE[50_000:]


async def test_gate_before_the_headers(sim: StartSimulator, client: Client) -> None:
    """All who ask wait in front of a gate, and all get through once its event is set."""
    cache, event = await sim(PLAIN), asyncio.Event()
    gate = Gate(after=None, event=event)
    cache.fault("/nar/", gate)
    everyone = cache.expect("/nar/", count=3)
    asking = [asyncio.create_task(client.ask(cache.url + PLAIN.nar_path)) for _ in range(3)]
    await everyone.wait()
    await gate.reached.wait()
    assert not any(task.done() for task in asking)
    event.set()
    assert [got.body for got in await asyncio.gather(*asking)] == [FILE] * 3
    assert (gate.arrivals, cache.max_concurrent) == (3, 3)


async def test_closing_ends_a_stall(client: Client, key: SigningKey) -> None:
    """A stalled transfer does not keep the simulator from closing."""
    stall = Stall(after=10)
    async with BinaryCacheSimulator([PLAIN], key=key) as cache:
        cache.fault("/nar/", stall)
        asking = asyncio.create_task(client.ask(cache.url + PLAIN.nar_path))
        await stall.reached.wait()
    got = await asking
    assert (got.body[:10], got.complete) == (FILE[: len(got.body)], False)


async def test_a_client_that_leaves_ends_its_stall(sim: StartSimulator, client: Client) -> None:
    """The simulator notices that nobody reads any more."""
    cache, stall = await sim(PLAIN), Stall(after=10)
    cache.fault("/nar/", stall, times=1)
    url = cache.url + PLAIN.nar_path
    async with aiohttp.ClientSession() as session, session.get(url):
        await stall.reached.wait()
    assert (await client.ask(url)).body == FILE
    assert (cache.count("/nar/"), cache.max_concurrent) == (2, 1)


async def test_slow_and_late(sim: StartSimulator, client: Client) -> None:
    """A delay and a pace take at least the time they say."""
    cache = await sim(PLAIN)
    cache.fault("/nar/", Delay(0.1), Slow(bytes_per_second=1_000_000, chunk=10_000))
    began = time.monotonic()
    got = await client.ask(cache.url + PLAIN.nar_path)
    assert got.body == FILE
    assert time.monotonic() - began >= 0.1 + len(FILE) / 1_000_000


async def test_faults_are_a_script(sim: StartSimulator, client: Client) -> None:
    """The oldest rule that still applies wins, each for its number of times."""
    cache = await sim(PLAIN)
    url = cache.url + PLAIN.narinfo_path
    twice = cache.fault("*.narinfo", Status(503), times=2)
    cache.fault("*.narinfo", Status(500), times=1)
    forever = cache.fault(lambda request: request.method == "GET", Status(418))
    assert [(await client.ask(url)).status for _ in range(5)] == [503, 503, 500, 418, 418]
    assert (twice.hits, forever.hits) == (2, 2)
    forever.lift()
    assert (await client.ask(url)).status == 200
    cache.fault("/nar/", Status(500))
    cache.heal()
    assert (await client.ask(cache.url + PLAIN.nar_path)).status == 200


async def test_down_and_up(sim: StartSimulator, client: Client) -> None:
    """Down is connection refused and open transfers reset; up is the same port again."""
    cache, stall = await sim(PLAIN), Stall(after=0)
    cache.fault("/nar/", stall, times=1)
    asking = asyncio.create_task(client.ask(cache.url + PLAIN.nar_path))
    await stall.reached.wait()
    cache.down()
    assert not (await asking).complete
    with pytest.raises(aiohttp.ClientConnectorError):
        await client.ask(cache.url + PLAIN.nar_path)
    cache.up()
    assert (await client.ask(cache.url + PLAIN.nar_path)).body == FILE


def test_in_a_thread(threaded_sim: RunSimulator) -> None:
    """From another thread it is commanded just the same."""
    cache, stall = threaded_sim(PLAIN), Stall(after=None)
    cache.fault("*", stall, times=1)
    with socket.create_connection(("127.0.0.1", cache.port), timeout=10) as connection:
        connection.sendall(b"GET /nix-cache-info HTTP/1.1\r\nHost: x\r\n\r\n")
        stall.reached.block()
        stall.open()
        assert connection.recv(100).startswith(b"HTTP/1.1 200")
        cache.expect("/nix-cache-info").block()
        cache.down()
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", cache.port), timeout=10)
        cache.up()
        socket.create_connection(("127.0.0.1", cache.port), timeout=10).close()


def test_a_thread_that_cannot_start_says_why(threaded_sim: RunSimulator, key: SigningKey) -> None:
    """What keeps the simulator from listening is raised where it was started."""
    cache = BinaryCacheSimulator(key=key)
    taken = threaded_sim()
    cache.port = 1 << 17
    with pytest.raises(OverflowError), running(cache):
        pass
    assert taken.count() == 0


async def test_auth(sim: StartSimulator, client: Client) -> None:
    """Only the right Authorization is let in, and it is seen in the log."""
    cache = await sim(PLAIN)
    cache.require_auth = "Bearer secret"
    url = cache.url + PLAIN.narinfo_path
    assert (await client.ask(url)).status == 401
    assert (await client.ask(url, Authorization="Bearer wrong")).status == 401
    assert (await client.ask(url, Authorization="Bearer secret")).status == 200
    seen = [request.headers.get("authorization") for request in cache.requests]
    assert seen == [None, "Bearer wrong", "Bearer secret"]


async def test_counts(sim: StartSimulator, client: Client) -> None:
    """Requests are counted by path, glob, folder, predicate and method."""
    cache = await sim(PLAIN)
    for path, method in ((PLAIN.nar_path, "GET"), (PLAIN.narinfo_path, "HEAD"), ("/nope", "GET")):
        await client.ask(cache.url + path, method)
    patterns = ("*", "/nar/", "*.narinfo", PLAIN.nar_path, lambda r: r.method == "HEAD", "/no")
    assert [cache.count(pattern) for pattern in patterns] == [3, 1, 1, 1, 1, 0]
    assert (cache.gets("*"), cache.count("*", "HEAD"), cache.accepted) == (2, 1, 1)
    assert cache.expect("/nar/").is_set()
    cache.reset_counts()
    assert (cache.count(), cache.max_concurrent, cache.requests) == (0, 0, [])


async def test_withdrawn_paths_are_gone(sim: StartSimulator, client: Client) -> None:
    """Paths can be published and withdrawn while it runs."""
    cache = await sim()
    statuses = []
    for change in (cache.publish, cache.withdraw):
        change(PLAIN)
        statuses.append((await client.ask(cache.url + PLAIN.narinfo_path)).status)
    assert statuses == [200, 404]


# --- tools that may be missing ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("ci", "outcome"), [("", pytest.skip.Exception), ("true", pytest.fail.Exception)]
)
def test_missing_tools_skip_but_fail_in_ci(
    ci: str, outcome: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine may lack a program, CI may not; what is missing is named."""
    monkeypatch.setenv("CI", ci)
    require_tool("sh")
    with pytest.raises(outcome, match="no-such-program"):
        require_tool("sh", "no-such-program")
