"""Outcomes of the simulator as a table, and as a figure, which needs matplotlib."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from sgmv.errors import ServingError
from sgmv.extras import load
from sgmv.serving.replicas import ReplicasOutcome
from sgmv.serving.simulate import Outcome, Tenants
from sgmv.terminal import Terminal

# Of each column: its head, its key in JSON, and what one unit of the column is in units of the key.
COLUMNS = (
    ("slots", "slots", 1),
    ("policy", "policy", 1),
    ("hit\nrate\n%", "hit_rate", 1e-2),
    ("defer\nrate\n%", "deferral_rate", 1e-2),
    ("wait\np50\ns", "wait_p50_s", 1),
    ("wait\np99\ns", "wait_p99_s", 1),
    ("tenant\nmedian\np99, s", "tenant_median_p99_s", 1),
    ("tenant\nworst\np99, s", "tenant_worst_p99_s", 1),
    ("into\nslots\nGB", "loaded_bytes", 1e9),
    ("from\ndisk\nGB", "read_bytes", 1e9),
    ("ended\nper s", "requests_per_s", 1),
)
# The same of several replicas.
OF_REPLICAS = (
    ("replicas", "replicas", 1),
    ("placement", "placement", 1),
    *(column for column in COLUMNS if column[1] not in ("deferral_rate", "tenant_median_p99_s")),
    ("busy\n%", "busy_share", 1e-2),
    ("busiest\n/ mean", "imbalance", 1),
    ("tried\nagain", "retries", 1),
)
# Okabe and Ito's colours; markers differ as well.
LOOKS = {"lru": ("#0072B2", "o", "-"), "fifo": ("#D55E00", "^", "--")}
OF_RULES = {
    "random": ("#000000", "o", "-"),
    "least-loaded": ("#D55E00", "^", "--"),
    "rendezvous": ("#0072B2", "s", "-"),
    "rank-aware": ("#009E73", "v", "-."),
    "ray": ("#CC79A7", "D", ":"),
}
TENANT_COLOURS = ("#000000", "#D55E00", "#E69F00", "#009E73", "#56B4E9", "#0072B2", "#CC79A7")
FEWEST_REQUESTS = 20  # of a tenant, for its p99 to be drawn


def figures(outcome: Outcome) -> dict[str, Any]:
    """One line of the table, for JSON: None where there is nothing to take a figure from.

    >>> from sgmv.serving import Trace, simulate
    >>> found = figures(simulate(Trace([0, 0], [1, 2], [9, 9]), max_loras=2))
    >>> found["slots"], found["policy"], found["hit_rate"], found["wait_p50_s"]
    (2, 'lru', 0.0, 0.03691)
    """
    p99 = outcome.tenants().p99_s
    values = (
        outcome.max_loras, outcome.policy, outcome.hit_rate, outcome.deferral_rate,
        outcome.wait_s(50), outcome.wait_s(99), float(np.median(p99)) if len(p99) else math.nan,
        float(p99.max(initial=0.0)), outcome.loaded_bytes, outcome.read_bytes,
        outcome.requests_per_s,
    )  # fmt: skip
    found = dict(zip((key for _, key, _ in COLUMNS), values, strict=True))
    if isinstance(outcome, ReplicasOutcome):
        found |= {
            "replicas": outcome.replicas,
            "placement": outcome.placement.rule,
            "busy_share": outcome.busy_share,
            "imbalance": outcome.imbalance,
            "retries": int(outcome.retries.sum()),
        }
    return {key: None if value != value else value for key, value in found.items()}


def table(outcomes: Sequence[Outcome], terminal: Terminal | None = None) -> str:
    """One line for each outcome, on a terminal of 80 columns if none is given.

    >>> from sgmv.serving import Trace, simulate
    >>> print(table([simulate(Trace([0, 0], [1, 2], [9, 9]), max_loras=2)]))
                    hit  defer    wait    wait  tenant  tenant    into    from
                   rate   rate     p50     p99  median   worst   slots    disk
    slots  policy     %      %       s       s  p99, s  p99, s      GB      GB
    2         lru     0      0  0.0369  0.0369  0.0369  0.0369  0.0671  0.0671
    <BLANKLINE>
                   ended
    slots  policy  per s
    2         lru   6.88
    """
    return table_of([figures(outcome) for outcome in outcomes], terminal)


def table_of(
    found: Sequence[Mapping[str, Any]],
    terminal: Terminal | None = None,
    points: Sequence[Mapping[str, Any]] = (),
) -> str:
    """`table` of what `figures` returned, beside the point of a sweep that each is of.

    >>> from sgmv.serving import Trace, simulate
    >>> found = [figures(simulate(Trace([0, 0], [1, 2], [9, 9]), max_loras=2))]
    >>> table_of(found, points=[{"alpha": 0.5}]).splitlines()[3].split()[:3]
    ['0.5', '2', 'lru']
    """
    terminal = terminal or Terminal()
    columns = OF_REPLICAS if any("replicas" in each for each in found) else COLUMNS
    if not any(each.get("retries") for each in found):
        columns = tuple(column for column in columns if column[1] != "retries")
    rows = [[_short(each[key], scale) for _, key, scale in columns] for each in found]
    names = list(points[0]) if points else []
    for row, point in zip(rows, points, strict=False):
        row[:0] = [_short(point[name], 1) for name in names]
    keys = len(names) + [key for _, key, _ in columns].index("policy") + 1
    widths = [max((len(row[i]) for row in rows), default=0) for i in range(keys)]
    rows = [[*map(str.rjust, row[:keys], widths), *row[keys:]] for row in rows]
    heads = [*(name.replace("_", "\n") for name in names), *(head for head, _, _ in columns)]
    return terminal.text(terminal.table(heads, rows, keys=keys))


def figure(outcomes: Sequence[Outcome], path: str | os.PathLike[str]) -> None:
    """Draw hit rate, waiting time and bytes over slots, and waiting time over tenants.

    Semantics: writes the file in the format that its name ends in. Of replicas: hit rate, waiting
    time, bytes, and the busiest replica's load over their number, a line for each placement.

    Raises ServingError when matplotlib is not installed, or when it knows no such format.
    """
    try:
        Figure: Any = load("matplotlib.figure").Figure
    except ImportError as error:
        raise ServingError(
            "figure", "matplotlib", "none installed", "pip install matplotlib"
        ) from error
    drawing = Figure(figsize=(9.6, 7.2), layout="constrained")
    axes = drawing.subplots(2, 2)
    of_replicas = [outcome for outcome in outcomes if isinstance(outcome, ReplicasOutcome)]
    if of_replicas:
        _draw_replicas(axes, of_replicas)
    else:
        _draw_slots(axes, outcomes)
    trace = outcomes[0].trace
    drawing.suptitle(f"{trace.n:,} requests for {trace.adapters:,} adapters", fontsize=11)
    try:
        drawing.savefig(path, dpi=110)
    except ValueError as error:
        expected = "a name that ends in .png, .svg or .pdf"
        raise ServingError("figure", expected, str(path), "name another file") from error


def _draw_replicas(axes: Any, outcomes: Sequence[ReplicasOutcome]) -> None:
    (hits, wait), (data, busy) = axes
    first = outcomes[0].max_loras, outcomes[0].policy
    for rule, (colour, marker, line) in OF_RULES.items():
        chosen = [
            o for o in outcomes if o.placement.rule == rule and (o.max_loras, o.policy) == first
        ]
        if not chosen:
            continue
        count = [o.replicas for o in chosen]
        look = {"color": colour, "marker": marker, "linestyle": line, "markersize": 4.5}
        hits.plot(count, [100 * o.hit_rate for o in chosen], label=rule, **look)
        wait.plot(count, [o.wait_s(99) for o in chosen], label=rule, **look)
        data.plot(count, [o.loaded_bytes / 1e9 for o in chosen], label=rule, **look)
        busy.plot(count, [o.imbalance for o in chosen], label=rule, **look)
    _label(hits, "replicas", "requests for which nothing was loaded (%)")
    _label(wait, "replicas", "p99 of waiting (s)", yscale="log")
    _label(data, "replicas", "weights moved into slots (GB)")
    _label(busy, "replicas", "busiest replica / mean")
    for axis in (hits, wait, data, busy):
        axis.set_xticks(sorted({o.replicas for o in outcomes}), minor=False)
        axis.minorticks_off()


def _draw_slots(axes: Any, outcomes: Sequence[Outcome]) -> None:
    (hits, wait), (data, tenants) = axes
    for policy in dict.fromkeys(outcome.policy for outcome in outcomes):
        colour, marker, line = LOOKS[policy]
        chosen = [outcome for outcome in outcomes if outcome.policy == policy]
        slots = [outcome.max_loras for outcome in chosen]
        look = {"color": colour, "marker": marker, "linestyle": line, "markersize": 4.5}
        name = policy.upper()
        hits.plot(slots, [100 * o.hit_rate for o in chosen], label=name, **look)
        data.plot(
            slots, [o.loaded_bytes / 1e9 for o in chosen], label=f"into slots, {name}", **look
        )
        look["markerfacecolor"] = "white"
        data.plot(slots, [o.read_bytes / 1e9 for o in chosen], label=f"from disk, {name}", **look)
        wait.plot(slots, [o.wait_s(50) for o in chosen], label=f"p50, {name}", **look)
        look["markerfacecolor"] = colour
        wait.plot(slots, [o.wait_s(99) for o in chosen], label=f"p99, {name}", **look)
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


def as_text(value: Any) -> str:
    """An argument as text: a whole number in full, another number by six digits.

    >>> as_text(1_000_000), as_text(2e10), as_text("lru"), as_text(True)
    ('1,000,000', '2e+10', 'lru', 'True')
    """
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return f"{value:,g}" if isinstance(value, float) else str(value)


def _short(value: Any, scale: float) -> str:
    """Three digits, in few characters; counts and texts as they are.

    >>> _short(1464.2, 1), _short(0.4701, 1e-2), _short(8, 1), _short("lru", 1), _short(None, 1)
    ('1,464', '47', '8', 'lru', '-')
    """
    if value is None:
        return "-"
    if scale == 1 and not isinstance(value, float):
        return str(value)
    scaled = value / scale
    return f"{scaled:,.0f}" if scaled >= 100 else f"{scaled:.3g}"
