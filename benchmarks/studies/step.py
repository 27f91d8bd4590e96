"""What a step of a server costs on this machine: the model of costs that the simulator runs on.

    python -m benchmarks step            timings, fit, table; about a minute
    python -m benchmarks step --record   the same, into benchmarks/records/, to commit
    sgmv simulate --costs bench-out/step.json --replicas 4

A step is one layer of Llama-3-8B, times its 32 layers: the base products q, k, v, o, gate, up and
down in float32, by torch where it is installed and else by numpy, whose products of few rows take
several times as long; each followed by add_lora with adapters spread evenly over the rows. What
adapters add is fitted by us + row_us * rows + adapter_us * adapters + rank_us * (sum of the rows'
ranks), no coefficient below 0, least squares weighed by the whole step; the base products are as
they are, at each number of rows, as they grow in no straight line.

load is what brings an adapter from host memory into the slots of all layers, read what reads its
files from disk, which are put out of the page cache before.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any, ClassVar, TypeVar

import msgspec
import numpy as np
from numpy.typing import NDArray

import sgmv
from benchmarks.batch import base_product
from benchmarks.clock import quietly, summary
from benchmarks.engine import Llama, drawn, put_out_of_cache, write_adapter
from benchmarks.gate import check_rows
from benchmarks.record import Head, Times, source
from benchmarks.study import Red, Study
from benchmarks.text import Console, Table
from sgmv.models import MODELS
from sgmv.serving import Costs
from sgmv.serving.simulate import added_us, base_us
from sgmv.serving.traces import RANK

MODEL = "Llama-3-8B"
SHAPE = Llama(**asdict(MODELS[MODEL]), layers=32, vocabulary=128256)
ROWS, ADAPTERS, RANKS = (1, 4, 16, 64), (1, 4, 16), (8, 16, 64)
ROUNDS, TURN_S = 4, 0.2
LIBRARY = "torch" if find_spec("torch") else "numpy"
T = TypeVar("T")


class StepCase(msgspec.Struct, forbid_unknown_fields=True):
    """One batch, or one way of bringing an adapter. `times`: of one layer, in microseconds."""

    what: str  # "step", "load" or "read"
    rows: int
    adapters: int
    rank: int
    times: dict[str, Times]
    foreign_cores: float | None

    @property
    def us(self) -> float:
        """The sum of its parts' medians, over all layers."""
        return SHAPE.layers * sum(times.q50 for times in self.times.values())


class Fitted(msgspec.Struct, forbid_unknown_fields=True):
    """Fields of `sgmv.serving.Costs`."""

    base_us: list[tuple[int, int]]
    step_us: int
    row_us: int
    adapter_us: int
    rank_us: float
    adapter_bytes: int
    load_rate: float
    read_rate: float


class StepRecord(Head):
    """One run of this file."""

    STUDY: ClassVar[str] = "step"
    threads: int
    library: str  # of the base products
    model: str
    layers: int
    costs: Fitted
    cases: list[StepCase]


