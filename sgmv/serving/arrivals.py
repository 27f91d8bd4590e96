"""When requests arrive, and how the adapters that they ask for change meanwhile."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from sgmv.errors import ValueRangeError, shown
from sgmv.ids import MOST, Integers

ARRIVALS = ("poisson", "diurnal", "flash-crowd", "bursty")
WAVES, SWING = 3, 0.8  # of "diurnal": in the whole time; of the rate around its mean
CROWD, CROWD_RATE = (0.4, 0.5), 4  # of "flash-crowd": its part of the time; of the rate before it
MOST_CHANGES = 10**8
DEVIATION = 4.0  # of the gaps of "bursty", in units of their mean


def arrival_times(rng: np.random.Generator, kind: str, count: int, mean_us: float) -> Integers:
    """Ascending microseconds; `mean_us` is the mean gap.

    A process of uneven rate is one of even rate on a clock that runs unevenly: `passed` is that
    clock, over the time that `count` requests take.
    """
    if kind == "bursty":
        gaps = rng.gamma(DEVIATION**-2, mean_us * DEVIATION**2, count)
        return np.cumsum(gaps).astype(np.int64)
    times = np.cumsum(rng.exponential(mean_us, count))
    at = np.linspace(0, 1, 4097)
    if kind == "diurnal":
        turns = 2 * math.pi * WAVES
        passed = at + SWING / turns * (1 - np.cos(turns * at))
    elif kind == "flash-crowd":
        passed = at + (CROWD_RATE - 1) * np.clip(at - CROWD[0], 0, CROWD[1] - CROWD[0])
        passed /= passed[-1]
    else:
        return times.astype(np.int64)
    total = count * mean_us
    whole, part = np.divmod(times, total)  # the sum of the gaps may be more than its mean
    return ((whole + np.interp(part, passed * total, at)) * total).astype(np.int64)


def of_crowd(rng: np.random.Generator, times: Integers, total_us: float) -> npt.NDArray[np.bool_]:
    """Which requests of a flash crowd are those that come in addition."""
    part = times / total_us % 1
    extra = rng.random(len(times)) < 1 - 1 / CROWD_RATE
    return extra & (part >= CROWD[0]) & (part < CROWD[1])


def changed(
    rng: np.random.Generator,
    adapters: int,
    times: Integers,
    ids: Integers,
    updates: float,
    turnover: float,
) -> tuple[Integers, Integers]:
    """The ids and tenants of requests for adapters that are updated, or taken away for new ones.

    `updates` and `turnover` are per second, each a Poisson process over adapters 1..adapters. What
    comes with time has the ids behind these, in no order.
    """
    span = int(times.max(initial=0)) + 1
    if (adapters + 1) * span > MOST:
        expected, got = "adapters times microseconds below 2**63", shown(adapters)
        raise ValueRangeError("adapters", expected, got, "draw a shorter trace")
    for name, rate in (("updates", updates), ("turnover", turnover)):
        if rate * span / 1e6 > MOST_CHANGES:
            expected = f"at most {MOST_CHANGES:,} in the trace's time"
            raise ValueRangeError(name, expected, f"{rate * span / 1e6:.3g}", "lower the rate")
    # An event and a request are one number each: adapter by adapter, and there by time.
    asked = ids * span + times
    renewed, replaced = (
        rng.integers(1, adapters + 1, count) * span + rng.integers(0, span, count)
        for count in (int(rng.poisson(rate * span / 1e6)) for rate in (updates, turnover))
    )
    every = np.sort(np.concatenate([renewed, replaced]))
    behind = adapters + len(every)
    return (
        _named_anew(every, asked, ids, span, adapters + 1),
        _named_anew(np.sort(replaced), asked, ids, span, behind + 1),
    )


def _named_anew(
    events: Integers, asked: Integers, ids: Integers, span: int, first: int
) -> Integers:
    """What the last event of an adapter before a request calls it; its id if there was none."""
    if not len(events):
        return ids
    at = np.searchsorted(events, asked, side="right") - 1
    return np.where((at >= 0) & (events[at] // span == ids), first + at, ids)


def mixed(values: npt.NDArray[Any]) -> npt.NDArray[np.uint64]:
    """Numbers that look drawn by lot, the same for the same values: splitmix64."""
    z = values.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    found: npt.NDArray[np.uint64] = z ^ (z >> np.uint64(31))
    return found
