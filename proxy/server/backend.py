"""What the server needs of what is behind it, be that in this process or in another one."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection
from typing import Protocol

from proxy.answers import Content, NarAtHand
from proxy.events import Result
from proxy.nix.nar_name import NarName
from proxy.nix.store_path import HashPart
from proxy.server.page import Facts


class HotNarinfo(Protocol):
    """A verified narinfo in memory: `proxy.known.KnownPath`."""

    answer: bytearray | None
    """For the server, to keep there what was made of it."""

    answered_in: float
    """For the server, too: when that was."""

    @property
    def body(self) -> bytes:
        """The text that clients get."""

    @property
    def origin(self) -> str:
        """The upstream's name, or an empty text."""

    @property
    def kept(self) -> bool:
        """Whether its NAR is in the store."""


class Text(Protocol):
    """A narinfo as it goes to a client: `proxy.answers.Text`."""

    @property
    def body(self) -> bytes:
        """The text."""

    @property
    def result(self) -> Result:
        """Where it came from."""

    @property
    def upstream(self) -> str:
        """The upstream's name, or an empty text."""


class Cache(Protocol):
    """Where answers come from: `proxy.cache.Cache`, which says what is raised."""

    @property
    def hot_narinfo(self) -> Callable[[HashPart], HotNarinfo | None]:
        """Returns a path's narinfo if it is in memory; this counts as no use."""

    def recall(self, hash_part: HashPart) -> bool | None:
        """Take a narinfo that is known here into memory, without waiting for the disk.

        Returns:
            Whether it is there now; None when the disk was asked for it.
        """

    def touch_narinfo(self, hash_part: HashPart) -> None:
        """Note that a narinfo in memory is used."""

    @property
    def absent_until(self) -> Callable[[str], float | None]:
        """Returns until when a narinfo (``{hash part}.narinfo``) counts as absent, by `clock`, if it does."""

    @property
    def clock(self) -> Callable[[], float]:
        """Tells the time: seconds on a monotonic clock."""

    def keeps_nar(self, name: NarName) -> bool:
        """Tell whether a NAR is in the store."""

    def nar_at_hand(self, name: NarName, most: int, whole: int) -> NarAtHand | None:
        """Return a NAR of the store that has at most so many bytes, if that takes no waiting.

        Args:
            name: The NAR.
            most: Bytes that it may have.
            whole: Bytes up to which all of it is read; of a larger one its beginning is.

        Raises:
            BlockingIOError: The disk was asked for it, and may have it in memory soon.
        """

    def is_absent(self, key: str) -> bool:
        """Tell whether a narinfo (``{hash part}.narinfo``) is known to be absent, and not here since."""

    @property
    def removals(self) -> int:
        """How often files were taken from the store that somebody may have open."""

    def damaged(self, name: NarName, reason: str) -> None:
        """A NAR of the store turned out to be damaged: see that it is taken out."""

    def used(self, name: NarName) -> None:
        """Note that a NAR of the store was given to somebody past this cache."""

    def used_paths(self, hash_parts: Collection[HashPart]) -> None:
        """Note that the narinfos of paths were given to somebody."""

    async def narinfo(self, hash_part: HashPart) -> Text:
        """Return a path's narinfo."""

    async def nar(self, name: NarName) -> Content:
        """Return a NAR: from the store, or as it arrives."""

    async def nar_head(self, name: NarName) -> Content:
        """Return what `nar` would, without fetching it."""

    async def foreign_nar(self, reference: str) -> Content:
        """Pass on a NAR by a URL that is not ours."""

    async def foreign_nar_head(self, reference: str) -> Content:
        """Return what `foreign_nar` would, without fetching it."""

    async def file(self, path: str) -> Content:
        """Return a listing, log, realisation or debug info."""


class Audience(Protocol):
    """Who is told what clients do: `proxy.prefetch.Prefetch`."""

    def connected(self, name: str) -> None:
        """A client has opened a connection."""

    def disconnected(self, name: str) -> None:
        """A client has closed a connection."""

    def asked_path(self, name: str, hash_part: HashPart) -> None:
        """A client was given a narinfo."""

    def asked_nar(self, name: str) -> None:
        """A client has asked for a NAR."""


class Operations(Protocol):
    """What is told to whoever operates the proxy."""

    def facts(self) -> Awaitable[Facts]:
        """Return what the page says."""

    def metrics(self) -> Awaitable[tuple[bytes, str]]:
        """Return the rendered metrics, and their content type."""

    def check_store(self) -> Awaitable[str]:
        """Find out why the disk keeps nothing; an empty text while it does."""
