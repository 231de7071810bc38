"""What is known here of store paths: verified narinfos in memory, in the store, and remembered.

Every narinfo is verified when it comes in, from an upstream or from the disk, because keys are replaced
and disks lie. One that does not verify any more is reported, and is then as good as absent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from proxy.errors import DamagedError, NotFoundError, ParseError, StoreError, TrustError
from proxy.events import Forgotten, Observer, Rejected, StoreFailed
from proxy.failover import Failover, Narinfo, Offer, Source
from proxy.nix import narinfo
from proxy.nix.nar_name import NarName
from proxy.nix.narinfo import VerifiedNarInfo
from proxy.nix.store_path import HASH_PART_LENGTH, HashPart
from proxy.recent import Recent
from proxy.store.folder import Store
from proxy.upstream.remote import Upstream

HOT_BYTES = 40 * 2**20
"""Bytes of verified narinfos in memory, parsed and rendered: some 8,000 of them."""

NAMES = 100_000
"""Names of paths that are remembered from References, of about 150 bytes each."""

OBJECTS = 400
"""Bytes that every narinfo takes in memory."""

PARSED = 8
"""Times that it takes its own size besides: as text, as fields, as values, as an answer."""


@dataclass(slots=True)
class KnownPath:
    """A verified narinfo, and the text that clients get of it.

    ``upstream`` is None, and the narinfo's URL our own, when it was read from the store; ``was_from`` is then
    the upstream's name, as far as it is known. ``kept`` tells that its NAR is in the store. ``answer`` is for
    whoever serves it, to keep there what was made of it and when, for as long as it is known.
    """

    info: VerifiedNarInfo
    body: bytes
    upstream: Upstream | None
    kept: bool = False
    was_from: str = ""
    answer: bytearray | None = None
    answered_in: float = -1.0

    @property
    def origin(self) -> str:
        """The upstream's name, or an empty text."""
        return self.was_from if self.upstream is None else self.upstream.name

    @property
    def etag(self) -> str:
        """An ETag of the NAR, made from its content."""
        file_hash = self.info.file_hash
        return f'"{self.info.nar_name}"' if file_hash is None else f'"{file_hash.nix32}"'

    @property
    def source(self) -> Upstream:
        """The upstream, of which the narinfo's URL is.

        Raises:
            NotFoundError: Nobody remembers it.
        """
        if self.upstream is None:
            raise NotFoundError(f"nobody remembers where {self.info.store_path} came from")
        return self.upstream


