"""A served model in numbers alone: how long each request waits, and what has to be loaded.

The Scheduler and the Residency are those of a real server. Only the model is missing: a step takes
`step_us` and `row_us` more for each request in it, and each request has one row in each of its
steps; a step waits until its adapters are in slots.

Between two events, an arrival or the end of a request, all steps are alike: they are taken at once,
so that the time of a simulation grows with the requests and not with their tokens. All times are
whole microseconds, and nothing is rounded: the outcome is that of a loop over every step.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from sgmv.checks import check_count, check_several
from sgmv.errors import DtypeError, ServingError, ValueRangeError, shown
from sgmv.ids import MOST, Integers
from sgmv.serving.requests import BASE_MODEL, LoRARequest
from sgmv.serving.residency import Counters, Residency
from sgmv.serving.scheduler import Scheduler
from sgmv.serving.traces import RANK, Trace, check_number


@dataclass(frozen=True)
class Costs:
    """What a step and an adapter cost.

    Semantics: a step takes what the first four say, or base_us, and before it each adapter that
    comes into a slot `load_us`, each that is read from disk `read_us` as well; one of another rank
    than 16 as much more or less. The defaults are round numbers for a 7B model on one large GPU,
    not measurements: a step that grows little with its rows, and rank-16 adapters of the q, k, v
    and o projections in half precision.

    step_us        microseconds of a step
    row_us         and of each request in it
    adapter_us     and of each adapter in it
    rank_us        and of each rank of each request's adapter
    padded         whether kernels take as long for each request's rank as for the highest of all
    base_us        pairs (requests, microseconds), ascending: in place of step_us and row_us,
                   where a step is no straight line over its requests; between two pairs it is,
                   beyond the last it goes on, below the first it is that of the first
    adapter_bytes  of an adapter of rank 16
    load_rate      bytes a second from host memory into slots
    read_rate      bytes a second from disk into host memory

    Raises ServingError, DtypeError or ValueRangeError.
    Source: that a batch costs little more than a row: Punica (arXiv 2310.18547), section 7.

    >>> Costs().load_us, Costs().read_us
    (1678, 16777)
    """

    step_us: int = 28_000
    row_us: int = 100
    adapter_bytes: int = 32 << 20
    load_rate: float = 20e9
    read_rate: float = 2e9
    adapter_us: int = 0
    rank_us: float = 0.0
    padded: bool = False
    base_us: Sequence[tuple[int, int]] = ()

    def __post_init__(self) -> None:
        whole = {"step_us": 1, "row_us": 0, "adapter_us": 0, "adapter_bytes": 0}
        for name, least in whole.items():
            value = check_count(name, getattr(self, name), least)
            object.__setattr__(self, name, value)
        for name, least in (("load_rate", 1), ("read_rate", 1), ("rank_us", 0)):
            object.__setattr__(self, name, check_number(name, getattr(self, name), least))
        object.__setattr__(self, "padded", bool(self.padded))
        object.__setattr__(self, "base_us", _checked_pairs(self.base_us))

    @property
    def load_us(self) -> int:
        """One adapter of rank 16 from host memory into a slot."""
        return load_us(self, RANK)

    @property
    def read_us(self) -> int:
        """One adapter of rank 16 from disk into host memory."""
        return read_us(self, RANK)


def _checked_pairs(pairs: object) -> tuple[tuple[int, int], ...]:
    check_several("base_us", pairs, "pairs (requests, microseconds)")
    found: list[tuple[int, int]] = []
    for pair in pairs:  # type: ignore[attr-defined]  # it is several
        check_several("base_us", pair, "pairs (requests, microseconds)")
        if len(pair) != 2:
            got = repr(pair)
            raise DtypeError("base_us", "pairs (requests, microseconds)", got, "pair them")
        found.append((check_count("base_us", pair[0], 1), check_count("base_us", pair[1], 1)))
    if any(one[0] >= other[0] or one[1] > other[1] for one, other in pairwise(found)):
        expected = "requests that ascend, with times that do not fall"
        raise ServingError("base_us", expected, repr(found), "sort the pairs")
    return tuple(found)


def base_us(costs: Costs, most: int) -> Integers:
    """Microseconds of a step of 0 to `most` requests, without what adapters add."""
    rows = np.arange(most + 1)
    if not costs.base_us:
        line: Integers = costs.step_us + costs.row_us * rows
        return line
    at, us = (np.array(each, np.float64) for each in zip(*costs.base_us, strict=True))
    slope = (us[-1] - us[-2]) / (at[-1] - at[-2]) if len(at) > 1 else 0.0
    found = np.interp(rows, at, us) + slope * np.maximum(rows - at[-1], 0)
    whole: Integers = np.rint(found).astype(np.int64)
    return whole


def added_us(costs: Costs, adapters: int, rows_of: Mapping[int, int]) -> int:
    """Microseconds that adapters add to a step; `rows_of` a rank requests ask for such a one."""
    if costs.padded:
        ranks = max(rows_of, default=0) * sum(rows_of.values())
    else:
        ranks = sum(rank * count for rank, count in rows_of.items())
    return costs.adapter_us * adapters + round(costs.rank_us * ranks)


def bytes_of(costs: Costs, rank: int) -> int:
    """Of an adapter of this rank."""
    return round(costs.adapter_bytes / RANK * rank)


def load_us(costs: Costs, rank: int) -> int:
    """Of an adapter of this rank from host memory into a slot."""
    return round(costs.adapter_bytes / RANK / costs.load_rate * 1e6 * rank)


def read_us(costs: Costs, rank: int) -> int:
    """Of an adapter of this rank from disk into host memory."""
    return round(costs.adapter_bytes / RANK / costs.read_rate * 1e6 * rank)


class Tenants(NamedTuple):
    """Waiting time by tenant, ids ascending: by adapter, unless the trace has tenants."""

    ids: Integers
    requests: Integers
    p50_s: npt.NDArray[np.float64]
    p99_s: npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Outcome:
    """What a simulation found.

    Semantics: `simulate` makes it; times are of the simulated clock.

    trace, max_loras, policy  what was simulated
    wait_us      (n,) from each request's arrival until its first step began
    deferrals    requests that had to wait for others' adapters though the batch had room
    counters     adapters found, and not found, where a step's admitted requests needed them
    loaded_bytes, read_bytes  from host memory into slots, from disk into host memory
    end_us       when the last request ended

    >>> outcome = simulate(Trace([0, 0], [1, 1], [1, 1]))
    >>> outcome.hit_rate, outcome.wait_us.tolist(), outcome.tenants().requests.tolist()
    (0.5, [18455, 18455], [2])
    """

    trace: Trace
    max_loras: int
    policy: str
    wait_us: Integers
    deferrals: int
    counters: Counters
    loaded_bytes: int
    read_bytes: int
    end_us: int

    @property
    def hit_rate(self) -> float:
        """Of the requests that ask for an adapter, the share for which none had to be loaded."""
        asking = int((self.trace.adapter_ids != BASE_MODEL).sum())
        return 1 - self.counters.slot_misses / asking if asking else math.nan

    @property
    def deferral_rate(self) -> float:
        """The share of the requests that were deferred."""
        return self.deferrals / self.trace.n if self.trace.n else math.nan

    @property
    def requests_per_s(self) -> float:
        """Requests ended per second of the simulated time."""
        return self.trace.n / self.end_us * 1e6 if self.end_us else math.nan

    def wait_s(self, percent: float) -> float:
        """The waiting time in seconds that `percent` of the requests do not exceed."""
        percent = check_number("percent", percent, least=0, limit=100)
        if not self.trace.n:
            return math.nan
        return float(np.percentile(self.wait_us, percent, method="inverted_cdf")) / 1e6

    def tenants(self) -> Tenants:
        """The same for each tenant's requests by themselves, 50 and 99 percent."""
        return waits_by(self.trace.tenants, self.wait_us)


