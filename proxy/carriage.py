"""NARs that another process fetches whole: which they are, and how that is asked for."""

from __future__ import annotations

from proxy.asking import Asker, Question
from proxy.errors import StoreError, TrustError, UpstreamBrokeOffError
from proxy.places import Place, Readers
from proxy.supply import WHOLE
from proxy.upstream.breaker import State


def landing_for(place: Place, readers: Readers) -> str | None:
    """Return where a file may be put by another process; None where it has to be read here.

    Whoever waits for more than a small file is to see it arrive. Where nobody does yet, one of many is put
    there all the same, and who comes for it meanwhile waits for its end. An upstream that is asked again
    after a failure has to answer soon, which only the beginning of an answer tells.
    """
    promise, upstream = place.promise, place.upstream
    if promise.cargo is None or promise.size is None:
        return None
    if upstream.carrier is None or upstream.breaker.state is not State.CLOSED:
        return None
    if promise.size > WHOLE and not upstream.carrier.has_many:
        return None
    if not _may_be_whole(place, readers):
        return None
    return readers.landing if upstream.carrier.at_hand else None


def _may_be_whole(place: Place, readers: Readers) -> bool:
    return (place.promise.size or 0) <= WHOLE or not readers.are_waiting


async def carry(asker: Asker, what: str, place: Place, readers: Readers, landing: str) -> None:
    """Have a NAR put somewhere, verified.

    A large one that breaks off is not held against its upstream, which did deliver: it is read next.

    Raises:
        TrustError: What came is not what was promised.
        NotFoundError: It is not there.
        UpstreamError: It could not be had.
        StoreError: It could not be written, or there is nobody to do it any more.
    """
    if place.promise.cargo is None:
        raise StoreError("it is too much to be carried")
    cargo = place.promise.cargo(landing)
    wrong: TrustError | None = None
    broken: UpstreamBrokeOffError | None = None
    async with asker.asking(place.upstream, Question("nar", what)) as ticket:
        try:
            await place.upstream.carry(place.url, cargo, lambda: _may_be_whole(place, readers))
        except TrustError as error:
            wrong = error  # it did answer
        except UpstreamBrokeOffError as error:
            if cargo.size <= WHOLE:
                raise
            broken = error
    if broken is not None:
        raise broken
    asker.ended(place.upstream, ticket, wrong)
    if wrong is not None:
        raise wrong
