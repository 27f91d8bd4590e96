"""The simulator against a loop over every step, with real slots and weights."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sgmv import serving
from sgmv.errors import SgmvError
from sgmv.serving import AdapterSlots, Costs, Scheduler, Trace, draw_trace, simulate
from sgmv.serving.residency import POLICIES
from tests.help.served import lora, read


def every_step(trace: Trace, max_loras: int, policy: str, **limits: Any) -> dict[str, Any]:
    """The same by a loop over every step, with real slots and weights."""
    costs, n = limits.pop("costs"), trace.n
    scheduler: Scheduler[int] = Scheduler(
        max_loras, limits["max_num_seqs"], limits["max_overtakes"]
    )
    slots = AdapterSlots(max_loras, limits["max_cpu_loras"], 3, policy=policy, read=read)
    left, wait, now, came = trace.tokens.tolist(), [-1] * n, 0, 0
    while came < n or scheduler.waiting or scheduler.running:
        while came < n and trace.arrival_us[came] <= now:
            adapter_id = int(trace.adapter_ids[came])
            scheduler.add(came, lora(adapter_id) if adapter_id else None)
            came += 1
        before = slots.counters
        step = serving.next_step(scheduler, slots)
        if not step.rows:
            now = int(trace.arrival_us[came])
            continue
        now += (slots.counters.host_misses - before.host_misses) * costs.read_us
        now += (slots.counters.slot_misses - before.slot_misses) * costs.load_us
        for i in step.rows:
            wait[i] = now - int(trace.arrival_us[i]) if wait[i] < 0 else wait[i]
            left[i] -= 1
        now += costs.step_us + costs.row_us * len(step.rows)
        for i in step.rows:
            if not left[i]:
                scheduler.finish(i)
    counters = slots.counters
    return {
        "wait_us": wait,
        "end_us": now,
        "deferrals": scheduler.deferrals,
        "misses": (counters.slot_misses, counters.host_misses),
        "evictions": (counters.slot_evictions, counters.host_evictions),
    }


@st.composite
def small_traces(draw: Any) -> Trace:
    n = draw(st.integers(0, 25))
    gaps = draw(st.lists(st.integers(0, 400), min_size=n, max_size=n))
    ids = draw(st.lists(st.integers(0, 6), min_size=n, max_size=n))
    tokens = draw(st.lists(st.integers(1, 6), min_size=n, max_size=n))
    return Trace(
        np.cumsum(np.array(gaps, np.int64)), np.array(ids, np.int64), np.array(tokens, int)
    )


@pytest.mark.once
@settings(max_examples=80)
@given(small_traces(), st.integers(1, 3), st.sampled_from(POLICIES), st.data())
def test_the_simulator_is_a_loop_over_every_step(
    trace: Trace, max_loras: int, policy: str, data: Any
) -> None:
    limits = {
        "max_cpu_loras": max_loras + data.draw(st.integers(0, 2)),
        "max_num_seqs": data.draw(st.integers(1, 5)),
        "max_overtakes": data.draw(st.sampled_from([0, 1, 3, 100])),
        "costs": Costs(step_us=50, row_us=7, adapter_bytes=1000, load_rate=50e6, read_rate=10e6),
    }
    outcome = simulate(trace, max_loras, policy, **limits)
    counters = outcome.counters
    assert every_step(trace, max_loras, policy, **limits) == {
        "wait_us": outcome.wait_us.tolist(),
        "end_us": outcome.end_us,
        "deferrals": outcome.deferrals,
        "misses": (counters.slot_misses, counters.host_misses),
        "evictions": (counters.slot_evictions, counters.host_evictions),
    }


@pytest.mark.once
def test_long_requests_take_no_longer_to_simulate() -> None:
    trace = Trace([0, 5, 10**12], [1, 2, 1], [10**9, 10**9, 3])
    outcome = simulate(trace, 1, costs=Costs(step_us=1000, row_us=0))
    assert outcome.end_us > 2 * 10**12
    assert outcome.deferrals == 1


@pytest.mark.once
def test_waiting_time_by_tenant() -> None:
    trace = draw_trace(3000, 20, rate=400.0, seed=3)
    outcome = simulate(trace, 2, max_num_seqs=8)
    tenants = outcome.tenants()
    for k, i in enumerate(tenants.ids):
        waits = np.sort(outcome.wait_us[trace.adapter_ids == i]) / 1e6
        assert tenants.requests[k] == len(waits)
        for percent, got in ((50, tenants.p50_s[k]), (99, tenants.p99_s[k])):
            assert got == np.percentile(waits, percent, method="inverted_cdf")
    assert outcome.wait_s(99) == np.percentile(outcome.wait_us, 99, method="inverted_cdf") / 1e6


@pytest.mark.once
@pytest.mark.parametrize(
    "costs", [{"step_us": 0}, {"row_us": -1}, {"load_rate": 0.0}, {"read_rate": float("inf")}]
)
def test_costs_are_checked(costs: dict[str, Any]) -> None:
    with pytest.raises(SgmvError, match=next(iter(costs))):
        Costs(**costs)
