"""The command from gate to record: what is timed, again or not, and told."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from benchmarks import __main__ as command
from benchmarks import gate
from benchmarks import record as records
from benchmarks.batch import ONE_ROW
from benchmarks.clock import Deadline
from benchmarks.record import load
from benchmarks.studies.grid import command as grid
from benchmarks.studies.grid import run, table
from benchmarks.studies.grid.cases import Case
from benchmarks.studies.grid.records import CallTimes, Record, case_label
from benchmarks.text import Console
from tests.help.benched import FLAT, Clock, synthetic_record

pytestmark = pytest.mark.once


ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def fake_run(monkeypatch: pytest.MonkeyPatch) -> tuple[Clock, list[tuple[str, float]]]:
    """A benchmark in which nothing but the clock is measured, and when each table was printed."""
    clock, printed = Clock(), list[tuple[str, float]]()
    print_table = table.print_table

    def first_use_s() -> float:
        clock.seconds += 13.0
        return 13.0

    def measure(case: Case, pool: Any, ids: Any, terms: Any, until: Deadline) -> Any:
        clock.seconds += 4.0
        fields = ("h_in", "h_out", "rank", "rows", "popularity", "dtype")
        its = {name: getattr(case, name) for name in fields}
        return replace(synthetic_record().cases[0], foreign_cores=0.9, **its)

    def shown(record: Record, console: Console, only: Any = None) -> None:
        printed.append(("all" if only is None else "again", clock.seconds - 1000.0))
        print_table(record, console, only)

    monkeypatch.setattr(run, "first_use_s", first_use_s)
    monkeypatch.setattr(run, "measure", measure)
    monkeypatch.setattr(run, "_synthetic_pool", lambda *sizes: None)
    monkeypatch.setattr(run, "call_us", lambda: CallTimes(2.0, 6.0))
    monkeypatch.setattr(gate, "corpus_failures", lambda *_: (3, []))
    monkeypatch.setattr(grid, "probe", lambda threads, repeats: FLAT)
    monkeypatch.setattr(table, "print_table", shown)
    return clock, printed


ARGV = ["--threads", "1", "2", "--no-figures", "--output"]


def test_no_case_delays_the_table_and_patience_is_kept_to(
    fake_run: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Every case takes 4 s and is noisy: what a busy machine looks like."""
    clock, printed = fake_run
    assert command.main([*ARGV, str(tmp_path), "--patience", "120"], now=clock) == 0
    text = capsys.readouterr().out
    assert "to time: 41 cases" in text
    assert "65 s at the most; then noisy cases again, for 120 s" in text
    timed = 13  # 13 s of compiling, then 4 s each, and none begins after 65 s
    assert printed == [("all", 13.0 + 4 * timed), ("again", 13.0 + 4 * timed + 120.0)]
    assert clock.seconds - 1000.0 == 13.0 + 4 * timed + 120.0
    assert f"during {timed} of {timed} cases, marked ?" in text
    assert f"no time was left for {41 - timed} cases" in text
    counts = [tuple(map(int, found)) for found in re.findall(r"(\d+)/(\d+) \d+>", text)]
    assert all(done < total for done, total in counts)
    assert {total for _done, total in counts} == {41}
    record = load(Record, tmp_path / "quick.json")
    assert len(record.cases) == len(record.noisy) == 41
    assert record.untimed == {}


