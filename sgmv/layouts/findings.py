"""check: what is wrong with metadata that somebody's engine made, by field and place.

Each layout has one examiner below, told by a field that only it has. They look for the faults
that broke real systems; none of them stops at the first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from sgmv.adapters import AdapterStack
from sgmv.compat.arrays import as_array
from sgmv.errors import DtypeError, some
from sgmv.kernels.plan import BASE_ONLY, NO_SLOT
from sgmv.layouts.names import BASE_NAME
from sgmv.layouts.rows import (
    INT32_MAX,
    Batch,
    Slots,
    as_segments,
    row_ids,
    slot_table,
    slots_of,
    spread,
)
from sgmv.segment import Integers, check_count

Fault = Literal[
    "unsorted",  # offsets, ids or rows that do not ascend
    "overlap",  # rows in two segments
    "gap",  # rows in none
    "end",  # the segments do not end at the number of rows
    "no weights",  # an index, address or name behind which there is no adapter
    "stale",  # metadata of another batch
    "int32 wrap",  # a number that int32 does not hold, or what it became
    "base misplaced",  # -1 where the engine does not have it
    "active ids",  # V1's active_lora_ids do not ascend, or are not those of the rows
    "counts",  # a count that is not that of what it counts
    "shape",  # a field missing, of no integers, or too long or short for the others
]
REMEDY: Mapping[str, str] = {
    "unsorted": "sort the rows by slot, stably, before making the metadata",
    "overlap": "start each segment where the one before it ends",
    "gap": "start each segment where the one before it ends, and the first at 0",
    "end": "end the last segment at the number of rows",
    "no weights": "load the adapter first, or name base only",
    "stale": "make the metadata anew for every batch",
    "int32 wrap": "name slots, not ids, and split batches of 2**31 rows",
    "base misplaced": "put base-only rows where this engine has them, see docs/engines.md",
    "active ids": "list the slots of the rows once each, ascending, -1 first, then pad with -1",
    "counts": "count anew from the rows",
    "shape": "give all of the engine's fields, in the lengths that docs/engines.md tells",
}


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong: the field, which fault, what exactly, where, and what to do.

    >>> print(Finding("s", "end", "ends at 5 of 8 rows", "segment 2", "end at the last row"))
    s: end: ends at 5 of 8 rows (segment 2); end at the last row
    """

    field: str
    fault: Fault
    what: str
    where: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.field}: {self.fault}: {self.what} ({self.where}); {self.remedy}"


def check(
    metadata: object,
    adapter_ids: Batch | None = None,
    *,
    n: int | None = None,
    slots: Slots = None,
    names: Mapping[int, str] | None = None,
) -> list[Finding]:
    """What is wrong with an engine's metadata; nothing is if the list is empty.

    Semantics: every field is held against the engine's rules, the other fields, and what is told
    about the batch. There is no form that raises: whoever wants one raises what is in the list.

    metadata     a layout of this package, Segments, the engine's own object (of numpy arrays or
                 torch's CPU tensors), or a mapping of raw fields by the engine's names
    adapter_ids  (n,) the ids of this batch, to find metadata of another one
    n            its rows, where the ids are not at hand. Of Punica and FlashInfer without `rows`:
                 the rows that the call gets
    slots        which ids have weights: an AdapterStack or a mapping id -> slot
    names        PEFT's: a mapping id -> name

    Raises DtypeError for what has no field of any layout; as `segment` does for adapter_ids.
    Source: the faults are those of the engines' own issue trackers.

    >>> for finding in check({"s": [0, 3, 2, 5]}, n=8):
    ...     print(finding)
    s: unsorted: the next starts before it does (segment 1); sort the rows by slot, stably, before \
making the metadata
    s: end: ends at 5 of 8 rows (segment 2); end the last segment at the number of rows
    """
    exam = _Exam(metadata, adapter_ids, n, slots, names)
    for field, examine in EXAMINERS.items():
        if exam.get(field) is not None:
            examine(exam)
            return exam.found
    raise DtypeError(
        "metadata",
        f"an object or a mapping with one of the fields {some(EXAMINERS)}",
        type(metadata).__name__,
        "pass a layout of sgmv.layouts, or raw fields under the engine's names",
    )


