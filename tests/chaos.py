"""Every fault at every moment, the real client, and a witness that compares every body with the truth.

One cell of the matrix is a fault, the moment at which it strikes, and what it strikes: narinfos, NARs, or
everything. In each cell the real daemon has an upstream with that fault, the real ``nix-store`` builds a
closure through it, and help is there as users have it: a second upstream behind the proxy, a second
substituter in the client's own configuration, or only that the fault ends after it has struck once. So every
path has a healthy source, and no fault excuses a broken build. A cell fails when one complete answer had a
wrong byte, or when the build did not come out as it should.

``python -m tests.chaos`` (`make soak`) goes through the cells in random order for some minutes and prints
the table; `tests/test_chaos.py` shows a few of them.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import logging
import random
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Literal, TypeAlias
from urllib.parse import urlsplit

from tests import faults
from tests.blobs import EXTENSIONS
from tests.closures import SigningKey, StoreEntry, closure
from tests.daemon import NO_LOOK_AHEAD, DaemonProcess
from tests.faults import Fault
from tests.nix_client import NixClient
from tests.simulator import HOST, BinaryCacheSimulator, Rule, running

KEY = SigningKey("test-cache-1")

Moment: TypeAlias = Literal["before headers", "first byte", "middle", "last byte"]
MOMENTS: tuple[Moment, ...] = ("before headers", "first byte", "middle", "last byte")

What: TypeAlias = Literal["narinfo", "nar", "connection"]
Help: TypeAlias = Literal["second upstream", "fallback substituter", "the fault ends"]
HELPS: tuple[Help, ...] = ("second upstream", "fallback substituter", "the fault ends")

OTHERS = HELPS[:2]
"""Help by somebody else than the faulty upstream."""

PATHS = 4
SIZES = (20_000, 2_000_000)
"""Bytes of a path's content: what is given to clients whole, and what is streamed to them."""

UNSTREAMED = (20_000, 200_000)
"""Bytes where another upstream can make good what is damaged: of a streamed NAR Nix may have the damage by
the time that its hash shows it, and cannot give it back."""


@dataclass(frozen=True, slots=True)
class Cell:
    """One cell of the matrix."""

    fault: str
    moment: Moment
    what: What
    help: Help

    def __str__(self) -> str:
        return f"{self.fault}, {self.moment}, {self.what}, {self.help}".replace(" ", "-")


@dataclass(slots=True)
class Outcome:
    """What came of a cell.

    Attributes:
        served: Answers that clients got from the proxy.
        injected: How often the fault has struck; -1 where nothing can count that.
        wrong: Complete answers with other bytes than were signed.
        broken: Why the build did not come out as it should; empty when it did.
        seconds: How long the build took.
    """

    served: int = 0
    injected: int = 0
    wrong: int = 0
    broken: str = ""
    seconds: float = 0.0


# --- faults of an answer ----------------------------------------------------------------------

_AT: Mapping[Moment, Callable[[int], int]] = {
    "first byte": lambda _size: 0,
    "middle": lambda size: size // 2,
    "last byte": lambda size: size - 1,
}


def _reset(moment: Moment, size: int) -> Fault:
    at = _AT.get(moment)
    return faults.Cut(at(size), reset=True) if at else faults.Reset()


def _stalled(moment: Moment, size: int) -> Fault:
    at = _AT.get(moment)
    return faults.Stall(at(size) if at else None)


def _slow(moment: Moment, size: int) -> Fault:
    return faults.Slow(size / 0.5, 1024) if moment in _AT else faults.Delay(0.3)


