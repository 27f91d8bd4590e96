"""v -> y: every row of v times its adapter's B, added to y. The contract, checks and launch."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from sgmv.backend import kernels
from sgmv.checks import check_matrix, check_v, check_y
from sgmv.dora import check_alone
from sgmv.dtypes import Array, sum_dtype
from sgmv.launch import run_expand
from sgmv.segment import Segments, check_segments, times_weights, weighted
from sgmv.stack import AdapterStack, check_stack


def expand(
    v: Array,
    stack: AdapterStack,
    segments: Segments,
    y: Array,
    *,
    weights: npt.ArrayLike | None = None,
    backend: str | None = None,
) -> Array:
    """Multiply every row of v by its adapter's B and add it to y, in place.

    Semantics: for segment s with adapter B of rank r and p in seq_start[s]:seq_start[s + 1]:
    `y[rows[p]] += scaling * (v[p, :r] @ B.T)`, rounded once. v[p, r:] is not read, base-only rows
    of y keep their bits. With weights, v[p] is multiplied by that of its pair first. Rows of an
    adapter with magnitudes (DoRA) are then multiplied by its gains, as in `add_lora`.

    v         (m, any width >= the batch's highest rank)  float32 or float64, in sorted order
    stack     the layer's adapters
    segments  of the batch's n rows
    y         (n, h_out)  float32, float16, bfloat16 or float64; writable; any strides
    weights   (n, k) finite numbers, used as float32; 1, if left out
    backend   "amx", "tiles" or "loops"; the first of these that can, if left out
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
    rank = stack.max_rank
    if check_matrix("v", v).shape[1] < rank:  # the batch may do with less
        _slot, ranks = table.find(segments.adapter_ids)
        rank = int(ranks.max(initial=0))
    check_v(v, len(segments.rows), rank)
    v = np.ascontiguousarray(v, sum_dtype(v.dtype, stack.dtype, y.dtype))
    check_alone(table, weighted(segments, weights))
    if weights is not None:
        v = times_weights(v, segments, weights)
    run_expand(kernels(backend, None, stack.dtype, y.dtype, v.dtype), table, segments, v, y)
    return y
