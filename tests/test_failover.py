"""Which upstream's answer is taken: the rule by itself, and real upstreams that obey it."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack

import pytest

from proxy.errors import (
    NotFoundError,
    SignatureError,
    UpstreamBrokeOffError,
    UpstreamError,
    UpstreamTimeoutError,
    UpstreamUnavailableError,
    WrongPathError,
)
from proxy.events import Event, Rejected, UpstreamAnswered
from proxy.failover import Failover, Narinfo, Offer, Source, State, Verdict, choose
from proxy.nix import narinfo
from proxy.nix.signature import Keyring, PublicKey
from proxy.nix.store_path import parse_hash_part
from proxy.upstream.answer import Body
from proxy.upstream.breaker import Breaker
from proxy.upstream.remote import Upstream
from tests.closures import SigningKey, StoreEntry
from tests.conftest import StartSimulator
from tests.faults import Cut, Fault, Gate, Html, Reset, Stall, Status
from tests.simulator import BinaryCacheSimulator
from tests.upstream.servers import black_hole

P, H, A, F = State.PENDING, State.HAS, State.ABSENT, State.FAILED

ENTRY = StoreEntry.make("hello-1.0", b"hello\n" * 5_000)
HASH_PART = parse_hash_part(ENTRY.hash_part)

PATIENT = 60.0
"""Seconds: a budget that no test uses up."""


# --- the rule ---------------------------------------------------------------------------------


def rule(states: Sequence[State], *, patient: bool) -> int | Verdict:
    """Say what the design says, in other words than the code.

    The most preferred upstream that has it wins, unless a more preferred one is silent and there is
    patience. When nobody has it: wait for the silent ones; then any failure makes it unknown.
    """
    have = [position for position, state in enumerate(states) if state is H]
    if have:
        return Verdict.WAIT if patient and P in states[: have[0]] else have[0]
    if P in states:
        return Verdict.WAIT
    return Verdict.UNKNOWN if F in states else Verdict.ABSENT


@pytest.mark.parametrize("upstreams", range(5))
def test_every_state(upstreams: int) -> None:
    """Whatever up to four upstreams have said, the decision is the one that the rule makes."""
    for states in itertools.product(State, repeat=upstreams):
        for patient in (True, False):
            assert choose(states, patient=patient) == rule(states, patient=patient), states


@pytest.mark.parametrize(
    ("states", "patient", "decision"),
    [
        ((H, P), True, 0),
        ((P, H), True, Verdict.WAIT),
        ((P, H), False, 1),
        ((A, H), True, 1),
        ((F, H), True, 1),
        ((A, A), True, Verdict.ABSENT),
        ((A, F), True, Verdict.UNKNOWN),
        ((F, A), False, Verdict.UNKNOWN),
        ((A, P), False, Verdict.WAIT),
        ((), True, Verdict.ABSENT),
    ],
)
def test_examples(states: Sequence[State], patient: object, decision: int | Verdict) -> None:
    """The decisions that matter, one by one."""
    assert choose(states, patient=bool(patient)) == decision


@pytest.mark.parametrize("upstreams", [2, 3])
def test_nothing_is_taken_back(upstreams: int) -> None:
    """A decision made with patience stays the same however the silent ones answer in the end."""
    for states in itertools.product(State, repeat=upstreams):
        decision = choose(states, patient=True)
        if decision is Verdict.WAIT:
            continue
        for answers in itertools.product((H, A, F), repeat=upstreams):
            later = [
                answer if state is P else state
                for state, answer in zip(states, answers, strict=True)
            ]
            assert choose(later, patient=True) == decision, (states, later)


# --- real upstreams ---------------------------------------------------------------------------


class Asked:
    """A `Failover` over real upstreams, and what it observed.

    Attributes:
        failover: What is tested.
        events: Everything that it told.
    """

    def __init__(self, *urls: str, budget: float, key: SigningKey) -> None:
        keyring = Keyring([PublicKey.parse(key.public)])
        sources = [Source(Upstream(f"up{number}", url), keyring) for number, url in enumerate(urls)]
        self.events: list[Event] = []
        self.failover = Failover(sources, budget=budget, observer=self._observe)
        self._told = asyncio.Event()

    async def narinfo(self) -> Offer[Narinfo]:
        """Ask for the narinfo of the entry."""
        async with asyncio.timeout(PATIENT):
            return await self.failover.narinfo(HASH_PART)

    @property
    def outcomes(self) -> dict[str, str]:
        """What came of asking each upstream, by its name."""
        return {
            event.upstream: event.outcome
            for event in self.events
            if isinstance(event, UpstreamAnswered)
        }

    async def answered(self, name: str) -> None:
        """Wait until an upstream has answered."""
        async with asyncio.timeout(PATIENT):
            while name not in self.outcomes:
                self._told.clear()
                await self._told.wait()

    def _observe(self, event: Event) -> None:
        self.events.append(event)
        self._told.set()


Ask = Callable[..., Asked]


@pytest.fixture
async def ask(key: SigningKey) -> AsyncIterator[Ask]:
    """Return a function that puts upstreams together, the most preferred first."""
    async with AsyncExitStack() as stack:

        def make(*upstreams: BinaryCacheSimulator | str, budget: float = PATIENT) -> Asked:
            urls = [cache if isinstance(cache, str) else cache.url for cache in upstreams]
            asked = Asked(*urls, budget=budget, key=key)
            stack.push_async_callback(asked.failover.close)
            return asked

        yield make


async def test_all_at_once(sim: StartSimulator, ask: Ask) -> None:
    """No upstream waits for another one to be asked."""
    caches = [await sim(ENTRY) for _ in range(3)]
    gate = Gate(None)
    for cache in caches:
        cache.fault("*", gate)
    asked = ask(*caches)
    offer = asyncio.create_task(asked.narinfo())
    for cache in caches:
        await cache.expect("*.narinfo").wait()
    gate.open()
    assert (await offer).upstream.name == "up0"


async def test_preferred_wins_though_slower(sim: StartSimulator, ask: Ask) -> None:
    """The most preferred upstream that has a path is taken, though another one was faster."""
    slow, fast = await sim(ENTRY), await sim(ENTRY)
    gate = Gate(None)
    slow.fault("*", gate)
    asked = ask(slow, fast)
    offer = asyncio.create_task(asked.narinfo())
    await asked.answered("up1")
    gate.open()
    assert (await offer).upstream.name == "up0"


async def test_preferred_says_no_late(sim: StartSimulator, ask: Ask) -> None:
    """When the preferred upstream turns out not to have it, or fails, the other's answer is taken."""
    for trouble in (Status(404), Status(500), Html(), Reset()):
        slow, fast = await sim(ENTRY), await sim(ENTRY)
        gate = Gate(None)
        slow.fault("*", gate, trouble)
        asked = ask(slow, fast)
        offer = asyncio.create_task(asked.narinfo())
        await asked.answered("up1")
        gate.open()
        assert (await offer).upstream.name == "up1"
        assert asked.outcomes["up1"] == "hit"


