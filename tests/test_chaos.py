"""A few cells of the matrix of faults, and that its witness would notice; `make soak` has the others."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.chaos import (
    ANSWERS,
    CONNECTIONS,
    HELPS,
    KEY,
    MOMENTS,
    Cell,
    Outcome,
    Witness,
    matrix,
    report,
    run,
)
from tests.closures import StoreEntry
from tests.conftest import RunSimulator
from tests.daemon import DaemonProcess

CELLS = [
    Cell("TLS failure", "before headers", "connection", "second upstream"),
    Cell("black hole", "before headers", "connection", "fallback substituter"),
    Cell("5xx", "before headers", "narinfo", "second upstream"),
    Cell("wrong path", "first byte", "narinfo", "second upstream"),
    Cell("corrupted", "first byte", "nar", "fallback substituter"),
    Cell("stalled", "before headers", "nar", "fallback substituter"),
    Cell("cut", "middle", "nar", "second upstream"),
    Cell("cut", "middle", "nar", "the fault ends"),
]
"""Quick ones, of different kinds."""


@pytest.mark.needs("nix-store", "openssl")
@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_cell(cell: Cell, tmp_path: Path) -> None:
    """The build comes out, every body is the signed one, and the fault has really struck."""
    outcome = run(cell, tmp_path)

    assert outcome.broken == ""
    assert outcome.wrong == 0
    assert outcome.served > 0
    assert outcome.injected != 0


def test_matrix_is_whole() -> None:
    """Every fault is there with all its moments, with each kind of help, and each cell once."""
    cells = matrix()

    assert len(set(cells)) == len(cells) > 100
    assert set(CELLS) <= set(cells)
    assert {cell.fault for cell in cells} == {*ANSWERS, *CONNECTIONS, "wrong path"}
    for help_ in HELPS:
        assert {cell.moment for cell in cells if cell.help == help_} == set(MOMENTS)


def test_witness_sees_wrong_bytes(threaded_sim: RunSimulator, tmp_path: Path) -> None:
    """Complete answers other than the truth that the witness was told are counted as wrong."""
    entry = StoreEntry.make("thing-1.0", b"right")
    liar = entry.but(nar=StoreEntry.make("thing-1.0", b"wrong").nar)
    outcome = Outcome()
    with DaemonProcess(
        tmp_path / "proxy", upstreams=[threaded_sim(liar).url], keys=[KEY.public]
    ) as daemon:
        witness = Witness(daemon.url, [entry], outcome)
        with witness.listening() as url:
            daemon.url = url
            text = daemon.get(entry.narinfo_path).decode()
            assert (outcome.served, outcome.wrong) == (1, 1)

            nar = dict(line.split(": ", 1) for line in text.splitlines())["URL"]
            daemon.get(f"/{nar}")
            assert (outcome.served, outcome.wrong) == (2, 1)  # a URL of which nobody told it


def test_report_fails(capsys: pytest.CaptureFixture[str]) -> None:
    """One wrong byte, one broken build, or nothing done at all is a failure."""
    good, wrong, broken = Outcome(9, 4), Outcome(9, 4, wrong=1), Outcome(9, 4, broken="it hangs")

    assert report([(CELLS[0], good)], 1) == 0
    assert report([(CELLS[0], good), (CELLS[1], wrong)], 2) == 1
    assert report([(CELLS[0], good), (CELLS[1], broken)], 2) == 1
    assert report([], 2) == 1
    assert "requests served 18, faults injected 8, wrong bytes 1" in capsys.readouterr().out
