"""The image, as far as it can be shown without an engine: its files, its user, its commands."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PORT = 8627


def _instructions() -> list[tuple[str, str]]:
    text = re.sub(r"(?m)^#.*\n", "", (ROOT / "Dockerfile").read_text())
    lines = text.replace("\\\n", " ").splitlines()
    return [
        (word, rest.strip()) for word, _, rest in (line.partition(" ") for line in lines) if word
    ]


def _final_stage() -> dict[str, str]:
    instructions = _instructions()
    last = max(number for number, (word, _) in enumerate(instructions) if word == "FROM")
    return dict(instructions[last:])


def test_image_copies_what_there_is() -> None:
    """Every file that the image is built from exists, and .dockerignore lets it through."""
    copied = [
        source
        for word, rest in _instructions()
        if word == "COPY" and not rest.startswith("--from=")
        for source in rest.split()[:-1]
    ]
    let_through = {
        line.removeprefix("!")
        for line in (ROOT / ".dockerignore").read_text().splitlines()
        if line.startswith("!")
    }

    assert [source for source in copied if not (ROOT / source).exists()] == []
    assert set(copied) == let_through


def test_image_does_not_run_as_root() -> None:
    """The user is a number other than 0, which an orchestrator can check without the image."""
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", _final_stage()["USER"])


def test_image_starts_without_a_shell() -> None:
    """The daemon is process 1, which gets the SIGTERM, and serves on the exposed port."""
    stage = _final_stage()
    command = json.loads(stage["ENTRYPOINT"]) + json.loads(stage["CMD"])

    assert command == [
        *("nix-cache-proxy", "serve"),
        *("--listen", f"0.0.0.0:{stage['EXPOSE']}"),
        *("--store", stage["VOLUME"]),
    ]
    assert stage["EXPOSE"] == str(PORT)


@pytest.mark.parametrize(
    ("status", "healthy"), [(HTTPStatus.OK, True), (HTTPStatus.SERVICE_UNAVAILABLE, False)]
)
def test_image_healthcheck_asks_healthz(status: HTTPStatus, *, healthy: bool) -> None:
    """The health check succeeds when /healthz does, whatever proxy the environment names."""
    with _serving("/healthz", status) as port:
        assert _healthcheck(port) == healthy


def test_image_healthcheck_fails_when_nobody_listens() -> None:
    """A daemon that does not answer is not healthy."""
    with _serving("/healthz", HTTPStatus.OK) as port:
        pass

    assert not _healthcheck(port)


def _healthcheck(port: int) -> bool:
    command = json.loads(_final_stage()["HEALTHCHECK"].partition("CMD ")[2])
    assert command[0] == "python"
    arguments = [word.replace(f":{PORT}/", f":{port}/") for word in command[1:]]
    assert arguments != command[1:]
    environment = {"http_proxy": "http://127.0.0.1:9"}
    finished = subprocess.run(
        [sys.executable, *arguments], check=False, env=environment, capture_output=True
    )
    return finished.returncode == 0


@contextmanager
def _serving(path: str, status: HTTPStatus) -> Iterator[int]:
    """Answer ``path`` with ``status``, and every other path with 404; yield the port."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status if self.path == path else HTTPStatus.NOT_FOUND)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server.server_address[1]
        finally:
            server.shutdown()
            thread.join()
