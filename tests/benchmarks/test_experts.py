"""The study of experts times what it says, and nothing that is wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks import __main__ as command
from benchmarks.record import load
from benchmarks.studies import experts
from benchmarks.studies.experts import ExpertsRecord, Widths
from sgmv import experts as ours
from tests.help.benched import ONE_CALL, must_not_run

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
