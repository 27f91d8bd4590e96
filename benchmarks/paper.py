"""Punica's roofline and microbenchmarks: counts from the emulator, times of this machine's CPU.

    python -m benchmarks paper            counts, check, timings, tables, figure; about two minutes
    python -m benchmarks paper --counts   the counts alone: seconds, and the same on any machine

The roofline's axis is that of one SGMV at h_in = 16, h_out = 4096. The microbenchmark is a layer of
4096 -> r -> 11008 in float16, B rows, four popularities, ranks 8 to 64; before each call a buffer
of 256 MiB is zeroed, as in the paper, so that weights come from memory. Where the paper prints a
number, measured on an A100, it stands beside ours.

Source: Punica (arXiv 2310.18547), sections 7.1 and 7.2.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypedDict

import numpy as np

import sgmv
from benchmarks import machine
from benchmarks.batch import popularity_ids
from benchmarks.console import Console
from benchmarks.growth import check
from benchmarks.record import Head, Times, is_quiet, record_head, significant, validate_as
from reference.workloads import POPULARITIES
from sgmv import emulator
from sgmv.console import Parser, at_least
from sgmv.cpu import cores

SCHEMA = 1
ROWS = (1, 2, 4, 8, 16, 32, 64)
RANKS = (8, 16, 32, 64)
AXIS = (16, 4096)  # h_in, h_out of the paper's roofline
LAYER = (4096, 11008)  # h_in, h_out of its microbenchmark
FLUSHED = 256 << 20  # bytes
REPEATS = 15
LIMITS = ("memory", "compute")

# What the paper prints, in microseconds on an A100: one operator by popularity, and by rank.
OPERATOR_US = {
    ("distinct", 1): 37, ("distinct", 64): 116, ("uniform", 1): 37, ("uniform", 64): 46,
    ("skewed", 1): 37, ("skewed", 64): 46, ("identical", 1): 37, ("identical", 64): 40,
}  # fmt: skip
RANK_US = {
    ("distinct", 1): dict.fromkeys(RANKS, 42),
    ("distinct", 64): {8: 72, 16: 75, 32: 89, 64: 118},
}


class AxisPoint(TypedDict):
    """One point of the roofline: `limit` says which of the device's two bounds it."""

    popularity: str
    n: int
    S: int
    flops: int
    io_bytes: int
    intensity: float
    attainable: float  # FLOP/s on the A100
    limit: str


class Point(TypedDict):
    """One case of the microbenchmark: both launches' counts, and this machine's time of the two.

    `roofline_us`: what the A100 needs at least. `times` is None where nothing was timed,
    `foreign_cores` then and where the system does not say what other processes used meanwhile.
    """

    popularity: str
    n: int
    S: int
    rank: int
    flops: int
    io_bytes: int
    intensity: float
    roofline_us: float
    times: Times | None
    foreign_cores: float | None


class PaperRecord(Head):
    """One run of this file."""

    axis: list[AxisPoint]
    points: list[Point]


def axis() -> list[AxisPoint]:
    """The roofline's points, by popularity and B.

    >>> [round(point["intensity"], 2) for point in axis() if point["n"] == 64]
    [0.94, 5.33, 4.92, 12.76]
    """
    return [_axis_point(popularity, n) for popularity in POPULARITIES for n in ROWS]


def _axis_point(popularity: str, n: int) -> AxisPoint:
    device = emulator.A100
    launch = emulator.punica_cutlass_expand(popularity_ids(popularity, n, seed=0), *AXIS, device)
    by_memory = launch.intensity * device.bandwidth
    return {
        "popularity": popularity,
        "n": n,
        "S": len(launch.work),
        "flops": launch.flops,
        "io_bytes": launch.io_bytes,
        "intensity": launch.intensity,
        "attainable": min(by_memory, float(device.fp16_peak)),
        "limit": LIMITS[by_memory > device.fp16_peak],
    }


