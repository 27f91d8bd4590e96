"""How the time of add_lora grows: over the batch's rows, and over the adapters loaded.

    python -m benchmarks growth            check, timings, table, figure; about half a minute
    python -m benchmarks growth --record   the same, into benchmarks/records/, to commit

Layer 1024 -> 16 -> 1024 in float32: small, so that 10,000 adapters fit (1.2 GiB; all stacks that
stand at once 1.9 GiB). Weights are hot, segments made before, as in the other timings.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from typing import Any, ClassVar

import msgspec
import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

import sgmv
from benchmarks import machine
from benchmarks.batch import popularity_ids
from benchmarks.clock import Budget, Variant, interval, time_quietly
from benchmarks.figures import COLOURS, MARKERS, band
from benchmarks.gate import check_rows
from benchmarks.record import Head, Times
from benchmarks.study import Study
from benchmarks.text import Console, Table, undecided

H_IN, H_OUT, RANK = 1024, 1024, 16
MOST_ROWS, MOST_ADAPTERS = 16384, 10_000
LOADED = (1, 4, 16, 64, 256, 1024, 4096, MOST_ADAPTERS)
FEW_ROWS = 64
DISTINCT_WEIGHTS = 64  # adapters repeat these values, each in memory of its own
END = 8  # the slope is that of the points from the largest / END on
BUDGET = Budget(rounds=5, turn_s=0.02)


@dataclass(frozen=True)
class Series:
    """One curve. `axis` is what n counts, `batch` gives the stack and the ids of the rows at n."""

    name: str
    axis: str
    sizes: Sequence[int]
    batch: Callable[[int], tuple[sgmv.AdapterStack, NDArray[np.int64]]]


@dataclass(frozen=True)
class Fit:
    """`t = a + b * n`. Units: a and b microseconds; deviation and slope are plain numbers.

    `deviation` is the largest |a + b n - t| / t; `slope` is d log t / d log n at the large end: 0
    where time does not depend on n, 1 where it doubles with n.
    """

    a: float
    b: float
    deviation: float
    slope: float

    def at(self, n: NDArray[Any]) -> NDArray[np.float64]:
        return np.asarray(self.a + self.b * np.asarray(n, np.float64))


class PointRecord(msgspec.Struct, forbid_unknown_fields=True):
    """`rows` and `S` of the batch, adapters `loaded`, at n on the axis."""

    n: int
    rows: int
    S: int
    loaded: int
    times: Times


class SeriesRecord(msgspec.Struct, forbid_unknown_fields=True):
    """One curve as it was measured; `foreign_cores` as in the other record."""

    name: str
    axis: str
    foreign_cores: float | None
    points: list[PointRecord]


class GrowthRecord(Head):
    """One run of this file: raw times; fits are computed from them where they are shown."""

    STUDY: ClassVar[str] = "growth"
    threads: int
    h_in: int
    h_out: int
    rank: int
    dtype: str
    weights: str
    series: list[SeriesRecord]


def fit(n: Sequence[int], times: Sequence[float]) -> Fit:
    """Least squares on the relative error, so that small n count as much as large ones.

    Raises ValueError for fewer than two different n.

    >>> found = fit([1, 2, 4, 8, 16], [5.0, 7.0, 11.0, 19.0, 35.0])
    >>> round(found.a, 6), round(found.b, 6), round(found.deviation, 6)
    (3.0, 2.0, 0.0)
    """
    if len(set(n)) < 2:
        raise ValueError(f"n: expected two different values or more, got {sorted(set(n))}")
    counts, seen = np.asarray(n, np.float64), np.asarray(times, np.float64)
    relative = np.stack([1 / seen, counts / seen], axis=1)
    (a, b), *_ = np.linalg.lstsq(relative, np.ones(len(seen)), rcond=None)
    deviation = np.abs(relative @ [a, b] - 1).max()
    end = counts >= min(counts.max() / END, np.sort(counts)[-2])
    slope = np.polyfit(np.log(counts[end]), np.log(seen[end]), 1)[0]
    return Fit(float(a), float(b), float(deviation), float(slope))


def curves(most_rows: int, loaded: Sequence[int]) -> list[Series]:
    """The five curves, less those with no two sizes; stacks are made here, and shared."""
    stacks = {count: make_stack(count) for count in loaded}
    most = max(loaded)
    roots = make_stack(math.isqrt(most_rows - 1) + 1)
    rows, adapters = _doublings(most_rows), _doublings(most)

    def spread(count: int, n: int) -> NDArray[np.int64]:
        """N ids, evenly over the adapters loaded."""
        return np.arange(n, dtype=np.int64) * count // n

    found = [
        Series("rows, one adapter", "rows", rows,
               lambda n: (stacks[min(loaded)], np.zeros(n, np.int64))),
        Series("rows, sqrt(n) adapters", "rows", rows,
               lambda n: (roots, popularity_ids("uniform", n, seed=0))),
        Series("adapters loaded, 1 row", "adapters", loaded,
               lambda n: (stacks[n], spread(n, 1) + n // 2)),
        Series(f"adapters loaded, {FEW_ROWS} rows", "adapters",
               [count for count in loaded if count >= FEW_ROWS],
               lambda n: (stacks[n], spread(n, FEW_ROWS))),
        Series("adapters, a row each", "adapters", adapters,
               lambda n: (stacks[most], spread(most, n))),
    ]  # fmt: skip
    return [series for series in found if len(series.sizes) > 1]


def make_stack(count: int) -> sgmv.AdapterStack:
    """`count` adapters with memory of their own, under the ids from 0 on."""
    rng = np.random.default_rng(count)
    kept = min(count, DISTINCT_WEIGHTS)
    A = rng.standard_normal((kept, RANK, H_IN), np.float32) / np.float32(math.sqrt(H_IN))
    B = rng.standard_normal((kept, H_OUT, RANK), np.float32)
    return sgmv.AdapterStack.from_adapters(
        {i: sgmv.Adapter(A[i % kept], B[i % kept], scaling=1 / RANK) for i in range(count)}
    )


def measure(series: Series, threads: int, budget: Budget = BUDGET) -> SeriesRecord:
    """Check and time every point of a curve, in turns, so that a slow minute hits all of them."""
    sgmv.set_num_threads(threads)
    rng = np.random.default_rng(0)
    batches = {n: series.batch(n) for n in series.sizes}
    most = max(len(ids) for _, ids in batches.values())
    x = rng.standard_normal((most, H_IN), np.float32)
    y = rng.standard_normal((most, H_OUT), np.float32)
    turns, facts = [], {}
    for n, (stack, ids) in batches.items():
        segments = sgmv.segment(ids)
        check_rows(y[: len(ids)], x[: len(ids)], stack, ids)
        call = partial(sgmv.add_lora, y[: len(ids)], x[: len(ids)], stack, segments)
        turns.append(Variant(str(n), call))
        facts[n] = len(ids), len(segments.adapter_ids), len(stack.ids)
    times, foreign = time_quietly(turns, budget)
    points = [PointRecord(n, *facts[n], times[str(n)]) for n in series.sizes]
    return SeriesRecord(series.name, series.axis, foreign, points)


def fitted(series: SeriesRecord) -> Fit:
    """The line through a curve's medians."""
    return fit(
        [point.n for point in series.points],
        [point.times.q50 for point in series.points],
    )


