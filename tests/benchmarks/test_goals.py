"""Goals are figures of their own cases."""

from __future__ import annotations

import copy

import pytest

from benchmarks.studies.grid import goals
from tests.help.benched import synthetic_record

pytestmark = pytest.mark.once


def test_goals_are_figures_of_their_own_cases() -> None:
    record = synthetic_record()
    win, loss = record.cases
    half = copy.deepcopy(win)
    half.dtype = "bfloat16"
    half.popularity = "distinct"
    half.rows = 64
    half.S = 64
    half.times["sgmv@2"].q50 = 5.0
    distinct = copy.deepcopy(half)
    distinct.dtype = "float32"
    distinct.times["sgmv@2"].q50 = 12.0
    distinct.ratios["sgmv@2"]["by_segment"] = 4.0
    peak = copy.deepcopy(loss)
    peak.rows = 2048
    peak.rank = 64
    peak.flops = 2_000_000  # in 10 us: 0.2 of 5e11 a second
    record.cases += [half, distinct, peak]
    found = {goal.what: goal for goal in goals.goals(record)}
    against = found["float32 against numpy's segments"]
    assert (against.found, against.cases) == (pytest.approx(2.0**0.25), 4)
    assert found["distinct rows, 16 and more, of the read limit"].found == pytest.approx(0.5)
    assert found["distinct rows, 4, of the read limit"].found is None
    assert found["segments of 2 to 8 rows, of the limit"].cases == 1
    assert found["bfloat16 against float32, distinct, over 8 MiB"].found == pytest.approx(2.4)
    assert found["2048 rows, identical, r = 64, of the FMA peak"].found == pytest.approx(0.4)
    assert found["2048 rows, uniform, r = 16, of the FMA peak"].found is None
    calls = [found[f"one call beyond its kernels, {how}"] for how in ("Segments", "from ids")]
    assert [(goal.found, goal.met) for goal in calls] == [(2.0, True), (6.0, False)]
    missed = sum(not goal.met for goal in found.values())
    assert goals.page(record, "").count("**missed**") == missed
    assert len(found) == len(goals.goals(record))
