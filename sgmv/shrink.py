"""x -> v: every row times its adapter's A. The contract, the checks and the launch."""

from __future__ import annotations

import numpy as np

from sgmv.adapters import AdapterStack, SlotTable
from sgmv.checks import check_segments, check_stack, check_x
from sgmv.dtypes import Array, like, sum_dtype
from sgmv.kernels import loops
from sgmv.schedule import shrink_tasks
from sgmv.segment import Integers, Segments
from sgmv.workers import get_num_threads, run


def shrink(x: Array, stack: AdapterStack, segments: Segments) -> Array:
    """Multiply every row by its adapter's A: the first half of a LoRA delta.

    Semantics: for segment s with adapter A of rank r and p in seq_start[s]:seq_start[s + 1]:
    `v[p, :r] = x[rows[p]] @ A.T`, and `v[p, r:] = 0`. Base-only rows are 0 throughout.

    x         (n, h_in)  float32, float16, bfloat16 or float64; any strides; not changed
    stack     the layer's adapters
    segments  of the batch's n rows
    returns   v (n, stack.max_rank), in sorted order: float32, or float64 if x or the weights are

    Raises ShapeError, DtypeError, UnknownAdapterError.
    Source: Punica (arXiv 2310.18547), section 4; punica/ops/__init__.py, `sgmv` with h_in > h_out.

    >>> import sgmv
    >>> A, B = np.ones((1, 3), "float32"), np.ones((2, 1), "float32")
    >>> stack = sgmv.AdapterStack.from_adapters({4: (A, B)})
    >>> x = np.array([[1, 2, 3], [4, 5, 6]], "float32")
    >>> shrink(x, stack, sgmv.segment([4, -1]))
    array([[0.],
           [6.]], dtype=float32)
    """
    check_stack(stack)
    check_segments(segments)
    check_x(x, segments.n, stack.h_in)
    table = stack.table
    slot, rank = table.find(segments.adapter_ids)
    v = np.zeros((segments.n, stack.max_rank), sum_dtype(x.dtype, stack.dtype))
    launch(v, x, table, segments, slot, rank)
    return v


def launch(
    v: Array, x: Array, table: SlotTable, segments: Segments, slot: Integers, rank: Integers
) -> None:
    """Write v[p, :rank] of every row that has an adapter; arguments are checked already."""
    if x.shape[1] > 1 and x.strides[1] != x.itemsize:
        x = np.ascontiguousarray(x)
    h_in = x.shape[1]
    tasks, work = shrink_tasks(segments.seq_start, slot, rank, get_num_threads())
    run(
        loops.shrink,
        tasks,
        work * h_in,
        (x, table),
        x.ctypes.data + segments.rows * x.strides[0],
        like(x.dtype),
        table.wa_address,
        like(table.dtype),
        h_in,
        v,
    )
