"""SGLang: an index into the slots for each segment, which a backend makes in its own way."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from sgmv.checks import check_count
from sgmv.errors import ValueRangeError
from sgmv.ids import BASE_ONLY, Integers, as_ids
from sgmv.layouts.exam import Exam, Examiner
from sgmv.layouts.repairs import entries, indexed_offsets
from sgmv.layouts.rows import (
    Batch,
    Int32,
    Layout,
    as_segments,
    frozen,
    ids_of,
    offsets,
    per_request,
    runs,
    slot_table,
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
    "csgmv"         a chunk of one slot's rows, after a stable sort of the rows by slot: at most 128
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


def chunk_rows(n: int, limit: int) -> int:
    """Rows per chunk of csgmv for a batch of n rows: at most `limit`, but never below 16."""
    return max(MIN_CHUNK, min(limit, 128 if n >= 256 else 32 if n >= 64 else MIN_CHUNK))


def cut(indices: Integers, lengths: Integers, rows: int) -> tuple[Integers, Integers]:
    """Every segment in chunks of `rows` rows; the last one of each has the rows that are left."""
    pieces = -(-lengths // rows)
    last = np.cumsum(pieces) - 1
    cut = np.full(int(pieces.sum()), rows, np.int64)
    cut[last] = lengths - (pieces - 1) * rows
    return np.repeat(indices, pieces), cut


def _sglang(exam: Exam) -> None:
    segments = exam.indexed("num_segments", int32=True)
    if segments is None:
        return
    indptr, lengths, index = segments
    ranks, permutation = exam.array("lora_ranks", 0), None
    if exam.get("permutation") is not None:
        permutation = exam.array("permutation", 0)
        exam.has_rows("permutation", len(permutation))
        exam.each_once("permutation", permutation)
        exam.ascending("weight_indices", index, "unsorted", strictly=False)
    elif lengths is not None:
        exam.has_rows("seg_lens", int(lengths.sum()))
    exam.indptr("seg_indptr", indptr, lengths)
    expected = f"slots below {len(ranks)}, of which there are ranks"
    exam.add_at("weight_indices", "no weights", expected, index, "segment", index >= len(ranks))
    limit = exam.number("max_len")
    if limit is not None:
        longer = np.diff(indptr) > limit
        expected = f"at most max_len, {limit}"
        exam.add_at("max_len", "counts", expected, np.diff(indptr), "segment", longer)
    if exam.found or exam.slots is None:
        return
    held = slot_table(exam.slots)[1]
    base = (ranks == 0) & ~np.isin(np.arange(len(ranks)), held)
    lost = ~np.isin(index, held) & ~base[index]
    expected = "slots with an adapter, or of rank 0"
    exam.add_at("weight_indices", "no weights", expected, index, "segment", lost)
    if exam.segments is not None and not exam.found:
        got = spread(index, np.diff(indptr), permutation, exam.segments.n)
        got = np.where(base[got], BASE_ONLY, got)
        exam.same_rows("weight_indices", got, slots_of(exam.segments, exam.slots))


EXAMINERS = (
    Examiner(
        ("weight_indices", "lora_ranks"),
        _sglang,
        {
            "num_segments": ("counts", entries("seg_lens", "weight_indices")),
            "seg_lens": ("counts", lambda exam: np.diff(exam.ints("seg_indptr"))),
            "seg_indptr": ("gap", indexed_offsets),
        },
    ),
)
