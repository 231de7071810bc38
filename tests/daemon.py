"""The daemon as its users run it: a process of its own, with a configuration file."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

START_TIMEOUT = 30.0
STOP_TIMEOUT = 30.0


NO_LOOK_AHEAD = '[prefetch]\nnarinfos = false\nnars = "off"'
"""What most tests want: nothing is asked of an upstream but what a client asked for."""


class DaemonProcess:
    """``nix-cache-proxy serve`` in a folder of its own, started with ``with`` or `start`.

    Attributes:
        folder: Holds the configuration and, unless it says otherwise, the store.
        store: The store folder.
        workers: How many processes it is told to accept clients in.
        listen: Where it is told to listen; the first address is that of `url`.
        addresses: Where it says that it listens.
        log: Every line that the daemon has logged, as parsed JSON.
    """

    def __init__(
        self,
        folder: Path,
        *,
        upstreams: Sequence[str] = (),
        keys: Sequence[str] = (),
        config: str = "",
        environment: Mapping[str, str] | None = None,
        listen: Sequence[str] = ("127.0.0.1:0",),
        arguments: Sequence[str] | None = None,
        wrapper: Sequence[str] = (),
        pass_fds: Sequence[int] = (),
        workers: int = 1,
        limits: str = "",
    ) -> None:
        """``config`` is TOML that is put behind what the other arguments say.

        Its tables may be any but ``[server]``, ``[store]``, ``[trust]`` and ``[log]``; ``limits`` are lines
        for ``[store]``.
        ``arguments`` replace ``serve --config FILE``; ``wrapper`` is a command that becomes the
        daemon.
        """
        self.folder = folder
        self.store = folder / "store"
        self.config_file = folder / "config.toml"
        self.environment = dict(environment or {})
        self.listen = tuple(listen)
        self.workers = workers
        self.addresses: list[str] = []
        self.log: list[dict[str, Any]] = []
        self.url = ""
        self._arguments = arguments or ("serve", "--config", str(self.config_file))
        self._wrapper = wrapper
        self._pass_fds = pass_fds
        self._ready = threading.Event()
        self._news = threading.Condition()
        self._reader: threading.Thread | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self.configure(upstreams=upstreams, keys=keys, config=config, limits=limits)

    def configure(
        self, *, upstreams: Sequence[str], keys: Sequence[str], config: str = "", limits: str = ""
    ) -> None:
        """Write the configuration file."""
        self.folder.mkdir(parents=True, exist_ok=True)
        tables = [
            f"[server]\nlisten = {json.dumps(self.listen)}\nworkers = {self.workers}",
            'shutdown_timeout = "5s"',
            f"[store]\npath = {json.dumps(str(self.store))}\n{limits}",
            f"[trust]\nkeys = {json.dumps(list(keys))}",
            '[log]\nformat = "json"\nlevel = "debug"',
            *(
                f'[[upstream]]\nname = "up{number}"\nurl = {json.dumps(url)}'
                for number, url in enumerate(upstreams)
            ),
            "" if "[prefetch]" in config else NO_LOOK_AHEAD,
            config,
        ]
        self.config_file.write_text("\n\n".join(tables) + "\n")

    def start(self) -> Self:
        """Start it, and wait until it says that it is ready."""
        self.launch()
        return self.await_ready()

    def launch(self) -> None:
        """Start it, and wait for nothing."""
        self.url = ""
        self._ready.clear()
        self._process = subprocess.Popen(
            [*self._wrapper, sys.executable, "-m", "proxy", *self._arguments],
            stderr=subprocess.PIPE,
            cwd=Path(__file__).parents[1],
            env={**os.environ, "PYTHONDEVMODE": "", **self.environment},
            pass_fds=self._pass_fds,
        )
        self._reader = threading.Thread(target=self._read_log, args=(self._process,), daemon=True)
        self._reader.start()

    def await_ready(self) -> Self:
        """Wait until it says that it is ready."""
        if not self._ready.wait(START_TIMEOUT) or not self.url:
            self.kill()
            raise AssertionError(f"the daemon did not start: {self.log}")
        return self

    def stop(self) -> int:
        """Send SIGTERM, and return the exit status."""
        self.signal(signal.SIGTERM)
        return self.wait()

    def kill(self) -> None:
        """Send SIGKILL, and wait for the end."""
        self.signal(signal.SIGKILL)
        self.wait()

    def signal(self, number: signal.Signals) -> None:
        """Send a signal."""
        self.process.send_signal(number)

    def wait(self) -> int:
        """Wait for the end, and for all that it had to say; return the exit status."""
        status = self.process.wait(STOP_TIMEOUT)
        if self._reader is not None:
            self._reader.join(STOP_TIMEOUT)
        return status

    @property
    def process(self) -> subprocess.Popen[bytes]:
        """The running, or the ended, process."""
        assert self._process is not None
        return self._process

    @property
    def children(self) -> list[int]:
        """The processes that it has started and that run: its workers."""
        pids: list[int] = []
        for task in Path(f"/proc/{self.process.pid}/task").iterdir():
            pids += map(int, (task / "children").read_text().split())
        return pids

    @property
    def rss(self) -> int:
        """The most bytes of memory that the process has had at once."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        line = next(line for line in status.splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024

    def get(self, path: str) -> bytes:
        """Return the body of a 200 answer."""
        with urllib.request.urlopen(f"{self.url}{path}", timeout=60) as answer:  # noqa: S310 - http
            body: bytes = answer.read()
        return body

    def metric(self, name: str, **labels: str) -> float:
        """Return a metric, summed over the series that have these labels."""
        total = 0.0
        for line in self.get("/metrics").decode().splitlines():
            series, _, value = line.rpartition(" ")
            metric, _, rest = series.partition("{")
            wanted = (f'{label}="{text}"' for label, text in labels.items())
            if metric == f"nix_cache_proxy_{name}" and all(pair in rest for pair in wanted):
                total += float(value)
        return total

    def logged(self, event: str) -> list[dict[str, Any]]:
        """Return what was logged of one kind of event."""
        return [line for line in tuple(self.log) if line.get("event") == event]

    def wait_for_log(self, event: str, count: int = 1) -> list[dict[str, Any]]:
        """Wait until so much was logged of one kind of event; return what `logged` does."""
        with self._news:
            if self._news.wait_for(lambda: len(self.logged(event)) >= count, START_TIMEOUT):
                return self.logged(event)
        raise AssertionError(f"not {count} times {event!r} in {self.log}")

    def _read_log(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stderr is not None
        with process.stderr as lines:
            for line in lines:
                try:
                    entry = json.loads(line)
                except ValueError:
                    entry = {"event": "not JSON", "text": line.decode(errors="replace")}
                with self._news:
                    self.log.append(entry)
                    self._news.notify_all()
                if entry["event"] == "ready":
                    self.addresses = entry["listen"]
                    self.url = f"http://{self.addresses[0]}"
                    self._ready.set()
        self._ready.set()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self.process.poll() is None:
            self.kill()
