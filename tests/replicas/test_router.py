"""Where requests go: what each rule promises."""

from __future__ import annotations

import numpy as np
import pytest

from sgmv.serving import Costs, Failure, Placement, Trace, draw_trace, simulate_replicas
from tests.help.fleets import RULES

pytestmark = pytest.mark.once
QUICK = Costs(step_us=1, row_us=0, adapter_bytes=0)
N = 8


def homes(outcome: object, ids: np.ndarray) -> dict[int, set[int]]:
    replica_of = outcome.replica_of  # type: ignore[attr-defined]
    return {int(i): set(replica_of[ids == i].tolist()) for i in np.unique(ids)}


def test_random_is_even() -> None:
    trace = draw_trace(16_000, 100, seed=1)
    counts = np.bincount(simulate_replicas(trace, N, "random").replica_of, minlength=N)
    # Chi-squared of 7 degrees of freedom: 24.3 at 0.1 %.
    assert ((counts - 2000) ** 2 / 2000).sum() < 24.3


def test_an_adapter_has_one_home() -> None:
    """And a replica that fails moves its own adapters alone."""
    trace = draw_trace(8_000, 400, 20.0, alpha=0.5, seed=1)
    placement = Placement("rendezvous", spill=10**9)
    calm = homes(simulate_replicas(trace, N, placement, costs=QUICK), trace.adapter_ids)
    assert all(len(its) == 1 for its in calm.values())
    of_each = np.bincount([next(iter(its)) for its in calm.values()], minlength=N)
    share = len(calm) / N
    assert ((of_each - share) ** 2 / share).sum() < 24.3
    failed = simulate_replicas(trace, N, placement, costs=QUICK, failures=[Failure(3, 0, 1e9)])
    for i, its in homes(failed, trace.adapter_ids).items():
        assert its == calm[i] or calm[i] == {3}


def test_an_adapter_whose_home_is_busy_spills_over() -> None:
    """The second of its weights takes what is more than `spill`, then the third."""
    trace = Trace([0] * 9, [7] * 9, [5] * 9)
    found = simulate_replicas(trace, N, Placement("rendezvous", spill=3)).replica_of.tolist()
    assert found == [found[0]] * 3 + [found[3]] * 3 + [found[6]] * 3
    assert len(set(found)) == 3


def test_an_update_stays_at_home() -> None:
    """Its tenant is the same; its weights have to be loaded."""
    trace = draw_trace(4_000, 3, 20.0, updates=0.05, seed=3)
    assert trace.adapters > 6
    outcome = simulate_replicas(trace, N, Placement("rendezvous", spill=10**9), costs=QUICK)
    assert all(len(its) == 1 for its in homes(outcome, trace.tenants).values())
    assert outcome.counters.host_misses == trace.adapters


def test_the_least_loaded_has_the_fewest_requests() -> None:
    """All come at once: no replica ever has two more than another."""
    found = simulate_replicas(Trace([0] * 83, [1] * 83, [5] * 83), N, "least-loaded").replica_of
    for n in range(1, 84):
        counts = np.bincount(found[:n], minlength=N)
        assert counts.max() - counts.min() <= 1


def test_ranks_lie_beside_each_other() -> None:
    """Replicas are sorted by rank, but for the adapters at the borders between them."""
    trace = draw_trace(20_000, 600, 20.0, alpha=0.3, seed=1).with_ranks([8, 16, 64, 128])
    placement = Placement("rank-aware", plan_s=1e6)  # one plan: all adapters are alike in it
    outcome = simulate_replicas(trace, N, placement, costs=Costs(rank_us=5.0, row_us=0))
    ranks = [set(trace.ranks[outcome.replica_of == r].tolist()) for r in range(N)]
    assert sum(len(each) > 1 for each in ranks) <= 3
    assert [min(each) for each in ranks] == sorted(min(each) for each in ranks)
    mixed = simulate_replicas(trace, N, "random")
    assert all(len(set(trace.ranks[mixed.replica_of == r].tolist())) == 4 for r in range(N))


def test_a_plan_follows_the_demand() -> None:
    """What all ask for takes as many replicas as it needs, after a while."""
    n = 4_000
    ids = np.where(np.arange(n) % 10 < 8, 1, 2 + np.arange(n) % 7)
    trace = Trace(np.arange(n) * 50_000, ids, np.ones(n, int))
    outcome = simulate_replicas(trace, N, Placement("rank-aware", plan_s=10.0), costs=QUICK)
    late = np.arange(n) > n // 2
    assert len(set(outcome.replica_of[late & (ids == 1)].tolist())) >= 6
    assert len(set(outcome.replica_of[(np.arange(n) < 100) & (ids == 1)].tolist())) <= 2


def test_ray_sends_to_who_has_it() -> None:
    """One after the other: an adapter that a replica has goes there, a new one where fewest are."""
    ids = np.array([1, 2, 3, 1, 2, 3, 4, 4, 5, 5])
    trace = Trace(np.arange(10) * 10**9, ids, np.ones(10, int))
    found = simulate_replicas(trace, 4, "ray").replica_of
    assert all(len(its) == 1 for its in homes(type("", (), {"replica_of": found})(), ids).values())
    assert sorted(found[[0, 1, 2, 6]].tolist()) == [0, 1, 2, 3]


@pytest.mark.parametrize("rule", RULES)
def test_a_full_replica_gets_no_more(rule: str) -> None:
    """The router keeps the others, in their order."""
    trace = Trace([0] * 40, np.arange(40) % 5 + 1, [3] * 40)
    outcome = simulate_replicas(trace, 2, Placement(rule, max_ongoing=4), max_num_seqs=2)
    assert (outcome.replica_of >= 0).all()
    if rule in ("least-loaded", "ray"):
        first = outcome.wait_us[:8]
        assert first.max() <= np.sort(outcome.wait_us)[8:].min() + 10**6
    free = simulate_replicas(trace, 2, rule, max_num_seqs=2)
    assert outcome.end_us >= free.end_us * 0.5
