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
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

import numpy as np
from numpy.typing import NDArray

import sgmv
from benchmarks.batch import dtype_of, installed_kinds
from benchmarks.console import Console
from benchmarks.growth import check
from benchmarks.models import MODELS
from benchmarks.record import (
    Head,
    Times,
    geomean,
    load_as,
    record_head,
    save_as,
    source,
    warn_if_noisy,
)
from benchmarks.run import quietly, times_record
from benchmarks.timing import summary
from sgmv.console import Parser, at_least
from sgmv.cpu import cores
from sgmv.tensors import as_array

SCHEMA = 1
PREFIX = "layer-"
MODEL, NAMES, RANK, ADAPTERS = "Llama-3-8B", ("q", "kv", "down"), 16, 16
ROWS = (1, 16, 64, 256)
ROUNDS, TURN_S, LEAST_CALLS = 6, 0.15, 3


class LayerCase(TypedDict):
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
    if library == "numpy":
        return Operands(x, lambda: x @ W.T, stack, ids)
    import torch

    def tensor(array: NDArray[Any]) -> Any:
        if dtype == "bfloat16":
            return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
        return torch.from_numpy(array)

    weight, inputs = tensor(W), tensor(x)
    product = partial(torch.nn.functional.linear, inputs, weight)
    return Operands(x, lambda: as_array("y", product()), stack, ids)


def measure(
    library: str, dtype: str, layer: str, rows: int, threads: int, rounds: int = ROUNDS
) -> LayerCase:
    """Check and time one case."""
    h_in, h_out = MODELS[MODEL].layer(layer)
    o = operands(library, dtype, h_in, h_out, rows)
    segments = sgmv.segment(o.ids)
    check(o.base(), o.x, o.stack, o.ids)

    def turns() -> dict[str, list[int]]:
        found: dict[str, list[int]] = {"base": []}
        for _ in range(rounds):
            for count in dict.fromkeys((1, threads)):
                sgmv.set_num_threads(count)
                lora = found.setdefault(str(count), [])
                end, calls = time.perf_counter() + TURN_S, -1  # the first one is not counted
                while calls < LEAST_CALLS or time.perf_counter() < end:
                    start = time.perf_counter_ns()
                    y = o.base()
                    middle = time.perf_counter_ns()
                    sgmv.add_lora(y, o.x, o.stack, segments)
                    if calls >= 0:
                        found["base"].append(middle - start)
                        lora.append(time.perf_counter_ns() - middle)
                    calls += 1
        return found

    found, foreign = quietly(turns)
    times = times_record({name: summary(samples) for name, samples in found.items()})
    return {
        "library": library, "dtype": dtype, "layer": layer, "h_in": h_in, "h_out": h_out,
        "rows": rows, "times": times, "foreign_cores": foreign,
    }  # fmt: skip


def lines(record: LayerRecord) -> list[list[str]]:
    """The table's heads, then a line per library and rows: geometric means over the layers."""
    most = str(record["threads"])
    found = [["base by", "rows", "base ms", "add_lora ms", "share of base", "1 thread / all"]]
    groups: dict[tuple[str, str, int], list[dict[str, Times]]] = {}
    for case in record["cases"]:
        key = case["library"], case["dtype"], case["rows"]
        groups.setdefault(key, []).append(case["times"])
    for (library, dtype, rows), its in groups.items():
        base, lora, alone = (
            geomean(times[name]["q50"] / 1e3 for times in its) for name in ("base", most, "1")
        )
        found.append(
            [f"{library} {dtype}", str(rows), f"{base:.3g}", f"{lora:.3g}", f"{lora / base:.1%}",
             f"{alone / lora:.2f}x"]
        )  # fmt: skip
    return found


def markdown(record: LayerRecord, name: str) -> str:
    """The table of docs/kernels.md, and where it comes from."""
    head, *rest = lines(record)
    return "\n".join(
        [
            f"{record['model']}'s layers ({', '.join(NAMES)}; geometric means), rank "
            f"{record['rank']}, {record['adapters']} adapters, {source(record)}; record: "
            f"`benchmarks/records/{name}`.",
            "",
            "| " + " | ".join(head) + " |",
            "| --- " + "| ---: " * (len(head) - 1) + "|",
            *("| " + " | ".join(line) + " |" for line in rest),
        ]
    )


def print_table(record: LayerRecord, console: Console) -> None:
    console.table(lines(record))
    warn_if_noisy(record["cases"], console)


def load(path: Path) -> LayerRecord:
    """Read and validate a record. Raises RecordError, naming the file."""
    return load_as(LayerRecord, SCHEMA, path, "python -m benchmarks layer")


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, save; returns 0."""
    from benchmarks import readme

    parser = Parser(
        prog="python -m benchmarks layer", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--threads", type=at_least(1), default=cores(), help="default: all cores")
    parser.add_argument("--record", action="store_true", help="write to benchmarks/records/")
    parser.add_argument("--output", type=Path, default=Path("bench-out"))
    args = parser.parse_args(argv)
    console, started = Console(), time.perf_counter()
    cases = []
    for library, dtype in installed_kinds(console):
        if library == "torch":
            import torch

            torch.set_num_threads(args.threads)
        cases += [
            measure(library, dtype, layer, rows, args.threads) for rows in ROWS for layer in NAMES
        ]
    record: LayerRecord = {
        **record_head(SCHEMA, args.threads, started),
        "model": MODEL,
        "rank": RANK,
        "adapters": ADAPTERS,
        "cases": cases,
    }
    print_table(record, console)
    readme.keep(
        PREFIX, record, partial(save_as, LayerRecord, SCHEMA), args.record, args.output, console
    )
    return 0
