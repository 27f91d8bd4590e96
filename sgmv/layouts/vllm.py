"""vLLM's two layouts: V0's seven fields, and V1's `LoRAKernelMeta`.

Both name slots (vLLM: lora indices), not ids: `slots` tells which slot an id has. A
`LoRARequest.lora_int_id` is an id.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from sgmv.checks import check_count, fits_memory
from sgmv.errors import ValueRangeError, some
from sgmv.ids import BASE_ONLY, Integers
from sgmv.layouts.exam import Exam, Examiner
from sgmv.layouts.repairs import entries, repeated, wanted_slots
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


@dataclass(frozen=True, eq=False)
class VllmV0(Layout):
    """What vLLM V0 hands to `sgmv_shrink` and `sgmv_expand`, with `no_lora` of its wrapper.

    Semantics: batch b is rows `b_seq_start_loc[b] : b_seq_start_loc[b] + seq_len_tensor[b]`, all
    of slot `lora_indices_tensor[b]`.

    b_seq_start_loc      (batches,) int64
    seq_len_tensor       (batches,) int64
    lora_indices_tensor  (batches,) int64, -1 = base only
    batches, max_seq_length, token_nums  how many, the longest, all their rows
    no_lora              there is one batch, and it is base only
    rows                 not vLLM's: the row of x at each position of the sorted form; None where
                         the rows are not sorted

    Source: vLLM, vllm/lora/punica_wrapper/utils.py, `compute_meta`.
    """

    b_seq_start_loc: Integers
    seq_len_tensor: Integers
    lora_indices_tensor: Integers
    batches: int
    max_seq_length: int
    token_nums: int
    no_lora: bool
    rows: Integers | None = None

    def adapter_ids(self, slots: Slots = None) -> Integers:
        """(n,) the id of each row; slots as in `vllm_v0`."""
        each = spread(self.lora_indices_tensor, self.seq_len_tensor, self.rows, self.token_nums)
        return ids_of(each, slots)


def vllm_v0(batch: Batch, slots: Slots = None, *, sort: bool = False) -> VllmV0:
    """The batch as vLLM V0 takes it.

    Semantics: vLLM merges equal neighbours and does not sort, so an adapter with rows that are not
    neighbours is in several of its batches. `sort=True` gives the sorted form instead, one batch
    for each slot, for x[rows].

    batch  (n,) adapter ids, or Segments
    slots  an AdapterStack or a mapping id -> slot; None: the ids are slots

    n = 0, which vLLM never passes on, has no batches. Raises UnknownAdapterError for ids that have
    no slot; DtypeError and ValueRangeError as `segment` does.
    Source: vLLM, vllm/lora/punica_wrapper/utils.py, `compute_meta`.

    >>> print(vllm_v0([2, 2, -1, 2]))
    b_seq_start_loc      int64 (3,) [0, 2, 3]
    seq_len_tensor       int64 (3,) [2, 1, 1]
    lora_indices_tensor  int64 (3,) [2, -1, 2]
    batches              3
    max_seq_length       2
    token_nums           4
    no_lora              False
    rows                 None
    >>> vllm_v0([2, 2, -1, 2], sort=True).seq_len_tensor
    array([1, 3])
    """
    slot = slots_of(as_segments(batch), slots)
    rows = segment(slot).rows if sort else None
    ordered = slot if rows is None else slot[rows]
    start, lengths = runs(ordered)
    return VllmV0(
        b_seq_start_loc=frozen("b_seq_start_loc", start, np.int64),
        seq_len_tensor=frozen("seq_len_tensor", lengths, np.int64),
        lora_indices_tensor=frozen("lora_indices_tensor", ordered[start], np.int64),
        batches=len(start),
        max_seq_length=int(lengths.max(initial=0)),
        token_nums=len(slot),
        no_lora=len(start) == 1 and slot[0] == BASE_ONLY,
        rows=rows,
    )


@dataclass(frozen=True, eq=False)
class LoRAKernelMeta(Layout):
    """vLLM V1's metadata of a step, all int32, padded as vLLM pads it.

    Semantics: rows `token_indices_sorted_by_lora_ids[start:start + num_tokens_per_lora[s]]`, with
    `start = lora_token_start_loc[s]`, are those of slot `active_lora_ids[s]`.

    token_lora_mapping                (n,) slot of each row, -1 = base only
    token_indices_sorted_by_lora_ids  (n,) stable sort of the rows by slot
    active_lora_ids                   (max_loras + 1,) ascending, -1 first if there are such rows,
                                      then padded with -1
    num_tokens_per_lora               (max_loras + 1,) padded with 0
    lora_token_start_loc              (max_loras + 2,) from 0; past the last segment 0 again
    no_lora_flag_cpu                  (1,) bool: all rows are base only
    num_active_loras_cpu              (1,) segments, that of -1 included

    Where the flag is set no kernel runs, counts and starts are 0, active ids are -1, and the two
    per-row fields mean nothing: vLLM leaves an earlier batch's values in them.
    Source: vLLM, vllm/lora/ops/triton_ops/lora_kernel_metadata.py.
    """

    token_lora_mapping: Int32
    token_indices_sorted_by_lora_ids: Int32
    active_lora_ids: Int32
    num_tokens_per_lora: Int32
    lora_token_start_loc: Int32
    no_lora_flag_cpu: npt.NDArray[np.bool_]
    num_active_loras_cpu: Int32

    def adapter_ids(self, slots: Slots = None) -> Integers:
        """(n,) the id of each row; slots as in `vllm_v1`."""
        n = len(self.token_lora_mapping)
        if self.no_lora_flag_cpu[0]:
            return np.full(n, BASE_ONLY, np.int64)
        segments = slice(int(np.count_nonzero(self.num_tokens_per_lora)))
        active = self.active_lora_ids[segments].astype(np.int64)
        lengths = self.num_tokens_per_lora[segments].astype(np.int64)
        rows = self.token_indices_sorted_by_lora_ids.astype(np.int64)
        return ids_of(spread(active, lengths, rows, n), slots)


def vllm_v1(batch: Batch, max_loras: int, slots: Slots = None) -> LoRAKernelMeta:
    """The batch as vLLM V1's Triton kernels take it.

    Semantics: a stable sort of the rows by slot. In a batch of base-only rows the per-row fields,
    which vLLM leaves as they were, hold what the sort would give.

    batch      (n,) adapter ids, or Segments
    max_loras  slots are 0..max_loras-1
    slots      an AdapterStack or a mapping id -> slot; None: the ids are slots

    `num_active_loras_cpu` is exact; vLLM may round it up to a count that it has a graph for.
    Raises ValueRangeError for a slot of max_loras or above, UnknownAdapterError for ids that have
    no slot; DtypeError as `segment` does.
    Source: vLLM, vllm/lora/ops/triton_ops/lora_kernel_metadata.py.

    >>> print(vllm_v1([2, -1, 2], max_loras=3))
    token_lora_mapping                int32 (3,) [2, -1, 2]
    token_indices_sorted_by_lora_ids  int32 (3,) [1, 0, 2]
    active_lora_ids                   int32 (4,) [-1, 2, -1, -1]
    num_tokens_per_lora               int32 (4,) [1, 2, 0, 0]
    lora_token_start_loc              int32 (5,) [0, 1, 3, 0, 0]
    no_lora_flag_cpu                  bool (1,) [False]
    num_active_loras_cpu              int32 (1,) [2]
    """
    max_loras = check_count("max_loras", max_loras, 1)
    slot = slots_of(as_segments(batch), slots)
    mapping = frozen("adapter_ids", slot)
    if slot.max(initial=BASE_ONLY) >= max_loras:
        raise ValueRangeError(
            "adapter_ids",
            f"slots 0..{max_loras - 1}, as max_loras is {max_loras}",
            some(np.unique(slot[slot >= max_loras])),
            "pass slots: a stack, or a mapping id -> slot",
        )
    sorted_by_slot = segment(slot)
    S, no_lora = sorted_by_slot.S, bool((slot == BASE_ONLY).all())
    with fits_memory("max_loras", max_loras):
        active = np.full(max_loras + 1, BASE_ONLY)
        counts, starts = np.zeros(max_loras + 1, np.int64), np.zeros(max_loras + 2, np.int64)
    if not no_lora:
        active[:S], counts[:S] = sorted_by_slot.adapter_ids, sorted_by_slot.lengths
        starts[: S + 1] = offsets(sorted_by_slot.lengths)
    return LoRAKernelMeta(
        token_lora_mapping=mapping,
        token_indices_sorted_by_lora_ids=frozen("rows", sorted_by_slot.rows),
        active_lora_ids=frozen("active_lora_ids", active),
        num_tokens_per_lora=frozen("num_tokens_per_lora", counts),
        lora_token_start_loc=frozen("lora_token_start_loc", starts),
        no_lora_flag_cpu=frozen("no_lora_flag_cpu", [no_lora], np.bool_),
        num_active_loras_cpu=frozen("num_active_loras_cpu", [0 if no_lora else S]),
    )


def _vllm_v0(exam: Exam) -> None:
    start = exam.array("b_seq_start_loc", 0, int32=False)
    length = exam.array("seq_len_tensor", 0, int32=False)
    index = exam.array("lora_indices_tensor", BASE_ONLY, int32=False)
    batches, token_nums = exam.number("batches"), exam.number("token_nums")
    S = len(start) if batches is None else batches
    fields = {"b_seq_start_loc": start, "seq_len_tensor": length, "lora_indices_tensor": index}
    if not all([exam.has_length(field, len(array), S) for field, array in fields.items()]):
        return
    if token_nums is not None:
        exam.has_rows("token_nums", token_nums)
    exam.spans("b_seq_start_loc", start, length)
    exam.have_weights("lora_indices_tensor", index)
    longest, no_lora = exam.number("max_seq_length"), exam.number("no_lora")
    if longest not in (None, length.max(initial=0)):
        exam.add("max_seq_length", "counts", length.max(initial=0), longest)
    if no_lora not in (None, alone := int(S == 1 and index[0] == BASE_ONLY)):
        exam.add("no_lora", "counts", f"{alone}, as 1 is one batch, of -1", no_lora)
    rows = None
    if exam.get("rows") is not None:
        rows = exam.array("rows", 0, int32=False)
        exam.has_length("rows", len(rows), int(length.sum()))
        exam.each_once("rows", rows)
        exam.ascending("lora_indices_tensor", index, "unsorted", strictly=True)
    if exam.segments is not None and not exam.found:
        got = spread(index, length, rows, exam.segments.n)
        exam.same_rows("lora_indices_tensor", got, slots_of(exam.segments, exam.slots))


def _vllm_v1(exam: Exam) -> None:
    mapping = exam.array("token_lora_mapping", BASE_ONLY)
    rows = exam.array("token_indices_sorted_by_lora_ids", 0)
    active = exam.array("active_lora_ids", BASE_ONLY)
    counts = exam.array("num_tokens_per_lora", 0)
    starts = exam.array("lora_token_start_loc", 0)
    fits = exam.has_length("num_tokens_per_lora", len(counts), len(active))
    if not exam.has_length("lora_token_start_loc", len(starts), len(active) + 1) or not fits:
        return
    S = int(np.argmin(np.append(counts, 0) > 0))
    if exam.number("no_lora_flag_cpu"):
        _v1_base_only(exam, active, counts, starts)
        return
    exam.has_rows("token_lora_mapping", len(mapping))
    past = "past the last segment"
    rest = counts[S:], active[S:], starts[S + 1 :]
    exam.add_at("num_tokens_per_lora", "counts", f"0 {past}", rest[0], "at", rest[0] > 0, S)
    exam.add_at("active_lora_ids", "active ids", f"-1 {past}", rest[1], "at", rest[1] != -1, S)
    exam.add_at("lora_token_start_loc", "counts", f"0 {past}", rest[2], "at", rest[2] != 0, S + 1)
    exam.ascending("active_lora_ids", active[:S], "active ids", strictly=True)
    exam.spans("lora_token_start_loc", starts[:S], counts[:S])
    end = int(starts[:S][-1:].sum()) + int(counts[:S][-1:].sum())
    if starts[S] != end:
        exam.add("lora_token_start_loc", "end", f"{end}, the last one's end", starts[S], f"at {S}")
    exam.have_weights("token_lora_mapping", mapping, len(active) - 1)
    num_active = exam.number("num_active_loras_cpu")
    if num_active is not None and not S <= num_active <= len(active):  # may be rounded up
        exam.add("num_active_loras_cpu", "counts", f"{S} to {len(active)}", num_active)
    if exam.has_length("token_indices_sorted_by_lora_ids", len(rows), len(mapping)):
        _v1_rows(exam, mapping, rows, active[:S], counts[:S])
    if len(mapping) and (mapping == BASE_ONLY).all():
        exam.add("no_lora_flag_cpu", "base misplaced", "1, as all rows are base only", 0)
    if exam.segments is not None and not exam.found:
        exam.same_rows("token_lora_mapping", mapping, slots_of(exam.segments, exam.slots))


def _v1_rows(
    exam: Exam, mapping: Integers, rows: Integers, active: Integers, counts: Integers
) -> None:
    """The sort, and the segments' ids and counts, against the mapping."""
    field = "token_indices_sorted_by_lora_ids"
    if exam.each_once(field, rows):
        stable = np.argsort(mapping, kind="stable")
        exam.add_at(field, "unsorted", stable, rows, "position", rows != stable)
    slots, times = np.unique(mapping, return_counts=True)
    if not np.array_equal(slots, np.unique(active)):
        expected = f"{some(slots)}, as the rows name"
        exam.add("active_lora_ids", "active ids", expected, some(active))
    elif len(active) == len(slots):
        got = counts[np.argsort(active)]
        exam.add_at("num_tokens_per_lora", "counts", times, got, "segment", got != times)


