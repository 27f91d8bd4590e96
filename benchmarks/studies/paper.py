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
import time
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, ClassVar

import msgspec
import numpy as np
from matplotlib.figure import Figure

import sgmv
from benchmarks import machine
from benchmarks.batch import popularity_ids
from benchmarks.clock import summary
from benchmarks.figures import COLOURS, MARKERS, band
from benchmarks.gate import check_rows
from benchmarks.record import Head, Times, is_quiet
from benchmarks.study import Study
from benchmarks.text import Console, Table
from reference.workloads import POPULARITIES
from sgmv import emulator
from sgmv.console import Parser, at_least

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


class AxisPoint(msgspec.Struct, forbid_unknown_fields=True):
    """One point of the roofline: `limit` says which of the device's two bounds it."""

    popularity: str
    n: int
    S: int
    flops: int
    io_bytes: int
    intensity: float
    attainable: float  # FLOP/s on the A100
    limit: str


class Point(msgspec.Struct, forbid_unknown_fields=True):
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

    STUDY: ClassVar[str] = "paper"
    threads: int
    axis: list[AxisPoint]
    points: list[Point]


def axis() -> list[AxisPoint]:
    """The roofline's points, by popularity and B.

    >>> [round(point.intensity, 2) for point in axis() if point.n == 64]
    [0.94, 5.33, 4.92, 12.76]
    """
    return [_axis_point(popularity, n) for popularity in POPULARITIES for n in ROWS]


def _axis_point(popularity: str, n: int) -> AxisPoint:
    device = emulator.A100
    launch = emulator.punica_cutlass_expand(popularity_ids(popularity, n, seed=0), *AXIS, device)
    by_memory = launch.intensity * device.bandwidth
    return AxisPoint(
        popularity, n, len(launch.work), launch.flops, launch.io_bytes, launch.intensity,
        min(by_memory, float(device.fp16_peak)), LIMITS[by_memory > device.fp16_peak],
    )  # fmt: skip


def counted(popularity: str, n: int, rank: int) -> Point:
    """One case of the microbenchmark before it is timed: shrink and expand, one after the other.

    >>> point = counted("identical", 64, 16)
    >>> point.flops == 2 * 64 * 16 * (4096 + 11008), point.S
    (True, 1)
    """
    ids = popularity_ids(popularity, n, seed=0)
    h_in, h_out = LAYER
    launches: list[emulator.Launch] = [
        emulator.punica_sgmv_shrink(ids, h_in, rank),
        emulator.punica_cutlass_expand(ids, rank, h_out),
    ]
    flops, moved = sum(each.flops for each in launches), sum(each.io_bytes for each in launches)
    least_us = sum(each.figures()["roofline_us"] for each in launches)
    return Point(
        popularity,
        n,
        len(launches[0].work),
        rank,
        flops,
        moved,
        flops / moved,
        least_us,
        None,
        None,
    )


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
        if stack is None or point.rank != rank:
            rank = point.rank
            stack = make_stack(max(ROWS), rank)
        ids = popularity_ids(point.popularity, point.n, seed=0)
        x = rng.standard_normal((len(ids), LAYER[0]), np.float32).astype(np.float16)
        y = np.zeros((len(ids), LAYER[1]), np.float16)
        check_rows(y, x, stack, ids)
        segments = sgmv.segment(ids)
        call = partial(sgmv.add_lora, y, x, stack, segments)
        before = machine.cpu_use()
        times = cold(call, partial(flushed.fill, 0.0), repeats)
        foreign = machine.foreign_cores(before, machine.cpu_use())
        found.append(msgspec.structs.replace(point, times=times, foreign_cores=foreign))
        step(f"{point.popularity} B = {point.n}, r = {rank}")
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

    >>> cold(lambda: None, lambda: None, 3).calls
    3
    """
    call()
    nanoseconds = []
    for _ in range(repeats):
        flush()
        start = time.perf_counter_ns()
        call()
        nanoseconds.append(time.perf_counter_ns() - start)
    return summary([[call] for call in nanoseconds])


def axis_table(record: PaperRecord) -> Table:
    """The roofline's axis: one line per popularity and B."""
    head = ["popularity", "B", "S", "FLOP", "I/O bytes", "FLOP/byte", "A100 TFLOP/s", "limit"]
    rows = [
        [
            point.popularity, str(point.n), str(point.S), f"{point.flops:,}",
            f"{point.io_bytes:,}", f"{point.intensity:.2f}", f"{point.attainable / 1e12:.2f}",
            point.limit,
        ]
        for point in record.axis
    ]  # fmt: skip
    return Table(head, rows, 2, [""])


def point_table(record: PaperRecord) -> Table:
    """The microbenchmark: one line per case, ours beside the paper's where it prints a number.

    A ? marks a time during which other processes ran.
    """
    head = [
        "r", "popularity", "B", "S", "FLOP/byte", "A100 at least us", "A100, paper us",
        "this CPU us", "20-80 %", "of B = 1",
    ]  # fmt: skip
    alone = {
        (point.rank, point.popularity): point.times.q50
        for point in record.points
        if point.times and point.n == 1
    }
    rows = []
    for point in record.points:
        times = point.times
        first = alone.get((point.rank, point.popularity))
        rows.append(
            [
                str(point.rank), point.popularity, str(point.n), str(point.S),
                f"{point.intensity:.2f}", f"{point.roofline_us:.1f}", printed(point),
                f"{'' if is_quiet(point.foreign_cores) else '?'}{times.q50:.0f}" if times else "-",
                f"{times.q20:.0f}-{times.q80:.0f}" if times else "-",
                f"{times.q50 / first:.1f}x" if times and first else "-",
            ]
        )  # fmt: skip
    calls = max((point.times.calls for point in record.points if point.times), default=0)
    note = (
        f"{LAYER[0]} > r > {LAYER[1]} float16, shrink and expand; medians of {calls} calls on "
        f"{record.threads} threads, {FLUSHED >> 20} MiB zeroed before each. Of the paper's two "
        "figures, the first is of one operator by popularity, the second by rank."
    )
    return Table(head, rows, 2, [note])


