"""The definition: a per-row loop in float64. What these functions return is what is right."""

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from reference.arguments import (
    Adapters,
    Scaling,
    checked,
    factors,
    matrix,
    scaled_rows,
    used_adapters,
)

Result = NDArray[np.float64]


def _delta(x: Result, A: Result, B: Result, scaling: float) -> Result:
    v: Result = (A * x).sum(axis=1)  # (r,)
    return np.asarray(scaling * (B * v).sum(axis=1))  # (h_out,)


def gain(A: Result, B: Result, scaling: float, magnitude: Result, W: Result) -> Result:
    """DoRA's factor of each output: magnitude over the length of that row of W + scaling * B @ A.

    A (r, h_in), B (h_out, r), magnitude (h_out,), W (h_out, h_in), float64 -> (h_out,).
    Source: DoRA (Liu et al. 2024), equation 5; peft, lora/dora.py.

    >>> gain(np.zeros((0, 2)), np.zeros((1, 0)), 1.0, np.array([10.0]), np.array([[3.0, 4.0]]))
    array([2.])
    """
    whole = W + scaling * (B @ A)
    with np.errstate(invalid="ignore", divide="ignore"):
        found: Result = magnitude / np.sqrt((whole * whole).sum(axis=1))
    return found


def lora_delta(x: ArrayLike, A: ArrayLike, B: ArrayLike, scaling: float) -> Result:
    """One adapter's low-rank delta for every row.

    Semantics: `out[i] = scaling * (B @ (A @ x[i]))`
    x (n, h_in), A (r, h_in), B (h_out, r), any float type -> (n, h_out) float64.
    Raises: ValueError on shapes that do not fit. Source: LoRA (Hu et al. 2021), equation 3.

    >>> lora_delta([[1.0, 2.0]], A=[[1.0, 1.0]], B=[[1.0], [10.0]], scaling=2.0)
    array([[ 6., 60.]])
    """
    x = matrix(x, "x")
    adapter = checked(A, B, scaling, h_in=x.shape[1], h_out=None)
    nothing = np.zeros((len(x), len(adapter.B)))
    return add_lora(nothing, x, [adapter], np.zeros(len(x), np.int64))


@np.errstate(invalid="ignore", over="ignore")  # NaN and inf are inputs like any other
def add_lora(
    y: ArrayLike,
    x: ArrayLike,
    adapters: Adapters,
    adapter_ids: ArrayLike,
    scalings: Scaling = None,
    *,
    weights: ArrayLike | None = None,
    W: ArrayLike | None = None,
    bias: ArrayLike | None = None,
) -> Result:
    """The sum of y and each row's own delta, as a new array; y itself never changes.

    Semantics: `out[i] = y[i] + lora_delta(x[i:i+1], *adapters[adapter_ids[i]])[0]`,
    and exactly `y[i]` where adapter_ids[i] is -1 or its adapter is None. Of k ids per row:
    `out[i] = y[i] + sum over j of weights[i, j] * lora_delta(..., adapters[adapter_ids[i, j]])`.
    y (n, h_out), x (n, h_in), adapter_ids (n,) or (n, k) integers; adapters: mapping or sequence
    of (A, B), Adapter or None; scalings: mapping, sequence, one number, or None = each adapter's
    own, 1.0 for a plain (A, B); weights as adapter_ids, or None = 1 -> (n, h_out) float64.
    Rows of an Adapter with a magnitude: `out[i] = g * (y[i] + delta) + (1 - g) * bias`, with the
    base layer's W (h_out, h_in) and bias (h_out,) and `g = gain(A, B, scaling, magnitude, W)`.
    Raises: ValueError naming the id, shape, scaling or weight. Source: Punica (2023), section 4.

    >>> add_lora([[1.0], [1.0]], [[2.0], [2.0]], {7: ([[3.0]], [[1.0]])}, [7, -1], 0.5)
    array([[4.],
           [1.]])
    >>> add_lora([[1.0]], [[2.0]], {7: ([[3.0]], [[1.0]])}, [[7, 7]], weights=[[0.5, 1.0]])
    array([[10.]])
    """
    y = matrix(y, "y")
    x = matrix(x, "x", rows=len(y))
    ids, chosen = used_adapters(adapters, adapter_ids, scalings, x.shape[1], y.shape[1], len(y))
    in_float64: dict[int, Any] = {
        adapter_id: (adapter.A.astype(np.float64), adapter.B.astype(np.float64), adapter.scaling)
        for adapter_id, adapter in chosen.items()
        if adapter
    }
    out = y.astype(np.float64)
    of_pair = factors(weights, ids)
    for pair in np.ndindex(ids.shape):
        if ids[pair] in in_float64:
            delta = _delta(x[pair[0]].astype(np.float64), *in_float64[int(ids[pair])])
            out[pair[0]] += of_pair[pair] * delta
    rows_of, W, bias = scaled_rows(ids, chosen, weights, W, bias, (y.shape[1], x.shape[1]))
    for adapter_id, rows in rows_of.items():
        A, B, scaling = in_float64[adapter_id]
        magnitude = np.asarray(getattr(chosen[adapter_id], "magnitude", None), np.float64)
        g = gain(A, B, scaling, magnitude, W.astype(np.float64))
        out[rows] = g * out[rows]
        if bias is not None:
            out[rows] += (1 - g) * bias.astype(np.float64)
    return out


@np.errstate(invalid="ignore", over="ignore")
def apply_batched(
    x: ArrayLike,
    W: ArrayLike,
    adapters: Adapters,
    adapter_ids: ArrayLike,
    scalings: Scaling = None,
    *,
    weights: ArrayLike | None = None,
) -> Result:
    """The shared base product plus each row's own delta.

    Semantics: `out[i] = W @ x[i] + lora_delta(x[i:i+1], *adapters[adapter_ids[i]])[0]`
    x (n, h_in), W (h_out, h_in), the rest as in `add_lora` -> (n, h_out) float64.
    Raises: ValueError as `add_lora`. Source: Punica (Chen et al. 2023), section 4.

    >>> apply_batched([[1.0], [2.0]], [[10.0]], [([[1.0]], [[1.0]])], [0, -1])
    array([[11.],
           [20.]])
    """
    x = matrix(x, "x")
    W = matrix(W, "W", columns=x.shape[1]).astype(np.float64)
    base = [(W * x_i).sum(axis=1) for x_i in x.astype(np.float64)]
    y = np.reshape(base, (len(x), len(W)))
    return add_lora(y, x, adapters, adapter_ids, scalings, weights=weights, W=W)


def apply_single(
    x: ArrayLike,
    W: ArrayLike,
    A: ArrayLike,
    B: ArrayLike,
    scaling: float,
    magnitude: ArrayLike | None = None,
) -> Result:
    """The base product plus one adapter's delta for every row.

    Semantics: `out[i] = W @ x[i] + scaling * (B @ (A @ x[i]))`, times `gain` with a magnitude.
    W (h_out, h_in), the rest, errors and source as in `lora_delta` -> (n, h_out) float64.

    >>> apply_single([[1.0]], [[10.0]], A=[[1.0]], B=[[2.0]], scaling=3.0)
    array([[16.]])
    """
    x = matrix(x, "x")
    adapter = checked(A, B, scaling, h_in=x.shape[1], h_out=None, magnitude=magnitude)
    return apply_batched(x, W, [adapter], np.zeros(len(x), np.int64))
