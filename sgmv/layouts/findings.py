"""check: what is wrong with metadata that somebody's engine made, by field and place.

Each layout has one examiner below, told by a field that only it has. They look for the faults
that broke real systems; none of them stops at the first. Where two fields disagree an examiner
cannot know which is wrong; REPAIRS then derives each field from the others, and one that alone
makes all of it right is named first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from sgmv.checks import check_count, check_several
from sgmv.errors import DtypeError, SgmvError, shown, some
from sgmv.ids import BASE_ONLY, MOST, NO_SLOT, Integers, is_integer
from sgmv.layouts.names import BASE_NAME, checked_names
from sgmv.layouts.rows import (
    INT32_MAX,
    Batch,
    Slots,
    as_segments,
    offsets,
    row_ids,
    runs,
    slot_table,
    slots_of,
    spread,
)
from sgmv.stack import AdapterStack
from sgmv.tensors import as_array

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
    "base misplaced": "put base-only rows where `python -m sgmv explain layout` has them",
    "active ids": "list the slots of the rows once each, ascending, -1 first, then pad with -1",
    "counts": "count anew from the rows",
    "shape": "give all of the engine's fields, as long as `python -m sgmv explain layout` has them",
}


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong: the field, which fault, what was expected, where, and what to do.

    >>> print(Finding("s", "end", "expected 8, got 5", "segment 2", "end at the last row"))
    s: end: expected 8, got 5 (segment 2); end at the last row
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
    about the batch. If a change of one field alone would make all of it right, that field's finding
    is the first. There is no form that raises: whoever wants one raises what is in the list.

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
    s: unsorted: expected the next to start at 3 or later, got 2 (segment 1); sort the rows by \
slot, stably, before making the metadata
    s: end: expected the end at 8, the number of rows, got 5 (segment 2); end the last segment at \
the number of rows
    """
    exam = _Exam(metadata, adapter_ids, n, slots, names)
    for field, examine in EXAMINERS.items():
        if exam.get(field) is not None:
            examine(exam)
            return _culprit_first(exam, examine, REPAIRS[field])
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
        self.metadata, self.slots, self.names = metadata, slots, checked_names(names)
        self.instead: dict[str, Any] = {}  # fields as they would be after a repair
        self.told_n = n
        self.wanted: Integers | None = None  # (n,) the slots, -1 on rows that are not handed over
        self.slot_of_segment: Integers | None = None
        self.segments = None if adapter_ids is None else as_segments(adapter_ids)
        self.n = None if n is None else check_count("n", n, 0)
        if self.segments is not None:
            self.n = self.segments.n
        self.found: list[Finding] = []

    def repaired(self, field: str, value: Any) -> _Exam:
        """The same metadata with another value for one field."""
        other = _Exam(self.metadata, self.segments, self.told_n, self.slots, self.names)
        other.instead = {field: value}
        return other

    def add(
        self,
        field: str,
        fault: Fault,
        expected: object,
        got: object,
        where: str = "the whole field",
    ) -> None:
        what = f"expected {expected}, got {got}"
        self.found.append(Finding(field, fault, what, where, REMEDY[fault]))

    def add_at(
        self,
        field: str,
        fault: Fault,
        expected: object,
        got: Any,
        kind: str,
        wrong: Any,
        first: int = 0,
    ) -> None:
        """A finding if any of these are wrong; kind says what is counted, from first.

        expected  a text, or the right values; got  the values that are there, one for each of wrong
        """
        at = np.flatnonzero(wrong)
        if at.size == 0:
            return
        right = _shown(expected, at) if isinstance(expected, np.ndarray) else expected
        places = at + first
        where = f"{kind} {places[0] if at.size == 1 else some(places)}"
        self.add(field, fault, right, _shown(got, at), where)

    def get(self, field: str) -> Any:
        if field in self.instead:
            return self.instead[field]
        if isinstance(self.metadata, Mapping):
            return self.metadata.get(field)
        return getattr(self.metadata, field, None)

    def ints(self, field: str) -> Integers:
        """The field as int64, unexamined."""
        array = self.numbers(field)
        if array is None:
            raise ValueError("no integers")
        flat: Integers = array.reshape(-1)
        return flat

    def numbers(self, field: str, found: bool = False) -> Any:
        """The field as an array of int64, None if it holds anything but integers.

        found  whether integers that int64 does not hold are to be found
        """
        value = self.get(field)
        try:
            plain = isinstance(value, list | tuple | range | int | np.generic | np.ma.MaskedArray)
            array = np.asarray(value) if plain else as_array(field, value)
            if array.dtype.kind == "f" and isinstance(value, list | tuple):
                array = np.array(value, object)  # of int64 and uint64 numpy made floats
        except (ValueError, TypeError):  # of unequal lengths, or no array
            return None
        if array.size == 0:
            return array.astype(np.int64) if array.dtype.kind in "iufO" else None
        kinds = "iu" if found else "iub"
        if array.dtype.kind not in kinds and not all(map(is_integer, array.flat)):
            return None
        beyond = (array > MOST) | (array < -MOST - 1)
        if not beyond.any():
            return array.astype(np.int64)
        if found:
            self.add_at(field, "int32 wrap", "less than 2**63", array.ravel(), "at", beyond.ravel())
        bounded = [min(max(int(i), -MOST - 1), MOST) for i in array.ravel().tolist()]
        return np.array(bounded, np.int64).reshape(array.shape)

    def array(self, field: str, least: int, *, int32: bool = True) -> Integers:
        """The field as int64; numbers that int32 does not hold, or below the least, are found."""
        array = self.numbers(field, found=True)
        if array is None or array.ndim != 1:
            value = self.get(field)
            got = "none" if value is None else type(value).__name__
            if isinstance(value, np.ndarray) or array is not None:
                shaped = np.asarray(value) if array is None else array
                got = f"{getattr(value, 'dtype', shaped.dtype)} of shape {shaped.shape}"
            self.add(field, "shape", "integers in one dimension", got)
            return np.empty(0, np.int64)
        self.add_at(field, "int32 wrap", f"{least} or more", array, "at", array < least)
        if int32:
            self.add_at(field, "int32 wrap", "less than 2**31", array, "at", array > INT32_MAX)
        whole: Integers = array
        return whole

    def number(self, field: str) -> int | None:
        """The field as one number; None if it is not there."""
        value = self.get(field)
        if value is None or isinstance(value, bool | np.bool_) or is_integer(value):
            return None if value is None else int(value)
        array = self.numbers(field)
        if array is None or array.size != 1:
            got = shown(repr(value)) if array is None else f"{array.size}"
            self.add(field, "shape", "one number", got)
            return None
        return int(array.reshape(-1)[0])

    def long(self, field: str, length: int, expected: int) -> bool:
        """Whether the field is as long as it has to be; found if not."""
        if length != expected:
            self.add(field, "shape", f"{expected} entries", length)
        return length == expected

    def told(self, field: str, rows: int) -> None:
        """The metadata itself tells its number of rows: another batch's, or what to hold it to."""
        if self.n is not None and rows != self.n:
            self.add(field, "stale", f"{self.n} rows, as this batch has", rows)
        self.n = rows

    def spans(self, field: str, start: Integers, length: Integers, *, apart: bool = False) -> None:
        """Segments one after the other from 0 to n; `apart`: rows may stand between them."""
        end, following = start + length, start[1:]
        descends = following < start[:-1]
        later = np.append(following, end[-1:])
        negative = np.append(descends, False)[: len(start)] | (length < 0)
        at = np.flatnonzero(negative)
        expected = f"the next to start at {_shown(start, at)} or later"
        self.add_at(field, "unsorted", expected, later, "segment", negative)
        over = ~descends & (following < end[:-1])
        at = np.flatnonzero(over)
        expected = f"a start at {_shown(end[:-1], at)}, where the last one ends, or later"
        self.add_at(field, "overlap", expected, following, "segment", over, 1)
        if not apart:
            left = (following > end[:-1]) & (length[:-1] >= 0)
            expected = (
                f"a start at {_shown(end[:-1], np.flatnonzero(left))}, where the last one ends"
            )
            self.add_at(field, "gap", expected, following, "segment", left, 1)
            if len(start) and start[0] > 0:
                self.add(field, "gap", "a start at 0", start[0], "segment 0")
        last = int(end[-1]) if len(end) else 0
        if self.n is not None and (last > self.n if apart else last != self.n):
            expected = f"the end at {self.n}, the number of rows"
            where = f"segment {len(end) - 1}" if len(end) else "no segment"
            self.add(field, "end", f"{expected}, or before" if apart else expected, last, where)

    def indptr(self, field: str, indptr: Integers) -> None:
        """Offsets (S+1,): the same in one field."""
        if len(indptr) == 0:
            self.add(field, "shape", "at least the offset 0", "none")
            return
        self.spans(field, indptr[:-1], np.diff(indptr))
        if len(indptr) == 1 and indptr[0] > 0:
            self.add(field, "gap", "a start at 0", indptr[0], "segment 0")

    def each_once(self, field: str, rows: Integers, n: int | None = None) -> bool:
        """Whether these are all rows, each once; or, if n is told, some of so many rows."""
        before, most = len(self.found), len(rows) if n is None else n
        beyond = rows >= most
        expected = f"rows below {most}, as this batch has so many"
        self.add_at(field, "stale", expected, rows, "position", beyond)
        found, times = np.unique(rows, return_counts=True)
        if (more := times > 1).any():
            got = f"{_shown(times, np.flatnonzero(more))} times"
            self.add(field, "overlap", "each row once", got, f"rows {some(found[more])}")
        if n is None and (missing := np.setdiff1d(np.arange(most), found)).size:
            self.add(field, "gap", "each row once", "none", f"rows {some(missing)}")
        return len(self.found) == before

    def ascending(self, field: str, indices: Integers, fault: Fault, *, strictly: bool) -> None:
        """Indices of sorted segments: -1 first, then ascending."""
        least = 1 if strictly else 0
        base = indices[1:] == BASE_ONLY
        if not strictly:
            base &= indices[:-1] != BASE_ONLY
        self.add_at(field, "base misplaced", "-1 first alone", indices[1:], "segment", base, 1)
        descends = (np.diff(indices) < least) & (indices[1:] != BASE_ONLY)
        before = _shown(indices[:-1], np.flatnonzero(descends))
        expected = (
            f"above {before}, the last one" if strictly else f"{before}, the last one, or more"
        )
        self.add_at(field, fault, expected, indices[1:], "segment", descends, 1)

    def weights(self, field: str, indices: Integers, count: int | None = None) -> None:
        """Every index but -1 has weights: a slot in use, and below the count."""
        wrong = np.zeros(len(indices), bool) if count is None else indices >= count
        if self.slots is not None:
            wrong |= ~np.isin(indices, slot_table(self.slots)[1])
        wrong &= indices > BASE_ONLY
        self.add_at(field, "no weights", "slots with an adapter, or -1", indices, "at", wrong)

    def no_base(self, field: str, indices: Integers) -> None:
        """For engines that index with every number: -1 would be read as one."""
        base = indices == BASE_ONLY
        self.add_at(
            field, "base misplaced", "0 or more, as -1 is an index here", indices, "at", base
        )

    def same(self, field: str, got: Integers, wanted: Integers) -> None:
        """Row by row what this batch asks for; told only of metadata that is otherwise right."""
        if not self.found:
            self.add_at(field, "stale", wanted, got, "row", got != wanted)

    def rows_handed_over(self, wanted: Integers | None) -> Integers | None:
        """Of engines that get no base-only rows: those they get, if told; n becomes their number.

        wanted  (n,) the slot that this batch asks for, -1 for rows that are not handed over
        """
        self.wanted = wanted
        expected = None if wanted is None else int(np.count_nonzero(wanted != BASE_ONLY))
        if self.get("rows") is None:
            self.n = self.n if expected is None else expected
            return None
        rows = self.array("rows", 0, int32=False)
        n = int(rows.max(initial=-1)) + 1 if self.n is None else self.n
        self.each_once("rows", rows, n)
        if expected not in (None, len(rows)):
            self.add("rows", "stale", f"the {expected} rows of this batch with weights", len(rows))
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
        exam.add_at("adapter_ids", "no weights", "ids that are loaded", ids, "segment", ~known)
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
            null = pointers < LEAST_ADDRESS
            exam.add_at(field, "no weights", "an address of weights", pointers, "segment", null)
            if table is not None:
                size = table.dtype.itemsize
                odd = (pointers % size != 0) & ~null
                expected = f"addresses that {size} divides, the size of an element"
                exam.add_at(field, "no weights", expected, pointers, "segment", odd)
            _owned(exam, field, pointers)
    wa_ptr = exam.numbers("wa_ptr")
    if table is None or wa_ptr is None or wa_ptr.ndim != 1:
        return
    held = np.flatnonzero([weights is not None for weights in table.weights])
    slot_at = dict(zip(table.wa_address[held].tolist(), held.tolist(), strict=True))
    slot = np.array([slot_at.get(address, NO_SLOT) for address in wa_ptr.tolist()], np.int64)
    exam.slot_of_segment = slot
    moved = (slot == NO_SLOT) & (wa_ptr >= LEAST_ADDRESS)
    exam.add_at("wa_ptr", "no weights", "an address of this stack's wa", wa_ptr, "segment", moved)
    if wanted is not None and rows is not None and n is not None and not exam.found:
        exam.same("wa_ptr", spread(slot, np.diff(s), rows, n), wanted)