class _Exam:
    """The metadata under examination, what is known of the batch, and what was found."""

    def __init__(
        self,
        metadata: object,
        adapter_ids: Batch | None,
        n: int | None,
        slots: Slots,
        names: Mapping[int, str] | None,
    ) -> None:
        self.metadata, self.slots, self.names = metadata, slots, names
        self.segments = None if adapter_ids is None else as_segments(adapter_ids)
        self.n = None if n is None else check_count("n", n, 0)
        if self.segments is not None:
            self.n = self.segments.n
        self.found: list[Finding] = []

    def add(self, field: str, fault: Fault, what: str, where: str = "the whole field") -> None:
        self.found.append(Finding(field, fault, what, where, REMEDY[fault]))

    def add_at(
        self, field: str, fault: Fault, what: str, kind: str, wrong: Any, first: int = 0
    ) -> None:
        """A finding if any of these are wrong; kind says what is counted, from first."""
        at = np.flatnonzero(wrong) + first
        if at.size:
            self.add(field, fault, what, f"{kind} {at[0] if at.size == 1 else some(at)}")

    def get(self, field: str) -> Any:
        if isinstance(self.metadata, Mapping):
            return self.metadata.get(field)
        return getattr(self.metadata, field, None)

    def array(self, field: str, least: int, *, int32: bool = True) -> Integers:
        """The field as int64; numbers that int32 does not hold, or below the least, are found."""
        value = self.get(field)
        array = np.asarray(value) if isinstance(value, list | tuple | range) else None
        if array is None and value is not None:
            array = as_array(field, value)
        if array is None or array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
            self.add(field, "shape", "expected integers in one dimension")
            return np.empty(0, np.int64)
        self.add_at(field, "int32 wrap", f"below {least}, as after a wrap", "at", array < least)
        if int32:
            self.add_at(field, "int32 wrap", "2**31 or above", "at", array > INT32_MAX)
        return array.astype(np.int64)

    def number(self, field: str) -> int | None:
        """The field as one number; None if it is not there."""
        value = self.get(field)
        if value is None or isinstance(value, int | np.integer | np.bool_):
            return None if value is None else int(value)
        array = np.asarray(value) if isinstance(value, list | tuple) else as_array(field, value)
        if array.size != 1:
            self.add(field, "shape", f"{array.size} numbers, not one")
            return None
        return int(array.reshape(-1)[0])

    def long(self, field: str, length: int, expected: int) -> bool:
        """Whether the field is as long as it has to be; found if not."""
        if length != expected:
            self.add(field, "shape", f"{length} entries, not {expected}")
        return length == expected

    def told(self, field: str, rows: int) -> None:
        """The metadata itself tells its number of rows: another batch's, or what to hold it to."""
        if self.n is not None and rows != self.n:
            self.add(field, "stale", f"made for {rows} rows, this batch has {self.n}")
        self.n = rows

    def spans(self, field: str, start: Integers, length: Integers, *, apart: bool = False) -> None:
        """Segments one after the other from 0 to n; `apart`: rows may stand between them."""
        end, following = start + length, start[1:]
        descends = following < start[:-1]
        negative = np.append(descends, False) | (length < 0)
        self.add_at(field, "unsorted", "the next starts before it does", "segment", negative)
        over = ~descends & (following < end[:-1])
        self.add_at(field, "overlap", "starts before the last one ends", "segment", over, 1)
        if not apart:
            left = (following > end[:-1]) & (length[:-1] >= 0)
            self.add_at(field, "gap", "starts after the last one ends", "segment", left, 1)
            if len(start) and start[0] > 0:
                self.add(field, "gap", f"starts at {start[0]}, not at 0", "segment 0")
        last = int(end[-1]) if len(end) else 0
        if self.n is not None and (last > self.n if apart else last != self.n):
            what = f"ends at {last} of {self.n} rows"
            self.add(field, "end", what, f"segment {len(end) - 1}" if len(end) else "no segment")

    def indptr(self, field: str, indptr: Integers) -> None:
        """Offsets (S+1,): the same in one field."""
        if len(indptr) == 0:
            self.add(field, "shape", "no offsets; there is at least the 0")
            return
        self.spans(field, indptr[:-1], np.diff(indptr))
        if len(indptr) == 1 and indptr[0] > 0:
            self.add(field, "gap", f"starts at {indptr[0]}, not at 0", "segment 0")

    def each_once(self, field: str, rows: Integers, n: int | None = None) -> bool:
        """Whether these are all rows, each once; or, if n is told, some of so many rows."""
        before, most = len(self.found), len(rows) if n is None else n
        beyond = rows >= most
        self.add_at(field, "stale", f"no row of this batch, which has {most}", "position", beyond)
        found, times = np.unique(rows, return_counts=True)
        if (twice := found[times > 1]).size:
            self.add(field, "overlap", "named more than once", f"rows {some(twice)}")
        if n is None and (missing := np.setdiff1d(np.arange(most), found)).size:
            self.add(field, "gap", "named by no position", f"rows {some(missing)}")
        return len(self.found) == before

    def ascending(self, field: str, indices: Integers, fault: Fault, *, strictly: bool) -> None:
        """Indices of sorted segments: -1 first, then ascending."""
        least = 1 if strictly else 0
        base = indices[1:] == BASE_ONLY
        if not strictly:
            base &= indices[:-1] != BASE_ONLY
        self.add_at(field, "base misplaced", "-1 after another", "segment", base, 1)
        descends = (np.diff(indices) < least) & (indices[1:] != BASE_ONLY)
        self.add_at(field, fault, "not above the last one", "segment", descends, 1)

    def weights(self, field: str, indices: Integers, count: int | None = None) -> None:
        """Every index but -1 has weights: a slot in use, and below the count."""
        wrong = np.zeros(len(indices), bool) if count is None else indices >= count
        if self.slots is not None:
            wrong |= ~np.isin(indices, slot_table(self.slots)[1])
        wrong &= indices > BASE_ONLY
        distinct = some(np.unique(indices[wrong]))
        self.add_at(field, "no weights", f"no adapter in slots {distinct}", "at", wrong)

    def no_base(self, field: str, indices: Integers) -> None:
        """For engines that index with every number: -1 would be read as one."""
        self.add_at(field, "base misplaced", "-1 is read as an index", "at", indices == BASE_ONLY)

    def same(self, field: str, got: Integers, wanted: Integers) -> None:
        """Row by row what this batch asks for; told only of metadata that is otherwise right."""
        if not self.found:
            self.add_at(field, "stale", "another adapter than this batch's", "row", got != wanted)

    def rows_handed_over(self, wanted: Integers | None) -> Integers | None:
        """Of engines that get no base-only rows: those they get, if told; n becomes their number.

        wanted  (n,) the slot that this batch asks for, -1 for rows that are not handed over
        """
        expected = None if wanted is None else int(np.count_nonzero(wanted != BASE_ONLY))
        if self.get("rows") is None:
            self.n = self.n if expected is None else expected
            return None
        rows = self.array("rows", 0, int32=False)
        n = int(rows.max(initial=-1)) + 1 if self.n is None else self.n
        self.each_once("rows", rows, n)
        if expected not in (None, len(rows)):
            self.add("rows", "stale", f"{len(rows)} rows, this batch has {expected} with weights")
        self.n = len(rows)
        return rows


