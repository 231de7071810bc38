"""The servers that are compared: the proxy, nginx as a cache, nginx as a plain file server."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path

from bench import processes
from bench.content import KEY

HOST = "127.0.0.1"
START_TIMEOUT = 60.0


class ServerError(Exception):
    """A server did not start, or does not answer as it should."""


@dataclass(frozen=True, slots=True)
class Served:
    """A running server.

    Attributes:
        name: What it is called in tables.
        port: Where it listens on 127.0.0.1.
        process: What was started; its children belong to it.
        began: When it was started, by `time.monotonic`.
    """

    name: str
    port: int
    process: subprocess.Popen[bytes]
    began: float

    @property
    def url(self) -> str:
        """Its URL without trailing slash."""
        return f"http://{HOST}:{self.port}"

    @property
    def cpu_seconds(self) -> float:
        """The CPU time it has used so far."""
        return processes.cpu_seconds(self.process.pid)

    def get(self, path: str) -> bytes:
        """Return the body behind a URL path.

        Raises:
            ServerError: The status is not 200.
        """
        connection = http.client.HTTPConnection(HOST, self.port, timeout=60)
        with contextlib.closing(connection):
            connection.request("GET", path)
            answer = connection.getresponse()
            body = answer.read()
        if answer.status != HTTPStatus.OK:
            raise ServerError(f"{self.name} answers {answer.status} for {path}")
        return body

    def metric(self, name: str) -> float:
        """Return one of our proxy's metrics, summed over its labels."""
        full = f"nix_cache_proxy_{name}"
        return sum(
            float(line.rpartition(" ")[2])
            for line in self.get("/metrics").decode().splitlines()
            if line.startswith((f"{full} ", f"{full}{{"))
        )


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
        return port


# --- the proxy --------------------------------------------------------------------------------


@contextmanager
def our_proxy(
    folder: Path,
    upstreams: Sequence[str],
    *,
    cores: Iterable[int] | None = None,
    workers: int = 1,
    name: str = "ours",
    config: str = "",
) -> Iterator[Served]:
    """Run the proxy with a configuration and, unless it is there already, a store in `folder`.

    Args:
        folder: Where both are.
        upstreams: URLs to fetch from.
        cores: The cores it may use; None is all.
        workers: Processes.
        name: What it is called in tables.
        config: More tables of the configuration.

    Raises:
        ServerError: It did not start.
    """
    folder.mkdir(parents=True, exist_ok=True)
    port = free_port()
    tables = [
        f"[server]\nlisten = {json.dumps([f'{HOST}:{port}'])}\nworkers = {workers}",
        f"[store]\npath = {json.dumps(str(folder / 'store'))}",
        f"[trust]\nkeys = {json.dumps([KEY.public])}",
        '[log]\nformat = "json"\nlevel = "info"',
        *(
            f'[[upstream]]\nname = "up{number}"\nurl = {json.dumps(url)}'
            for number, url in enumerate(upstreams)
        ),
        config,
    ]
    file = folder / "config.toml"
    file.write_text("\n\n".join(tables) + "\n")
    command = [sys.executable, "-m", "proxy", "serve", "--config", str(file)]
    with _serving(name, command, port, cores, folder / "log") as served:
        yield served


# --- nginx ------------------------------------------------------------------------------------

_NGINX = """
daemon off;
worker_processes 1;
worker_rlimit_nofile 65536;
pid {folder}/nginx.pid;
error_log {folder}/error.log crit;
{user}
events {{
  worker_connections 8192;
  multi_accept on;
  accept_mutex off;
}}
http {{
  access_log off;
  log_not_found off;
  server_tokens off;
  default_type application/octet-stream;
  sendfile on;
  tcp_nopush on;
  tcp_nodelay on;
  keepalive_timeout 1h;
  keepalive_requests 1000000000;
  reset_timedout_connection on;
  open_file_cache max=100000 inactive=1h;
  open_file_cache_valid 1h;
  open_file_cache_min_uses 1;
  open_file_cache_errors on;
  client_body_temp_path {folder}/body;
  proxy_temp_path {folder}/temporary;
  fastcgi_temp_path {folder}/fastcgi;
  uwsgi_temp_path {folder}/uwsgi;
  scgi_temp_path {folder}/scgi;
{server}
}}
"""