def _owned(exam: _Exam, field: str, pointers: Integers) -> None:
    """Of metadata that holds its weights: each pointer is that of its own segment's."""
    held = exam.get(field.removesuffix("_ptr"))
    arrays = isinstance(held, tuple) and all(isinstance(array, np.ndarray) for array in held)
    if held is not None and not arrays:
        exam.add(field.removesuffix("_ptr"), "shape", "a tuple of arrays", type(held).__name__)
    elif held is not None and len(held) == len(pointers):
        wanted = np.array([array.ctypes.data for array in held], np.int64)
        wrong = (pointers != wanted) & (pointers >= LEAST_ADDRESS)
        exam.add_at(field, "no weights", wanted, pointers, "segment", wrong)


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
                exam.add_at("indptr", "counts", prefills, np.diff(indptr), "request", wrong)
    elif doff:
        exam.add("doff", "counts", "0, as there is no indptr", doff)


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
        expected = "1 more than a loaded id, or 0"
        exam.add_at("segment_indices", "no weights", expected, named, "segment", lost)
    if exam.found:
        return
    got = np.repeat(named, np.diff(s))
    exam.add_at("segment_indices", "counts", indices, got, "row", indices != got)
    _lorax_launches(exam, s, named)
    if exam.segments is not None:
        exam.same("adapter_indices", indices, row_ids(exam.segments) + 1)