def _segments(exam: _Exam) -> None:
    seq_start = exam.array("seq_start", 0, int32=False)
    ids = exam.array("adapter_ids", BASE_ONLY, int32=False)
    rows = exam.array("rows", 0, int32=False)
    if not exam.long("adapter_ids", len(ids), len(seq_start) - 1):
        return
    exam.told("rows", len(rows))
    exam.indptr("seq_start", seq_start)
    exam.each_once("rows", rows)
    exam.ascending("adapter_ids", ids, "unsorted", strictly=True)
    if exam.slots is not None:
        known = np.isin(ids, slot_table(exam.slots)[0]) | (ids == BASE_ONLY)
        exam.add_at("adapter_ids", "no weights", "not loaded", "segment", ~known)
    if exam.segments is not None and not exam.found:
        wanted = row_ids(exam.segments)
        exam.same("adapter_ids", spread(ids, np.diff(seq_start), rows, len(rows)), wanted)


def _punica(exam: _Exam) -> None:
    s = exam.array("s", 0)
    wanted = None if exam.segments is None else slots_of(exam.segments, exam.slots)
    table = exam.slots.table if isinstance(exam.slots, AdapterStack) else None
    lora_rank = exam.number("lora_rank")
    if wanted is not None and table is not None and lora_rank is not None:
        wanted = np.where(np.append(table.ranks, 0)[wanted] == lora_rank, wanted, BASE_ONLY)
    n = exam.n
    rows = exam.rows_handed_over(wanted)
    exam.indptr("s", s)
    for field in ("wa_ptr", "wb_ptr", "w_ptr"):
        if exam.get(field) is not None:
            pointers = exam.array(field, 0, int32=False)
            exam.long(field, len(pointers), len(s) - 1)
            exam.add_at(field, "no weights", "a null pointer", "segment", pointers == 0)
    if table is None or exam.get("wa_ptr") is None:
        return
    wa_ptr = exam.array("wa_ptr", 0, int32=False)
    held = np.flatnonzero([weights is not None for weights in table.weights])
    slot_at = dict(zip(table.wa_address[held].tolist(), held.tolist(), strict=True))
    slot = np.array([slot_at.get(address, NO_SLOT) for address in wa_ptr.tolist()], np.int64)
    moved = (slot == NO_SLOT) & (wa_ptr != 0)
    exam.add_at("wa_ptr", "no weights", "not an address of this stack's wa", "segment", moved)
    if wanted is not None and rows is not None and n is not None and not exam.found:
        exam.same("wa_ptr", spread(slot, np.diff(s), rows, n), wanted)


