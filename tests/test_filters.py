"""``allow`` and ``deny`` of an upstream: which paths come from where, by their names."""

from __future__ import annotations

from fnmatch import fnmatchcase
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.prefetch import LookAhead
from proxy.upstream.names import NameFilter, check_glob
from tests.closures import SigningKey, StoreEntry
from tests.conftest import RunDaemon, RunSimulator, StartSimulator
from tests.inside import InsideProxy

PUBLIC = StoreEntry.make("hello-2.12", b"hello\n" * 500)
PRIVATE = StoreEntry.make("acme-app-1.0", b"acme\n" * 500, references=(PUBLIC.base_name,))


@pytest.mark.parametrize(
    ("allow", "deny", "name", "passes"),
    [
        (None, (), "hello-2.12", True),
        (None, ("hello-*",), "hello-2.12", False),
        (None, ("hello",), "hello-2.12", True),
        (("acme-*",), (), "hello-2.12", False),
        (("acme-*",), (), "acme-app", True),
        (("acme-*", "*-private"), ("*-src",), "tool-private", True),
        (("acme-*",), ("*-src",), "acme-app-src", False),
        (("ACME-*",), (), "acme-app", False),
        (("acme-[ab]?",), (), "acme-b1", True),
        (("acme-[!ab]?",), (), "acme-b1", False),
        (("acme.app",), (), "acme-app", False),
    ],
)
def test_names(
    allow: tuple[str, ...] | None, deny: tuple[str, ...], name: str, passes: object
) -> None:
    """One of allow has to match, as a shell matches, and none of deny."""
    assert NameFilter(allow, deny).passes(name) is passes


_globs = st.text("ab-*?[]!", min_size=1, max_size=8)


@given(
    allow=st.none() | st.lists(_globs, max_size=3),
    deny=st.lists(_globs, max_size=3),
    name=st.text("ab-", max_size=8),
)
def test_any_globs(allow: list[str] | None, deny: list[str], name: str) -> None:
    """Several globs mean what each of them means by itself."""
    allowed = allow is None or any(fnmatchcase(name, glob) for glob in allow)
    denied = any(fnmatchcase(name, glob) for glob in deny)
    assert NameFilter(allow, deny).passes(name) == (allowed and not denied)


@pytest.mark.parametrize("text", ["", "/nix/store/x", "a b", "é*", "a\n", "a[b", "a,b", "{a}"])
def test_what_is_no_glob(text: str) -> None:
    """What could match no name is a mistake."""
    with pytest.raises(ValueError, match=r"is empty|matches no|without"):
        check_glob(text)


def proxy_of(folder: Path, key: SigningKey, *urls: str) -> InsideProxy:
    """Make a proxy whose first upstream is private."""
    names = [NameFilter(("acme-*",)), NameFilter(None, ("acme-*",))]
    return InsideProxy(folder, *urls, keys=[key.public], names=names)


async def test_where_a_path_comes_from(
    sim: StartSimulator, tmp_path: Path, key: SigningKey
) -> None:
    """A narinfo whose name is not wanted from an upstream is one that it does not have."""
    private, public = await sim(PRIVATE, PUBLIC), await sim(PRIVATE, PUBLIC)
    async with proxy_of(tmp_path, key, private.url, public.url) as proxy:
        for entry, upstream in ((PUBLIC, "up1"), (PRIVATE, "up0")):
            answer = await proxy.pull(entry.narinfo_path)
            assert (answer.status, answer.headers["X-Upstream"]) == (200, upstream)
            url = await proxy.nar_url(entry.hash_part)
            assert (await proxy.pull(url)).headers["X-Upstream"] == upstream


async def test_nobody_may_have_it(sim: StartSimulator, tmp_path: Path, key: SigningKey) -> None:
    """What every upstream may not deliver is absent, and remembered as such."""
    private = await sim(PUBLIC)
    async with proxy_of(tmp_path, key, private.url) as proxy:
        for _ in range(2):
            assert (await proxy.pull(PUBLIC.narinfo_path)).status == 404
        assert private.gets(PUBLIC.narinfo_path) == 1


async def test_a_known_name_is_not_asked_for(
    sim: StartSimulator, tmp_path: Path, key: SigningKey
) -> None:
    """References tell names, so an upstream that is not used for one does not even hear of it."""
    private, public = await sim(PRIVATE, PUBLIC), await sim(PRIVATE, PUBLIC)
    async with proxy_of(tmp_path, key, private.url, public.url) as proxy:
        await proxy.nar_url(PRIVATE.hash_part)
        await proxy.nar_url(PUBLIC.hash_part)
        assert private.gets(PUBLIC.narinfo_path) == 0
        assert public.gets(PUBLIC.narinfo_path) == 1


async def test_the_look_ahead_knows_names(
    sim: StartSimulator, tmp_path: Path, key: SigningKey
) -> None:
    """What is looked up ahead is asked only where its name is wanted."""
    private, public = await sim(PRIVATE, PUBLIC), await sim(PRIVATE, PUBLIC)
    names = [NameFilter(("acme-*",)), NameFilter()]
    async with InsideProxy(
        tmp_path,
        private.url,
        public.url,
        keys=[key.public],
        names=names,
        look_ahead=LookAhead(nars=False),
    ) as proxy:
        await proxy.nar_url(PRIVATE.hash_part)
        await proxy.idle()
        assert private.gets(PUBLIC.narinfo_path) == 0
        assert public.gets(PUBLIC.narinfo_path) == 1


def test_a_new_filter(daemon: RunDaemon, threaded_sim: RunSimulator, key: SigningKey) -> None:
    """A filter holds from the file to the wire, also for what was remembered before it was there."""
    cache = threaded_sim(PUBLIC, PRIVATE)
    proxy = daemon(cache.url)
    assert proxy.get(PUBLIC.narinfo_path)
    proxy.stop()
    table = f'[[upstream]]\nname = "up0"\nurl = "{cache.url}"\nallow = ["acme-*"]'
    proxy.configure(upstreams=[], keys=[key.public], config=table)
    proxy.start()
    assert proxy.get(PRIVATE.narinfo_path)
    with pytest.raises(OSError, match="404"):
        proxy.get(PUBLIC.narinfo_path)
