"""Pictures of a record: latency over rows per popularity, and the roofline."""

from __future__ import annotations

import math
from collections import Counter
from itertools import cycle

from matplotlib.figure import Figure

from benchmarks.batch import ONE_ROW
from benchmarks.figures import COLOURS, MARKERS, band
from benchmarks.peers import LIBRARIES, PEERS
from benchmarks.studies.grid.records import CaseRecord, Record, main_variant

# Okabe and Ito's colours, then Tol's; the kind of a line tells whose threads it ran on.
LOOKS = {"main": ("#0072B2", "o"), "one": ("#56B4E9", "s")}
LOOKS |= {name: peer.look for name, peer in PEERS.items()}
LEGEND_COLUMNS = 3


def latency(record: Record) -> Figure:
    """Small multiples, one per popularity: time of one call over rows, with the 20-80 % band."""
    cases = hub_cases(record)
    one_row = [case for case in cases if case.popularity == ONE_ROW]
    panels = [p for p in dict.fromkeys(c.popularity for c in cases) if p != ONE_ROW]
    panels = panels or [ONE_ROW]
    first = cases[0]
    lines = [line for line in _lines(record) if any(line[0] in case.times for case in cases)]
    height = 4.2 + 0.24 * max(0, math.ceil(len(lines) / LEGEND_COLUMNS) - 2)
    figure = Figure(figsize=(2.6 * max(len(panels), 2) + 0.6, height), layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axis, popularity in zip(axes, panels, strict=True):
        shown = one_row + [case for case in cases if case.popularity == popularity]
        shown = sorted({case.rows: case for case in shown}.values(), key=lambda c: c.rows)
        for name, key, label, dashes in lines:
            colour, marker = LOOKS[key]
            points = [(c.rows, c.times[name]) for c in shown if name in c.times]
            if points:
                band(
                    axis, [n for n, _ in points], [t for _, t in points], colour, label=label,
                    marker=marker, markersize=4.5, linewidth=2.2 if key == "main" else 1.3,
                    linestyle=dashes, zorder=3 if key == "main" else 2,
                )  # fmt: skip
        axis.set(xscale="log", yscale="log", title=popularity, xlabel="rows n")
        axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axis.set_xticks([case.rows for case in shown], minor=False)
        axis.tick_params(axis="x", rotation=45, labelsize=8)
        axis.minorticks_off()
        axis.grid(True, color="#dddddd", linewidth=0.6)
    axes[0].set_ylabel("time of one call (µs)")
    handles, labels = axes[-1].get_legend_handles_labels()
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            if label not in labels:
                handles.append(handle)
                labels.append(label)
    figure.legend(handles, labels, loc="outside lower center", ncols=LEGEND_COLUMNS, frameon=False)
    figure.suptitle(
        f"{first.h_in} → {first.rank} → {first.h_out}, {first.dtype} "
        f"({first.names[0]}): median, band 20-80 %",
        fontsize=11,
    )
    return figure


def roofline(record: Record) -> Figure:
    """Every case at its arithmetic intensity, under the ceilings measured in the same run."""
    main = main_variant(record)
    count = str(max(record.threads))
    cases = record.cases
    popularities = list(dict.fromkeys(case.popularity for case in cases))
    ranks = sorted({case.rank for case in cases})
    intensities = [case.flops / case.footprint for case in cases]
    low, high = min(intensities) / 3, max(intensities) * 3
    peak = record.ceilings.peak[count]

    figure = Figure(figsize=(7.6, 5.0), layout="constrained")
    axis = figure.subplots()
    axis.plot([low, high], [peak / 1e9] * 2, color="black", linewidth=1.2)
    axis.annotate(
        f"FMA peak {peak / 1e9:.0f} GFLOP/s", (low, peak / 1e9), (4, 4),
        textcoords="offset points", fontsize=8,
    )  # fmt: skip
    for label, rate in roofs(record, count):
        end = min(high, peak / rate)
        axis.plot([low, end], [low * rate / 1e9, end * rate / 1e9], color="#888888", linewidth=1)
        axis.text(
            low * 1.06, low * 1.2 * rate / 1e9, label, fontsize=8, color="#444444",
            rotation=math.degrees(math.atan(rate / 1e9)), rotation_mode="anchor",
            transform_rotates_text=True,
        )  # fmt: skip
    for popularity, colour in zip(popularities, cycle(COLOURS), strict=False):
        for rank, marker in zip(ranks, cycle(MARKERS), strict=False):
            points = [
                (intensity, case.flops / case.times[main].q50 / 1e3)
                for case, intensity in zip(cases, intensities, strict=True)
                if (case.popularity, case.rank) == (popularity, rank)
            ]
            axis.scatter(
                [x for x, _ in points], [y for _, y in points], color=colour, marker=marker,
                s=20, alpha=0.6, linewidths=0,
            )  # fmt: skip
    handles = [
        axis.scatter([], [], color=colour, marker="o", label=popularity)
        for popularity, colour in zip(popularities, cycle(COLOURS), strict=False)
    ] + [
        axis.scatter([], [], facecolors="none", edgecolors="k", marker=marker, label=f"r = {rank}")
        for rank, marker in zip(ranks, cycle(MARKERS), strict=False)
    ]
    axis.legend(handles=handles, loc="lower right", fontsize=8, ncols=2, framealpha=0.9)
    axis.set(
        xscale="log", yscale="log", xlim=(low, high),
        xlabel="arithmetic intensity (FLOP per byte of weights, x and y)", ylabel="GFLOP/s",
        title=f"Roofline, {count} thread{'s' * (count != '1')}, {record.machine.cpu}",
    )  # fmt: skip
    axis.grid(True, color="#dddddd", linewidth=0.6)
    return figure


def hub_cases(record: Record) -> list[CaseRecord]:
    """The cases of the (shape, rank, dtype) with the most row counts; of equals, rank 16 first."""
    keys = [(c.h_in, c.h_out, c.rank, c.dtype, c.names[0]) for c in record.cases]
    most = Counter(keys)
    best = max(most, key=lambda key: (most[key], key[2] == 16, key[0] == key[1], -key[0]))
    return [case for case, key in zip(record.cases, keys, strict=True) if key == best]


def roofs(record: Record, count: str) -> list[tuple[str, float]]:
    """(label, bytes/s) of L2, L3 and memory: all footprints would be a bundle of lines.

    Semantics: for a cache, the largest measured footprint that fills at most half of it, as it must
    hold more than what was read, and more than all of the cache before it; `count` threads have so
    many L2. For memory, the largest. A cache that none fits, or that is not known, is left out.
    """
    measured = [(size, rate) for size, rate in record.ceilings.bandwidth[count]]
    capacity = {
        level: size * (1 if level == "L3" else int(count))
        for level, size in record.machine.caches.items()
    }
    found = []
    for level, before in (("L2", "L1"), ("L3", "L2")):
        fits = [
            pair for pair in measured
            if capacity.get(before, 0) < pair[0] <= capacity.get(level, 0) / 2
        ]  # fmt: skip
        found += [(level, *max(fits))] if fits else []
    found.append(("memory", *max(measured)))
    return [(f"{name} ({_bytes(size)}): {rate / 1e9:.0f} GB/s", rate) for name, size, rate in found]


def _lines(record: Record) -> list[tuple[str, str, str, str]]:
    """(variant, key of LOOKS, label, kind of line), the library's first."""
    most, solid = max(record.threads), "-"
    lines = [(main_variant(record), "main", f"sgmv, {most} thread{'s' * (most > 1)}", solid)]
    if most > 1 and 1 in record.threads:
        lines.append(("sgmv@1", "one", "sgmv, 1 thread", solid))
    return lines + [
        (name, name, peer.title, LIBRARIES[peer.library].dashes) for name, peer in PEERS.items()
    ]


def _bytes(size: float) -> str:
    return f"{size / 2**20:.0f} MiB" if size >= 1 << 20 else f"{size / 2**10:.0f} KiB"
