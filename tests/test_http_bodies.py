"""Bodies as they go over the wire: whole, in part, while they arrive, and to clients that dawdle."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Protocol

import pytest

from proxy.events import RequestServed
from proxy.server import body, listening
from tests.blobs import Blob
from tests.closures import COMPRESSIONS, SigningKey, StoreEntry
from tests.conftest import StartSimulator
from tests.faults import Chunked, Encoded, Gate
from tests.inside import InsideProxy
from tests.simulator import BinaryCacheSimulator
from tests.wire import Answer, Wire, until

CONTENT = random.Random("bodies").randbytes(1_000_000)
ENTRY = StoreEntry.make("hello-2.12.1", CONTENT, compression="none")
FILE = bytes(ENTRY.file)
SIZE = len(FILE)
SMALL = StoreEntry.make("small-1.0", b"small\n")
UNSIZED = ENTRY.but(fields={"FileHash": None, "FileSize": None})
"""What nix-serve publishes: nobody but the upstream's answer knows how many bytes will come."""

EVERY_CODING = "Accept-Encoding: zstd, br, gzip, deflate, bzip2, xz"
"""What Nix 2.14 to 2.33 sends with every request."""


def url_of(entry: StoreEntry) -> str:
    """Return the path under which the proxy serves the NAR."""
    extension = entry.url("").partition(".nar")[2]
    return f"/nar/{entry.hash_part}-{entry.nar_hash}.nar{extension}"


URL = url_of(ENTRY)


class StartProxy(Protocol):
    """Start a proxy on the test's one store folder, after stopping the one before."""

    async def __call__(self, *upstreams: BinaryCacheSimulator) -> InsideProxy:
        """Ask these upstreams."""
        ...


