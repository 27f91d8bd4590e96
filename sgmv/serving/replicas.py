"""Many replicas behind a router in numbers alone: `simulate` for more than one server.

Each replica does what `simulate` does, with the same rules; a router sends every request to one of
them. The loop over all events is compiled: see `sgmv.replicas`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from sgmv.checks import check_count, check_several, fits_memory
from sgmv.errors import DtypeError, ServingError, ValueRangeError, shown
from sgmv.ids import MOST, Integers
from sgmv.replicas import events
from sgmv.replicas.records import (
    ABSENT,
    ENDS,
    LINE,
    LINK,
    NEVER,
    NONE,
    REPLICA,
    Fleet,
    Requests,
    Router,
    Server,
)  # fmt: skip
from sgmv.serving.arrivals import mixed
from sgmv.serving.residency import Counters, Residency
from sgmv.serving.scheduler import Scheduler
from sgmv.serving.simulate import Costs, Outcome, base_us, check_end, check_trace_and_costs
from sgmv.serving.traces import RANK, Trace, check_number

RULES = ("random", "least-loaded", "rendezvous", "rank-aware", "ray")  # as sgmv.replicas.router


@dataclass(frozen=True)
class Placement:
    """How a router chooses a replica for a request.

    Semantics: one of five rules, over the replicas that have not failed.

    random        any, all alike
    least-loaded  that with the fewest requests, waiting or running
    rendezvous    the home of its tenant: that of the highest of N weights, which are drawn from
                  tenant and replica; where `spill` requests are there, the next highest with fewer
    rank-aware    adapters are laid out by rank, each as wide as what was asked of it lately costs,
                  and cut into N equal pieces; made anew each `plan_s` seconds
    ray           of those that have its adapter in host memory, two by lot, and of these the less
                  loaded; if none has it, or all that have it are full, of those with the fewest
                  adapters; a request that had to wait at the router goes to any

    rule         one of the five
    max_ongoing  requests at a replica that make it full; where all are, requests wait at the
                 router. None: no limit, with "ray" the replica's max_num_seqs
    spill        of "rendezvous"; None: max_num_seqs
    plan_s       of "rank-aware", seconds
    seed         of what is drawn by lot, and of the weights

    Raises ServingError, DtypeError or ValueRangeError.
    Source: rendezvous is highest random weight (Thaler and Ravishankar, 1998); rank-aware after
    LoRAServe (arXiv 2511.22880), which also moves adapters between servers' memories; ray as Ray
    Serve's router for multiplexed models (2.60, _private/request_router), without its time-outs.

    >>> Placement("ray", max_ongoing=5).rule
    'ray'
    """

    rule: str = "rendezvous"
    max_ongoing: int | None = None
    spill: int | None = None
    plan_s: float = 60.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.rule not in RULES:
            raise ServingError("rule", f"one of {RULES}", repr(self.rule), "choose one of them")
        for name in ("max_ongoing", "spill"):
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, check_count(name, value, 1))
        object.__setattr__(self, "plan_s", check_number("plan_s", self.plan_s, 1e-3, 1e9))
        object.__setattr__(self, "seed", check_count("seed", self.seed, 0))


@dataclass(frozen=True)
class Failure:
    """A time in which a replica is down.

    Semantics: what it has at `from_s` is lost, and it returns at `until_s`, empty.

    replica          its number, from 0
    from_s, until_s  seconds of the simulated clock, the first below the second

    Raises ServingError, DtypeError or ValueRangeError.

    >>> Failure(2, 60, 90)
    Failure(replica=2, from_s=60.0, until_s=90.0)
    """

    replica: int
    from_s: float
    until_s: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "replica", check_count("replica", self.replica, 0))
        for name in ("from_s", "until_s"):
            object.__setattr__(self, name, check_number(name, getattr(self, name), 0, 1e12))
        if not self.from_s < self.until_s:
            expected = f"more than from_s = {self.from_s:g}"
            raise ServingError("until_s", expected, f"{self.until_s:g}", "swap them")


@dataclass(frozen=True, eq=False)
class ReplicasOutcome(Outcome):
    """What a simulation of several replicas found.

    Semantics: as Outcome, over all replicas together; and for each of them.

    replicas, placement  what was simulated
    replica_of   (n,) the replica that served each request
    found        (n,) where its adapter was when it was admitted: 0 a slot, 1 host memory, 2 disk
    retries      (n,) how often a request's replica failed
    busy_us      (replicas,) spent on steps and on loading
    counters_of  those of each replica

    >>> outcome = simulate_replicas(Trace([0, 0], [1, 2], [1, 1]), replicas=2)
    >>> outcome.replica_of.shape, outcome.found.tolist(), len(outcome.counters_of)
    ((2,), [2, 2], 2)
    """

    replicas: int
    placement: Placement
    replica_of: Integers
    found: Integers
    retries: Integers
    busy_us: Integers
    counters_of: list[Counters]

    @property
    def busy_share(self) -> float:
        """Of the replicas' time until the last request ended, the share that they were busy."""
        whole = self.end_us * self.replicas
        return float(self.busy_us.sum()) / whole if whole else math.nan

    @property
    def imbalance(self) -> float:
        """The busiest replica's time over the mean of all."""
        mean = float(self.busy_us.mean())
        return float(self.busy_us.max()) / mean if mean else math.nan


