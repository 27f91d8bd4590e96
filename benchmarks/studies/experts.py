"""Layers of experts: grouped products against torch's and numpy's, and LoRA on them.

    python -m benchmarks experts            check, timings, table; about four minutes
    python -m benchmarks experts --record   the same, into benchmarks/records/, to commit

One product x @ W[e].T of the widths of Qwen3-30B-A3B (gate and up: 2048 -> 1536, 8 of 32 experts;
the model has 128, the weights of which would not fit beside the others) and of Mixtral-8x7B cut to
a quarter of its inner width (4096 -> 7168, 2 of 8). Weights in float32, and in bfloat16 where
ml_dtypes is there. Then the deltas alone of 16 adapters of rank 8 on each expert.

    sgmv     experts.grouped_matmul; experts.add_lora
    loop     an expert, or (expert, adapter), at a time: the rows gathered, numpy's products, put
             back; weights of 16 bits are widened, as numpy has no product of them
    torch    the same in torch, in the weights' own type
    grouped  torch's grouped_mm, over rows sorted by expert
    gather   the weights of each pair gathered, then einsum, as in vLLM's CPU operations
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from statistics import geometric_mean
from typing import Any, ClassVar, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

import sgmv
from benchmarks.batch import dtype_of, in_library, uniform
from benchmarks.clock import Budget, Variant, interval, time_quietly
from benchmarks.gate import CHECKED_ROWS, spread
from benchmarks.peers import rests
from benchmarks.record import Head, Times, source
from benchmarks.study import Red, Study
from benchmarks.text import Console, Table, ratio_text
from reference import bounds, by_row, compare
from sgmv import experts

ROWS, ADAPTERS, RANK = (1, 16, 64, 256, 1024), 16, 8
PEERS = ("loop", "torch", "grouped", "gather")
BUDGET = Budget(rounds=4, turn_s=0.1)


class Widths(NamedTuple):
    """A layer's widths, experts, and how many of them a row goes through."""

    name: str
    h_in: int
    h_out: int
    E: int
    k: int


LAYERS = (
    Widths("Qwen3-30B-A3B gate/up", 2048, 1536, 32, 8),
    Widths("Mixtral-8x7B gate/up", 4096, 7168, 8, 2),
)


class ExpertsCase(msgspec.Struct, forbid_unknown_fields=True):
    """One batch. `what`: "products", or "deltas" of adapters. `times`: by form."""

    layer: str
    what: str
    dtype: str
    rows: int
    S: int
    times: dict[str, Times]
    foreign_cores: float | None


class ExpertsRecord(Head):
    """One run of this file."""

    STUDY: ClassVar[str] = "experts"
    threads: int
    cases: list[ExpertsCase]


class Operands(NamedTuple):
    """A layer's weights and adapters, and a batch."""

    W: NDArray[Any]
    A: NDArray[Any]  # (adapters, E, r, h_in)
    B: NDArray[Any]  # (adapters, E, h_out, r)
    stack: experts.ExpertStack
    x: NDArray[Any]
    ids: NDArray[np.int64]
    adapter_ids: NDArray[np.int64]


def weights(its: Widths, dtype: str) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any], Any]:
    """W, A, B and the stack of them."""
    rng = np.random.Generator(np.random.SFC64(0))

    def drawn(*shape: int) -> NDArray[Any]:
        found: NDArray[Any] = uniform(rng, shape, shape[-1] ** -0.5).astype(dtype_of(dtype))
        return found

    W = drawn(its.E, its.h_out, its.h_in)
    A, B = drawn(ADAPTERS, its.E, RANK, its.h_in), drawn(ADAPTERS, its.E, its.h_out, RANK)
    stack = experts.ExpertStack(
        its.E, its.h_in, its.h_out, slots=ADAPTERS, max_rank=RANK, dtype=dtype_of(dtype)
    )
    for adapter_id in range(ADAPTERS):
        stack.load(adapter_id, experts.ExpertAdapter(A[adapter_id], B[adapter_id]))
    return W, A, B, stack


