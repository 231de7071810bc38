"""Several processes that accept clients are one proxy: one fetch, one set of numbers, one life."""

from __future__ import annotations

import asyncio
import os
import random
import re
import signal
import socket
import tempfile
from collections.abc import Iterable, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.closures import SigningKey, StoreEntry
from tests.conftest import RunDaemon, RunSimulator
from tests.daemon import DaemonProcess
from tests.faults import Corrupt, Gate
from tests.small_disk import fill, small_disk
from tests.test_systemd_protocol import passing
from tests.wire import Answer, Wire, until

SMALL = StoreEntry.make("small-1.0", random.Random(1).randbytes(3_000), compression="none")
LARGE = StoreEntry.make("large-1.0", random.Random(2).randbytes(1 << 20), compression="none")
MISSING = StoreEntry.make("missing-1.0")

MIDDLE = 500_000
"""Bytes after which a gate stands in the way of `LARGE`."""


def nar_target(entry: StoreEntry) -> str:
    """Return the target under which the proxy has an entry's NAR; these are not compressed."""
    return f"/nar/{entry.hash_part}-{entry.nar_hash}.nar"


def server_of(proxy: DaemonProcess, wire: Wire) -> int:
    """Return the process that has the other end of a TCP connection: see proc_net_tcp(5)."""
    port = urlsplit(proxy.url).port
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        fields = line.split()
        local, remote = (int(each.split(":")[1], 16) for each in fields[1:3])
        if (local, remote) == (port, wire.port):
            owners = [pid for pid in proxy.children if f"socket:[{fields[9]}]" in open_files(pid)]
            assert len(owners) == 1, owners
            return owners[0]
    raise AssertionError("nobody has the other end")


def open_files(pid: int) -> set[str]:
    """Return what the descriptors of a process stand for."""
    found = set()
    for link in Path(f"/proc/{pid}/fd").iterdir():
        try:
            found.add(str(link.readlink()))
        except FileNotFoundError:  # closed meanwhile
            continue
    return found


async def connections(
    stack: AsyncExitStack, proxy: DaemonProcess, *, each: int = 1
) -> dict[int, list[Wire]]:
    """Connect until every worker has at least so many of the connections; return them by worker."""
    found: dict[int, list[Wire]] = {pid: [] for pid in proxy.children}
    for _ in range(64 * len(found) * each):
        if min(map(len, found.values())) >= each:
            return found
        wire = await stack.enter_async_context(Wire(proxy.url))
        assert (await wire.ask("/healthz")).status == 200  # accepted, so that it has an owner
        found[server_of(proxy, wire)].append(wire)
    raise AssertionError(f"connections are not spread: {found}")


def one_each(found: dict[int, list[Wire]]) -> list[Wire]:
    """Return one connection to each worker."""
    return [wires[0] for wires in found.values()]


async def ask_all(wires: Iterable[Wire], target: str) -> list[Answer]:
    """Ask for the same over all connections at once."""
    return list(await asyncio.gather(*(wire.ask(target) for wire in wires)))


