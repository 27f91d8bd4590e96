"""A finding: one fault in an engine's metadata, and what to do about it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Fault = Literal[
    "unsorted",  # offsets, ids or rows that do not ascend
    "overlap",  # rows in two segments
    "gap",  # rows in no segment
    "end",  # the segments do not end at the number of rows
    "no weights",  # an index, an address or a name without an adapter
    "mixed lists",  # rows of several lists of adapters in one batch of llama.cpp
    "stale",  # metadata of another batch
    "int32 wrap",  # a number that int32 does not hold, or what it became
    "base misplaced",  # -1 where the engine does not have it
    "active ids",  # V1's active_lora_ids do not ascend, or are not those of the rows
    "counts",  # a count that differs from what it counts
    "shape",  # a field that is missing, holds no integers, or has the wrong length
]
REMEDY: Mapping[str, str] = {
    "unsorted": "sort the rows by slot, stably, before making the metadata",
    "overlap": "start each segment where the one before it ends",
    "gap": "start each segment where the one before it ends, and the first at 0",
    "end": "end the last segment at the number of rows",
    "no weights": "load the adapter first, or name base only",
    "mixed lists": "decode rows of each list by themselves",
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
