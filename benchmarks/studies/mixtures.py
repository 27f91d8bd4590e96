"""Rows with several weighted adapters: one call, against one call for each of a row's adapters.

    python -m benchmarks mixtures            check, timings, table; half a minute
    python -m benchmarks mixtures --record   the same, into benchmarks/records/, to commit

A layer 4096 -> 16 -> 4096 in float32, 16 adapters, k of them for each row: drawn for each row, or
shared by all rows. Segments are made beforehand for both, weights are 1 for both.

merged: the k adapters of a row made one by adding up their B @ A, as the LoRA libraries merge them,
which the rows must share: (h_out, h_in) weights, and one product with them. Making them is not
timed.
"""

from __future__ import annotations

import argparse
from functools import partial
from statistics import geometric_mean
from typing import Any, ClassVar

import msgspec
import numpy as np
from numpy.typing import NDArray

import sgmv
from benchmarks.clock import Budget, Variant, interval, time_quietly
from benchmarks.gate import check_rows
from benchmarks.peers import rests
from benchmarks.record import Head, Times, source
from benchmarks.study import Red, Study
from benchmarks.text import Console, Table, ratio_text

H, RANK, ADAPTERS = 4096, 16, 16
ROWS, PLACES, MIXES = (1, 16, 64, 256, 1024), (2, 4), ("drawn", "shared")
BUDGET = Budget(rounds=6, turn_s=0.03)


class MixtureCase(msgspec.Struct, forbid_unknown_fields=True):
    """One batch. `times`: of "sgmv", one call; of "calls", k of them; of "merged", where shared."""

    rows: int
    k: int
    mix: str
    S: int
    times: dict[str, Times]
    foreign_cores: float | None


class MixtureRecord(Head):
    """One run of this file."""

    STUDY: ClassVar[str] = "mixtures"
    threads: int
    cases: list[MixtureCase]


def drawn_ids(rows: int, k: int, mix: str) -> NDArray[np.int64]:
    """(rows, k) ids, each adapter once in a row."""
    rng = np.random.default_rng(rows * k)
    if mix == "shared":
        return np.tile(np.arange(k), (rows, 1))
    return np.argsort(rng.random((rows, ADAPTERS)), axis=1)[:, :k]


def measure(rows: int, k: int, mix: str, budget: Budget = BUDGET) -> MixtureCase:
    """Check and time one batch. Raises Red if a result is wrong."""
    rng = np.random.default_rng(0)
    pairs = {
        i: (
            rng.standard_normal((RANK, H), np.float32) / np.float32(H**0.5),
            rng.standard_normal((H, RANK), np.float32) / np.float32(RANK**0.5),
        )
        for i in range(ADAPTERS)
    }
    stack, ids = sgmv.AdapterStack.from_adapters(pairs), drawn_ids(rows, k, mix)
    x, y = (rng.standard_normal((rows, H), np.float32) for _ in range(2))
    together = sgmv.segment(ids)
    apart = [sgmv.segment(np.ascontiguousarray(ids[:, j])) for j in range(k)]

    def calls(y: NDArray[Any]) -> None:
        for segments in apart:
            sgmv.add_lora(y, x, stack, segments)

    forms = {"sgmv": lambda y: sgmv.add_lora(y, x, stack, together), "calls": calls}
    if mix == "shared":
        merged = np.sum([B @ A for A, B in (pairs[i] for i in ids[0].tolist())], axis=0)
        forms["merged"] = lambda y: np.add(y, x @ merged.T, out=y)
    try:
        check_rows(y, x, stack, ids)
    except AssertionError as error:
        raise Red("gate: RED, nothing was timed", error) from error
    waits = rests(["numpy" if name == "merged" else "sgmv" for name in forms])
    variants = [
        Variant(name, partial(form, y.copy()), settle_s=max(0.003, wait))
        for (name, form), wait in zip(forms.items(), waits, strict=True)
    ]
    times, foreign = time_quietly(variants, budget)
    return MixtureCase(rows, k, mix, together.S, times, foreign)


def tables(record: MixtureRecord) -> list[Table]:
    """A line per batch; ratios to the one call."""
    rows = []
    for case in record.cases:
        ours = case.times["sgmv"]
        cells = [f"{ours.q50:.0f}"]
        for name in ("calls", "merged"):
            its = case.times.get(name)
            cells.append(
                ratio_text(its.q50 / ours.q50, interval((ours, its))) if its is not None else "-"
            )
        rows.append([str(case.rows), str(case.k), case.mix, str(case.S), *cells])
    mean = geometric_mean(case.times["calls"].q50 / case.times["sgmv"].q50 for case in record.cases)
    head = ["n", "k", "adapters", "S", "one call us", "k calls / one", "merged / one"]
    note = f"k calls / one call, geometric mean: {mean:.2f}x; {record.threads} threads."
    return [Table(head, rows, 3, [note])]


def run(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Measure every batch."""
    sgmv.set_num_threads(args.threads)
    cases = []
    for mix in MIXES:
        for k in PLACES:
            for rows in ROWS:
                console.print(f"  {rows} rows, k = {k}, {mix}")
                cases.append(measure(rows, k, mix))
    return {"threads": args.threads, "cases": cases}


def page(record: MixtureRecord, name: str) -> str:
    """The table of docs/group-by-id.md, and where it comes from."""
    [table] = tables(record)
    head = f"{source(record)}; record: `benchmarks/records/{name}`. ! marks a loss, ~ a draw."
    return f"{head}\n\n{table.markdown()}\n\n{table.notes[0]}"


STUDY = Study(
    "mixtures", __doc__, MixtureRecord, run, tables,
    pages={("docs/group-by-id.md", "mixtures"): page},
)  # fmt: skip