async def test_grace(sim: StartSimulator, ask: Ask) -> None:
    """A preferred upstream that stays silent is passed over, long before the budget is used up."""
    stalled, ready = await sim(ENTRY), await sim(ENTRY)
    stalled.fault("*", Stall(None))
    asked = ask(stalled, ready, budget=2.0)
    began = time.monotonic()
    assert (await asked.narinfo()).upstream.name == "up1"
    assert 0.4 < time.monotonic() - began < 1.5
    assert asked.outcomes == {"up1": "hit"}  # the other one may still answer
    await asked.answered("up0")
    assert time.monotonic() - began < 4
    assert asked.outcomes["up0"] == "timeout"


async def test_no_grace_without_need(sim: StartSimulator, ask: Ask) -> None:
    """Nobody waits for a less preferred upstream, nor for one that has already failed."""
    ready, stalled = await sim(ENTRY), await sim(ENTRY)
    stalled.fault("*", Stall(None))
    assert (await ask(ready, stalled).narinfo()).upstream.name == "up0"
    broken = await sim()
    broken.fault("*", Status(503))
    assert (await ask(broken, ready, stalled).narinfo()).upstream.name == "up1"


async def test_absent(sim: StartSimulator, ask: Ask) -> None:
    """It is absent when every upstream has said so."""
    asked = ask(await sim(), await sim(), await sim())
    with pytest.raises(NotFoundError):
        await asked.narinfo()
    assert set(asked.outcomes.values()) == {"absent"}