_CACHING = """
  proxy_cache_path {folder}/cache levels=1:2 keys_zone=main:64m inactive=24h max_size=50g
    use_temp_path=off;
  upstream cache {{
    server {upstream};
    keepalive 64;
    keepalive_requests 1000000000;
  }}
  server {{
    listen {host}:{port} backlog=4096 reuseport;
    location / {{
      proxy_pass http://cache;
      proxy_http_version 1.1;
      proxy_set_header Connection "";
      proxy_cache main;
      proxy_cache_key $uri;
      proxy_cache_lock on;
      proxy_cache_valid 200 24h;
      proxy_cache_valid 404 1h;
      proxy_cache_use_stale error timeout updating;
    }}
  }}
"""

_PLAIN = """
  server {{
    listen {host}:{port} backlog=4096 reuseport;
    root {root};
  }}
"""


@contextmanager
def nginx_cache(
    folder: Path, upstream: str, *, cores: Iterable[int] | None = None
) -> Iterator[Served]:
    """Run nginx with one worker and ``proxy_cache`` in front of a URL, set up as well as one can.

    Raises:
        ServerError: It did not start.
    """
    server = _CACHING.format(
        folder=folder, host=HOST, port="{port}", upstream=upstream.removeprefix("http://")
    )
    with _nginx("nginx", folder, server, cores) as served:
        yield served


@contextmanager
def nginx_files(
    folder: Path, root: Path, *, cores: Iterable[int] | None = None
) -> Iterator[Served]:
    """Run nginx with one worker as a plain file server of `root`.

    Raises:
        ServerError: It did not start.
    """
    with _nginx(
        "files", folder, _PLAIN.format(host=HOST, port="{port}", root=root), cores
    ) as served:
        yield served


@contextmanager
def _nginx(name: str, folder: Path, server: str, cores: Iterable[int] | None) -> Iterator[Served]:
    folder.mkdir(parents=True, exist_ok=True)
    port = free_port()
    user = "user root;" if os.geteuid() == 0 else ""  # or the worker could not read our folders
    config = folder / "nginx.conf"
    config.write_text(
        _NGINX.format(folder=folder, user=user, server=server.replace("{port}", str(port)))
    )
    program = shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin:/sbin") or "nginx"
    command = [program, "-p", str(folder), "-c", str(config), "-e", str(folder / "error.log")]
    with _serving(name, command, port, cores, folder / "log") as served:
        yield served


# --- distance ---------------------------------------------------------------------------------


@contextmanager
def far_away(log: Path, server: Served, *, rtt: float, mbit: float) -> Iterator[str]:
    """Yield a URL at which a server is far away.

    Args:
        log: A file.
        server: Who is there.
        rtt: Seconds of a round trip.
        mbit: 10^6 bits per second that all connections share.

    Raises:
        ServerError: The relay did not start.
    """
    command = [sys.executable, "-m", "bench.relay", "--to", str(server.port)]
    command += ["--rtt", str(rtt), "--mbit", str(mbit)]
    deadline = time.monotonic() + START_TIMEOUT
    with processes.running(command, output=log) as process:
        while not (port := log.read_text()).endswith("\n"):
            if process.poll() is not None or time.monotonic() > deadline:
                raise ServerError(f"the relay did not start: {port}")
            time.sleep(0.01)
        yield f"http://{HOST}:{int(port)}"


# --- processes --------------------------------------------------------------------------------


@contextmanager
def _serving(
    name: str, command: Sequence[str], port: int, cores: Iterable[int] | None, log: Path
) -> Iterator[Served]:
    began = time.monotonic()
    with processes.running(command, cores=cores, output=log) as process:
        while not _listens(port):
            if process.poll() is not None or time.monotonic() > began + START_TIMEOUT:
                last_words = log.read_text()[-2000:].strip()
                raise ServerError(last_words or f"{name} does not listen")
            time.sleep(0.005)
        yield Served(name, port, process, began)


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex((HOST, port)) == 0
