"""The command line: what it says, how it ends, and what it listens on."""

from __future__ import annotations

import contextlib
import http.client
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from proxy import __version__
from tests.closures import SigningKey, StoreEntry
from tests.conftest import RunDaemon, RunSimulator, require_tool

ENTRY = StoreEntry.make("hello-1.0")

ABSENT = "/00000000000000000000000000000000.narinfo"

NO_NETWORK = dict.fromkeys(
    ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:1"
)
"""A forward proxy that refuses: nothing behind it can be reached, whatever machine this is."""


def run(*arguments: str | Path, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command that ends by itself, somewhere else than in the project's folder."""
    return subprocess.run(
        [sys.executable, "-m", "proxy", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
        cwd=cwd,
        env={
            **os.environ,
            "PYTHONPATH": str(Path(__file__).parents[1]),
            "HOME": str(cwd),
            "XDG_CACHE_HOME": "",
            **environment,
        },
    )


def assert_failed(
    done: subprocess.CompletedProcess[str], code: int, *words: str, lines: int = 1
) -> None:
    """It ended with this code, and said these words to stderr, in few lines, with no traceback."""
    assert "Traceback" not in done.stderr
    assert done.returncode == code, done.stderr
    assert done.stdout == ""
    assert len(done.stderr.strip().splitlines()) <= lines, done.stderr
    for word in words:
        assert word in done.stderr


def unix_get(path: Path, target: str) -> tuple[int, bytes]:
    """Ask over a Unix socket."""

    class Connection(http.client.HTTPConnection):
        def connect(self) -> None:
            self.sock = socket.socket(socket.AF_UNIX)
            self.sock.settimeout(30)
            self.sock.connect(str(path))

    with contextlib.closing(Connection("localhost")) as connection:
        connection.request("GET", target)
        answer = connection.getresponse()
        return answer.status, answer.read()


def status(url: str) -> int:
    """Return the status of an answer."""
    try:
        with urllib.request.urlopen(url, timeout=30) as answer:  # noqa: S310 - http, on loopback
            return int(answer.status)
    except urllib.error.HTTPError as error:
        with error:
            return error.code


@pytest.fixture
def short_folder() -> Iterator[Path]:
    """Return a folder whose name is short enough for sockets in it."""
    with tempfile.TemporaryDirectory(prefix="ncp") as folder:
        yield Path(folder)


@pytest.fixture
def settings(tmp_path: Path) -> Callable[[str], Path]:
    """Return a function that writes a configuration file."""

    def write(text: str) -> Path:
        file = tmp_path / "config.toml"
        file.write_text(text)
        return file

    return write


# --- commands that end by themselves ------------------------------------------------------------


def test_help_names_every_command(tmp_path: Path) -> None:
    """``--help`` says what there is, on stdout, and is no failure."""
    done = run("--help", cwd=tmp_path)
    assert done.returncode == 0
    for command in (
        "serve",
        "check-config",
        "pin",
        "unpin",
        "pins",
        "gc",
        "status",
        "mode",
        "--version",
    ):
        assert re.search(rf"^  {command} ", done.stdout, re.MULTILINE), done.stdout


def test_serve_help_names_every_flag(tmp_path: Path) -> None:
    """``serve --help`` names the flags for the common cases."""
    done = run("serve", "--help", cwd=tmp_path)
    assert done.returncode == 0
    for flag in ("--config", "--listen", "--store", "--upstream", "--trusted-key"):
        assert flag in done.stdout


def test_without_a_command_it_says_how_it_is_used(tmp_path: Path) -> None:
    """No command at all is wrong usage, answered with the help."""
    done = run(cwd=tmp_path)
    assert done.returncode == 2
    assert "Usage:" in done.stdout + done.stderr


def test_version_is_the_packages(tmp_path: Path) -> None:
    """``--version`` prints the version and nothing else."""
    done = run("--version", cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{__version__}\n", "")


def test_the_installed_command_is_the_same() -> None:
    """``nix-cache-proxy`` and ``python -m proxy`` are one program."""
    script = Path(sys.executable).with_name("nix-cache-proxy")
    require_tool(str(script))
    done = subprocess.run(
        [script, "--version"], capture_output=True, text=True, check=True, timeout=30
    )
    assert done.stdout == f"{__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--nope"], "--nope"),
        (["serve", "--stoer", "x"], "--store"),
        (["serve", "--listen"], "--listen"),
        (["serve", "now"], "now"),
        (["sevre"], "sevre"),
        (["--version", "--short"], "--short"),
    ],
    ids=["option", "near-option", "no-value", "argument", "command", "version"],
)
def test_wrong_usage_ends_with_2(arguments: list[str], word: str, tmp_path: Path) -> None:
    """What is not understood is named on stderr; the exit status is 2."""
    assert_failed(run(*arguments, cwd=tmp_path), 2, word, lines=4)


