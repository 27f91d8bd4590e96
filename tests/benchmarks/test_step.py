"""The study `step`: what it measures, and the costs that it fits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

import sgmv
from benchmarks import __main__ as command
from benchmarks.engine import Llama
from benchmarks.record import load
from benchmarks.studies import step
from benchmarks.studies.step import StepCase, StepRecord, fitted
from sgmv.serving import Costs
from sgmv.serving.command import costs_of
from tests.help.benched import must_not_run

pytestmark = pytest.mark.once


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (
        ("ROWS", (1, 3)), ("ADAPTERS", (1, 2)), ("RANKS", (2, 4)), ("TURN_S", 0.0), ("ROUNDS", 2),
        ("SHAPE", Llama(40, 40, heads=5, kv_heads=5, head_dim=8, layers=2, vocabulary=64)),
    ):  # fmt: skip
        monkeypatch.setattr(step, name, value)


@pytest.mark.usefixtures("small")
def test_a_run_gives_costs_that_the_simulator_reads(tmp_path: Path) -> None:
    assert command.main(["step", "--threads", "1", "--output", str(tmp_path)]) == 0
    record = load(StepRecord, tmp_path / "step.json")
    steps = [case for case in record.cases if case.what == "step"]
    assert {(c.rows, c.adapters, c.rank) for c in steps} == {
        (rows, adapters, rank)
        for rows in (1, 3) for adapters in (1, 2) for rank in (2, 4) if adapters <= rows
    }  # fmt: skip
    assert [c.what for c in record.cases[len(steps) :]] == ["load", "read"] * 2
    # All seven modules, 2 layers, float32, rank 16.
    assert record.costs.adapter_bytes == 16 * 2 * 4 * 7 * 80
    told = costs_of(tmp_path / "step.json")
    assert Costs(**told) == Costs(**msgspec.structs.asdict(record.costs))


def case(rows: int, adapters: int, rank: int, base: float, lora: float) -> Any:
    times = {
        name: step.summary([[round(us * 1e3 / step.SHAPE.layers)]])
        for name, us in (("base", base), ("lora", lora))
    }
    return StepCase("step", rows, adapters, rank, times, 0.0)


def test_the_fit_finds_what_made_the_times() -> None:
    base = {1: 900e3, 4: 2000e3, 16: 2500e3, 64: 4000e3}
    cases = [
        case(rows, adapters, rank, base[rows], 800 + 40 * rows + 300 * adapters + 5 * rows * rank)
        for rows in step.ROWS for adapters in step.ADAPTERS for rank in step.RANKS
    ]  # fmt: skip
    per_rank = 1e6
    for what in ("load", "read"):
        us = {"load": 2 * per_rank, "read": 8 * per_rank}[what]
        cases.append(StepCase(what, 0, 1, 16, {what: step.summary([[round(us)]])}, 0.0))
    found = fitted(cases)
    assert found.adapter_us == pytest.approx(300, rel=0.05)
    assert found.rank_us == pytest.approx(5, rel=0.05)
    for (rows, us), (at, expected) in zip(found.base_us, base.items(), strict=True):
        assert rows == at
        assert us == pytest.approx(expected + 800 + 40 * rows, rel=0.001)
    assert found.load_rate == pytest.approx(4 * found.read_rate)


@pytest.mark.usefixtures("small")
def test_a_wrong_result_is_not_timed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(step, "quietly", must_not_run)
    monkeypatch.setattr(sgmv, "add_lora", lambda y, x, stack, ids: np.add(y, 1.0, out=y))
    assert command.main(["step", "--output", str(tmp_path)]) == 1
