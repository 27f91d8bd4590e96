"""`simulate_replicas`: what it takes, what it refuses, what it tells."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from sgmv.errors import SgmvError
from sgmv.serving import (
    Failure,
    Placement,
    Trace,
    draw_trace,
    fewest_replicas,
    simulate_replicas,
)

pytestmark = pytest.mark.once
TRACE = Trace([0, 1, 2], [1, 2, 1], [1, 1, 1])


@pytest.mark.parametrize(
    ("options", "argument"),
    [
        ({"trace": [1]}, "trace"),
        ({"replicas": 0}, "replicas"),
        ({"replicas": 2.5}, "replicas"),
        ({"placement": "nearest"}, "placement"),
        ({"placement": 3}, "placement"),
        ({"max_loras": 0}, "max_loras"),
        ({"max_cpu_loras": 2}, "max_cpu_loras"),
        ({"policy": "mru"}, "policy"),
        ({"max_num_seqs": 0}, "max_num_seqs"),
        ({"max_overtakes": -1}, "max_overtakes"),
        ({"costs": 7}, "costs"),
        ({"failures": [Failure(2, 0, 1)]}, "failures"),
        ({"failures": [(0, 1, 2)]}, "failures"),
        ({"failures": [Failure(0, 1, 3), Failure(0, 2, 4)]}, "failures"),
        ({"failures": 3}, "failures"),
    ],
)
def test_what_is_refused(options: dict[str, Any], argument: str) -> None:
    with pytest.raises(SgmvError, match=rf"^{argument}: expected"):
        simulate_replicas(**{"trace": TRACE, "replicas": 2, **options})


@pytest.mark.parametrize(
    ("options", "argument"),
    [({"max_ongoing": 0}, "max_ongoing"), ({"spill": 0}, "spill"), ({"plan_s": 0}, "plan_s"),
     ({"seed": -1}, "seed")],
)  # fmt: skip
def test_a_placement_that_is_refused(options: dict[str, Any], argument: str) -> None:
    with pytest.raises(SgmvError, match=rf"^{argument}: expected"):
        Placement("ray", **options)


@pytest.mark.parametrize(
    ("options", "argument"),
    [((-1, 0, 1), "replica"), ((0, -1, 1), "from_s"), ((0, 1, 1), "until_s")],
)
def test_a_failure_that_is_refused(options: tuple[Any, ...], argument: str) -> None:
    with pytest.raises(SgmvError, match=rf"^{argument}: expected"):
        Failure(*options)


def test_an_empty_trace() -> None:
    outcome = simulate_replicas(Trace([], [], []), 3)
    assert outcome.end_us == 0
    assert outcome.busy_us.tolist() == [0, 0, 0]
    assert np.isnan(outcome.busy_share)


def test_the_base_model_needs_no_slot() -> None:
    outcome = simulate_replicas(Trace([0] * 9, [0] * 9, [2] * 9), 2, "least-loaded")
    assert outcome.counters.slot_misses == 0
    assert set(outcome.found.tolist()) == {0}


def test_the_same_seed_gives_the_same() -> None:
    trace = draw_trace(2_000, 100, 80.0)
    one, same, other = (
        simulate_replicas(trace, 4, Placement("ray", seed=seed)).replica_of for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(one, same)
    assert (one != other).any()


def test_the_totals_are_those_of_the_replicas() -> None:
    trace = draw_trace(3_000, 300, 60.0).with_ranks([8, 16, 64])
    outcome = simulate_replicas(trace, 4, "rendezvous")
    assert outcome.counters.slot_misses == sum(c.slot_misses for c in outcome.counters_of)
    assert outcome.loaded_bytes > 0
    assert 0 < outcome.busy_share <= 1
    assert outcome.imbalance >= 1


def test_as_few_replicas_as_keep_the_waiting_time() -> None:
    trace = draw_trace(3_000, 100, 60.0)
    found = fewest_replicas(trace, 2.0, 16, "least-loaded")
    assert found.wait_s(99) <= 2.0
    fewer = simulate_replicas(trace, found.replicas - 1, "least-loaded")
    assert fewer.wait_s(99) > 2.0
    assert fewest_replicas(trace, 0.0, 4).replicas == 4  # never: that of the most
