"""How the time of add_lora grows: over the batch's rows, and over the adapters loaded.

    python -m benchmarks growth            check, timings, table, figure; about half a minute
    python -m benchmarks growth --record   the same, into benchmarks/records/, to commit

Layer 1024 -> 16 -> 1024 in float32: small, so that 10,000 adapters fit (1.2 GiB; all stacks that
stand at once 1.9 GiB). Weights are hot, segments made before, as in the other timings.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
from numpy.typing import NDArray

import sgmv
from benchmarks import machine
from benchmarks.batch import popularity_ids
from benchmarks.console import Console
from benchmarks.record import Head, Times, is_quiet, load_as, record_head, validate_as
from benchmarks.run import time_quietly, times_record
from benchmarks.timing import Budget, Variant
from reference import bounds, by_row, compare
from sgmv.console import Parser, at_least
from sgmv.cpu import cores

SCHEMA = 1
PREFIX = "growth-"
H_IN, H_OUT, RANK = 1024, 1024, 16
MOST_ROWS, MOST_ADAPTERS = 16384, 10_000
LOADED = (1, 4, 16, 64, 256, 1024, 4096, MOST_ADAPTERS)
FEW_ROWS = 64
DISTINCT_WEIGHTS = 64  # adapters repeat these values, each in memory of its own
END = 8  # the slope is that of the points from the largest / END on
CHECKED_ROWS = 6
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


class PointRecord(TypedDict):
    """`rows` and `S` of the batch, adapters `loaded`, at n on the axis."""

    n: int
    rows: int
    S: int
    loaded: int
    times: Times


class SeriesRecord(TypedDict):
    """One curve as it was measured; `foreign_cores` as in the other record."""

    name: str
    axis: str
    foreign_cores: float | None
    points: list[PointRecord]


class GrowthRecord(Head):
    """One run of this file: raw times; fits are computed from them where they are shown."""

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
        check(y[: len(ids)], x[: len(ids)], stack, ids)
        call = partial(sgmv.add_lora, y[: len(ids)], x[: len(ids)], stack, segments)
        turns.append(Variant(str(n), call))
        facts[n] = {"rows": len(ids), "S": len(segments.adapter_ids), "loaded": len(stack.ids)}
    timed, foreign = time_quietly(turns, budget)
    times = times_record(timed)
    points: list[Any] = [{"n": n, **facts[n], "times": times[str(n)]} for n in series.sizes]
    return {
        "name": series.name, "axis": series.axis, "foreign_cores": foreign, "points": points
    }  # fmt: skip


def check(
    y: NDArray[Any], x: NDArray[Any], stack: sgmv.AdapterStack, ids: NDArray[np.int64]
) -> None:
    """Hold rows at both ends and between to the reference: wrong results are not timed."""
    rows = np.unique(np.linspace(0, len(ids) - 1, CHECKED_ROWS).astype(np.int64))
    adapters = {int(i): stack[int(i)] for i in ids[rows]}
    expected = by_row.add_lora(y[rows], x[rows], adapters, ids[rows])
    bound = bounds.add_lora_bound(y[rows], x[rows], adapters, ids[rows], expected=expected)
    result = sgmv.add_lora(y.copy(), x, stack, ids)
    compare.check(result[rows], expected, bound, f"{len(stack.ids)} adapters, {len(ids)} rows")


def fitted(series: SeriesRecord) -> Fit:
    """The line through a curve's medians."""
    return fit(
        [point["n"] for point in series["points"]],
        [point["times"]["q50"] for point in series["points"]],
    )


def table(record: GrowthRecord) -> list[list[str]]:
    """One line per curve, after the heads."""
    lines = [["", "n", "a us", "b us per n", "deviates", "slope", "t(last) / t(first)"]]
    for series in record["series"]:
        found, points = fitted(series), series["points"]
        first, last = points[0], points[-1]
        ratio = last["times"]["q50"] / first["times"]["q50"]
        lines.append(
            [
                series["name"], f"{first['n']}..{last['n']}", f"{found.a:.3g}", f"{found.b:.3g}",
                f"{found.deviation:.0%}", f"{found.slope:.2f}", f"{ratio:.3g}",
            ]
        )  # fmt: skip
    return lines


def print_table(record: GrowthRecord, console: Console) -> None:
    console.table(table(record), left=1)
    for note in (
        "t = a + b n by least squares on relative error; deviates: largest |fit - t| / t;",
        f"slope: of log t over log n, from the largest n / {END} on.",
        f"Medians, {record['threads']} threads, {record['h_in']} > {record['rank']} > "
        f"{record['h_out']} {record['dtype']}, weights {record['weights']}.",
    ):
        console.print(note, "dim")
    noisy = [s["name"] for s in record["series"] if not is_quiet(s["foreign_cores"])]
    if noisy:
        console.print(f"WARNING: other processes ran during: {', '.join(noisy)}", "bold red")


def save(record: GrowthRecord, path: Path) -> None:
    """Write JSON with one point per line, so that two records can be compared with diff."""
    validate_as(GrowthRecord, SCHEMA, record)
    head: Mapping[str, object] = {**record, "series": []}
    parts = []
    for series in record["series"]:
        points = ",\n".join(json.dumps(point) for point in series["points"])
        empty = json.dumps({**series, "points": []})
        parts.append(empty.replace('"points": []', f'"points": [\n{points}\n]'))
    text = json.dumps(head, indent=1).replace('"series": []', '"series": [\n%s\n]')
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text % ",\n".join(parts) + "\n")


def load(path: Path) -> GrowthRecord:
    """Read and validate a record. Raises RecordError, naming the file."""
    return load_as(GrowthRecord, SCHEMA, path, "python -m benchmarks growth")


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, save; returns 0."""
    from benchmarks import figures, readme

    parser = Parser(
        prog="python -m benchmarks growth", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--threads", type=at_least(1), default=cores(), help="default: all cores")
    parser.add_argument("--record", action="store_true", help="write to benchmarks/records/")
    parser.add_argument("--output", type=Path, default=Path("bench-out"))
    args = parser.parse_args(argv)
    console = Console()
    started = time.perf_counter()
    bytes_each = RANK * (H_IN + H_OUT) * 4
    room = machine.available_memory() // 2
    loaded = [count for count in LOADED if count * bytes_each * 1.5 < room]
    if loaded != list(LOADED):
        console.print(f"memory for {max(loaded)} adapters only", "yellow")
    series = []
    for curve in curves(MOST_ROWS, loaded):
        console.print(f"  {curve.name}")
        series.append(measure(curve, args.threads))
    record: GrowthRecord = {
        **record_head(SCHEMA, args.threads, started),
        "h_in": H_IN,
        "h_out": H_OUT,
        "rank": RANK,
        "dtype": "float32",
        "weights": "hot",
        "series": series,
    }
    print_table(record, console)
    quiet = all(is_quiet(each["foreign_cores"]) for each in series)
    written = [
        readme.destination(PREFIX, args.record, quiet, args.output, record["machine"], console)
    ]
    save(record, written[0])
    if find_spec("matplotlib"):
        written.append(figures.draw_growth(record, written[0].parent))
    console.print(f"written: {', '.join(map(str, written))}")
    return 0


def _doublings(most: int) -> list[int]:
    """1, 2, 4 ... and the most itself.

    >>> _doublings(10)
    [1, 2, 4, 8, 10]
    """
    powers = [1 << k for k in range(most.bit_length()) if 1 << k < most]
    return [*powers, most]
