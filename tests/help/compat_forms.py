"""What the compat calls must give: plain loops over rows in float64, and the bound around them.

The loops are written from the engines' contracts, not from the code; the bound is reference's own,
of a LoRA delta in which one of the two products is by the identity.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

from reference import bounds, compare

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
DTYPES = (np.dtype("float32"), np.dtype("float16"), BFLOAT16, np.dtype("float64"))


def drawn(rng: np.random.Generator, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Values of the size that activations and weights have."""
    return (rng.standard_normal(shape) / 4).astype(dtype)


def indices(rng: np.random.Generator, n: int, count: int) -> np.ndarray:
    """An index per row: some adapters not at all, some often, some rows base only."""
    found = rng.integers(-1, max(count - 1, 1), n)
    found[n // 2 : n // 2 + 14] = 0  # a segment of several tiles
    return found


def product(
    y: np.ndarray, x: np.ndarray, W: Any, ids: np.ndarray, scaling: float = 1.0
) -> tuple[np.ndarray, np.ndarray]:
    """y[i] + scaling * W[ids[i]] @ x[i], y[i] where the index is -1; and how far off it may be."""
    expected = y.astype(np.float64)
    for i, index in enumerate(ids.tolist()):
        if index >= 0:
            expected[i] += scaling * (W[index].astype(np.float64) @ x[i].astype(np.float64))
    used = set(ids.tolist()) - {-1}
    return expected, bound_of(y, x, {i: as_pair(W[i]) for i in used}, ids, scaling, expected)


def as_pair(W: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A and B with B @ A = W, one of them the identity."""
    outputs, inputs = W.shape
    one = np.eye(min(outputs, inputs), dtype=np.float32).astype(W.dtype)
    return (W, one) if outputs <= inputs else (one, W)


def delta(
    y: np.ndarray, x: np.ndarray, A: Any, B: Any, ids: np.ndarray, scaling: float = 1.0
) -> tuple[np.ndarray, np.ndarray]:
    """y[i] + scaling * B[ids[i]] @ A[ids[i]] @ x[i], y[i] where the index is -1; and the bound."""
    expected = y.astype(np.float64)
    for i, index in enumerate(ids.tolist()):
        if index >= 0:
            v = A[index].astype(np.float64) @ x[i].astype(np.float64)
            expected[i] += scaling * (B[index].astype(np.float64) @ v)
    used = set(ids.tolist()) - {-1}
    return expected, bound_of(y, x, {i: (A[i], B[i]) for i in used}, ids, scaling, expected)


def bound_of(y: Any, x: Any, adapters: Any, ids: Any, scaling: float, expected: Any) -> np.ndarray:
    return bounds.add_lora_bound(y, x, adapters, ids, scaling, expected=expected)


def check(
    got: np.ndarray, right: tuple[np.ndarray, np.ndarray], name: str, rows: Any = slice(None)
) -> None:
    """Every element of these rows within its bound."""
    expected, bound = right
    compare.check(got[rows], expected[rows], bound[rows], name)