def is_alive(pid: int) -> bool:
    """Tell whether a process runs; one that has ended and that nobody has waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


# --- one fetch ----------------------------------------------------------------------------------


async def test_one_fetch_for_all_workers(threaded_sim: RunSimulator, daemon: RunDaemon) -> None:
    """200 clients over 4 workers read a NAR while it arrives, and it is fetched once."""
    upstream = threaded_sim(LARGE)
    gate = Gate(MIDDLE)
    upstream.fault(LARGE.nar_path, gate)
    proxy = daemon(upstream.url, workers=4)
    async with AsyncExitStack() as stack:
        found = await connections(stack, proxy)
        wires = [wire for each in found.values() for wire in each]
        while len(wires) < 200:
            wires.append(await stack.enter_async_context(Wire(proxy.url)))

        async def begin(wire: Wire) -> tuple[Answer, bytes]:
            await wire.send(wire.request(nar_target(LARGE)))
            return await wire.head(), await wire.some(MIDDLE // 2)

        begun = await asyncio.gather(*map(begin, wires))
        assert {head.status for head, _ in begun} == {200}
        assert {head.headers["etag"] for head, _ in begun} == {f'"{LARGE.file_hash}"'}
        results = [head.headers["x-cache"] for head, _ in begun]
        assert results.count("MISS") == 1
        assert results.count("COALESCED") == len(wires) - 1

        gate.open()
        rest = len(LARGE.file) - MIDDLE // 2
        for (_, first), second in zip(
            begun, await asyncio.gather(*(wire.some(rest) for wire in wires)), strict=True
        ):
            assert first + second == bytes(LARGE.file)
    assert upstream.gets(LARGE.nar_path) == 1


async def test_one_question_for_all_workers(threaded_sim: RunSimulator, daemon: RunDaemon) -> None:
    """A narinfo that clients of all workers want at once is asked for once."""
    upstream = threaded_sim(SMALL)
    gate = Gate(None)
    upstream.fault(SMALL.narinfo_path, gate)
    proxy = daemon(upstream.url, workers=2)
    async with AsyncExitStack() as stack:
        wires = one_each(await connections(stack, proxy))
        answers = asyncio.create_task(ask_all(wires, SMALL.narinfo_path))
        await gate.reached.wait()
        gate.open()
        bodies = {answer.body for answer in await answers}
    assert len(bodies) == 1
    assert upstream.gets(SMALL.narinfo_path) == 1


async def test_a_bad_nar_is_complete_nowhere(threaded_sim: RunSimulator, daemon: RunDaemon) -> None:
    """A NAR that is not what was signed is cut for the readers at every worker, before its end."""
    upstream = threaded_sim(LARGE)
    gate = Gate(MIDDLE)
    upstream.fault(LARGE.nar_path, Corrupt(-1), gate)
    proxy = daemon(upstream.url, workers=2)
    async with AsyncExitStack() as stack:
        wires = one_each(await connections(stack, proxy, each=1))
        for wire in wires:
            await wire.send(wire.request(nar_target(LARGE)))
            assert (await wire.head()).status == 200
        gate.open()
        for rest in await asyncio.gather(*(wire.rest() for wire in wires)):
            assert len(rest) < len(LARGE.file)
            assert bytes(LARGE.file).startswith(rest)
    assert proxy.metric("responses_cut_total") == 2
    assert proxy.metric("verification_failures_total", kind="hash") == 1


async def test_a_client_that_leaves_takes_nothing_away(
    threaded_sim: RunSimulator, daemon: RunDaemon
) -> None:
    """When all clients of one worker leave in the middle, those of the others read on."""
    upstream = threaded_sim(LARGE)
    gate = Gate(MIDDLE)
    upstream.fault(LARGE.nar_path, gate)
    proxy = daemon(upstream.url, workers=2)
    async with AsyncExitStack() as stack:
        stays, leaves = one_each(await connections(stack, proxy))
        for wire in (leaves, stays):
            await wire.send(wire.request(nar_target(LARGE)))
            assert (await wire.head()).status == 200
        await leaves.__aexit__(None, None, None)
        gate.open()
        assert await stays.some(len(LARGE.file)) == bytes(LARGE.file)
    assert upstream.gets(LARGE.nar_path) == 1


async def test_ranges_and_heads_of_what_arrives(
    threaded_sim: RunSimulator, daemon: RunDaemon
) -> None:
    """A range and a HEAD of a NAR that arrives through another worker are answered."""
    upstream = threaded_sim(LARGE)
    gate = Gate(MIDDLE)
    upstream.fault(LARGE.nar_path, gate)
    proxy = daemon(upstream.url, workers=2)
    async with AsyncExitStack() as stack:
        first, second = one_each(await connections(stack, proxy))
        await first.send(first.request(nar_target(LARGE)))
        assert (await first.head()).status == 200
        head = await second.ask(nar_target(LARGE), method="HEAD")
        await second.send(second.request(nar_target(LARGE), "Range: bytes=1000-1999"))
        assert (await second.head()).status == 206
        early = await second.some(999)  # the last byte comes when all of it has been verified
        gate.open()
        assert early + await second.some(1) == bytes(LARGE.file)[1000:2000]
    assert head.headers["content-length"] == str(len(LARGE.file))
    assert upstream.gets(LARGE.nar_path) == 1


async def test_every_kind_of_file_comes_through(
    threaded_sim: RunSimulator, daemon: RunDaemon
) -> None:
    """A listing, a NAR by an upstream's own URL, and heads of both are passed on by any worker."""
    upstream = threaded_sim(SMALL)
    listing = f"/{SMALL.hash_part}.ls"
    upstream.files[listing] = (b'{"version":1}', {"Content-Type": "application/json"})
    proxy = daemon(upstream.url, workers=2)
    async with AsyncExitStack() as stack:
        for wire in one_each(await connections(stack, proxy)):
            assert (await wire.ask(listing)).body == b'{"version":1}'
            assert (await wire.ask(listing, method="HEAD")).headers["content-length"] == "13"
            assert (await wire.ask(SMALL.nar_path)).body == bytes(SMALL.file)
            size = str(len(SMALL.file))
            head = await wire.ask(SMALL.nar_path, method="HEAD")
            assert head.headers["content-length"] == size
            head = await wire.ask(nar_target(SMALL), method="HEAD")
            assert head.headers["content-length"] == size
            assert (await wire.ask(MISSING.narinfo_path)).status == 404
            assert (await wire.ask(nar_target(MISSING))).status == 404
    assert upstream.gets(listing) == 1


