"""The torch baselines: its own loop, its grouped product, and the CPU forms of two servers.

The servers' forms are written from a description of what they do, so that they run without them:
`sglang` as SGLang's torch_native backend, `vllm` as vLLM's torch ops for the CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.batch import Batch
from sgmv.cpu import cores

Run = Callable[[NDArray[Any], NDArray[Any], Batch], None]


def prepare_segments(key: str, native: bool, batch: Batch) -> None:
    """The segments' weights as tensors: in float32, or in the case's own type."""
    parts = []
    start = 0
    for slot, rows in zip(batch.slots, batch.rows, strict=True):
        r = int(batch.pool.ranks[slot])
        if r:
            pair = batch.own_weights(slot) if native else _float32(batch, slot)
            A, wb = (_reader(weights)(weights) for weights in pair)
            parts.append((start, start + len(rows), A.T, wb, float(batch.pool.scalings[slot])))
        start += len(rows)
    widen = not native and batch.x.dtype != np.float32
    batch.prepared[key] = (_reader(batch.x), widen, _order(batch), parts)


def by_segment(key: str, y: NDArray[Any], x: NDArray[Any], batch: Batch) -> None:
    """torch, one segment at a time: rows sorted once, `addmm_` per segment, rows put back."""
    tensor, widen, order, parts = batch.prepared[key]
    whole, x_sorted, y_sorted = _sorted(tensor, order, y, x)
    if widen:
        x_sorted, y_sorted = x_sorted.float(), y_sorted.float()
    for start, end, A_T, wb, scaling in parts:
        y_sorted[start:end].addmm_(x_sorted[start:end] @ A_T, wb, alpha=scaling)
    if order is not None:
        whole.index_copy_(0, order, y_sorted.to(whole.dtype))
    elif widen:
        whole.copy_(y_sorted)


def packed_refuses(batch: Batch) -> str:
    """Where oneDNN has no products of that type, or this torch no packing."""
    torch = _torch()
    if not hasattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported"):
        return f"torch {torch.__version__} has no oneDNN"
    supported = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return "" if supported else "oneDNN has no bfloat16 products on this CPU"


def prepare_packed(batch: Batch) -> None:
    """The segments' weights in the order that oneDNN prefers for as many rows."""
    pack, tensor = _torch().ops.mkldnn._reorder_linear_weight, _reader(batch.x)
    parts, start = [], 0
    for slot, rows in zip(batch.slots, batch.rows, strict=True):
        end = start + len(rows)
        if batch.pool.ranks[slot]:
            A, wb = batch.own_weights(slot)
            both = [pack(tensor(np.ascontiguousarray(each)), len(rows)) for each in (A, wb.T)]
            parts.append((start, end, *both, float(batch.pool.scalings[slot])))
        start = end
    linear = _torch().ops.mkldnn._linear_pointwise
    batch.prepared["onednn"] = (linear, _reader(batch.x), _order(batch), parts)


def packed(y: NDArray[Any], x: NDArray[Any], batch: Batch) -> None:
    """Two linear operations per segment, the second one adds to the rows of y."""
    linear, tensor, order, parts = batch.prepared["onednn"]
    whole, x_sorted, y_sorted = _sorted(tensor, order, y, x)
    for start, end, A, B, scaling in parts:
        v = linear(x_sorted[start:end], A, None, "none", [], "").mul_(scaling)
        rows = y_sorted[start:end]
        rows.copy_(linear.binary(v, rows, B, None, "add"))
    if order is not None:
        whole.index_copy_(0, order, y_sorted)


def grouped_refuses(batch: Batch) -> str:
    """Not on the CPU before torch 2.9, and at first only for widths of whole 16 bytes."""
    pool = batch.pool
    h_in, r, h_out = pool.A.shape[2], pool.A.shape[1], pool.wb.shape[2]
    return _grouped_refusal(_reader(batch.x)(batch.x).dtype, h_in, r, h_out)


def prepare_grouped(batch: Batch) -> None:
    """One stack of weights in the order of the segments; its ranks are padded to the widest."""
    torch = _torch()
    A, wb = map(_reader(batch.x), batch.stacks())
    lengths = [len(rows) for rows in batch.rows]
    ends = torch.from_numpy(np.cumsum(lengths).astype(np.int32))
    scalings = np.repeat(batch.pool.scalings[batch.slots], lengths)[:, np.newaxis]
    order = _order(batch)
    back = None if order is None else torch.argsort(order)
    scaling = torch.from_numpy(scalings).to(A.dtype)
    batch.prepared["grouped"] = (
        torch._grouped_mm, _reader(batch.x), A.transpose(1, 2), wb, ends, scaling, order, back
    )  # fmt: skip


def grouped(y: NDArray[Any], x: NDArray[Any], batch: Batch) -> None:
    """Two `torch._grouped_mm`, each over all segments, between a sort of x and one back of y."""
    grouped_mm, tensor, A_T, wb, ends, scaling, order, back = batch.prepared["grouped"]
    x_sorted = tensor(x)
    if order is not None:
        x_sorted = x_sorted.index_select(0, order)
    v = grouped_mm(x_sorted, A_T, offs=ends)
    delta = grouped_mm(v.mul_(scaling), wb, offs=ends)
    tensor(y).add_(delta if back is None else delta.index_select(0, back))


