"""Traces: what is drawn, and what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from sgmv.errors import SgmvError
from sgmv.serving import Trace, draw_trace


@pytest.mark.once
def test_a_drawn_trace_is_what_was_asked_for() -> None:
    n, burst, rate = 40_000, 5.0, 20.0
    trace = draw_trace(n, 8, rate, alpha=1.5, burst=burst, mean_tokens=10.0, seed=1)
    again = draw_trace(n, 8, rate, alpha=1.5, burst=burst, mean_tokens=10.0, seed=1)
    for name in ("arrival_us", "adapter_ids", "tokens"):
        np.testing.assert_array_equal(getattr(trace, name), getattr(again, name))
    share = np.arange(1, 9) ** -1.5
    share /= share.sum()
    found = np.bincount(trace.adapter_ids, minlength=9)[1:] / n
    # Counts of bursts are binomial; six deviations, with a geometric size's second moment.
    deviation = np.sqrt(share * (1 - share) * 2 * burst / n)
    assert (np.abs(found - share) < 6 * deviation).all()
    assert n / (trace.arrival_us[-1] / 1e6) == pytest.approx(rate, rel=6 * np.sqrt(2 * burst / n))
    assert trace.tokens.mean() == pytest.approx(10, rel=6 / np.sqrt(n))
    starts = np.flatnonzero(np.diff(trace.arrival_us)) + 1
    assert n / (len(starts) + 1) == pytest.approx(burst, rel=6 * np.sqrt(burst / n))


@pytest.mark.once
@pytest.mark.parametrize(
    "options",
    [{"rate": 0}, {"rate": float("nan")}, {"alpha": -1}, {"burst": 0.5}, {"mean_tokens": "many"},
     {"requests": -1}, {"adapters": 0}, {"seed": -1}],
)  # fmt: skip
def test_a_trace_that_cannot_be_drawn(options: dict[str, Any]) -> None:
    with pytest.raises(SgmvError, match=next(iter(options))):
        draw_trace(**options)


@pytest.mark.once
@pytest.mark.parametrize(
    "columns",
    [
        ([1, 0], [1, 1], [1, 1]),
        ([0], [1, 1], [1]),
        ([0], [-1], [1]),
        ([0], [1], [0]),
        ([0.5], [1], [1]),
    ],
)
def test_a_trace_is_checked(columns: Any) -> None:
    with pytest.raises(SgmvError, match="expected"):
        Trace(*columns)
