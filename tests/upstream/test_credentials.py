"""Who we are to an upstream, and to nobody else."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import pytest

from proxy.cli import assembly
from proxy.config import load
from proxy.errors import ConfigError, UpstreamDeniedError
from proxy.events import ignore
from proxy.nix.store_path import parse_hash_part
from proxy.upstream.credentials import Credentials, anonymous, basic, bearer, from_netrc
from proxy.upstream.remote import Upstream
from tests.closures import StoreEntry
from tests.conftest import StartSimulator
from tests.faults import Redirect
from tests.simulator import BinaryCacheSimulator
from tests.upstream.conftest import OpenUpstream

OWN, ELSEWHERE = True, False
"""Whether a request goes to the configured origin."""

ENTRY = StoreEntry.make("private-1.0", b"private\n" * 100)


def basic_header(user: str, password: str) -> str:
    """Write an ``Authorization`` header as RFC 7617 has it."""
    return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()


def netrc(tmp_path: Path, text: str) -> Credentials:
    """Read a netrc file with this text."""
    file = tmp_path / "netrc"
    file.write_text(text)
    return from_netrc(file)


def authorizations(cache: BinaryCacheSimulator) -> list[str | None]:
    """Return the ``Authorization`` of each request that came, in order."""
    return [request.headers.get("Authorization") for request in cache.requests]


async def ask_everything(upstream: Upstream) -> None:
    """Ask for a narinfo, a NAR, its size and another file."""
    info, _ = await upstream.narinfo(parse_hash_part(ENTRY.hash_part))
    async with upstream.nar(info.url) as body:
        assert await body.read()
    assert await upstream.nar_size(info.url) == len(ENTRY.file)
    async with upstream.file("nix-cache-info") as body:
        await body.copy_decoded(lambda _piece: None)


# --- what is said -----------------------------------------------------------------------------


def test_anonymous() -> None:
    """Without credentials nothing is said to anybody."""
    assert anonymous("cache.example.org", OWN) is None  # type: ignore[func-returns-value]


@pytest.mark.parametrize(
    ("credentials", "header"),
    [
        (bearer("eyJhbGciOi.J9_-~+/="), "Bearer eyJhbGciOi.J9_-~+/="),
        (basic("user", "pass:word"), basic_header("user", "pass:word")),
        (basic("", "token"), basic_header("", "token")),
        (basic("jürgen", "größe"), basic_header("jürgen", "größe")),
    ],
    ids=["bearer", "basic", "no user", "not ASCII"],
)
def test_own_origin_only(credentials: Credentials, header: str) -> None:
    """A token, or a user and password, are said to the upstream's own origin alone."""
    assert credentials("cache.example.org", OWN) == header
    assert credentials("cache.example.org", ELSEWHERE) is None


def test_netrc_hosts(tmp_path: Path) -> None:
    """Each entry of a netrc file is for the host it names, wherever the request comes from."""
    credentials = netrc(
        tmp_path,
        "machine a.example.org login u password p\nmachine b.example.org\nlogin v\npassword q\n",
    )
    for is_own in (OWN, ELSEWHERE):
        assert credentials("a.example.org", is_own) == basic_header("u", "p")
        assert credentials("b.example.org", is_own) == basic_header("v", "q")
        assert credentials("c.example.org", is_own) is None
        assert credentials("example.org", is_own) is None


def test_netrc_default(tmp_path: Path) -> None:
    """The ``default`` entry is for the upstream itself, not for wherever it sends us."""
    credentials = netrc(
        tmp_path, "machine a.example.org login u password p\ndefault login d password e\n"
    )
    assert credentials("other.example.org", OWN) == basic_header("d", "e")
    assert credentials("other.example.org", ELSEWHERE) is None
    assert credentials("a.example.org", OWN) == basic_header("u", "p")


def test_netrc_host_in_any_case(tmp_path: Path) -> None:
    """Hosts are compared as curl compares them, whatever their case."""
    credentials = netrc(tmp_path, "machine Cache.Example.ORG login u password p\n")
    assert credentials("cache.example.org", ELSEWHERE) == basic_header("u", "p")


def test_netrc_without_a_login(tmp_path: Path) -> None:
    """An entry with a password alone is one for an empty user, as Cachix writes it."""
    credentials = netrc(tmp_path, "machine a.example.org password token\n")
    assert credentials("a.example.org", OWN) == basic_header("", "token")


@pytest.mark.parametrize("text", ["machine", "machine a.example.org\nlogn u\n", "hello"])
def test_bad_netrc(text: str, tmp_path: Path) -> None:
    """What is no netrc file is refused with file and line, and without its contents' secrets."""
    with pytest.raises(ValueError, match=r"netrc:\d+: "):
        netrc(tmp_path, text)