def prepare_sglang(batch: Batch) -> None:
    """Runs of neighbours with one adapter, in the batch's own order: that backend does not sort."""
    torch = _torch()
    ids = batch.adapter_ids
    starts = np.flatnonzero(np.diff(ids, prepend=-1)).tolist()
    place = {slot: i for i, slot in enumerate(batch.slots)}
    A, B = _server_stacks(batch)
    runs = []
    for start, end in zip(starts, [*starts[1:], len(ids)], strict=True):
        slot = int(ids[start])
        r = int(batch.pool.ranks[slot])
        if r:
            A_T, B_T = A[place[slot], :r].T, B[place[slot], :, :r].T
            runs.append((start, end, r, A_T, B_T, float(batch.pool.scalings[slot])))
    zeros = partial(torch.zeros, (len(ids), A.shape[1]), dtype=A.dtype)
    batch.prepared["sglang"] = (zeros, _reader(batch.x), runs)


def sglang(y: NDArray[Any], x: NDArray[Any], batch: Batch) -> None:
    """A loop of `addmm_` over the runs for shrink, which scales, and another for expand."""
    zeros, tensor, runs = batch.prepared["sglang"]
    x_all, y_all, v = tensor(x), tensor(y), zeros()
    for start, end, r, A_T, _, scaling in runs:
        v[start:end, :r].addmm_(x_all[start:end], A_T, alpha=scaling)
    for start, end, r, _, B_T, _ in runs:
        y_all[start:end].addmm_(v[start:end, :r], B_T)


def prepare_vllm(batch: Batch) -> None:
    """Stacked weights and a slot per row. Scaling is multiplied into B when it is loaded."""
    torch = _torch()
    A, B = _server_stacks(batch)
    scalings = torch.from_numpy(batch.pool.scalings[batch.slots]).to(B.dtype)
    place = np.searchsorted(batch.slots, batch.adapter_ids)
    scaled = B * scalings[:, None, None]
    batch.prepared["vllm"] = (torch, _reader(batch.x), A, scaled, torch.from_numpy(place))


def vllm(y: NDArray[Any], x: NDArray[Any], batch: Batch) -> None:
    """A weight gathered for each row and cast to the output's type: v's is float32, then y's."""
    torch, tensor, A, B, place = batch.prepared["vllm"]
    whole = tensor(y)
    v = torch.einsum("nk,nrk->nr", tensor(x).float(), A[place].float())
    whole += torch.einsum("nr,ncr->nc", v.to(whole.dtype), B[place].to(whole.dtype))


def _sorted(tensor: Any, order: Any, y: NDArray[Any], x: NDArray[Any]) -> tuple[Any, Any, Any]:
    """All of y, and the rows of x and y in the order of segments: views where it is theirs."""
    whole, x_all = tensor(y), tensor(x)
    if order is None:
        return whole, x_all, whole
    return whole, x_all.index_select(0, order), whole.index_select(0, order)


def _reader(like: NDArray[Any]) -> Callable[[NDArray[Any]], Any]:
    """What makes a tensor over the memory of an array of this type."""
    torch = _torch()
    if like.dtype.name == "bfloat16":  # which numpy's own types do not have
        return lambda array: torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy  # type: ignore[no-any-return]


@cache
def _torch() -> Any:
    """torch, with as many threads as the other baselines."""
    import torch

    torch.set_num_threads(cores())
    return torch


@cache
def _grouped_refusal(dtype: Any, h_in: int, r: int, h_out: int) -> str:
    """What torch says to one row of these widths."""
    torch = _torch()
    if not hasattr(torch, "_grouped_mm"):
        return f"torch {torch.__version__} has no _grouped_mm"
    ends = torch.ones(1, dtype=torch.int32)
    try:
        A, wb = torch.zeros((1, r, h_in), dtype=dtype), torch.zeros((1, r, h_out), dtype=dtype)
        v = torch._grouped_mm(torch.zeros((1, h_in), dtype=dtype), A.transpose(1, 2), offs=ends)
        torch._grouped_mm(v, wb, offs=ends)
    except (RuntimeError, NotImplementedError) as error:
        return f"torch {torch.__version__}: {str(error).splitlines()[0]}"
    return ""


def _order(batch: Batch) -> Any:
    """The sorting permutation of the rows as a tensor, None where they are sorted already."""
    order = np.concatenate(batch.rows)
    return None if (np.diff(order) == 1).all() else _torch().from_numpy(order)


def _float32(batch: Batch, slot: int) -> tuple[NDArray[Any], NDArray[Any]]:
    pool, r = batch.pool, batch.pool.ranks[slot]
    return pool.A[slot, :r], pool.wb[slot, :r]


def _server_stacks(batch: Batch) -> tuple[Any, Any]:
    """The servers' order: A (S, max rank, h_in) and B (S, h_out, max rank); made once per case."""
    if "server" not in batch.prepared:
        A, wb = map(_reader(batch.x), batch.stacks())
        batch.prepared["server"] = (A, wb.transpose(1, 2).contiguous())
    stacks: tuple[Any, Any] = batch.prepared["server"]
    return stacks


prepare_float32 = partial(prepare_segments, "torch", False)
prepare_native = partial(prepare_segments, "torch_native", True)
by_segment_float32: Run = partial(by_segment, "torch")
by_segment_native: Run = partial(by_segment, "torch_native")
