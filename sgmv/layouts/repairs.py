"""Repairs that several engines share: a field derived from other fields, or from the batch.

Each raises ValueError where what it needs is not known.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from sgmv.ids import BASE_ONLY, Integers
from sgmv.layouts.exam import Exam
from sgmv.layouts.rows import offsets, slots_of


def wanted_slots(exam: Exam) -> Integers:
    """(n,) the slot that this batch asks for."""
    if exam.segments is None:
        raise ValueError("no adapter_ids were passed")
    return slots_of(exam.segments, exam.slots)


def entries(*fields: str) -> Callable[[Exam], int]:
    """The one length of these fields, of those that are there."""

    def counted(exam: Exam) -> int:
        lengths = {len(exam.ints(field)) for field in fields if exam.get(field) is not None}
        if len(lengths) != 1:
            raise ValueError("the fields differ in length")
        return lengths.pop()

    return counted


def repeated(values: Integers, lengths: Integers, n: int) -> Integers:
    """Each value on its rows, if the lengths are those of n rows: a wrong one may be 2**31."""
    if len(values) != len(lengths) or (lengths < 0).any() or lengths.sum() != n:
        raise ValueError("the lengths are not those of the rows")
    return np.repeat(values, lengths)


def indexed_offsets(exam: Exam) -> Integers:
    """`seg_indptr`: from `seg_lens`, or from the batch where each slot has one segment."""
    if exam.get("seg_lens") is not None:
        return offsets(exam.ints("seg_lens"))
    index, wanted = exam.ints("weight_indices"), wanted_slots(exam)
    if len(np.unique(index)) != len(index):
        raise ValueError("a slot has several segments")
    found = [np.count_nonzero(wanted == slot) for slot in index]
    base = np.count_nonzero(wanted == BASE_ONLY)
    return offsets(np.array([rows or base for rows in found], np.int64))


def handed_over(exam: Exam) -> Integers:
    """The rows that an engine without base-only rows gets, segment by segment."""
    return np.concatenate([np.empty(0, np.int64), *_rows_of_segments(exam)])


def handed_over_offsets(exam: Exam) -> Integers:
    """(S+1,) the offsets of the same."""
    return offsets(np.array([len(rows) for rows in _rows_of_segments(exam)], np.int64))


def _rows_of_segments(exam: Exam) -> list[Integers]:
    """The rows of this batch that each segment should have, by the segment's slot."""
    if exam.wanted is None or exam.slot_of_segment is None:
        raise ValueError("the batch, or the segments' slots, are not known")
    return [np.flatnonzero(exam.wanted == slot) for slot in exam.slot_of_segment]
