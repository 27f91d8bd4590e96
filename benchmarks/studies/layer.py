"""What LoRA adds to a layer: the base product, then add_lora, as a server runs them.

    python -m benchmarks layer            check, timings, table; about two minutes
    python -m benchmarks layer --record   the same, into benchmarks/records/, to commit

Each call is a base product x @ W.T by numpy, or by torch, on all threads, and add_lora into its y
straight after it: timed apart, and with one thread of sgmv and all in turn. That is harder on
add_lora than the other timings: W has driven the adapters out of the caches, and the library's own
threads still spin, waiting for the next product, on the cores that the helpers need.

The layers are Llama-3-8B's, adapters of rank 16, spread evenly over the rows.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from statistics import geometric_mean
from typing import Any, ClassVar, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

import sgmv
from benchmarks.batch import base_product, dtype_of, installed_kinds
from benchmarks.clock import interval, quietly, summary
from benchmarks.gate import check_rows
from benchmarks.record import Head, Times, source
from benchmarks.study import Study
from benchmarks.text import Console, Table, undecided
from sgmv.models import MODELS

MODEL, NAMES, RANK, ADAPTERS = "Llama-3-8B", ("q", "kv", "down"), 16, 16
ROWS = (1, 16, 64, 256)
ROUNDS, TURN_S, LEAST_CALLS = 6, 0.15, 3


class LayerCase(msgspec.Struct, forbid_unknown_fields=True):
    """One layer and batch. `times`: of the base product, and of add_lora by threads, "1" first."""

    library: str
    dtype: str
    layer: str
    h_in: int
    h_out: int
    rows: int
    times: dict[str, Times]
    foreign_cores: float | None


class LayerRecord(Head):
    """One run of this file."""

    STUDY: ClassVar[str] = "layer"
    threads: int
    model: str
    rank: int
    adapters: int
    cases: list[LayerCase]


class Operands(NamedTuple):
    """A layer's base product, over arrays that `x` shows as numpy has them."""

    x: NDArray[Any]
    base: Callable[[], NDArray[Any]]
    stack: sgmv.AdapterStack
    ids: NDArray[np.int64]


def operands(library: str, dtype: str, h_in: int, h_out: int, rows: int) -> Operands:
    """Random weights, rows and adapters, of unit size after each product."""
    rng = np.random.default_rng(rows)

    def normal(*shape: int, size: float = 1.0) -> NDArray[Any]:
        values = rng.standard_normal(shape, np.float32) * np.float32(size)
        found: NDArray[Any] = values.astype(dtype_of(dtype))
        return found

    W, x = normal(h_out, h_in, size=h_in**-0.5), normal(rows, h_in)
    adapters = [
        sgmv.Adapter(normal(RANK, h_in, size=h_in**-0.5), normal(h_out, RANK), 1 / RANK)
        for _ in range(ADAPTERS)
    ]
    stack = sgmv.AdapterStack.from_adapters(adapters)
    ids = np.arange(rows, dtype=np.int64) % ADAPTERS
    return Operands(x, base_product(library, x, W), stack, ids)


def measure(
    library: str, dtype: str, layer: str, rows: int, threads: int, rounds: int = ROUNDS
) -> LayerCase:
    """Check and time one case."""
    h_in, h_out = MODELS[MODEL].layer(layer)
    o = operands(library, dtype, h_in, h_out, rows)
    segments = sgmv.segment(o.ids)
    check_rows(o.base(), o.x, o.stack, o.ids)

    def turns() -> dict[str, list[list[int]]]:
        found: dict[str, list[list[int]]] = {"base": []}
        for _ in range(rounds):
            base: list[int] = []
            found["base"].append(base)
            for count in dict.fromkeys((1, threads)):
                sgmv.set_num_threads(count)
                lora: list[int] = []
                found.setdefault(str(count), []).append(lora)
                end, calls = time.perf_counter() + TURN_S, -1  # the first one is not counted
                while calls < LEAST_CALLS or time.perf_counter() < end:
                    start = time.perf_counter_ns()
                    y = o.base()
                    middle = time.perf_counter_ns()
                    sgmv.add_lora(y, o.x, o.stack, segments)
                    if calls >= 0:
                        base.append(middle - start)
                        lora.append(time.perf_counter_ns() - middle)
                    calls += 1
        return found

    found, foreign = quietly(turns)
    times = {name: summary(samples) for name, samples in found.items()}
    return LayerCase(library, dtype, layer, h_in, h_out, rows, times, foreign)


def tables(record: LayerRecord) -> list[Table]:
    """A line per library and rows: geometric means over the layers."""
    head = ["base by", "rows", "base ms", "add_lora ms", "share of base", "1 thread / all"]
    most = str(record.threads)
    groups: dict[tuple[str, str, int], list[dict[str, Times]]] = {}
    for case in record.cases:
        groups.setdefault((case.library, case.dtype, case.rows), []).append(case.times)
    rows = []
    for (library, dtype, n), its in groups.items():
        base, lora, alone = (
            geometric_mean(times[name].q50 / 1e3 for times in its) for name in ("base", most, "1")
        )
        spread = interval(*((times[most], times["1"]) for times in its))
        rows.append(
            [f"{library} {dtype}", str(n), f"{base:.3g}", f"{lora:.3g}", f"{lora / base:.1%}",
             f"{alone / lora:.2f}x{undecided(spread)}"]
        )  # fmt: skip
    return [Table(head, rows, left=1)]


def page(record: LayerRecord, name: str) -> str:
    """The table of docs/kernels.md, and where it comes from."""
    head = (
        f"{record.model}'s layers ({', '.join(NAMES)}; geometric means), rank {record.rank}, "
        f"{record.adapters} adapters, {source(record)}; record: `benchmarks/records/{name}`."
    )
    return f"{head}\n\n{tables(record)[0].markdown()}"


def run(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Measure every layer and number of rows, with each library that is here."""
    cases = []
    for library, dtype in installed_kinds(console):
        if library == "torch":
            import torch

            torch.set_num_threads(args.threads)
        cases += [
            measure(library, dtype, layer, rows, args.threads) for rows in ROWS for layer in NAMES
        ]
    return {
        "threads": args.threads, "model": MODEL, "rank": RANK, "adapters": ADAPTERS, "cases": cases
    }  # fmt: skip


STUDY = Study(
    "layer", __doc__, LayerRecord, run, tables, pages={("docs/kernels.md", "layer"): page}
)