def simulate_replicas(
    trace: Trace,
    replicas: int = 4,
    placement: Placement | str = "rendezvous",
    max_loras: int = 8,
    policy: str = "lru",
    *,
    max_cpu_loras: int = 256,
    max_num_seqs: int = 64,
    max_overtakes: int = 256,
    costs: Costs | None = None,
    failures: Iterable[Failure] = (),
) -> ReplicasOutcome:
    """Serve a trace by several replicas without a model.

    Semantics: a request goes to a replica when it arrives, as `placement` says, and there does
    what it does in `simulate`; one replica gives `simulate`'s outcome. A replica that fails loses
    its requests, which begin anew at others, and its adapters. A request waits until the first step
    of the attempt that succeeds.

    trace      the requests
    replicas   how many
    placement  a Placement, or its rule
    max_loras, policy, max_cpu_loras, max_num_seqs, max_overtakes  of each replica, as in simulate
    costs      of each; Costs(), if left out
    failures   what fails when

    Raises as simulate does; ServingError for failures that overlap, DtypeError or ValueRangeError
    for those of a replica that is not there. Time is linear in the requests, and in the replicas
    that each looks through; memory in adapters times replicas.
    Source: as Placement and simulate.

    >>> trace = Trace([0, 0, 0], [1, 2, 1], [2, 3, 4])
    >>> outcome = simulate_replicas(trace, 2, "least-loaded", max_loras=1)
    >>> sorted(np.bincount(outcome.replica_of).tolist()), outcome.counters.slot_misses
    ([1, 2], 3)
    """
    costs = check_trace_and_costs(trace, costs)
    N = check_count("replicas", replicas, 1, 1 << 16)
    placement = _checked(placement)
    # What these two refuse is refused here, too.
    scheduler = Scheduler[int](max_loras, max_num_seqs, max_overtakes)
    residency = Residency(max_loras, max_cpu_loras, policy)
    max_loras, max_cpu_loras = scheduler.max_loras, residency.max_cpu_loras
    max_num_seqs = min(scheduler.max_num_seqs, max(trace.n, 1))  # more never run
    _check_span(trace)
    with fits_memory("max_num_seqs", max_num_seqs):
        base = base_us(costs, max_num_seqs)
    changes = _changes(failures, N)
    server = Server(
        max_loras, max_cpu_loras, max_num_seqs, scheduler.max_overtakes, policy == "lru",
        base, float(base[-1] - base[0]) / max_num_seqs, costs.adapter_us, costs.rank_us,
        costs.padded,
        costs.adapter_bytes / RANK,
        costs.adapter_bytes / RANK / costs.load_rate * 1e6,
        costs.adapter_bytes / RANK / costs.read_rate * 1e6,
    )  # fmt: skip
    first, number = _adapters(trace)
    requests = _requests(trace, number, placement.seed)
    with fits_memory("replicas", N):
        fleet = _fleet(N, server, _of_each(trace.ranks, first, 0))
        router = _router(placement, N, server, fleet.rank, _of_each(trace.tenants, first, 0))
    end_us = int(events.run(fleet, requests, server, router, changes))
    check_end(end_us)
    return _outcome(trace, placement, fleet, requests, (max_loras, policy, end_us))


