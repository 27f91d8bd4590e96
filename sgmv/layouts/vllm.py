"""vLLM's two layouts: V0's seven fields, and V1's `LoRAKernelMeta`.

Both name slots (vLLM: lora indices), not ids: `slots` tells which slot an id has. A
`LoRARequest.lora_int_id` is an id.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from sgmv.checks import check_count, fits_memory
from sgmv.errors import ValueRangeError, some
from sgmv.ids import BASE_ONLY, Integers
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
                         rows stand as they are

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

    Semantics: vLLM merges equal neighbours and does not sort, so an adapter whose rows stand apart
    is in several of its batches. `sort=True` gives the sorted form instead, one for each slot,
    for x[rows].

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
