"""Labels that say which upstream a file is from."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from proxy.store.provenance import ATTRIBUTE, label, origin_of


def test_a_label_stays(tmp_path: Path) -> None:
    """It follows a file to its final name, and not the bytes into another file."""
    path = tmp_path / "file"
    path.touch()
    assert origin_of(path) == ""
    label(path, "cache-1_example")
    path = path.rename(tmp_path / "final")
    assert origin_of(path) == "cache-1_example"
    assert origin_of(Path(shutil.copyfile(path, tmp_path / "copy"))) == ""


@pytest.mark.parametrize("text", [b"", b"up\r\nX-Evil: 1", b"UP", b"a b", b"\xff", b"a" * 65])
def test_what_is_no_name_is_no_label(text: bytes, tmp_path: Path) -> None:
    """Whoever else writes to the folder writes no headers of ours."""
    path = tmp_path / "file"
    path.touch()
    os.setxattr(path, ATTRIBUTE, text)
    assert origin_of(path) == ""


def test_no_attributes(tmp_path: Path) -> None:
    """Where there can be none, nothing fails, and nobody knows."""
    path = tmp_path / "link"
    path.symlink_to("nowhere")
    label(path, "up")
    assert origin_of(path) == ""
