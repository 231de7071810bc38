"""The real ``nix`` as the peer: a client with a store, a home and a configuration of its own.

The store is a chroot store below the test's folder (``local?root=…``), so that no daemon is needed,
nothing below ``/nix`` is touched, and tests run in parallel. All methods block: in an async test
call them by `asyncio.to_thread`.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TypeAlias

Completed: TypeAlias = subprocess.CompletedProcess[str]

TIMEOUT = 120
"""Seconds that a command may take."""

_PASSED_ON = ("PATH", "LANG", "LC_ALL", "TZDIR", "LD_LIBRARY_PATH")


class NixClient:
    """One user of Nix with an empty store.

    Attributes:
        root: Where the store is: ``<root>/nix/store``.
        settings: What goes into ``nix.conf``, by name; change it between commands.
    """

    def __init__(self, folder: Path, *, keys: Iterable[str] = (), **settings: str) -> None:
        """Make a client in `folder` that trusts `keys`.

        Args:
            folder: An existing folder, best one of its own.
            keys: Public keys, ``name:base64``.
            settings: More of ``nix.conf``; ``_`` stands for ``-``.
        """
        self.root = folder / "root"
        self.home = folder / "home"
        self.settings = {
            "experimental-features": "nix-command",
            "substituters": "",
            "trusted-public-keys": " ".join(keys),
            "sandbox": "false",
            "build-users-group": "",
            "netrc-file": str(folder / "no-netrc"),
            "max-jobs": "0",
            "connect-timeout": "10",
            "fsync-metadata": "false",
            **{name.replace("_", "-"): value for name, value in settings.items()},
        }
        for place in (self.root, self.home, self.home / "conf"):
            place.mkdir(parents=True, exist_ok=True)

    @property
    def store(self) -> str:
        """The URL of the store."""
        return f"local?root={self.root}"

    def run(self, *command: str | Path, timeout: float = TIMEOUT) -> Completed:
        """Run any command of Nix as this user, with text output; it may fail.

        Raises:
            subprocess.TimeoutExpired: It took longer than `timeout` seconds; it was killed.
        """
        return subprocess.run(
            [str(word) for word in command],
            env=self._environment(),
            cwd=self.home,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
            timeout=timeout,
        )

    def copy_from(
        self,
        url: str,
        *paths: str,
        to: Path | None = None,
        options: Iterable[str] = (),
        timeout: float = TIMEOUT,
    ) -> Completed:
        """Copy the closures of `paths` from the cache at `url` (``nix copy``)."""
        store = f"local?root={to}" if to else self.store
        return self.run(
            "nix", "copy", "--from", url, "--to", store, *options, *paths, timeout=timeout
        )

    def copy_to(self, url: str, *paths: str, timeout: float = TIMEOUT) -> Completed:
        """Copy the closures of `paths` from our store to the cache at `url`."""
        return self.run("nix", "copy", "--from", self.store, "--to", url, *paths, timeout=timeout)

    def realise(
        self, *paths: str, substituters: Iterable[str], timeout: float = TIMEOUT
    ) -> Completed:
        """Substitute `paths` and all they need, asking `substituters` (``nix-store --realise``)."""
        urls = " ".join(substituters)
        return self.run(
            *("nix-store", "--realise", *paths, "--store", self.store),
            *("--option", "substituters", urls),
            timeout=timeout,
        )

    def path_info(
        self, *paths: str, store: str | None = None, timeout: float = TIMEOUT
    ) -> Completed:
        """Ask a cache, or our store, about `paths` (``nix path-info --json``)."""
        return self.run(
            "nix", "path-info", "--json", "--store", store or self.store, *paths, timeout=timeout
        )

    def verify(self, timeout: float = TIMEOUT) -> Completed:
        """Compare all contents of our store with their hashes."""
        return self.run(
            *("nix-store", "--verify", "--check-contents", "--store", self.store), timeout=timeout
        )

    def installed(self) -> set[str]:
        """Return the base names of all valid paths of our store.

        Raises:
            subprocess.CalledProcessError: The store cannot be read.
        """
        listed = self.run("nix", "path-info", "--all", "--store", self.store)
        listed.check_returncode()
        return {line.rpartition("/")[2] for line in listed.stdout.splitlines()}

    def dump(self, store_path: str) -> bytes:
        """Return the NAR of a path as it lies in our store.

        Raises:
            subprocess.CalledProcessError: It is not there.
        """
        real = self.root / store_path.lstrip("/")
        command = ["nix-store", "--dump", str(real)]
        return subprocess.run(
            command, env=self._environment(), check=True, capture_output=True, timeout=TIMEOUT
        ).stdout

    def forget(self) -> None:
        """Forget what the client remembers of caches: found and missing narinfos."""
        for remembered in (self.home / "cache").glob("nix/binary-cache-*"):
            remembered.unlink()

    def _environment(self) -> Mapping[str, str]:
        home = self.home
        return {
            **{name: os.environ[name] for name in _PASSED_ON if name in os.environ},
            "HOME": str(home),
            "TMPDIR": str(self.root),
            "XDG_CACHE_HOME": str(home / "cache"),
            "XDG_CONFIG_HOME": str(home / "config"),
            "XDG_DATA_HOME": str(home / "data"),
            "XDG_STATE_HOME": str(home / "state"),
            "NIX_CACHE_HOME": str(home / "cache" / "nix"),
            "NIX_CONF_DIR": str(home / "conf"),
            "NIX_USER_CONF_FILES": "",
            "NIX_STATE_DIR": str(home / "nix-state"),
            "NIX_LOG_DIR": str(home / "nix-log"),
            "NIX_REMOTE": self.store,
            "NIX_CONFIG": "".join(f"{name} = {value}\n" for name, value in self.settings.items()),
        }