def _lorax_launches(exam: _Exam, s: Integers, named: Integers) -> None:
    """Each launch's slices are whole segments, in one launch at most, and none is base only."""
    launched = np.zeros(len(named), np.int64)
    launches = exam.get("rank_data")
    if launches is not None and not isinstance(launches, Mapping):
        exam.add("rank_data", "shape", "a mapping rank -> launch", type(launches).__name__)
        return
    for rank, launch in (launches or {}).items():
        within = _Exam(launch, None, exam.n, None, None)
        start, end = _lorax_slices(within)
        exam.found += [replace(f, field=f"rank_data[{rank}].{f.field}") for f in within.found]
        if within.found or not len(named):
            continue
        field, at = f"rank_data[{rank}].s_start", np.searchsorted(s[:-1], start)
        at[at == len(named)] = 0
        short = (s[at] != start) | (end < s[at + 1])
        spans = np.array([f"{a}:{b}" for a, b in zip(start, end, strict=True)])
        whole = np.array([f"{a}:{b}" for a, b in zip(s[at], s[at + 1], strict=True)])
        exam.add_at(field, "gap", whole, spans, "slice", short)
        exam.add_at(field, "overlap", whole, spans, "slice", end > s[at + 1])
        expected = "a segment with an adapter"
        exam.add_at(field, "base misplaced", expected, named[at], "slice", named[at] == 0)
        launched += np.bincount(at, minlength=len(named))
    exam.add_at("rank_data", "overlap", "one slice", launched, "segment", launched > 1)


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
        exam.add("max_seq_length", "counts", length.max(initial=0), longest)
    if no_lora not in (None, alone := int(S == 1 and index[0] == BASE_ONLY)):
        exam.add("no_lora", "counts", f"{alone}, as 1 is one batch, of -1", no_lora)
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
    exam.weights("token_lora_mapping", mapping, len(active) - 1)
    num_active = exam.number("num_active_loras_cpu")
    if num_active is not None and not S <= num_active <= len(active):  # may be rounded up
        exam.add("num_active_loras_cpu", "counts", f"{S} to {len(active)}", num_active)
    if exam.long("token_indices_sorted_by_lora_ids", len(rows), len(mapping)):
        _vllm_v1_rows(exam, mapping, rows, active[:S], counts[:S])
    if len(mapping) and (mapping == BASE_ONLY).all():
        exam.add("no_lora_flag_cpu", "base misplaced", "1, as all rows are base only", 0)
    if exam.segments is not None and not exam.found:
        exam.same("token_lora_mapping", mapping, slots_of(exam.segments, exam.slots))


