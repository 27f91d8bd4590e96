"""sgmv.compat.vllm against what vLLM's CPU operations do, by the same calls on the same operands.

    python -m benchmarks compat            check, timings, peak memory, table; about two minutes
    python -m benchmarks compat --record   the same, into benchmarks/records/, to commit

vLLM's form gathers a weight for every row, casts it, and multiplies with einsum: written here from
that description, in numpy and, where torch is there, in torch. Both sides get the same stacked
weights, indices and outputs. Three calls of a layer 4096 -> 16 -> 4096: shrink into float32,
expand, and a qkv layer of 4096, 1024 and 1024 columns, which is three of each.

Peak memory: the largest resident set during one call less what was resident before it, from
/proc/self/status (VmHWM, set back through /proc/self/clear_refs, freed memory trimmed first); the
system counts in steps of some 100 KiB. Elsewhere it is left out.
"""

from __future__ import annotations

import argparse
import ctypes
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import geometric_mean
from typing import Any, ClassVar

import msgspec
import numpy as np
from numpy.typing import NDArray

import sgmv
from benchmarks.batch import dtype_of, in_library, installed_kinds, popularity_ids
from benchmarks.clock import Budget, Variant, interval, time_quietly
from benchmarks.gate import spread
from benchmarks.peers import rests
from benchmarks.record import Head, Times, source
from benchmarks.study import Study
from benchmarks.text import Console, Table, undecided
from reference import bounds, by_row, compare
from reference.workloads import POPULARITIES
from sgmv.compat import vllm
from sgmv.console import Parser, at_least
from sgmv.tensors import as_array

H, RANK = 4096, 16
QKV = (4096, 1024, 1024)
ROWS = (1, 8, 64, 512)
MOST_LORAS = 64  # stacked; rows that are all distinct are no more than these
CHECKED_ROWS = 5
LEAST_SETTLE_S = 0.003
BUDGET = Budget(rounds=3, turn_s=0.03)
GOAL, GOAL_ROWS = 5.0, 64  # times as fast as vLLM's form, from so many rows on
CALLS = ("shrink", "expand", "qkv")


class CompatCase(msgspec.Struct, forbid_unknown_fields=True):
    """One call on one batch. `times`, `peak_bytes`: of "vllm" (gather + einsum) and of "sgmv"."""

    library: str
    dtype: str
    call: str
    rows: int
    popularity: str
    S: int
    times: dict[str, Times]
    peak_bytes: dict[str, int] | None
    foreign_cores: float | None


class CompatRecord(Head):
    """One run of this file."""

    STUDY: ClassVar[str] = "compat"
    threads: int
    h: int
    rank: int
    qkv: list[int]
    weights: str
    cases: list[CompatCase]


@dataclass(frozen=True)
class Operands:
    """A batch's operands, each of the library whose calls are timed."""

    library: Any  # numpy or torch
    ids: Any  # (n,)
    x: Any  # (n, H)
    v: Any  # (n, RANK) float32
    y: Any  # (n, sum of QKV)
    A: Sequence[Any]  # of each slice (loras, 1, RANK, H)
    B: Sequence[Any]  # of each slice (loras, 1, its columns, RANK)
    wrapper: vllm.PunicaWrapper


def gather_shrink(o: Operands, A: Any, out: Any) -> None:
    """A weight gathered for each row and cast to the output's type."""
    weights = _cast(A[o.ids], out.dtype).squeeze(1)
    out[:] = o.library.einsum("bi,boi->bo", _cast(o.x, out.dtype), weights)


def gather_expand(o: Operands, v: Any, B: Any, out: Any) -> None:
    """The same of B; v is cast, too."""
    weights = _cast(B[o.ids], out.dtype).squeeze(1)
    out += o.library.einsum("bi,boi->bo", _cast(v, out.dtype), weights)


def gather_qkv(o: Operands) -> None:
    """Slice by slice, with a float32 buffer for each, as `PunicaWrapperCPU.add_lora_linear`."""
    start = 0
    for A, B, width in zip(o.A, o.B, QKV, strict=True):
        v = o.library.zeros((len(o.ids), RANK), dtype=o.library.float32)
        gather_shrink(o, A, v)
        gather_expand(o, v, B, o.y[:, start : start + width])
        start += width


def _cast(operand: Any, dtype: Any) -> Any:
    """Without a copy where it has the type already."""
    if isinstance(operand, np.ndarray):
        return operand.astype(dtype, copy=False)
    return operand.to(dtype=dtype)


