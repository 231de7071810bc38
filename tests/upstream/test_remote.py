"""One remote binary cache over HTTP: what is asked, what counts as an answer, and what does not."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import time
from collections.abc import Awaitable, Callable, Iterable

import pytest

from proxy.errors import (
    NotFoundError,
    ProxyError,
    UpstreamBrokeOffError,
    UpstreamBusyError,
    UpstreamDeniedError,
    UpstreamError,
    UpstreamProtocolError,
    UpstreamSkippedError,
    UpstreamTimeoutError,
    UpstreamUnavailableError,
)
from proxy.nix.store_path import parse_hash_part
from proxy.upstream import answer, remote
from proxy.upstream.credentials import bearer
from proxy.upstream.remote import Upstream
from tests.blobs import Blob, compress
from tests.closures import COMPRESSIONS, SCHEMES, StoreEntry
from tests.conftest import StartSimulator
from tests.faults import (
    Body,
    Chunked,
    Cut,
    Encoded,
    Fault,
    Gate,
    Headers,
    Html,
    Longer,
    Redirect,
    Reset,
    ShortBody,
    Shorter,
    Slow,
    Stall,
    Status,
)
from tests.simulator import BinaryCacheSimulator
from tests.upstream.conftest import OpenUpstream
from tests.upstream.servers import Authority, ForwardProxy, black_hole, forwards_to, says, serving

ENTRY = StoreEntry.make("hello-1.0", b"hello\n" * 5_000)
LOG = "log/0123456789abcdfghijklmnpqrsvwxyz-hello.drv"
LISTING = b'{"version":1}' * 1_000
FOREVER = 60.0
"""Seconds after which a test that hangs has failed."""


async def narinfo(upstream: Upstream, entry: StoreEntry = ENTRY) -> bytes:
    """Return the text of an entry's narinfo."""
    async with asyncio.timeout(FOREVER):
        _, text = await upstream.narinfo(parse_hash_part(entry.hash_part))
    return text


async def nar(upstream: Upstream, reference: str) -> bytes:
    """Return a whole NAR."""
    pieces = []
    async with asyncio.timeout(FOREVER), upstream.nar(reference) as body:
        while piece := await body.read():
            pieces.append(piece)
    return b"".join(pieces)


async def file(upstream: Upstream, path: str) -> bytes:
    """Return another file, decoded."""
    pieces: list[bytes] = []
    async with asyncio.timeout(FOREVER):
        async with upstream.file(path) as body:
            await body.copy_decoded(pieces.append)
    return b"".join(pieces)


ASKS: tuple[Callable[[Upstream], Awaitable[object]], ...] = (
    narinfo,
    lambda upstream: nar(upstream, ENTRY.nar_path),
    lambda upstream: file(upstream, LOG),
    lambda upstream: upstream.nar_size(ENTRY.nar_path),
)
"""Everything that an upstream can be asked."""


async def raises(error: type[ProxyError], upstream: Upstream, *, body: bool = False) -> None:
    """Ask for everything (that has a body), and see that each time the answer is exactly this error."""
    for ask in ASKS[:-1] if body else ASKS:
        with pytest.raises(error) as caught:
            await ask(upstream)
        assert type(caught.value) is error


async def _serving(sim: StartSimulator, *faults: Fault, path: str = "*") -> BinaryCacheSimulator:
    cache = await sim(ENTRY)
    cache.files[f"/{LOG}"] = (LISTING, {})
    if faults:
        cache.fault(path, *faults)
    return cache


# --- connections ------------------------------------------------------------------------------


async def test_keep_alive(sim: StartSimulator, upstream: OpenUpstream) -> None:
    """One connection serves everything in turn, also behind absences, refusals and redirects."""
    cache = await _serving(sim)
    cache.fault("/gone.nar", Status(404, b"x" * 5_000), Slow(100_000))
    cache.fault("/denied.nar", Status(403, b"x" * 3_000), Chunked())
    cache.fault("/broken.nar", Status(500, b""))
    cache.fault("/moved.nar", Redirect(ENTRY.nar_path))
    asked = upstream(cache.url)
    for _ in range(3):
        assert await narinfo(asked) == ENTRY.narinfo(*cache.keys)
        assert await nar(asked, "moved.nar") == bytes(ENTRY.file)
        assert await file(asked, LOG) == LISTING
        assert await asked.nar_size(ENTRY.nar_path) == len(ENTRY.file)
        for missing in ("gone.nar", "denied.nar", "broken.nar", "nowhere.nar"):
            with pytest.raises(ProxyError):
                await nar(asked, missing)
    assert cache.accepted == 1


