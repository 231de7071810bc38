"""What is said to whoever fetches a whole file for us, in another process: what to ask, and what has to come.

Everything that takes a decision (redirects, credentials, what a status means, who is asked next) stays with
`proxy.upstream.remote`; so an order says all that it takes to send one request.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from proxy.nix.hashes import Hash


@dataclass(frozen=True, slots=True)
class Order:
    """One GET.

    Attributes:
        upstream: The upstream's name, for errors.
        url: As it goes out, byte by byte.
        headers: All of them.
        proxy: The URL of a forward proxy.
        ca_file: Certificates to trust instead of the system's.
        connect_timeout: Seconds to connect.
        read_timeout: Seconds without a byte.
    """

    upstream: str
    url: str
    headers: dict[str, str]
    proxy: str | None
    ca_file: str | None
    connect_timeout: float
    read_timeout: float


@dataclass(frozen=True, slots=True)
class Cargo:
    """The file of a NAR: what it has to be (`proxy.nix.nar.NarVerifier`), and where it is put.

    ``path`` is a new file in the store's folder of partial files.
    """

    path: str
    size: int
    compression: str
    nar_hash: Hash
    nar_size: int
    file_hash: Hash | None


class Head(Protocol):
    """How an answer begins: its status, and what its fields say."""

    @property
    def status(self) -> int:
        """The status code."""

    @property
    def headers(self) -> Mapping[str, str]:
        """The fields."""

    @property
    def content_type(self) -> str:
        """The media type, in lower case."""


@dataclass(frozen=True, slots=True)
class Heading:
    """A `Head` that was told by another process: of its ``headers``, those in `TOLD`."""

    status: int
    headers: dict[str, str]
    content_type: str


LONGEST = 120.0
"""Seconds that one may take, however steadily it arrives; then it is read like any other file. Until then who
waits for it sees nothing, and Nix gives up after 300 (``stalled-download-timeout``)."""

TOLD = ("Location", "Retry-After", "Content-Encoding")

OK = 200

PAGE = "text/html"
"""What no file of a binary cache is, but a page of a login or of maintenance, whatever its status."""


def is_file(head: Head) -> bool:
    """Tell whether a NAR follows, as it is filed: no page, no part, nothing with a content coding."""
    coding = head.headers.get("Content-Encoding", "identity")
    return head.status == OK and head.content_type != PAGE and coding == "identity"


class Carrier(Protocol):
    """Who fetches whole files: `proxy.porter.porter.Porter`."""

    @property
    def at_hand(self) -> bool:
        """Whether it takes orders at the moment."""

    @property
    def has_many(self) -> bool:
        """Whether it carries so many at the moment that they matter as a whole, and none by itself."""

    async def carry(self, order: Order, cargo: Cargo) -> Heading:
        """Send one request; where `is_file` holds, the whole file is at its place when this returns.

        Raises:
            UpstreamError: It could not be asked, or what it sent broke off.
            TrustError: What came is not what it has to be; nothing is at its place.
            StoreError: It could not be written, or the carrier is gone.
        """
        ...
