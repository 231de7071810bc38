"""What is known of store paths: verified when it comes in, from wherever it comes."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from proxy.errors import NotFoundError
from proxy.events import Event, Quarantined, Rejected, StoreFailed
from proxy.failover import Failover, Narinfo, Offer, Source
from proxy.known import KnownPaths
from proxy.nix import narinfo
from proxy.nix.cache_info import CacheInfo
from proxy.nix.nar_name import NarName
from proxy.nix.signature import Keyring, PublicKey
from proxy.nix.store_path import HashPart, parse_hash_part
from proxy.store.folder import Store
from proxy.upstream.remote import Upstream
from tests.closures import SigningKey, StoreEntry

pytestmark = pytest.mark.timeout(60)

KEY, OTHER_KEY = SigningKey("test-cache-1"), SigningKey("test-cache-2")
ENTRY = StoreEntry.make("thing-1.0", random.Random(9).randbytes(100), scheme="uuid")
HASH_PART: HashPart = parse_hash_part(ENTRY.hash_part)
NAME = NarName.parse(f"{ENTRY.hash_part}-{ENTRY.nar_hash}.nar.xz")


class Knowledge:
    """What a daemon knows, with upstreams that nobody asks: nothing listens there.

    Attributes:
        store: Where it is kept.
        events: Everything that was observed, oldest first.
        upstreams: They are named ``up0`` and ``up1``.
        known: What is known.
    """

    def __init__(self, folder: Path, stack: AsyncExitStack) -> None:
        self.events: list[Event] = []
        self.store = Store(folder, CacheInfo(), self.events.append)
        stack.push_async_callback(self.store.close)
        self.upstreams = [Upstream(f"up{n}", f"http://127.0.0.1:{n + 1}") for n in range(2)]
        for upstream in self.upstreams:
            stack.push_async_callback(upstream.close)
        self.known = self.afresh()

    def afresh(self) -> KnownPaths:
        """Return what a daemon knows that has just been started."""
        return KnownPaths(self.store, self.trusting(KEY), self.events.append)

    def trusting(self, *keys: SigningKey, upstreams: Sequence[Upstream] | None = None) -> Failover:
        """Return upstreams, all by default, that are believed with these keys."""
        keyring = Keyring([PublicKey.parse(key.public) for key in keys])
        chosen = self.upstreams if upstreams is None else upstreams
        sources = [Source(upstream, keyring) for upstream in chosen]
        return Failover(sources, budget=1, observer=self.events.append)

    def offer(
        self, upstream: int, entry: StoreEntry = ENTRY, key: SigningKey = KEY
    ) -> Offer[Narinfo]:
        """Return what an upstream said of a path."""
        text = entry.narinfo(key)
        keyring = Keyring([PublicKey.parse(key.public)])
        info = narinfo.verify(narinfo.parse(text), hash_part=HASH_PART, keyring=keyring)
        return Offer(self.upstreams[upstream], Narinfo(info, text))

    async def publish(self, entry: StoreEntry = ENTRY, key: SigningKey = KEY) -> None:
        """Put a path into the store."""
        info = narinfo.parse(entry.narinfo(key))
        partial = self.store.partial()
        partial.append(bytes(entry.file))
        text = narinfo.format(info, f"nar/{info.nar_name}")
        await self.store.publish_nar(info.nar_name, partial, text, origin="up0")

    def remembered(self, upstream: str) -> bytes | None:
        """Return what the disk remembers that an upstream said."""
        return self.store.remembered_narinfo(upstream, HASH_PART)


@pytest.fixture
async def knowledge(tmp_path: Path) -> AsyncIterator[Knowledge]:
    """Return what is known of nothing yet."""
    async with AsyncExitStack() as stack:
        knowledge = Knowledge(tmp_path, stack)
        # The scan at the start removes narinfos without NAR, damaged ones among them.
        assert await asyncio.to_thread(knowledge.store.index.wait_scanned, 20)
        yield knowledge


async def test_nothing_is_known_of_a_new_path(knowledge: Knowledge) -> None:
    """Of a path that nobody spoke about nothing is known, and that is no event."""
    assert knowledge.known.get(HASH_PART) is None
    assert not list(knowledge.known.elsewhere(NAME))
    assert knowledge.known.etag(NAME) == f'"{NAME}"'
    assert knowledge.events == []


async def test_what_was_learnt_is_known(knowledge: Knowledge) -> None:
    """What an upstream said is known at once, and clients get it with our own URL."""
    learnt = knowledge.known.learn(knowledge.offer(0))
    assert knowledge.known.get(HASH_PART) is learnt
    assert list(knowledge.known.elsewhere(NAME)) == [learnt]
    assert learnt.source is knowledge.upstreams[0]
    assert learnt.origin == "up0"
    assert learnt.info.url == ENTRY.nar_path.lstrip("/")
    theirs, ours = ENTRY.narinfo(KEY).splitlines(), learnt.body.splitlines()
    different = [(old, new) for old, new in zip(theirs, ours, strict=True) if old != new]
    assert different == [(f"URL: {learnt.info.url}".encode(), f"URL: nar/{NAME}".encode())]


async def test_what_was_learnt_survives_a_restart(knowledge: Knowledge) -> None:
    """What an upstream said is remembered in its own words, with the URL that leads to the NAR."""
    learnt = knowledge.known.learn(knowledge.offer(1))
    assert knowledge.remembered("up1") == ENTRY.narinfo(KEY)
    for known in (knowledge.afresh().get(HASH_PART), next(knowledge.afresh().elsewhere(NAME))):
        assert known == learnt


async def test_the_preferred_upstream_is_remembered_first(knowledge: Knowledge) -> None:
    """When several upstreams spoke of a path, what the most preferred one said counts."""
    for upstream in (1, 0):
        knowledge.known.learn(knowledge.offer(upstream))
    known = knowledge.afresh().get(HASH_PART)
    assert known is not None
    assert known.origin == "up0"


async def test_what_is_stored_is_known(knowledge: Knowledge) -> None:
    """The narinfo of a path in the store is served as it lies there, and leads to no upstream."""
    await knowledge.publish()
    known = knowledge.known.get(HASH_PART)
    assert known is not None
    assert known.body == knowledge.store.narinfo(HASH_PART)
    assert (known.upstream, known.origin) == (None, "up0")
    with pytest.raises(NotFoundError, match=ENTRY.name):
        _ = known.source
    assert not list(knowledge.known.elsewhere(NAME))


async def test_where_a_stored_path_came_from_may_be_remembered(knowledge: Knowledge) -> None:
    """A path in the store may also be remembered of an upstream, which is where its NAR is again."""
    await knowledge.publish()
    knowledge.store.remember_narinfo("up1", HASH_PART, ENTRY.narinfo(KEY))
    assert knowledge.known.get(HASH_PART) is not None
    (known,) = knowledge.known.elsewhere(NAME)
    assert known.source is knowledge.upstreams[1]


@pytest.mark.parametrize(
    "other",
    [
        ENTRY.but(compression="zstd"),
        StoreEntry.make("thing-1.0", b"other").but(hash_part=HASH_PART),
    ],
    ids=["compression", "contents"],
)
async def test_another_nar_of_the_path_is_not_it(knowledge: Knowledge, other: StoreEntry) -> None:
    """What is known of a path leads only to the NAR that it names, and gives only that its ETag."""
    learnt = knowledge.known.learn(knowledge.offer(0, other))
    assert not list(knowledge.known.elsewhere(NAME))
    assert list(knowledge.known.elsewhere(learnt.info.nar_name)) == [learnt]
    assert knowledge.known.etag(NAME) == f'"{NAME}"'
    assert knowledge.known.etag(learnt.info.nar_name) == f'"{other.file_hash}"'


async def test_the_etag_stays_the_same(knowledge: Knowledge) -> None:
    """The ETag is made of the content: the same before, while and after the NAR is stored."""
    knowledge.known.learn(knowledge.offer(0))
    before = knowledge.known.etag(NAME)
    await knowledge.publish()
    assert before == f'"{ENTRY.file_hash}"'
    assert [known.etag(NAME) for known in (knowledge.known, knowledge.afresh())] == [before] * 2


async def test_without_file_hash_the_name_is_the_etag(knowledge: Knowledge) -> None:
    """Where the upstream says no FileHash, the NAR's name stands for its content."""
    knowledge.known.learn(knowledge.offer(0, ENTRY.but(fields={"FileHash": None})))
    assert knowledge.known.etag(NAME) == f'"{NAME}"'