def tables(record: GrowthRecord) -> list[Table]:
    """One line per curve."""
    head = ["", "n", "a us", "b us per n", "deviates", "slope", "t(last) / t(first)"]
    rows = []
    for series in record.series:
        found, points = fitted(series), series.points
        first, last = points[0], points[-1]
        rows.append(
            [
                series.name, f"{first.n}..{last.n}", f"{found.a:.3g}", f"{found.b:.3g}",
                f"{found.deviation:.0%}", f"{found.slope:.2f}",
                f"{last.times.q50 / first.times.q50:.3g}"
                f"{undecided(interval((first.times, last.times)))}",
            ]
        )  # fmt: skip
    notes = (
        "t = a + b n by least squares on relative error; deviates: largest |fit - t| / t;",
        f"slope: of log t over log n, from the largest n / {END} on.",
        f"Medians, {record.threads} threads, {record.h_in} > {record.rank} > {record.h_out} "
        f"{record.dtype}, weights {record.weights}.",
    )
    return [Table(head, rows, 1, notes)]


def figure(record: GrowthRecord) -> Figure:
    """Two panels, over rows and over adapters: time of one call, each curve with its line."""
    names = list(dict.fromkeys(series.axis for series in record.series))
    found = Figure(figsize=(4.4 * len(names), 4.4), layout="constrained")
    axes = found.subplots(1, len(names), sharey=True, squeeze=False)[0]
    for axis, name in zip(axes, names, strict=True):
        shown = [series for series in record.series if series.axis == name]
        looks = zip(cycle(COLOURS), cycle(MARKERS), strict=False)
        for series, (colour, marker) in zip(shown, looks, strict=False):
            n = np.array([point.n for point in series.points])
            times = [point.times for point in series.points]
            band(
                axis, n, times, colour, marker=marker, markersize=4.5, linestyle="none",
                label=series.name,
            )  # fmt: skip
            line = np.geomspace(n[0], n[-1], 200)
            axis.plot(line, fitted(series).at(line), color=colour, linewidth=1.2)
        axis.set(xscale="log", yscale="log", xlabel=name)
        axis.grid(True, color="#dddddd", linewidth=0.6)
        axis.legend(fontsize=8, framealpha=0.9, loc="upper left")
    axes[0].set_ylabel("time of one call (µs)")
    found.suptitle(
        f"{record.h_in} → {record.rank} → {record.h_out}, {record.dtype}, "
        f"{record.threads} threads: medians, band 20-80 %, lines t = a + b n",
        fontsize=11,
    )
    return found


def run(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Measure every curve that there is memory for."""
    bytes_each = RANK * (H_IN + H_OUT) * 4
    room = machine.available_memory() // 2
    loaded = [count for count in LOADED if count * bytes_each * 1.5 < room]
    if loaded != list(LOADED):
        console.print(f"memory for {max(loaded)} adapters only", "yellow")
    series = []
    for curve in curves(MOST_ROWS, loaded):
        console.print(f"  {curve.name}")
        series.append(measure(curve, args.threads))
    return {
        "threads": args.threads, "h_in": H_IN, "h_out": H_OUT, "rank": RANK, "dtype": "float32",
        "weights": "hot", "series": series,
    }  # fmt: skip


def _doublings(most: int) -> list[int]:
    """1, 2, 4 ... and the most itself.

    >>> _doublings(10)
    [1, 2, 4, 8, 10]
    """
    powers = [1 << k for k in range(most.bit_length()) if 1 << k < most]
    return [*powers, most]


STUDY = Study("growth", __doc__, GrowthRecord, run, tables, figures={"growth.png": figure})
