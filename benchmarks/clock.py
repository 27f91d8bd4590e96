"""The clock: variants take turns within one run, so that a slow minute hits all of them."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from benchmarks.machine import cpu_use, foreign_cores
from benchmarks.record import Times, is_quiet, significant

T = TypeVar("T")
ATTEMPTS = 4
DRAWS = 1000


@dataclass(frozen=True)
class Variant:
    """One way to compute a case: `before` is called ahead of each turn, off the clock.

    Semantics: with `returns_seconds` a call measures itself, and what it returns counts.
    Units: `settle_s` is the seconds of untimed calls ahead of each turn: at least one call, but for
    a variant that does not settle.
    """

    name: str
    call: Callable[[], Any]
    before: Callable[[], object] = lambda: None
    settle_s: float = 0.003
    settles: bool = True
    returns_seconds: bool = False


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
    """The times of all variants, which take turns: A B C A B C ...

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
                samples[variant.name].append(_turn(variant, budget))
    finally:
        if collecting:
            gc.enable()
    return {name: summary(turns) for name, turns in samples.items()}


def _settle(variant: Variant) -> None:
    end = time.perf_counter() + variant.settle_s
    variant.call()
    while time.perf_counter() < end:
        variant.call()


def _turn(variant: Variant, budget: Budget) -> list[int]:
    times: list[int] = []
    spent, call = 0, variant.call
    limit = int(budget.turn_s * 1e9)
    while not times or (spent < limit and len(times) < budget.max_calls):
        start = time.perf_counter_ns()
        seconds = call()
        taken = time.perf_counter_ns() - start
        times.append(round(seconds * 1e9) if variant.returns_seconds else taken)
        spent += taken
    return times


def summary(turns: Sequence[Sequence[int]]) -> Times:
    """The quantiles of all calls of some turns, and the median of each turn.

    >>> summary([[1000, 3000], [4000]])
    Times(q20=1.8, q50=3.0, q80=3.6, calls=3, rounds=[2.0, 4.0])
    """
    calls = list(chain(*turns))
    q20, q50, q80 = (significant(q / 1e3) for q in np.quantile(calls, (0.2, 0.5, 0.8)))
    rounds = [significant(float(np.median(turn)) / 1e3) for turn in turns]
    return Times(q20, q50, q80, len(calls), rounds)


def drawn_medians(*sides: Sequence[float]) -> NDArray[np.float64]:
    """The medians of rounds drawn with replacement, the same rounds for every side: (sides, DRAWS).

    It is the bootstrap over rounds (Efron, Annals of Statistics 7, 1979).
    """
    rounds = len(sides[0])
    drawn = np.random.default_rng(0).integers(rounds, size=(DRAWS, rounds))
    return np.asarray(np.median(np.array(sides)[:, drawn], axis=2))


def interval(*pairs: tuple[Times, Times]) -> tuple[float, float] | None:
    """The 95 % interval of the geometric mean of theirs / ours, of each (ours, theirs).

    Semantics: None without two rounds or more of each. Rounds are drawn, the same for both sides,
    as a slow minute hits both; the interval is as wide as what rounds differ by. Of the few rounds
    of a case it knows no more than that: 3 rounds give 27 draws, and the interval is nearly their
    range.

    >>> ten, twenty = summary([[10], [10], [10]]), summary([[20], [20], [20]])
    >>> interval((ten, twenty))
    (2.0, 2.0)
    """
    if any(len(ours.rounds) < 2 or len(ours.rounds) != len(its.rounds) for ours, its in pairs):
        return None
    drawn = [drawn_medians(ours.rounds, theirs.rounds) for ours, theirs in pairs]
    ratios = np.exp(np.mean([np.log(theirs / ours) for ours, theirs in drawn], axis=0))
    low, high = np.quantile(ratios, (0.025, 0.975))
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