@pytest.fixture
async def start_proxy(
    tmp_path: Path, key: SigningKey, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[StartProxy]:
    """Return a function that starts the proxy, and starts it again."""
    monkeypatch.setattr(listening, "LINGER", 0)  # no request is on its way when a test ends
    async with AsyncExitStack() as running:

        async def start(*upstreams: BinaryCacheSimulator) -> InsideProxy:
            await running.aclose()
            urls = [upstream.url for upstream in upstreams]
            proxy = InsideProxy(tmp_path / "store", *urls, keys=[key.public])
            return await running.enter_async_context(proxy)

        yield start


async def stored(proxy: InsideProxy, target: str = URL) -> None:
    """Fetch a NAR, and wait until it is in the store."""
    assert (await proxy.get(target))[0] == 200
    await until(lambda: proxy.cache.fetches_in_flight == 0)


async def ask(proxy: InsideProxy, target: str, *headers: str, method: str = "GET") -> Answer:
    """Make one request on a connection of its own."""
    async with Wire(proxy.url) as wire:
        return await wire.ask(target, *headers, method=method)


def assert_whole(answer: Answer, expected: bytes = FILE) -> None:
    """The answer is the whole file, and says so."""
    assert answer.status == 200
    assert answer.headers["content-length"] == str(len(expected))
    assert answer.headers["accept-ranges"] == "bytes"
    assert "content-range" not in answer.headers
    assert_bytes(answer, expected)


def assert_part(answer: Answer, start: int, stop: int) -> None:
    """The answer is these bytes of the file, and says so."""
    assert answer.status == 206
    assert answer.headers["content-range"] == f"bytes {start}-{stop - 1}/{SIZE}"
    assert answer.headers["content-length"] == str(stop - start)
    assert answer.headers["accept-ranges"] == "bytes"
    assert_bytes(answer, FILE[start:stop])


def assert_bytes(answer: Answer, expected: bytes) -> None:
    """The body is complete and right; a difference of a megabyte is not printed."""
    assert answer.complete
    assert len(answer.body) == len(expected)
    assert (answer.body == expected) is True


# --- whole bodies and codings -------------------------------------------------------------------


@pytest.mark.parametrize("compression", COMPRESSIONS)
async def test_nars_are_never_encoded(
    sim: StartSimulator, start_proxy: StartProxy, compression: str
) -> None:
    """Whatever codings a client takes, a NAR comes as the upstream has it, with its size."""
    entry = ENTRY.but(compression=compression)
    proxy = await start_proxy(await sim(entry))
    answers = [await ask(proxy, url_of(entry), EVERY_CODING) for _ in range(2)]
    await until(lambda: proxy.cache.fetches_in_flight == 0)
    answers.append(await ask(proxy, url_of(entry), EVERY_CODING))
    for answer in answers:
        assert_whole(answer, bytes(entry.file))
        assert answer.headers["content-type"] == "application/x-nix-nar"
        assert "content-encoding" not in answer.headers
        assert "transfer-encoding" not in answer.headers


SIDE_FILES = {
    f"/{ENTRY.hash_part}.ls": b'{"root":{"type":"regular"},"version":1}' * 50,
    f"/log/{ENTRY.hash_part}-hello.drv": b"building\n" * 500,
    f"/realisations/sha256:{'0' * 64}!out.doi": b'{"outPath":"x"}',
    f"/build-trace-v2/{ENTRY.hash_part}-hello.drv/out.doi": b'{"outPath":"x"}',
    f"/debuginfo/{'0' * 40}": b'{"archive":"../nar/x.nar.xz"}',
}


@pytest.mark.parametrize("coding", ["identity", "gzip", "br", "zstd"])
async def test_nothing_is_ever_encoded(
    sim: StartSimulator, start_proxy: StartProxy, coding: str
) -> None:
    """What an upstream encodes is served decoded, to everybody alike, without Content-Encoding."""
    cache = await sim(ENTRY)
    cache.files |= {path: (content, {}) for path, content in SIDE_FILES.items()}
    cache.fault(lambda request: not request.raw_path.startswith("/nar/"), Encoded(coding))
    proxy = await start_proxy(cache)
    ours = ("/", "/healthz", "/readyz", "/metrics", "/nix-cache-info", "/nowhere", "/x.narinfo")
    narinfo = ENTRY.narinfo_path
    for target in (*ours, narinfo, *SIDE_FILES, "/nar/absent.nar"):
        plain = await ask(proxy, target)
        encoded = await ask(proxy, target, EVERY_CODING)
        assert "content-encoding" not in {**plain.headers, **encoded.headers}
        assert plain.status == encoded.status
        if plain.status == 200:
            assert plain.body == encoded.body
        if target in SIDE_FILES:
            assert plain.body == SIDE_FILES[target]
    assert (await ask(proxy, narinfo, EVERY_CODING)).body.startswith(b"StorePath: /nix/store/")


@pytest.mark.parametrize("coding", ["gzip", "br", "zstd", "xz", "identity"])
async def test_encoded_nar_of_an_upstream(
    sim: StartSimulator, start_proxy: StartProxy, coding: str
) -> None:
    """A NAR that an upstream encodes on top is refused; ``identity``, which encodes nothing, is not."""
    cache = await sim(ENTRY)
    cache.fault("/nar/", Encoded(coding))
    proxy = await start_proxy(cache)
    answer = await ask(proxy, URL, EVERY_CODING)
    assert "content-encoding" not in answer.headers
    if coding == "identity":
        assert_whole(answer)
    else:
        assert answer.status == 404


async def test_foreign_nar(sim: StartSimulator, start_proxy: StartProxy) -> None:
    """A NAR under an upstream's own name is passed on byte for byte, in whole and in part."""
    proxy = await start_proxy(await sim(ENTRY))
    assert_whole(await ask(proxy, ENTRY.nar_path, EVERY_CODING))
    assert_part(await ask(proxy, ENTRY.nar_path, "Range: bytes=5-99"), 5, 100)
    assert_whole(await ask(proxy, ENTRY.nar_path, "Range: bytes=5-99", 'If-Range: "x"'))


# --- ranges -------------------------------------------------------------------------------------

RANGES = {
    "first byte": ("0-0", 0, 1),
    "beginning": ("0-99", 0, 100),
    "middle": ("1000-499999", 1_000, 500_000),
    "resumed": ("700000-", 700_000, SIZE),
    "all": ("0-", 0, SIZE),
    "last byte": (f"{SIZE - 1}-", SIZE - 1, SIZE),
    "beyond the end": ("999000-9999999", 999_000, SIZE),
    "suffix": ("-100", SIZE - 100, SIZE),
    "suffix of all": ("-99999999", 0, SIZE),
}


@pytest.mark.parametrize("part", RANGES.values(), ids=RANGES)
async def test_range_of_a_stored_nar(
    sim: StartSimulator, start_proxy: StartProxy, part: tuple[str, int, int]
) -> None:
    """A part of a NAR that is here is 206, exact to the byte, on a connection that goes on."""
    spec, start, stop = part
    proxy = await start_proxy(await sim(ENTRY))
    await stored(proxy)
    async with Wire(proxy.url) as wire:
        assert_part(await wire.ask(URL, f"Range: bytes={spec}", EVERY_CODING), start, stop)
        assert_whole(await wire.ask(URL))


@pytest.mark.parametrize("entry", [ENTRY, UNSIZED], ids=["FileSize", "no FileSize"])
@pytest.mark.parametrize("part", RANGES.values(), ids=RANGES)
async def test_range_of_an_arriving_nar(
    sim: StartSimulator, start_proxy: StartProxy, entry: StoreEntry, part: tuple[str, int, int]
) -> None:
    """A part of a NAR that is still arriving has the same headers and bytes as of one that is here."""
    spec, start, stop = part
    cache = await sim(entry)
    gate = Gate(after=600_000)
    cache.fault("/nar/", gate)
    proxy = await start_proxy(cache)
    async with Wire(proxy.url) as first, Wire(proxy.url) as second:
        await first.send(first.request(URL))
        await gate.reached.wait()
        await second.send(second.request(URL, f"Range: bytes={spec}"))
        head = await second.head()
        assert head.status == 206
        early = await second.some(
            max(0, min(stop - 1, 500_000) - start)
        )  # the rest has yet to come
        gate.open()
        late = await second.some(stop - start - len(early))
        assert_bytes(await first.answer(), FILE)
    assert head.headers["content-range"] == f"bytes {start}-{stop - 1}/{SIZE}"
    assert head.headers["content-length"] == str(stop - start)
    assert head.headers["accept-ranges"] == "bytes"
    assert (early + late == FILE[start:stop]) is True
    assert cache.gets("/nar/") == 1


async def test_range_of_an_arriving_nar_of_unknown_size(
    sim: StartSimulator, start_proxy: StartProxy
) -> None:
    """Where only the end of a transfer tells the size, a Range waits for it and is 206 all the same."""
    cache = await sim(UNSIZED)
    gate = Gate(after=600_000)
    cache.fault("/nar/", Chunked(), gate)
    proxy = await start_proxy(cache)
    async with Wire(proxy.url) as first, Wire(proxy.url) as second:
        await first.send(first.request(URL))
        assert (await first.head()).headers["transfer-encoding"] == "chunked"
        await gate.reached.wait()
        await second.send(second.request(URL, "Range: bytes=-1000"))
        gate.open()
        assert_part(await second.answer(), SIZE - 1000, SIZE)
    await until(lambda: proxy.cache.fetches_in_flight == 0)
    assert_whole(await ask(proxy, URL))


async def test_first_bytes_before_the_last(sim: StartSimulator, start_proxy: StartProxy) -> None:
    """What has arrived of a NAR is passed on while the rest is still missing."""
    cache = await sim(ENTRY)
    gate = Gate(after=600_000)
    cache.fault("/nar/", gate)
    proxy = await start_proxy(cache)
    async with Wire(proxy.url) as wire:
        await wire.send(wire.request(URL))
        assert (await wire.head()).headers["content-length"] == str(SIZE)
        beginning = await wire.some(500_000)
        gate.open()
        assert (beginning + await wire.some(SIZE - 500_000) == FILE) is True


@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize("spec", ["0-1,5-9", "0-0, -1", "0-,0-,0-,0-"])
async def test_several_ranges(
    sim: StartSimulator, start_proxy: StartProxy, spec: str, method: str
) -> None:
    """Several ranges at once get the whole file, as the RFC allows: Nix sends none."""
    proxy = await start_proxy(await sim(ENTRY))
    await stored(proxy)
    answer = await ask(proxy, URL, f"Range: bytes={spec}", method=method)
    assert answer.status == 200
    assert answer.headers["content-length"] == str(SIZE)
    assert len(answer.body) == (SIZE if method == "GET" else 0)


async def test_range_of_a_head(sim: StartSimulator, start_proxy: StartProxy) -> None:
    """HEAD knows no ranges (RFC 9110 §14.2)."""
    proxy = await start_proxy(await sim(ENTRY))
    await stored(proxy)
    for spec in ("0-9", f"{SIZE}-"):
        answer = await ask(proxy, URL, f"Range: bytes={spec}", method="HEAD")
        assert (answer.status, answer.headers["content-length"]) == (200, str(SIZE))


@pytest.mark.parametrize("spec", [f"{SIZE}-", f"{SIZE}-{SIZE}", "99999999-", "-0"])
@pytest.mark.parametrize("arriving", [True, False], ids=["arriving", "stored"])
async def test_range_outside_of_the_file(
    sim: StartSimulator, start_proxy: StartProxy, spec: str, *, arriving: bool
) -> None:
    """A range without a byte of the file is 416 with its size, whether all of it is here or not."""
    cache = await sim(ENTRY)
    gate = Gate(after=600_000)
    cache.fault("/nar/", gate)
    proxy = await start_proxy(cache)
    async with Wire(proxy.url) as first, Wire(proxy.url) as second:
        await first.send(first.request(URL))
        await gate.reached.wait()
        if not arriving:
            gate.open()
            await stored(proxy)
        answer = await second.ask(URL, f"Range: bytes={spec}")
        assert (await second.ask("/healthz")).status == 200
        gate.open()
        assert_whole(await first.answer())
    assert answer.status == 416
    assert answer.headers["content-range"] == f"bytes */{SIZE}"
    assert answer.headers["content-type"].startswith("text/plain")


async def test_side_files_have_ranges(sim: StartSimulator, start_proxy: StartProxy) -> None:
    """Logs and listings have their size, and parts."""
    cache = await sim(ENTRY)
    log = f"/log/{ENTRY.hash_part}-hello.drv"
    cache.files[log] = (FILE, {})
    proxy = await start_proxy(cache)
    assert_whole(await ask(proxy, log))
    assert_part(await ask(proxy, log, "Range: bytes=-10"), SIZE - 10, SIZE)


# --- ETag and If-Range --------------------------------------------------------------------------


@pytest.mark.parametrize("entry", [ENTRY, UNSIZED], ids=["FileHash", "no FileHash"])
async def test_one_etag_for_ever(
    sim: StartSimulator, start_proxy: StartProxy, entry: StoreEntry
) -> None:
    """The ETag is the same in each answer, before, while and after a NAR arrives, and restarts.

    Lix gives up a download when it has changed or vanished between two attempts.
    """
    cache = await sim(entry)
    gate = Gate(after=600_000)
    cache.fault("/nar/", gate)
    proxy = await start_proxy(cache)
    etags: dict[str, str | None] = {}

    async def note(when: str) -> None:
        for name, method, headers in (
            ("HEAD", "HEAD", ()),
            ("206", "GET", ("Range: bytes=0-9",)),
            ("206 resumed", "GET", ("Range: bytes=10-19", f"If-Range: {etags['first']}")),
        ):
            async with Wire(proxy.url) as wire:
                await wire.send(wire.request(URL, *headers, method=method))
                head = await wire.head()
            assert head.status == (200 if method == "HEAD" else 206), (when, name)
            etags[f"{name} {when}"] = head.headers.get("etag")

    async with Wire(proxy.url) as wire:
        await wire.send(wire.request(URL))
        await gate.reached.wait()
        etags["first"] = (await wire.head()).headers.get("etag")
        await note("while arriving")
        gate.open()
        await wire.some(SIZE)
    await until(lambda: proxy.cache.fetches_in_flight == 0)
    await note("when stored")
    proxy = await start_proxy(cache)
    await note("after a restart")
    cache.down()
    proxy = await start_proxy(cache)
    await note("without upstream")
    assert len(set(etags.values())) == 1, etags
    assert str(etags["first"]).startswith('"')


async def test_etag_before_the_first_fetch(sim: StartSimulator, start_proxy: StartProxy) -> None:
    """HEAD of a NAR that is not here has the ETag that its GET will have."""
    proxy = await start_proxy(await sim(ENTRY))
    head = await ask(proxy, URL, method="HEAD")
    assert head.headers["etag"] == (await ask(proxy, URL)).headers["etag"]


async def test_etags_tell_contents_apart(sim: StartSimulator, start_proxy: StartProxy) -> None:
    """The same path compressed otherwise is another file, and has another ETag."""
    packed = ENTRY.but(compression="xz")
    proxy = await start_proxy(await sim(ENTRY))
    plain = await ask(proxy, URL)
    proxy = await start_proxy(await sim(packed))
    answer = await ask(proxy, url_of(packed))
    assert_whole(answer, bytes(packed.file))
    assert answer.headers["etag"] != plain.headers["etag"]


@pytest.mark.parametrize("arriving", [True, False], ids=["arriving", "stored"])
async def test_if_range(sim: StartSimulator, start_proxy: StartProxy, *, arriving: bool) -> None:
    """A part is given to who has the beginning of this very file; others get the whole."""
    cache = await sim(ENTRY)
    gate = Gate(after=600_000)
    cache.fault("/nar/", gate)
    proxy = await start_proxy(cache)
    async with Wire(proxy.url) as first:
        await first.send(first.request(URL))
        await gate.reached.wait()
        etag = (await first.head()).headers["etag"]
        if not arriving:
            gate.open()
            await stored(proxy)
        async with Wire(proxy.url) as wire:
            await wire.send(wire.request(URL, "Range: bytes=5-99", f"If-Range: {etag}"))
            head = await wire.head()
            assert (head.status, head.headers["content-range"]) == (206, f"bytes 5-99/{SIZE}")
            assert await wire.some(94) == FILE[5:99]
        for other in ('"other"', f"W/{etag}", etag.strip('"'), "Sun, 06 Nov 1994 08:49:37 GMT"):
            async with Wire(proxy.url) as wire:
                await wire.send(wire.request(URL, "Range: bytes=5-99", f"If-Range: {other}"))
                head = await wire.head()
                assert (head.status, head.headers["content-length"]) == (200, str(SIZE))
                assert await wire.some(100) == FILE[:100]
        gate.open()


# --- old and hurried clients --------------------------------------------------------------------


@pytest.mark.parametrize("keep", [(), ("Connection: keep-alive",)], ids=["close", "keep-alive"])
@pytest.mark.parametrize(
    ("entry", "chunked"),
    [(ENTRY, False), (ENTRY, True), (UNSIZED, False), (UNSIZED, True)],
    ids=["all known", "FileSize only", "announced only", "unknown size"],
)
async def test_http_1_0(
    sim: StartSimulator,
    start_proxy: StartProxy,
    entry: StoreEntry,
    keep: tuple[str, ...],
    *,
    chunked: bool,
) -> None:
    """A client of 1996 gets no chunks, but the size and the bytes, whatever the upstream says."""
    cache = await sim(entry)
    if chunked:
        cache.fault("/nar/", Chunked())
    proxy = await start_proxy(cache)
    for _ in ("arriving", "stored"):
        async with Wire(proxy.url) as wire:
            await wire.send(wire.request(URL, *keep, version="1.0"))
            answer = await wire.answer()
            assert_whole(answer)
            assert "transfer-encoding" not in answer.headers
            if keep:
                assert answer.headers["connection"] == "keep-alive"
                await wire.send(wire.request("/healthz", version="1.0"))
                assert (await wire.answer()).body == b"ok\n"
            assert await wire.rest() == b""
        await until(lambda: proxy.cache.fetches_in_flight == 0)


async def test_unknown_size_in_chunks(sim: StartSimulator, start_proxy: StartProxy) -> None:
    """Where nobody says the size, HTTP/1.1 gets chunks, and the connection goes on after them."""
    cache = await sim(UNSIZED)
    cache.fault("/nar/", Chunked())
    proxy = await start_proxy(cache)
    async with Wire(proxy.url) as wire:
        answer = await wire.ask(URL, EVERY_CODING)
        assert answer.status == 200
        assert answer.headers["transfer-encoding"] == "chunked"
        assert "content-length" not in answer.headers
        assert "content-encoding" not in answer.headers
        assert_bytes(answer, FILE)
        await until(lambda: proxy.cache.fetches_in_flight == 0)
        assert_whole(await wire.ask(URL))


@pytest.mark.parametrize("warm", [True, False], ids=["stored", "arriving"])
async def test_pipelined_requests(
    sim: StartSimulator, start_proxy: StartProxy, *, warm: bool
) -> None:
    """Requests sent all at once are answered in their order, large and small, fast and slow."""
    cache = await sim(ENTRY, SMALL)
    proxy = await start_proxy(cache)
    if warm:
        await stored(proxy)
        await stored(proxy, url_of(SMALL))
    asked = [
        ("/healthz", (), 200),
        (URL, (), 200),
        (SMALL.narinfo_path, (), 200),
        (URL, ("Range: bytes=100-199",), 206),
        (f"/{'0' * 32}.narinfo", (), 404),
        (url_of(SMALL), (), 200),
        (URL, ("Range: bytes=-5",), 206),
        ("/x.narinfo", (), 400),
        (URL, (f"Range: bytes={SIZE}-",), 416),
        (URL, (), 200),
        ("/nix-cache-info", (), 200),
    ] * 3
    async with Wire(proxy.url) as wire:
        await wire.send(b"".join(wire.request(path, *headers) for path, headers, _ in asked))
        for path, headers, status in asked:
            answer = await wire.answer()
            assert answer.status == status, path
            if path == URL and status == 200:
                assert_whole(answer)
            if headers == ("Range: bytes=100-199",):
                assert_part(answer, 100, 200)
            if path == url_of(SMALL):
                assert_whole(answer, bytes(SMALL.file))
        assert (await wire.ask("/healthz")).body == b"ok\n"


async def test_pipelined_requests_of_a_slow_reader(
    sim: StartSimulator, start_proxy: StartProxy
) -> None:
    """A NAR does not overtake the end of a long narinfo that the kernel has yet to take."""
    entry = ENTRY.but(extra=(f"X-Long: {'x' * 1_000_000}",))
    proxy = await start_proxy(await sim(entry))
    await stored(proxy)
    async with Wire(proxy.url, receive_buffer=4096) as wire:
        await wire.send((wire.request(entry.narinfo_path) * 3 + wire.request(URL)) * 10)
        for _ in range(10):
            for _ in range(3):
                answer = await wire.answer()
                assert (answer.status, answer.complete) == (200, True)
                assert answer.body.startswith(b"StorePath: ")
                assert answer.body.endswith(b"x\n")
            assert_whole(await wire.answer())


@pytest.mark.parametrize("arriving", [True, False], ids=["arriving", "stored"])
@pytest.mark.parametrize("chunked", [True, False], ids=["chunked", "sized"])
async def test_tiny_receive_buffer(
    sim: StartSimulator, start_proxy: StartProxy, *, arriving: bool, chunked: bool
) -> None:
    """A client that takes a few kilobytes at a time gets the same bytes as any other."""
    cache = await sim(UNSIZED)
    if chunked:
        cache.fault("/nar/", Chunked())
    proxy = await start_proxy(cache)
    if not arriving:
        await stored(proxy)
    async with Wire(proxy.url, receive_buffer=4096) as wire:
        assert_bytes(await wire.ask(URL), FILE)


# --- clients that stop, and clients that leave --------------------------------------------------

HUGE = StoreEntry.huge("huge-1.0", 48 << 20)
"""More than the kernel holds for both ends of a connection."""


def cut_off(proxy: InsideProxy) -> list[RequestServed]:
    """Return the answers that were not completed."""
    return [event for event in proxy.observed(RequestServed) if not event.complete]


@pytest.mark.parametrize("arriving", [True, False], ids=["arriving", "stored"])
async def test_a_client_that_stops_reading(
    sim: StartSimulator,
    start_proxy: StartProxy,
    monkeypatch: pytest.MonkeyPatch,
    *,
    arriving: bool,
) -> None:
    """Who reads nothing for a while is cut off, and others do not notice that they were there."""
    proxy = await start_proxy(await sim(HUGE))
    if not arriving:
        await stored(proxy, url_of(HUGE))
    monkeypatch.setattr(body, "STALL_TIMEOUT", 1.0)
    async with Wire(proxy.url, receive_buffer=4096) as stalled:
        await stalled.send(stalled.request(url_of(HUGE)))
        assert (await stalled.head()).headers["content-length"] == str(len(HUGE.file))
        status, _, whole = await proxy.get(url_of(HUGE))
        assert (status, len(whole)) == (200, len(HUGE.file))
        assert Blob.of(whole).sha256 == HUGE.file.sha256
        await until(lambda: len(cut_off(proxy)) == 1)
        assert len(await stalled.rest()) < len(HUGE.file)
    assert cut_off(proxy)[0].body_bytes < len(HUGE.file)
    assert (await proxy.get("/healthz"))[0] == 200


async def test_a_client_that_reads_slowly_is_not_cut(
    sim: StartSimulator, start_proxy: StartProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client may take as long as it likes, as long as it takes something now and then."""
    proxy = await start_proxy(await sim(HUGE))
    await stored(proxy, url_of(HUGE))
    monkeypatch.setattr(body, "STALL_TIMEOUT", 1.0)
    async with Wire(proxy.url, receive_buffer=2**16) as slow:
        await slow.send(slow.request(url_of(HUGE)))
        await slow.head()
        for _ in range(50):
            assert len(await slow.some(2**14)) == 2**14
            await asyncio.sleep(0.05)  # it is slow
        assert cut_off(proxy) == []


def descriptors() -> int:
    """Count what this process has open: both ends of every connection, and every file."""
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


async def abort_in_the_middle(proxy: InsideProxy, target: str, *headers: str) -> None:
    """Read a little of an answer, and reset the connection."""
    async with Wire(proxy.url, receive_buffer=4096) as wire:
        await wire.send(wire.request(target, *headers))
        await wire.head()
        await wire.some(1)


async def test_aborts_of_stored_nars_leak_nothing(
    sim: StartSimulator, start_proxy: StartProxy
) -> None:
    """Clients that leave in the middle of a NAR leave no descriptor behind, and do no harm."""
    proxy = await start_proxy(await sim(HUGE))
    await stored(proxy, url_of(HUGE))
    before = descriptors()
    for headers in ((), ("Range: bytes=5-",), ("Range: bytes=-40000000",)) * 5:
        await abort_in_the_middle(proxy, url_of(HUGE), *headers)
    await until(lambda: len(cut_off(proxy)) == 15)
    await until(lambda: descriptors() <= before)
    assert (await proxy.get(url_of(HUGE), {"Range": "bytes=0-99"}))[2] == bytes(HUGE.file[:100])


@pytest.mark.parametrize("entry", [ENTRY, UNSIZED], ids=["sized", "chunked"])
async def test_aborts_of_arriving_nars_leak_nothing(
    sim: StartSimulator, start_proxy: StartProxy, entry: StoreEntry
) -> None:
    """… nor do those that leave while it arrives; the transfer goes on without them."""
    cache = await sim(entry, SMALL)
    proxy = await start_proxy(cache)
    await stored(proxy, url_of(SMALL))  # opens what stays open: to the upstream, of the index
    before = descriptors()
    gate = Gate(after=600_000)
    cache.fault("/nar/", *([Chunked()] if entry is UNSIZED else []), gate)
    for _ in range(10):
        await abort_in_the_middle(proxy, URL)
    assert cache.gets(entry.nar_path) == 1
    gate.open()
    await until(lambda: len(cut_off(proxy)) == 10)
    await until(lambda: proxy.cache.fetches_in_flight == 0)
    await until(lambda: descriptors() <= before)
    assert_whole(await ask(proxy, URL))
    assert cache.gets(entry.nar_path) == 1


async def test_clients_that_leave_before_the_first_byte_leak_nothing(
    sim: StartSimulator, start_proxy: StartProxy
) -> None:
    """… nor do those that did not wait for an answer."""
    cache = await sim(ENTRY, SMALL)
    proxy = await start_proxy(cache)
    await stored(proxy, url_of(SMALL))
    before = descriptors()
    gate = Gate(after=None)
    cache.fault("/nar/", gate)
    for _ in range(10):
        async with Wire(proxy.url) as wire:
            await wire.send(wire.request(URL))
            await gate.reached.wait()
    gate.open()
    await until(lambda: proxy.cache.fetches_in_flight == 0)
    await until(lambda: descriptors() <= before)
    assert_whole(await ask(proxy, URL))
    assert cache.gets(ENTRY.nar_path) == 1
