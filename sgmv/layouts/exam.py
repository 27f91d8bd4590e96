"""The exam: metadata read field by field, and the rules that several engines share.

An engine's examiner reads each field through an `Exam`, which keeps a Finding of whatever is wrong
and goes on: no examiner stops at the first fault. Where two fields disagree an examiner cannot
know which is wrong. Its repairs derive each field from the others, and `check` uses them to name
first the one field that makes everything right if it alone is changed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from sgmv.checks import check_count
from sgmv.errors import shown, some
from sgmv.ids import BASE_ONLY, MOST, Integers, is_integer
from sgmv.layouts.finding import REMEDY, Fault, Finding
from sgmv.layouts.rows import INT32_MAX, Slots, as_segments, offsets, slot_table
from sgmv.segment import Segments
from sgmv.tensors import as_array


class Exam:
    """The metadata under examination, what is known of its batch, and what was found."""

    def __init__(
        self,
        metadata: object,
        mixture: tuple[Segments, Any] | None,
        n: int | None,
        slots: Slots,
        names: Mapping[int, str] | None,
    ) -> None:
        self.metadata, self.slots, self.names = metadata, slots, names
        self.repair: Mapping[str, Any] = {}  # a field that is replaced, and its value
        self.given_n = n
        self.wanted: Integers | None = None  # (n,) the slots, -1 on rows that are not handed over
        self.slot_of_segment: Integers | None = None
        self.mixture = mixture  # the batch, and the weights of its pairs
        self.n = None if n is None else check_count("n", n, 0)
        if mixture is not None:
            self.n = mixture[0].n
        self.found: list[Finding] = []

    @property
    def segments(self) -> Segments | None:
        """The batch, for engines that have one adapter per row. Raises ShapeError for several."""
        return None if self.mixture is None else as_segments(self.mixture[0], "adapter_ids")

    def repaired(self, field: str, value: Any) -> Exam:
        """The same metadata with another value for one field."""
        copy = Exam(self.metadata, self.mixture, self.given_n, self.slots, self.names)
        copy.repair = {field: value}
        return copy

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
        """A finding if any entry is wrong.

        expected  a text, or the right value of each entry
        got       the value of each entry
        kind      what the entries are: "row", "segment", "at"
        wrong     whether each entry is wrong
        first     the number of the first entry
        """
        at = np.flatnonzero(wrong)
        if at.size == 0:
            return
        right = shown_at(expected, at) if isinstance(expected, np.ndarray) else expected
        places = at + first
        where = f"{kind} {places[0] if at.size == 1 else some(places)}"
        self.add(field, fault, right, shown_at(got, at), where)

    def get(self, field: str) -> Any:
        """The field as it is, None if there is none."""
        if field in self.repair:
            return self.repair[field]
        if isinstance(self.metadata, Mapping):
            return self.metadata.get(field)
        return getattr(self.metadata, field, None)

    def ints(self, field: str) -> Integers:
        """The field as int64, for repairs: nothing is found, ValueError if it is no integers."""
        array = self.numbers(field)
        if array is None:
            raise ValueError("no integers")
        flat: Integers = array.reshape(-1)
        return flat

    def numbers(self, field: str, find: bool = False) -> Any:
        """The field as an array of int64, None if it holds anything but integers.

        find  whether an integer that int64 does not hold is a finding
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
        kinds = "iu" if find else "iub"
        if array.dtype.kind not in kinds and not all(map(is_integer, array.flat)):
            return None
        beyond = (array > MOST) | (array < -MOST - 1)
        if not beyond.any():
            return array.astype(np.int64)
        if find:
            self.add_at(field, "int32 wrap", "less than 2**63", array.ravel(), "at", beyond.ravel())
        bounded = [min(max(int(i), -MOST - 1), MOST) for i in array.ravel().tolist()]
        return np.array(bounded, np.int64).reshape(array.shape)

    def array(self, field: str, least: int, *, int32: bool = True) -> Integers:
        """The field (any,) as int64; numbers below the least, or beyond int32, are findings."""
        array = self.numbers(field, find=True)
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

    def has_length(self, field: str, length: int, expected: int) -> bool:
        """Whether the field has the length that it must have."""
        if length != expected:
            self.add(field, "shape", f"{expected} entries", length)
        return length == expected

    def has_rows(self, field: str, rows: int) -> None:
        """The metadata's own number of rows: this batch's, and that of its other fields."""
        if self.n is not None and rows != self.n:
            self.add(field, "stale", f"{self.n} rows, as this batch has", rows)
        self.n = rows

    def spans(self, field: str, start: Integers, length: Integers, *, apart: bool = False) -> None:
        """Segments follow each other from 0 to n; `apart`: with rows between them, or without."""
        end, following = start + length, start[1:]
        descends = following < start[:-1]
        later = np.append(following, end[-1:])
        negative = np.append(descends, False)[: len(start)] | (length < 0)
        at = np.flatnonzero(negative)
        expected = f"the next to start at {shown_at(start, at)} or later"
        self.add_at(field, "unsorted", expected, later, "segment", negative)
        over = ~descends & (following < end[:-1])
        at = np.flatnonzero(over)
        expected = f"a start at {shown_at(end[:-1], at)}, where the last one ends, or later"
        self.add_at(field, "overlap", expected, following, "segment", over, 1)
        if not apart:
            left = (following > end[:-1]) & (length[:-1] >= 0)
            at = np.flatnonzero(left)
            expected = f"a start at {shown_at(end[:-1], at)}, where the last one ends"
            self.add_at(field, "gap", expected, following, "segment", left, 1)
            if len(start) and start[0] > 0:
                self.add(field, "gap", "a start at 0", start[0], "segment 0")
        last = int(end[-1]) if len(end) else 0
        if self.n is not None and (last > self.n if apart else last != self.n):
            expected = f"the end at {self.n}, the number of rows"
            where = f"segment {len(end) - 1}" if len(end) else "no segment"
            self.add(field, "end", f"{expected}, or before" if apart else expected, last, where)

    def indptr(self, field: str, indptr: Integers, lengths: Integers | None = None) -> None:
        """Offsets (S+1,) of such segments; with `seg_lens` (S,) beside them, both agree."""
        if len(indptr) == 0:
            self.add(field, "shape", "at least the offset 0", "none")
            return
        self.spans(field, indptr[:-1], np.diff(indptr))
        if len(indptr) == 1 and indptr[0] > 0:
            self.add(field, "gap", "a start at 0", indptr[0], "segment 0")
        if lengths is not None:
            spans = np.diff(indptr)
            self.add_at("seg_lens", "overlap", spans, lengths, "segment", lengths > spans)
            self.add_at("seg_lens", "gap", spans, lengths, "segment", lengths < spans)

    def indexed(
        self, count: str, *, int32: bool
    ) -> tuple[Integers, Integers | None, Integers] | None:
        """`seg_indptr`, `seg_lens`, `weight_indices` of SGLang and FlashInfer; None if they misfit.

        count  the field that holds the number of segments
        int32  whether the engine keeps them in int32
        """
        indptr = lengths = None
        if self.get("seg_indptr") is not None:
            indptr = self.array("seg_indptr", 0, int32=int32)
        if self.get("seg_lens") is not None:
            lengths = self.array("seg_lens", 0, int32=int32)
        index = self.array("weight_indices", BASE_ONLY, int32=int32)
        if indptr is None:
            lengths = np.empty(0, np.int64) if lengths is None else lengths
            indptr = offsets(lengths)
        S = self.number(count)
        S = len(indptr) - 1 if S is None else S
        fits = self.has_length("seg_indptr", len(indptr), S + 1)
        fits &= self.has_length("weight_indices", len(index), S)
        if lengths is not None:
            fits &= self.has_length("seg_lens", len(lengths), S)
        if not fits:
            return None
        self.none_is_base("weight_indices", index)
        return indptr, lengths, index

    def each_once(self, field: str, rows: Integers, n: int | None = None) -> bool:
        """Whether these are all rows, each once; or, with n, some of n rows."""
        before, limit = len(self.found), len(rows) if n is None else n
        beyond = rows >= limit
        expected = f"rows below {limit}, as this batch has so many"
        self.add_at(field, "stale", expected, rows, "position", beyond)
        found, times = np.unique(rows, return_counts=True)
        if (more := times > 1).any():
            got = f"{shown_at(times, np.flatnonzero(more))} times"
            self.add(field, "overlap", "each row once", got, f"rows {some(found[more])}")
        if n is None and (missing := np.setdiff1d(np.arange(limit), found)).size:
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
        before = shown_at(indices[:-1], np.flatnonzero(descends))
        expected = (
            f"above {before}, the last one" if strictly else f"{before}, the last one, or more"
        )
        self.add_at(field, fault, expected, indices[1:], "segment", descends, 1)

    def have_weights(self, field: str, indices: Integers, count: int | None = None) -> None:
        """Every index but -1 is a slot in use, and below the count."""
        wrong = np.zeros(len(indices), bool) if count is None else indices >= count
        if self.slots is not None:
            wrong |= ~np.isin(indices, slot_table(self.slots)[1])
        wrong &= indices > BASE_ONLY
        self.add_at(field, "no weights", "slots with an adapter, or -1", indices, "at", wrong)

    def none_is_base(self, field: str, indices: Integers) -> None:
        """For engines that index with every number: -1 would be read as one."""
        base = indices == BASE_ONLY
        expected = "0 or more, as -1 is an index here"
        self.add_at(field, "base misplaced", expected, indices, "at", base)

    def same_rows(self, field: str, got: Integers, wanted: Integers) -> None:
        """Row by row what this batch asks for; looked at only where nothing else was found."""
        if not self.found:
            self.add_at(field, "stale", wanted, got, "row", got != wanted)

    def rows_handed_over(self, wanted: Integers | None) -> Integers | None:
        """`rows` of an engine that gets no base-only rows; n becomes the number of those it gets.

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


Repair = tuple[Fault, Callable[[Exam], Any]]


class Examiner(NamedTuple):
    """What examines one layout.

    fields    the layout's own: metadata that has all of them is taken for it
    examine   adds to `Exam.found`
    repairs   by field: the fault of a wrong value, and the right one, derived from the other fields
              or from the batch; ValueError where they do not tell
    mixtures  whether the engine has several weighted adapters per row
    """

    fields: tuple[str, ...]
    examine: Callable[[Exam], object]
    repairs: Mapping[str, Repair]
    mixtures: bool = False


def shown_at(values: Any, at: Integers) -> str:
    """The values at these places: one as it is, several as a list."""
    chosen = np.asarray(values)[at].tolist()
    return str(chosen[0]) if len(chosen) == 1 else some(chosen)