def _batch_len_info(exam: _Exam) -> None:
    doff, decode = exam.number("doff") or 0, exam.number("decode")
    if decode is not None:
        exam.told("decode", doff + decode)
    if exam.get("indptr") is not None:
        indptr = exam.array("indptr", 0)
        exam.n = doff
        exam.indptr("indptr", indptr)
        if exam.get("prefills") is not None:
            prefills = exam.array("prefills", 0)
            if exam.long("indptr", len(indptr), len(prefills) + 1):
                wrong = np.diff(indptr) != prefills
                exam.add_at("indptr", "counts", "not the length of the prefill", "request", wrong)
    elif doff:
        exam.add("doff", "counts", f"{doff} rows of prefills, but no indptr")


def _lorax(exam: _Exam) -> None:
    indices = exam.array("adapter_indices", BASE_ONLY, int32=False)
    s, named = exam.array("adapter_segments", 0), exam.array("segment_indices", -1, int32=False)
    if not exam.long("segment_indices", len(named), len(s) - 1):
        return
    exam.told("adapter_indices", len(indices))
    exam.indptr("adapter_segments", s)
    exam.no_base("adapter_indices", indices)
    exam.no_base("segment_indices", named)
    if exam.slots is not None:
        known = np.append(slot_table(exam.slots)[0] + 1, 0)
        lost = ~np.isin(named, known) & (named > 0)
        exam.add_at("segment_indices", "no weights", "not loaded", "segment", lost)
    if exam.found:
        return
    wrong = indices != np.repeat(named, np.diff(s))
    exam.add_at("segment_indices", "counts", "not what adapter_indices say", "row", wrong)
    _lorax_launches(exam, s, named)
    if exam.segments is not None:
        exam.same("adapter_indices", indices, row_ids(exam.segments) + 1)