def _checked(placement: object) -> Placement:
    if isinstance(placement, str) and placement in RULES:
        return Placement(placement)
    if not isinstance(placement, Placement):
        expected, got = f"a Placement, or one of {RULES}", shown(placement)
        raise DtypeError("placement", expected, got, "make one with Placement()")
    return placement


def fewest_replicas(
    trace: Trace,
    target_s: float,
    most: int = 64,
    placement: Placement | str = "rendezvous",
    **options: Any,
) -> ReplicasOutcome:
    """Serve a trace by as few replicas as keep its waiting time.

    Semantics: the outcome of the smallest number found at which 99 percent of the requests wait at
    most `target_s`. Numbers are doubled until one does, then halved: waiting is taken to fall with
    the number. Where `most` replicas do not suffice, it is their outcome.

    target_s   seconds
    most       replicas
    placement, options  as for simulate_replicas

    Raises as simulate_replicas does.

    >>> trace = Trace([0] * 8, range(1, 9), [100] * 8)
    >>> fewest_replicas(trace, 1.0, placement="least-loaded", max_loras=2).replicas
    4
    """
    target_s = check_number("target_s", target_s, 0)
    placement = _checked(placement)
    most = check_count("most", most, 1, 1 << 16)

    def tried(count: int) -> tuple[bool, ReplicasOutcome]:
        outcome = simulate_replicas(trace, count, placement, **options)
        return not trace.n or outcome.wait_s(99) <= target_s, outcome

    low, high = 0, 1  # `low` replicas are too few
    enough, best = tried(high)
    while not enough and high < most:
        low, high = high, min(2 * high, most)
        enough, best = tried(high)
    while enough and high - low > 1:
        middle = (low + high) // 2
        keeps, outcome = tried(middle)
        if keeps:
            high, best = middle, outcome
        else:
            low = middle
    return best


def _check_span(trace: Trace) -> None:
    """The compiled loop counts in 64 bits: (steps + 1) * n has to fit."""
    steps = int(trace.tokens.sum(dtype=np.float64)) if trace.n else 0
    if (steps + 1) * max(trace.n, 1) > MOST or trace.n >= 2**31:
        expected = "tokens times requests below 2**63, and fewer than 2**31 requests"
        raise ValueRangeError("trace", expected, shown(steps * trace.n), "shorten it")


def _changes(failures: Iterable[Failure], N: int) -> Integers:
    """What happens to replicas, as `events.run` has it."""
    check_several("failures", failures, "Failures")
    changes = []
    for failure in failures:
        if not isinstance(failure, Failure):
            kind = type(failure).__name__
            raise DtypeError("failures", "Failures", kind, "make each with Failure(...)")
        check_count("failures", failure.replica, 0, N - 1)
        for seconds, fails in ((failure.from_s, 1), (failure.until_s, 0)):
            changes.append((round(seconds * 1e6), failure.replica, fails))
    for r in {r for _, r, _ in changes}:
        own = sorted(change for change in changes if change[1] == r)
        if any(fails != (k + 1) % 2 for k, (_, _, fails) in enumerate(own)):
            remedy = "join those that overlap"
            raise ServingError("failures", "one after the other", f"replica {r} twice", remedy)
    return np.array(sorted(changes), np.int64).reshape(-1, 3)


def _adapters(trace: Trace) -> tuple[Integers, Integers]:
    """Where each adapter is first, ids ascending from the base model's, and the requests' numbers.

    The base model is number 0, and -1 is first if nobody asks for it.
    """
    ids, first, number = np.unique(trace.adapter_ids, return_index=True, return_inverse=True)
    if not ids.size or ids[0] != 0:
        return np.r_[NONE, first], number + 1
    return first, number


def _of_each(values: Integers, first: Integers, base: int) -> Integers:
    """A value of each adapter's first request; `base` of the base model."""
    found = values[first] if values.size else np.zeros(len(first), np.int64)
    found[0] = base
    return found


