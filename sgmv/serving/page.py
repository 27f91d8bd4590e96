"""Outcomes of replicas as an HTML page: which waits how long, over time, replica by replica."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from sgmv.errors import ServingError
from sgmv.html import assembled
from sgmv.serving.replicas import ReplicasOutcome
from sgmv.serving.report import OF_REPLICAS, as_text
from sgmv.serving.simulate import Tenants, waits_by

PERCENTS = (1, 5, 10, 20, 30, 40, 50, 60, 70, 80, 90, 95, 98, 99, 99.5, 99.9, 100)
PARTS = 80  # of the time in which requests arrive


def write_page(
    path: str | os.PathLike[str],
    outcomes: Sequence[ReplicasOutcome],
    figures: Sequence[Mapping[str, Any]],
    arguments: Mapping[str, Any] | None = None,
) -> Path:
    """Write one HTML file that shows these outcomes beside each other; returns its path.

    Semantics: it asks nothing of the network. Its address keeps which outcome is shown in full.

    path       the file, overwritten
    outcomes   of `simulate_replicas`, at least one
    figures    of each, by `sgmv.serving.report.figures`
    arguments  what is told at its head: names and values

    Raises ServingError for no outcomes, or a file that cannot be written.

    >>> import tempfile
    >>> from sgmv.serving import draw_trace, simulate_replicas
    >>> from sgmv.serving.report import figures
    >>> outcome = simulate_replicas(draw_trace(200, 9), 2)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_page(Path(folder) / "replicas.html", [outcome], [figures(outcome)]).name
    'replicas.html'
    """
    if not outcomes:
        raise ServingError("outcomes", "at least one", "none", "simulate some")
    data = {
        "arguments": {name: as_text(value) for name, value in (arguments or {}).items()},
        "columns": [[head.replace("\n", " "), key, scale] for head, key, scale in OF_REPLICAS],
        "percents": PERCENTS,
        "outcomes": [shown(*each) for each in zip(outcomes, figures, strict=True)],
    }
    folder, target = files("sgmv.serving"), Path(path)
    page = assembled(lambda name: (folder / name).read_text(encoding="utf-8"), data)
    try:
        target.write_text(page, encoding="utf-8")
    except OSError as error:
        remedy = "name another place"
        raise ServingError("page", "a file that can be written", str(error), remedy) from error
    return target


def shown(outcome: ReplicasOutcome, figures: Mapping[str, Any]) -> dict[str, Any]:
    """All that the page knows of an outcome with these figures."""
    trace, N = outcome.trace, outcome.replicas
    span = int(trace.arrival_us[-1]) + 1 if trace.n else 1
    part = trace.arrival_us * PARTS // span
    waits = np.percentile(outcome.wait_us, PERCENTS, method="inverted_cdf") if trace.n else ()
    served = np.zeros((N, PARTS), np.int64)
    np.add.at(served, (outcome.replica_of, part), 1)
    found = np.zeros((3, PARTS), np.int64)
    np.add.at(found, (outcome.found, part), 1)
    return {
        "figures": figures,
        "seconds": span / 1e6,
        "waits": [float(us) / 1e6 for us in waits],
        "over_time": _over_time(waits_by(part, outcome.wait_us)),
        "found": found.tolist(),
        "served": served.tolist(),
        "busy": [float(us) / max(outcome.end_us, 1) for us in outcome.busy_us],
        "misses": [each.slot_misses for each in outcome.counters_of],
    }


def _over_time(parts: Tenants) -> list[list[float | None]]:
    """The waiting times of each part of the time, None where no request came."""
    rows = []
    for waits in (parts.p50_s, parts.p99_s):
        known = dict(zip(parts.ids.tolist(), waits.tolist(), strict=True))
        rows.append([known.get(part) for part in range(PARTS)])
    return rows