async def test_workers_know_where_a_path_is_from(
    threaded_sim: RunSimulator, daemon: RunDaemon
) -> None:
    """What a worker serves from the store names its upstream as the core's answer did."""
    proxy = daemon(threaded_sim(SMALL).url, workers=2)
    async with Wire(proxy.url) as wire:
        names = {(await wire.ask(SMALL.narinfo_path)).headers["x-upstream"]}
        names.add((await wire.ask(nar_target(SMALL))).headers["x-upstream"])
    proxy.wait_for_log("stored")
    proxy.stop()
    proxy.start()
    async with AsyncExitStack() as stack:
        for wire in one_each(await connections(stack, proxy)):
            for target in (SMALL.narinfo_path, nar_target(SMALL)):
                answer = await wire.ask(target)
                assert answer.headers["x-cache"] == "HIT"
                names.add(answer.headers["x-upstream"])
    assert len(names) == 1


@pytest.mark.parametrize("when", ["before", "middle"])
async def test_a_full_disk_is_no_obstacle(
    when: str, threaded_sim: RunSimulator, daemon: RunDaemon, tmp_path: Path
) -> None:
    """What the disk does not take comes through memory, to clients of all workers, and once."""
    huge = StoreEntry.huge("huge-1.0", 20 << 20)
    upstream = threaded_sim(huge)
    gate = Gate(MIDDLE)
    upstream.fault(huge.nar_path, gate)
    (tmp_path / "daemon0").mkdir()
    with small_disk(tmp_path / "daemon0" / "store", size=8 << 20) as disk:
        proxy = daemon(upstream.url, workers=2)
        async with AsyncExitStack() as stack:
            if when == "before":
                fill(disk)
            first, second = one_each(await connections(stack, proxy))
            answers = asyncio.gather(first.ask(nar_target(huge)), second.ask(nar_target(huge)))
            await gate.reached.wait()
            gate.open()
            for answer in await answers:
                assert (answer.status, answer.complete) == (200, True)
                assert answer.body == bytes(huge.file)
            proxy.kill()
    assert upstream.gets(huge.nar_path) == 1


# --- what each worker knows ---------------------------------------------------------------------


async def heat(proxy: DaemonProcess, wires: Sequence[Wire], entry: StoreEntry) -> None:
    """Have a path in the store, and in the memory of every worker."""
    for wire in wires:
        assert (await wire.ask(entry.narinfo_path)).status == 200
    for number, wire in enumerate(wires):
        assert (await wire.ask(nar_target(entry))).body == bytes(entry.file)
        if number == 0:
            proxy.wait_for_log("stored")
    for wire in wires:
        for target in (entry.narinfo_path, nar_target(entry)) * 2:
            assert (await wire.ask(target)).headers["x-cache"] == "HIT"


