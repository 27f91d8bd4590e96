"""The same four results another way: gather zero-padded stacks by row, then einsum.

Shares no arithmetic with by_row.py (there one row's products and numpy's pairwise sum, here
einsum's loops over blocks of rows), so that a mistake in one shows as a difference between them.
"""

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

# A gathered block of weights stays below 32 MiB, so that large batches fit any machine.
_BLOCK_ELEMENTS = 1 << 22


@np.errstate(invalid="ignore", over="ignore")
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

    Semantics: `v = einsum("nk,njk->nj", x, A[slot])`, `out = y + scaling * einsum("nj,nij->ni",
    v, B[slot])`, and exactly y on base-only rows. Arguments, errors: as `by_row.add_lora`.
    Source: the gather form of vLLM's CPU operations, with ranks kept true by a mask.

    >>> add_lora([[1.0], [1.0]], [[2.0], [2.0]], {7: ([[3.0]], [[1.0]])}, [7, -1], 0.5)
    array([[4.],
           [1.]])
    """
    y = matrix(y, "y")
    x = matrix(x, "x", rows=len(y))
    h_in, h_out = x.shape[1], y.shape[1]
    ids, chosen = used_adapters(adapters, adapter_ids, scalings, h_in, h_out, len(y))
    stacked = [(id_, adapter) for id_, adapter in chosen.items() if adapter is not None]
    out = y.astype(np.float64)
    if not stacked:
        return out
    ranks = np.array([len(adapter.A) for _, adapter in stacked])
    A_stack = np.zeros((len(stacked), ranks.max(), h_in))
    B_stack = np.zeros((len(stacked), h_out, ranks.max()))
    for slot, (_, adapter) in enumerate(stacked):
        A_stack[slot, : ranks[slot]] = adapter.A.astype(np.float64)
        B_stack[slot, :, : ranks[slot]] = adapter.B.astype(np.float64)
    scaling = np.array([adapter.scaling for _, adapter in stacked])
    slot_of = {id_: slot for slot, (id_, _) in enumerate(stacked)}
    slots = np.array([slot_of.get(id_, -1) for id_ in ids.ravel().tolist()], np.int64)
    of_pair = factors(weights, ids).ravel()
    row_of = np.repeat(np.arange(len(y)), ids.size // max(len(y), 1))

    adapted = np.flatnonzero(slots >= 0)
    block = max(1, _BLOCK_ELEMENTS // max(1, ranks.max() * max(h_in, h_out)))
    for start in range(0, len(adapted), block):
        pairs = adapted[start : start + block]
        of_row, rows = slots[pairs], row_of[pairs]
        v = np.einsum("nk,njk->nj", x[rows].astype(np.float64), A_stack[of_row])
        # In the padding an inf in x has met a zero: that NaN belongs to no rank of this adapter.
        v = np.where(np.arange(ranks.max()) < ranks[of_row, None], v, 0.0)
        factor = (scaling[of_row] * of_pair[pairs])[:, None]
        np.add.at(out, rows, factor * np.einsum("nj,nij->ni", v, B_stack[of_row]))
    rows_of, W, bias = scaled_rows(ids, chosen, weights, W, bias, (h_out, h_in))
    for id_, rows in rows_of.items():
        slot = slot_of[id_]
        whole = W + scaling[slot] * np.einsum("ij,jk->ik", B_stack[slot], A_stack[slot])
        lengths = np.einsum("ik,ik->i", whole, whole) ** 0.5
        with np.errstate(divide="ignore"):
            g = np.asarray(getattr(chosen[id_], "magnitude", None), np.float64) / lengths
        out[rows] = np.einsum("i,ni->ni", g, out[rows])
        if bias is not None:
            out[rows] += bias - g * bias
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

    Semantics: `out = add_lora(einsum("nk,ik->ni", x, W), x, adapters, adapter_ids, scalings)`
    Arguments, errors and source: as `by_row.apply_batched`.

    >>> apply_batched([[1.0], [2.0]], [[10.0]], [([[1.0]], [[1.0]])], [0, -1])
    array([[11.],
           [20.]])
    """
    x = matrix(x, "x")
    W = matrix(W, "W", columns=x.shape[1])
    base = np.einsum("nk,ik->ni", x.astype(np.float64), W.astype(np.float64))
    return add_lora(base, x, adapters, adapter_ids, scalings, weights=weights, W=W)


def lora_delta(x: ArrayLike, A: ArrayLike, B: ArrayLike, scaling: float) -> Result:
    """One adapter's low-rank delta for every row.

    Semantics: `out = add_lora(0, x, [(A, B)], 0, scaling)`
    Arguments, errors and source: as `by_row.lora_delta`.

    >>> lora_delta([[1.0, 2.0]], A=[[1.0, 1.0]], B=[[1.0], [10.0]], scaling=2.0)
    array([[ 6., 60.]])
    """
    x = matrix(x, "x")
    adapter = checked(A, B, scaling, h_in=x.shape[1], h_out=None)
    zeros = np.zeros((len(x), len(adapter.B)))
    return add_lora(zeros, x, [adapter], np.zeros(len(x), np.int64))


def apply_single(
    x: ArrayLike,
    W: ArrayLike,
    A: ArrayLike,
    B: ArrayLike,
    scaling: float,
    magnitude: ArrayLike | None = None,
) -> Result:
    """The base product plus one adapter's delta for every row.

    Semantics: `out = apply_batched(x, W, [(A, B)], 0, scaling)`
    Arguments, errors and source: as `by_row.apply_single`.

    >>> apply_single([[1.0]], [[10.0]], A=[[1.0]], B=[[2.0]], scaling=3.0)
    array([[16.]])
    """
    x = matrix(x, "x")
    adapter = checked(A, B, scaling, h_in=x.shape[1], h_out=None, magnitude=magnitude)
    return apply_batched(x, W, [adapter], np.zeros(len(x), np.int64))
