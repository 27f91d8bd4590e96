"""The study `replicas`: what it times, and that a wrong simulator is not timed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks import __main__ as command
from benchmarks.record import load
from benchmarks.studies import replicas
from benchmarks.studies.replicas import ReplicasRecord
from sgmv.serving import Trace, simulate
from sgmv.serving.replicas import RULES
from tests.help.benched import must_not_run

pytestmark = pytest.mark.once


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (
        ("REPLICAS", 3), ("SLOTS", 2), ("ADAPTERS", 9), ("SIZES", (10, 20, 60)), ("FULL", 90),
        ("BASELINE", 30),
    ):  # fmt: skip
        monkeypatch.setattr(replicas, name, value)


def test_every_placement_is_timed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["replicas", "--full", "--output", str(tmp_path)]) == 0
    record = load(ReplicasRecord, tmp_path / "replicas.json")
    baseline, *cases = record.cases
    assert (baseline.placement, baseline.replicas, baseline.requests) == ("simulate", 1, 30)
    assert [(case.placement, case.requests) for case in cases] == [
        (rule, requests) for requests in (10, 20, 60, 90) for rule in RULES
    ]
    assert [case.times.calls for case in cases] == [3] * 10 + [1] * 10
    assert all(case.busy_share is not None and 0 < case.busy_share <= 1 for case in cases)
    assert cases[0].us == pytest.approx(cases[0].times.q50 / 10)
    assert "us a request" in capsys.readouterr().out
    [line] = [row for row in replicas.tables(record)[0].rows if row[0] == "ray"]
    figures = [f"{case.us:.2f}" for case in cases if case.placement == "ray"]
    # Columns of 10, 20, 30 (the baseline's), 60 and 90 requests.
    assert line[2:7] == [*figures[:2], "-", *figures[2:]]


def test_a_wrong_simulator_is_not_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def wrong(trace: Trace, replicas: int, placement: str, max_loras: int) -> Any:
        outcome = simulate(trace, max_loras)
        if placement == "ray":
            outcome.wait_us[-1] += 1
        return outcome

    monkeypatch.setattr(replicas, "simulate_replicas", wrong)
    monkeypatch.setattr(replicas, "quietly", must_not_run)
    assert command.main(["replicas", "--output", str(tmp_path)]) == 1
    assert "ray: one replica is not `simulate`" in capsys.readouterr().out
    assert not (tmp_path / "replicas.json").exists()
