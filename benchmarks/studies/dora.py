"""What DoRA adds to a call: adapters with magnitudes against the same adapters without.

    python -m benchmarks dora            check, timings, table; half a minute
    python -m benchmarks dora --record   the same, into benchmarks/records/, to commit

A layer 4096 -> 16 -> 4096, 16 adapters spread evenly over the rows; segments are made beforehand.
plain: add_lora. dora: the same A and B with magnitudes, without and with a bias of the layer.
numpy: as PEFT computes it with one adapter active, (g - 1) * base + g * scaling * delta, for each
adapter in turn, its gains kept; in float32. Taking gains is not timed: a stack does it at load.

Gains are 1 and -1, as y is the same array at each call: others would make it 0 or infinite.
"""

from __future__ import annotations

import argparse
from functools import cache, partial
from statistics import geometric_mean
from typing import Any, ClassVar, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

import sgmv
from benchmarks.batch import dtype_of
from benchmarks.clock import Budget, Variant, interval, time_quietly
from benchmarks.gate import CHECKED_ROWS, spread
from benchmarks.peers import rests
from benchmarks.record import Head, Times, source
from benchmarks.study import Red, Study
from benchmarks.text import Console, Table, undecided
from reference import bounds, by_row, compare

H, RANK, ADAPTERS = 4096, 16, 16
ROWS, DTYPES = (1, 16, 64, 256), ("float32", "bfloat16")
CHECKED_COLUMNS = 64
BUDGET = Budget(rounds=6, turn_s=0.03)


class DoraCase(msgspec.Struct, forbid_unknown_fields=True):
    """One batch. `times`: of "plain", "dora" and "biased"; of "numpy", in float32."""

    dtype: str
    rows: int
    S: int
    times: dict[str, Times]
    foreign_cores: float | None


class DoraRecord(Head):
    """One run of this file."""

    STUDY: ClassVar[str] = "dora"
    threads: int
    cases: list[DoraCase]


class Layer(NamedTuple):
    """A layer's weight and bias, and its adapters in a stack for each form."""

    W: NDArray[Any]
    bias: NDArray[Any]
    stacks: dict[str, sgmv.AdapterStack]


@cache
def layer_of(dtype: str, width: int) -> Layer:
    """The same numbers at each call."""
    rng, kind = np.random.default_rng(0), dtype_of(dtype)

    def drawn(rows: int, columns: int) -> NDArray[Any]:
        values = rng.standard_normal((rows, columns), np.float32) / np.float32(columns**0.5)
        found: NDArray[Any] = values.astype(kind)
        return found

    W, bias = drawn(width, width), drawn(1, width)[0]
    pairs = [(drawn(RANK, width), drawn(width, RANK)) for _ in range(ADAPTERS)]
    scaled = []
    for A, B in pairs:
        whole = W.astype(np.float32) + B.astype(np.float32) @ A.astype(np.float32)
        signs = rng.choice(np.array([-1, 1], np.float32), width)
        scaled.append(sgmv.Adapter(A, B, 1.0, signs * np.linalg.norm(whole, axis=1)))
    make = sgmv.AdapterStack.from_adapters
    stacks = {"plain": make(pairs), "dora": make(scaled, W=W)}
    return Layer(W, bias, {**stacks, "biased": make(scaled, W=W, bias=bias)})


def check(
    layer: Layer, name: str, y: NDArray[Any], x: NDArray[Any], ids: NDArray[np.int64]
) -> None:
    """Hold rows and columns at both ends and between of one call to the reference."""
    stack, rows = layer.stacks[name], spread(len(ids), CHECKED_ROWS)
    columns = spread(y.shape[1], CHECKED_COLUMNS)
    adapters = {}
    for i in np.unique(ids[rows]).tolist():
        adapter = stack[i]
        assert adapter is not None
        m = None if adapter.magnitude is None else adapter.magnitude[columns]
        adapters[i] = sgmv.Adapter(adapter.A, adapter.B[columns], adapter.scaling, m)
    operands = y[np.ix_(rows, columns)], x[rows], adapters, ids[rows]
    bias = layer.bias[columns] if name == "biased" else None
    expected = by_row.add_lora(*operands, W=layer.W[columns], bias=bias)
    bound = bounds.add_lora_bound(*operands, W=layer.W[columns], bias=bias, expected=expected)
    result = sgmv.add_lora(y.copy(), x, stack, sgmv.segment(ids))
    compare.check(result[np.ix_(rows, columns)], expected, bound, f"{name}, {len(ids)} rows")


