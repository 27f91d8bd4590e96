"""The baselines: what a user would write without sgmv, each in its best form.

Semantics of each: `y[i] += scaling * (x[i] @ A.T) @ B.T` in place, with the adapter of row i.
Fairness: weights stand in float32 in the order that suits BLAS (`wb`, which is B.T), and the rows
of each segment are known before the clock starts, for the baselines as for sgmv.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.batch import Batch

GATHER_CAP = 256 << 20


@dataclass(frozen=True)
class Peer:
    """A baseline, and its reason not to run on a batch ("" when it does run)."""

    title: str
    run: Callable[[NDArray[Any], NDArray[Any], Batch], None]
    prepare: Callable[[Batch], None] = lambda batch: None
    refuses: Callable[[Batch], str] = lambda batch: ""


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


def einsum_refuses(batch: Batch) -> str:
    """The gathered weights of one product must fit under a cap."""
    pool = batch.pool
    widest = max(pool.A.shape[2], pool.wb.shape[2])
    gathered = len(batch.adapter_ids) * pool.A.shape[1] * widest * 4
    if gathered <= GATHER_CAP:
        return ""
    return f"gathered weights need {gathered >> 20} MiB, cap {GATHER_CAP >> 20} MiB"


def torch_prepare(batch: Batch) -> None:
    """Tensors over the same memory, made before the clock starts."""
    import torch

    pool = batch.pool
    parts = []
    start = 0
    for slot, rows in zip(batch.slots, batch.rows, strict=True):
        r = int(pool.ranks[slot])
        if r:
            A, wb = torch.from_numpy(pool.A[slot, :r]), torch.from_numpy(pool.wb[slot, :r])
            parts.append((start, start + len(rows), A.T, wb, float(pool.scalings[slot])))
        start += len(rows)
    order = np.concatenate(batch.rows)
    sorted_already = bool((np.diff(order) == 1).all())
    batch.prepared["torch"] = (torch, None if sorted_already else torch.from_numpy(order), parts)


def torch_addmm(y: NDArray[Any], x: NDArray[Any], batch: Batch) -> None:
    """torch, one segment at a time: rows sorted once, `addmm_` per segment, rows put back."""
    torch, order, parts = batch.prepared["torch"]
    x_sorted, y_sorted = torch.from_numpy(x), torch.from_numpy(y)
    if order is not None:
        x_sorted, y_sorted = x_sorted.index_select(0, order), y_sorted.index_select(0, order)
    for start, end, A_T, wb, scaling in parts:
        y_sorted[start:end].addmm_(x_sorted[start:end] @ A_T, wb, alpha=scaling)
    if order is not None:
        torch.from_numpy(y).index_copy_(0, order, y_sorted)


def torch_refuses(batch: Batch) -> str:
    if find_spec("torch") is None:
        return "torch is not installed"
    if batch.x.dtype != np.float32:
        return f"timed for float32 only, this case is {batch.x.dtype}"
    return ""


PEERS = {
    "by_row": Peer("numpy per row", by_row),
    "by_segment": Peer("numpy per segment", by_segment),
    "einsum": Peer("numpy gather + einsum", einsum, refuses=einsum_refuses),
    "torch": Peer("torch per segment", torch_addmm, torch_prepare, torch_refuses),
}
# In the order of their turns: torch before numpy, whose BLAS threads spin on (see run.py).
TURNS = ("torch", "by_row", "by_segment", "einsum")