@pytest.mark.parametrize("patience", ["0", "9"])
def test_rows_that_stay_noisy_or_untimed_are_in_table_and_record(
    patience: str, fake_run: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    clock, printed = fake_run
    assert command.main([*ARGV, str(tmp_path), "--patience", patience], now=clock) == 0
    text = capsys.readouterr().out
    record = load(Record, tmp_path / "quick.json")
    again = {"0": 0, "9": 3}[patience]
    assert len(printed) == 1 + bool(again)
    assert ("timed again" in text) == bool(again)
    assert ("then noisy cases again" in text) == bool(again)
    assert clock.seconds - 1000.0 == 65.0 + 4 * again
    assert record.noisy == [case_label(case) for case in record.cases]
    assert len(record.cases) == 13 + again
    assert set(record.untimed.values()) == {grid.NO_TIME}
    assert len(record.untimed) == 28 - again
    first, *second = text.split("timed again: ")
    marked = r"^\? +\d+ +\d+ +\w+"
    assert len(re.findall(marked, first, re.MULTILINE)) == 13
    assert [len(re.findall(marked, part, re.MULTILINE)) for part in second] == [again] * len(second)


def test_each_pass_counts_its_own_cases(
    fake_run: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    clock, printed = fake_run
    slow = run.measure

    def measure(case: Case, *rest: Any) -> Any:
        found = slow(case, *rest)
        clock.seconds -= 3.0  # 1 s each: there is time for all
        late = clock.seconds > 1000.0 + 13.0 + 41.0
        return replace(found, foreign_cores=0.9 if case.rank == 8 and not late else 0.0)

    monkeypatch.setattr(run, "measure", measure)
    assert command.main([*ARGV, str(tmp_path)], now=clock) == 0
    text = capsys.readouterr().out
    first, again = text.split("noisy cases again, for at most 30 s")
    assert set(re.findall(r"^ +\d+/(\d+) \d+>", first, re.MULTILINE)) == {"41"}
    assert re.findall(r"^ +(\d+)/(\d+) \d+>", again, re.MULTILINE)[0] == ("0", "4")
    assert "4 rows changed, 0 of 41 cases are noisy now" in again
    assert "?" not in again
    assert "(4 of 41 cases noisy)" in first
    assert load(Record, tmp_path / "quick.json").noisy == []
    assert printed == [("all", 54.0), ("again", 58.0)]


def test_ctrl_c_while_cases_are_timed_again_keeps_what_there_is(
    fake_run: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    clock, _printed = fake_run
    measure = run.measure

    def interrupted(*arguments: Any) -> Any:
        if clock.seconds > 1068.0:
            raise KeyboardInterrupt
        return measure(*arguments)

    monkeypatch.setattr(run, "measure", interrupted)
    assert command.main([*ARGV, str(tmp_path), "--patience", "60"], now=clock) == 0
    assert "interrupted" in capsys.readouterr().out
    assert len(load(Record, tmp_path / "quick.json").cases) == 14


def test_a_record_to_commit_takes_the_time_it_needs(
    fake_run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, printed = fake_run
    monkeypatch.setattr(records, "RECORDS", tmp_path / "records")
    argv = ["--record", "--no-figures", "--patience", "0"]
    monkeypatch.setattr(grid, "cores", lambda: 2)
    assert command.main(argv, now=clock) == 0
    assert printed == [("all", 13.0 + 4 * 41)]


def test_command_line_from_gate_to_record(tmp_path: Path) -> None:
    # A bare environment of its own: the probe and the timings need the compiler.
    environment = {k: v for k, v in os.environ.items() if k != "NUMBA_DISABLE_JIT"}
    argv = ["--model", "Qwen2.5-7B", "--layer", "kv", "--rank", "8", "--rows", "1", "4"]
    done = subprocess.run(
        [
            sys.executable, "-m", "benchmarks", *argv, "--popularity", "skewed",
            "--threads", "1", "--no-figures", "--patience", "0", "--output", str(tmp_path),
        ],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    parts = ("gate: green", "ceiling, 1", "3584 > 512", "lost")
    order = [done.stdout.index(part) for part in parts]
    assert order == sorted(order)
    record = load(Record, tmp_path / "quick.json")
    assert [case.rows for case in record.cases] == [1, 4]
    assert [case.popularity for case in record.cases] == [ONE_ROW, "skewed"]
    assert record.gate.corpus_cases > 30
    assert [path.name for path in tmp_path.iterdir()] == ["quick.json"]
