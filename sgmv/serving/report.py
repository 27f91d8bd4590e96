"""Outcomes of the simulator as a table, and as a figure, which needs matplotlib."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from sgmv.errors import ServingError
from sgmv.serving.simulate import Outcome, Tenants

HEAD = (
    ("", "", "hit", "", "wait, all", "", "tenants' p99", "", "loaded", "read", "requests"),
    ("slots", "policy", "rate", "deferred", "p50", "p99", "median", "worst", "GB", "GB", "/s"),
)
# Okabe and Ito's colours; markers differ as well.
LOOKS = {"lru": ("#0072B2", "o", "-"), "fifo": ("#D55E00", "^", "--")}
TENANT_COLOURS = ("#000000", "#D55E00", "#E69F00", "#009E73", "#56B4E9", "#0072B2", "#CC79A7")
FEWEST_REQUESTS = 20  # of a tenant whose p99 is drawn


def table(outcomes: Sequence[Outcome]) -> str:
    """One line for each outcome; times in seconds.

    >>> from sgmv.serving import Trace, simulate
    >>> print(table([simulate(Trace([0, 0], [1, 2], [9, 9]), max_loras=2)]))
                    hit            wait, all          tenants' p99          loaded    read  requests
    slots  policy  rate  deferred        p50     p99        median   worst      GB      GB        /s
        2     lru  0.0%      0.0%     0.0369  0.0369        0.0369  0.0369  0.0671  0.0671      6.88
    """
    rows: list[tuple[str, ...]] = [*HEAD]
    for outcome in outcomes:
        p99 = outcome.tenants().p99_s
        numbers = (
            outcome.wait_s(50), outcome.wait_s(99), np.median(p99) if len(p99) else np.nan,
            p99.max(initial=0.0), outcome.loaded_bytes / 1e9, outcome.read_bytes / 1e9,
            outcome.requests_per_s,
        )  # fmt: skip
        shares = (f"{share:.1%}" for share in (outcome.hit_rate, outcome.deferral_rate))
        rows.append((str(outcome.max_loras), outcome.policy, *shares, *map(_short, numbers)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        for row in rows
    )


def figure(outcomes: Sequence[Outcome], path: str | os.PathLike[str]) -> None:
    """Draw hit rate, waiting time and bytes over slots, and waiting time over tenants.

    Semantics: writes the file in the format that its name ends in.

    Raises ServingError when matplotlib is not installed, or when it knows no such format.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ServingError(
            "figure", "matplotlib", "none installed", "pip install 'sgmv[bench]'"
        ) from error
    drawing = Figure(figsize=(9.6, 7.2), layout="constrained")
    (hits, wait), (data, tenants) = drawing.subplots(2, 2)
    for policy in dict.fromkeys(outcome.policy for outcome in outcomes):
        colour, marker, line = LOOKS[policy]
        its = [outcome for outcome in outcomes if outcome.policy == policy]
        slots = [outcome.max_loras for outcome in its]
        look = {"color": colour, "marker": marker, "linestyle": line, "markersize": 4.5}
        name = policy.upper()
        hits.plot(slots, [100 * o.hit_rate for o in its], label=name, **look)
        data.plot(slots, [o.loaded_bytes / 1e9 for o in its], label=f"into slots, {name}", **look)
        look["markerfacecolor"] = "white"
        data.plot(slots, [o.read_bytes / 1e9 for o in its], label=f"from disk, {name}", **look)
        wait.plot(slots, [o.wait_s(50) for o in its], label=f"p50, {name}", **look)
        look["markerfacecolor"] = colour
        wait.plot(slots, [o.wait_s(99) for o in its], label=f"p99, {name}", **look)
    first = [outcome for outcome in outcomes if outcome.policy == outcomes[0].policy]
    for i, outcome in enumerate(first):
        ranks, waits = _by_popularity(outcome.tenants())
        colour = TENANT_COLOURS[i % len(TENANT_COLOURS)]
        tenants.plot(ranks, waits, color=colour, label=f"slots: {outcome.max_loras}", linewidth=1.3)
    _label(hits, "slots", "requests for which nothing was loaded (%)")
    _label(wait, "slots", "waiting time (s)", yscale="log")
    _label(data, "slots", "weights moved (GB)")
    policy = first[0].policy.upper()
    _label(tenants, "tenants, those with the most requests first", f"p99, {policy} (s)", "log")
    tenants.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))  # lines are everywhere
    for axis in (hits, wait, data):
        axis.set_xticks([outcome.max_loras for outcome in first], minor=False)
        axis.minorticks_off()
    trace = outcomes[0].trace
    drawing.suptitle(f"{trace.n:,} requests for {trace.adapters:,} adapters", fontsize=11)
    try:
        drawing.savefig(path, dpi=110)
    except ValueError as error:
        expected = "a name that ends in .png, .svg or .pdf"
        raise ServingError("figure", expected, str(path), "name another file") from error


def _label(axis: Any, x: str, y: str, yscale: str = "linear") -> None:
    axis.set(xscale="log", yscale=yscale, xlabel=x, ylabel=y)
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.grid(True, color="#dddddd", linewidth=0.6)
    axis.legend(fontsize=8, framealpha=0.9)


def _by_popularity(tenants: Tenants) -> tuple[list[float], list[float]]:
    """(rank, median p99) of groups of tenants that grow with the rank, as the axis does."""
    busiest = np.argsort(-tenants.requests, kind="stable")
    waits = tenants.p99_s[busiest][tenants.requests[busiest] >= FEWEST_REQUESTS]
    edges = np.unique(np.geomspace(1, len(waits) + 1, 24).astype(int)).tolist()
    groups = list(pairwise(edges))  # none, where no tenant has requests enough
    return (
        [math.sqrt(start * (end - 1)) for start, end in groups],
        [float(np.median(waits[start - 1 : end - 1])) for start, end in groups],
    )


def _short(value: float) -> str:
    """Three digits, in few characters."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}"
