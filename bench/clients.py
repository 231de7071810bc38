"""Real Nix, of the system or of another Debian's."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path

from bench.content import KEY
from tests.nix_client import TIMEOUT, Completed, NixClient

MakeClient = Callable[[Path], NixClient]
"""Makes a client with an empty store in an empty folder."""

# Its mounts are its own and vanish with it; the folder of the client is at the same place inside.
_ENTER = """
set -e
root=$1 shared=$2
shift 2
mount -t tmpfs tmpfs "$root/tmp"
mkdir -p "$root$shared"
mount --bind "$shared" "$root$shared"
mount --rbind /dev "$root/dev"
mount -t proc proc "$root/proc"
exec chroot "$root" "$@"
"""


class ChrootClient(NixClient):
    """Nix of a system below another root, for example one that debootstrap made; takes root."""

    def __init__(self, folder: Path, system: Path) -> None:
        super().__init__(folder, keys=[KEY.public])
        self._enter = (
            *("unshare", "--mount", "--propagation", "private"),
            *("sh", "-c", _ENTER, "sh", str(system), str(folder)),
        )

    def run(self, *command: str | Path, timeout: float = TIMEOUT) -> Completed:
        """Run any command of Nix as this user."""
        return super().run(*self._enter, *command, timeout=timeout)


def client_maker(system: Path | None) -> MakeClient:
    """Return what makes clients of a system; None is this one."""
    if system is None:
        return lambda folder: NixClient(folder, keys=[KEY.public])
    if not (system / "usr/bin/nix").exists():
        sys.exit(
            f"{system} has no Nix; as root: debootstrap --variant=minbase "
            f"--include=nix-bin,libdbi-perl trixie {system}"
        )
    return lambda folder: ChrootClient(folder, system)


def version(make_client: MakeClient, folder: Path) -> str:
    """Return the version of Nix, for example ``2.8.0``.

    Raises:
        subprocess.CalledProcessError: It cannot be run.
    """
    folder.mkdir()
    try:
        said = make_client(folder).run("nix", "--version")
        said.check_returncode()
    finally:
        shutil.rmtree(folder)
    return said.stdout.split()[-1]
