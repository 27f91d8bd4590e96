"""v -> y: every row of v times its adapter's B, added to y. The contract, checks and launch."""

from __future__ import annotations

import numpy as np

from sgmv.adapters import AdapterStack, SlotTable
from sgmv.checks import check_segments, check_stack, check_v, check_y
from sgmv.dtypes import Array, like, sum_dtype
from sgmv.kernels import loops
from sgmv.schedule import expand_tasks
from sgmv.segment import Integers, Segments
from sgmv.workers import get_num_threads, run


def expand(v: Array, stack: AdapterStack, segments: Segments, y: Array) -> Array:
    """Multiply every row of v by its adapter's B and add it to y, in place.

    Semantics: for segment s with adapter B of rank r and p in seq_start[s]:seq_start[s + 1]:
    `y[rows[p]] += scaling * (v[p, :r] @ B.T)`, rounded once. v[p, r:] is not read, base-only rows
    of y keep their bits.

    v         (n, any width >= the batch's highest rank)  float32 or float64, in sorted order
    stack     the layer's adapters
    segments  of the batch's n rows
    y         (n, h_out)  float32, float16, bfloat16 or float64; writable; any strides
    returns   y

    Raises ShapeError, DtypeError, MemoryLayoutError, UnknownAdapterError; y is then as it was.
    Source: Punica (arXiv 2310.18547), section 4; punica/ops/__init__.py, `sgmv` with h_in < h_out.

    >>> import sgmv
    >>> A, B = np.ones((1, 3), "float32"), np.array([[1], [10]], "float32")
    >>> stack = sgmv.AdapterStack.from_adapters({4: sgmv.Adapter(A, B, scaling=0.5)})
    >>> v = np.array([[0], [6]], "float32")
    >>> expand(v, stack, sgmv.segment([4, -1]), np.ones((2, 2), "float32"))
    array([[ 4., 31.],
           [ 1.,  1.]], dtype=float32)
    """
    check_stack(stack)
    check_segments(segments)
    check_y(y, segments.n, stack.h_out, "v", v)
    table = stack.table
    slot, rank = table.find(segments.adapter_ids)
    check_v(v, segments.n, int(rank.max(initial=0)))
    v = np.ascontiguousarray(v, sum_dtype(v.dtype, stack.dtype, y.dtype))
    launch(v, y, table, segments, slot, rank)
    return y


def launch(
    v: Array, y: Array, table: SlotTable, segments: Segments, slot: Integers, rank: Integers
) -> None:
    """Add to y's rows that have an adapter; arguments are checked, v is in the type of the sums."""
    dense = y
    if y.shape[1] > 1 and y.strides[1] != y.itemsize:
        dense = np.ascontiguousarray(y)
    h_out = y.shape[1]
    tasks, work = expand_tasks(segments.seq_start, slot, rank, h_out, get_num_threads())
    run(
        loops.expand,
        tasks,
        work * h_out,
        (dense, table),
        dense.ctypes.data + segments.rows * dense.strides[0],
        like(y.dtype),
        table.wb_address,
        like(table.dtype),
        h_out,
        table.scalings,
        v,
    )
    if dense is not y:
        changed = segments.rows[np.repeat(rank > 0, segments.lengths)]
        y[changed] = dense[changed]