def forms(o: Operands) -> dict[str, dict[str, Callable[[], None]]]:
    """Each call in both forms."""
    piece = o.y[:, :H]
    return {
        "shrink": {
            "vllm": partial(gather_shrink, o, o.A[0], o.v),
            "sgmv": partial(vllm.bgmv_shrink, o.x, o.A[0], o.v, o.ids),
        },
        "expand": {
            "vllm": partial(gather_expand, o, o.v, o.B[0], piece),
            "sgmv": partial(vllm.bgmv_expand, o.v, o.B[0], piece, o.ids),
        },
        "qkv": {
            "vllm": partial(gather_qkv, o),
            "sgmv": partial(o.wrapper.add_lora_linear, o.y, o.x, o.A, o.B, 1.0, QKV),
        },
    }


def stacks(library: str, dtype: str) -> tuple[list[Any], list[Any]]:
    """A and B of the three slices, in the library's own arrays."""
    rng = np.random.Generator(np.random.SFC64(0))

    def drawn(*shape: int) -> Any:
        values = rng.standard_normal(shape, np.float32) / np.float32(np.sqrt(shape[-1]))
        return in_library(library, values.astype(dtype_of(dtype)))

    loras = MOST_LORAS, 1
    return [drawn(*loras, RANK, H) for _ in QKV], [drawn(*loras, width, RANK) for width in QKV]


def operands(
    library: str, dtype: str, A: Sequence[Any], B: Sequence[Any], ids: NDArray[np.int64]
) -> Operands:
    """A batch over these stacks."""
    rng = np.random.Generator(np.random.SFC64(len(ids)))
    x, y = (
        in_library(
            library, rng.standard_normal((len(ids), width), np.float32).astype(dtype_of(dtype))
        )
        for width in (H, sum(QKV))
    )
    v = in_library(library, rng.standard_normal((len(ids), RANK), np.float32))
    wrapper = vllm.PunicaWrapper(len(ids), len(ids))
    mapping = vllm.LoRAMapping((ids + 1).tolist(), (), is_prefill=True)
    wrapper.update_metadata(mapping, list(range(1, MOST_LORAS + 1)), MOST_LORAS)
    module: Any = np
    if library == "torch":
        import torch

        torch.set_num_threads(sgmv.get_num_threads())
        module = torch
    return Operands(module, in_library(library, ids), x, v, y, A, B, wrapper)


def check(o: Operands) -> None:
    """Hold rows at both ends and between to the reference: wrong results are not timed."""
    ids = as_array("ids", o.ids)
    rows = spread(len(ids), CHECKED_ROWS)
    x, y = as_array("x", o.x)[rows], as_array("y", o.y)[rows].copy()
    whole = as_array("y", o.y).copy()
    forms(o)["qkv"]["sgmv"]()
    start = 0
    for A, B, width in zip(o.A, o.B, QKV, strict=True):
        columns = slice(start, start + width)
        pairs = {
            int(i): (as_array("A", A)[i, 0], as_array("B", B)[i, 0]) for i in np.unique(ids[rows])
        }
        expected = by_row.add_lora(y[:, columns], x, pairs, ids[rows])
        bound = bounds.add_lora_bound(y[:, columns], x, pairs, ids[rows], expected=expected)
        compare.check(as_array("y", o.y)[rows][:, columns], expected, bound, f"{len(ids)} rows")
        start += width
    as_array("y", o.y)[:] = whole


def peak_bytes(call: Callable[[], None]) -> int | None:
    """Resident memory at its highest during the call, less that before it; this file's head."""
    clear, status = Path("/proc/self/clear_refs"), Path("/proc/self/status")
    try:
        ctypes.CDLL(None).malloc_trim(0)
        clear.write_text("5")
        before = _kibibytes(status, "VmRSS")
        call()
        return max(0, _kibibytes(status, "VmHWM") - before) << 10
    except (OSError, AttributeError):
        return None


def _kibibytes(status: Path, field: str) -> int:
    (line,) = (line for line in status.read_text().splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1])


def measure(
    library: str, dtype: str, rows: Sequence[int], calls: Sequence[str], budget: Budget = BUDGET
) -> list[CompatCase]:
    """Every call on every batch of these rows."""
    A, B = stacks(library, dtype)
    found: list[CompatCase] = []
    for n in rows:
        for popularity in POPULARITIES if n > 1 else POPULARITIES[:1]:
            if popularity == "distinct" and n > MOST_LORAS:
                continue
            ids = popularity_ids(popularity, n, seed=0)
            o = operands(library, dtype, A, B, ids)
            check(o)
            for name in calls:
                found.append(_timed(library, dtype, popularity, name, forms(o)[name], ids, budget))
    return found


def _timed(
    library: str,
    dtype: str,
    popularity: str,
    call: str,
    both: Mapping[str, Callable[[], None]],
    ids: NDArray[np.int64],
    budget: Budget,
) -> CompatCase:
    # numpy's einsum has no threads that go on spinning, as its products have.
    spins = {"vllm": "torch"} if library == "torch" else {}
    waits = rests([spins.get(name, "sgmv") for name in both])
    turns = [
        Variant(name, form, settle_s=max(LEAST_SETTLE_S, wait))
        for (name, form), wait in zip(both.items(), waits, strict=True)
    ]
    times, foreign = time_quietly(turns, budget)
    peaks = {name: peak_bytes(form) for name, form in both.items()}
    known = {name: peak for name, peak in peaks.items() if peak is not None}
    return CompatCase(
        library, dtype, call, len(ids), popularity, len(np.unique(ids)), times,
        known if len(known) == len(peaks) else None, foreign,
    )  # fmt: skip