async def test_what_is_forgotten_is_gone(knowledge: Knowledge) -> None:
    """A narinfo that led nowhere is neither in memory nor on the disk any more."""
    knowledge.known.forget(knowledge.known.learn(knowledge.offer(0)))
    assert knowledge.known.get(HASH_PART) is None
    assert knowledge.remembered("up0") is None
    assert knowledge.afresh().get(HASH_PART) is None


async def test_forgetting_one_upstream_leaves_the_other(knowledge: Knowledge) -> None:
    """What another upstream said of the path still counts."""
    knowledge.known.learn(knowledge.offer(1))
    knowledge.known.forget(knowledge.known.learn(knowledge.offer(0)))
    known = knowledge.known.get(HASH_PART)
    assert known is not None
    assert known.origin == "up1"


# --- keys are replaced and disks lie ----------------------------------------------------------


async def test_a_replaced_key_is_trusted_no_more(knowledge: Knowledge) -> None:
    """What only a key signed that is not trusted any more is refused, reported and forgotten."""
    knowledge.known.learn(knowledge.offer(0))
    knowledge.known.use(knowledge.trusting(OTHER_KEY))
    assert knowledge.known.get(HASH_PART) is None
    (refusal,) = knowledge.events
    assert isinstance(refusal, Rejected)
    assert (refusal.upstream, refusal.kind) == ("up0", "signature")
    assert refusal.what == f"{HASH_PART}.narinfo"
    assert knowledge.remembered("up0") is None


