"""x, expert_ids -> products: every row times its experts' weights, read where they are stored."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from sgmv.checks import check_matrix, check_weights
from sgmv.dtypes import Array, promote, sum_dtype
from sgmv.errors import ShapeError
from sgmv.products import check_stacks, stack_of
from sgmv.products import shrink as products
from sgmv.segment import Segments, of_pairs, segment
from sgmv.tensors import as_array

ROWS_PLACED = 128  # at a time: what is rounded is in a cache when it is put in its place


def grouped_matmul(
    x: Array,
    W: Any,
    expert_ids: Segments | npt.ArrayLike,
    *,
    weights: npt.ArrayLike | None = None,
) -> Array:
    """Multiply every row by the matrices of its own experts.

    Semantics: `out[i, j] = x[i] @ W[expert_ids[i, j]].T`, for x (n, k, h_in) of `x[i, j]`; 0 for
    the id -1. With weights: `out[i] = sum over j of weights[i, j] * x[i] @ W[expert_ids[i, j]].T`.
    Products are summed in float32 (float64 if any operand is) and rounded once.

    x           (n, h_in), or (n, k, h_in), a row for each pair; float32, float16, bfloat16, float64
    W           (E, h_out, h_in)  numpy array or torch tensor on the CPU; read in place
    expert_ids  (n,) or (n, k) integers, or the `Segments` made of them once for all layers of a
                step
    weights     (n, k) finite numbers, a router's; left out, products are not added up
    returns     (n, h_out) for (n,) ids or with weights, else (n, k, h_out); in the smallest type
                that holds x and W; `Segments` of one id per row count as (n,)

    A row's result depends on that row and its own ids alone, to the bit.
    Raises ShapeError, DtypeError, UnknownAdapterError, ValueRangeError. Source: Mixtral (arXiv
    2401.04088), section 2; MegaBlocks (arXiv 2211.15841).

    >>> W = np.stack([np.eye(2, dtype="float32") * i for i in range(3)])
    >>> grouped_matmul(np.array([[1, 2], [3, 4]], "float32"), W, [2, 0])
    array([[2., 4.],
           [0., 0.]], dtype=float32)
    """
    if weights is None:
        out, _ = products_of(x, "W", W, expert_ids, rounded=True)
        return out if names_several(expert_ids) else out[:, 0]
    out = combined(*products_of(x, "W", W, expert_ids), weights)
    with np.errstate(over="ignore"):
        return out.astype(promote(x.dtype, as_array("W", W).dtype), copy=False)


def products_of(
    x: Array,
    argument: str,
    W: Any,
    expert_ids: Segments | npt.ArrayLike,
    rounded: bool = False,
) -> tuple[Array, Segments]:
    """(n, k, h_out), each pair's product in the type of the sums; and the ids' segments.

    rounded  to the smallest type that holds x and W
    """
    stack = stack_of(argument, W)
    pairs, batch, flat = pairs_of(x, expert_ids)
    check_stacks(pairs, [stack])
    if flat.shape[1] != stack.weights.inputs:
        raise ShapeError(
            "x", f"{stack.weights.inputs} columns, as {argument} has", str(x.shape),
            f"pass this layer's {argument}",
        )  # fmt: skip
    v = products(flat, (stack.weights,), batch, sum_dtype(flat.dtype, stack.weights.dtype))
    out = np.empty_like(v, promote(flat.dtype, stack.weights.dtype) if rounded else None)
    with np.errstate(over="ignore"):
        for p in range(0, len(v), ROWS_PLACED):
            some = slice(p, p + ROWS_PLACED)
            out[pairs.pairs[some]] = v[some]
    return out.reshape(pairs.n, pairs.k, v.shape[1]), pairs


def combined(out: Array, pairs: Segments, weights: npt.ArrayLike) -> Array:
    """(n, h_out), the weighted sum of (n, k, h_out), in the order of a row's places."""
    factors = check_weights(weights, pairs.n, pairs.k).astype(out.dtype)
    total = np.zeros((pairs.n, out.shape[2]), out.dtype)
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        for j in range(pairs.k):
            total += factors[:, j, np.newaxis] * out[:, j]
    return total


def pairs_of(x: Array, expert_ids: Segments | npt.ArrayLike) -> tuple[Segments, Segments, Array]:
    """The ids' segments; the same as they read x's rows; x as a matrix, of rows or of pairs."""
    pairs = expert_ids if isinstance(expert_ids, Segments) else segment(expert_ids)
    shape: tuple[int, ...] = getattr(x, "shape", ())
    apart = len(shape) == 3
    rows = (pairs.n, pairs.k) if apart else (pairs.n,)
    if shape and shape[: len(rows)] != rows:
        raise ShapeError(
            "x", f"shape ({', '.join(map(str, rows))}, h_in)", str(shape), "pass a row for each id"
        )
    if not apart:
        return pairs, pairs, check_matrix("x", x)
    return (
        pairs,
        of_pairs(pairs, share_x=False),
        check_matrix("x", x.reshape(pairs.n * pairs.k, shape[2])),
    )


def names_several(expert_ids: Segments | npt.ArrayLike) -> bool:
    """Whether the ids are (n, k)."""
    if isinstance(expert_ids, Segments):
        return expert_ids.k > 1
    return np.ndim(expert_ids) == 2