def _wrong_length(moment: Moment, size: int) -> Fault:
    if moment == "first byte":
        return faults.Longer(7)
    return faults.Shorter(size // 2) if moment == "middle" else faults.ShortBody(1)


_ANYTIME = MOMENTS
_LATER: tuple[Moment, ...] = MOMENTS[1:]
_AT_ONCE: tuple[Moment, ...] = MOMENTS[:1]

ANSWERS: Mapping[str, tuple[Sequence[Moment], Callable[[Moment, int], Fault]]] = {
    "reset": (_ANYTIME, _reset),
    "stalled": (_ANYTIME, _stalled),
    "slow": (("before headers", "first byte"), _slow),
    "cut": (_LATER, lambda moment, size: faults.Cut(_AT[moment](size))),
    "corrupted": (_LATER, lambda moment, size: faults.Corrupt(_AT[moment](size))),
    "wrong length": (_LATER, _wrong_length),
    "4xx": (_AT_ONCE, lambda _moment, _size: faults.Status(403)),
    "5xx": (_AT_ONCE, lambda _moment, _size: faults.Status(503, headers={"Retry-After": "1"})),
    "HTML 200": (_AT_ONCE, lambda _moment, _size: faults.Html()),
    "redirect loop": (
        _AT_ONCE,
        lambda _moment, _size: faults.Redirect(lambda request: request.raw_path),
    ),
}
"""Faults of an answer: at which moments they can strike, and how."""

PASSING: Mapping[str, Sequence[Moment]] = {
    **{fault: ANSWERS[fault][0] for fault in ("reset", "slow", "cut", "5xx")},
    "stalled": ("middle", "last byte"),
}
"""Faults that one upstream alone survives, when they strike a NAR once: what broke off goes on there. Whoever
has waited for nothing at all is not made to wait again, but goes elsewhere: hence the moments."""

SILENT = ("stalled", "black hole")

CONNECTIONS = ("refused", "black hole", "DNS failure", "TLS failure")


def matrix() -> list[Cell]:
    """Return all cells."""
    cells = [
        Cell(fault, moment, what, help_)
        for help_ in OTHERS
        for what in ("narinfo", "nar")
        for fault, (moments, _) in ANSWERS.items()
        for moment in moments
    ]
    cells += [
        Cell(fault, moment, "nar", "the fault ends")
        for fault, moments in PASSING.items()
        for moment in moments
    ]
    cells += [
        Cell("wrong path", "first byte", what, help_)
        for help_ in OTHERS
        for what in ("narinfo", "nar")
    ]
    cells += [
        Cell(fault, "before headers", "connection", help_)
        for help_ in OTHERS
        for fault in CONNECTIONS
    ]
    return cells


def _strike(cell: Cell, sim: BinaryCacheSimulator, entries: Sequence[StoreEntry]) -> list[Rule]:
    """Let the fault happen to all answers of the kind that the cell names."""
    rules: list[Rule] = []
    for entry, other in zip(entries, [*entries[1:], entries[0]], strict=True):
        path = entry.narinfo_path if cell.what == "narinfo" else entry.nar_path
        body, _ = sim.files[path]
        if cell.fault == "wrong path":
            lie = other.narinfo(KEY) if cell.what == "narinfo" else other.file
            fault: Fault = faults.Body(lie)
        else:
            fault = ANSWERS[cell.fault][1](cell.moment, len(body))
        rules.append(sim.fault(path, fault, times=None if cell.help in OTHERS else 1))
    return rules


# --- faults of a connection -------------------------------------------------------------------


@contextlib.contextmanager
def _unreachable(fault: str, folder: Path) -> Iterator[tuple[str, Callable[[], int]]]:
    """Yield the URL of an upstream that nobody can talk to, and what counts who tried (-1: nothing can)."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket())
        listener.bind((HOST, 0))
        port = listener.getsockname()[1]
        match fault:
            case "DNS failure":
                yield "http://no-such-host.invalid", lambda: -1
            case "black hole":
                listener.listen(0)
                for _ in range(3):  # its queue is full, and the next SYN is not answered
                    filler = stack.enter_context(socket.socket())
                    filler.settimeout(0)
                    filler.connect_ex((HOST, port))
                yield f"http://{HOST}:{port}", lambda: -1
            case "TLS failure":
                yield f"https://{HOST}:{port}", stack.enter_context(_untrusted(listener, folder))
            case _:
                yield f"http://{HOST}:{port}", lambda: -1


@contextlib.contextmanager
def _untrusted(listener: socket.socket, folder: Path) -> Iterator[Callable[[], int]]:
    """Speak TLS on `listener`, with a certificate that nobody trusts; yield what counts who came."""
    certificate, key = folder / "certificate.pem", folder / "key.pem"
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-nodes", "-subj", "/CN=localhost"),
            *("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"),
            *("-keyout", str(key), "-out", str(certificate)),
        ],
        check=True,
        capture_output=True,
    )
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(certificate, key)
    listener.listen()
    came: list[str] = []

    def serve() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            came.append("")
            with contextlib.suppress(OSError), connection:
                connection.settimeout(5)
                tls.wrap_socket(connection, server_side=True).close()

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield lambda: len(came)
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        thread.join(timeout=10)


# --- the witness ------------------------------------------------------------------------------


class Witness:
    """Stands between client and proxy, passes everything on, and compares it with the truth.

    Attributes:
        url: Where it listens.
        outcome: Counts answers, and wrong ones.
    """

    def __init__(self, proxy: str, entries: Iterable[StoreEntry], outcome: Outcome) -> None:
        self._proxy = urlsplit(proxy).netloc
        self.outcome = outcome
        self._lock = threading.Lock()
        self._narinfos = {}
        self._nars = {}
        for entry in entries:
            url = f"nar/{entry.hash_part}-{entry.nar_hash}.nar{EXTENSIONS[entry.compression]}"
            text = entry.narinfo(KEY).replace(entry.url("").encode(), url.encode())
            self._narinfos[entry.narinfo_path] = text
            self._nars[f"/{url}"] = bytes(entry.file)

    @contextlib.contextmanager
    def listening(self) -> Iterator[str]:
        """Listen, and yield the URL."""
        witness = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                witness.pass_on(self)

            def do_HEAD(self) -> None:
                witness.pass_on(self)

            def log_message(self, format: str, *args: object) -> None:  # noqa: A002  # its name
                pass

        with ThreadingHTTPServer((HOST, 0), Handler) as server:
            server.daemon_threads = True
            thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
            thread.start()
            try:
                yield f"http://{HOST}:{server.server_address[1]}"
            finally:
                server.shutdown()
                thread.join(timeout=10)

    def pass_on(self, client: BaseHTTPRequestHandler) -> None:
        """Ask the proxy what the client asks, and give what came, also when it is cut off."""
        proxy = http.client.HTTPConnection(self._proxy, timeout=60)
        wanted = {
            name: client.headers[name] for name in ("Range", "If-Range") if name in client.headers
        }
        proxy.request(client.command, client.path, headers=wanted)
        complete, body = True, b""
        answer = proxy.getresponse()
        try:
            body = answer.read()
        except http.client.IncompleteRead as error:
            complete, body = False, error.partial
        except OSError:
            complete = False
        finally:
            proxy.close()
        if complete and client.command == "GET":
            self._judge(client.path, answer, body)
        client.send_response_only(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in ("connection", "transfer-encoding"):
                client.send_header(name, value)
        client.end_headers()
        client.wfile.write(body)
        client.close_connection = not complete

    def _judge(self, path: str, answer: http.client.HTTPResponse, body: bytes) -> None:
        truth = self._narinfos.get(path) or self._nars.get(path)
        if answer.status == http.HTTPStatus.PARTIAL_CONTENT and truth is not None:
            span = answer.headers["Content-Range"].removeprefix("bytes ").partition("/")[0]
            first, _, last = span.partition("-")
            truth = truth[int(first) : int(last) + 1]
        elif answer.status != http.HTTPStatus.OK:
            truth = None
        with self._lock:
            self.outcome.served += 1
            self.outcome.wrong += truth is not None and body != truth


# --- a cell -----------------------------------------------------------------------------------


@dataclass(slots=True)
class _Upstream:
    """An upstream of the cell, and what counts how often the fault has struck."""

    url: str
    injected: Callable[[], int] = field(default=lambda: -1)


def run(cell: Cell, folder: Path, *, seed: int = 0) -> Outcome:
    """Build a closure through a proxy with that fault, in an empty `folder`."""
    beyond_help = cell.what == "nar" and cell.fault == "corrupted" and cell.help == HELPS[0]
    entries = closure(
        PATHS,
        depth=3,
        seed=seed,
        sizes=UNSTREAMED if beyond_help else SIZES,
        compressions=("xz", "none", "zstd"),
    )
    outcome = Outcome()
    with contextlib.ExitStack() as stack:
        healthy = stack.enter_context(running(BinaryCacheSimulator(entries, key=KEY)))
        faulty = stack.enter_context(_faulty(cell, entries, folder))
        second = [healthy.url] if cell.help == "second upstream" else []
        daemon = stack.enter_context(_daemon(cell, folder / "proxy", faulty.url, *second))
        witness = Witness(daemon.url, entries, outcome)
        substituters = [stack.enter_context(witness.listening())]
        if cell.help == "fallback substituter":
            substituters.append(healthy.url)
        _build(folder / "client", entries, substituters, outcome)
        outcome.injected = faulty.injected()
    return outcome


@contextlib.contextmanager
def _faulty(cell: Cell, entries: Sequence[StoreEntry], folder: Path) -> Iterator[_Upstream]:
    if cell.what == "connection":
        with _unreachable(cell.fault, folder) as (url, came):
            yield _Upstream(url, came)
        return
    with running(BinaryCacheSimulator(entries, key=KEY)) as sim:
        rules = _strike(cell, sim, entries)
        try:
            yield _Upstream(sim.url, lambda: sum(rule.hits for rule in rules))
        finally:
            for fault in (fault for rule in rules for fault in rule.faults):
                if isinstance(fault, faults.Stall):
                    fault.open()


@contextlib.contextmanager
def _daemon(cell: Cell, folder: Path, faulty: str, *others: str) -> Iterator[DaemonProcess]:
    """Run the proxy; it has little patience where the fault is silence, to save the time of us all."""
    tables = [
        f'[[upstream]]\nname = "faulty"\nurl = "{faulty}"',
        'connect_timeout = "500ms"\nread_timeout = "500ms"' if cell.fault in SILENT else "",
        *(f'[[upstream]]\nname = "healthy"\nurl = "{url}"' for url in others),
    ]
    config = "\n".join(['[policy]\nlookup_budget = "4s"', *tables, NO_LOOK_AHEAD])
    with DaemonProcess(folder, keys=[KEY.public], config=config) as daemon:
        yield daemon


def _build(
    folder: Path, entries: Sequence[StoreEntry], substituters: Sequence[str], outcome: Outcome
) -> None:
    """Let Nix substitute the closure, and compare all of it with the truth."""
    folder.mkdir()
    nix = NixClient(folder, keys=[KEY.public])
    began = time.monotonic()
    try:
        done = nix.realise(entries[0].store_path, substituters=substituters, timeout=100)
    except subprocess.TimeoutExpired:
        outcome.broken = "it hangs"
        return
    outcome.seconds = time.monotonic() - began
    if done.returncode != 0:
        outcome.broken = (done.stderr.strip().splitlines() or ["?"])[-1]
        return
    missing = {entry.base_name for entry in entries} - nix.installed()
    if missing:
        outcome.broken = f"not installed: {sorted(missing)}"
    outcome.wrong += sum(nix.dump(entry.store_path) != bytes(entry.nar) for entry in entries)


# --- many cells -------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    """Go through the matrix until the time is over, print the table, and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=main.__doc__)
    parser.add_argument("--minutes", type=float, default=10.0, help="how long (default: 10)")
    parser.add_argument("--seed", type=int, default=0, help="of order and contents (default: 0)")
    parser.add_argument("--jobs", type=int, default=2, help="cells at the same time (default: 2)")
    parser.add_argument("--only", default="", help="cells whose name contains this")
    options = parser.parse_args(arguments)
    logging.getLogger(
        "aiohttp.server"
    ).disabled = True  # the simulators' complaints of who hangs up
    ends = time.monotonic() + options.minutes * 60
    cells = [cell for cell in matrix() if options.only in str(cell)]
    random.Random(options.seed).shuffle(cells)

    def attempt(job: tuple[int, Cell]) -> tuple[Cell, Outcome] | None:
        number, cell = job
        if time.monotonic() > ends:
            return None
        with tempfile.TemporaryDirectory(prefix="chaos-", ignore_cleanup_errors=True) as folder:
            return cell, run(cell, Path(folder), seed=options.seed + number)

    with ThreadPoolExecutor(options.jobs) as pool:
        results = [result for result in pool.map(attempt, enumerate(cells)) if result]
    return report(results, len(cells))


