"""The units: systemd understands them, and the service is locked in."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

from tests.conftest import require_tool

UNITS = Path(__file__).parent.parent / "systemd"
SERVICE = UNITS / "nix-cache-proxy.service"
LARGEST_EXPOSURE = 15
"""In tenths, as ``--threshold`` takes it: a bare unit has 96, ours 11."""


def _systemd_analyze(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    require_tool("systemd-analyze")
    return subprocess.run(
        ["systemd-analyze", *arguments],
        check=False,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_units_are_understood(tmp_path: Path) -> None:
    """Systemd loads the service and the socket, and knows every key and value in them."""
    units = [shutil.copy(unit, tmp_path) for unit in sorted(UNITS.iterdir())]
    service = tmp_path / SERVICE.name
    # The program has to exist, and here it is not under /opt.
    text, programs = re.subn(
        r"(?m)^ExecStart=\S+", f"ExecStart={sys.executable}", service.read_text()
    )
    service.write_text(text)

    verified = _systemd_analyze("verify", *units)

    assert programs == 1
    assert (verified.returncode, verified.stdout) == (0, "")


def test_service_is_hardened() -> None:
    """The service's exposure stays below the threshold."""
    rated = _systemd_analyze(
        "security", "--offline=true", "--no-pager", f"--threshold={LARGEST_EXPOSURE}", SERVICE
    )

    assert rated.returncode == 0, rated.stdout
