"""What no trusted key signed reaches no client and no disk, whoever sends it and however."""

from __future__ import annotations

import asyncio
import random
import urllib.error
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from proxy import patience
from proxy.events import NotDecoded, Rejected, UpstreamAnswered
from proxy.fetch import HELD_BACK
from proxy.nix.store_path import parse_hash_part
from proxy.patience import FIRST_ATTEMPTS
from proxy.supply import WHOLE
from tests.blobs import Blob, compress
from tests.closures import (
    ALPHABET,
    COMPRESSIONS,
    SigningKey,
    StoreEntry,
    nix32,
    random_hash_part,
)
from tests.conftest import RunDaemon, RunSimulator, StartSimulator
from tests.faults import Chunked, Corrupt, Fault, Gate, Longer, ShortBody, Shorter
from tests.inside import InsideProxy, Received
from tests.simulator import BinaryCacheSimulator

pytestmark = pytest.mark.timeout(60)

KEY = SigningKey("test-cache-1")
"""The key that the fixtures trust."""

_noise = random.Random(8)
DEPENDENCIES = tuple(sorted(f"{random_hash_part(_noise)}-dep-1.0" for _ in range(3)))
ENTRY = StoreEntry.make("thing-1.0", _noise.randbytes(3_000), references=DEPENDENCIES)
OTHER = StoreEntry.make("other-1.0", _noise.randbytes(3_000))
SMALL = StoreEntry.make(
    "small-1.0", {"bin": _noise.randbytes(4_000), "doc": b"word " * 400}, scheme="uuid"
)
LARGE = StoreEntry.make(
    "large-1.0", {"bin": _noise.randbytes(1_500_000), "doc": b"word " * 100_000}, scheme="uuid"
)
"""Their URLs stay the same whatever is behind them: only a new narinfo says what that is now."""


# --- narinfos ---------------------------------------------------------------------------------


def _one_bit(entry: StoreEntry) -> str:
    digest = bytearray(entry.nar.sha256)
    digest[7] ^= 0x10
    return f"sha256:{nix32(bytes(digest))}"


def _other_hash_part(entry: StoreEntry) -> str:
    other = next(digit for digit in ALPHABET if digit != entry.hash_part[0])
    return f"/nix/store/{other}{entry.base_name[1:]}"


BAD_NARINFOS: dict[str, tuple[str, Callable[[StoreEntry], StoreEntry]]] = {
    "NarHash": ("signature", lambda e: e.but(fields={"NarHash": _one_bit(e)})),
    "NarSize": ("signature", lambda e: e.but(fields={"NarSize": str(len(e.nar) + 1)})),
    "a reference's name": (
        "signature",
        lambda e: e.but(fields={"References": " ".join(e.references).replace("-1.0", "-1.1", 1)}),
    ),
    "one reference less": (
        "signature",
        lambda e: e.but(fields={"References": " ".join(e.references[1:])}),
    ),
    "one reference more": (
        "signature",
        lambda e: e.but(fields={"References": " ".join((*e.references, e.base_name))}),
    ),
    "no references": ("signature", lambda e: e.but(fields={"References": None})),
    "StorePath's name": ("signature", lambda e: e.but(fields={"StorePath": f"{e.store_path}1"})),
    "StorePath's hash": ("store_path", lambda e: e.but(fields={"StorePath": _other_hash_part(e)})),
    "another path's": ("store_path", lambda e: e.but(tamper=lambda _: OTHER.narinfo(KEY))),
    "unknown key": ("signature", lambda e: e.but(signers=(SigningKey("stranger-1"),))),
    "known name, unknown key": (
        "signature",
        lambda e: e.but(signers=(SigningKey(KEY.name, b"another seed of just 32 bytes..."),)),
    ),
    "another path's signature": (
        "signature",
        lambda e: e.but(signers=(), extra=(f"Sig: {KEY.sign(OTHER.fingerprint)}",)),
    ),
    "signature of no bytes": ("signature", lambda e: e.but(signers=(), extra=("Sig: ",))),
    "unsigned": ("signature", lambda e: e.but(signers=())),
}
"""What is wrong with a narinfo → the kind of the refusal, and how it is made."""


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """What breaks off for ever is not taken up again for minutes."""
    monkeypatch.setattr(patience, "ATTEMPTS", FIRST_ATTEMPTS)


@pytest.fixture(params=BAD_NARINFOS)
def bad(request: pytest.FixtureRequest) -> tuple[str, StoreEntry]:
    """Return each bad narinfo, with the kind of its refusal."""
    kind, change = BAD_NARINFOS[request.param]
    return kind, change(ENTRY)