async def test_hits_need_nobody(threaded_sim: RunSimulator, daemon: RunDaemon) -> None:
    """What is in the store is served by every worker while the core does nothing at all."""
    upstream = threaded_sim(SMALL)
    proxy = daemon(upstream.url, workers=2)
    async with AsyncExitStack() as stack:
        wires = one_each(await connections(stack, proxy))
        first, second = wires
        assert (await first.ask(nar_target(SMALL))).body == bytes(SMALL.file)
        proxy.wait_for_log("stored")
        proxy.signal(signal.SIGSTOP)
        try:
            for wire in (first, second) * 2:  # the second worker has never heard of it
                assert (await wire.ask(SMALL.narinfo_path)).headers["x-cache"] == "HIT"
                assert (await wire.ask(nar_target(SMALL))).body == bytes(SMALL.file)
                assert (await wire.ask("/healthz")).status == 200
        finally:
            proxy.signal(signal.SIGCONT)


async def test_an_absence_ends_at_every_worker(
    threaded_sim: RunSimulator, daemon: RunDaemon
) -> None:
    """A path that comes into being is found by all workers when its absence has run out."""
    upstream = threaded_sim()
    proxy = daemon(upstream.url, workers=2, config='[policy]\nnegative_ttl = "1s"')
    async with AsyncExitStack() as stack:
        wires = one_each(await connections(stack, proxy))
        for _ in range(2):
            for answer in await ask_all(wires, SMALL.narinfo_path):
                assert answer.status == 404
        assert upstream.gets(SMALL.narinfo_path) == 1
        upstream.publish(SMALL)
        async with asyncio.timeout(20):
            for wire in wires:
                while (await wire.ask(SMALL.narinfo_path)).status != 200:  # noqa: ASYNC110
                    await asyncio.sleep(0.05)


async def test_keys_taken_away_count_nowhere(threaded_sim: RunSimulator, daemon: RunDaemon) -> None:
    """After a reload without a key, no worker serves from memory or store what that key signed."""
    upstream = threaded_sim(SMALL)
    proxy = daemon(upstream.url, workers=2)
    async with AsyncExitStack() as stack:
        wires = one_each(await connections(stack, proxy))
        await heat(proxy, wires, SMALL)
        proxy.configure(
            upstreams=[upstream.url],
            keys=[SigningKey("other-1").public],
            config='[policy]\nupstream_down = "error"',
        )
        proxy.signal(signal.SIGHUP)
        proxy.wait_for_log("the configuration was read again and is in force")
        assert {answer.status for answer in await ask_all(wires, SMALL.narinfo_path)} == {502}


async def test_a_narinfo_that_led_nowhere_is_forgotten_everywhere(
    threaded_sim: RunSimulator, daemon: RunDaemon
) -> None:
    """When a NAR has gone from the upstream, no worker goes on handing out its narinfo."""
    upstream = threaded_sim(SMALL)
    proxy = daemon(upstream.url, workers=2)
    async with AsyncExitStack() as stack:
        wires = one_each(await connections(stack, proxy))
        assert {answer.status for answer in await ask_all(wires, SMALL.narinfo_path)} == {200}
        upstream.withdraw(SMALL)
        assert (await wires[0].ask(nar_target(SMALL))).status == 404
        assert {answer.status for answer in await ask_all(wires, SMALL.narinfo_path)} == {404}


# --- numbers ------------------------------------------------------------------------------------


async def test_metrics_are_sums(threaded_sim: RunSimulator, daemon: RunDaemon) -> None:
    """Whichever worker is asked, the metrics count what all have answered, to the last request."""
    upstream = threaded_sim(SMALL)
    proxy = daemon(upstream.url, workers=2)
    async with AsyncExitStack() as stack:
        wires = one_each(await connections(stack, proxy))
        await heat(proxy, wires, SMALL)
        before = proxy.metric("requests_total", route="narinfo", result="HIT")
        for number, wire in enumerate(wires, 10):
            for _ in range(number):
                assert (await wire.ask(SMALL.narinfo_path)).status == 200
        text = ""
        for wire in wires:
            text = (await wire.ask("/metrics")).body.decode()
            found = re.search(r'requests_total{.*result="HIT",route="narinfo"} (\S+)', text)
            assert found is not None, text
            assert float(found[1]) - before == 10 + 11
        resident = re.search(r"^process_resident_memory_bytes (\S+)", text, re.MULTILINE)
        assert resident is not None
        assert float(resident[1]) > proxy.rss  # of more than the core
        assert upstream.url.encode() in (await wires[0].ask("/")).body
        assert {answer.body for answer in await ask_all(wires, "/readyz")} == {b"ready\n"}


