"""What a half-precision v costs."""

from __future__ import annotations

import numpy as np
import pytest

import sgmv
from sgmv import emulator
from tests.help.emulated import HALVES

pytestmark = pytest.mark.once


def test_the_histogram_counts_every_element_once(rng: np.random.Generator) -> None:
    v = rng.standard_normal((40, 16)).astype(np.float32)
    B = (rng.standard_normal((300, 16)) / 4).astype(np.float16)
    histogram = emulator.half_v_error(v, B)
    assert histogram.exact + sum(histogram.counts) == 40 * 300
    exact = v.astype(np.float64) @ B.astype(np.float64).T
    half = v.astype(np.float16).astype(np.float64) @ B.astype(np.float64).T
    ulps = np.abs(half - exact) / np.spacing(np.abs(exact).astype(np.float16)).astype(float)
    for low, high, count in zip(
        histogram.edges, histogram.edges[1:], histogram.counts, strict=False
    ):
        assert abs(np.count_nonzero((ulps >= low) & (ulps < high) & (ulps > 0)) - count) <= 12
    assert histogram.largest > 0.5
    assert str(histogram).splitlines()[0].split() == ["ulps", "elements", "share"]
    assert "█" in str(histogram)


def test_a_v_that_half_precision_holds_costs_nothing(rng: np.random.Generator) -> None:
    v = rng.integers(-8, 9, (4, 16)).astype(np.float32)
    histogram = emulator.half_v_error(v, rng.standard_normal((32, 16)).astype(np.float16))
    assert (histogram.exact, histogram.largest) == (128, 0.0)
    with pytest.raises(sgmv.SgmvError, match=r"^v: expected"):
        emulator.half_v_error(v, np.ones((32, 8), np.float16))


def test_bfloat16_loses_no_less_than_float16(rng: np.random.Generator) -> None:
    """In units of their own last place both lose alike; the place itself is eight times larger."""
    v = rng.standard_normal((40, 16)).astype(np.float32)
    B = (rng.standard_normal((100, 16)) / 4).astype(np.float32)
    for dtype in HALVES:
        histogram = emulator.half_v_error(v, B, dtype)
        assert sum(histogram.counts[3:]) > 0  # beyond half an ulp, what one rounding could explain