async def test_a_bad_narinfo_is_refused(
    bad: tuple[str, StoreEntry], tmp_path: Path, sim: StartSimulator
) -> None:
    """Clients get 404, the operator the reason, the disk nothing; the upstream is asked again."""
    kind, entry = bad
    cache = await sim(entry)
    async with InsideProxy(tmp_path, cache.url, keys=[KEY.public]) as proxy:
        for attempt in (1, 2):
            status, _, body = await proxy.get(ENTRY.narinfo_path)
            assert status == 404
            assert b"StorePath" not in body
            assert cache.gets(ENTRY.narinfo_path) == attempt
        what = f"{ENTRY.hash_part}.narinfo"
        assert [(e.upstream, e.what, e.kind) for e in proxy.observed(Rejected)] == [
            ("up0", what, kind)
        ] * 2
        assert {e.outcome for e in proxy.observed(UpstreamAnswered)} == {"rejected"}
        assert proxy.kept == set()
        assert proxy.store.remembered_narinfo("up0", parse_hash_part(ENTRY.hash_part)) is None
        cache.publish(ENTRY)
        assert (await proxy.get(ENTRY.narinfo_path))[0] == 200


async def test_a_bad_narinfo_leads_to_no_nar(
    bad: tuple[str, StoreEntry], tmp_path: Path, sim: StartSimulator
) -> None:
    """Whoever asks for the NAR without its narinfo gets it by none that would not be served."""
    _, entry = bad
    cache = await sim(entry)
    async with InsideProxy(tmp_path, cache.url, keys=[KEY.public]) as proxy:
        for method in ("HEAD", "GET"):
            path = f"/nar/{ENTRY.hash_part}-{ENTRY.nar_hash}.nar.xz"
            assert (await proxy.get(path, method=method))[0] == 404
        assert cache.gets("/nar/*") == 0
        assert proxy.kept == set()


async def test_a_liar_does_not_hide_an_honest_cache(
    bad: tuple[str, StoreEntry], tmp_path: Path, sim: StartSimulator
) -> None:
    """What the preferred upstream lies about is taken from the next one."""
    _, entry = bad
    liar, honest = await sim(entry), await sim(ENTRY)
    async with InsideProxy(tmp_path, liar.url, honest.url, keys=[KEY.public]) as proxy:
        status, headers, _ = await proxy.get(ENTRY.narinfo_path)
        assert (status, headers["X-Upstream"]) == (200, "up1")
        answer = await proxy.pull(await proxy.nar_url(ENTRY.hash_part))
        assert answer.body == bytes(ENTRY.file)
        assert liar.gets("/nar/*") == 0


GOOD_NARINFOS: dict[str, Callable[[StoreEntry], StoreEntry]] = {
    "two signatures of one name, the first invalid": lambda e: e.but(
        signers=(), extra=(f"Sig: {KEY.sign(b'else')}", f"Sig: {KEY.sign(e.fingerprint)}")
    ),
    "a stranger's signature first": lambda e: e.but(signers=(SigningKey("stranger-1"), KEY)),
    "a malformed signature first": lambda e: e.but(
        signers=(), extra=("Sig: garbage", f"Sig: {KEY.sign(e.fingerprint)}")
    ),
    "unsorted references": lambda e: e.but(references=e.references[::-1]),
    "FileHash in hex": lambda e: e.but(scheme="cachix"),
    "no FileHash": lambda e: e.but(fields={"FileHash": None}),
    "no FileSize": lambda e: e.but(fields={"FileSize": None}),
    "neither FileHash nor FileSize": lambda e: e.but(fields={"FileHash": None, "FileSize": None}),
    "no References": lambda e: e.but(references=(), fields={"References": None}),
    "empty References": lambda e: e.but(references=()),
    "no Compression": lambda e: e.but(compression="bzip2", fields={"Compression": None}),
    "an unknown field": lambda e: e.but(extra=("Provenance: somewhere",)),
}
"""What is unusual about a narinfo that is fine → how it is made."""


@pytest.mark.parametrize("name", GOOD_NARINFOS)
async def test_an_unusual_narinfo_is_served(name: str, tmp_path: Path, sim: StartSimulator) -> None:
    """What a trusted key signed is served, NAR and all, however the rest is written."""
    entry = GOOD_NARINFOS[name](ENTRY)
    cache = await sim(entry)
    async with InsideProxy(tmp_path, cache.url, keys=[KEY.public]) as proxy:
        answer = await proxy.pull(await proxy.nar_url(entry.hash_part))
        assert (answer.status, answer.complete) == (200, True)
        assert answer.body == bytes(entry.file)
        await proxy.idle()
        assert len(proxy.kept) == 2
        assert not proxy.observed(Rejected)