def printed(point: Point) -> str:
    """What the paper prints for this case: by popularity at rank 16, and by rank.

    >>> printed(counted("distinct", 64, 16)), printed(counted("uniform", 2, 16))
    ('116, 75', '-')
    """
    key = point.popularity, point.n
    found = [OPERATOR_US[key]] if point.rank == 16 and key in OPERATOR_US else []
    found += [RANK_US[key][point.rank]] if key in RANK_US else []
    return ", ".join(map(str, found)) or "-"


def figure(record: PaperRecord) -> Figure:
    """Punica's figures anew: the roofline's points, then times over B, by popularity and by rank.

    Semantics: hollow markers are what the paper prints of its A100. Where nothing was timed there
    is the roofline alone.
    """
    A100 = emulator.A100
    timed = any(point.times for point in record.points)
    found = Figure(figsize=(14 if timed else 5, 4.4), layout="constrained")
    roof, *panels = found.subplots(1, 3 if timed else 1, squeeze=False)[0]
    x = np.geomspace(0.3, 1000, 200)
    reached = np.minimum(x * A100.bandwidth, A100.fp16_peak)
    roof.plot(x, reached / 1e12, color="#777777", linewidth=1.2, label="A100's limits")
    looks = list(zip(COLOURS, MARKERS, strict=True))
    kinds = list(dict.fromkeys(point.popularity for point in record.axis))
    for kind, (colour, marker) in zip(kinds, looks, strict=False):
        axis = [point for point in record.axis if point.popularity == kind]
        roof.plot(
            [p.intensity for p in axis], [p.attainable / 1e12 for p in axis],
            color=colour, marker=marker, markersize=5, linestyle="none", label=kind,
        )  # fmt: skip
        if timed:
            _over_rows(panels[0], record, (kind, 16), (colour, marker, "-"), kind)
            shown = [(n, us) for (name, n), us in OPERATOR_US.items() if name == kind]
            _hollow(panels[0], shown, colour, marker)
    for rank, (colour, marker) in zip(RANKS, looks, strict=False) if timed else ():
        for kind, style in (("distinct", "-"), ("identical", "--")):
            look = colour, marker, style
            _over_rows(panels[1], record, (kind, rank), look, f"r = {rank}, {kind}")
        _hollow(panels[1], [(n, us[rank]) for (_, n), us in RANK_US.items()], colour, marker)
    roof.set(xscale="log", yscale="log", xlabel="FLOP per byte", ylabel="TFLOP/s")
    roof.set_title("One SGMV 16 → 4096, B = 1..64, on the A100's roofline", fontsize=9)
    for panel, title in zip(panels, ("rank 16", "by rank"), strict=False):
        panel.set(xscale="log", yscale="log", xlabel="rows B", ylabel="time of one call (µs)")
        panel.set_title(f"4096 → r → 11008 float16, {title}; hollow: A100, paper", fontsize=9)
    for panel in (roof, *panels):
        panel.grid(True, color="#dddddd", linewidth=0.6)
        panel.legend(fontsize=6, framealpha=0.6, loc="upper left")
    return found


def _hollow(panel: Any, points: list[tuple[int, int]], colour: str, marker: str) -> None:
    """What the paper prints."""
    panel.plot(
        [n for n, _ in points], [us for _, us in points], color=colour, marker=marker,
        fillstyle="none", linestyle="none", markersize=8,
    )  # fmt: skip


def _over_rows(
    panel: Any,
    record: PaperRecord,
    case: tuple[str, int],
    look: tuple[str, str, str],
    label: str,
) -> None:
    """Medians over B of one popularity and rank, with their band."""
    timed = [
        (point.n, point.times)
        for point in record.points
        if (point.popularity, point.rank) == case and point.times
    ]
    colour, marker, style = look
    n, times = [rows for rows, _ in timed], [times for _, times in timed]
    band(
        panel, n, times, colour, marker=marker, markersize=4.5, linestyle=style, linewidth=1.2,
        label=label,
    )  # fmt: skip


def arguments(parser: Parser) -> None:
    parser.add_argument("--counts", action="store_true", help="time nothing")
    parser.add_argument("--repeats", type=at_least(1), default=REPEATS, help="calls of each case")
    parser.add_argument("--rows", type=int, nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--ranks", type=int, nargs="+", choices=RANKS, default=list(RANKS))


def run(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Count every case, and time it if that is wanted."""
    points = [
        counted(popularity, n, rank)
        for rank in args.ranks
        for popularity in POPULARITIES
        for n in args.rows
    ]
    if not args.counts:
        with console.progress(len(points)) as step:
            points = measure(points, args.threads, args.repeats, step)
    return {"threads": args.threads, "axis": axis(), "points": points}


STUDY = Study(
    "paper", __doc__, PaperRecord, run, lambda record: [axis_table(record), point_table(record)],
    arguments,
    whole=lambda args: not args.counts and (args.rows, args.ranks) == ([*ROWS], [*RANKS]),
    figures={"paper.png": figure},
)  # fmt: skip
