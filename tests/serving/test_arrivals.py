"""When requests come, and how adapters change meanwhile."""

from __future__ import annotations

import numpy as np
import pytest

from sgmv.errors import SgmvError
from sgmv.serving import Trace, draw_trace
from sgmv.serving.arrivals import ARRIVALS, mixed

pytestmark = pytest.mark.once
N = 40_000


def counts(arrivals: str, parts: int) -> np.ndarray:
    trace = draw_trace(N, 100, 20.0, arrivals=arrivals, seed=4)
    return np.bincount(trace.arrival_us * parts // (N * 50_000), minlength=parts)[:parts]


@pytest.mark.parametrize("arrivals", ARRIVALS)
def test_the_rate_is_that_which_was_asked_for(arrivals: str) -> None:
    trace = draw_trace(N, 100, 20.0, arrivals=arrivals, seed=4)
    # Bursty gaps deviate by four times their mean, and the mean of n by a root of n less.
    assert trace.arrival_us[-1] / 1e6 == pytest.approx(N / 20.0, rel=6 * 4 / np.sqrt(N))
    assert (np.diff(trace.arrival_us) >= 0).all()


def test_three_waves() -> None:
    found = counts("diurnal", 12) / (N / 12)
    # A quarter of a wave is mean * (1 +- 0.8 * 2 / pi) on average.
    up, down = 1 + 1.6 / np.pi, 1 - 1.6 / np.pi
    assert found == pytest.approx([up, up, down, down] * 3, abs=6 / np.sqrt(N / 24))


def test_a_crowd_comes_for_a_new_adapter() -> None:
    trace = draw_trace(N, 100, 20.0, arrivals="flash-crowd", seed=4)
    found = counts("flash-crowd", 10) / (N / 13)
    expected = [1, 1, 1, 1, 4, 1, 1, 1, 1, 1]
    assert found == pytest.approx(expected, abs=6 * 2 / np.sqrt(N / 13))
    crowd = trace.adapter_ids == 101
    assert crowd.sum() == pytest.approx(3 / 13 * N, rel=0.1)
    share = trace.arrival_us[crowd] / (N * 50_000)
    assert share.min() >= 0.4
    assert share.max() < 0.5


def test_gaps_of_bursts_deviate_by_four_means() -> None:
    gaps = np.diff(draw_trace(N, 100, 20.0, arrivals="bursty", seed=4).arrival_us)
    assert gaps.std() / gaps.mean() == pytest.approx(4, rel=0.15)
    plain = np.diff(draw_trace(N, 100, 20.0, seed=4).arrival_us)
    assert plain.std() / plain.mean() == pytest.approx(1, rel=0.05)


def test_updates_give_new_ids_to_the_same_tenants() -> None:
    trace = draw_trace(N, 50, 20.0, updates=0.5, seed=4)
    assert set(trace.tenants.tolist()) <= set(range(1, 51))
    for tenant in (1, 2, 7):
        ids = trace.adapter_ids[trace.tenants == tenant]
        assert ids[0] == tenant
        # Once it has new weights, nobody asks for the old ones.
        changes = np.count_nonzero(np.diff(ids))
        assert changes == len(set(ids.tolist())) - 1
        assert changes == pytest.approx(0.5 * 2000 / 50, abs=6 * np.sqrt(20))


def test_turnover_gives_new_tenants() -> None:
    trace = draw_trace(N, 50, 20.0, turnover=0.5, seed=4)
    assert len(set(trace.tenants.tolist())) > 300
    pairs = set(zip(trace.tenants.tolist(), trace.adapter_ids.tolist(), strict=True))
    assert len(pairs) == len(set(trace.tenants.tolist())) == trace.adapters
    both = draw_trace(N, 50, 20.0, turnover=0.5, updates=0.5, seed=4)
    assert both.adapters > len(set(both.tenants.tolist())) > 300


def test_ranks_are_a_tenants_own() -> None:
    trace = draw_trace(N, 300, 20.0, updates=1.0, seed=4).with_ranks([8, 16, 64])
    for tenant in range(1, 50):
        assert len(set(trace.ranks[trace.tenants == tenant].tolist())) == 1
    of_each = [trace.ranks[trace.tenants == tenant][0] for tenant in np.unique(trace.tenants)]
    found = np.array([of_each.count(rank) for rank in (8, 16, 64)])
    assert (np.abs(found - 100) < 6 * np.sqrt(300 * 2 / 9)).all()


def test_mixed_numbers_look_drawn() -> None:
    found = mixed(np.arange(10_000))
    assert len(set(found.tolist())) == 10_000
    for bit in range(64):
        ones = int(((found >> np.uint64(bit)) & np.uint64(1)).sum())
        assert abs(ones - 5000) < 6 * 50


def test_what_a_trace_may_say_of_its_adapters() -> None:
    with pytest.raises(SgmvError, match="ranks: expected one for each adapter"):
        Trace([0, 1], [1, 1], [1, 1], ranks=[8, 16])
    with pytest.raises(SgmvError, match="tenants: expected one for each adapter"):
        Trace([0, 1], [1, 1], [1, 1], tenants=[1, 2])
    with pytest.raises(SgmvError, match="ranks: expected at least 1"):
        Trace([0, 1], [1, 1], [1, 1], ranks=[0, 0])
    with pytest.raises(SgmvError, match="ranks: expected at least one"):
        draw_trace(10).with_ranks([])
    with pytest.raises(SgmvError, match="arrivals: expected one of"):
        draw_trace(10, arrivals="tidal")
    with pytest.raises(SgmvError, match="adapters: expected adapters times microseconds"):
        draw_trace(10, 10**9, 1e-5, updates=1e-9)
