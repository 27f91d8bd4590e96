"""The study of mixtures times what it says, and nothing that is wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import sgmv
from benchmarks import __main__ as command
from benchmarks.record import load
from benchmarks.studies import mixtures
from benchmarks.studies.mixtures import MixtureRecord
from tests.help.benched import ONE_CALL, must_not_run

pytestmark = pytest.mark.once


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mixtures, "H", 96)
    monkeypatch.setattr(mixtures, "ROWS", (3,))
    measure = mixtures.measure
    monkeypatch.setattr(mixtures, "measure", lambda *case: measure(*case, budget=ONE_CALL))


@pytest.mark.usefixtures("narrow")
def test_every_mix_is_timed_in_every_form(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["mixtures", "--threads", "1", "--output", str(tmp_path)]
    assert command.main(argv) == 0
    cases = load(MixtureRecord, tmp_path / "mixtures.json").cases
    assert [(case.k, case.mix) for case in cases] == [
        (2, "drawn"), (4, "drawn"), (2, "shared"), (4, "shared")
    ]  # fmt: skip
    assert [set(case.times) for case in cases] == [{"sgmv", "calls"}] * 2 + [
        {"sgmv", "calls", "merged"}
    ] * 2
    assert [case.S for case in cases[2:]] == [2, 4]
    assert "k calls / one call, geometric mean" in capsys.readouterr().out
    text = mixtures.page(load(MixtureRecord, tmp_path / "mixtures.json"), "m.json").split("\n\n")
    assert "record: `benchmarks/records/m.json`. ! marks a loss" in text[0]
    assert len(text[1].splitlines()) == 2 + len(cases)
    assert "geometric mean" in text[2]


def test_no_adapter_is_in_a_row_twice() -> None:
    assert all(len(set(row)) == 4 for row in mixtures.drawn_ids(50, 4, "drawn").tolist())


@pytest.mark.usefixtures("narrow")
def test_a_wrong_mixture_is_not_timed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    add_lora = sgmv.add_lora

    def first_alone(y: Any, x: Any, stack: Any, segments: Any) -> Any:
        return add_lora(y, x, stack, np.zeros(len(y), np.int64))

    monkeypatch.setattr(sgmv, "add_lora", first_alone)
    monkeypatch.setattr(mixtures, "time_quietly", must_not_run)
    assert command.main(["mixtures", "--output", str(tmp_path)]) == 1
    assert "RED, nothing was timed" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []
