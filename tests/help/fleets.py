"""What several replicas do, told by what one does: each is a server of those that it was sent."""

from __future__ import annotations

from dataclasses import asdict
from types import ModuleType
from typing import Any

import numpy as np

RULES = ("random", "least-loaded", "rendezvous", "rank-aware", "ray")
COSTS = {
    "step_us": 50, "row_us": 7, "adapter_us": 3, "rank_us": 0.3, "adapter_bytes": 1000,
    "load_rate": 50e6, "read_rate": 10e6,
}  # fmt: skip


def drawn(serving: ModuleType, seed: int, most: int = 60) -> tuple[Any, dict[str, Any]]:
    """A small trace that crowds its servers, and their limits."""
    rng = np.random.default_rng(seed)
    n = int(rng.integers(1, most))
    ids = rng.integers(0, int(rng.integers(2, 12)), n)
    trace = serving.Trace(
        np.cumsum(rng.integers(0, int(rng.choice([2, 60, 400])), n)), ids, rng.integers(1, 7, n)
    )
    if seed % 2:
        trace = trace.with_ranks([4, 16, 64])
    max_loras = int(rng.integers(1, 4))
    limits = {
        "max_loras": max_loras,
        "policy": ("lru", "fifo")[seed % 3 == 0],
        "max_cpu_loras": max_loras + int(rng.integers(0, 3)),
        "max_num_seqs": int(rng.integers(1, 6)),
        "max_overtakes": int(rng.choice([0, 1, 3, 100])),
        "costs": serving.Costs(
            **COSTS, padded=seed % 5 == 0, base_us=[(1, 40), (3, 90)] if seed % 4 == 0 else ()
        ),
    }
    return trace, limits


def check_as_one(serving: ModuleType, seed: int) -> None:
    """One replica is `simulate`, event for event, whatever the rule is."""
    trace, limits = drawn(serving, seed)
    one = serving.simulate(trace, **limits)
    rule = RULES[seed % len(RULES)]
    same = serving.simulate_replicas(trace, 1, serving.Placement(rule, max_ongoing=10**6), **limits)
    np.testing.assert_array_equal(same.wait_us, one.wait_us)
    for name in ("end_us", "deferrals", "loaded_bytes", "read_bytes"):
        assert getattr(same, name) == getattr(one, name), name
    assert asdict(same.counters) == asdict(one.counters)


def check_as_several(serving: ModuleType, seed: int) -> Any:
    """Each replica is `simulate` of the requests that it was sent."""
    trace, limits = drawn(serving, seed)
    N = 2 + seed % 4
    placement = serving.Placement(RULES[seed % len(RULES)], 10**6, plan_s=0.001, seed=seed)
    outcome = serving.simulate_replicas(trace, N, placement, **limits)
    for r in range(N):
        its = np.flatnonzero(outcome.replica_of == r)
        own = serving.Trace(
            *(
                getattr(trace, name)[its]
                for name in ("arrival_us", "adapter_ids", "tokens", "ranks")
            )
        )
        one = serving.simulate(own, **limits)
        np.testing.assert_array_equal(outcome.wait_us[its], one.wait_us)
        assert asdict(outcome.counters_of[r]) == asdict(one.counters)
    return outcome
