"""What a step of a server costs on this machine: the model of costs that the simulator runs on.

    python -m benchmarks step            timings, fit, table; about a minute
    python -m benchmarks step --record   the same, into benchmarks/records/, to commit
    sgmv simulate --costs bench-out/step.json --replicas 4

A step is one layer of Llama-3-8B, times its 32 layers: the base products q, k, v, o, gate, up and
down by numpy in float32, each followed by add_lora with adapters spread evenly over the rows. The
fit is the best of the form step_us + row_us * rows + adapter_us * adapters + rank_us * (sum of the
rows' ranks) with no coefficient below 0, by least squares of relative errors.

load is what brings an adapter from host memory into the slots of all layers, read what reads its
files from disk, which are put out of the page cache before.
"""

from __future__ import annotations

import argparse
import json
import os
import struct
import tempfile
import time
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, ClassVar

import msgspec
import numpy as np
from numpy.typing import NDArray

import sgmv
from benchmarks.clock import quietly, summary
from benchmarks.gate import check_rows
from benchmarks.record import Head, Times, source
from benchmarks.study import Study
from benchmarks.text import Console, Table
from sgmv.models import MODELS
from sgmv.serving import Costs
from sgmv.serving.simulate import step_us
from sgmv.serving.traces import RANK

MODEL, LAYERS = "Llama-3-8B", 32
MODULES = {"q": 1, "kv": 2, "o": 1, "gate/up": 2, "down": 1}  # how many there are of these widths
ROWS, ADAPTERS, RANKS = (1, 4, 16, 64), (1, 4, 16), (8, 16, 64)
ROUNDS, TURN_S = 4, 0.2


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
        return LAYERS * sum(times.q50 for times in self.times.values())


class StepRecord(Head):
    """One run of this file. `costs`: the fields of `sgmv.serving.Costs`."""

    STUDY: ClassVar[str] = "step"
    threads: int
    model: str
    layers: int
    costs: dict[str, float]
    cases: list[StepCase]


def widths(name: str) -> tuple[int, int]:
    """(h_in, h_out); o's are those of q, turned."""
    return MODELS[MODEL].layer("q")[::-1] if name == "o" else MODELS[MODEL].layer(name)


class Layer:
    """One layer's weights, and stacks with as many adapters of each rank as any case has."""

    def __init__(self) -> None:
        rng = np.random.default_rng(0)

        def normal(rows: int, columns: int) -> NDArray[Any]:
            values = rng.standard_normal((rows, columns), np.float32)
            found: NDArray[Any] = values / np.float32(columns**0.5)
            return found

        self.W = {
            f"{name} {i}": normal(*widths(name)[::-1])
            for name, count in MODULES.items()
            for i in range(count)
        }
        self.x = {h_in: normal(max(ROWS), h_in) for h_in in {W.shape[1] for W in self.W.values()}}
        self.pairs = {
            rank: {
                name: [
                    (normal(rank, W.shape[1]), normal(W.shape[0], rank))
                    for _ in range(max(ADAPTERS))
                ]
                for name, W in self.W.items()
            }
            for rank in RANKS
        }
        self.stacks = {
            rank: {name: sgmv.AdapterStack.from_adapters(pairs) for name, pairs in of.items()}
            for rank, of in self.pairs.items()
        }

    def step(self, rows: int, segments: sgmv.Segments, rank: int) -> tuple[int, int]:
        """Nanoseconds of the base products, and of add_lora after each."""
        base = lora = 0
        for name, W in self.W.items():
            x = self.x[W.shape[1]][:rows]
            start = time.perf_counter_ns()
            y = x @ W.T
            middle = time.perf_counter_ns()
            sgmv.add_lora(y, x, self.stacks[rank][name], segments)
            base += middle - start
            lora += time.perf_counter_ns() - middle
        return base, lora

    def check(self, rows: int, ids: NDArray[np.int64], rank: int) -> None:
        """Hold each module's result to the reference."""
        for name, W in self.W.items():
            x = self.x[W.shape[1]][:rows]
            check_rows(x @ W.T, x, self.stacks[rank][name], ids)


def measure(layer: Layer, rows: int, adapters: int, rank: int) -> StepCase:
    """Check and time one batch."""
    ids = np.arange(rows, dtype=np.int64) % adapters
    layer.check(rows, ids, rank)
    segments = sgmv.segment(ids)

    def turns() -> list[list[tuple[int, int]]]:
        return [_turn(partial(layer.step, rows, segments, rank)) for _ in range(ROUNDS)]

    found, foreign = quietly(turns)
    times = {
        name: summary([[each[part] for each in turn] for turn in found])
        for part, name in enumerate(("base", "lora"))
    }
    return StepCase("step", rows, adapters, rank, times, foreign)


