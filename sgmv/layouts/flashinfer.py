"""FlashInfer: an index into stacked weights for each segment, rows sorted by the caller."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sgmv.checks import check_count
from sgmv.ids import BASE_ONLY, Integers
from sgmv.layouts.exam import Exam, Examiner
from sgmv.layouts.repairs import entries, handed_over, indexed_offsets
from sgmv.layouts.rows import (
    Batch,
    Layout,
    Slots,
    as_segments,
    frozen,
    ids_of,
    offsets,
    slots_of,
    spread,
)
from sgmv.segment import segment


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


def _flashinfer(exam: Exam) -> None:
    segments = exam.indexed("batch_size", int32=False)
    if segments is None:
        return
    indptr, lengths, index = segments
    wanted = None if exam.segments is None else slots_of(exam.segments, exam.slots)
    n = exam.n
    rows = exam.rows_handed_over(wanted)
    if rows is None and lengths is not None:
        exam.has_rows("seg_lens", int(lengths.sum()))
    exam.slot_of_segment = index
    exam.indptr("seg_indptr", indptr, lengths)
    exam.have_weights("weight_indices", index)
    if wanted is not None and rows is not None and n is not None and not exam.found:
        exam.same_rows("weight_indices", spread(index, np.diff(indptr), rows, n), wanted)


EXAMINERS = (
    Examiner(
        ("weight_indices",),
        _flashinfer,
        {
            "batch_size": ("counts", entries("seg_lens", "weight_indices")),
            "seg_lens": ("counts", lambda exam: np.diff(exam.ints("seg_indptr"))),
            "seg_indptr": ("gap", indexed_offsets),
            "rows": ("stale", handed_over),
        },
    ),
)
