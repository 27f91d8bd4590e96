"""The gate is red on a wrong kernel, and nothing is timed behind it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import __main__ as command
from benchmarks import clock, gate
from benchmarks.batch import make_batch, make_pool, popularity_ids
from benchmarks.studies.grid import command as grid
from benchmarks.studies.grid import run
from reference import workloads
from tests.help.benched import (
    FLAT,
    few_corpus_cases,
    last_row_dropped,
    must_not_run,
    nan,
    one_element_off,
    twice,
    unscaled,
    workloads_corpus,
)

pytestmark = pytest.mark.once


@pytest.mark.parametrize("wrong", [unscaled, last_row_dropped, one_element_off, nan, twice])
def test_case_gate_is_red_on_a_wrong_kernel(wrong: Any) -> None:
    pool = make_pool(64, 40, 4, 16, np.dtype(np.float32), seed=1)
    batch = make_batch(pool, popularity_ids("distinct", 16, seed=1), seed=1)
    with pytest.raises(gate.GateError, match="planted"):
        gate.check_case(batch, {"planted": wrong}, seed=0)


@pytest.mark.parametrize("wrong", [last_row_dropped, one_element_off, nan])
def test_case_gate_looks_beyond_the_rows_it_samples(
    wrong: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gate, "_sample", lambda batch, seed: np.array([0, 1]))
    pool = make_pool(64, 40, 4, 16, np.dtype(np.float32), seed=1)
    batch = make_batch(pool, popularity_ids("distinct", 16, seed=1), seed=1)
    with pytest.raises(gate.GateError, match="planted: y"):
        gate.check_case(batch, {"planted": wrong}, seed=0)


def test_sample_takes_ends_of_segments_and_respects_its_limit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(gate, "REFERENCE_WORK", 0)
    pool = make_pool(8, 8, 2, 2, np.dtype(np.float32), seed=0)
    batch = make_batch(pool, np.repeat([0, 1], 50), seed=0)
    rows = gate._sample(batch, seed=0)
    assert len(rows) == len(set(rows.tolist())) == 8
    assert {0, 49, 50, 99} <= set(rows.tolist())


def test_corpus_gate_is_green_on_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workloads, "corpus", few_corpus_cases)
    float32 = [np.dtype(np.float32)]
    assert gate.corpus_failures(gate.sgmv_kernel, float32, [1]) == (3, [])


def _adds_nothing(y: Any, x: Any, adapters: Any, adapter_ids: Any, scalings: Any) -> None:
    pass


def _crashes(y: Any, x: Any, adapters: Any, adapter_ids: Any, scalings: Any) -> None:
    raise IndexError("past the end")


@pytest.mark.parametrize("kernel", [_adds_nothing, _crashes])
def test_red_corpus_gate_times_nothing(
    kernel: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(workloads, "corpus", few_corpus_cases)
    monkeypatch.setattr(gate, "sgmv_kernel", kernel)
    monkeypatch.setattr(grid, "probe", must_not_run)
    monkeypatch.setattr(clock, "alternate", must_not_run)
    status = command.main(["--rows", "1", "--output", str(tmp_path)])
    printed = capsys.readouterr().out
    assert status == 1
    assert "gate: RED" in printed
    assert "nothing was timed" in printed
    first = next(iter(workloads_corpus(dtypes=[np.dtype(np.float32)])))
    assert first.name in printed
    assert list(tmp_path.iterdir()) == []


def test_red_case_gate_times_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(workloads, "corpus", few_corpus_cases)
    monkeypatch.setattr(run, "add_lora_with_segments", twice)
    monkeypatch.setattr(grid, "probe", lambda threads, repeats: FLAT)
    monkeypatch.setattr(clock, "alternate", must_not_run)
    argv = ["--model", "Qwen2.5-7B", "--layer", "kv", "--rank", "8", "--rows", "4"]
    status = command.main([*argv, "--threads", "1", "--output", str(tmp_path)])
    printed = capsys.readouterr().out
    assert status == 1
    assert "gate: RED" in printed
    assert "3584>512 r=8 n=4" in printed
    assert list(tmp_path.iterdir()) == []
