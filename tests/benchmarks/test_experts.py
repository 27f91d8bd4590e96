"""The study of experts times what it says, and nothing that is wrong."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from benchmarks import __main__ as command
from benchmarks.record import load
from benchmarks.studies import experts
from benchmarks.studies.experts import ExpertsCase, ExpertsRecord, Widths
from sgmv import experts as ours
from tests.help.benched import ONE_CALL, must_not_run, times

pytestmark = pytest.mark.once


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experts, "LAYERS", (Widths("tiny", 64, 48, 4, 2),))
    monkeypatch.setattr(experts, "ROWS", (1, 7))
    measure = experts.measure
    monkeypatch.setattr(experts, "measure", lambda *case: measure(*case, budget=ONE_CALL))


@pytest.mark.usefixtures("narrow")
def test_products_and_deltas_are_timed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["experts", "--threads", "1", "--output", str(tmp_path)]) == 0
    cases = load(ExpertsRecord, tmp_path / "experts.json").cases
    assert {case.what for case in cases} == {"products", "deltas"}
    assert all({"sgmv", "loop"} <= set(case.times) for case in cases)
    assert "products, loop / sgmv, geometric mean" in capsys.readouterr().out
    text = experts.page(load(ExpertsRecord, tmp_path / "experts.json"), "e.json").split("\n\n")
    assert "record: `benchmarks/records/e.json`. Geometric mean of 1, 7 rows" in text[0]
    assert len(text[1].splitlines()) == 2 + len({(case.what, case.dtype) for case in cases})
    assert "deltas, loop / sgmv, geometric mean" in text[2]


def test_the_page_has_means_and_the_least() -> None:
    """Ratios 2 and 8 are 4 in the mean; a peer that did not run has none."""
    made = [
        ExpertsCase("a layer", "products", "float32", rows, rows, {"sgmv": ours, "loop": its}, None)
        for rows, ours, its in ((1, times(10), times(20)), (7, times(10), times(80)))
    ]
    record = SimpleNamespace(cases=made, threads=2)
    assert experts.summary(cast(ExpertsRecord, record)).markdown().splitlines()[2:] == [
        "| a layer | products | float32 | 4.00x (2.00x) | - | - | - |"
    ]
    made[0].times["loop"] = times(5)
    assert "2.00x (0.50x!)" in experts.summary(cast(ExpertsRecord, record)).markdown()


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize("name", ["grouped_matmul", "add_lora"])
def test_what_is_wrong_is_not_timed(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    right = getattr(ours, name)

    def wrong(*operands: Any) -> Any:
        found = right(*operands)
        found[-1, -1, -1] += 1
        return found

    monkeypatch.setattr(ours, name, wrong)
    monkeypatch.setattr(experts, "time_quietly", must_not_run)
    assert command.main(["experts", "--output", str(tmp_path)]) == 1
    assert "RED, nothing was timed" in capsys.readouterr().out