def counted(popularity: str, n: int, rank: int) -> Point:
    """One case of the microbenchmark before it is timed: shrink and expand, one after the other.

    >>> point = counted("identical", 64, 16)
    >>> point["flops"] == 2 * 64 * 16 * (4096 + 11008), point["S"]
    (True, 1)
    """
    ids = popularity_ids(popularity, n, seed=0)
    h_in, h_out = LAYER
    launches: list[emulator.Launch] = [
        emulator.punica_sgmv_shrink(ids, h_in, rank),
        emulator.punica_cutlass_expand(ids, rank, h_out),
    ]
    flops, moved = sum(each.flops for each in launches), sum(each.io_bytes for each in launches)
    return {
        "popularity": popularity,
        "n": n,
        "S": len(launches[0].work),
        "rank": rank,
        "flops": flops,
        "io_bytes": moved,
        "intensity": flops / moved,
        "roofline_us": sum(each.figures()["roofline_us"] for each in launches),
        "times": None,
        "foreign_cores": None,
    }


def measure(
    points: Iterable[Point], threads: int, repeats: int, step: Callable[[str], None]
) -> list[Point]:
    """Check and time every point, its weights in memory and not in a cache."""
    sgmv.set_num_threads(threads)
    rng = np.random.default_rng(0)
    flushed = np.zeros(FLUSHED // 8)
    found: list[Point] = []
    stack, rank = None, 0
    for point in points:
        if stack is None or point["rank"] != rank:
            rank = point["rank"]
            stack = make_stack(max(ROWS), rank)
        ids = popularity_ids(point["popularity"], point["n"], seed=0)
        x = rng.standard_normal((len(ids), LAYER[0]), np.float32).astype(np.float16)
        y = np.zeros((len(ids), LAYER[1]), np.float16)
        check(y, x, stack, ids)
        segments = sgmv.segment(ids)
        call = partial(sgmv.add_lora, y, x, stack, segments)
        before = machine.cpu_use()
        times = cold(call, partial(flushed.fill, 0.0), repeats)
        foreign = machine.foreign_cores(before, machine.cpu_use())
        found.append({**point, "times": times, "foreign_cores": foreign})
        step(f"{point['popularity']} B = {point['n']}, r = {rank}")
    return found


def make_stack(count: int, rank: int) -> sgmv.AdapterStack:
    """So many adapters of the layer in float16, each with memory of its own."""
    rng = np.random.default_rng(rank)
    h_in, h_out = LAYER

    def weights(rows: int, columns: int) -> Any:
        values = rng.random((rows, columns), np.float32) - np.float32(0.5)
        return (values * np.float32(columns**-0.5)).astype(np.float16)

    return sgmv.AdapterStack.from_adapters(
        {i: sgmv.Adapter(weights(rank, h_in), weights(h_out, rank)) for i in range(count)}
    )


def cold(call: Callable[[], object], flush: Callable[[], object], repeats: int) -> Times:
    """Quantiles over single calls, each after a flush; the first, which may compile, is left out.

    >>> cold(lambda: None, lambda: None, 3)["calls"]
    3
    """
    call()
    nanoseconds = []
    for _ in range(repeats):
        flush()
        start = time.perf_counter_ns()
        call()
        nanoseconds.append(time.perf_counter_ns() - start)
    q20, q50, q80 = (significant(q / 1e3) for q in np.quantile(nanoseconds, (0.2, 0.5, 0.8)))
    return {"q20": q20, "q50": q50, "q80": q80, "calls": repeats}


def axis_table(record: PaperRecord) -> list[list[str]]:
    """The roofline's axis: one line per popularity and B, after the heads."""
    lines = [["popularity", "B", "S", "FLOP", "I/O bytes", "FLOP/byte", "A100 TFLOP/s", "limit"]]
    for point in record["axis"]:
        lines.append(
            [
                point["popularity"], str(point["n"]), str(point["S"]), f"{point['flops']:,}",
                f"{point['io_bytes']:,}", f"{point['intensity']:.2f}",
                f"{point['attainable'] / 1e12:.2f}", point["limit"],
            ]
        )  # fmt: skip
    return lines


def point_table(record: PaperRecord) -> list[list[str]]:
    """The microbenchmark: one line per case, ours beside the paper's where it prints a number.

    A ? marks a time during which other processes ran.
    """
    lines = [
        [
            "r", "popularity", "B", "S", "FLOP/byte", "A100 at least us", "A100, paper us",
            "this CPU us", "20-80 %", "of B = 1",
        ]
    ]  # fmt: skip
    alone = {
        (point["rank"], point["popularity"]): point["times"]["q50"]
        for point in record["points"]
        if point["times"] and point["n"] == 1
    }
    for point in record["points"]:
        times = point["times"]
        first = alone.get((point["rank"], point["popularity"]))
        lines.append(
            [
                str(point["rank"]), point["popularity"], str(point["n"]), str(point["S"]),
                f"{point['intensity']:.2f}", f"{point['roofline_us']:.1f}", printed(point),
                f"{'' if is_quiet(point['foreign_cores']) else '?'}{times['q50']:.0f}"
                if times else "-",
                f"{times['q20']:.0f}-{times['q80']:.0f}" if times else "-",
                f"{times['q50'] / first:.1f}x" if times and first else "-",
            ]
        )  # fmt: skip
    return lines


def printed(point: Point) -> str:
    """What the paper prints for this case: by popularity at rank 16, and by rank.

    >>> printed(counted("distinct", 64, 16)), printed(counted("uniform", 2, 16))
    ('116, 75', '-')
    """
    key = point["popularity"], point["n"]
    found = [OPERATOR_US[key]] if point["rank"] == 16 and key in OPERATOR_US else []
    found += [RANK_US[key][point["rank"]]] if key in RANK_US else []
    return ", ".join(map(str, found)) or "-"


def validate(record: object) -> None:
    """Raise RecordError unless `record` follows the schema."""
    validate_as(PaperRecord, SCHEMA, record)


def main(argv: Sequence[str] | None = None) -> int:
    """Count, measure, print, save; returns 0."""
    from benchmarks import figures

    parser = Parser(
        prog="python -m benchmarks paper", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--counts", action="store_true", help="time nothing")
    parser.add_argument("--threads", type=at_least(1), default=cores(), help="default: all cores")
    parser.add_argument("--repeats", type=at_least(1), default=REPEATS, help="calls of each case")
    parser.add_argument("--rows", type=int, nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--ranks", type=int, nargs="+", choices=RANKS, default=list(RANKS))
    parser.add_argument("--output", type=Path, default=Path("bench-out"))
    args = parser.parse_args(argv)
    console, started = Console(), time.perf_counter()
    points = [
        counted(popularity, n, rank)
        for rank in args.ranks
        for popularity in POPULARITIES
        for n in args.rows
    ]
    if not args.counts:
        with console.progress(len(points)) as step:
            points = measure(points, args.threads, args.repeats, step)
    record: PaperRecord = {
        **record_head(SCHEMA, args.threads, started),
        "axis": axis(),
        "points": points,
    }
    validate(record)
    console.table(axis_table(record), left=2)
    console.print()
    console.table(point_table(record), left=2)
    h_in, h_out = LAYER
    console.print(
        f"{h_in} > r > {h_out} float16, shrink and expand; medians of {args.repeats} calls on "
        f"{args.threads} threads, {FLUSHED >> 20} MiB zeroed before each. Of the paper's two "
        "figures, the first is of one operator by popularity, the second by rank.",
        "dim",
    )
    noisy = sum(not is_quiet(point["foreign_cores"]) for point in points)
    if noisy:
        console.print(
            f"WARNING: other processes ran during {noisy} of {len(points)} cases; theirs are no "
            "times of this machine",
            "bold red",
        )
    args.output.mkdir(parents=True, exist_ok=True)
    written = [args.output / "paper.json"]
    written[0].write_text(json.dumps(record, indent=1) + "\n")
    if find_spec("matplotlib"):
        written.append(figures.draw_paper(record, args.output))
    console.print(f"written: {', '.join(map(str, written))}")
    return 0
