"""The compiled loop: held to `simulate`, to queueing theory, to a trace worked out by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import ModuleType

import numpy as np
import pytest

from sgmv import serving
from sgmv.serving import Costs, Failure, Placement, Trace, simulate_replicas
from tests.help.fleets import check_as_one, check_as_several, drawn
from tests.help.planting import Fault, verdict

pytestmark = pytest.mark.once


def test_one_replica_is_the_simulator() -> None:
    for seed in range(1500):
        check_as_one(serving, seed)


def test_several_are_a_simulator_each() -> None:
    used = [len(set(check_as_several(serving, seed).replica_of)) for seed in range(600)]
    assert np.mean(used) > 1.8


def test_long_traces_too() -> None:
    """Many adapters in many lines: heaps and lists are deep."""
    trace = serving.draw_trace(20_000, 3_000, 60.0, alpha=0.6, burst=2.0, mean_tokens=40.0, seed=5)
    trace = trace.with_ranks([8, 16, 64])
    limits = {"max_loras": 8, "max_cpu_loras": 40, "max_num_seqs": 32, "max_overtakes": 20}
    one, same = serving.simulate(trace, **limits), simulate_replicas(trace, 1, **limits)
    np.testing.assert_array_equal(same.wait_us, one.wait_us)
    assert same.counters == one.counters
    assert same.deferrals == one.deferrals > 1000


def test_a_trace_worked_out_by_hand() -> None:
    """docs/simulation.md has the table of it.

    A step takes 10 us, and each adapter 5 us to a slot and 20 us from disk. Two replicas of one
    slot each; least-loaded sends a, b to one each and c to either, d waits for c's replica.
    """
    costs = Costs(step_us=10, row_us=0, adapter_bytes=16, load_rate=3.2e6, read_rate=0.8e6)
    assert (costs.load_us, costs.read_us) == (5, 20)
    trace = Trace([0, 0, 12, 30], [1, 2, 2, 1], [3, 1, 2, 1])
    outcome = simulate_replicas(trace, 2, "rendezvous", 1, costs=costs)
    home = outcome.replica_of.tolist()
    assert home[0] == home[3] != home[1] == home[2]
    # Adapter 1: loaded until 25, steps end at 35, 45, 55; d is admitted at 35.
    # Adapter 2: loaded until 25, b ends at 35; c came at 12, and is admitted then.
    assert outcome.wait_us.tolist() == [25, 25, 35 - 12, 35 - 30]
    assert outcome.end_us == 55
    assert outcome.busy_us.sum() == 55 + 55
    assert outcome.counters.slot_misses == outcome.counters.host_misses == 2


def mean_wait(
    seeds: range, draw: Callable[[np.random.Generator], Trace], **options: object
) -> list:
    """The mean waiting time of each seed's trace, its first tenth left out."""
    means = []
    for seed in seeds:
        trace = draw(np.random.default_rng(seed))
        outcome = simulate_replicas(trace, **options)  # type: ignore[arg-type]
        means.append(float(outcome.wait_us[trace.n // 10 :].mean()))
    return means


def within(means: list, expected: float) -> bool:
    """Whether the expected value is within the 99.9 % interval of their mean (Student's t, 19)."""
    deviation = np.std(means, ddof=1) / math.sqrt(len(means))
    return abs(np.mean(means) - expected) <= 3.883 * deviation


def poisson(rng: np.random.Generator, n: int, mean_us: float, tokens: np.ndarray) -> Trace:
    arrival = np.cumsum(rng.exponential(mean_us, n)).astype(np.int64)
    return Trace(arrival, np.zeros(n, np.int64), tokens)


@pytest.mark.oracle
@pytest.mark.parametrize("load", [0.5, 0.8])
def test_one_server_of_one_request_is_md1(load: float) -> None:
    """Pollaczek and Khinchine: the mean wait is load / (2 (1 - load)) services."""
    n, service = 30_000, 10_000

    def draw(rng: np.random.Generator) -> Trace:
        return poisson(rng, n, service / load, np.ones(n, np.int64))

    costs = Costs(step_us=service, row_us=0)
    means = mean_wait(range(20), draw, replicas=1, max_num_seqs=1, costs=costs)
    expected = load / (2 * (1 - load)) * service
    assert within(means, expected)
    assert not within(means, 1.1 * expected), "the interval tells nothing"


@pytest.mark.oracle
@pytest.mark.parametrize("one_server", [True, False], ids=["a batch of c", "c replicas"])
def test_c_servers_are_mmc(one_server: bool) -> None:
    """Erlang's C: a batch of c requests whose steps are short, and c replicas of one request each
    behind a router that keeps those that none has room for."""
    c, load, n, service = 4, 0.8, 30_000, 10_000

    def draw(rng: np.random.Generator) -> Trace:
        tokens = np.maximum(1, rng.exponential(service, n).astype(np.int64))
        return poisson(rng, n, service / (c * load), tokens)

    options = {"replicas": 1 if one_server else c, "max_num_seqs": c if one_server else 1}
    placement = Placement("least-loaded", max_ongoing=None if one_server else 1)
    costs = Costs(step_us=1, row_us=0)
    means = mean_wait(range(20), draw, placement=placement, costs=costs, **options)
    a = c * load
    head = sum(a**k / math.factorial(k) for k in range(c))
    tail = a**c / math.factorial(c) / (1 - load)
    expected = tail / (head + tail) * service / (c * (1 - load))
    assert within(means, expected)
    assert not within(means, 1.15 * expected), "the interval tells nothing"


def test_a_failure_loses_no_request() -> None:
    trace = serving.draw_trace(4_000, 50, 40.0, seed=2)
    failures = [Failure(1, 10, 30), Failure(2, 20, 25), Failure(1, 50, 60)]
    for rule in ("random", "least-loaded", "rendezvous", "rank-aware", "ray"):
        outcome = simulate_replicas(trace, 3, rule, failures=failures)
        assert (outcome.replica_of >= 0).all()
        assert outcome.retries.sum() > 0, rule
        admitted = (trace.arrival_us + outcome.wait_us) / 1e6
        for failure in failures:
            down = (admitted >= failure.from_s) & (admitted < failure.until_s)
            assert not (outcome.replica_of[down] == failure.replica).any(), rule
        calm = simulate_replicas(trace, 3, rule)
        assert outcome.counters.host_misses > calm.counters.host_misses, rule


def test_requests_wait_while_no_replica_is_up() -> None:
    costs = Costs(step_us=10, row_us=0, adapter_bytes=0)
    trace = Trace([0, 5, 40], [1, 2, 1], [9, 1, 1])
    outcome = simulate_replicas(trace, 1, costs=costs, failures=[Failure(0, 20e-6, 100e-6)])
    # The first began at 0 and is lost at 20, in its second step; the second had its step from 10.
    assert outcome.retries.tolist() == [1, 1, 0]
    assert outcome.wait_us.tolist() == [100, 95, 60]


FAULTS = {
    "a step that has begun is joined": Fault(
        "replicas.replica", "max(1, -(-(now - replica.start)", "max(0, ((now - replica.start)"
    ),
    "a deferral is not counted": Fault(
        "replicas.scheduler", "+= newest < replica.tried", "+= newest < 0"
    ),
    "overtaken once too often": Fault(
        "replicas.scheduler", ">= server.max_overtakes", "> server.max_overtakes"
    ),
    "one adapter too many": Fault(
        "replicas.scheduler", "replica.held < server.max_loras", "replica.held <= server.max_loras"
    ),
    "a line is forgotten": Fault(
        "replicas.scheduler",
        "    line.place = NONE\n    if line.first != NONE:",
        "    line.place = NONE\n    if False:",
    ),
    "held adapters are evicted": Fault(
        "replicas.replica",
        "if fleet.lines[adapter, r].place == NONE:\n            if from_host:",
        "if True:\n            if from_host:",
    ),
    "use does not count": Fault("replicas.replica", "if server.lru:", "if False:"),
    "what leaves host memory keeps its slot": Fault(
        "replicas.replica",
        "if has(fleet.slots, adapter, r):\n                remove",
        "if not from_host:\n                remove",
    ),
    "ranks are not padded": Fault("replicas.replica", "if server.padded:", "if False:"),
    "base rows are padded, too": Fault(
        "replicas.replica", "(replica.running - fleet.lines[0, r].running)", "replica.running"
    ),
    "loading is free": Fault("replicas.replica", "        now += loading", "        now += 0"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_found(name: str) -> None:
    def check(modules: dict[str, ModuleType]) -> None:
        for seed in range(150):
            check_as_one(modules["sgmv.serving"], seed)

    assert verdict(check, FAULTS[name], name="sgmv.serving") != "nothing"


def test_without_a_fault_nothing_is_found() -> None:
    def check(modules: dict[str, ModuleType]) -> None:
        for seed in range(40):
            check_as_one(modules["sgmv.serving"], seed)
            check_as_several(modules["sgmv.serving"], seed)

    assert verdict(check, name="sgmv.serving") == "nothing"
    assert drawn(serving, 3)[0].n