def _v1_base_only(exam: Exam, active: Integers, counts: Integers, starts: Integers) -> None:
    """With the flag set the per-row fields are an earlier batch's, and not read."""
    flag = "as the flag is set"
    exam.add_at("active_lora_ids", "active ids", f"-1, {flag}", active, "at", active != -1)
    exam.add_at("num_tokens_per_lora", "counts", f"0, {flag}", counts, "at", counts != 0)
    exam.add_at("lora_token_start_loc", "counts", f"0, {flag}", starts, "at", starts != 0)
    if exam.segments is not None:
        named = slots_of(exam.segments, exam.slots)
        expected = f"-1 of all rows, {flag}"
        exam.add_at("no_lora_flag_cpu", "stale", expected, named, "row", named != BASE_ONLY)


def _v0_lengths(exam: Exam) -> Integers:
    if exam.n is None:
        raise ValueError("n was not passed")
    return np.diff(exam.ints("b_seq_start_loc"), append=exam.n)


def _v0_indices(exam: Exam) -> Integers:
    start = exam.ints("b_seq_start_loc")
    return wanted_slots(exam)[start if exam.get("rows") is None else exam.ints("rows")[start]]


def _v1_segments(exam: Exam) -> int:
    """How many segments two of V1's three padded fields have."""
    active, counts, starts = (
        exam.ints(field)
        for field in ("active_lora_ids", "num_tokens_per_lora", "lora_token_start_loc")
    )
    named = int(np.flatnonzero(active != BASE_ONLY).max(initial=-1)) + 1
    return sorted((named, int(np.count_nonzero(counts)), int(np.count_nonzero(starts))))[1]


