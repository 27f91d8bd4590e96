"""The table fits, marks what is lost, and says where not to trust it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from benchmarks import record as records
from benchmarks.clock import Budget
from benchmarks.peers import PEERS
from benchmarks.record import load
from benchmarks.studies.grid import command as grid
from benchmarks.studies.grid import readme, run, table
from benchmarks.studies.grid.cases import Case
from benchmarks.studies.grid.command import STUDY
from benchmarks.studies.grid.records import Record, case_label
from benchmarks.text import Console
from tests.help.benched import FLAT, synthetic_record

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


def test_a_ratio_is_undecided_where_its_interval_spans_1(
    capsys: pytest.CaptureFixture[str],
) -> None:
    record = synthetic_record()
    for case, rounds in zip(record.cases, ([18.0, 22.0], [4.0, 11.0]), strict=True):
        case.times["sgmv@2"].rounds, case.times["by_segment"].rounds = [10.0, 10.0], rounds
    table.print_table(record, Console())
    shown = capsys.readouterr().out
    assert "2.00x " in shown
    assert "0.50x~" in shown
    assert "0.50x!" not in shown
    assert "| 0.50x~ |" in readme.cases_table(record, "") + readme.cases_table(
        replace(record, cases=record.cases[1:]), ""
    )


def test_the_worst_cases_are_timed_again_by_themselves(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    record, seen = synthetic_record(), list[tuple[str, int]]()
    cases = [
        Case(c.h_in, c.h_out, c.rank, c.rows, c.popularity, c.dtype, tuple(c.names))
        for c in record.cases
    ]
    win, loss = cases
    groups = [run.Group(lambda: None, [(case, None) for case in cases])]  # type: ignore[arg-type,return-value,list-item]

    def measure(case: Case, pool: Any, ids: Any, terms: run.Terms, until: Any) -> Any:
        seen.append((case.popularity, terms.budget.rounds))
        found = copy.deepcopy(record.cases[cases.index(case)])
        found.ratios["sgmv@2"]["by_segment"] = 1.25
        return found

    monkeypatch.setattr(run, "measure", measure)
    terms = run.Terms([1, 2], Budget(rounds=3), 0, FLAT)
    timing = grid.Timing(groups, terms, Console(), dict(zip(cases, record.cases, strict=True)))
    record.again = timing.worst(1)
    assert seen == [("identical", 6)]
    table.print_again(record, Console())
    row = capsys.readouterr().out.splitlines()[-1].split()
    assert (row[-4], row[-2]) == ("0.50x!", "1.25x")
    assert [case_label(case) for case in record.again] == [loss.label()]
    assert win.label() != loss.label()