async def test_connection_limit(sim: StartSimulator, upstream: OpenUpstream) -> None:
    """No more connections than allowed are open, and everything is answered all the same."""
    gate = Gate(None)
    cache = await _serving(sim, gate, path="*.narinfo")
    all_taken = cache.expect("*.narinfo", 4)
    asked = upstream(cache.url, max_connections=4)
    async with asyncio.TaskGroup() as group:
        for _ in range(20):
            group.create_task(narinfo(asked))
        await all_taken.wait()
        gate.open()
    assert cache.gets("*.narinfo") == 20
    assert (cache.accepted, cache.peak()) == (4, 4)


@pytest.mark.parametrize("connections", [2, 4, 9])
async def test_narinfos_do_not_wait_for_nars(
    connections: int, sim: StartSimulator, upstream: OpenUpstream
) -> None:
    """While more NARs than there are connections are stuck, narinfos are answered."""
    gate = Gate(100)
    cache = await _serving(sim, gate, path="/nar/")
    share = connections // 2
    share_taken = cache.expect("/nar/", share)
    asked = upstream(cache.url, max_connections=connections)
    async with asyncio.TaskGroup() as group:
        nars = [group.create_task(nar(asked, ENTRY.nar_path)) for _ in range(connections + 3)]
        await share_taken.wait()
        for _ in range(5):
            assert await narinfo(asked) == ENTRY.narinfo(*cache.keys)
        assert cache.count("/nar/") == share
        gate.open()
    assert {task.result() for task in nars} == {bytes(ENTRY.file)}
    assert cache.peak("/nar/") == share


async def test_abandoned_nars_free_their_share(sim: StartSimulator, upstream: OpenUpstream) -> None:
    """NARs that are given up half way, or that fail, leave room for others."""
    cache = await _serving(sim)
    cache.fault(ENTRY.nar_path, Stall(100))
    asked = upstream(cache.url, max_connections=2)
    for round_ in range(1, 4):
        async with asked.nar(ENTRY.nar_path) as body:
            assert await body.read()
        stuck = asyncio.create_task(nar(asked, ENTRY.nar_path))
        await cache.expect(ENTRY.nar_path, 2 * round_).wait()
        stuck.cancel()
        with pytest.raises(asyncio.CancelledError):
            await stuck
        with pytest.raises(NotFoundError):
            await nar(asked, "nar/nowhere")
    cache.heal()
    assert await nar(asked, ENTRY.nar_path) == bytes(ENTRY.file)