def _lorax_launches(exam: _Exam, s: Integers, named: Integers) -> None:
    """Each launch's slices are whole segments, in one launch at most, and none is base only."""
    launched = np.zeros(len(named), np.int64)
    for rank, launch in (exam.get("rank_data") or {}).items():
        within = _Exam(launch, None, exam.n, None, None)
        start, end = _lorax_slices(within)
        exam.found += [replace(f, field=f"rank_data[{rank}].{f.field}") for f in within.found]
        if within.found or not len(named):
            continue
        field, at = f"rank_data[{rank}].s_start", np.searchsorted(s[:-1], start)
        at[at == len(named)] = 0
        short = (s[at] != start) | (end < s[at + 1])
        exam.add_at(field, "gap", "does not hold its whole segment", "slice", short)
        exam.add_at(field, "overlap", "goes past its segment", "slice", end > s[at + 1])
        exam.add_at(field, "base misplaced", "a base-only segment", "slice", named[at] == 0)
        launched += np.bincount(at, minlength=len(named))
    exam.add_at("rank_data", "overlap", "in more than one slice", "segment", launched > 1)


def _lorax_slices(exam: _Exam) -> tuple[Integers, Integers]:
    """One launch: slices that ascend, with or without rows between them, and not past n."""
    start, end = exam.array("s_start", 0), exam.array("s_end", 0)
    if exam.long("s_end", len(end), len(start)):
        exam.spans("s_start", start, end - start, apart=True)
    return start, end


def _vllm_v0(exam: _Exam) -> None:
    start = exam.array("b_seq_start_loc", 0, int32=False)
    length = exam.array("seq_len_tensor", 0, int32=False)
    index = exam.array("lora_indices_tensor", BASE_ONLY, int32=False)
    batches, token_nums = exam.number("batches"), exam.number("token_nums")
    S = len(start) if batches is None else batches
    fields = {"b_seq_start_loc": start, "seq_len_tensor": length, "lora_indices_tensor": index}
    if not all([exam.long(field, len(array), S) for field, array in fields.items()]):
        return
    if token_nums is not None:
        exam.told("token_nums", token_nums)
    exam.spans("b_seq_start_loc", start, length)
    exam.weights("lora_indices_tensor", index)
    longest, no_lora = exam.number("max_seq_length"), exam.number("no_lora")
    if longest not in (None, length.max(initial=0)):
        exam.add("max_seq_length", "counts", f"{longest}, the longest is {length.max(initial=0)}")
    if no_lora not in (None, int(S == 1 and index[0] == BASE_ONLY)):
        exam.add("no_lora", "counts", "set if and only if there is one batch, of -1")
    rows = None
    if exam.get("rows") is not None:
        rows = exam.array("rows", 0, int32=False)
        exam.long("rows", len(rows), int(length.sum()))
        exam.each_once("rows", rows)
        exam.ascending("lora_indices_tensor", index, "unsorted", strictly=True)
    if exam.segments is not None and not exam.found:
        got = spread(index, length, rows, exam.segments.n)
        exam.same("lora_indices_tensor", got, slots_of(exam.segments, exam.slots))


