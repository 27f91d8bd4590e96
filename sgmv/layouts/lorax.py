"""LoRAX: neighbours merged, a launch for each padded rank."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from sgmv.checks import check_count
from sgmv.errors import some
from sgmv.ids import BASE_ONLY, NO_SLOT, Integers
from sgmv.layouts.exam import Exam, Examiner
from sgmv.layouts.repairs import repeated
from sgmv.layouts.rows import (
    Batch,
    Int32,
    Layout,
    as_segments,
    frozen,
    look_up,
    row_ids,
    runs,
    slot_table,
    sorted_items,
)
from sgmv.stack import AdapterStack

RANK_UNIT = 16


@dataclass(frozen=True, eq=False)
class RankSegments(Layout):
    """The segments of one launch of LoRAX: those of padded rank `rank`.

    Semantics: segment i of the launch is rows `s_start[i]:s_end[i]`; other rows are untouched.

    rank            padded to a multiple of 16
    s_start, s_end  (k,) int32, ascending, with a gap where there are rows of another rank

    Source: lorax, server/lorax_server/adapters/lora.py, where the fields are called
    `segment_starts` and `segment_ends`, and utils/sgmv.py, where they are the kernels' `s_start`
    and `s_end`.

    >>> print(lorax([3, 3, -1, 3], 16).rank_data[16])
    rank     16
    s_start  int32 (2,) [0, 3]
    s_end    int32 (2,) [2, 4]
    """

    rank: int
    s_start: Int32
    s_end: Int32


@dataclass(frozen=True, eq=False)
class Lorax(Layout):
    """LoRAX's `AdapterBatchMetadata`, and the `rank_data` of its launches.

    Semantics: rows `adapter_segments[s]:adapter_segments[s+1]` name `segment_indices[s]`. Rows
    stay as they are: neighbours are merged, nothing is sorted.

    adapter_indices   (n,) int64    LoRAX's own numbers: 0 is the base model, ours are id + 1
    adapter_segments  (S+1,) int32  from 0 to n
    segment_indices   (S,)          a tuple of ints
    rank_data         padded rank -> RankSegments; segments without weights are in none

    Source: lorax, server/lorax_server/adapters/weights.py, adapters/lora.py.
    """

    adapter_indices: Integers
    adapter_segments: Int32
    segment_indices: tuple[int, ...]
    rank_data: Mapping[int, RankSegments]

    def shown(self, name: str) -> str:
        """The launches as slices of rows."""
        if name != "rank_data":
            return super().shown(name)
        return "; ".join(
            f"rank {launch.rank}: s_start {some(launch.s_start)} s_end {some(launch.s_end)}"
            for launch in self.rank_data.values()
        )

    def adapter_ids(self) -> Integers:
        """(n,) the id of each row; LoRAX names adapters, so nothing else is needed."""
        indices = np.array(self.segment_indices, np.int64)
        return np.repeat(indices - 1, np.diff(self.adapter_segments))


def lorax(batch: Batch, ranks: AdapterStack | Mapping[int, int] | int) -> Lorax:
    """The batch as LoRAX takes it: one launch for each distinct padded rank.

    Semantics: equal neighbours are merged; a segment is in the launch of its adapter's rank, padded
    to a multiple of 16, or in none if the adapter has no weights.

    batch  (n,) adapter ids, or Segments
    ranks  an AdapterStack, a mapping id -> rank (an id that is not in it has no weights, as in
           LoRAX), or one rank for all

    Raises UnknownAdapterError for ids that the stack does not hold, DtypeError and
    ValueRangeError for what is no rank >= 0.
    Source: lorax, server/lorax_server/adapters/lora.py, `BatchLoraWeights.load`.

    >>> print(lorax([3, 3, -1, 5], {3: 8, 5: 64}))
    adapter_indices   int64 (4,) [4, 4, 0, 6]
    adapter_segments  int32 (4,) [0, 2, 3, 4]
    segment_indices   (4, 0, 6)
    rank_data         rank 16: s_start [0] s_end [2]; rank 64: s_start [3] s_end [4]
    """
    segments = as_segments(batch)
    ids = row_ids(segments)
    start, lengths = runs(ids)
    s = frozen("adapter_segments", np.append(start, segments.n))
    by_adapter = _padded_ranks(segments.adapter_ids, ranks)
    padded = by_adapter[np.searchsorted(segments.adapter_ids, ids[start])]
    return Lorax(
        adapter_indices=frozen("adapter_indices", ids + 1, np.int64),
        adapter_segments=s,
        segment_indices=tuple((ids[start] + 1).tolist()),
        rank_data={
            rank: RankSegments(
                rank,
                frozen("s_start", start[padded == rank]),
                frozen("s_end", (start + lengths)[padded == rank]),
            )
            for rank in np.unique(padded[padded >= 0]).tolist()
        },
    )


def _padded_ranks(ids: Integers, ranks: AdapterStack | Mapping[int, int] | int) -> Integers:
    """LoRAX's rank of each id, -1 where it has no weights."""
    if isinstance(ranks, AdapterStack):
        slot, rank = ranks.table.find(ids)
        weights = slot != NO_SLOT
    elif isinstance(ranks, Mapping):
        rank, unknown = look_up(*sorted_items("ranks", ranks, 0), ids)
        weights = ~unknown
    else:
        rank = np.full(len(ids), check_count("ranks", ranks, 0))
        weights = np.ones(len(ids), bool)
    padded = np.maximum(-(-rank // RANK_UNIT), 1) * RANK_UNIT
    return np.where(weights & (ids != BASE_ONLY), padded, BASE_ONLY)


def _lorax(exam: Exam) -> None:
    indices = exam.array("adapter_indices", BASE_ONLY, int32=False)
    s, named = exam.array("adapter_segments", 0), exam.array("segment_indices", -1, int32=False)
    if not exam.has_length("segment_indices", len(named), len(s) - 1):
        return
    exam.has_rows("adapter_indices", len(indices))
    exam.indptr("adapter_segments", s)
    exam.none_is_base("adapter_indices", indices)
    exam.none_is_base("segment_indices", named)
    if exam.slots is not None:
        known = np.append(slot_table(exam.slots)[0] + 1, 0)
        lost = ~np.isin(named, known) & (named > 0)
        expected = "1 more than a loaded id, or 0"
        exam.add_at("segment_indices", "no weights", expected, named, "segment", lost)
    if exam.found:
        return
    got = np.repeat(named, np.diff(s))
    exam.add_at("segment_indices", "counts", indices, got, "row", indices != got)
    _launches(exam, s, named)
    if exam.segments is not None:
        exam.same_rows("adapter_indices", indices, row_ids(exam.segments) + 1)


def _launches(exam: Exam, s: Integers, named: Integers) -> None:
    """Each launch's slices are whole segments, in one launch at most, and none is base only."""
    launched = np.zeros(len(named), np.int64)
    launches = exam.get("rank_data")
    if launches is not None and not isinstance(launches, Mapping):
        exam.add("rank_data", "shape", "a mapping rank -> launch", type(launches).__name__)
        return
    for rank, launch in (launches or {}).items():
        within = Exam(launch, None, exam.n, None, None)
        start, end = _slices(within)
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


def _slices(exam: Exam) -> tuple[Integers, Integers]:
    """One launch: slices that ascend, with or without rows between them, and not past n."""
    start, end = exam.array("s_start", 0), exam.array("s_end", 0)
    if exam.has_length("s_end", len(end), len(start)):
        exam.spans("s_start", start, end - start, apart=True)
    return start, end


def _repeated_indices(exam: Exam) -> Integers:
    return repeated(
        exam.ints("segment_indices"),
        np.diff(exam.ints("adapter_segments")),
        len(exam.ints("adapter_indices")),
    )


def _starts_of_runs(exam: Exam) -> Integers:
    indices = exam.ints("adapter_indices")
    return np.append(runs(indices)[0], len(indices))


EXAMINERS = (
    Examiner(
        ("adapter_indices",),
        _lorax,
        {
            "adapter_indices": ("stale", _repeated_indices),
            "adapter_segments": ("counts", _starts_of_runs),
            "segment_indices": (
                "counts",
                lambda exam: exam.ints("adapter_indices")[exam.ints("adapter_segments")[:-1]],
            ),
        },
    ),
    Examiner(("s_start",), _slices, {}),
)
