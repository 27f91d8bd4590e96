"""x -> v: every row times its adapter's A. The contract, the checks and the launch."""

from __future__ import annotations

import numpy as np

from sgmv.backend import kernels
from sgmv.checks import check_x
from sgmv.dtypes import Array, sum_dtype
from sgmv.launch import run_shrink
from sgmv.segment import Segments, check_segments
from sgmv.stack import AdapterStack, check_stack


def shrink(
    x: Array, stack: AdapterStack, segments: Segments, *, backend: str | None = None
) -> Array:
    """Multiply every row by its adapter's A: the first half of a LoRA delta.

    Semantics: for segment s with adapter A of rank r and p in seq_start[s]:seq_start[s + 1]:
    `v[p, :r] = x[rows[p]] @ A.T`, and `v[p, r:] = 0`. Base-only rows are 0 throughout.

    x         (n, h_in)  float32, float16, bfloat16 or float64; any strides; not changed
    stack     the layer's adapters
    segments  of the batch's n rows
    backend   "amx", "tiles" or "loops"; the first of these that can, if left out
    returns   v (m, stack.max_rank), in sorted order: float32, or float64 if x or the weights are;
              m = n, or n * k if rows name k adapters

    Raises ShapeError, DtypeError, UnknownAdapterError, ValueRangeError for a backend that cannot.
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
    v = np.zeros((len(segments.rows), stack.max_rank), sum_dtype(x.dtype, stack.dtype))
    run_shrink(kernels(backend, x.dtype, stack.dtype, None), stack.table, segments, x, v)
    return v
