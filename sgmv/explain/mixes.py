"""View of the four popularities: the same number of rows, and why distinct adapters cost most."""

from __future__ import annotations

import math

from sgmv import emulator
from sgmv.emulator import Launch
from sgmv.explain.question import Facts, Question
from sgmv.popularity import POPULARITIES, popularity
from sgmv.segment import segment
from sgmv.terminal import EDGE, EMPTY, FULL, Terminal, plural

THIS = "this batch"
HEIGHT = 9  # lines of the roofline


def mixes(question: Question) -> Facts:
    """Punica's two launches for this batch, and for one of each popularity with as many rows."""
    n, device = question.segments.n, question.device
    batches = {kind: segment(popularity(kind, n)) for kind in POPULARITIES}
    found = {}
    for name, segments in {**batches, THIS: question.segments}.items():
        shrink = emulator.punica_sgmv_shrink(segments, question.h_in, question.rank, device)
        expand = emulator.punica_cutlass_expand(segments, question.rank, question.h_out, device)
        found[name] = {
            "S": len(shrink.work),
            "rows_per_adapter": [work.rows for work in shrink.work],
            "shrink": _costs(shrink),
            "expand": _costs(expand),
        }
    return {
        "n": n,
        "h_in": question.h_in,
        "rank": question.rank,
        "h_out": question.h_out,
        "device": device.name,
        "fp16_peak": device.fp16_peak,
        "bandwidth": device.bandwidth,
        "batches": found,
    }


def _costs(launch: Launch) -> Facts:
    """By Punica's formulas: every operand through memory once."""
    weights = 2 * len(launch.work) * launch.k * launch.width
    return {
        "flops": launch.flops,
        "weight_bytes": weights,
        "row_bytes": launch.io_bytes - weights,
        "intensity": launch.intensity,
        "roofline_us": launch.figures()["roofline_us"],
    }


def draw_mixes(facts: Facts, terminal: Terminal) -> list[str]:
    """A table, the bytes as bars, and the roofline with a point for each popularity."""
    batches, device = facts["batches"], facts["device"]
    lines = terminal.title(f"Popularity: {plural(facts['n'], 'row')} on {device}, four ways")
    table = [
        (
            name,
            str(each["S"]),
            f"{each['shrink']['intensity']:.2f}",
            f"{each['expand']['intensity']:.2f}",
            f"{_total(each, 'weight_bytes') / 1e6:.2f}",
            f"{_total(each, 'row_bytes') / 1e6:.2f}",
            f"{_total(each, 'roofline_us'):.2f}",
        )
        for name, each in batches.items()
    ]
    head = (
        "popularity", "adapters", "shrink\nFLOP/B", "expand\nFLOP/B", "weights\nMB", "rows\nMB",
        "roofline\nµs",
    )  # fmt: skip
    lines += [*terminal.table(head, table), ""]
    lines += terminal.note(
        "roofline: of both launches, every operand through memory once, as in Punica's paper."
    )
    lines += ["", *_bytes(facts, terminal), ""]
    lines += [*_roofline(facts, terminal), ""]
    ridge = facts["fp16_peak"] / facts["bandwidth"]
    return [
        *lines,
        *terminal.note(
            f"The FLOP are the same. Weights that no two rows share are read for one row each, so "
            f"distinct adapters stay below 1 FLOP per byte; {device} needs {ridge:.0f} to be busy. "
            "Rows that share an adapter share its bytes, and move up the slope."
        ),
    ]


def _total(each: Facts, name: str) -> float:
    return float(each["shrink"][name] + each["expand"][name])


def _bytes(facts: Facts, terminal: Terminal) -> list[str]:
    """The bytes of both launches as bars: of weights, then of rows."""
    batches = facts["batches"]
    width = max(map(len, batches))
    largest = max(
        _total(each, "weight_bytes") + _total(each, "row_bytes") for each in batches.values()
    )
    cells = terminal.width - width - 2
    lines = []
    for name, each in batches.items():
        parts = [
            round(_total(each, f"{what}_bytes") * cells / largest) if largest else 0
            for what in ("weight", "row")
        ]
        lines.append(f"{name:{width}}  {FULL * parts[0]}{EMPTY * min(parts[1], cells - parts[0])}")
    return [*lines, terminal.faint(f"bytes: {FULL} weights, {EMPTY} rows of x, v and y")]


def _roofline(facts: Facts, terminal: Terminal) -> list[str]:
    """FLOP per second that expand can reach, over its FLOP per byte; both axes logarithmic."""
    peak, bandwidth = facts["fp16_peak"], facts["bandwidth"]
    points = {
        name: each["expand"]["intensity"]
        for name, each in facts["batches"].items()
        if each["expand"]["intensity"]
    }
    low = min([1.0, *points.values()]) / 2
    octaves = math.log2(4 * peak / bandwidth / low)
    label = len("FLOP/s ")
    columns = terminal.width - label - 2

    def column(intensity: float) -> int:
        return round(math.log2(intensity / low) / octaves * (columns - 1))

    def line(intensity: float) -> int:
        """From the top; the slope fills the height up to the ridge."""
        reached = min(intensity * bandwidth, peak)
        return round(math.log2(peak / reached) / math.log2(peak / bandwidth / low) * (HEIGHT - 1))

    drawn = [[" "] * columns for _ in range(HEIGHT)]
    for c in range(columns):
        drawn[line(low * 2 ** (c / (columns - 1) * octaves))][c] = "·"
    for name, intensity in points.items():
        c, i = column(intensity), line(intensity)
        while i > 0 and drawn[i][c] not in " ·":  # taken by another point: draw above it
            i -= 1
        drawn[i][c] = "*" if name == THIS else name[0].upper()
    names = {0: f"{peak / 1e12:.0f} T", 1: "FLOP/s"}
    lines = [f"{names.get(i, ''):>{label - 1}}{EDGE}" + "".join(row) for i, row in enumerate(drawn)]
    ticks = [" "] * columns
    for exponent in range(math.ceil(math.log2(low)), math.floor(math.log2(low) + octaves) + 1):
        text = f"{2.0**exponent:g}"
        c = column(2.0**exponent)
        if c + len(text) <= columns and not "".join(ticks[max(c - 1, 0) : c + len(text)]).strip():
            ticks[c : c + len(text)] = text
    lines.append(f"{'FLOP/B':>{label - 1}} {''.join(ticks)}".rstrip())
    key = ", ".join(f"{name[0].upper()} {name}" for name in facts["batches"] if name != THIS)
    return [*lines, terminal.faint(f"expand on {facts['device']}'s roofline: {key}, * {THIS}")]