def waits_by(groups: Integers, wait_us: Integers) -> Tenants:
    """The waiting times of each group's requests by themselves, 50 and 99 percent."""
    order = np.lexsort((wait_us, groups))
    ids, start, requests = np.unique(groups[order], return_index=True, return_counts=True)
    waits = wait_us[order] / 1e6
    # The rank of the smallest value that this percentage does not exceed, in whole numbers.
    p50, p99 = (waits[start - (-requests * percent // 100) - 1] for percent in (50, 99))
    return Tenants(ids, requests, p50, p99)


def simulate(
    trace: Trace,
    max_loras: int = 8,
    policy: str = "lru",
    *,
    max_cpu_loras: int = 256,
    max_num_seqs: int = 64,
    max_overtakes: int = 256,
    costs: Costs | None = None,
) -> Outcome:
    """Serve a trace without a model.

    Semantics: at each step's begin those that have arrived wait, and `Scheduler.admit` and
    `Residency.bring` do what they do in a server; loading keeps the step from beginning.

    trace          the requests
    max_loras      slots
    policy         "lru" or "fifo": which adapter is evicted, from slots and from host memory
    max_cpu_loras  adapters in host memory, slots included
    max_num_seqs, max_overtakes  as for Scheduler
    costs          Costs(), if left out

    Raises as Scheduler and Residency do. A million requests take some seconds.
    Source: S-LoRA (arXiv 2311.03285), section 7, for the workload.

    >>> outcome = simulate(Trace([0, 0, 0], [1, 2, 1], [2, 3, 4]), max_loras=1)
    >>> outcome.deferrals, outcome.counters.slot_misses
    (1, 2)
    >>> outcome.wait_us - outcome.wait_us[0]
    array([     0, 131055,      0])
    """
    costs = check_trace_and_costs(trace, costs)
    scheduler: Scheduler[int] = Scheduler(max_loras, max_num_seqs, max_overtakes)
    residency = Residency(max_loras, max_cpu_loras, policy)
    n, arrival, ids, tokens = (
        trace.n, trace.arrival_us.tolist(), trace.adapter_ids.tolist(), trace.tokens.tolist()
    )  # fmt: skip
    lora_requests = {i: LoRARequest(str(i), i, str(i)) for i in set(ids) - {BASE_MODEL}}
    ranks = dict(zip(ids, trace.ranks.tolist(), strict=True))
    wait = [0] * n
    ending: list[int] = []  # a heap: (the step before which a request has ended) * n + request
    rows_of: Counter[int] = Counter()  # of running requests, by the ranks of their adapters
    base = base_us(costs, min(max_num_seqs, n)).tolist()
    waiting, holding = scheduler.waiting, scheduler.holding
    now = step = came = loaded_bytes = read_bytes = 0
    while came < n or ending or waiting:
        while came < n and arrival[came] <= now:
            scheduler.add(came, lora_requests.get(ids[came]))
            came += 1
        admitted = scheduler.admit()
        if admitted:
            asked = sorted({ids[i] for i in admitted} - {BASE_MODEL})
            loaded = [ranks[i] for i in asked if i not in residency.slots]
            read = [ranks[i] for i in asked if i not in residency.host]
            residency.bring(asked, holding)
            now += sum(load_us(costs, r) for r in loaded) + sum(read_us(costs, r) for r in read)
            loaded_bytes += sum(bytes_of(costs, r) for r in loaded)
            read_bytes += sum(bytes_of(costs, r) for r in read)
            for i in admitted:
                wait[i] = now - arrival[i]
                heappush(ending, (step + tokens[i]) * n + i)
                if ids[i] != BASE_MODEL:
                    rows_of[ranks[ids[i]]] += 1
        if not ending:
            now = arrival[came]
            continue
        each_us = base[len(ending)] + added_us(costs, len(holding) - 1, rows_of)
        steps = ending[0] // n - step
        if came < n and len(ending) < max_num_seqs:  # the next arrival may change something
            steps = min(steps, max(1, -(-(arrival[came] - now) // each_us)))
        step += steps
        now += steps * each_us
        ended = set()
        while ending and ending[0] < (step + 1) * n:
            i = heappop(ending) % n
            scheduler.finish(i)
            ended.add(ids[i])
            if ids[i] != BASE_MODEL:
                rows_of[ranks[ids[i]]] -= 1
        rows_of = +rows_of  # those that are left
        # A server touches its adapters in each step; what counts is the last before they rest.
        residency.touch(sorted(ended - holding))
    check_end(now)
    return Outcome(
        trace=trace,
        max_loras=max_loras,
        policy=policy,
        wait_us=np.array(wait, np.int64),
        deferrals=scheduler.deferrals,
        counters=residency.counters,
        loaded_bytes=loaded_bytes,
        read_bytes=read_bytes,
        end_us=now,
    )


def check_trace_and_costs(trace: object, costs: object) -> Costs:
    """Refuse what is neither; returns the costs, Costs() in place of None."""
    if not isinstance(trace, Trace):
        kind = type(trace).__name__
        raise DtypeError("trace", "a Trace", kind, "make one with Trace(...) or draw_trace()")
    costs = Costs() if costs is None else costs
    if not isinstance(costs, Costs):
        raise DtypeError("costs", "Costs, or None", type(costs).__name__, "make them with Costs()")
    return costs


def check_end(end_us: int) -> None:
    """Refuse a trace of more time than its microseconds can count."""
    if end_us > MOST:
        expected = "requests that end before 2**63 microseconds"
        raise ValueRangeError("trace", expected, shown(end_us), "shorten it, or lower the costs")