async def test_an_upstream_may_be_believed_without_signatures(
    tmp_path: Path, sim: StartSimulator
) -> None:
    """`trust = "none"` is about signatures: path and NarHash still have to be right."""
    unsigned = ENTRY.but(signers=(), compression="none")
    cache = await sim(unsigned, OTHER.but(tamper=lambda _: unsigned.narinfo()))
    cache.fault(unsigned.nar_path, Corrupt(500), times=1)
    async with InsideProxy(tmp_path, cache.url, trust=False) as proxy:
        url = await proxy.nar_url(ENTRY.hash_part)
        assert (await proxy.pull(url)).status == 404
        assert (await proxy.pull(url)).body == bytes(unsigned.file)
        assert (await proxy.get(OTHER.narinfo_path))[0] == 404
        assert [e.kind for e in proxy.observed(Rejected)] == ["hash", "store_path"]


def test_refusals_are_counted_and_logged(
    daemon: RunDaemon, threaded_sim: RunSimulator, tmp_path: Path
) -> None:
    """The operator sees each lie in the metrics, by its kind, and in the log, with its author."""
    damaged = SMALL.but(compression="none")
    misplaced = OTHER.but(tamper=lambda _: ENTRY.narinfo(KEY))
    cache = threaded_sim(ENTRY.but(signers=()), damaged, misplaced)
    cache.fault(damaged.nar_path, Corrupt(100))
    proxy = daemon(cache.url)
    proxy.get(SMALL.narinfo_path)
    for path in (
        ENTRY.narinfo_path,
        OTHER.narinfo_path,
        f"/nar/{SMALL.hash_part}-{SMALL.nar_hash}.nar",
    ):
        with pytest.raises(urllib.error.HTTPError, match="404"):
            proxy.get(path)
    refused = {line["what"]: line for line in proxy.wait_for_log("refused", 3)}
    assert {what.partition("-")[0]: line["kind"] for what, line in refused.items()} == {
        f"{ENTRY.hash_part}.narinfo": "signature",
        f"{OTHER.hash_part}.narinfo": "store_path",
        SMALL.hash_part: "hash",
    }
    for line in refused.values():
        assert (line["upstream"], line["level"]) == ("up0", "warning")
    for kind, count in {"signature": 1, "store_path": 1, "hash": 1, "size": 0}.items():
        assert proxy.metric("verification_failures_total", kind=kind) == count
    assert proxy.metric("upstream_requests_total", kind="narinfo", outcome="rejected") == 2


# --- NARs -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Lie:
    """A lie about a NAR under a valid signature.

    Attributes:
        told: Makes the entry that is published instead of the honest one.
        faults: What happens to the file on top.
    """

    told: Callable[[StoreEntry], StoreEntry] = lambda entry: entry
    faults: tuple[Fault, ...] = ()


def _agreeing(change: Callable[[Blob], Blob]) -> Callable[[StoreEntry], StoreEntry]:
    """Let FileHash and FileSize tell the truth about the changed file."""
    return lambda entry: entry.but(served=change(entry.file))


def _packed(change: Callable[[bytes], bytes]) -> Callable[[StoreEntry], StoreEntry]:
    """Let the file be a faultless compression of a changed NAR."""
    return lambda entry: entry.but(served=compress(change(bytes(entry.nar)), entry.compression))


def _vague(entry: StoreEntry) -> StoreEntry:
    """Leave out what is said about the file."""
    return entry.but(fields={"FileHash": None, "FileSize": None})


