"""Pictures of a record: latency over rows per popularity, and the roofline. Needs matplotlib.

Each PNG carries the digest of the record it was drawn from, so that a test can tell a stale one.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from itertools import cycle
from pathlib import Path
from typing import Any

from benchmarks.grid import ONE_ROW
from benchmarks.peers import PEERS
from benchmarks.record import CaseRecord, Record, main_variant

# Okabe and Ito's colours, which stay apart for colour-blind readers; markers differ as well.
COLOURS = {
    "main": "#0072B2", "one": "#56B4E9", "by_segment": "#D55E00", "by_row": "#E69F00",
    "einsum": "#CC79A7", "torch": "#009E73",
}  # fmt: skip
MARKERS = {"main": "o", "one": "s", "by_segment": "^", "by_row": "v", "einsum": "D", "torch": "P"}
POPULARITY_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#E69F00")
RANK_MARKERS = ("o", "s", "^", "D", "v", "P")
DIGEST_KEY = "Record"


def digest(record: Record) -> str:
    """What ties a figure to its record: SHA-256 over its canonical JSON."""
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def draw(record: Record, directory: Path) -> list[Path]:
    """Write `latency.png` and `roofline.png` and return their paths."""
    import matplotlib

    matplotlib.use("Agg")
    directory.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, make in (("latency", latency), ("roofline", roofline)):
        path = directory / f"{name}.png"
        figure = make(record)
        figure.savefig(path, dpi=110, metadata={DIGEST_KEY: digest(record), "Software": None})
        paths.append(path)
    return paths


def latency(record: Record) -> Any:
    """Small multiples, one per popularity: time of one call over rows, with the 20-80 % band."""
    from matplotlib.figure import Figure

    cases = hub_cases(record)
    one_row = [case for case in cases if case["popularity"] == ONE_ROW]
    panels = [p for p in dict.fromkeys(c["popularity"] for c in cases) if p != ONE_ROW]
    panels = panels or [ONE_ROW]
    first = cases[0]
    figure = Figure(figsize=(2.6 * max(len(panels), 2) + 0.6, 4.2), layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axis, popularity in zip(axes, panels, strict=True):
        shown = one_row + [case for case in cases if case["popularity"] == popularity]
        shown = sorted({case["rows"]: case for case in shown}.values(), key=lambda c: c["rows"])
        for name, key, label in _lines(record):
            points = [(c["rows"], c["times"][name]) for c in shown if name in c["times"]]
            if points:
                rows = [n for n, _ in points]
                axis.fill_between(
                    rows, [t["q20"] for _, t in points], [t["q80"] for _, t in points],
                    color=COLOURS[key], alpha=0.2, linewidth=0,
                )  # fmt: skip
                axis.plot(
                    rows, [t["q50"] for _, t in points], label=label, color=COLOURS[key],
                    marker=MARKERS[key], markersize=4.5, linewidth=2.2 if key == "main" else 1.3,
                    zorder=3 if key == "main" else 2,
                )  # fmt: skip
        axis.set(xscale="log", yscale="log", title=popularity, xlabel="rows n")
        axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axis.set_xticks([case["rows"] for case in shown], minor=False)
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
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    figure.suptitle(
        f"{first['h_in']} → {first['rank']} → {first['h_out']}, {first['dtype']} "
        f"({first['names'][0]}): median, band 20-80 %",
        fontsize=11,
    )
    return figure


def roofline(record: Record) -> Any:
    """Every case at its arithmetic intensity, under the ceilings measured in the same run."""
    from matplotlib.figure import Figure

    main = main_variant(record)
    count = str(max(record["threads"]))
    cases = record["cases"]
    popularities = list(dict.fromkeys(case["popularity"] for case in cases))
    ranks = sorted({case["rank"] for case in cases})
    intensities = [case["flops"] / case["footprint"] for case in cases]
    low, high = min(intensities) / 4, max(intensities) * 4
    peak = record["ceilings"]["peak"][count]

    figure = Figure(figsize=(7.6, 5.0), layout="constrained")
    axis = figure.subplots()
    axis.plot([low, high], [peak / 1e9] * 2, color="black", linewidth=1.2)
    axis.annotate(
        f"FMA peak {peak / 1e9:.0f} GFLOP/s", (low, peak / 1e9), (4, 4),
        textcoords="offset points", fontsize=8,
    )  # fmt: skip
    for size, rate in _shown_bandwidths(record, count):
        end = min(high, peak / rate)
        axis.plot([low, end], [low * rate / 1e9, end * rate / 1e9], color="#888888", linewidth=1)
        axis.annotate(
            f"{_bytes(size)}: {rate / 1e9:.0f} GB/s", (low, low * rate / 1e9), (3, -3),
            textcoords="offset points", fontsize=7.5, color="#444444", va="top",
        )  # fmt: skip
    for popularity, colour in zip(popularities, cycle(POPULARITY_COLOURS), strict=False):
        for rank, marker in zip(ranks, cycle(RANK_MARKERS), strict=False):
            points = [
                (intensity, case["flops"] / case["times"][main]["q50"] / 1e3)
                for case, intensity in zip(cases, intensities, strict=True)
                if (case["popularity"], case["rank"]) == (popularity, rank)
            ]
            axis.scatter(
                [x for x, _ in points], [y for _, y in points], color=colour, marker=marker,
                s=22, alpha=0.65, linewidths=0,
            )  # fmt: skip
    handles = [
        axis.scatter([], [], color=colour, marker="o", label=popularity)
        for popularity, colour in zip(popularities, cycle(POPULARITY_COLOURS), strict=False)
    ] + [
        axis.scatter([], [], facecolors="none", edgecolors="k", marker=marker, label=f"r = {rank}")
        for rank, marker in zip(ranks, cycle(RANK_MARKERS), strict=False)
    ]
    axis.legend(handles=handles, loc="lower right", fontsize=8, ncols=2, framealpha=0.9)
    axis.set(
        xscale="log", yscale="log", xlim=(low, high),
        xlabel="arithmetic intensity (FLOP per byte of weights, x and y)", ylabel="GFLOP/s",
        title=f"Roofline, {count} thread{'s' * (count != '1')}, {record['machine']['cpu']}",
    )  # fmt: skip
    axis.grid(True, color="#dddddd", linewidth=0.6)
    return figure


def hub_cases(record: Record) -> list[CaseRecord]:
    """The cases of the (shape, rank, dtype) with the most row counts; of equals, rank 16 first."""
    keys = [(c["h_in"], c["h_out"], c["rank"], c["dtype"], c["names"][0]) for c in record["cases"]]
    most = Counter(keys)
    best = max(most, key=lambda key: (most[key], key[2] == 16, key[0] == key[1], -key[0]))
    return [case for case, key in zip(record["cases"], keys, strict=True) if key == best]


def _lines(record: Record) -> list[tuple[str, str, str]]:
    """(variant, colour key, label), the library's first."""
    most = max(record["threads"])
    lines = [(main_variant(record), "main", f"sgmv, {most} thread{'s' * (most > 1)}")]
    if most > 1 and 1 in record["threads"]:
        lines.append(("sgmv@1", "one", "sgmv, 1 thread"))
    return lines + [(name, name, peer.title) for name, peer in PEERS.items()]


def _shown_bandwidths(record: Record, count: str) -> list[tuple[float, float]]:
    """Smallest, middle and largest footprint: all of them would be a bundle of lines."""
    measured = record["ceilings"]["bandwidth"][count]
    chosen = [measured[0], measured[len(measured) // 2], measured[-1]]
    return [(size, rate) for size, rate in chosen]


def _bytes(size: float) -> str:
    return f"{size / 2**20:.0f} MiB" if size >= 1 << 20 else f"{size / 2**10:.0f} KiB"