async def test_a_worker_that_hangs_does_not_hold_up_a_scrape(daemon: RunDaemon) -> None:
    """With one worker standing still, the others' numbers are told all the same."""
    proxy = daemon(workers=2)
    async with AsyncExitStack() as stack:
        found = await connections(stack, proxy)
        (stuck, _), (_, (wire, *_)) = found.items()
        os.kill(stuck, signal.SIGSTOP)
        try:
            assert (await wire.ask("/metrics")).status == 200
        finally:
            os.kill(stuck, signal.SIGCONT)


async def test_the_look_ahead_hears_of_all_clients(
    threaded_sim: RunSimulator, daemon: RunDaemon
) -> None:
    """A narinfo given out by a worker is followed by its references and its NAR."""
    entry = SMALL.but(references=[LARGE.base_name])
    upstream = threaded_sim(entry, LARGE)
    walked = upstream.expect(LARGE.narinfo_path)
    fetched = upstream.expect(entry.nar_path)
    proxy = daemon(upstream.url, workers=2, config='[prefetch]\nnarinfos = true\nnars = "wanted"')
    async with AsyncExitStack() as stack:
        first, second = one_each(await connections(stack, proxy))
        assert (await first.ask(entry.narinfo_path)).status == 200
        await walked.wait()
        await fetched.wait()
        proxy.wait_for_log("stored")
        assert proxy.metric("prefetched_unasked_bytes") == len(entry.file)
        assert (await second.ask(entry.narinfo_path)).headers["x-cache"] == "HIT"
        answer = await second.ask(nar_target(entry))
        assert (answer.body, answer.headers["x-cache"]) == (bytes(entry.file), "PREFETCHED")
        assert proxy.metric("prefetched_unasked_bytes") == 0
        assert proxy.metric("response_bytes_total", result="PREFETCHED") == len(entry.file)
    assert upstream.gets(LARGE.nar_path) == 0


# --- life and death -----------------------------------------------------------------------------


async def test_a_killed_worker_is_replaced(threaded_sim: RunSimulator, daemon: RunDaemon) -> None:
    """When a worker is killed, others go on, no new connection is refused, and a new one comes."""
    upstream = threaded_sim(LARGE)
    gate = Gate(MIDDLE)
    upstream.fault(LARGE.nar_path, gate)
    proxy = daemon(upstream.url, workers=2)
    async with AsyncExitStack() as stack:
        (victim, (lost, *_)), (_, (kept, *_)) = (await connections(stack, proxy)).items()
        for wire in (lost, kept):
            await wire.send(wire.request(nar_target(LARGE)))
            assert (await wire.head()).status == 200
        os.kill(victim, signal.SIGKILL)
        for _ in range(50):
            wire = await stack.enter_async_context(Wire(proxy.url))
            assert (await wire.ask("/healthz")).status == 200
        proxy.wait_for_log("worker started", 3)
        gate.open()
        assert await kept.some(len(LARGE.file)) == bytes(LARGE.file)
        assert len((await connections(stack, proxy)).keys()) == 2
    (ended,) = proxy.logged("worker ended")
    assert (ended["pid"], ended["reason"]) == (victim, "it was ended by SIGKILL")
    assert proxy.metric("worker_restarts_total") == 1
    assert upstream.gets(LARGE.nar_path) == 1


async def test_without_the_core_workers_end(daemon: RunDaemon) -> None:
    """When the daemon is killed, its workers do not stay behind."""
    proxy = daemon(workers=2)
    pids = proxy.children
    proxy.kill()
    await until(lambda: not any(map(is_alive, pids)))


@pytest.mark.parametrize("everybody", [False, True], ids=["core", "group"])
async def test_a_running_transfer_is_drained(
    everybody: bool,  # noqa: FBT001 - pytest gives it by name
    threaded_sim: RunSimulator,
    daemon: RunDaemon,
) -> None:
    """On SIGTERM, also to all processes as systemd sends it, a transfer at a worker ends whole."""
    upstream = threaded_sim(LARGE)
    gate = Gate(MIDDLE)
    upstream.fault(LARGE.nar_path, gate)
    proxy = daemon(upstream.url, workers=2)
    pids = proxy.children
    async with Wire(proxy.url) as wire:
        await wire.send(wire.request(nar_target(LARGE)))
        assert (await wire.head()).status == 200
        for pid in (proxy.process.pid, *(pids if everybody else ())):
            os.kill(pid, signal.SIGTERM)
        proxy.wait_for_log("stopping")
        await until(lambda: refuses(proxy))
        gate.open()
        assert await wire.some(len(LARGE.file)) == bytes(LARGE.file)
    assert await asyncio.to_thread(proxy.wait) == 0
    assert not any(map(is_alive, pids))