async def test_no_upstreams(ask: Ask) -> None:
    """With nobody to ask, everything is absent."""
    with pytest.raises(NotFoundError):
        await ask().narinfo()


@pytest.mark.parametrize("failing", [0, 1, 2])
async def test_unknown(failing: int, sim: StartSimulator, ask: Ask) -> None:
    """One upstream that failed makes it unknown, wherever it stands, and it is the one named."""
    caches = [await sim() for _ in range(3)]
    caches[failing].fault("*", Status(503))
    with pytest.raises(UpstreamUnavailableError) as caught:
        await ask(*caches).narinfo()
    assert caught.value.upstream == f"up{failing}"


async def test_budget(sim: StartSimulator, ask: Ask) -> None:
    """What is not answered within the budget is unknown, and the silent upstream is named."""
    with black_hole() as silent:
        asked = ask(await sim(), silent, silent + "/again", budget=0.3)
        began = time.monotonic()
        with pytest.raises(UpstreamTimeoutError) as caught:
            await asked.narinfo()
        assert 0.25 < time.monotonic() - began < 2
        assert caught.value.upstream == "up1"
        await asked.answered("up2")
        assert asked.outcomes == {"up0": "absent", "up1": "timeout", "up2": "timeout"}


@pytest.mark.parametrize("how", [Reset(), Cut(50), Cut(50, reset=True)], ids=repr)
async def test_a_dead_connection_is_no_answer(how: Fault, sim: StartSimulator, ask: Ask) -> None:
    """Who alone may have a path, and whose connection died, is asked once more."""
    cache, poor = await sim(ENTRY), await sim()
    cache.fault(ENTRY.narinfo_path, how, times=1)
    asked = ask(cache, poor)
    assert (await asked.narinfo()).upstream.name == "up0"
    assert (cache.count(), poor.count()) == (2, 1)


async def test_the_second_answer_counts(sim: StartSimulator, ask: Ask) -> None:
    """It counts as the first one would have done, and a second death is the last."""
    poor, dead = await sim(ENTRY), await sim(ENTRY)
    poor.fault("*", Cut(50), times=1)
    poor.fault("*", Status(404))
    with pytest.raises(NotFoundError):
        await ask(poor).narinfo()
    assert poor.count() == 2
    dead.fault("*", Cut(50))
    with pytest.raises(UpstreamBrokeOffError):
        await ask(poor, dead).narinfo()
    assert (poor.count(), dead.count()) == (3, 2)


@pytest.mark.parametrize("fault", [Status(503), Status(403), Html()], ids=repr)
async def test_what_was_answered_is_not_asked_again(
    fault: Fault, sim: StartSimulator, ask: Ask
) -> None:
    """An upstream that says that it cannot, or something strange, is believed."""
    cache = await sim(ENTRY)
    cache.fault("*", fault)
    with pytest.raises(UpstreamError):
        await ask(cache).narinfo()
    assert cache.count() == 1


async def test_nobody_is_asked_again_where_another_has_it(sim: StartSimulator, ask: Ask) -> None:
    """A dead connection costs nobody any time as long as another upstream has the path."""
    dead, well = await sim(ENTRY), await sim(ENTRY)
    dead.fault("*", Cut(50))
    assert (await ask(dead, well).narinfo()).upstream.name == "up1"
    assert dead.count() == 1


# --- trust ------------------------------------------------------------------------------------


