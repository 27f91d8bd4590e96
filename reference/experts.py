"""Layers of experts in float64, one pair of (row, expert) at a time, and how far one may be.

The kernel: products in float32 (float64 if any operand is) as in bounds.py; silu of the gate by an
exponential with an error of 4 u; the rest in the same type; one rounding at the end.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from reference import bounds, by_row
from reference.floats import float_type, sum_dtype

Result = NDArray[np.float64]


class Factors(NamedTuple):
    """An adapter on one of a layer's products: A (E, r, in), B (E, out, r), and its scaling."""

    A: NDArray[Any]
    B: NDArray[Any]
    scaling: float


Adapters = Mapping[int, Factors | None]


@np.errstate(invalid="ignore", over="ignore", under="ignore")
def moe_layer(
    x: NDArray[Any],
    expert_ids: ArrayLike,
    weights: ArrayLike,
    W13: NDArray[Any],
    W2: NDArray[Any],
    adapters13: Adapters | None = None,
    adapters2: Adapters | None = None,
    adapter_ids: ArrayLike | None = None,
) -> tuple[Result, Result]:
    """A layer of SwiGLU experts, and the largest |actual - result| of a correct one.

    Semantics: `out[i] = sum over j of weights[i, j] * W2[e] @ (silu(gate) * up)`, e =
    expert_ids[i, j], gate and up the halves of `W13[e] @ x[i]`; both products with the delta of
    adapter_ids[i] on expert e. -1 is no expert, and no adapter.

    With errors d_g, d_u of gate and up by `bounds.apply_batched_bound`, as |silu'| <= 1.1:
        inner   |silu(g)| d_u + 1.1 d_g (|u| + d_u) + 8 u (...)      8: 4 of exp, 1 + e, /, *
        down    (|W2| + |s| |B2| |A2|) d_inner, and the product's own bound at |inner| + d_inner
        sum     k + 1 roundings of sum |w_j| (|out_j| + d_j)
    -> (n, hidden) float64, twice.
    """
    ids, factor = np.asarray(expert_ids), np.asarray(weights, np.float64)
    of_row = [-1] * len(x) if adapter_ids is None else np.asarray(adapter_ids).tolist()
    kind = np.dtype(sum_dtype(x, W13, W2))
    u = float_type(kind).unit_roundoff
    out, size, error = (np.zeros((len(x), W2.shape[1])) for _ in range(3))
    for i, j in np.ndindex(ids.shape):
        e = int(ids[i, j])
        if e < 0:
            continue
        first = _of_expert(adapters13, of_row[i], e), _of_expert(adapters2, of_row[i], e)
        g_u, d = _product(x[i : i + 1], W13[e], first[0], kind)
        (g, up), (d_g, d_up) = np.split(g_u, 2), np.split(d, 2)
        gate = g / (1 + np.exp(-g))
        inner = gate * up
        d_inner = np.abs(gate) * d_up + 1.1 * d_g * (np.abs(up) + d_up)
        d_inner += 8 * u * (np.abs(inner) + d_inner) + float_type(kind).smallest_normal * (
            1 + np.abs(up)
        )
        exact, _ = _product(inner[np.newaxis], W2[e], first[1], np.dtype(np.float64))
        most = np.nextafter((np.abs(inner) + d_inner).astype(kind), kind.type(np.inf))
        _, d_out = _product(most[np.newaxis], W2[e], first[1], kind)
        carried, _ = _product(
            d_inner[np.newaxis], np.abs(W2[e].astype(np.float64)), _absolute(first[1]),
            np.dtype(np.float64),
        )  # fmt: skip
        out[i] += factor[i, j] * exact
        size[i] += abs(factor[i, j]) * (np.abs(exact) + d_out + carried)
        error[i] += abs(factor[i, j]) * (d_out + carried)
    error += bounds.gamma(ids.shape[1] + 1, u) * size
    stored = float_type(x.dtype)
    if stored.unit_roundoff > u:
        error += stored.unit_roundoff * np.maximum(np.abs(out) + error, stored.smallest_normal)
    return out, np.where(np.isfinite(out), error * (1 + 1e-9), 0.0)


def _of_expert(adapters: Adapters | None, adapter_id: int, e: int) -> Factors | None:
    found = None if adapters is None or adapter_id < 0 else adapters[adapter_id]
    return None if found is None else Factors(found.A[e], found.B[e], found.scaling)


def _absolute(its: Factors | None) -> Factors | None:
    if its is None:
        return None
    A, B = (np.abs(each.astype(np.float64)) for each in its[:2])
    return Factors(A, B, abs(its.scaling))


def _product(
    x: NDArray[Any], W: NDArray[Any], its: Factors | None, out: np.dtype[Any]
) -> tuple[Result, Result]:
    """One row's product with W and its delta, and the bound of both."""
    pair: Any = {0: None if its is None else (its.A, its.B)}
    scalings = {0: 1.0 if its is None else its.scaling}
    result = by_row.apply_batched(x, W, pair, [0], scalings)
    bound = bounds.apply_batched_bound(x, W, pair, [0], scalings, out=out, expected=result)
    return result[0], bound[0]
