"""Where a URL leads: RFC 3986 §5, without touching a byte of it."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio
from hypothesis import given
from hypothesis import strategies as st

from proxy.errors import UpstreamProtocolError
from proxy.upstream.reference import resolved
from proxy.upstream.remote import Upstream

BASE = "http://127.0.0.1:8080/team/cache"

_segments = st.sampled_from(["", ".", "..", "...", "a.b", ".a", "http:", "a?b"]) | st.text(
    st.characters(codec="ascii", categories=["L", "N", "P", "S"]), max_size=4
)
references = st.builds("/".join, st.lists(_segments, min_size=1, max_size=4))
"""What narinfos may say, and more: dots, schemes, authorities, queries, empty segments."""


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def upstream() -> AsyncIterator[Upstream]:
    """An upstream in a folder of its host."""
    upstream = Upstream("a", BASE)
    yield upstream
    await upstream.close()


@given(reference=references)
@pytest.mark.asyncio(loop_scope="module")
async def test_references_without_dots_need_no_resolving(
    upstream: Upstream, reference: str
) -> None:
    """A short cut for plain references leads to where the long way does, whatever the reference."""
    try:
        found = upstream.resolve(reference)
    except UpstreamProtocolError:
        return
    assert found == resolved(f"{BASE}/", reference)
