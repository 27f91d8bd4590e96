"""A run times its cases in turns, and those again beside which others ran."""

from __future__ import annotations

import itertools
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import sgmv
from benchmarks import clock
from benchmarks.batch import make_pool
from benchmarks.clock import Deadline
from benchmarks.peers import PEERS
from benchmarks.studies.grid import run
from benchmarks.studies.grid.cases import Case, Filters, cases
from tests.help.benched import FLAT, ONE_CALL, Clock

pytestmark = pytest.mark.once
PEFT = Path(__file__).parents[1] / "fixtures" / "peft" / "llama"


def test_cases_beyond_memory_are_named_with_the_reason() -> None:
    few = cases("quick", Filters(rows=[4], popularities=["distinct", "identical"]))
    need = 4 * 16 * (4096 + 4096) * 8
    groups, untimed = run.synthetic_groups(few, seed=0, memory=need - 1)
    assert [case.popularity for group in groups for case, _ in group.cases] == ["identical"]
    assert list(untimed) == ["4096>4096 r=16 n=4 distinct"]
    assert "--memory-gib" in untimed["4096>4096 r=16 n=4 distinct"]
    assert run.synthetic_groups(few, seed=0, memory=need)[1] == {}


@pytest.mark.parametrize(
    ("h_in", "dtype", "message"),
    [
        (5, np.float32, r"one \(h_in, h_out\), got \[\(3, 4\), \(5, 4\)\]"),
        (3, np.float64, "float64"),
    ],
)
def test_adapters_that_cannot_be_mixed_are_refused(h_in: int, dtype: type, message: str) -> None:
    first = sgmv.Adapter(np.ones((2, 3), np.float32), np.ones((4, 2), np.float32))
    second = sgmv.Adapter(np.ones((2, h_in), dtype), np.ones((4, 2), dtype))
    with pytest.raises(SystemExit, match=message):
        run._check_mixable("mlp.up_proj", [first, second])


def one_case_groups(names: str, made: list[str]) -> list[run.Group]:
    """A group of one case for each letter, which stands as its dtype."""
    return [
        run.Group(
            partial(made.append, name),
            [(Case(8, 8, 1, 1, "identical", name, ()), np.zeros(1, np.int64))],
        )
        for name in names
    ]


def measured(monkeypatch: pytest.MonkeyPatch, clock: Clock, takes: float, noise: Any) -> Any:
    """Have each case take that long; `noise` is each case's busy cores, timing after timing."""
    shares: list[tuple[str, float]] = []

    def measure(case: Case, pool: Any, ids: Any, terms: Any, until: Deadline) -> Any:
        shares.append((case.dtype, round(until.left(), 6)))
        clock.seconds += takes
        return SimpleNamespace(foreign_cores=noise[case.dtype].pop(0))

    monkeypatch.setattr(run, "measure", measure)
    return shares


def test_noisy_cases_are_timed_again_and_the_quieter_timing_counts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock, made, terms = Clock(), list[str](), Any
    noise = {"a": [0.0], "b": [0.9, 0.0], "c": [0.9, 0.95, 0.92], "d": [None]}
    measured(monkeypatch, clock, 1.0, noise)
    groups, records = one_case_groups("abcd", made), dict[Case, Any]()
    steps: list[list[str]] = []
    while left := run.unsettled(groups, records):
        if len(steps) == 3:
            break
        steps.append([])
        run.time_cases(left, records, terms, clock.until(100.0), steps[-1].append)
    assert "".join(made) == "abcdbcc"
    assert [len(labels) for labels in steps] == [4, 2, 1]
    assert [record.foreign_cores for record in records.values()] == [0.0, 0.0, 0.9, None]


def test_cases_share_the_time_and_none_begins_after_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A case that is slow, or always noisy, delays the end by itself alone."""
    clock, made = Clock(), list[str]()
    shares = measured(monkeypatch, clock, 10.0, {name: [0.9] for name in "abcde"})
    groups, records = one_case_groups("abcde", made), dict[Case, Any]()
    run.time_cases(groups, records, Any, clock.until(25.0), lambda label: None)
    assert clock.seconds == 1030.0
    assert shares == [("a", 5.0), ("b", 3.75), ("c", 1.666667)]
    untimed_first = [group.cases[0][0].dtype for group in run.unsettled(groups, records)]
    assert "".join(untimed_first) == "deabc"
    assert "".join(made) == "abc"


def test_one_case_is_timed_even_if_compiling_took_all_the_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock, records = Clock(), dict[Case, Any]()
    measured(monkeypatch, clock, 10.0, {"a": [0.0]})
    run.time_cases(one_case_groups("ab", []), records, Any, clock.until(-5.0), lambda label: None)
    assert [case.dtype for case in records] == ["a"]


def test_large_batches_are_timed_last() -> None:
    groups, _untimed = run.synthetic_groups(cases("quick", Filters()), seed=0, memory=1 << 40)
    rows = [max(case.rows for case, _ids in group.cases) for group in run.smallest_first(groups)]
    assert rows == [64, 64, 64, 64, 64, 1024]


def test_timings_repeat_until_others_are_still(monkeypatch: pytest.MonkeyPatch) -> None:
    def time_with(*foreign: float | None) -> tuple[Any, float | None]:
        loads, runs = iter(foreign), itertools.count()
        monkeypatch.setattr(clock, "foreign_cores", lambda before, after: next(loads))
        monkeypatch.setattr(clock, "alternate", lambda turns, budget: next(runs))
        return clock.time_quietly([], ONE_CALL)

    assert time_with(0.0) == (0, 0.0)
    assert time_with(None) == (0, None)
    assert time_with(0.9, 0.2, 0.05) == (2, 0.05)
    assert time_with(0.9, 0.3, 0.5, 0.8) == (1, 0.3)


def test_measured_case_holds_what_was_asked_for() -> None:
    pool = make_pool(32, 16, 4, 4, np.dtype(np.float32), seed=0)
    case = Case(32, 16, 4, 4, "distinct", "float32", ("a", "b"))
    record = run.measure(case, pool, np.arange(4), run.Terms([1], ONE_CALL, 0, FLAT))
    assert {"sgmv@1", "sgmv@1 ids", "by_row", "by_segment", "einsum"} <= record.times.keys()
    assert (record.S, record.checked_rows, record.names) == (4, 4, ["a", "b"])
    assert set(record.ratios["sgmv@1"]) == set(PEERS) - set(record.skipped)
    assert "read@1" not in record.times
    limit_us = max(record.reads["sgmv@1"].q50, record.flops / 1e9 * 1e6)
    expected = limit_us / record.times["sgmv@1"].q50
    assert record.shares["sgmv@1"] == pytest.approx(expected, rel=1e-3)


def test_peft_adapters_become_mixed_batches() -> None:
    pytest.importorskip("safetensors")
    directories = [PEFT / "attention-f32", PEFT / "rslora-f32"]
    groups = run.adapter_groups(directories, [5, 1], "float32", seed=0)
    modules = {module for d in directories for module in sgmv.load_peft(d)}
    named = [name for group in groups for name in group.cases[0][0].names]
    assert sorted(named) == sorted(modules)
    for group in groups:
        (case, ids), (_, one) = group.cases
        pool = group.make()
        assert pool.adapters[one[0]] is not None
        assert sorted(np.bincount(ids)) == [2, 3]
        record = run.measure(case, pool, ids, run.Terms([1], ONE_CALL, 0, FLAT))
        assert record.checked_rows == 5