def ratio(case: CompatCase) -> float:
    """How many times as long vLLM's form takes."""
    return case.times["vllm"].q50 / case.times["sgmv"].q50


def tables(record: CompatRecord) -> list[Table]:
    """A line for each call and number of rows; ratios over the popularities."""
    cases = record.cases
    kinds = list(dict.fromkeys((case.library, case.dtype) for case in cases))
    heads = [f"{library} {dtype}" for library, dtype in kinds]
    rows = []
    for call in dict.fromkeys(case.call for case in cases):
        for n in dict.fromkeys(case.rows for case in cases):
            same = [case for case in cases if (case.call, case.rows) == (call, n)]
            cells = []
            for kind in kinds:
                its = [c for c in same if (c.library, c.dtype) == kind]
                cells.append(_ratios(its) if its else "-")
            rows.append([call, str(n), *cells, _peaks(same, kinds[-1])])
    return [Table(["call", "rows", *heads, "peak MiB"], rows, 1, (*legend(record), below(record)))]


def _ratios(cases: Sequence[CompatCase]) -> str:
    """Geometric mean and worst; a mark where the interval spans 1."""
    pairs = [(case.times["sgmv"], case.times["vllm"]) for case in cases]
    worst = min(cases, key=ratio)
    mark = undecided(interval((worst.times["sgmv"], worst.times["vllm"])))
    mean = f"{geometric_mean(map(ratio, cases)):.3g}x{undecided(interval(*pairs))}"
    return f"{mean} ({ratio(worst):.3g}x{mark})"


def legend(record: CompatRecord) -> list[str]:
    last = record.cases[-1]
    return [
        f"{source(record)}: vLLM's form / sgmv, geometric mean and worst over the popularities, "
        "above 1 sgmv is faster; and the peak memory of a call in MiB, vLLM's form and sgmv, of "
        f"{last.library} {last.dtype} and the popularity that needs most."
    ]


def below(record: CompatRecord) -> str:
    """The cases that miss the goal, each with the rate at which it reads its weights."""
    late = [case for case in record.cases if case.rows >= GOAL_ROWS and ratio(case) < GOAL]
    told = [
        f"{case.library} {case.dtype} {case.call}, {case.rows} {case.popularity} "
        f"rows: {ratio(case):.3g}x, {weight_bytes(record, case) / 1e6:.3g} MB of weights at "
        f"{weight_bytes(record, case) / case.times['sgmv'].q50 / 1e3:.0f} GB/s"
        for case in late
    ]
    return f"Below {GOAL:g}x from {GOAL_ROWS} rows on: {'; '.join(told) or 'none'}."


def page(record: CompatRecord, _name: str) -> str:
    """The table of docs/engines.md, between what its figures are and what misses the goal."""
    return "\n".join([*legend(record), "", tables(record)[0].markdown(), "", below(record)])


def weight_bytes(record: CompatRecord, case: CompatCase) -> int:
    """What the call's weights take, each segment's once."""
    h, qkv = record.h, record.qkv
    widths = len(qkv) * h + sum(qkv) if case.call == "qkv" else h
    return case.S * record.rank * widths * dtype_of(case.dtype).itemsize


def _peaks(cases: Sequence[CompatCase], kind: tuple[str, str]) -> str:
    known = [
        case.peak_bytes for case in cases if (case.library, case.dtype) == kind and case.peak_bytes
    ]
    if not known:
        return "-"
    return " and ".join(
        f"{max(peak[name] for peak in known) / 2**20:.1f}" for name in ("vllm", "sgmv")
    )


def arguments(parser: Parser) -> None:
    parser.add_argument("--rows", nargs="+", type=at_least(1), default=ROWS)
    parser.add_argument("--calls", nargs="+", choices=CALLS, default=CALLS)


def run(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Measure every call on every batch, with each library that is here."""
    sgmv.set_num_threads(args.threads)
    cases: list[CompatCase] = []
    for library, dtype in installed_kinds(console):
        cases += measure(library, dtype, args.rows, args.calls)
    return {
        "threads": args.threads, "h": H, "rank": RANK, "qkv": list(QKV), "weights": "hot",
        "cases": cases,
    }  # fmt: skip


STUDY = Study(
    "compat", __doc__, CompatRecord, run, tables, arguments,
    whole=lambda args: (tuple(args.rows), tuple(args.calls)) == (ROWS, CALLS),
    pages={("docs/engines.md", "compat"): page},
)  # fmt: skip