def forms(o: Operands, library: str) -> dict[str, Callable[[NDArray[Any]], Any]]:
    """Products and deltas by a loop over what is the same: of numpy, or of torch."""
    flat = o.ids.ravel()
    row_of = np.repeat(np.arange(len(o.x)), o.ids.shape[1])
    pair = o.adapter_ids[row_of] * len(o.W) + flat
    by_expert = [(e, np.flatnonzero(flat == e)) for e in np.unique(flat).tolist()]
    by_pair = [(divmod(i, len(o.W)), np.flatnonzero(pair == i)) for i in np.unique(pair).tolist()]
    x, W, A, B = (in_library(library, each) for each in (o.x, o.W, o.A, o.B))

    def product(rows: Any, matrix: Any) -> Any:
        if library == "numpy":
            rows, matrix = (each.astype(np.float32, copy=False) for each in (rows, matrix))
        return rows @ matrix.T

    def products(y: NDArray[Any]) -> None:
        out = in_library(library, y)
        for e, p in by_expert:
            out[p] = product(x[row_of[p]], W[e])

    def deltas(y: NDArray[Any]) -> None:
        out = in_library(library, y)
        for (a, e), p in by_pair:
            out[p] += product(product(x[row_of[p]], A[a, e]), B[a, e])

    return {"products": products, "deltas": deltas}


def torchs_own(o: Operands) -> dict[str, dict[str, Callable[[NDArray[Any]], Any]]]:
    """What torch, and vLLM in torch, have beside a loop: of products, and of deltas."""
    import torch

    E, k = len(o.W), o.ids.shape[1]
    x, W, A, B = (in_library("torch", each) for each in (o.x, o.W, o.A, o.B))
    flat = o.ids.ravel()
    order = torch.from_numpy(np.argsort(flat, kind="stable"))
    ends = torch.from_numpy(np.cumsum(np.bincount(flat, minlength=E)).astype(np.int32))
    row_of = torch.arange(len(o.x)).repeat_interleave(k)
    experts_of, adapters_of = torch.from_numpy(flat), torch.from_numpy(o.adapter_ids)[row_of]

    def grouped(y: NDArray[Any]) -> None:
        sorted_rows = x[row_of[order]]
        made = torch.nn.functional.grouped_mm(sorted_rows, W.transpose(-2, -1), offs=ends)
        in_library("torch", y)[order] = made

    def gather(y: NDArray[Any]) -> None:
        v = torch.einsum("pi,poi->po", x[row_of], A[adapters_of, experts_of])
        in_library("torch", y).add_(torch.einsum("pi,poi->po", v, B[adapters_of, experts_of]))

    return {"products": {"grouped": grouped}, "deltas": {"gather": gather}}


def measure(
    its: Widths, dtype: str, rows: int, loaded: Any, budget: Budget = BUDGET
) -> list[ExpertsCase]:
    """Check and time both products and deltas of one batch."""
    W, A, B, stack = loaded
    rng = np.random.default_rng(rows)
    x = rng.standard_normal((rows, its.h_in), np.float32).astype(W.dtype)
    ids = np.argsort(rng.random((rows, its.E)), axis=1)[:, : its.k].copy()
    o = Operands(W, A, B, stack, x, ids, rng.integers(0, ADAPTERS, rows))
    pairs = sgmv.segment(ids)
    ours: dict[str, Callable[[NDArray[Any]], Any]] = {
        "products": lambda y: experts.grouped_matmul(x, W, pairs),
        "deltas": lambda y: experts.add_lora(
            y.reshape(rows, its.k, its.h_out), x, stack, pairs, o.adapter_ids
        ),
    }
    others = {"loop": forms(o, "numpy")}
    if find_spec("torch"):
        others["torch"] = forms(o, "torch")
    more = torchs_own(o) if find_spec("torch") else {what: {} for what in ours}
    check(o, ours["products"], ours["deltas"])
    check_others(ours, others, more, rows * its.k, its.h_out, W.dtype)
    cases = []
    for what in ours:
        every = {"sgmv": ours[what]} | {name: both[what] for name, both in others.items()}
        every |= more[what]
        libraries = {"loop": "numpy", "sgmv": "sgmv"}
        waits = rests([libraries.get(name, "torch") for name in every])
        y = np.zeros((rows * its.k, its.h_out), W.dtype)
        turns = [
            Variant(name, partial(form, y), settle_s=max(0.003, wait))
            for (name, form), wait in zip(every.items(), waits, strict=True)
        ]
        with np.errstate(over="ignore", invalid="ignore"):
            times, foreign = time_quietly(turns, budget)
        cases.append(ExpertsCase(its.name, what, dtype, rows, pairs.S, times, foreign))
    return cases


def check(o: Operands, products: Any, deltas: Any) -> None:
    """Hold some pairs of both to the reference. Raises Red."""
    rows, k = o.ids.shape
    zero = np.zeros((rows * k, o.W.shape[1]), o.W.dtype)
    made, added = products(zero), np.array(deltas(zero.copy()))
    try:
        for i in spread(rows, CHECKED_ROWS).tolist():
            e, a, row = int(o.ids[i, -1]), int(o.adapter_ids[i]), o.x[i : i + 1]
            expected = by_row.apply_batched(row, o.W[e], {}, [-1])
            bound = bounds.apply_batched_bound(row, o.W[e], {}, [-1], out=o.W.dtype)
            compare.check(made[i, -1:], expected, bound, "products")
            given = zero[:1], row, {0: (o.A[a, e], o.B[a, e])}, [0]
            compare.check(
                added[i, -1:], by_row.add_lora(*given), bounds.add_lora_bound(*given), "deltas"
            )
    except AssertionError as error:
        raise Red("gate: RED, nothing was timed", error) from error


