"""``[policy] mode``: whether upstreams are asked, and whether clients hear what these do wrong."""

from __future__ import annotations

import signal
import urllib.error
import urllib.request
from pathlib import Path

from proxy.events import UpstreamAnswered
from proxy.prefetch import LookAhead
from tests.closures import SigningKey, StoreEntry
from tests.conftest import RunDaemon, RunSimulator, StartSimulator
from tests.faults import Cut, Status
from tests.inside import InsideProxy
from tests.nix_client import NixClient

HERE = StoreEntry.make("here-1.0", b"here\n" * 500)
MISSING = StoreEntry.make("missing-1.0", b"missing\n" * 500, references=(HERE.base_name,))
FILES = (
    MISSING.narinfo_path,
    f"/nar/{MISSING.hash_part}-{MISSING.nar_hash}.nar.xz",
    f"/{MISSING.hash_part}.ls",
    f"/log/{MISSING.hash_part}-missing.drv",
    "/nar/whatever.nar.xz",
)


async def test_offline(sim: StartSimulator, tmp_path: Path, key: SigningKey) -> None:
    """What is here is served, what is not is 404, and upstreams hear nothing, nor is anything remembered."""
    cache = await sim(HERE, MISSING)
    async with InsideProxy(
        tmp_path, cache.url, keys=[key.public], strict=True, look_ahead=LookAhead()
    ) as proxy:
        nar_url = await proxy.nar_url(HERE.hash_part)
        await proxy.pull(nar_url)
        await proxy.idle()
        accepted, asked = cache.accepted, cache.count()
        proxy.failover.asker.offline = True
        for method in ("GET", "HEAD"):
            for path in FILES:
                assert (await proxy.pull(path, method=method)).status == 404, path
        assert await proxy.nar_url(HERE.hash_part) == nar_url
        assert (await proxy.pull(nar_url)).body == bytes(HERE.file)
        await proxy.idle()
        assert (cache.accepted, cache.count()) == (accepted, asked)
        proxy.failover.asker.offline = False
        await proxy.pull(await proxy.nar_url(MISSING.hash_part))
        await proxy.idle()


async def test_offline_without_upstreams(tmp_path: Path, key: SigningKey) -> None:
    """Also where there is nobody to ask, nothing is concluded from not asking."""
    async with InsideProxy(tmp_path, keys=[key.public]) as proxy:
        proxy.failover.asker.offline = True
        assert (await proxy.pull(MISSING.narinfo_path)).status == 404
        assert not proxy.cache.is_absent(f"{MISSING.hash_part}.narinfo")


async def test_a_transfer_that_goes_offline(
    sim: StartSimulator, tmp_path: Path, key: SigningKey
) -> None:
    """What has been connected goes on; what breaks off is not asked for again."""
    large = StoreEntry.make("large-1.0", bytes(range(256)) * 2_000, compression="none")
    cache = await sim(large)
    async with InsideProxy(tmp_path, cache.url, keys=[key.public]) as proxy:
        url = await proxy.nar_url(large.hash_part)
        cache.fault(large.nar_path, GoOffline(proxy), Cut(200_000))
        assert not (await proxy.pull(url)).complete
        assert len(proxy.observed(UpstreamAnswered)) == 2


class GoOffline:
    """The operator's command comes while an answer begins."""

    def __init__(self, proxy: InsideProxy) -> None:
        self._proxy = proxy

    def shape(self, _reply: object, _request: object) -> None:
        """Ask nobody any more."""
        self._proxy.failover.asker.offline = True


def _status(url: str) -> int:
    try:
        with urllib.request.urlopen(url, timeout=60) as answer:  # noqa: S310  # our own
            status: int = answer.status
    except urllib.error.HTTPError as error:
        with error:
            return error.code
    return status


def test_modes_of_the_daemon(
    daemon: RunDaemon, threaded_sim: RunSimulator, nix: NixClient, key: SigningKey
) -> None:
    """The file decides, also when it is read again; metrics, log and page tell."""
    cache = threaded_sim(HERE, MISSING)

    def mode(name: str, ask: str = "") -> str:
        return f'[policy]\nmode = "{name}"\nnegative_ttl = "0s"\n{ask}'

    proxy = daemon(cache.url, config=mode("auto"))
    nix.copy_from(proxy.url, HERE.store_path)
    nix.forget()
    for number, name in enumerate(("offline", "strict", "auto"), start=1):
        proxy.configure(upstreams=[cache.url], keys=[key.public], config=mode(name))
        proxy.signal(signal.SIGHUP)
        assert proxy.wait_for_log("the mode has changed", number)[-1]["mode"] == name
        assert proxy.metric("mode", mode=name) == 1
        assert proxy.metric("mode") == 1
        assert f"<tr><th>Mode<td>{name}\n".encode() in proxy.get("/")
        rule = cache.fault(MISSING.narinfo_path, Status(500))
        asked = cache.count()
        expected = {"offline": 404, "strict": 502, "auto": 404}[name]
        assert _status(proxy.url + MISSING.narinfo_path) == expected
        assert (cache.count() == asked) == (name == "offline")
        rule.lift()
        if name == "offline":
            nix.copy_from(proxy.url, HERE.store_path)
            assert cache.count() == asked