def _requests(trace: Trace, number: Integers, seed: int) -> Requests:
    n = trace.n
    chance = np.random.default_rng(seed).random(n)
    new = [np.full(n, NONE) for _ in ("ticket", "after", "replica")]
    zeros = [np.zeros(n, np.int64) for _ in ("wait_us", "found", "retries")]
    return Requests(
        trace.arrival_us, number, trace.tokens, chance, new[0], new[1], zeros[0], new[2], zeros[1],
        zeros[2],
    )  # fmt: skip


def _fleet(N: int, server: Server, rank: Integers) -> Fleet:
    """N replicas that are empty."""
    adapters = len(rank)

    def records(shape: tuple[int, ...], kind: Any, fill: int) -> Any:
        fields = np.full((*shape, len(kind.names)), fill, kind[0])
        return fields.view(kind).reshape(shape)

    lines = records((adapters, N), LINE, NONE)
    lines["running"] = 0
    lines["place"][0] = 0  # the base model holds no slot, and needs none
    ends = [records((N,), ENDS, NONE) for _ in ("host", "slots")]
    for each in ends:
        each["count"] = 0
    lists = [records((adapters, N), LINK, ABSENT) for _ in ("host", "slots")]
    return Fleet(
        rank=rank,
        replicas=records((N,), REPLICA, 0),
        wake=np.full(N, NEVER),
        lines=lines,
        host=lists[0], host_ends=ends[0], slots=lists[1], slot_ends=ends[1],
        held=np.zeros((N, 1 + server.max_loras), np.int64),
        oldest=np.full((N, 1 + server.max_loras), NEVER),
        strangers=np.zeros((N, adapters), np.int64),
        ending=np.zeros((N, server.max_num_seqs), np.int64),
        batch=np.zeros(server.max_num_seqs, np.int64),
        ids=np.zeros(server.max_num_seqs, np.int64),
        up=np.arange(N),
        router=np.array([N, NONE, NONE]),
    )  # fmt: skip


def _router(
    placement: Placement, N: int, server: Server, rank: Integers, tenants: Integers
) -> Router:
    rule = placement.rule
    most = placement.max_ongoing or (server.max_num_seqs if rule == "ray" else MOST)
    weights = np.zeros((len(rank), N if rule == "rendezvous" else 0))
    if rule == "rendezvous":
        seeds = mixed(np.arange(N) + placement.seed * (1 << 16))
        weights = (mixed(mixed(tenants)[:, None] ^ seeds) >> np.uint64(11)).astype(np.float64)
    by_rank = np.argsort(rank, kind="stable")
    place = np.empty_like(by_rank)
    place[by_rank] = np.arange(len(by_rank))
    return Router(
        placement=RULES.index(rule),
        most=most,
        spill=placement.spill or server.max_num_seqs,
        weights=weights,
        by_rank=by_rank,
        demand=np.ones(len(rank)),
        share=np.zeros(len(rank) + 1),
        place=place,
        plan=np.array([0 if rule == "rank-aware" else NEVER, round(placement.plan_s * 1e6)]),
        candidates=np.zeros(N, np.int64),
    )


def _outcome(
    trace: Trace, placement: Placement, fleet: Fleet, requests: Requests, others: tuple[Any, ...]
) -> ReplicasOutcome:
    names = list(Counters.__dataclass_fields__)
    found: npt.NDArray[Any] = fleet.replicas
    counters_of = [Counters(*(int(each[name]) for name in names)) for each in found]
    total = Counters(*(int(found[name].sum()) for name in names))
    max_loras, policy, end_us = others
    return ReplicasOutcome(
        trace=trace,
        max_loras=max_loras,
        policy=policy,
        wait_us=requests.wait_us,
        deferrals=int(found["deferrals"].sum()),
        counters=total,
        loaded_bytes=int(found["loaded_bytes"].sum()),
        read_bytes=int(found["read_bytes"].sum()),
        end_us=end_us,
        replicas=len(found),
        placement=placement,
        replica_of=requests.replica,
        found=requests.found,
        retries=requests.retries,
        busy_us=np.array(found["busy_us"]),
        counters_of=counters_of,
    )
