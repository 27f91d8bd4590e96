"""JAX's `ragged_dot`, twice, compiled for each batch.

On CPUs XLA makes it a dense product with a mask: every row is multiplied with every segment's
adapter. So it is asked for small batches alone.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.batch import Batch

DENSE_CAP = 1 << 30  # multiplications of a call: some 0.3 s on two cores


def dense_refuses(batch: Batch) -> str:
    """The dense product must be of a size that can be waited for."""
    r, widths = batch.pool.A.shape[1], batch.x.shape[1] + batch.y.shape[1]
    dense = len(batch.adapter_ids) * len(batch.slots) * r * widths
    return "" if dense <= DENSE_CAP else f"{dense:.1e} dense multiplications, cap {DENSE_CAP:.1e}"


def prepare(batch: Batch) -> None:
    """Weights (S, h_in, r) and (S, r, h_out) in the order of the segments, padded to one rank."""
    import jax

    A, wb = batch.stacks()
    lengths = [len(rows) for rows in batch.rows]
    order = np.concatenate(batch.rows)
    scalings = np.repeat(batch.pool.scalings[batch.slots], lengths)[:, np.newaxis]
    operands = (np.ascontiguousarray(A.transpose(0, 2, 1)), wb, np.array(lengths, np.int32))
    kept = [jax.device_put(each) for each in (*operands, scalings, order, np.argsort(order))]
    batch.prepared["ragged_dot"] = kept


def ragged_dot(y: NDArray[Any], x: NDArray[Any], batch: Batch) -> None:
    """One compiled call: sort, both products, sort back and add."""
    np.copyto(y, np.asarray(_added()(y, x, *batch.prepared["ragged_dot"])))


@cache
def _added() -> Any:
    import jax

    def added(y: Any, x: Any, *prepared: Any) -> Any:
        A_T, wb, lengths, scaling, order, back = prepared
        kept: Any = {"preferred_element_type": np.float32}
        v = jax.lax.ragged_dot(x[order], A_T, lengths, **kept)
        delta = jax.lax.ragged_dot((v * scaling).astype(wb.dtype), wb, lengths, **kept)
        return (y + delta[back]).astype(y.dtype)

    return jax.jit(added)