def test_no_netrc(tmp_path: Path) -> None:
    """A netrc file that is not there is said to be missing."""
    with pytest.raises(OSError, match="nowhere"):
        from_netrc(tmp_path / "nowhere")


# --- who hears it -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("credentials", "header"),
    [(bearer("token"), "Bearer token"), (basic("u", "p"), basic_header("u", "p"))],
    ids=["bearer", "basic"],
)
async def test_said_with_every_request(
    credentials: Credentials, header: str, sim: StartSimulator, upstream: OpenUpstream
) -> None:
    """An upstream that lets in only us answers everything."""
    cache = await sim(ENTRY)
    cache.require_auth = header
    await ask_everything(upstream(cache.url, credentials=credentials))
    assert authorizations(cache) == [header] * 4


async def test_wrong_credentials(sim: StartSimulator, upstream: OpenUpstream) -> None:
    """Credentials that the upstream refuses are named as the trouble, and are not in the message."""
    cache = await sim(ENTRY)
    cache.require_auth = "Bearer another"
    asked = upstream(cache.url, credentials=bearer("s3cr3t"))
    with pytest.raises(UpstreamDeniedError, match="credentials") as caught:
        await asked.narinfo(parse_hash_part(ENTRY.hash_part))
    assert "s3cr3t" not in f"{caught.value!r} {caught.value} {asked!r}"


async def test_another_port_is_another_origin(sim: StartSimulator, upstream: OpenUpstream) -> None:
    """A redirect to another port of the same host takes no credentials along, and one back does."""
    there, here = await sim(ENTRY), await sim(ENTRY)
    here.fault(ENTRY.nar_path, Redirect(f"{there.url}{ENTRY.nar_path}"))
    there.fault(ENTRY.nar_path, Redirect(f"{here.url}/back.nar"))
    here.files["/back.nar"] = (b"found", {})
    asked = upstream(here.url, credentials=bearer("token"))
    async with asked.nar(ENTRY.nar_path) as body:
        assert await body.read() == b"found"
    assert authorizations(here) == ["Bearer token", "Bearer token"]
    assert authorizations(there) == [None]


async def test_another_name_is_another_origin(sim: StartSimulator, upstream: OpenUpstream) -> None:
    """The same server by another name is another origin, also in a narinfo's URL."""
    cache = await sim(ENTRY)
    asked = upstream(cache.url, credentials=bearer("token"))
    url = f"http://localhost:{cache.port}{ENTRY.nar_path}"
    async with asked.nar(url) as body:
        assert await body.read()
    assert await asked.nar_size(url) == len(ENTRY.file)
    assert authorizations(cache) == [None, None]


async def test_own_origin_by_an_absolute_url(sim: StartSimulator, upstream: OpenUpstream) -> None:
    """A narinfo's absolute URL at the upstream itself is asked for with credentials."""
    cache = await sim(ENTRY.but(scheme="absolute"))
    await ask_everything(upstream(cache.url, credentials=bearer("token")))
    assert authorizations(cache) == ["Bearer token"] * 4


@pytest.mark.parametrize(
    ("entries", "heard"),
    [
        ("machine localhost login b password q", basic_header("b", "q")),
        ("default login d password e", None),
        ("machine elsewhere.example.org login b password q", None),
    ],
    ids=["its own", "default", "another's"],
)
async def test_netrc_after_a_redirect(
    entries: str,
    heard: str | None,
    sim: StartSimulator,
    upstream: OpenUpstream,
    tmp_path: Path,
) -> None:
    """Where a redirect leads hears of a netrc file what is meant for it, and nothing else."""
    there, here = await sim(ENTRY), await sim(ENTRY)
    here.fault("/nar/", Redirect(f"http://localhost:{there.port}{ENTRY.nar_path}"))
    credentials = netrc(tmp_path, f"machine 127.0.0.1 login a password p\n{entries}\n")
    await ask_everything(upstream(here.url, credentials=credentials))
    assert set(authorizations(here)) == {basic_header("a", "p")}
    assert authorizations(there) == [heard, heard]


@pytest.mark.parametrize("secret", ["to\nken", "to\r\nX-Injected: 1", "to\0ken", ""])
async def test_unspeakable_token(secret: str, tmp_path: Path) -> None:
    """A file whose token no header can hold is refused at the start, without being repeated."""
    token = tmp_path / "token"
    token.write_text(secret)
    config = tmp_path / "config.toml"
    config.write_text(
        '[[upstream]]\nname = "private"\nurl = "http://127.0.0.1:9"\n'
        f"auth = {{ bearer_file = {json.dumps(str(token))} }}\n"
    )
    with pytest.raises(ConfigError, match="private") as caught:
        await assembly.failover(load(config), ignore)
    assert not secret or secret not in str(caught.value)