def report(results: Sequence[tuple[Cell, Outcome]], planned: int) -> int:
    """Print the table and its sums; return 1 when a byte was wrong, a build broken, or nothing done."""
    head = ("help", "what", "fault", "moment", "served", "injected", "wrong", "broken", "s")
    print("{:21} {:10} {:14} {:14} {:>7} {:>8} {:>6} {:>6} {:>5}".format(*head))  # noqa: T201
    for cell, out in sorted(
        results, key=lambda result: (result[0].help, result[0].what, str(result[0]))
    ):
        print(  # noqa: T201
            f"{cell.help:21} {cell.what:10} {cell.fault:14} {cell.moment:14} {out.served:7} "
            f"{out.injected if out.injected >= 0 else '-':>8} {out.wrong:6} {bool(out.broken):6} "
            f"{out.seconds:5.1f} {out.broken}"
        )
    served = sum(out.served for _, out in results)
    injected = sum(max(0, out.injected) for _, out in results)
    wrong = sum(out.wrong for _, out in results)
    broken = sum(bool(out.broken) for _, out in results)
    print(  # noqa: T201
        f"\n{len(results)} of {planned} cells: requests served {served}, faults injected {injected}, "
        f"wrong bytes {wrong}, builds broken {broken}"
    )
    return 0 if results and not wrong and not broken else 1


if __name__ == "__main__":
    sys.exit(main())