def by_numpy(
    y: NDArray[Any], x: NDArray[Any], adapters: list[Any], segments: sgmv.Segments
) -> None:
    """PEFT's form of each adapter's rows; adapters are triples A, B, gain."""
    for s, i in enumerate(segments.adapter_ids.tolist()):
        A, B, gain = adapters[i]
        rows = segments.rows[segments.seq_start[s] : segments.seq_start[s + 1]]
        base = y[rows]
        y[rows] = base + ((gain - 1) * base + gain * ((x[rows] @ A.T) @ B.T))


def measure(dtype: str, rows: int, budget: Budget = BUDGET) -> DoraCase:
    """Check and time one batch. Raises Red if a result is wrong."""
    layer, rng = layer_of(dtype, H), np.random.default_rng(1)
    kind = dtype_of(dtype)
    x, y = (rng.standard_normal((rows, H), np.float32).astype(kind) for _ in range(2))
    ids = np.arange(rows) % ADAPTERS
    segments = sgmv.segment(ids)
    for name in layer.stacks:
        try:
            check(layer, name, y, x, ids)
        except AssertionError as error:
            raise Red("gate: RED, nothing was timed", error) from error
    forms: dict[str, Any] = {
        name: partial(sgmv.add_lora, x=x, stack=stack, adapter_ids=segments)
        for name, stack in layer.stacks.items()
    }
    if dtype == "float32":
        adapters = []
        for i in range(ADAPTERS):
            adapter = layer.stacks["dora"][i]
            assert adapter is not None
            assert adapter.magnitude is not None
            gain = np.sign(adapter.magnitude)
            adapters.append((adapter.A, adapter.B, gain))
        forms["numpy"] = partial(by_numpy, x=x, adapters=adapters, segments=segments)
    waits = rests(["numpy" if name == "numpy" else "sgmv" for name in forms])
    variants = [
        Variant(name, partial(form, y.copy()), settle_s=max(0.003, wait))
        for (name, form), wait in zip(forms.items(), waits, strict=True)
    ]
    times, foreign = time_quietly(variants, budget)
    return DoraCase(dtype, rows, segments.S, times, foreign)


def tables(record: DoraRecord) -> list[Table]:
    """A line per batch; times as shares of the plain call's."""
    lines = []
    for case in record.cases:
        plain = case.times["plain"]
        cells = [f"{plain.q50:.1f}"]
        for name in ("dora", "biased", "numpy"):
            its = case.times.get(name)
            cell = "-"
            if its is not None:
                cell = f"{its.q50 / plain.q50:.2f}x{undecided(interval((plain, its)))}"
            cells.append(cell)
        lines.append([case.dtype, str(case.rows), str(case.S), *cells])
    means = {
        name: geometric_mean(c.times[name].q50 / c.times["plain"].q50 for c in record.cases)
        for name in ("dora", "biased")
    }
    head = ["type", "n", "S", "plain us", "DoRA / plain", "with a bias / plain", "numpy / plain"]
    note = (
        f"geometric mean: DoRA {means['dora']:.3f}x, with a bias {means['biased']:.3f}x; "
        f"{record.threads} threads."
    )
    return [Table(head, lines, 3, [note])]


def run(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Measure every batch."""
    sgmv.set_num_threads(args.threads)
    cases = []
    for dtype in DTYPES:
        for rows in ROWS:
            console.print(f"  {dtype}, {rows} rows")
            cases.append(measure(dtype, rows))
    return {"threads": args.threads, "cases": cases}


def page(record: DoraRecord, name: str) -> str:
    """The table of docs/group-by-id.md, and where it comes from."""
    [table] = tables(record)
    head = f"{source(record)}; record: `benchmarks/records/{name}`."
    return f"{head}\n\n{table.markdown()}\n\n{table.notes[0]}"


STUDY = Study(
    "dora", __doc__, DoraRecord, run, tables, pages={("docs/group-by-id.md", "dora"): page}
)
