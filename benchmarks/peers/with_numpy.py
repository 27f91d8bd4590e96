"""The numpy baselines: what a user would write without sgmv, each in its best form."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.batch import Batch

GATHER_CAP = 256 << 20


def by_row(y: NDArray[Any], x: NDArray[Any], batch: Batch) -> None:
    """numpy, one row at a time: two matrix-vector products per row."""
    pool = batch.pool
    for i, slot in enumerate(batch.adapter_ids):
        if pool.ranks[slot]:
            r = pool.ranks[slot]
            v = pool.A[slot, :r] @ x[i].astype(np.float32, copy=False)
            y[i] += (v * pool.scalings[slot]) @ pool.wb[slot, :r]


def by_segment(y: NDArray[Any], x: NDArray[Any], batch: Batch) -> None:
    """numpy, one segment at a time: gather the rows, two matrix products, scatter."""
    pool = batch.pool
    for slot, rows in zip(batch.slots, batch.takes, strict=True):
        if pool.ranks[slot]:
            r = pool.ranks[slot]
            v = x[rows].astype(np.float32, copy=False) @ pool.A[slot, :r].T
            v *= pool.scalings[slot]
            y[rows] += v @ pool.wb[slot, :r]


def einsum(y: NDArray[Any], x: NDArray[Any], batch: Batch) -> None:
    """numpy, no loop: a weight gathered for each row, then two einsum."""
    pool, ids = batch.pool, batch.adapter_ids
    v = np.einsum("nk,nrk->nr", x.astype(np.float32, copy=False), pool.A[ids])
    v *= pool.scalings[ids, np.newaxis]
    y += np.einsum("nr,nrc->nc", v, pool.wb[ids])


def gather_refuses(batch: Batch) -> str:
    """The float32 weights gathered for one product must fit under a cap."""
    pool = batch.pool
    widest = max(pool.A.shape[2], pool.wb.shape[2])
    gathered = len(batch.adapter_ids) * pool.A.shape[1] * widest * 4
    if gathered <= GATHER_CAP:
        return ""
    return f"gathered weights need {gathered >> 20} MiB, cap {GATHER_CAP >> 20} MiB"