class Layer:
    """One layer's weights, and stacks with as many adapters of each rank as any case has."""

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        widths = SHAPE.linears()
        self.W = {name: drawn(rng, h_out, h_in) for name, (h_in, h_out) in widths.items()}
        self.x = {
            h_in: drawn(rng, max(ROWS), h_in) for h_in in {h_in for h_in, _ in widths.values()}
        }
        self.pairs = {
            rank: {
                name: [
                    (drawn(rng, rank, h_in), drawn(rng, h_out, rank)) for _ in range(max(ADAPTERS))
                ]
                for name, (h_in, h_out) in widths.items()
            }
            for rank in RANKS
        }
        self.stacks = {
            rank: {name: sgmv.AdapterStack.from_adapters(pairs) for name, pairs in of.items()}
            for rank, of in self.pairs.items()
        }

    def products(self, rows: int) -> dict[str, Callable[[], NDArray[Any]]]:
        """Each module's base product of this number of rows."""
        return {
            name: base_product(LIBRARY, self.x[W.shape[1]][:rows], W) for name, W in self.W.items()
        }

    def step(
        self, products: Mapping[str, Callable[[], Any]], segments: sgmv.Segments, rank: int
    ) -> tuple[int, int]:
        """Nanoseconds of the base products, and of add_lora after each."""
        base = lora = 0
        for name, product_of in products.items():
            start = time.perf_counter_ns()
            y = product_of()
            middle = time.perf_counter_ns()
            x = self.x[self.W[name].shape[1]][: segments.n]
            sgmv.add_lora(y, x, self.stacks[rank][name], segments)
            base += middle - start
            lora += time.perf_counter_ns() - middle
        return base, lora

    def check(self, rows: int, ids: NDArray[np.int64], rank: int) -> None:
        """Hold each module's result to the reference."""
        for name, product_of in self.products(rows).items():
            x = self.x[self.W[name].shape[1]][:rows]
            check_rows(product_of(), x, self.stacks[rank][name], ids)


def measure(layer: Layer, rows: int, adapters: int, rank: int) -> StepCase:
    """Check and time one batch. Raises Red if a result is wrong."""
    ids = np.arange(rows, dtype=np.int64) % adapters
    try:
        layer.check(rows, ids, rank)
    except AssertionError as error:
        raise Red("gate: RED, nothing was timed", error) from error
    step = partial(layer.step, layer.products(rows), sgmv.segment(ids), rank)
    found, foreign = _turns(step)
    times = {
        name: summary([[each[part] for each in turn] for turn in found])
        for part, name in enumerate(("base", "lora"))
    }
    return StepCase("step", rows, adapters, rank, times, foreign)


def _turns(call: Callable[[], T]) -> tuple[list[list[T]], float | None]:
    """What calls return, turn by turn, and the cores that others kept busy."""
    return quietly(lambda: [_turn(call) for _ in range(ROUNDS)])


def _turn(call: Callable[[], T]) -> list[T]:
    call()  # not counted
    end, found = time.perf_counter() + TURN_S, [call()]
    while time.perf_counter() < end:
        found.append(call())
    return found


def bring(layer: Layer, rank: int, folder: Path) -> list[StepCase]:
    """Time how an adapter comes into the slots of a layer, and how its file is read."""
    stacks = {
        name: sgmv.AdapterStack(W.shape[1], W.shape[0], slots=2, max_rank=rank)
        for name, W in layer.W.items()
    }

    def load() -> int:
        start = time.perf_counter_ns()
        for name, stack in stacks.items():
            stack.load(1, layer.pairs[rank][name][0])
        spent = time.perf_counter_ns() - start
        for stack in stacks.values():
            stack.unload(1)
        return spent

    modules = {f"model.layers.0.{name}": widths for name, widths in SHAPE.linears().items()}
    write_adapter(folder, modules, rank, seed=0)

    def read() -> int:
        put_out_of_cache(folder)
        start = time.perf_counter_ns()
        sgmv.load_peft(folder)
        return time.perf_counter_ns() - start

    cases = []
    for what, call in (("load", load), ("read", read)):
        found, foreign = _turns(call)
        cases.append(StepCase(what, 0, 1, rank, {what: summary(found)}, foreign))
    return cases


