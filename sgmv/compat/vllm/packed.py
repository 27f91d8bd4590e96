"""A layer's stacked weights, packed: padded and in PEFT's order in vLLM, as the kernels want here.

    lora_a_stacked  of each slice (num_loras, 1, max_rank, h_in)     an AdapterStack for each slice,
    lora_b_stacked  of each slice (num_loras, 1, h_out, max_rank) => a slot's weights at their rank

Weights in use are packed before the first step that names them, and again once they have changed.
A slot that vLLM has set for a layer that the adapter leaves alone holds zeros: its rank is 0, and
its rows take no time. Measured against reading the stacks where they are stored: docs/engines.md.

A change is noticed twice. vLLM's layers say which slot they write (engine.py), so that one adapter
is packed again; torch counts the writes to each tensor, and a write that no layer announced makes
all slots stale. No stale slot is ever read.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from sgmv.backend import kernels
from sgmv.dtypes import BITS
from sgmv.errors import ShapeError
from sgmv.ids import BASE_ONLY, Integers
from sgmv.launch import run_both_at
from sgmv.segment import Segments, segment
from sgmv.stack import AdapterStack
from sgmv.tensors import as_array, float_dtype, name_of, torch
from sgmv.workers import torchs_pool

Tensor: TypeAlias = Any  # a torch tensor on the CPU


class Batch(NamedTuple):
    """The slots of a step's rows, -1 = base only: sorted, and which there are."""

    segments: Segments
    slots: frozenset[int]

    @classmethod
    def of(cls, indices: Integers) -> Batch:
        """The batch of these indices, one for each row."""
        found = segment(indices)
        return cls(found, frozenset(found.adapter_ids.tolist()) - {BASE_ONLY})


class Packed:
    """One layer's slices; or an embedding, of which A is `identity`."""

    def __init__(self, A: Sequence[Tensor], B: Sequence[Tensor]) -> None:
        self._tensors = tuple(A), tuple(B)  # held, so that none is replaced at the same address
        pairs = [(a.flatten(0, -3), b.flatten(0, -3)) for a, b in zip(A, B, strict=True)]
        self._slices = [
            (a, b, AdapterStack(a.shape[2], b.shape[1], len(a), a.shape[1], _dtype(b)))
            for a, b in pairs
        ]
        self._stale = set(range(len(pairs[0][0])))
        self._seen = self._look()

    def _look(self) -> list[object]:
        """What differs after a write: torch counts them; and where the tensors are stored."""
        return [
            (tensor._version, tensor.data_ptr()) for tensors in self._tensors for tensor in tensors
        ]

    @contextmanager
    def writing(self, slot: int) -> Iterator[None]:
        """Only this slot is written meanwhile."""
        self._notice()
        self._stale.add(slot)
        try:
            yield
        finally:
            self._seen = self._look()

    def _notice(self) -> None:
        """After writes that no layer announced, every slot is stale."""
        if (now := self._look()) != self._seen:
            self._stale, self._seen = set(range(len(self._slices[0][0]))), now

    def refresh(self, slots: frozenset[int]) -> None:
        """Have these slots packed as they are now."""
        self._notice()
        for slot in self._stale & slots:
            for a, b, stack in self._slices:
                stack.load(slot, _used(a[slot], b[slot]))
            self._stale.discard(slot)

    def add(self, y: Tensor, x: Tensor, batch: Batch, widths: Sequence[int]) -> None:
        """Add each slice's delta to its columns of y, side by side from column 0."""
        rows = batch.segments.n
        x, x_dtype = x if x.stride(1) == 1 else x.contiguous(), float_dtype("x", x.dtype)
        y_dtype = float_dtype("y", y.dtype)
        if len(x) != rows or len(y) != rows or sum(widths) > y.shape[1]:
            raise ShapeError(
                "y and x",
                f"{rows} rows, as the step's metadata has, and y of {sum(widths)} columns or more",
                f"{tuple(y.shape)} and {tuple(x.shape)}",
                "call update_metadata for this step",
            )
        self.refresh(batch.slots)
        pool, y_row = torchs_pool(), y.stride(0) * y_dtype.itemsize
        x_at, y_at = (x.data_ptr(), x.stride(0) * x_dtype.itemsize), y.data_ptr()
        for (_, _, stack), width in zip(self._slices, widths, strict=True):
            table = stack.table
            if table.width:
                compiled = kernels(None, x_dtype, stack.dtype, y_dtype)
                run_both_at(compiled, table, batch.segments, pool, x_at, (y_at, y_row))
            y_at += width * y_dtype.itemsize


def identity(B: Tensor) -> Tensor:
    """A for an embedding's B: what vLLM has looked up is v, and `add` takes an x."""
    with torch().inference_mode(False):  # torch counts no writes to what is made there
        return torch().eye(B.shape[-1], dtype=B.dtype).expand(len(B), 1, -1, -1)


def can_pack(*tensors: Tensor) -> bool:
    """Whether torch counts the writes to these, and they are of types that sgmv has."""
    return all(
        tensor.is_cpu and not tensor.is_inference() and name_of(tensor.dtype) in BITS
        for tensor in tensors
    )


def can_add(y: Tensor, x: Tensor) -> bool:
    """Whether rows are as `Packed.add` takes them: matrices; y's rows dense, and not x's own."""
    if x.dim() != 2 or y.dim() != 2 or (y.stride(1) != 1 and y.shape[1] > 1) or not x.is_cpu:
        return False
    return name_of(x.dtype) in BITS and name_of(y.dtype) in BITS


def _dtype(tensor: Tensor) -> np.dtype[Any]:
    return float_dtype("lora_b_stacked", tensor.dtype)


def _used(A: Tensor, B: Tensor) -> tuple[Any, Any] | None:
    """The weights as far as their rank goes: what is 0 in A or in B beyond adds nothing."""
    ranks = ((A != 0).any(1) & (B != 0).any(0)).nonzero()  # NaN is not 0
    if len(ranks) == 0:
        return None
    r = int(ranks[-1]) + 1
    return as_array("lora_a_stacked", A[:r]), as_array("lora_b_stacked", B[:, :r])