def _vllm_v1_rows(
    exam: _Exam, mapping: Integers, rows: Integers, active: Integers, counts: Integers
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


def _vllm_v1_base_only(exam: _Exam, active: Integers, counts: Integers, starts: Integers) -> None:
    """With the flag set the per-row fields are an earlier batch's, and not read."""
    flag = "as the flag is set"
    exam.add_at("active_lora_ids", "active ids", f"-1, {flag}", active, "at", active != -1)
    exam.add_at("num_tokens_per_lora", "counts", f"0, {flag}", counts, "at", counts != 0)
    exam.add_at("lora_token_start_loc", "counts", f"0, {flag}", starts, "at", starts != 0)
    if exam.segments is not None:
        named = slots_of(exam.segments, exam.slots)
        expected = f"-1 of all rows, {flag}"
        exam.add_at("no_lora_flag_cpu", "stale", expected, named, "row", named != BASE_ONLY)


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
        spans = np.diff(indptr)
        exam.add_at("seg_lens", "overlap", spans, lengths, "segment", lengths > spans)
        exam.add_at("seg_lens", "gap", spans, lengths, "segment", lengths < spans)


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
    expected = f"slots below {len(ranks)}, of which there are ranks"
    exam.add_at("weight_indices", "no weights", expected, index, "segment", index >= len(ranks))
    most = exam.number("max_len")
    if most is not None:
        longer = np.diff(indptr) > most
        expected = f"at most max_len, {most}"
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
        exam.same("weight_indices", got, slots_of(exam.segments, exam.slots))


def _flashinfer(exam: _Exam, indptr: Integers, lengths: Integers | None, index: Integers) -> None:
    wanted = None if exam.segments is None else slots_of(exam.segments, exam.slots)
    n = exam.n
    rows = exam.rows_handed_over(wanted)
    if rows is None and lengths is not None:
        exam.told("seg_lens", int(lengths.sum()))
    exam.slot_of_segment = index
    _spans_of(exam, indptr, lengths)
    exam.weights("weight_indices", index)
    if wanted is not None and rows is not None and n is not None and not exam.found:
        exam.same("weight_indices", spread(index, np.diff(indptr), rows, n), wanted)


def _peft(exam: _Exam) -> None:
    adapter_names = exam.get("adapter_names")
    try:
        check_several("adapter_names", adapter_names, "a name for each sample")
    except DtypeError as error:
        exam.add("adapter_names", "shape", error.expected, error.received)
        return
    adapter_names = list(adapter_names)
    exam.told("adapter_names", len(adapter_names))
    nameless = [not isinstance(name, str) for name in adapter_names]
    given, field = np.array(adapter_names, object), "adapter_names"
    expected = f"names, {BASE_NAME!r} for base only"
    exam.add_at(field, "base misplaced", expected, given, "sample", nameless)
    if exam.names is not None:
        known = {BASE_NAME, *exam.names.values()}
        lost = [isinstance(name, str) and name not in known for name in adapter_names]
        expected = "names of adapters; PEFT passes over others"
        exam.add_at(field, "no weights", expected, given, "sample", lost)
    if exam.segments is not None and not exam.found:
        named = exam.names or {}
        ids = row_ids(exam.segments).tolist()
        wanted = [BASE_NAME if i == BASE_ONLY else named.get(i, str(i)) for i in ids]
        exam.same(field, given, np.array(wanted, object))


def _shown(values: Any, at: Integers) -> str:
    """The values at these places: one as it is, several as a list."""
    chosen = np.asarray(values)[at].tolist()
    return str(chosen[0]) if len(chosen) == 1 else some(chosen)


# Every address that a process can have lies above the pages that systems never map.
LEAST_ADDRESS = 1 << 16

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


# Which field is to blame


def _culprit_first(
    exam: _Exam, examine: Callable[[_Exam], object], repairs: Mapping[str, Repair]
) -> list[Finding]:
    """The findings, those of the one field first that alone makes all of it right.

    Where none does, or each of several, no field is to be told from the others.
    """
    if not exam.found:
        return []
    culprits = []
    for field, (fault, derived) in repairs.items():
        if exam.get(field) is None:
            continue
        with suppress(ValueError, IndexError, SgmvError):
            value = derived(exam)
            again = exam.repaired(field, value)
            examine(again)
            if not again.found:
                culprits.append((field, fault, value))
    if len(culprits) != 1:
        return exam.found
    [(field, fault, value)] = culprits
    its = [finding for finding in exam.found if finding.field == field]
    others = [finding for finding in exam.found if finding.field != field]
    if not its:
        exam.found = []
        right, got = np.atleast_1d(value), exam.ints(field)
        if len(right) != len(got):
            exam.add(field, fault, some(right.tolist()), some(got.tolist()))
        elif len(right) == 1:
            exam.add(field, fault, right[0], got[0])
        else:
            exam.add_at(field, fault, right, got, "at", right != got)
        its = exam.found
    return [*its, *others]


def _wanted(exam: _Exam) -> Integers:
    """(n,) the slot that this batch asks for."""
    if exam.segments is None:
        raise ValueError("no adapter_ids are told")
    return slots_of(exam.segments, exam.slots)


def _last(exam: _Exam) -> int:
    if exam.n is None:
        raise ValueError("no n is told")
    return exam.n


def _v1_segments(exam: _Exam) -> int:
    """How many segments two of V1's three padded fields have."""
    active, counts, starts = (
        exam.ints(field)
        for field in ("active_lora_ids", "num_tokens_per_lora", "lora_token_start_loc")
    )
    named = int(np.flatnonzero(active != BASE_ONLY).max(initial=-1)) + 1
    return sorted((named, int(np.count_nonzero(counts)), int(np.count_nonzero(starts))))[1]


def _v1_mapping(exam: _Exam) -> Integers:
    rows, S = exam.ints("token_indices_sorted_by_lora_ids"), _v1_segments(exam)
    active, counts = exam.ints("active_lora_ids")[:S], exam.ints("num_tokens_per_lora")[:S]
    mapping = exam.ints("token_lora_mapping")
    mapping[rows] = _repeated(active, counts, len(mapping))
    return mapping


def _v1_padded(field: str, derived: Callable[[_Exam], Integers]) -> Callable[[_Exam], Integers]:
    """What is derived, with the field's own values' padding behind it."""

    def padded(exam: _Exam) -> Integers:
        fill = BASE_ONLY if field == "active_lora_ids" else 0
        whole = np.full(len(exam.ints(field)), fill, np.int64)
        values = derived(exam)
        whole[: len(values)] = values
        return whole

    return padded


def _v1_starts(exam: _Exam) -> Integers:
    counts = exam.ints("num_tokens_per_lora")
    return offsets(counts[: np.count_nonzero(counts)])


def _v1_counts(exam: _Exam) -> Integers:
    return np.unique(exam.ints("token_lora_mapping"), return_counts=True)[1]


def _v0_lengths(exam: _Exam) -> Integers:
    return np.diff(exam.ints("b_seq_start_loc"), append=_last(exam))


def _entries(*fields: str) -> Callable[[_Exam], int]:
    """The length that all of these fields have that are there."""

    def counted(exam: _Exam) -> int:
        lengths = {len(exam.ints(field)) for field in fields if exam.get(field) is not None}
        if len(lengths) != 1:
            raise ValueError("the fields differ in length")
        return lengths.pop()

    return counted


def _runs_of(field: str) -> Callable[[_Exam], Integers]:
    def starts(exam: _Exam) -> Integers:
        indices = exam.ints(field)
        return np.append(runs(indices)[0], len(indices))

    return starts


def _from_segments(field: str) -> Callable[[_Exam], Integers]:
    def derived(exam: _Exam) -> Integers:
        if exam.segments is None:
            raise ValueError("no adapter_ids are told")
        return np.asarray(getattr(exam.segments, field))

    return derived


def _rows_of_segments(exam: _Exam) -> list[Integers]:
    """The rows that each segment should have, by its slot, of this batch."""
    if exam.wanted is None or exam.slot_of_segment is None:
        raise ValueError("the batch, or the segments' slots, are not told")
    return [np.flatnonzero(exam.wanted == slot) for slot in exam.slot_of_segment]


def _handed_over(exam: _Exam) -> Integers:
    return np.concatenate([np.empty(0, np.int64), *_rows_of_segments(exam)])


def _handed_over_offsets(exam: _Exam) -> Integers:
    return offsets(np.array([len(rows) for rows in _rows_of_segments(exam)], np.int64))


def _repeated(values: Integers, lengths: Integers, n: int) -> Integers:
    """Each value on its rows, if the lengths are those of n rows: a wrong one may be 2**31."""
    if len(values) != len(lengths) or (lengths < 0).any() or lengths.sum() != n:
        raise ValueError("the lengths are not those of the rows")
    return np.repeat(values, lengths)


def _sglang_offsets(exam: _Exam) -> Integers:
    """From the lengths, or from the batch where each slot has one segment."""
    if exam.get("seg_lens") is not None:
        return offsets(exam.ints("seg_lens"))
    index, wanted = exam.ints("weight_indices"), _wanted(exam)
    if len(np.unique(index)) != len(index):
        raise ValueError("a slot has several segments")
    found = [np.count_nonzero(wanted == slot) for slot in index]
    base = np.count_nonzero(wanted == BASE_ONLY)
    return offsets(np.array([rows or base for rows in found], np.int64))


Repair = tuple[Fault, Callable[[_Exam], Any]]
# By the field that tells the layout: each field, derived from the others or from the batch.
REPAIRS: Mapping[str, Mapping[str, Repair]] = {
    "seq_start": {
        field: ("stale", _from_segments(field)) for field in ("seq_start", "adapter_ids", "rows")
    },
    "s": {"s": ("counts", _handed_over_offsets), "rows": ("stale", _handed_over)},
    "decode": {
        "doff": ("counts", lambda exam: exam.ints("prefills").sum()),
        "prefills": ("counts", lambda exam: np.diff(exam.ints("indptr"))),
        "indptr": ("counts", lambda exam: offsets(exam.ints("prefills"))),
    },
    "adapter_indices": {
        "adapter_indices": (
            "stale",
            lambda exam: _repeated(
                exam.ints("segment_indices"),
                np.diff(exam.ints("adapter_segments")),
                len(exam.ints("adapter_indices")),
            ),
        ),
        "adapter_segments": ("counts", _runs_of("adapter_indices")),
        "segment_indices": (
            "counts",
            lambda exam: exam.ints("adapter_indices")[exam.ints("adapter_segments")[:-1]],
        ),
    },
    "s_start": {},
    "b_seq_start_loc": {
        "b_seq_start_loc": ("gap", lambda exam: offsets(exam.ints("seq_len_tensor"))[:-1]),
        "seq_len_tensor": ("counts", _v0_lengths),
        "batches": ("counts", _entries("b_seq_start_loc", "seq_len_tensor", "lora_indices_tensor")),
        "token_nums": ("stale", lambda exam: exam.ints("seq_len_tensor").sum()),
        "max_seq_length": ("counts", lambda exam: exam.ints("seq_len_tensor").max(initial=0)),
        "lora_indices_tensor": (
            "stale",
            lambda exam: _wanted(exam)[
                exam.ints("b_seq_start_loc")
                if exam.get("rows") is None
                else exam.ints("rows")[exam.ints("b_seq_start_loc")]
            ],
        ),
    },
    "token_lora_mapping": {
        "token_lora_mapping": ("stale", _v1_mapping),
        "token_indices_sorted_by_lora_ids": (
            "unsorted",
            lambda exam: np.argsort(exam.ints("token_lora_mapping"), kind="stable"),
        ),
        "active_lora_ids": (
            "active ids",
            _v1_padded("active_lora_ids", lambda exam: np.unique(exam.ints("token_lora_mapping"))),
        ),
        "num_tokens_per_lora": ("counts", _v1_padded("num_tokens_per_lora", _v1_counts)),
        "lora_token_start_loc": ("counts", _v1_padded("lora_token_start_loc", _v1_starts)),
        "no_lora_flag_cpu": ("base misplaced", lambda exam: [not exam.number("no_lora_flag_cpu")]),
    },
    "weight_indices": {
        "num_segments": ("counts", _entries("seg_lens", "weight_indices")),
        "batch_size": ("counts", _entries("seg_lens", "weight_indices")),
        "seg_lens": ("counts", lambda exam: np.diff(exam.ints("seg_indptr"))),
        "seg_indptr": ("gap", _sglang_offsets),
        "rows": ("stale", _handed_over),
    },
    "adapter_names": {},
}