async def test_liar_is_passed_over(sim: StartSimulator, ask: Ask) -> None:
    """An answer that does not verify is reported, and counts as a failure of who gave it."""
    liar, honest = await sim(ENTRY, key=SigningKey("unknown-1")), await sim(ENTRY)
    asked = ask(liar, honest)
    assert (await asked.narinfo()).upstream.name == "up1"
    assert asked.outcomes == {"up0": "rejected", "up1": "hit"}
    rejections = [event for event in asked.events if isinstance(event, Rejected)]
    assert [(event.upstream, event.kind) for event in rejections] == [("up0", "signature")]


async def test_liar_alone(sim: StartSimulator, ask: Ask) -> None:
    """When who lies is the only one that has a path, it is unknown, not absent."""
    liar = await sim(ENTRY, key=SigningKey("unknown-1"))
    with pytest.raises(UpstreamError, match="unknown-1"):
        await ask(liar, await sim()).narinfo()


async def test_other_contents(sim: StartSimulator, ask: Ask) -> None:
    """Who has other contents than those that are asked for does not have the path."""
    other = ENTRY.but(nar=StoreEntry.make("other", b"other contents\n").nar)
    here, there = await sim(other), await sim(ENTRY)
    asked = ask(here, there)

    async def with_hash(nar_hash: str) -> str:
        offer = await asked.failover.narinfo(
            HASH_PART, lambda info: info.nar_hash.nix32 == nar_hash
        )
        return offer.upstream.name

    assert await with_hash(ENTRY.nar_hash) == "up1"
    assert await with_hash(other.nar_hash) == "up0"
    with pytest.raises(NotFoundError):
        await with_hash("0" * 52)


async def test_keys_of_any_upstream(key: SigningKey) -> None:
    """What is on the disk verifies by the keys of any upstream, and by nothing else."""
    other = SigningKey("other-1")
    rings = [Keyring([PublicKey.parse(each.public)]) for each in (key, other)]
    upstream = Upstream("up0", "http://127.0.0.1:9")
    try:
        failover = Failover(
            [Source(upstream, ring) for ring in rings], budget=1, observer=lambda _: None
        )
        for signer in (key, other):
            verified = failover.trust.verify(narinfo.parse(ENTRY.narinfo(signer)), HASH_PART)
            assert str(verified.store_path) == ENTRY.store_path
        with pytest.raises(SignatureError):
            failover.trust.verify(narinfo.parse(ENTRY.narinfo(SigningKey("third-1"))), HASH_PART)
        with pytest.raises(WrongPathError):
            failover.trust.verify(narinfo.parse(ENTRY.narinfo(key)), parse_hash_part("0" * 32))
        with pytest.raises(SignatureError):
            Failover([], budget=1, observer=lambda _: None).trust.verify(
                narinfo.parse(ENTRY.narinfo(key)), HASH_PART
            )
    finally:
        await upstream.close()


# --- what is left behind ----------------------------------------------------------------------

Opened = tuple[AsyncExitStack, Body]


async def _open_nar(source: Source) -> Opened:
    stack = AsyncExitStack()
    return stack, await stack.enter_async_context(source.upstream.nar(ENTRY.nar_path))


async def _close(opened: Opened) -> None:
    await opened[0].aclose()


def _tasks() -> set[asyncio.Task[object]]:
    """Return what a `Failover` is still doing."""
    return {task for task in asyncio.all_tasks() if "Failover." in repr(task.get_coro())}


async def test_losers_are_disposed_of(sim: StartSimulator, ask: Ask) -> None:
    """Of the answers that were not taken, those that were there are disposed of, once each."""
    slow, *fast = [await sim(ENTRY) for _ in range(3)]
    gate = Gate(None)
    slow.fault("*", gate)
    asked = ask(slow, *fast)
    discarded: list[Opened] = []

    async def discard(opened: Opened) -> None:
        discarded.append(opened)
        await _close(opened)

    taking = asyncio.create_task(
        asked.failover.first(_open_nar, "nar", ENTRY.nar_path, discard=discard)
    )
    await asked.answered("up1")
    await asked.answered("up2")
    gate.open()
    offer = await taking
    assert offer.upstream.name == "up0"
    assert len(discarded) == 2
    assert offer.value not in discarded
    assert await offer.value[1].read()
    await _close(offer.value)
    assert not _tasks()