def check_others(
    ours: Any, others: Any, more: Any, pairs: int, width: int, dtype: np.dtype[Any]
) -> None:
    """Hold every other form's result to ours, which is right: it computes the same. Raises Red."""
    for what, form in ours.items():
        y = np.zeros((pairs, width), dtype)
        made = form(y)
        right = np.asarray(y if what == "deltas" else made, np.float32).reshape(pairs, width)
        room = 0.05 * float(np.abs(right).max())  # another computation is off by far more
        every = {name: both[what] for name, both in others.items()} | more[what]
        for name, other in every.items():
            y = np.zeros((pairs, width), dtype)
            other(y)
            off = float(np.abs(y.astype(np.float32) - right).max())
            if off > room:
                raise Red(f"{name} computes other {what}", AssertionError(f"off by {off:.3g}"))


def tables(record: ExpertsRecord) -> list[Table]:
    """A line per batch; ratios to sgmv."""
    rows, means = [], []
    for case in record.cases:
        ours = case.times["sgmv"]
        cells = []
        for name in PEERS:
            its = case.times.get(name)
            if its is None:
                cells.append("-")
                continue
            cells.append(ratio_text(its.q50 / ours.q50, interval((ours, its))))
        rows.append(
            [case.layer, case.what, case.dtype, str(case.rows), str(case.S),
             f"{ours.q50 / 1e3:.3g}", *cells]
        )  # fmt: skip
    for what in ("products", "deltas"):
        for name in PEERS:
            ratios = [
                case.times[name].q50 / case.times["sgmv"].q50
                for case in record.cases
                if case.what == what and name in case.times
            ]
            if ratios:
                means.append(
                    f"{what}, {name} / sgmv, geometric mean: {geometric_mean(ratios):.2f}x"
                )
    head = ["layer", "what", "type", "n", "S", "sgmv ms", *(f"{name} / sgmv" for name in PEERS)]
    return [Table(head, rows, 3, [*means, f"{record.threads} threads."])]


def run(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Measure every layer in both types."""
    sgmv.set_num_threads(args.threads)
    cases = []
    for its in LAYERS:
        for dtype in ("float32", "bfloat16") if find_spec("ml_dtypes") else ("float32",):
            loaded = weights(its, dtype)
            for rows in ROWS:
                console.print(f"  {its.name}, {dtype}, {rows} rows")
                cases += measure(its, dtype, rows, loaded)
    return {"threads": args.threads, "cases": cases}


def summary(record: ExpertsRecord) -> Table:
    """A line per layer, product and type: of all batches the mean ratio, and the least."""
    alike: dict[tuple[str, str, str], list[ExpertsCase]] = {}
    for case in record.cases:
        alike.setdefault((case.layer, case.what, case.dtype), []).append(case)
    rows = []
    for key, cases in alike.items():
        cells = []
        for name in PEERS:
            timed = [(case.times["sgmv"], case.times[name]) for case in cases if name in case.times]
            if not timed:
                cells.append("-")
                continue
            mean = geometric_mean(its.q50 / ours.q50 for ours, its in timed)
            ours, its = min(timed, key=lambda both: both[1].q50 / both[0].q50)
            least = ratio_text(its.q50 / ours.q50, interval((ours, its)))
            cells.append(f"{ratio_text(mean)} ({least})")
        rows.append([*key, *cells])
    return Table(["layer", "what", "type", *(f"{name} / sgmv" for name in PEERS)], rows, 3)


def page(record: ExpertsRecord, name: str) -> str:
    """The summary of docs/group-by-id.md, and where it comes from."""
    [table] = tables(record)
    rows = sorted({case.rows for case in record.cases})
    head = (
        f"{source(record)}; record: `benchmarks/records/{name}`. Geometric mean of "
        f"{', '.join(map(str, rows))} rows, and in brackets the least; ! marks a loss, ~ a draw."
    )
    return f"{head}\n\n{summary(record).markdown()}\n\n{'; '.join(table.notes[:-1])}."


STUDY = Study(
    "experts", __doc__, ExpertsRecord, run, tables,
    pages={("docs/group-by-id.md", "experts"): page},
)  # fmt: skip