def _v1_mapping(exam: Exam) -> Integers:
    rows, S = exam.ints("token_indices_sorted_by_lora_ids"), _v1_segments(exam)
    active, counts = exam.ints("active_lora_ids")[:S], exam.ints("num_tokens_per_lora")[:S]
    mapping = exam.ints("token_lora_mapping")
    mapping[rows] = repeated(active, counts, len(mapping))
    return mapping


def _v1_padded(field: str, derived: Callable[[Exam], Integers]) -> Callable[[Exam], Integers]:
    """What is derived, with the field's own values' padding behind it."""

    def padded(exam: Exam) -> Integers:
        fill = BASE_ONLY if field == "active_lora_ids" else 0
        whole = np.full(len(exam.ints(field)), fill, np.int64)
        values = derived(exam)
        whole[: len(values)] = values
        return whole

    return padded


def _v1_starts(exam: Exam) -> Integers:
    counts = exam.ints("num_tokens_per_lora")
    return offsets(counts[: np.count_nonzero(counts)])


def _v1_active(exam: Exam) -> Integers:
    return np.unique(exam.ints("token_lora_mapping"))


def _v1_counts(exam: Exam) -> Integers:
    return np.unique(exam.ints("token_lora_mapping"), return_counts=True)[1]


EXAMINERS = (
    Examiner(
        ("b_seq_start_loc",),
        _vllm_v0,
        {
            "b_seq_start_loc": ("gap", lambda exam: offsets(exam.ints("seq_len_tensor"))[:-1]),
            "seq_len_tensor": ("counts", _v0_lengths),
            "batches": (
                "counts",
                entries("b_seq_start_loc", "seq_len_tensor", "lora_indices_tensor"),
            ),
            "token_nums": ("stale", lambda exam: exam.ints("seq_len_tensor").sum()),
            "max_seq_length": ("counts", lambda exam: exam.ints("seq_len_tensor").max(initial=0)),
            "lora_indices_tensor": ("stale", _v0_indices),
        },
    ),
    Examiner(
        ("token_lora_mapping",),
        _vllm_v1,
        {
            "token_lora_mapping": ("stale", _v1_mapping),
            "token_indices_sorted_by_lora_ids": (
                "unsorted",
                lambda exam: np.argsort(exam.ints("token_lora_mapping"), kind="stable"),
            ),
            "active_lora_ids": (
                "active ids",
                _v1_padded("active_lora_ids", _v1_active),
            ),
            "num_tokens_per_lora": ("counts", _v1_padded("num_tokens_per_lora", _v1_counts)),
            "lora_token_start_loc": ("counts", _v1_padded("lora_token_start_loc", _v1_starts)),
            "no_lora_flag_cpu": (
                "base misplaced",
                lambda exam: [not exam.number("no_lora_flag_cpu")],
            ),
        },
    ),
)