async def test_no_share_in_time(
    sim: StartSimulator, upstream: OpenUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A NAR for which no connection becomes free is passed over, and nobody waits for ever."""
    monkeypatch.setattr(remote, "SLOT_TIMEOUT", 0.2)
    gate = Gate(100)
    cache = await _serving(sim, gate, path="/nar/")
    asked = upstream(cache.url, max_connections=1)
    async with asked.nar(ENTRY.nar_path):
        with pytest.raises(UpstreamSkippedError):
            await nar(asked, ENTRY.nar_path)


async def test_dead_connection(sim: StartSimulator, upstream: OpenUpstream) -> None:
    """A kept connection that the upstream has given up by the next request is replaced unseen."""
    cache = await _serving(sim)
    asked = upstream(cache.url)
    text = await narinfo(asked)
    cache.fault("*", Reset(), times=1)
    assert await narinfo(asked) == text
    assert (cache.accepted, cache.gets("*.narinfo")) == (2, 3)


async def test_restarted_upstream(sim: StartSimulator, upstream: OpenUpstream) -> None:
    """An upstream that was down is asked over new connections as soon as it is back."""
    cache = await _serving(sim)
    asked = upstream(cache.url)
    text = await narinfo(asked)
    cache.down()
    with pytest.raises(UpstreamUnavailableError):
        await narinfo(asked)
    cache.up()
    assert await narinfo(asked) == text


async def test_closed(sim: StartSimulator, upstream: OpenUpstream) -> None:
    """An upstream that is not configured any more says so instead of breaking its askers."""
    cache = await _serving(sim)
    asked = upstream(cache.url)
    await asked.close()
    with pytest.raises(UpstreamUnavailableError, match="not configured"):
        await narinfo(asked)


# --- time -------------------------------------------------------------------------------------


async def test_no_total_timeout(sim: StartSimulator, upstream: OpenUpstream) -> None:
    """A NAR may take longer than the read timeout in total, as long as bytes keep coming."""
    size = len(ENTRY.file)
    cache = await _serving(sim, Slow(size / 1.6, chunk=-(-size // 16)), path="/nar/")
    began = time.monotonic()
    assert await nar(upstream(cache.url, read_timeout=0.8), ENTRY.nar_path) == bytes(ENTRY.file)
    assert time.monotonic() - began > 0.8


@pytest.mark.parametrize("after", [None, 0, 100])
async def test_stall(after: int | None, sim: StartSimulator, upstream: OpenUpstream) -> None:
    """An upstream that goes silent, before or in an answer, is given up after the read timeout."""
    cache = await _serving(sim, Stall(after))
    asked = upstream(cache.url, connect_timeout=0.2, read_timeout=0.3)
    began = time.monotonic()
    await raises(UpstreamTimeoutError, asked, body=after is not None)
    assert time.monotonic() - began < 5


async def test_black_hole(upstream: OpenUpstream) -> None:
    """A host that never says a word is given up."""
    with black_hole() as url:
        asked = upstream(url, connect_timeout=0.1, read_timeout=0.2)
        await raises(UpstreamTimeoutError, asked)


@pytest.mark.parametrize("framing", [[], [Chunked()]], ids=["announced", "chunked"])
async def test_long_error_page(
    framing: Iterable[Fault], sim: StartSimulator, upstream: OpenUpstream
) -> None:
    """A refusal is one as soon as it is here; a page of megabytes behind it is not waited for."""
    cache = await _serving(sim, Status(503, b"x" * 2**20), *framing, Stall(100_000))
    with pytest.raises(UpstreamUnavailableError, match="503"):
        await narinfo(upstream(cache.url))


# --- content codings --------------------------------------------------------------------------

CODINGS = ["gzip", "zstd", "br", "deflate", "xz", "bzip2", "identity"]


@pytest.mark.parametrize("coding", CODINGS)
async def test_encoded_text(coding: str, sim: StartSimulator, upstream: OpenUpstream) -> None:
    """Narinfos and other files arrive decoded, whatever coding the upstream keeps them in."""
    cache = await _serving(sim, Encoded(coding))
    asked = upstream(cache.url)
    assert await narinfo(asked) == ENTRY.narinfo(*cache.keys)
    assert await file(asked, LOG) == LISTING


@pytest.mark.parametrize("said", ["x-gzip", "GZIP", " gzip "])
async def test_coding_by_another_name(
    said: str, sim: StartSimulator, upstream: OpenUpstream
) -> None:
    """A coding is known by its old name, and in any case (RFC 9110 §8.4.1)."""
    cache = await _serving(sim, Encoded("gzip"), Headers({"Content-Encoding": said}))
    assert await narinfo(upstream(cache.url)) == ENTRY.narinfo(*cache.keys)


@pytest.mark.parametrize("coding", ["gzip", "zstd", "br", "deflate", "xz", "bzip2"])
async def test_narinfo_bomb(coding: str, sim: StartSimulator, upstream: OpenUpstream) -> None:
    """A narinfo of a few bytes that unpacks to megabytes is refused."""
    cache = await _serving(sim, Body(b"StorePath: " + b"x" * (6 * 2**20)), Encoded(coding))
    with pytest.raises(UpstreamProtocolError, match="more than"):
        await narinfo(upstream(cache.url))


@pytest.mark.parametrize("coding", ["gzip", "zstd"])
async def test_file_bomb(coding: str, sim: StartSimulator, upstream: OpenUpstream) -> None:
    """A log that unpacks to more than a disk should hold is refused in pieces, never held whole."""
    zeros = Blob(((bytes(2**20), 257),))
    cache = await sim()
    cache.files[f"/{LOG}"] = (compress(zeros, coding), {"Content-Encoding": coding})
    sizes: list[int] = []
    with pytest.raises(UpstreamProtocolError, match="more than"):
        async with upstream(cache.url).file(LOG) as body:
            await body.copy_decoded(lambda piece: sizes.append(len(piece)))
    assert sum(sizes) <= answer.MAX_FILE
    assert max(sizes) <= 2**18


async def test_oversize_narinfo(sim: StartSimulator, upstream: OpenUpstream) -> None:
    """A narinfo that does not end is refused at the limit, not at its end."""
    limit = remote.MAX_NARINFO
    cache = await _serving(sim, Longer(2 * limit), Stall(limit + 500_000))
    with pytest.raises(UpstreamProtocolError, match="more than"):
        await narinfo(upstream(cache.url))


@pytest.mark.parametrize(
    "faults",
    [
        [Headers({"Content-Encoding": "gzip"})],
        [Encoded("gzip"), Shorter(5)],
        [Encoded("zstd"), Shorter(5)],
        [Encoded("br"), Longer(5)],
        [Encoded("gzip"), Headers({"Content-Encoding": "exi"})],
        [Encoded("gzip"), Headers({"Content-Encoding": "gzip, br"})],
    ],
    ids=["not at all", "gzip cut", "zstd cut", "br with more", "unknown", "several"],
)
async def test_bad_coding(
    faults: Iterable[Fault], sim: StartSimulator, upstream: OpenUpstream
) -> None:
    """What cannot be decoded is no answer."""
    cache = await _serving(sim, *faults)
    asked = upstream(cache.url)
    with pytest.raises(UpstreamProtocolError, match="Content-Encoding"):
        await narinfo(asked)
    with pytest.raises(UpstreamProtocolError, match="Content-Encoding"):
        await file(asked, LOG)


# --- NARs -------------------------------------------------------------------------------------


@pytest.mark.parametrize("compression", COMPRESSIONS)
async def test_nar_bytes(compression: str, sim: StartSimulator, upstream: OpenUpstream) -> None:
    """A NAR's file arrives as it is, compressed or not, and no coding of it is asked for."""
    entry = ENTRY.but(compression=compression)
    cache = await sim(entry)
    asked = upstream(cache.url)
    assert await nar(asked, entry.nar_path) == bytes(entry.file)
    assert await asked.nar_size(entry.nar_path) == len(entry.file)
    assert [request.method for request in cache.requests] == ["GET", "HEAD"]
    assert not any("Accept-Encoding" in request.headers for request in cache.requests)


@pytest.mark.parametrize("coding", ["gzip", "br", "zstd", "deflate", "exi"])
async def test_encoded_nar(coding: str, sim: StartSimulator, upstream: OpenUpstream) -> None:
    """A NAR with a content coding is refused: it has neither the hash nor the size of its narinfo."""
    cache = await _serving(sim, Headers({"Content-Encoding": coding}))
    asked = upstream(cache.url)
    with pytest.raises(UpstreamProtocolError, match="Content-Encoding"):
        await nar(asked, ENTRY.nar_path)
    with pytest.raises(UpstreamProtocolError, match="Content-Encoding"):
        await asked.nar_size(ENTRY.nar_path)


async def test_unknown_size(sim: StartSimulator, upstream: OpenUpstream) -> None:
    """A NAR whose size the upstream does not say arrives all the same."""
    cache = await _serving(sim, Chunked())
    asked = upstream(cache.url)
    assert await asked.nar_size(ENTRY.nar_path) is None
    async with asked.nar(ENTRY.nar_path) as body:
        assert body.size is None
    assert await nar(asked, ENTRY.nar_path) == bytes(ENTRY.file)


@pytest.mark.parametrize(
    "faults",
    [
        [ShortBody(10)],
        [Cut(100)],
        [Cut(100), Chunked()],
        [Cut(100, reset=True)],
    ],
    ids=["closed early", "cut", "cut in chunks", "reset"],
)
async def test_broken_transfer(
    faults: Iterable[Fault], sim: StartSimulator, upstream: OpenUpstream
) -> None:
    """A body that ends before its end is an error, never a shorter body."""
    cache = await _serving(sim, *faults)
    await raises(UpstreamBrokeOffError, upstream(cache.url), body=True)


# --- URLs -------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", SCHEMES)
async def test_url_schemes(scheme: str, sim: StartSimulator, upstream: OpenUpstream) -> None:
    """The upstream sees the URL of its narinfo byte for byte, with its encoding and its query."""
    entry = ENTRY.but(scheme=scheme)
    cache = await sim(entry)
    info, _ = await upstream(cache.url).narinfo(parse_hash_part(entry.hash_part))
    assert await nar(upstream(cache.url), info.url) == bytes(entry.file)
    assert cache.requests[-1].raw_path == entry.nar_path


@pytest.mark.parametrize(
    "reference",
    [
        "nar/a%2Fb%2fc%25.nar",
        "nar/a%20b+c%2B.nar?sig=a%2Bb%2F%3D%3d&x=/+:@",
        "nar/%e2%82%ac%E2%82%AC.nar",
        "nar/a;b=c,d!$&'()*~.nar?hash=e",
        "nar//double.nar",
        "nar/[brackets]|pipe^.nar?{}",
        "nar/%41%7E.nar",
    ],
)
async def test_url_bytes(reference: str, sim: StartSimulator, upstream: OpenUpstream) -> None:
    """Nothing of a URL is decoded, encoded or tidied up, be it relative, absolute or a redirect's."""
    cache = await sim(prefix="/team")
    cache.files[f"/{reference}"] = (b"found", {})
    cache.fault("/moved.nar", Redirect(f"/team/{reference}"))
    asked = upstream(cache.url)
    assert await nar(asked, f"{cache.url}/{reference}") == b"found"
    assert await nar(asked, "moved.nar") == b"found"
    assert await nar(asked, reference) == b"found"


async def test_url_below_a_folder(sim: StartSimulator, upstream: OpenUpstream) -> None:
    """An upstream's URL may have a folder: relative references stay in it, rooted ones leave it."""
    cache = await sim(prefix="/team")
    asked = upstream(cache.url)
    assert asked.resolve("nar/x.nar") == f"{cache.url}/nar/x.nar"
    assert asked.resolve("../x.nar") == f"http://127.0.0.1:{cache.port}/x.nar"
    assert asked.resolve("/x.nar") == f"http://127.0.0.1:{cache.port}/x.nar"
    assert asked.resolve("?hash=x") == f"{cache.url}/?hash=x"


HOSTILE_URLS = [
    "",
    " ",
    "http://",
    "http:///x",
    "file:///etc/passwd",
    "ftp://127.0.0.1/x",
    "javascript:alert(1)",
    "http://[::1/x",
    "http://[::1]x/",
    "http://a..b/x",
    f"http://{'a' * 64}.invalid/x",
    "http://.../x",
    "http://xn--/x",
    "http://127.0.0.1:1\\@x/",
    "http://127.0.0.1:99999/x",
    "http://127.0.0.1:-1/x",
    "http://127.0.0.1:x/x",
    "http://1.2.3/x",
    "http://\u2100.invalid/x",
    "http://a%00b.invalid/x",
    "nar/\r\nX-Injected: 1",
    "nar/\x00",
    "nar/ü",
]


@pytest.mark.parametrize("url", HOSTILE_URLS)
async def test_hostile_reference(url: str, upstream: OpenUpstream) -> None:
    """Whatever URL a narinfo has, asking for it ends in one of our errors."""
    with black_hole() as ours:
        asked = upstream(ours, connect_timeout=0.1, read_timeout=0.1)
        with pytest.raises(UpstreamError):
            await nar(asked, url)
        with pytest.raises(UpstreamError):
            await asked.nar_size(url)


@pytest.mark.parametrize("url", [url for url in HOSTILE_URLS if url.isprintable()])
async def test_hostile_redirect(url: str, sim: StartSimulator, upstream: OpenUpstream) -> None:
    """Wherever a redirect leads, following it ends in one of our errors."""
    cache = await _serving(sim, Redirect(url))
    with pytest.raises(UpstreamError):
        await narinfo(upstream(cache.url))


async def test_user_in_a_url(sim: StartSimulator, upstream: OpenUpstream) -> None:
    """A user and password in a narinfo's URL break nothing, with credentials of our own or without."""
    cache = await _serving(sim)
    url = f"http://user:password@127.0.0.1:{cache.port}{ENTRY.nar_path}"
    for options in ({}, {"credentials": bearer("token")}):
        with contextlib.suppress(UpstreamError):
            assert await nar(upstream(cache.url, **options), url) == bytes(ENTRY.file)


# --- redirects --------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [301, 302, 303, 307, 308])
async def test_redirect(code: int, sim: StartSimulator, upstream: OpenUpstream) -> None:
    """A redirect to another host is followed for everything that is asked, by the same method."""
    there = await _serving(sim)
    here = await sim()
    here.fault("*", Redirect(lambda request: f"{there.url}{request.raw_path}", code))
    asked = upstream(here.url)
    assert await narinfo(asked) == ENTRY.narinfo(*there.keys)
    assert await nar(asked, ENTRY.nar_path) == bytes(ENTRY.file)
    assert await asked.nar_size(ENTRY.nar_path) == len(ENTRY.file)
    assert await file(asked, LOG) == LISTING
    assert [request.method for request in there.requests] == ["GET", "GET", "HEAD", "GET"]


async def test_relative_redirect(sim: StartSimulator, upstream: OpenUpstream) -> None:
    """A redirect may be relative to where it came from, not to the upstream."""
    cache = await sim()
    cache.files["/a/b/c.nar"] = (b"found", {})
    cache.fault("/a/start.nar", Redirect("b/c.nar"))
    assert await nar(upstream(cache.url), "a/start.nar") == b"found"


async def test_redirect_limit(sim: StartSimulator, upstream: OpenUpstream) -> None:
    """Five redirects are followed, and no sixth."""
    cache = await sim()
    cache.files["/6"] = (b"found", {})
    for hop in range(6):
        cache.fault(f"/{hop}", Redirect(f"/{hop + 1}"))
    assert await nar(upstream(cache.url), "1") == b"found"
    cache.reset_counts()
    with pytest.raises(UpstreamProtocolError, match="redirects"):
        await nar(upstream(cache.url), "0")
    assert cache.gets("/6") == 0


async def test_redirect_loop(sim: StartSimulator, upstream: OpenUpstream) -> None:
    """An upstream that sends us round in circles is given up, soon."""
    cache = await _serving(sim, Redirect(lambda request: request.raw_path))
    with pytest.raises(UpstreamProtocolError, match="redirects"):
        await narinfo(upstream(cache.url))
    assert cache.count() == remote.MAX_REDIRECTS + 1


# --- TLS --------------------------------------------------------------------------------------


async def test_private_authority(
    sim: StartSimulator, upstream: OpenUpstream, authority: Authority, tls: ssl.SSLContext
) -> None:
    """An upstream behind a private authority is trusted with ``ca_file``, also after a redirect."""
    cache = await _serving(sim)
    async with serving(forwards_to(cache.port), tls) as port:
        cache.fault("/moved.nar", Redirect(f"https://localhost:{port}{ENTRY.nar_path}"))
        asked = upstream(f"https://127.0.0.1:{port}", ca_file=authority.certificate)
        assert await narinfo(asked) == ENTRY.narinfo(*cache.keys)
        assert await nar(asked, "moved.nar") == bytes(ENTRY.file)


async def test_unknown_authority(
    sim: StartSimulator,
    upstream: OpenUpstream,
    authority: Authority,
    tls: ssl.SSLContext,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """A certificate of another authority is refused, and nothing is sent to who shows it."""
    other = Authority.make(tmp_path_factory.mktemp("other") / "ca")
    cache = await _serving(sim)
    async with serving(forwards_to(cache.port), tls) as port:
        for options in ({}, {"ca_file": other.certificate}):
            asked = upstream(f"https://127.0.0.1:{port}", **options)
            with pytest.raises(UpstreamUnavailableError, match=r"(?i)certificate"):
                await narinfo(asked)
    assert cache.count() == 0


async def test_wrong_host(
    sim: StartSimulator, upstream: OpenUpstream, authority: Authority, tls: ssl.SSLContext
) -> None:
    """A certificate for another host is refused."""
    cache = await _serving(sim)
    async with serving(forwards_to(cache.port), tls) as port:
        asked = upstream(f"https://127.0.0.2:{port}", ca_file=authority.certificate)
        with pytest.raises(UpstreamUnavailableError):
            await narinfo(asked)
    assert cache.count() == 0


async def test_tls_is_kept(
    sim: StartSimulator, upstream: OpenUpstream, authority: Authority, tls: ssl.SSLContext
) -> None:
    """Neither a redirect nor a narinfo's URL leads from https to http."""
    plain = await _serving(sim)
    cache = await _serving(sim)
    cache.fault("/moved.nar", Redirect(f"{plain.url}{ENTRY.nar_path}"))
    async with serving(forwards_to(cache.port), tls) as port:
        asked = upstream(f"https://127.0.0.1:{port}", ca_file=authority.certificate)
        for reference in ("moved.nar", f"{plain.url}{ENTRY.nar_path}"):
            with pytest.raises(UpstreamProtocolError):
                await nar(asked, reference)
    assert plain.count() == 0


async def test_plain_http_becomes_tls(
    sim: StartSimulator, upstream: OpenUpstream, authority: Authority, tls: ssl.SSLContext
) -> None:
    """A redirect from http to https is followed."""
    cache = await _serving(sim)
    async with serving(forwards_to(cache.port), tls) as port:
        cache.fault("/moved.nar", Redirect(f"https://127.0.0.1:{port}{ENTRY.nar_path}"))
        asked = upstream(cache.url, ca_file=authority.certificate)
        assert await nar(asked, "moved.nar") == bytes(ENTRY.file)


async def test_tls_where_there_is_none(sim: StartSimulator, upstream: OpenUpstream) -> None:
    """An upstream that speaks no TLS where it should is unavailable."""
    cache = await _serving(sim)
    with pytest.raises(UpstreamUnavailableError):
        await narinfo(upstream(cache.url.replace("http:", "https:")))


# --- forward proxies --------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["http://", ""], ids=["URL", "host and port"])
async def test_forward_proxy(
    scheme: str, sim: StartSimulator, upstream: OpenUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``http_proxy`` is obeyed, with or without its scheme, as curl does; the URL stays untouched."""
    cache = await _serving(sim)
    cache.files["/nar/a%2Fb?x=%2B"] = (b"found", {})
    between = ForwardProxy()
    async with serving(between.answer) as port:
        monkeypatch.setenv("http_proxy", f"{scheme}127.0.0.1:{port}")
        asked = upstream(cache.url)
        assert await narinfo(asked) == ENTRY.narinfo(*cache.keys)
        assert await nar(asked, "nar/a%2Fb?x=%2B") == b"found"
    assert between.targets == [
        f"{cache.url}{ENTRY.narinfo_path}",
        f"{cache.url}/nar/a%2Fb?x=%2B",
    ]


async def test_forward_proxy_with_credentials(
    sim: StartSimulator, upstream: OpenUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The forward proxy's own user is for it alone, and the upstream's credentials pass through it."""
    cache = await _serving(sim)
    cache.require_auth = "Bearer token"
    between = ForwardProxy()
    async with serving(between.answer) as port:
        monkeypatch.setenv("http_proxy", f"http://user:password@127.0.0.1:{port}")
        asked = upstream(cache.url, credentials=bearer("token"))
        assert await narinfo(asked) == ENTRY.narinfo(*cache.keys)
    assert "Proxy-Authorization: Basic dXNlcjpwYXNzd29yZA==" in between.heads[0]


@pytest.mark.parametrize("exempt", ["127.0.0.1", "*", "localhost,127.0.0.1", "127.0.0.1:{port}"])
async def test_no_proxy(
    exempt: str, sim: StartSimulator, upstream: OpenUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``no_proxy`` is obeyed."""
    cache = await _serving(sim)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", exempt.format(port=cache.port))
    assert await narinfo(upstream(cache.url)) == ENTRY.narinfo(*cache.keys)


async def test_forward_proxy_that_is_down(
    sim: StartSimulator, upstream: OpenUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A forward proxy that cannot be reached makes the upstream unavailable."""
    cache = await _serving(sim)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    with pytest.raises(UpstreamUnavailableError):
        await narinfo(upstream(cache.url))
    assert cache.count() == 0


# --- answers that are none --------------------------------------------------------------------

STATUSES: dict[int, type[ProxyError]] = {
    201: UpstreamProtocolError,
    202: UpstreamProtocolError,
    204: UpstreamProtocolError,
    206: UpstreamProtocolError,
    300: UpstreamProtocolError,
    302: UpstreamProtocolError,  # without a Location
    304: UpstreamProtocolError,
    400: UpstreamProtocolError,
    401: UpstreamDeniedError,
    403: UpstreamDeniedError,
    404: NotFoundError,
    405: UpstreamDeniedError,
    407: UpstreamDeniedError,
    408: UpstreamBusyError,
    410: NotFoundError,
    416: UpstreamProtocolError,
    418: UpstreamProtocolError,
    429: UpstreamBusyError,
    500: UpstreamBusyError,
    501: UpstreamBusyError,
    502: UpstreamBusyError,
    503: UpstreamBusyError,
    504: UpstreamBusyError,
    522: UpstreamBusyError,
    599: UpstreamBusyError,
}


@pytest.mark.parametrize("status", STATUSES)
async def test_statuses(status: int, sim: StartSimulator, upstream: OpenUpstream) -> None:
    """Only 404 and 410 mean absent; whatever else is not 200 means that we do not know."""
    cache = await _serving(sim, Status(status, b""))
    await raises(STATUSES[status], upstream(cache.url))


@pytest.mark.parametrize(
    "fault",
    [Html(), Body(b""), Body(b"\xff\xfe"), Shorter(1), Body(b"StorePath: /nix/store/x\n")],
    ids=["HTML", "nothing", "binary", "no final newline", "truncated"],
)
async def test_not_a_narinfo(fault: Fault, sim: StartSimulator, upstream: OpenUpstream) -> None:
    """A 200 with something that is not a narinfo is no answer."""
    cache = await _serving(sim, fault)
    with pytest.raises(UpstreamProtocolError, match="not a narinfo"):
        await narinfo(upstream(cache.url))


HEAD = b"HTTP/1.1 200 OK\r\n"


@pytest.mark.parametrize(
    "text",
    [
        b"SSH-2.0-OpenSSH_9.2p1 Debian-2\r\n",
        b"\x15\x03\x01\x00\x02\x02\x46",
        b"HTTP/1.1 2OO OK\r\n\r\n",
        b"HTTP/1.1 99999 OK\r\n\r\n",
        b"HTTP/9.9 200 OK\r\n\r\n",
        HEAD + b"Content-Length: many\r\n\r\n",
        HEAD + b"Content-Length: -1\r\n\r\n",
        HEAD + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nhello",
        HEAD + b"no colon here\r\n\r\n",
        HEAD + b"X-Long: " + b"x" * 100_000 + b"\r\n\r\n",
        HEAD + b"".join(b"X-%d: x\r\n" % number for number in range(50_000)) + b"\r\n",
    ],
    ids=lambda text: text[:40].decode("latin-1"),
)
async def test_not_http(text: bytes, upstream: OpenUpstream) -> None:
    """What is not HTTP is no answer, and takes a bounded amount of us."""
    async with serving(says(text)) as port:
        with pytest.raises(UpstreamProtocolError):
            await narinfo(upstream(f"http://127.0.0.1:{port}"))


@pytest.mark.parametrize(
    "text",
    [
        b"",
        HEAD,
        HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
        HEAD + b"Transfer-Encoding: chunked\r\n\r\n5\r\nhel",
        HEAD + b"Content-Length: 100\r\n\r\nhello",
    ],
    ids=["nothing", "half a head", "bad chunk", "cut chunk", "short"],
)
async def test_broken_http(text: bytes, upstream: OpenUpstream) -> None:
    """HTTP that breaks off is an upstream that is unavailable or wrong, never an answer."""
    async with serving(says(text)) as port:
        asked = upstream(f"http://127.0.0.1:{port}")
        for ask in ASKS[:-1]:
            with pytest.raises((UpstreamUnavailableError, UpstreamProtocolError)):
                await ask(asked)


@pytest.mark.parametrize(
    "text",
    [
        HEAD + b"Location: /\xff\xfe\r\nContent-Encoding: \xff\r\n\r\n",
        b"HTTP/1.1 302 \xff\r\nLocation: /\xff\xfe\r\n\r\n",
        b"HTTP/1.1 302 Moved\r\nLocation: http://\xff/\r\n\r\n",
    ],
    ids=["coding", "location", "host"],
)
async def test_headers_that_are_not_ascii(text: bytes, upstream: OpenUpstream) -> None:
    """Headers in no encoding are no answer, and what is said about them can be printed."""
    async with serving(says(text)) as port:
        asked = upstream(f"http://127.0.0.1:{port}")
        for ask in ASKS:
            with pytest.raises(UpstreamProtocolError) as caught:
                await ask(asked)
            assert str(caught.value).encode()


async def test_refused(upstream: OpenUpstream, sim: StartSimulator) -> None:
    """A port that nobody listens on is an upstream that is unavailable."""
    cache = await _serving(sim)
    cache.down()
    await raises(UpstreamUnavailableError, upstream(cache.url))


async def test_reset(upstream: OpenUpstream, sim: StartSimulator) -> None:
    """A connection that is reset instead of answered is an upstream that is unavailable."""
    cache = await _serving(sim, Reset())
    await raises(UpstreamUnavailableError, upstream(cache.url))


async def test_unknown_host(upstream: OpenUpstream) -> None:
    """A host that does not exist is an upstream that is unavailable."""
    with pytest.raises(UpstreamUnavailableError, match=r"nonexistent\.invalid"):
        await narinfo(upstream("http://nonexistent.invalid"))