def _flip(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


LIES: dict[str, Lie] = {
    "same length": Lie(faults=(Corrupt(2_000),)),
    "first byte": Lie(faults=(Corrupt(0),)),
    "last byte": Lie(faults=(Corrupt(-1),)),
    "shorter": Lie(faults=(Shorter(1),)),
    "shorter, in chunks": Lie(faults=(Shorter(1), Chunked())),
    "empty": Lie(faults=(Shorter(1 << 30),)),
    "cut": Lie(faults=(ShortBody(1),)),
    "longer": Lie(faults=(Longer(1),)),
    "longer, in chunks": Lie(faults=(Longer(1), Chunked())),
    "much longer, in chunks": Lie(faults=(Longer(3_000_000), Chunked())),
    "same length, nothing said": Lie(_vague, (Corrupt(2_000),)),
    "shorter, nothing said": Lie(_vague, (Shorter(1),)),
    "shorter, nothing said, in chunks": Lie(_vague, (Shorter(1), Chunked())),
    "longer, nothing said": Lie(_vague, (Longer(9),)),
    "longer, nothing said, in chunks": Lie(_vague, (Longer(9), Chunked())),
    "same length, in agreement": Lie(_agreeing(lambda file: Blob.of(_flip(bytes(file), 2_000)))),
    "truncated, in agreement": Lie(_agreeing(lambda file: file[: len(file) - 1])),
    "truncated by half, in agreement": Lie(_agreeing(lambda file: file[: len(file) // 2])),
    "garbage behind it, in agreement": Lie(_agreeing(lambda file: file + b"garbage")),
    "one bit of the NAR": Lie(_packed(lambda data: _flip(data, len(data) // 2))),
    "first bit of the NAR": Lie(_packed(lambda data: _flip(data, 0))),
    "shorter NAR": Lie(_packed(lambda data: data[:-1])),
    "no NAR": Lie(_packed(lambda _: b"")),
    "longer NAR": Lie(_packed(lambda data: data + b"\0")),
    "much longer NAR": Lie(_packed(lambda data: data + bytes(3_000_000))),
    "two NARs": Lie(_packed(lambda data: data * 2)),
    "another path's NAR": Lie(_packed(lambda _: bytes(OTHER.nar))),
}
"""What is wrong with a NAR → how it is made."""

OF_EACH_COMPRESSION = ("same length", "truncated, in agreement", "one bit of the NAR", "longer NAR")
"""Lies that each decoder has to see through; the others are told of a few compressions only."""

CASES = [
    *((SMALL, compression, lie) for compression in ("none", "xz", "zstd") for lie in LIES),
    *((LARGE, compression, lie) for compression in ("none", "zstd") for lie in LIES),
    *((SMALL, compression, lie) for compression in COMPRESSIONS[3:] for lie in OF_EACH_COMPRESSION),
    *((LARGE, compression, lie) for compression in COMPRESSIONS[3:] for lie in OF_EACH_COMPRESSION),
]

_compressed: dict[tuple[str, str], StoreEntry] = {}


def _as(entry: StoreEntry, compression: str) -> StoreEntry:
    """Return the entry in another compression; the same object for the same one, to pack it once."""
    made = entry.but(compression=compression)
    return _compressed.setdefault((entry.name, compression), made)


async def _refused(
    proxy: InsideProxy, cache: BinaryCacheSimulator, honest: StoreEntry, told: StoreEntry
) -> Received:
    """Ask for the NAR that is lied about, see that it stays out, and that the truth gets in."""
    url = await proxy.nar_url(honest.hash_part)
    answer = await proxy.pull(url)
    await proxy.idle()
    assert not (answer.status == 200 and answer.complete)
    assert proxy.kept == set()
    assert proxy.partials == [] or told.file == honest.file  # the rest may still come
    assert 0 < cache.count(told.nar_path) <= 2 * FIRST_ATTEMPTS
    cache.reset_counts()
    cache.heal()
    proxy.clock.now += 3_600
    cache.publish(honest)
    truth = await proxy.pull(url)
    assert (truth.status, truth.complete) == (200, True)
    assert truth.body == bytes(honest.file)
    assert cache.gets(honest.nar_path) == 1
    await proxy.idle()
    assert len(proxy.kept) == 2
    return answer


@pytest.mark.parametrize(
    ("entry", "compression", "lie"),
    [pytest.param(*case, id=f"{case[0].name} {case[1]} {case[2]}") for case in CASES],
)
async def test_a_bad_nar_is_never_complete(
    entry: StoreEntry, compression: str, lie: str, tmp_path: Path, sim: StartSimulator
) -> None:
    """A client gets 404 or is cut off, nothing is kept, and the next one asks the upstream anew."""
    honest = _as(entry, compression)
    told = LIES[lie].told(honest)
    cache = await sim(told)
    cache.fault(told.nar_path, *LIES[lie].faults)
    async with InsideProxy(tmp_path, cache.url, keys=[KEY.public]) as proxy:
        answer = await _refused(proxy, cache, honest, told)
        if len(told.file) <= WHOLE:
            assert answer.status == 404
        kinds = [event.kind for event in proxy.observed(Rejected)]
        if lie in ("cut", "shorter, in chunks"):
            assert kinds == []  # the rest may still come
        else:
            assert kinds in (["hash"], ["size"], ["encoding"])


@pytest.mark.parametrize("compression", ["none", "zstd", "xz"])
async def test_the_last_piece_of_a_bad_nar_stays_here(
    compression: str, tmp_path: Path, sim: StartSimulator
) -> None:
    """A client of a large bad NAR is cut off where it lacks what no program can do without."""
    honest = _as(LARGE, compression)
    told = LIES["one bit of the NAR"].told(honest)
    cache = await sim(told)
    async with InsideProxy(tmp_path, cache.url, keys=[KEY.public]) as proxy:
        answer = await _refused(proxy, cache, honest, told)
        assert answer.status == 200
        assert int(answer.headers["Content-Length"]) == len(told.file)
        assert bytes(told.file).startswith(answer.body)
        assert len(answer.body) <= len(told.file) - HELD_BACK


def _bomb(entry: StoreEntry) -> Blob:
    """Pack the NAR, and then 200 MB of zeros in 200 frames."""
    return compress(entry.nar + Blob(((bytes(1 << 20), 200),)), entry.compression)


def _one_frame_bomb(entry: StoreEntry) -> Blob:
    """Pack the NAR with 30 MB of zeros behind it, in a single frame."""
    return compress(bytes(entry.nar) + bytes(30_000_000), entry.compression)


BOMBS: dict[str, Callable[[StoreEntry], Blob]] = {"frames": _bomb, "one frame": _one_frame_bomb}


@pytest.mark.parametrize("bomb", BOMBS)
@pytest.mark.parametrize("compression", ["zstd", "xz"])
@pytest.mark.parametrize("entry", [SMALL, LARGE], ids=["small", "large"])
async def test_a_bomb_is_not_unpacked(
    entry: StoreEntry, compression: str, bomb: str, tmp_path: Path, sim: StartSimulator
) -> None:
    """What unpacks to more than NarSize is refused there and then, before the rest has arrived."""
    honest = _as(entry, compression)
    told = honest.but(served=BOMBS[bomb](honest))
    cache = await sim(told)
    cache.fault(told.nar_path, Gate(after=len(told.file) - 500))
    async with InsideProxy(tmp_path, cache.url, keys=[KEY.public]) as proxy:
        await _refused(proxy, cache, honest, told)
        (refusal,) = proxy.observed(Rejected)
        assert refusal.kind == "size"
        assert "NarSize" in refusal.reason


@pytest.mark.parametrize("lie", ["one bit of the NAR", "same length", "longer"])
async def test_all_who_wait_for_a_bad_nar_are_cut_off(
    lie: str, tmp_path: Path, sim: StartSimulator
) -> None:
    """A lie is fetched once, and none of those who wait for it gets it whole."""
    honest = _as(LARGE, "zstd")
    told = LIES[lie].told(honest)
    cache = await sim(told)
    cache.fault(told.nar_path, *LIES[lie].faults)
    async with InsideProxy(tmp_path, cache.url, keys=[KEY.public]) as proxy:
        url = await proxy.nar_url(honest.hash_part)
        answers = await asyncio.gather(*(proxy.pull(url) for _ in range(20)))
        await proxy.idle()
        assert not [a for a in answers if a.status == 200 and a.complete]
        assert proxy.kept == set()


# --- what nothing here reads ------------------------------------------------------------------

LZIP = ENTRY.but(compression="none", fields={"Compression": "lzip"})
"""Its file is no lzip, which nobody notices: that is the point."""


async def test_an_unreadable_compression_is_vouched_for_by_its_file_hash(
    tmp_path: Path, sim: StartSimulator
) -> None:
    """A NAR that nothing here unpacks is checked against FileHash, and the operator is told so."""
    cache = await sim(LZIP)
    cache.fault(LZIP.nar_path, Corrupt(700), times=1)
    async with InsideProxy(tmp_path, cache.url, keys=[KEY.public]) as proxy:
        url = await proxy.nar_url(LZIP.hash_part)
        assert url.endswith(".nar.lzip")
        assert (await proxy.pull(url)).status == 404
        assert (await proxy.pull(url)).body == bytes(LZIP.file)
        assert {event.compression for event in proxy.observed(NotDecoded)} == {"lzip"}


async def test_what_nothing_vouches_for_is_refused(tmp_path: Path, sim: StartSimulator) -> None:
    """A path whose NAR nothing here unpacks, and that has no FileHash, is refused and counted."""
    entry = LZIP.but(fields={"Compression": "lzip", "FileHash": None})
    cache = await sim(entry)
    async with InsideProxy(tmp_path, cache.url, keys=[KEY.public]) as proxy:
        assert (await proxy.get(entry.narinfo_path))[0] == 404
        (refusal,) = proxy.observed(Rejected)
        assert (refusal.upstream, refusal.kind) == ("up0", "unverifiable")
        assert proxy.partials == []
