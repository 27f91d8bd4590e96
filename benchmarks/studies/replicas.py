"""How long the simulator of replicas takes, by requests and by placement.

    python -m benchmarks replicas            ten thousand to a million requests: a minute
    python -m benchmarks replicas --full     ten million, too: ten minutes

64 replicas of 16 slots; requests for 100,000 adapters by Zipf's law, 700 a second. The baseline in
the same run is `simulate`, whose loop is Python, with one replica and 4 requests a second. Before,
one replica of the compiled loop has to give its outcome.
"""

from __future__ import annotations

import argparse
import resource
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import msgspec
import numpy as np

from benchmarks.clock import ATTEMPTS, Budget, Variant, alternate, quietly
from benchmarks.record import Head, Times
from benchmarks.study import Red, Study
from benchmarks.text import Console, Table
from sgmv.console import Parser
from sgmv.serving import (
    Outcome,
    ReplicasOutcome,
    Trace,
    draw_trace,
    simulate,
    simulate_replicas,
)
from sgmv.serving.replicas import RULES

REPLICAS, SLOTS, ADAPTERS, RATE = 64, 16, 100_000, 700.0
SIZES = (10_000, 100_000, 1_000_000)
FULL = 10_000_000
BASELINE, BASELINE_RATE = 10_000, 4.0


class ReplicasCase(msgspec.Struct, forbid_unknown_fields=True):
    """A trace by one placement; `simulate` is the baseline. `peak`: bytes of the process so far."""

    placement: str
    replicas: int
    requests: int
    busy_share: float | None
    times: Times
    peak: int
    foreign_cores: float | None

    @property
    def us(self) -> float:
        """Microseconds a request."""
        return self.times.q50 / self.requests


class ReplicasRecord(Head):
    """One run of this file."""

    STUDY: ClassVar[str] = "replicas"
    adapters: int
    rate: float
    cases: list[ReplicasCase]


def check(trace: Trace) -> None:
    """Hold one replica to `simulate`. Raises Red if it does something else."""
    one = simulate(trace, SLOTS)
    for placement in RULES:
        same = simulate_replicas(trace, 1, placement, SLOTS)
        if not np.array_equal(same.wait_us, one.wait_us) or same.counters != one.counters:
            raise Red("gate: RED, nothing was timed", f"{placement}: one replica is not `simulate`")


def measure(
    placement: str, replicas: int, requests: int, call: Callable[[], Outcome]
) -> ReplicasCase:
    """Time it: three rounds, again while other programs run; where that takes long, once."""
    outcomes: list[Outcome] = []

    def run() -> None:
        outcomes[:] = [call()]

    long = requests > SIZES[1]
    budget = Budget(rounds=1 if long else 3, turn_s=0.0)
    turns = partial(alternate, [Variant(placement, run, settles=False)], budget)
    times, foreign = quietly(turns, attempts=1 if long else ATTEMPTS)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
    [outcome] = outcomes
    busy = outcome.busy_share if isinstance(outcome, ReplicasOutcome) else None
    return ReplicasCase(placement, replicas, requests, busy, times[placement], peak, foreign)


def tables(record: ReplicasRecord) -> list[Table]:
    """A line for each placement, a column for each number of requests."""
    sizes = sorted({case.requests for case in record.cases})
    lines = []
    for name in dict.fromkeys(case.placement for case in record.cases):
        its = {case.requests: case for case in record.cases if case.placement == name}
        most = its[max(its)]
        share = "-" if most.busy_share is None else f"{100 * most.busy_share:.0f} %"
        figures = [f"{its[size].us:.2f}" if size in its else "-" for size in sizes]
        lines.append(
            [name, str(most.replicas), *figures, f"{most.times.q50 / 1e6:.3g}", share,
             f"{most.peak / 1e9:.1f}"]
        )  # fmt: skip
    head = ["us a request", "replicas", *(f"{size:,}" for size in sizes),
            "the most, s", "busy", "peak GB"]  # fmt: skip
    return [Table(head, lines, 1)]


def arguments(parser: Parser) -> None:
    """Add the number of requests."""
    parser.add_argument("--full", action="store_true", help=f"{FULL:,} requests, too")


def run(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Check, then time each trace by each placement."""
    alone = draw_trace(BASELINE, ADAPTERS, BASELINE_RATE)
    check(alone)
    cases = [measure("simulate", 1, BASELINE, partial(simulate, alone, SLOTS))]
    for requests in (*SIZES, *([FULL] if args.full else ())):
        trace = draw_trace(requests, ADAPTERS, RATE)
        for placement in RULES:
            console.print(f"  {requests:,} requests, {placement}")
            call = partial(simulate_replicas, trace, REPLICAS, placement, SLOTS)
            cases.append(measure(placement, REPLICAS, requests, call))
    return {"adapters": ADAPTERS, "rate": RATE, "cases": cases}


STUDY = Study(
    "replicas",
    __doc__,
    ReplicasRecord,
    run,
    tables,
    arguments,
    threads=False,
    whole=lambda args: args.full,
)
