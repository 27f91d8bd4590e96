"""The table fits, marks what is lost, and says where not to trust it."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import record as records
from benchmarks.peers import PEERS
from benchmarks.record import load
from benchmarks.studies.grid import table
from benchmarks.studies.grid.command import STUDY
from benchmarks.studies.grid.records import Record
from benchmarks.text import Console
from tests.help.benched import synthetic_record

pytestmark = pytest.mark.once


def test_table_fits_and_marks_losses(capsys: pytest.CaptureFixture[str]) -> None:
    record = synthetic_record()
    # The widest row there can be: the longest heads there is room for, every figure at its longest.
    heads = sorted(set(PEERS) - {"by_segment"}, key=lambda name: -len(PEERS[name].short))
    for case in record.cases:
        case.rows, case.S = 2048, 2048
        for name in heads[: table.ROOM - 1]:
            case.times[name] = case.times["by_segment"]
            case.ratios["sgmv@2"].setdefault(name, 0.51)
        case.times["sgmv@2"].q50 = case.times["sgmv@1"].q50 = 123456.0
    console = Console()
    table.print_table(record, console)
    table.print_summary(record, console)
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 100
    rows = [line.split() for line in printed.splitlines() if line.split()[:2] == ["16", "2048"]]
    assert [("2.00x" in row, "0.50x!" in row) for row in rows] == [(True, False), (False, True)]
    assert "do not trust" not in printed


def test_busy_machine_is_told_and_not_recorded(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    record = synthetic_record()
    record.cases[1].foreign_cores = 0.8
    assert "1 of 2 cases, marked ?: do not trust" in " ".join(table.noise(record))
    monkeypatch.setattr(records, "RECORDS", tmp_path / "records")
    args = STUDY.parser("benchmarks").parse_args(["--record", "--no-figures"])
    args.output = tmp_path / "out"
    STUDY.keep(record, args, Console())
    assert "not recorded" in capsys.readouterr().out
    assert not records.RECORDS.exists()
    assert load(Record, tmp_path / "out" / "quick.json") == record

    record.cases[1].foreign_cores = None
    STUDY.keep(record, args, Console())
    (written,) = records.RECORDS.iterdir()
    assert written.name.startswith("quick-")