@pytest.mark.parametrize("command", ["serve", "check-config"])
def test_a_bad_configuration_is_named_by_file_line_and_key(
    command: str, tmp_path: Path, settings: Callable[[str], Path]
) -> None:
    """A misspelt key ends with 2 and one line: file, line, key and the nearest valid name."""
    file = settings('[store]\npath = "/nowhere"\n\n[server]\nlissten = ["127.0.0.1:0"]\n')
    done = run(command, "--config", file, cwd=tmp_path)
    assert_failed(done, 2, f'{file}:5: server.lissten: unknown key; did you mean "listen"?')


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--listen", "8627"], "--listen"),
        (["--upstream", "cache.example.org"], "--upstream"),
        (["--trusted-key", "nonsense"], "--trusted-key"),
        (["--store", ""], "--store"),
    ],
    ids=["listen", "upstream", "trusted-key", "store"],
)
def test_a_bad_flag_is_named(arguments: list[str], word: str, tmp_path: Path) -> None:
    """A flag whose value cannot be used ends with 2 and one line that begins with the flag."""
    assert_failed(run("serve", *arguments, cwd=tmp_path), 2, f"nix-cache-proxy: {word}: ")


def test_a_missing_configuration_file_is_wrong_usage(tmp_path: Path) -> None:
    """A configuration file that is not there is named, with what the system says about it."""
    file = tmp_path / "absent.toml"
    done = run("serve", "--config", file, cwd=tmp_path)
    assert_failed(done, 2, str(file), "No such file or directory")