def _vllm_v1(exam: _Exam) -> None:
    mapping = exam.array("token_lora_mapping", BASE_ONLY)
    rows = exam.array("token_indices_sorted_by_lora_ids", 0)
    active = exam.array("active_lora_ids", BASE_ONLY)
    counts = exam.array("num_tokens_per_lora", 0)
    starts = exam.array("lora_token_start_loc", 0)
    fits = exam.long("num_tokens_per_lora", len(counts), len(active))
    if not exam.long("lora_token_start_loc", len(starts), len(active) + 1) or not fits:
        return
    S = int(np.argmin(np.append(counts, 0) > 0))
    if exam.number("no_lora_flag_cpu"):
        _vllm_v1_base_only(exam, active, counts, starts)
        return
    exam.told("token_lora_mapping", len(mapping))
    exam.add_at("num_tokens_per_lora", "counts", "after the last segment", "at", counts[S:] > 0, S)
    exam.add_at("active_lora_ids", "active ids", "an id of no rows", "at", active[S:] != -1, S)
    exam.add_at("lora_token_start_loc", "counts", "not 0", "at", starts[S + 1 :] != 0, S + 1)
    exam.ascending("active_lora_ids", active[:S], "active ids", strictly=True)
    exam.spans("lora_token_start_loc", starts[:S], counts[:S])
    if starts[S] != starts[:S][-1:].sum() + counts[:S][-1:].sum():
        exam.add("lora_token_start_loc", "end", f"{starts[S]} after the last segment", f"at {S}")
    exam.weights("token_lora_mapping", mapping, len(active) - 1)
    num_active = exam.number("num_active_loras_cpu")
    if num_active is not None and not S <= num_active <= len(active):  # may be rounded up
        exam.add("num_active_loras_cpu", "counts", f"{num_active} of {S} segments")
    if exam.long("token_indices_sorted_by_lora_ids", len(rows), len(mapping)):
        _vllm_v1_rows(exam, mapping, rows, active[:S], counts[:S])
    if len(mapping) and (mapping == BASE_ONLY).all():
        exam.add("no_lora_flag_cpu", "base misplaced", "not set, though all rows are base only")
    if exam.segments is not None and not exam.found:
        exam.same("token_lora_mapping", mapping, slots_of(exam.segments, exam.slots))


def _vllm_v1_rows(
    exam: _Exam, mapping: Integers, rows: Integers, active: Integers, counts: Integers
) -> None:
    """The sort, and the segments' ids and counts, against the mapping."""
    field = "token_indices_sorted_by_lora_ids"
    if exam.each_once(field, rows):
        slot = mapping[rows]
        exam.add_at(field, "unsorted", "slots descend", "position", np.diff(slot) < 0, 1)
        unstable = (np.diff(slot) == 0) & (np.diff(rows) < 0)
        exam.add_at(field, "unsorted", "the sort is not stable", "position", unstable, 1)
    slots, times = np.unique(mapping, return_counts=True)
    if not np.array_equal(slots, np.unique(active)):
        what = f"{some(active)}, but the rows name {some(slots)}"
        exam.add("active_lora_ids", "active ids", what)
    elif len(active) == len(slots):
        wrong = counts[np.argsort(active)] != times
        exam.add_at("num_tokens_per_lora", "counts", "not that of the rows", "segment", wrong)


def _vllm_v1_base_only(exam: _Exam, active: Integers, counts: Integers, starts: Integers) -> None:
    """With the flag set the per-row fields are an earlier batch's, and not read."""
    exam.add_at("active_lora_ids", "active ids", "not -1, but the flag is set", "at", active != -1)
    exam.add_at("num_tokens_per_lora", "counts", "not 0, but the flag is set", "at", counts != 0)
    exam.add_at("lora_token_start_loc", "counts", "not 0, but the flag is set", "at", starts != 0)
    if exam.segments is not None:
        named = slots_of(exam.segments, exam.slots) != BASE_ONLY
        exam.add_at("no_lora_flag_cpu", "stale", "set, but rows name adapters", "row", named)


def _grouped(exam: _Exam) -> None:
    """SGLang's batch, which tells ranks, and FlashInfer's, which does not."""
    sglang = exam.get("lora_ranks") is not None
    indptr = (
        exam.array("seg_indptr", 0, int32=sglang) if exam.get("seg_indptr") is not None else None
    )
    lengths = exam.array("seg_lens", 0, int32=sglang) if exam.get("seg_lens") is not None else None
    index = exam.array("weight_indices", BASE_ONLY, int32=sglang)
    if indptr is None:
        lengths = np.empty(0, np.int64) if lengths is None else lengths
        indptr = np.concatenate([[0], np.cumsum(lengths)])
    S = exam.number("num_segments" if sglang else "batch_size")
    S = len(indptr) - 1 if S is None else S
    fits = [exam.long("seg_indptr", len(indptr), S + 1), exam.long("weight_indices", len(index), S)]
    if lengths is not None:
        fits.append(exam.long("seg_lens", len(lengths), S))
    if not all(fits):
        return
    exam.no_base("weight_indices", index)
    (_sglang if sglang else _flashinfer)(exam, indptr, lengths, index)