class KnownPaths:
    """What is known of store paths.

    Args:
        store: What is on the disk.
        failover: The upstreams, whose keys decide what counts.
        observer: Told of what does not verify.
        on_learnt: Called for each path of which an upstream has said something.
    """

    def __init__(
        self,
        store: Store,
        failover: Failover,
        observer: Observer,
        on_learnt: Callable[[HashPart], None] = lambda _hash_part: None,
    ) -> None:
        self._store = store
        self._failover = failover
        self._observer = observer
        self._on_learnt = on_learnt
        self.damages = 0
        """How often something damaged was taken out of the store."""
        self._names: Recent[HashPart, str] = Recent(NAMES)
        self._hot: Recent[HashPart, KnownPath] = Recent(
            HOT_BYTES, weigh=lambda known: OBJECTS + PARSED * len(known.body)
        )
        self.hot = self._hot.peek
        """Returns what is known of a path without looking at the disk; this counts as no use."""

    def use(self, failover: Failover) -> None:
        """Trust the keys of other upstreams from now on."""
        self._failover = failover
        self._hot.clear()

    def touch(self, hash_part: HashPart) -> None:
        """Note that what is in memory of a path is used."""
        self._hot.get(hash_part)

    def name_of(self, hash_part: HashPart) -> str | None:
        """Return the name of a path that something else refers to, where names matter."""
        return self._names.get(hash_part)

    def get(self, hash_part: HashPart) -> KnownPath | None:
        """Return what is known of a path, wherever it is known from."""
        known = self._hot.get(hash_part) or self._stored(hash_part) or self._remembered(hash_part)
        if known is not None:
            self._hot.put(hash_part, known)
        return known

    def elsewhere(self, name: NarName) -> Iterator[KnownPath]:
        """Yield what leads to this NAR at upstreams, what was heard last first."""
        hot = self._hot.get(name.hash_part)
        heard = None if hot is None else hot.upstream
        if hot is not None and heard is not None and hot.info.nar_name == name:
            yield hot
        for source in self._failover.sources:
            if source.upstream is not heard:
                known = self._remembered_of(source, name.hash_part)
                if known is not None and known.info.nar_name == name:
                    yield known

    def etag(self, name: NarName) -> str:
        """Make an ETag from the content: the same while a NAR arrives, when it is here, for ever."""
        known = self.get(name.hash_part)
        return known.etag if known is not None and known.info.nar_name == name else f'"{name}"'

    def kept_size(self, name: NarName) -> int | None:
        """Return how long the file of a NAR in the store should be; None when that is not known."""
        known = self.get(name.hash_part)
        if known is None or not known.kept or known.info.nar_name != name:
            return None
        return known.info.size_on_disk

    def learn(self, offer: Offer[Narinfo]) -> KnownPath:
        """Take in, and remember, what an upstream said."""
        known = _from_upstream(offer.value.info, offer.upstream)
        hash_part = known.info.store_path.hash_part
        self._store.remember_narinfo(offer.upstream.name, hash_part, offer.value.text)
        if self._failover.filters:
            for reference in known.info.references:
                self._names.put(reference.hash_part, reference.name)
        if any(source.upstream is offer.upstream for source in self._failover.sources):
            self._on_learnt(hash_part)
            self._hot.put(hash_part, known)  # else the configuration has changed meanwhile
        return known

    def forget(self, known: KnownPath) -> None:
        """An upstream's narinfo led nowhere, or to something else: know it no longer."""
        hash_part = known.info.store_path.hash_part
        self._hot.drop(hash_part)
        self._store.forget_narinfo(known.origin, hash_part)
        self._observer(Forgotten(hash_part))

    def evicted(self, name: str) -> None:
        """The NAR of this file name is not in the store any more, nor is the narinfo next to it."""
        hash_part = HashPart(name[:HASH_PART_LENGTH])
        known = self._hot.get(hash_part)
        if known is not None and str(known.info.nar_name) == name:
            if known.upstream is None:
                self._hot.drop(hash_part)
            known.kept = False
        self._observer(Forgotten(hash_part))

    def _stored(self, hash_part: HashPart) -> KnownPath | None:
        def recall() -> KnownPath | None:
            text = self._store.narinfo(hash_part)
            if text is None:
                return None
            written = narinfo.parse(text)
            try:
                info = self._failover.trust.verify(written, hash_part)
            except TrustError as error:
                if self._failover.trust.is_changed(written, error):
                    self._store.take_out(hash_part, None, str(error))
                raise
            was_from = self._store.origin(hash_part)
            body = narinfo.format(info, _url(info))
            return KnownPath(info, body, None, kept=True, was_from=was_from)

        return self._if_sound(recall, "", hash_part)

    def _remembered(self, hash_part: HashPart) -> KnownPath | None:
        for source in self._failover.sources:
            known = self._remembered_of(source, hash_part)
            if known is not None:
                return known
        return None

    def _remembered_of(self, source: Source, hash_part: HashPart) -> KnownPath | None:
        upstream = source.upstream

        def recall() -> KnownPath | None:
            text = self._store.remembered_narinfo(upstream.name, hash_part)
            if text is None:
                return None
            info = narinfo.parse(text)
            verified = narinfo.verify(info, hash_part=hash_part, keyring=source.keyring)
            if not source.names.passes(verified.store_path.name):
                return None
            return _from_upstream(verified, upstream)

        return self._if_sound(recall, upstream.name, hash_part)

    def _if_sound(
        self, recall: Callable[[], KnownPath | None], upstream: str, hash_part: HashPart
    ) -> KnownPath | None:
        """What the disk holds and is not sound any more is reported, forgotten, and asked for again."""
        what = f"{hash_part}.narinfo"
        try:
            return recall()
        except TrustError as error:
            self._observer(Rejected(upstream, what, error.kind, str(error)))
        except (ParseError, StoreError) as error:
            if upstream or not isinstance(error, ParseError | DamagedError):
                self._observer(StoreFailed(what, str(error)))
            else:
                self._store.take_out(hash_part, None, str(error))
        if upstream:
            self._store.forget_narinfo(upstream, hash_part)
        return None

    def taken_out(self, hash_part: HashPart) -> None:
        """Something damaged has been taken out of the store: believe nothing that was said of it."""
        self._hot.drop(hash_part)
        self.damages += 1
        self._observer(Forgotten(hash_part))


def _from_upstream(info: VerifiedNarInfo, upstream: Upstream) -> KnownPath:
    return KnownPath(info, narinfo.format(info, _url(info)), upstream)


def _url(info: VerifiedNarInfo) -> str:
    return f"nar/{info.nar_name}"