async def test_losers_are_cancelled(sim: StartSimulator, ask: Ask) -> None:
    """Upstreams that are still thinking when another one is taken are let go, at once."""
    ready, *stalled = [await sim(ENTRY) for _ in range(3)]
    gate = Gate(None)
    for cache in stalled:
        cache.fault("*", Stall(None))
    ready.fault("*", gate)
    asked = ask(ready, *stalled)
    offer = asyncio.create_task(asked.narinfo())
    for cache in stalled:
        await cache.expect("*.narinfo").wait()
    gate.open()
    assert (await offer).upstream.name == "up0"
    assert asked.outcomes == {"up0": "hit", "up1": "cancelled", "up2": "cancelled"}
    assert not _tasks()


async def test_cancellation(sim: StartSimulator, ask: Ask) -> None:
    """Who stops asking leaves no task behind, and what was already there is disposed of."""
    stalled, ready = await sim(ENTRY), await sim(ENTRY)
    stalled.fault("*", Stall(None))
    asked = ask(stalled, ready)
    discarded: list[Opened] = []

    async def discard(opened: Opened) -> None:
        discarded.append(opened)
        await _close(opened)

    asking = asyncio.create_task(
        asked.failover.first(_open_nar, "nar", ENTRY.nar_path, discard=discard)
    )
    await asked.answered("up1")
    assert _tasks()
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    assert len(discarded) == 1
    assert asked.outcomes == {"up0": "cancelled", "up1": "hit"}
    assert not _tasks()


# --- every order ------------------------------------------------------------------------------


class Script:
    """Asks that answer when they are told to, and as they are told.

    Args:
        answers: What each upstream says in the end.
    """

    def __init__(self, failover: Failover, answers: Sequence[State]) -> None:
        names = [source.upstream.name for source in failover.sources]
        self._answers = dict(zip(names, answers, strict=True))
        self._released = {name: asyncio.Event() for name in names}
        self.names = names

    def release(self, position: int) -> None:
        """Let an upstream answer."""
        self._released[self.names[position]].set()

    async def ask(self, source: Source) -> str:
        """Answer, once released."""
        name = source.upstream.name
        await self._released[name].wait()
        match self._answers[name]:
            case State.HAS:
                return name
            case State.ABSENT:
                raise NotFoundError(name)
            case _:
                raise UpstreamUnavailableError(name, "as the script says")


async def test_every_order(sim: StartSimulator, ask: Ask) -> None:
    """Of three upstreams the same one is taken in whatever order they answer."""
    asked = ask(*(["http://127.0.0.1:9"] * 3))
    for answers in itertools.product((H, A, F), repeat=3):
        for order in itertools.permutations(range(3)):
            await _play(asked.failover, answers, order)
    assert not _tasks()


async def _play(failover: Failover, answers: Sequence[State], order: Sequence[int]) -> None:
    for source in failover.sources:
        source.upstream.breaker = Breaker()  # as if nothing had happened before
    script = Script(failover, answers)
    taking: Awaitable[Offer[str]] = asyncio.ensure_future(
        failover.first(script.ask, "file", "a file")
    )
    for position in order:
        script.release(position)
        for _ in range(5):
            await asyncio.sleep(0)
    match rule(answers, patient=True):
        case int(position):
            assert (await taking).value == script.names[position], (answers, order)
        case Verdict.ABSENT:
            with pytest.raises(NotFoundError):
                await taking
        case _:
            with pytest.raises(UpstreamError):
                await taking


async def test_a_fault_of_our_own(ask: Ask) -> None:
    """An error that no upstream can cause is not taken for an answer, and leaves nothing running."""
    asked = ask(*(["http://127.0.0.1:9"] * 2))

    async def break_down(source: Source) -> None:
        if source.upstream.name == "up1":
            raise ZeroDivisionError
        await asyncio.Event().wait()

    with pytest.raises(ZeroDivisionError):
        await asked.failover.first(break_down, "file", "a file")
    assert not _tasks()