def _spans_of(exam: _Exam, indptr: Integers, lengths: Integers | None) -> None:
    """The offsets, held against the lengths if both are there."""
    exam.indptr("seg_indptr", indptr)
    if lengths is not None:
        more, less = lengths > np.diff(indptr), lengths < np.diff(indptr)
        exam.add_at("seg_lens", "overlap", "reaches into the next segment", "segment", more)
        exam.add_at("seg_lens", "gap", "leaves rows out before the next", "segment", less)


def _sglang(exam: _Exam, indptr: Integers, lengths: Integers | None, index: Integers) -> None:
    ranks, permutation = exam.array("lora_ranks", 0), None
    if exam.get("permutation") is not None:
        permutation = exam.array("permutation", 0)
        exam.told("permutation", len(permutation))
        exam.each_once("permutation", permutation)
        exam.ascending("weight_indices", index, "unsorted", strictly=False)
    elif lengths is not None:
        exam.told("seg_lens", int(lengths.sum()))
    _spans_of(exam, indptr, lengths)
    exam.add_at("weight_indices", "no weights", "no such slot", "segment", index >= len(ranks))
    most = exam.number("max_len")
    if most is not None:
        longer = np.diff(indptr) > most
        exam.add_at("max_len", "counts", f"{most}, but a segment is longer", "segment", longer)
    if exam.found or exam.slots is None:
        return
    held = slot_table(exam.slots)[1]
    base = (ranks == 0) & ~np.isin(np.arange(len(ranks)), held)
    lost = ~np.isin(index, held) & ~base[index]
    exam.add_at("weight_indices", "no weights", "no adapter in this slot", "segment", lost)
    if exam.segments is not None and not exam.found:
        got = spread(index, np.diff(indptr), permutation, exam.segments.n)
        got = np.where(base[got], BASE_ONLY, got)
        exam.same("weight_indices", got, slots_of(exam.segments, exam.slots))


def _flashinfer(exam: _Exam, indptr: Integers, lengths: Integers | None, index: Integers) -> None:
    wanted = None if exam.segments is None else slots_of(exam.segments, exam.slots)
    n = exam.n
    rows = exam.rows_handed_over(wanted)
    if rows is None and lengths is not None:
        exam.told("seg_lens", int(lengths.sum()))
    _spans_of(exam, indptr, lengths)
    exam.weights("weight_indices", index)
    if wanted is not None and rows is not None and n is not None and not exam.found:
        exam.same("weight_indices", spread(index, np.diff(indptr), rows, n), wanted)


def _peft(exam: _Exam) -> None:
    adapter_names = list(exam.get("adapter_names"))
    exam.told("adapter_names", len(adapter_names))
    nameless = [not isinstance(name, str) for name in adapter_names]
    what = f"no name; the base model's is {BASE_NAME!r}"
    exam.add_at("adapter_names", "base misplaced", what, "sample", nameless)
    if exam.names is not None:
        known = {BASE_NAME, *exam.names.values()}
        lost = [isinstance(name, str) and name not in known for name in adapter_names]
        exam.add_at("adapter_names", "no weights", "PEFT passes over this name", "sample", lost)
    if exam.segments is not None and not exam.found:
        named = exam.names or {}
        ids = row_ids(exam.segments).tolist()
        wanted = [BASE_NAME if i == BASE_ONLY else named.get(i, str(i)) for i in ids]
        exam.same("adapter_names", np.array(adapter_names, object), np.array(wanted, object))


EXAMINERS: Mapping[str, Callable[[_Exam], object]] = {
    "seq_start": _segments,
    "s": _punica,
    "decode": _batch_len_info,
    "adapter_indices": _lorax,
    "s_start": _lorax_slices,
    "b_seq_start_loc": _vllm_v0,
    "token_lora_mapping": _vllm_v1,
    "weight_indices": _grouped,
    "adapter_names": _peft,
}