async def test_a_stored_path_needs_a_trusted_key(knowledge: Knowledge) -> None:
    """What is in the store is served only while some upstream's key vouches for it."""
    await knowledge.publish()
    knowledge.events.clear()
    knowledge.known.use(knowledge.trusting(OTHER_KEY))
    assert knowledge.known.get(HASH_PART) is None
    assert [event.kind for event in knowledge.events if isinstance(event, Rejected)] == [
        "signature"
    ]
    knowledge.known.use(knowledge.trusting(OTHER_KEY, KEY))
    assert knowledge.known.get(HASH_PART) is not None


async def test_any_upstream_vouches_for_a_stored_path(knowledge: Knowledge) -> None:
    """A path in the store may have come from any upstream: the keys of one of them will do."""
    await knowledge.publish()
    first, second = knowledge.upstreams
    sources = [
        *knowledge.trusting(OTHER_KEY, upstreams=[first]).sources,
        *knowledge.trusting(KEY, upstreams=[second]).sources,
    ]
    knowledge.known.use(Failover(sources, budget=1, observer=knowledge.events.append))
    assert knowledge.known.get(HASH_PART) is not None


DAMAGE = {
    "cut": ENTRY.narinfo(KEY)[:-40],
    "empty": b"",
    "not text": b"\xff\x00" * 50,
    "another path's": StoreEntry.make("other-1.0").narinfo(KEY),
    "a changed bit": ENTRY.narinfo(KEY).replace(b"NarSize: ", b"NarSize: 1"),
}
"""What a disk may hold in place of a narinfo."""


@pytest.mark.parametrize("damage", DAMAGE)
async def test_a_damaged_memory_is_forgotten(knowledge: Knowledge, damage: str) -> None:
    """What is remembered and is not sound is reported, removed, and as good as absent."""
    knowledge.store.remember_narinfo("up0", HASH_PART, DAMAGE[damage])
    knowledge.store.remember_narinfo("up1", HASH_PART, ENTRY.narinfo(KEY))
    known = knowledge.known.get(HASH_PART)
    assert known is not None
    assert known.origin == "up1"
    (event,) = knowledge.events
    assert isinstance(event, StoreFailed | Rejected)
    assert event.what == f"{HASH_PART}.narinfo"
    assert knowledge.remembered("up0") is None


@pytest.mark.parametrize("damage", DAMAGE)
async def test_a_damaged_narinfo_of_the_store_is_absent(knowledge: Knowledge, damage: str) -> None:
    """What is stored and is not sound goes into quarantine, and the upstream's words count instead."""
    await knowledge.publish()
    knowledge.store.layout.narinfo(HASH_PART).write_bytes(DAMAGE[damage])
    knowledge.events.clear()
    assert knowledge.known.get(HASH_PART) is None
    await asyncio.sleep(0)  # the disk's events come from threads
    assert any(isinstance(event, Quarantined) for event in knowledge.events)
    assert not knowledge.store.layout.narinfo(HASH_PART).exists()
    assert len(list(knowledge.store.layout.quarantine.iterdir())) == 1
    knowledge.known.learn(knowledge.offer(0))
    known = knowledge.known.get(HASH_PART)
    assert known is not None
    assert known.origin == "up0"


async def test_an_unreadable_narinfo_is_absent(knowledge: Knowledge) -> None:
    """A disk that fails is reported; it does not keep us from asking an upstream."""
    knowledge.store.layout.narinfo(HASH_PART).mkdir()
    assert knowledge.known.get(HASH_PART) is None
    (event,) = knowledge.events
    assert isinstance(event, StoreFailed)


# --- the configuration changes ----------------------------------------------------------------


async def test_an_upstream_that_was_dropped_is_not_believed_any_more(knowledge: Knowledge) -> None:
    """What an upstream said that is not configured any more is not known."""
    knowledge.known.learn(knowledge.offer(0))
    knowledge.known.use(knowledge.trusting(KEY, upstreams=knowledge.upstreams[1:]))
    assert knowledge.known.get(HASH_PART) is None
    assert not list(knowledge.known.elsewhere(NAME))


async def test_an_answer_that_comes_after_a_change(knowledge: Knowledge) -> None:
    """What an upstream says that was dropped while it was asked serves only who asked."""
    knowledge.known.use(knowledge.trusting(KEY, upstreams=knowledge.upstreams[1:]))
    learnt = knowledge.known.learn(knowledge.offer(0))
    assert learnt.origin == "up0"
    assert knowledge.known.get(HASH_PART) is None