def test_check_config_says_what_a_file_amounts_to(
    tmp_path: Path, settings: Callable[[str], Path]
) -> None:
    """``check-config`` shows addresses, store and upstreams, and what has no effect; starts nothing."""
    store = tmp_path / "store"
    file = settings(
        f'[server]\nlisten = ["127.0.0.1:1234", "[::1]:1234"]\n[store]\npath = "{store}"\n'
        '[[upstream]]\nname = "one"\nurl = "https://one.example"\n[prefetch]\nnars = "off"\n'
    )
    done = run("check-config", "--config", file, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    for word in ("127.0.0.1:1234", "[::1]:1234", str(store), "one https://one.example"):
        assert word in done.stdout
    assert not store.exists()


# --- starts that fail ---------------------------------------------------------------------------


def test_a_store_that_is_a_file_is_refused(tmp_path: Path) -> None:
    """A store folder that is a file ends with 1 and one line that names it."""
    file = tmp_path / "store"
    file.write_text("mine\n")
    done = run("serve", "--listen", "127.0.0.1:0", "--store", file, cwd=tmp_path)
    assert_failed(done, 1, str(file))
    assert file.read_text() == "mine\n"


def test_a_port_in_use_is_refused(tmp_path: Path) -> None:
    """A port that somebody else listens on ends with 1 and one line that names it."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        store = tmp_path / "store"
        done = run("serve", "--listen", address, "--store", store, cwd=tmp_path)
    assert_failed(done, 1, address, "in use")


def test_an_address_of_another_machine_is_refused(tmp_path: Path) -> None:
    """An address that this machine has not ends with 1 and one line that names it."""
    store = tmp_path / "store"
    done = run("serve", "--listen", "192.0.2.1:8627", "--store", store, cwd=tmp_path)
    assert_failed(done, 1, "192.0.2.1:8627")


def test_a_store_has_one_daemon(tmp_path: Path, daemon: RunDaemon) -> None:
    """A second daemon on a store ends with 1 and says who has it; the first one goes on."""
    first = daemon()
    done = run("serve", "--listen", "127.0.0.1:0", "--store", first.store, cwd=tmp_path)
    assert_failed(done, 1, str(first.store), "in use", str(first.process.pid))
    assert first.get("/readyz") == b"ready\n"


def test_a_store_is_free_again_after_kill_9(daemon: RunDaemon) -> None:
    """The lock of a killed daemon holds nobody up."""
    proxy = daemon()
    proxy.kill()
    proxy.start()
    assert proxy.get("/readyz") == b"ready\n"


# --- flags and defaults -------------------------------------------------------------------------


def test_flags_override_the_file(
    tmp_path: Path, threaded_sim: RunSimulator, daemon: RunDaemon
) -> None:
    """``--listen``, ``--store``, ``--upstream`` and ``--trusted-key`` win over the file."""
    signer = SigningKey("flag-1")
    wrong, right = threaded_sim(), threaded_sim(ENTRY, key=signer)
    file = tmp_path / "config.toml"
    file.write_text(
        f'[server]\nlisten = ["192.0.2.1:8627"]\n[store]\npath = "{tmp_path}/unused"\n'
        f'[log]\nformat = "json"\n[[upstream]]\nname = "wrong"\nurl = "{wrong.url}"\n'
    )
    store = tmp_path / "used"
    proxy = daemon(
        arguments=[
            *("serve", "--config", str(file), "--listen", "127.0.0.1:0", "--store", str(store)),
            *("--upstream", right.url, "--trusted-key", signer.public),
        ]
    )
    assert proxy.get(ENTRY.narinfo_path)
    assert wrong.requests == []
    assert store.is_dir()
    assert not (tmp_path / "unused").exists()


def test_upstream_flags_are_preferred_in_their_order(
    threaded_sim: RunSimulator, daemon: RunDaemon, tmp_path: Path, key: SigningKey
) -> None:
    """Of several ``--upstream``, the first that has a path is the one that it comes from."""
    first, second = threaded_sim(ENTRY), threaded_sim(ENTRY)
    proxy = daemon(
        arguments=[
            *("serve", "--listen", "127.0.0.1:0", "--store", str(tmp_path / "store")),
            *("--upstream", first.url, "--upstream", second.url, "--trusted-key", key.public),
        ]
    )
    narinfo = proxy.get(ENTRY.narinfo_path).decode()
    url = re.search(r"^URL: (.*)$", narinfo, re.MULTILINE)
    assert url is not None
    assert proxy.get(f"/{url[1]}") == bytes(ENTRY.file)
    assert (first.gets("/nar/"), second.gets("/nar/")) == (1, 0)


@pytest.mark.parametrize("with_xdg", [True, False], ids=["xdg", "home"])
def test_serve_works_without_any_configuration(
    with_xdg: bool,  # noqa: FBT001 - pytest gives it by name
    tmp_path: Path,
    daemon: RunDaemon,
) -> None:
    """Without configuration and without network it starts, is ready, and answers within its budget."""
    cache = tmp_path / "xdg" if with_xdg else tmp_path / ".cache"
    environment = {"HOME": str(tmp_path), "XDG_CACHE_HOME": str(cache) if with_xdg else ""}
    proxy = daemon(
        arguments=["serve", "--listen", "127.0.0.1:0"],
        environment={**NO_NETWORK, **environment, "CACHE_DIRECTORY": ""},
    )
    assert (cache / "nix-cache-proxy" / "nix-cache-info").is_file()
    assert proxy.get("/readyz") == b"ready\n"
    assert b"StoreDir: /nix/store\n" in proxy.get("/nix-cache-info")
    began = time.monotonic()
    assert status(proxy.url + ABSENT) == 404
    assert time.monotonic() - began < 8
    assert b"cache.nixos.org-1:" in proxy.get("/")


LOOPBACK_UP = """
import fcntl, os, socket, struct, sys
SIOCSIFFLAGS, IFF_UP = 0x8914, 1
with socket.socket() as any_socket:
    fcntl.ioctl(any_socket, SIOCSIFFLAGS, struct.pack("16sh22x", b"lo", IFF_UP))
os.execvp(sys.argv[1], sys.argv[1:])
"""

NO_NETWORK_BUT_LOOPBACK = (
    *("unshare", "--user", "--map-root-user", "--net"),
    *(sys.executable, "-c", LOOPBACK_UP),
)
"""What runs a command with a network of its own, in which there is nothing."""


@pytest.mark.needs("unshare")
def test_no_network_at_all_is_no_reason_not_to_serve(
    daemon: RunDaemon, tmp_path: Path, short_folder: Path
) -> None:
    """On a machine with nothing but loopback it is ready, says 404 in time, and serves what is here."""
    permitted = subprocess.run([*NO_NETWORK_BUT_LOOPBACK, "true"], check=False, timeout=30)
    if permitted.returncode != 0:
        pytest.skip("this machine does not permit a network namespace")
    listen = short_folder / "proxy.sock"
    proxy = daemon(
        arguments=["serve", "--listen", "127.0.0.1:0", "--listen", f"unix:{listen}"],
        environment={"XDG_CACHE_HOME": str(tmp_path), "CACHE_DIRECTORY": ""},
        wrapper=NO_NETWORK_BUT_LOOPBACK,
    )
    began = time.monotonic()
    assert unix_get(listen, "/readyz") == (200, b"ready\n")
    assert unix_get(listen, ABSENT)[0] == 404
    assert time.monotonic() - began < 9
    assert unix_get(listen, "/nix-cache-info")[0] == 200
    assert proxy.stop() == 0


def test_logs_are_json_where_there_is_no_terminal(daemon: RunDaemon, tmp_path: Path) -> None:
    """``log.format = "auto"`` writes JSON into a pipe, so that programs can read it."""
    proxy = daemon(
        arguments=["serve", "--listen", "127.0.0.1:0", "--store", str(tmp_path / "store")],
        environment=NO_NETWORK,
        ready=False,
    )
    (ready,) = proxy.wait_for_log("ready")
    assert ready["version"] == __version__


# --- where it listens ---------------------------------------------------------------------------


def test_a_unix_socket_is_listened_on(daemon: RunDaemon, short_folder: Path) -> None:
    """It serves on a Unix socket, and says so when it is ready."""
    path = short_folder / "proxy.sock"
    proxy = daemon(listen=["127.0.0.1:0", f"unix:{path}"])
    assert unix_get(path, "/readyz") == (200, b"ready\n")
    assert proxy.addresses[1] == f"unix:{path}"


def test_a_stale_unix_socket_is_replaced(daemon: RunDaemon, short_folder: Path) -> None:
    """The socket file that a killed daemon left behind does not keep the next one from starting."""
    path = short_folder / "proxy.sock"
    proxy = daemon(listen=["127.0.0.1:0", f"unix:{path}"])
    proxy.kill()
    assert path.is_socket()
    proxy.start()
    assert unix_get(path, "/readyz") == (200, b"ready\n")


def test_a_file_in_place_of_a_unix_socket_is_kept(
    daemon: RunDaemon, tmp_path: Path, short_folder: Path
) -> None:
    """A file that is no socket is not replaced by one: the start fails with 1 and one line."""
    path = short_folder / "proxy.sock"
    path.write_text("mine\n")
    store = tmp_path / "store"
    done = run("serve", "--listen", f"unix:{path}", "--store", store, cwd=tmp_path)
    assert_failed(done, 1, str(path))
    assert path.read_text() == "mine\n"


def test_several_addresses_serve_the_same(daemon: RunDaemon, short_folder: Path) -> None:
    """It listens on all addresses that it is given."""
    path = short_folder / "proxy.sock"
    proxy = daemon(listen=["127.0.0.1:0", "127.0.0.1:0", "127.0.0.2:0", f"unix:{path}"])
    assert len(set(proxy.addresses)) == 4
    for address in proxy.addresses[:3]:
        assert status(f"http://{address}/readyz") == 200
    assert unix_get(path, "/readyz")[0] == 200


def test_ipv6_is_listened_on(daemon: RunDaemon) -> None:
    """``[::1]`` is an address like any other."""
    try:
        with socket.create_server(("::1", 0), family=socket.AF_INET6):
            pass
    except OSError:
        pytest.skip("this machine has no IPv6")
    proxy = daemon(listen=["[::1]:0"])
    assert proxy.addresses[0].startswith("[::1]:")
    assert proxy.get("/readyz") == b"ready\n"


def test_an_address_in_use_leaves_nothing_behind(daemon: RunDaemon) -> None:
    """A start that fails at its second address frees the first one and the store."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        proxy = daemon(listen=["127.0.0.1:0", address], ready=False)
        assert proxy.wait() == 1
        proxy.log.clear()  # the reason is a line for people, not an entry of the log
    proxy.start()
    assert proxy.stop() == 0