def fitted(cases: list[StepCase]) -> Fitted:
    """The costs that come nearest to the cases."""
    steps = [case for case in cases if case.what == "step"]
    terms = np.array([[1, c.rows, c.adapters, c.rows * c.rank] for c in steps], np.float64)
    lora = np.array([SHAPE.layers * case.times["lora"].q50 for case in steps])
    whole = np.array([case.us for case in steps])
    used, found = list(range(4)), np.zeros(4)
    while used:
        values = np.linalg.lstsq(terms[:, used] / whole[:, None], lora / whole)[0]
        if values.min() >= 0:
            found[used] = values
            break
        del used[int(values.argmin())]
    fixed, row_us, adapter_us, rank_us = found.tolist()
    base = {
        rows: SHAPE.layers * median(c.times["base"].q50 for c in steps if c.rows == rows)
        for rows in ROWS
    }
    us = np.maximum.accumulate([base[rows] + fixed + row_us * rows for rows in ROWS])
    points = [(rows, round(each)) for rows, each in zip(ROWS, us.tolist(), strict=True)]
    line = np.polyfit(np.array(ROWS, np.float64), us, 1)
    per_rank = 4 * SHAPE.layers * sum(map(sum, SHAPE.linears().values()))
    load_rate, read_rate = (
        median(per_rank * c.rank / c.us * 1e6 for c in cases if c.what == what)
        for what in ("load", "read")
    )
    return Fitted(
        points, round(line[1]), round(line[0]), round(adapter_us), rank_us, per_rank * RANK,
        load_rate, read_rate,
    )  # fmt: skip


def residual(record: StepRecord) -> list[float]:
    """Of each batch, what the model of costs says over what was measured."""
    costs = Costs(**msgspec.structs.asdict(record.costs))
    base = base_us(costs, max(ROWS))
    return [
        float(base[c.rows] + added_us(costs, c.adapters, {c.rank: c.rows})) / c.us
        for c in record.cases
        if c.what == "step"
    ]


def tables(record: StepRecord) -> list[Table]:
    """The costs; and a line per batch, beside what they say of it."""
    costs = record.costs
    sums = [
        *([f"a step of {rows} rows", f"{us / 1e3:,.0f} ms"] for rows, us in costs.base_us),
        ["each adapter", f"{costs.adapter_us / 1e3:.3g} ms"],
        ["each rank of a row", f"{costs.rank_us:.3g} us"],
        ["an adapter of rank 16", f"{costs.adapter_bytes / 1e6:.0f} MB"],
        ["into slots", f"{costs.load_rate / 1e9:.2f} GB/s"],
        ["from disk", f"{costs.read_rate / 1e9:.2f} GB/s"],
    ]
    steps = [case for case in record.cases if case.what == "step"]
    lines = [
        [
            str(case.rows), str(case.adapters), str(case.rank),
            *(f"{record.layers * case.times[part].q50 / 1e3:.1f}" for part in ("base", "lora")),
            f"{share:.2f}",
        ]
        for case, share in zip(steps, residual(record), strict=True)
    ]  # fmt: skip
    head = ["rows", "adapters", "rank", "base ms", "LoRA ms", "model / measured"]
    return [Table(["cost of", ""], sums, 1), Table(head, lines, 3)]


def page(record: StepRecord, name: str) -> str:
    """The table of docs/simulation.md, and where it comes from."""
    shares = residual(record)
    head = (
        f"{record.model}, {record.layers} layers, float32, base products by {record.library}; "
        f"{source(record)}; record: `benchmarks/records/{name}`."
    )
    spread = f"The model says {min(shares):.2f} to {max(shares):.2f} of what was measured."
    return f"{head}\n\n{tables(record)[0].markdown()}\n\n{spread}"


def run(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Measure every batch, and every way of bringing an adapter."""
    sgmv.set_num_threads(args.threads)
    if LIBRARY == "torch":
        import torch

        torch.set_num_threads(args.threads)
    layer = Layer()
    cases = []
    for rows, adapters, rank in product(ROWS, ADAPTERS, RANKS):
        if adapters <= rows:
            console.print(f"  {rows} rows, {adapters} adapters, rank {rank}")
            cases.append(measure(layer, rows, adapters, rank))
    for rank in RANKS:
        with tempfile.TemporaryDirectory() as folder:
            cases += bring(layer, rank, Path(folder))
    return {
        "threads": args.threads,
        "library": LIBRARY,
        "model": MODEL,
        "layers": SHAPE.layers,
        "costs": fitted(cases),
        "cases": cases,
    }


STUDY = Study(
    "step", __doc__, StepRecord, run, tables, pages={("docs/simulation.md", "step"): page}
)
