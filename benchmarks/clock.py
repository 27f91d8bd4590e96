"""The clock: variants take turns within one run, so that a slow minute hits all of them."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import TypeVar

import numpy as np

from benchmarks.machine import cpu_use, foreign_cores
from benchmarks.record import Times, is_quiet, significant

T = TypeVar("T")
ATTEMPTS = 4
DRAWS = 1000


@dataclass(frozen=True)
class Variant:
    """One way to compute a case: `before` is called ahead of each turn, off the clock.

    Units: `settle_s` is the seconds of untimed calls ahead of each turn: at least one call, but for
    a variant that does not settle.
    """

    name: str
    call: Callable[[], object]
    before: Callable[[], object] = lambda: None
    settle_s: float = 0.003
    settles: bool = True


@dataclass(frozen=True)
class Budget:
    """How long a case may take. Units: seconds, calls."""

    rounds: int = 4
    turn_s: float = 0.02
    max_calls: int = 500


@dataclass(frozen=True)
class Deadline:
    """When something has to end, and the clock that tells. Units: seconds.

    >>> Deadline(at=70.0, now=lambda: 10.0).share(of=3).left()
    20.0
    """

    at: float
    now: Callable[[], float] = time.perf_counter

    def left(self) -> float:
        """What is left; below 0 once it is over."""
        return self.at - self.now()

    def share(self, of: int) -> Deadline:
        """The end of the first of so many equal parts of what is left."""
        now = self.now()
        return Deadline(now + (self.at - now) / of, self.now)


NEVER = Deadline(math.inf)


def alternate(
    variants: Sequence[Variant], budget: Budget, until: Deadline = NEVER
) -> dict[str, Times]:
    """The quantiles of all variants, over all their `turns`."""
    found = turns(variants, budget, until)
    return {name: summary(chain(*samples)) for name, samples in found.items()}


def turns(
    variants: Sequence[Variant], budget: Budget, until: Deadline = NEVER
) -> dict[str, list[list[int]]]:
    """The times of all variants, turn by turn: A B C A B C ... Units: nanoseconds.

    Semantics: a turn is first untimed calls, for settle_s if the variant settles, then timed calls
    for `turn_s` (at least one, at most max_calls). After `until` no round but the first begins.
    """
    samples: dict[str, list[list[int]]] = {variant.name: [] for variant in variants}
    collecting = gc.isenabled()
    gc.disable()
    try:
        for done in range(budget.rounds):
            if done and until.left() <= 0:
                break
            for variant in variants:
                variant.before()
                if variant.settles:
                    _settle(variant)
                samples[variant.name].append(_turn(variant.call, budget))
    finally:
        if collecting:
            gc.enable()
    return samples


def _settle(variant: Variant) -> None:
    end = time.perf_counter() + variant.settle_s
    variant.call()
    while time.perf_counter() < end:
        variant.call()


def _turn(call: Callable[[], object], budget: Budget) -> list[int]:
    times: list[int] = []
    spent = 0
    limit = int(budget.turn_s * 1e9)
    while not times or (spent < limit and len(times) < budget.max_calls):
        start = time.perf_counter_ns()
        call()
        times.append(time.perf_counter_ns() - start)
        spent += times[-1]
    return times


def summary(nanoseconds: Iterable[int]) -> Times:
    """The quantiles of such calls."""
    times = list(nanoseconds)
    q20, q50, q80 = (significant(q / 1e3) for q in np.quantile(times, (0.2, 0.5, 0.8)))
    return Times(q20, q50, q80, len(times))


def interval(
    ours: Sequence[Sequence[int]], theirs: Sequence[Sequence[int]]
) -> tuple[float, float] | None:
    """The 95 % interval of theirs / ours, from turns of the same rounds; None for one round.

    Semantics: rounds are drawn with replacement, the same for both sides, as a slow minute hits
    both; the ratio is of the medians of the drawn rounds' medians (the percentile bootstrap: Efron,
    Annals of Statistics 7, 1979). It is as wide as what rounds differ by. Of the few rounds of a
    case it knows no more than that: 3 rounds give 27 draws, whose interval is nearly their range.

    >>> interval([[10], [10], [10]], [[20], [20], [20]])
    (2.0, 2.0)
    """
    if len(ours) < 2:
        return None
    medians = np.array([[np.median(turn) for turn in side] for side in (ours, theirs)])
    rounds = medians.shape[1]
    drawn = np.random.default_rng(0).integers(rounds, size=(DRAWS, rounds))
    mine, other = np.median(medians[:, drawn], axis=2)
    low, high = np.quantile(other / mine, (0.025, 0.975))
    return significant(low), significant(high)


def time_quietly(
    variants: Sequence[Variant], budget: Budget
) -> tuple[dict[str, Times], float | None]:
    """Timings, and the cores that other processes kept busy meanwhile: see `quietly`."""
    return quietly(partial(alternate, variants, budget))


def quietly(
    measure: Callable[[], T], attempts: int = ATTEMPTS, pids: Sequence[int] = ()
) -> tuple[T, float | None]:
    """What a measurement gives, and the cores that other processes kept busy meanwhile.

    Semantics: repeated, up to `attempts` times in all, while others are busy; the quietest one
    counts, whatever its timings are. Beside one other busy process on two cores, numpy's threaded
    product took ten times its time (256 rows, one segment): such a case would flatter sgmv.
    What `pids` use, processes that the measurement is made in, is not others'.
    """
    made: list[tuple[T, float | None]] = []
    while not made or (len(made) < attempts and not is_quiet(made[-1][1])):
        before = cpu_use(pids)
        found = measure()
        made.append((found, foreign_cores(before, cpu_use(pids))))
    return min(made, key=lambda attempt: attempt[1] or 0.0)