def refuses(proxy: DaemonProcess) -> bool:
    """Tell whether the daemon takes no more connections."""
    place = urlsplit(proxy.url)
    try:
        socket.create_connection((place.hostname or "", place.port or 0), timeout=5).close()
    except ConnectionError:
        return True
    return False


async def test_a_second_signal_does_not_wait(threaded_sim: RunSimulator, daemon: RunDaemon) -> None:
    """Told twice to stop, workers do not wait for their clients, however long they were given."""
    upstream = threaded_sim(LARGE)
    gate = Gate(MIDDLE)
    upstream.fault(LARGE.nar_path, gate)
    proxy = daemon(upstream.url, workers=2)
    async with Wire(proxy.url) as wire:
        await wire.send(wire.request(nar_target(LARGE)))
        assert (await wire.head()).status == 200
        proxy.signal(signal.SIGTERM)
        proxy.wait_for_log("stopping")
        proxy.signal(signal.SIGINT)
        assert len(await wire.rest()) < len(LARGE.file)
        assert await asyncio.to_thread(proxy.wait) == 0
    gate.open()


# --- listening ----------------------------------------------------------------------------------


def inodes(pid: int) -> set[str]:
    """Return the sockets of a process that listen on TCP."""
    listening = {
        line.split()[9]
        for line in Path("/proc/net/tcp").read_text().splitlines()[1:]
        if line.split()[3] == "0A"
    }
    return {file for file in open_files(pid) if file[8:-1] in listening}


def test_each_worker_has_a_socket_of_its_own(daemon: RunDaemon) -> None:
    """On TCP each worker listens on another socket, and all on the same port."""
    proxy = daemon(workers=3)
    first, second, third = (inodes(pid) for pid in proxy.children)
    assert len(first | second | third) == 3
    assert len(proxy.addresses) == 1


def test_a_unix_socket_is_shared(daemon: RunDaemon) -> None:
    """Workers answer on a Unix socket; one that was left behind is replaced, one in use is not."""
    with tempfile.TemporaryDirectory(prefix="ncp") as folder:
        path = f"{folder}/socket"
        proxy = daemon(workers=2, listen=["127.0.0.1:0", f"unix:{path}"])
        assert proxy.addresses[1] == f"unix:{path}"
        assert ask_unix(path).startswith(b"HTTP/1.1 200")
        assert "in use" in refusal(daemon, f"unix:{path}")
        proxy.kill()
        assert Path(path).is_socket()
        third = daemon(workers=2, listen=["127.0.0.1:0", f"unix:{path}"])
        assert ask_unix(path).startswith(b"HTTP/1.1 200")
        assert third.stop() == 0


def ask_unix(path: str) -> bytes:
    """Return the answer of a server on a Unix socket."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(20)
        connection.connect(path)
        connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        return connection.recv(4096)


def test_a_socket_of_systemd_is_shared(daemon: RunDaemon) -> None:
    """Workers answer on a socket that was passed to the daemon."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        proxy = daemon(workers=2, **passing(listener))
        assert proxy.addresses == ["127.0.0.1:{1}".format(*listener.getsockname())]
        assert proxy.get("/healthz") == b"ok\n"
        assert proxy.stop() == 0


@pytest.mark.parametrize("workers", [1, 2])
def test_an_address_in_use_is_refused(workers: int, daemon: RunDaemon) -> None:
    """Several workers do not slip in beside another daemon, of one process or of several."""
    first = daemon(workers=workers)
    assert "in use" in refusal(daemon, first.addresses[0])


def refusal(daemon: RunDaemon, address: str) -> str:
    """Return the only line that a daemon says that cannot listen."""
    refused = daemon(workers=2, listen=[address], ready=False)
    assert refused.wait() == 1
    (line,) = refused.log
    refused.log.clear()  # it is for people, and no JSON
    assert address in line["text"]
    return str(line["text"])
