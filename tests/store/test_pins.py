"""The files of pins: what is written is read, by people too, and a bad line harms no other."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.errors import CommandError, StoreError
from proxy.nix.store_path import StorePath
from proxy.store.layout import Layout
from proxy.store.pins import Pin, PinFiles, check_pin_name
from tests.closures import nix32, sha256

PATHS = [
    StorePath.parse(f"/nix/store/{nix32(sha256(str(n).encode()))[:32]}-path-{n}") for n in range(9)
]


@pytest.fixture
def files(tmp_path: Path) -> PinFiles:
    """Return the pins of an empty folder."""
    layout = Layout(tmp_path)
    layout.partials.mkdir(parents=True)
    return PinFiles(layout)


def test_what_is_written_is_read(files: PinFiles) -> None:
    """A pin comes back as it was, needs sorted; a second one of the same name replaces it."""
    assert files.read() == {}
    files.write("b", Pin((PATHS[3], PATHS[1]), (PATHS[2],)))
    files.write("a", Pin((PATHS[5],), ()))
    assert list(files.read().items()) == [
        ("a", Pin((PATHS[5],), ())),
        ("b", Pin((PATHS[3], PATHS[1]), (PATHS[2],))),
    ]
    files.write("a", Pin((PATHS[0],), tuple(PATHS[7:])))
    assert files.hash_parts() == {PATHS[n].hash_part for n in (0, 1, 2, 3, 7, 8)}
    assert files.remove("a")
    assert not files.remove("a")
    assert list(files.read()) == ["b"]


def test_people_can_write_pins(files: PinFiles, tmp_path: Path) -> None:
    """Comments, blank lines and what is no store path keep nothing, and do not harm the rest."""
    folder = tmp_path / "pins"
    (folder / "a-folder").mkdir(parents=True)
    (folder / "mine").write_bytes(
        f"# note\n\n {PATHS[0]} \n/etc/passwd\n\xff\n{PATHS[1]}\n\n# more\n{PATHS[2]}".encode(
            "latin-1"
        )
    )
    (folder / "mine~").write_text(f"{PATHS[3]}\n")
    (folder / "empty").write_text("")

    assert files.read() == {
        "empty": Pin((), ()),
        "mine": Pin((PATHS[0], PATHS[1]), (PATHS[2],)),
    }


def test_a_disk_that_fails_leaves_the_pin(files: PinFiles, tmp_path: Path) -> None:
    """What cannot be written is an error of ours, and what was pinned before still is."""
    files.write("a", Pin((PATHS[0],), ()))
    (tmp_path / ".state" / "partial").rmdir()
    with pytest.raises(StoreError, match="cannot pin a"):
        files.write("a", Pin((PATHS[1],), ()))
    assert files.read() == {"a": Pin((PATHS[0],), ())}


@given(name=st.text(max_size=110))
def test_names_are_names_of_files(name: str) -> None:
    """A name that passes is one plain file in the folder, neither hidden nor an option."""
    try:
        check_pin_name(name)
    except CommandError:
        return
    assert name.isascii()
    assert Path(name).name == name
    assert 1 <= len(name) <= 100
    assert name[0] not in ".-"


@pytest.mark.parametrize("name", ["a", "Z9", "x.y_z-1", "0", "_"])
def test_words_are_names(name: str) -> None:
    """Ordinary words pass."""
    check_pin_name(name)
