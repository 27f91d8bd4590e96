"""Engines whose segments carry an index into stacked weights: SGLang and FlashInfer."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from sgmv.checks import check_count
from sgmv.errors import ValueRangeError
from sgmv.ids import BASE_ONLY, Integers, as_ids
from sgmv.layouts.pointers import per_request
from sgmv.layouts.rows import (
    Batch,
    Int32,
    Layout,
    Slots,
    as_segments,
    frozen,
    ids_of,
    offsets,
    runs,
    slots_of,
    spread,
)
from sgmv.segment import segment
from sgmv.stack import AdapterStack, check_stack

BACKENDS = ("csgmv", "triton", "torch_native")
MIN_CHUNK = 16


@dataclass(frozen=True, eq=False)
class LoRABatchInfo(Layout):
    """SGLang's metadata of a step, for any of its backends.

    Semantics: positions `seg_indptr[i]:seg_indptr[i+1]` use buffer slot `weight_indices[i]`; the
    row at a position is `permutation[position]`, or the position itself where that is None.

    bs              requests in the batch
    num_segments    segments, or chunks of them
    seg_indptr      (num_segments + 1,) int32
    seg_lens        (num_segments,) int32; None in csgmv
    max_len         the longest segment; csgmv: the rows that a chunk may have
    weight_indices  (num_segments,) int32, never -1: the base model has a slot of rank 0
    lora_ranks      (slots + 1,) int32, of each slot; here the last is the base model's
    scalings        (slots + 1,) float32, likewise
    permutation     (n,) int32, stable sort of the rows by slot; None where nothing is sorted

    Source: SGLang, python/sglang/srt/lora/utils.py.
    """

    bs: int
    num_segments: int
    seg_indptr: Int32
    seg_lens: Int32 | None
    max_len: int
    weight_indices: Int32
    lora_ranks: Int32
    scalings: npt.NDArray[np.float32]
    permutation: Int32 | None

    def adapter_ids(self, stack: AdapterStack) -> Integers:
        """(n,) the id of each row, from the stack that it was made with.

        An id that the stack holds as base only comes back as -1.
        """
        check_stack(stack)
        slot = self.weight_indices.astype(np.int64)
        slot[slot == len(self.lora_ranks) - 1] = BASE_ONLY
        rows = None if self.permutation is None else self.permutation.astype(np.int64)
        lengths = np.diff(self.seg_indptr)
        return ids_of(spread(slot, lengths, rows, int(self.seg_indptr[-1])), stack)


def sglang(
    batch: Batch,
    stack: AdapterStack,
    *,
    seq_lens: npt.ArrayLike | None = None,
    backend: str = "csgmv",
    max_lora_chunk_size: int = MIN_CHUNK,
) -> LoRABatchInfo:
    """The batch as one of SGLang's LoRA backends takes it.

    Semantics: by backend, a segment is
    "triton"        one request, in the order of the batch
    "torch_native"  a run of neighbouring requests of one slot
    "csgmv"         at most so many rows of one slot, after a stable sort of the rows by slot: 128
                    from 256 rows on, 32 from 64 on, else 16, and at most max_lora_chunk_size

    batch     (n,) adapter ids of the rows, or Segments
    stack     the layer's adapters: slots, ranks and scalings; the slot after its own is the base's
    seq_lens  rows of each request (SGLang: extend_seq_lens); left out, each row is a request

    Raises UnknownAdapterError for ids that the stack does not hold, ValueRangeError for another
    backend or rows of one request that differ, ShapeError where the lengths do not add up to n;
    DtypeError as `segment` does.
    Source: SGLang, python/sglang/srt/lora/backend/chunked_backend.py, triton_backend.py,
    torch_backend.py.

    >>> A, B = np.ones((8, 64), "float32"), np.ones((32, 8), "float32")
    >>> print(sglang([7, -1, 7], AdapterStack.from_adapters({7: (A, B)})))
    bs              3
    num_segments    2
    seg_indptr      int32 (3,) [0, 2, 3]
    seg_lens        None
    max_len         16
    weight_indices  int32 (2,) [0, 1]
    lora_ranks      int32 (2,) [8, 0]
    scalings        float32 (2,) [1.0, 0.0]
    permutation     int32 (3,) [0, 2, 1]
    """
    if not isinstance(backend, str) or backend not in BACKENDS:
        raise ValueRangeError("backend", f"one of {BACKENDS}", repr(backend), "choose one of them")
    check_stack(stack)
    table = stack.table
    slot = slots_of(as_segments(batch), table.slot_of)
    slot[slot == BASE_ONLY] = base = len(table.ranks)
    requests = np.ones(len(slot), np.int64) if seq_lens is None else as_ids(seq_lens, "seq_lens")
    by_request = per_request(slot, requests)
    by_request[by_request == BASE_ONLY] = base  # requests of no rows
    permutation = None
    if backend == "csgmv":
        rows = segment(slot)
        max_len = chunk_rows(len(slot), check_count("max_lora_chunk_size", max_lora_chunk_size, 1))
        indices, lengths = cut(rows.adapter_ids, rows.lengths, max_len)
        permutation = frozen("permutation", rows.rows)
    elif backend == "triton":
        indices, lengths = by_request, requests
    else:
        start, _ = runs(by_request)
        indices = by_request[start]
        lengths = np.diff(offsets(requests)[np.append(start, len(requests))])
    if backend != "csgmv":
        max_len = int(lengths.max(initial=0))
    return LoRABatchInfo(
        bs=len(requests),
        num_segments=len(indices),
        seg_indptr=frozen("seg_indptr", offsets(lengths)),
        seg_lens=None if backend == "csgmv" else frozen("seg_lens", lengths),
        max_len=max_len,
        weight_indices=frozen("weight_indices", indices),
        lora_ranks=frozen("lora_ranks", np.append(table.ranks, 0)),
        scalings=frozen("scalings", np.append(table.scalings, 0), np.float32),
        permutation=permutation,
    )


def chunk_rows(n: int, most: int) -> int:
    """Rows per chunk of csgmv for a batch of n rows: at most so many, but never below 16."""
    return max(MIN_CHUNK, min(most, 128 if n >= 256 else 32 if n >= 64 else MIN_CHUNK))


def cut(indices: Integers, lengths: Integers, most: int) -> tuple[Integers, Integers]:
    """Every segment in chunks of so many rows, the last of each as short as what is left."""
    pieces = -(-lengths // most)
    last = np.cumsum(pieces) - 1
    cut = np.full(int(pieces.sum()), most, np.int64)
    cut[last] = lengths - (pieces - 1) * most
    return np.repeat(indices, pieces), cut


@dataclass(frozen=True, eq=False)
class FlashInfer(Layout):
    """What `SegmentGEMMWrapper.run` takes beside x and the weights.

    Semantics: positions `seg_indptr[i]:seg_indptr[i+1]` use weights `weight_indices[i]`.

    batch_size      segments
    seg_lens        (batch_size,) int64
    seg_indptr      (batch_size + 1,) int64; FlashInfer needs one of the two
    weight_indices  (batch_size,) int64, never -1
    rows            not FlashInfer's: the row of x at each position, base-only rows left out

    Source: FlashInfer, flashinfer/gemm.py, `SegmentGEMMWrapper`.
    """

    batch_size: int
    seg_lens: Integers
    seg_indptr: Integers
    weight_indices: Integers
    rows: Integers

    def adapter_ids(self, n: int, slots: Slots = None) -> Integers:
        """(n,) the id of each of n rows, -1 where no segment has it; slots as in `flashinfer`."""
        n = check_count("n", n, 0)
        return ids_of(spread(self.weight_indices, self.seg_lens, self.rows, n), slots)


def flashinfer(batch: Batch, slots: Slots = None) -> FlashInfer:
    """The batch as FlashInfer's segment GEMM takes it.

    Semantics: a stable sort of the rows by slot. FlashInfer knows no -1 and would read weights
    before the first, so base-only rows are left out of `rows`.

    batch  (n,) adapter ids, or Segments
    slots  an AdapterStack or a mapping id -> slot; None: the ids are slots

    Raises UnknownAdapterError for ids that have no slot; DtypeError and ValueRangeError as
    `segment` does. Source: FlashInfer, flashinfer/gemm.py, `SegmentGEMMWrapper.run`.

    >>> print(flashinfer([2, -1, 0, 2]))
    batch_size      2
    seg_lens        int64 (2,) [1, 2]
    seg_indptr      int64 (3,) [0, 1, 3]
    weight_indices  int64 (2,) [0, 2]
    rows            int64 (3,) [2, 0, 3]
    """
    segments = segment(slots_of(as_segments(batch), slots))
    first = int(segments.S > 0 and segments.adapter_ids[0] == BASE_ONLY)
    lengths = segments.lengths[first:]
    return FlashInfer(
        batch_size=len(lengths),
        seg_lens=frozen("seg_lens", lengths, np.int64),
        seg_indptr=frozen("seg_indptr", offsets(lengths), np.int64),
        weight_indices=frozen("weight_indices", segments.adapter_ids[first:], np.int64),
        rows=frozen("rows", segments.rows[segments.seq_start[first] :], np.int64),
    )