def _turn(call: Callable[[], Any]) -> list[Any]:
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

    _write_adapter(folder, {name: pairs[0] for name, pairs in layer.pairs[rank].items()})

    def read() -> int:
        file = folder / "adapter_model.safetensors"
        with file.open("rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        start = time.perf_counter_ns()
        for adapter in sgmv.load_peft(folder).values():
            adapter.A.sum(), adapter.B.sum()  # what is only mapped is not read yet
        return time.perf_counter_ns() - start

    cases = []
    for what, call in (("load", load), ("read", read)):
        found, foreign = quietly(lambda call=call: [_turn(call) for _ in range(ROUNDS)])  # type: ignore[misc]
        cases.append(StepCase(what, 0, 1, rank, {what: summary(found)}, foreign))
    return cases


def _write_adapter(folder: Path, pairs: dict[str, tuple[NDArray[Any], NDArray[Any]]]) -> None:
    """As PEFT does; safetensors is a header's length, the header and the tensors."""
    header: dict[str, Any] = {}
    data = b""
    for i, pair in enumerate(pairs.values()):
        for letter, factor in zip("AB", pair, strict=True):
            name = f"base_model.model.layers.{i}.proj.lora_{letter}.weight"
            ends = [len(data), len(data) + factor.nbytes]
            header[name] = {"dtype": "F32", "shape": factor.shape, "data_offsets": ends}
            data += factor.tobytes()
    text = json.dumps(header).encode()
    with (folder / "adapter_model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text + data)
        file.flush()
        os.fsync(file.fileno())
    rank = next(iter(pairs.values()))[0].shape[0]
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": ["proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")


def fitted(cases: list[StepCase]) -> dict[str, float]:
    """The costs that come nearest to the cases."""
    steps = [case for case in cases if case.what == "step"]
    terms = np.array([[1, c.rows, c.adapters, c.rows * c.rank] for c in steps], np.float64)
    us = np.array([case.us for case in steps])
    names = ["step_us", "row_us", "adapter_us", "rank_us"]
    found = dict.fromkeys(names, 0.0)
    while names:
        columns = [list(found).index(name) for name in names]
        values = np.linalg.lstsq(terms[:, columns] / us[:, None], np.ones(len(us)))[0]
        least = int(values.argmin())
        if values[least] >= 0:
            found.update(zip(names, values.tolist(), strict=True))
            break
        del names[least]
    per_rank = sum(4 * sum(widths(name)) * count for name, count in MODULES.items()) * LAYERS
    rates = {
        name: float(np.median([per_rank * c.rank / c.us * 1e6 for c in cases if c.what == what]))
        for what, name in (("load", "load_rate"), ("read", "read_rate"))
    }
    whole = {name: round(value) for name, value in found.items() if name != "rank_us"}
    return {**whole, "rank_us": found["rank_us"], "adapter_bytes": per_rank * RANK, **rates}


def residual(record: StepRecord) -> list[float]:
    """Of each batch, what the model of costs says over what was measured."""
    costs = Costs(**record.costs)  # type: ignore[arg-type]
    return [
        step_us(costs, c.rows, c.adapters, {c.rank: c.rows}) / c.us
        for c in record.cases
        if c.what == "step"
    ]


def tables(record: StepRecord) -> list[Table]:
    """The costs; and a line per batch, beside what they say of it."""
    costs = record.costs
    sums = [
        ["a step", f"{costs['step_us'] / 1e3:.1f} ms"],
        ["each row", f"{costs['row_us'] / 1e3:.3g} ms"],
        ["each adapter", f"{costs['adapter_us'] / 1e3:.3g} ms"],
        ["each rank of a row", f"{costs['rank_us']:.3g} us"],
        ["an adapter of rank 16", f"{costs['adapter_bytes'] / 1e6:.0f} MB"],
        ["into slots", f"{costs['load_rate'] / 1e9:.2f} GB/s"],
        ["from disk", f"{costs['read_rate'] / 1e9:.2f} GB/s"],
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
        f"{record.model}, {record.layers} layers, float32, numpy's base products; "
        f"{source(record)}; record: `benchmarks/records/{name}`."
    )
    told = f"The model says {min(shares):.2f} to {max(shares):.2f} of what was measured."
    return f"{head}\n\n{tables(record)[0].markdown()}\n\n{told}"


def run(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Measure every batch, and every way of bringing an adapter."""
    sgmv.set_num_threads(args.threads)
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
        "model": MODEL,
        "layers": LAYERS,
        "costs": fitted(cases),
        "cases": cases,
    }


STUDY = Study(
    "step", __doc__, StepRecord, run, tables, pages={("docs/simulation.md", "step"): page}
)
