"""LoRAX: neighbours merged, a launch for each padded rank; several adapters of a row as one.

    adapter ids   7 9   7 -   9 7        weights   .5 .5   1 -   .5 .5
    merged        A = .5 A7 + .5 A9, B = .5 B7 + .5 B9       a number of its own: 1
    indices       1     8     2                              7 alone: id + 1; 9 7 is another list

Merging A and B each by itself is not a mixture: B A then has products of one adapter's B with
another's A, and the square of each weight.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import count, islice
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from sgmv.checks import check_count, check_weights
from sgmv.errors import SgmvError, ValueRangeError, shown, some
from sgmv.ids import BASE_ONLY, NO_SLOT, Integers, as_integers, is_integer
from sgmv.layouts.exam import Exam, Examiner
from sgmv.layouts.repairs import repeated
from sgmv.layouts.rows import (
    INT32_MAX,
    Batch,
    Int32,
    Layout,
    frozen,
    look_up,
    mixture,
    padded,
    row_ids,
    runs,
    slot_table,
    slots_of_pairs,
    sorted_items,
)
from sgmv.segment import Segments
from sgmv.stack import AdapterStack

MergedList: TypeAlias = tuple[tuple[int, ...], tuple[float, ...]]  # ids and their weights
RANK_UNIT = 16


@dataclass(frozen=True)
class MergedAdapters:
    """The field `merged_adapters` of a request to LoRAX, merged linearly.

    Semantics: LoRAX loads one adapter with A = sum of weights * A and B likewise, which is not the
    sum of the deltas; with a list of the same adapters in another order it loads another.

    ids      the adapters, which have one rank
    weights  as many

    Source: lorax, server/lorax_server/utils/merges/strategies.py; router/src/lib.rs, `PartialEq`.

    >>> print(MergedAdapters((7, 9), (0.5, 1.0)))
    7: 0.5, 9: 1
    """

    ids: tuple[int, ...]
    weights: tuple[float, ...]

    def __str__(self) -> str:
        named = zip(self.ids, self.weights, strict=True)
        return ", ".join(f"{i}: {weight:g}" for i, weight in named)


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

    adapter_indices   (n,) int64    LoRAX's own numbers: 0 is the base model, ours are id + 1; of
                                    merged adapters those that no id of the batch has, from 1 on
    adapter_segments  (S+1,) int32  from 0 to n
    segment_indices   (S,)          a tuple of ints
    rank_data         padded rank -> RankSegments; segments without weights are in none
    merged            number -> MergedAdapters

    Source: lorax, server/lorax_server/adapters/weights.py, adapters/lora.py.
    """

    adapter_indices: Integers
    adapter_segments: Int32
    segment_indices: tuple[int, ...]
    rank_data: Mapping[int, RankSegments]
    merged: Mapping[int, MergedAdapters] = field(default_factory=dict)

    def shown(self, name: str) -> str:
        """The launches as slices of rows; what each number of merged adapters is."""
        if name == "merged":
            first = [f"{i} is {one}" for i, one in islice(self.merged.items(), 8)]
            return "; ".join([*first, "..."] if len(self.merged) > 8 else first) or "none"
        if name != "rank_data":
            return super().shown(name)
        return "; ".join(
            f"rank {launch.rank}: s_start {some(launch.s_start)} s_end {some(launch.s_end)}"
            for launch in self.rank_data.values()
        )

    def adapter_ids(self) -> Integers:
        """(n,) or (n, k) the ids of each row; LoRAX names adapters, so nothing else is needed."""
        return padded([ids for ids, _ in self._lists()], BASE_ONLY, np.int64)

    def weights(self) -> npt.NDArray[np.float32]:
        """(n,) or (n, k) the weight of each of these ids, 0 for -1."""
        return padded([weights for _, weights in self._lists()], 0, np.float32)

    def _lists(self) -> list[MergedList]:
        """What each row asks for."""
        lists = [_asked(i, self.merged) for i in self.segment_indices]
        rows = np.diff(self.adapter_segments).tolist()
        return [one for one, times in zip(lists, rows, strict=True) for _ in range(times)]


def lorax(
    batch: Batch,
    ranks: AdapterStack | Mapping[int, int] | int,
    weights: npt.ArrayLike | None = None,
) -> Lorax:
    """The batch as LoRAX takes it: one launch for each distinct padded rank.

    Semantics: equal neighbours are merged; a segment is in the launch of its adapter's rank, padded
    to a multiple of 16, or in none if the adapter has no weights. Rows that name several adapters
    name one that is merged of them, as MergedAdapters says: one for each list of ids and weights.

    batch    (n,) or (n, k) adapter ids, or Segments
    ranks    an AdapterStack, a mapping id -> rank (an id that is not in it has no weights, as in
             LoRAX), or one rank for all
    weights  (n, k) the weight of each id; left out: 1

    Raises UnknownAdapterError for ids that the stack does not hold; ValueRangeError for adapters of
    a row with different ranks, which LoRAX does not merge, and for another weight than 1 of a row
    with one adapter, which it would not read; DtypeError and ValueRangeError for what is no rank
    >= 0, and as `segment` and `add_lora` do.
    Source: lorax, server/lorax_server/adapters/lora.py, `BatchLoraWeights.load`; utils/adapter.py,
    `load_and_merge_adapters`; router/src/infer.rs, `adapter_to_index`.

    >>> print(lorax([3, 3, -1, 5], {3: 8, 5: 64}))
    adapter_indices   int64 (4,) [4, 4, 0, 6]
    adapter_segments  int32 (4,) [0, 2, 3, 4]
    segment_indices   (4, 0, 6)
    rank_data         rank 16: s_start [0] s_end [2]; rank 64: s_start [3] s_end [4]
    merged            none
    >>> layout = lorax([[3, 5], [3, -1]], 8, weights=[[0.5, 0.5], [1, 0]])
    >>> layout.segment_indices, layout.merged
    ((1, 4), {1: MergedAdapters(ids=(3, 5), weights=(0.5, 0.5))})
    """
    segments, of_pair = mixture(batch, weights)
    ids = np.unique(segments.adapter_ids)
    rank_of, merged = _ranks(ids, ranks), dict[int, MergedAdapters]()
    if segments.k == 1 and (of_pair == 1).all():
        numbers = row_ids(segments) + 1
        rank_of = dict(zip((ids + 1).tolist(), rank_of.values(), strict=True))
    else:
        numbers, merged, rank_of = _merged(segments, of_pair, rank_of)
    start, lengths = runs(numbers)
    named = numbers[start].tolist()
    padded_rank = np.array([_padded(rank_of[i]) for i in named], np.int64)
    return Lorax(
        adapter_indices=frozen("adapter_indices", numbers, np.int64),
        adapter_segments=frozen("adapter_segments", np.append(start, segments.n)),
        segment_indices=tuple(named),
        rank_data={
            rank: RankSegments(
                rank,
                frozen("s_start", start[padded_rank == rank]),
                frozen("s_end", (start + lengths)[padded_rank == rank]),
            )
            for rank in np.unique(padded_rank[padded_rank >= 0]).tolist()
        },
        merged=merged,
    )


def _ranks(ids: Integers, ranks: AdapterStack | Mapping[int, int] | int) -> dict[int, int | None]:
    """The rank of each id, None where it has no weights."""
    if isinstance(ranks, AdapterStack):
        slot, rank = ranks.table.find(ids)
        weights = slot != NO_SLOT
    elif isinstance(ranks, Mapping):
        rank, unknown = look_up(*sorted_items("ranks", ranks, 0), ids)
        weights = ~unknown
    else:
        rank = np.full(len(ids), check_count("ranks", ranks, 0))
        weights = np.ones(len(ids), bool)
    if rank.max(initial=0) > INT32_MAX:
        raise ValueRangeError("ranks", "ranks below 2**31", shown(rank.max()), "pass true ranks")
    weights = weights & (ids != BASE_ONLY)
    every = zip(ids.tolist(), rank.tolist(), weights.tolist(), strict=True)
    return {i: own if has else None for i, own, has in every}


def _padded(rank: int | None) -> int:
    """LoRAX's rank, -1 where there are no weights."""
    return BASE_ONLY if rank is None else max(-(-rank // RANK_UNIT), 1) * RANK_UNIT


def _merged(
    segments: Segments, weights: npt.NDArray[np.float32], rank_of: Mapping[int, int | None]
) -> tuple[Integers, dict[int, MergedAdapters], dict[int, int | None]]:
    """The number of each row's list; what the merged ones are; the rank of each number."""
    lists = _rows_lists(segments, weights)
    unused = (number for number in count(1) if number - 1 not in rank_of)
    number_of: dict[MergedList, int] = {}
    merged: dict[int, MergedAdapters] = {}
    ranks: dict[int, int | None] = {}
    for row, (ids, scales) in enumerate(lists):
        if len(ids) < 2:
            _check_single(row, scales)
            number = ids[0] + 1 if ids else 0
            ranks[number] = rank_of[ids[0]] if ids else None
        elif (ids, scales) in number_of:
            number = number_of[ids, scales]
        else:
            number = number_of[ids, scales] = next(unused)
            merged[number] = MergedAdapters(ids, scales)
            ranks[number] = _common_rank(row, [rank_of[i] for i in ids])
        number_of[ids, scales] = number
    return as_integers("batch", [number_of[each] for each in lists]), merged, ranks


def _check_single(row: int, scales: tuple[float, ...]) -> None:
    """LoRAX reads the weights of lists alone."""
    if scales not in ((), (1.0,)):
        expected = "1 for a row of one adapter, as LoRAX weighs merged ones alone"
        received = f"{scales[0]:g} in row {row}"
        raise ValueRangeError("weights", expected, received, "scale the adapter itself")


def _common_rank(row: int, ranks: list[int | None]) -> int | None:
    """The one rank of adapters that are merged, of those with weights."""
    known = sorted({rank for rank in ranks if rank is not None})
    if len(known) > 1:
        expected = "one rank for all adapters of a row, as LoRAX merges A with A and B with B"
        raise ValueRangeError(
            "ranks", expected, f"{some(known)} in row {row}", "name adapters of one rank"
        )
    return known[0] if known else None


def _rows_lists(segments: Segments, weights: npt.NDArray[np.float32]) -> list[MergedList]:
    """The adapters of each row and their weights, without -1."""
    every = zip(slots_of_pairs(segments, None).tolist(), weights.tolist(), strict=True)
    named = ([(i, w) for i, w in zip(*row, strict=True) if i != BASE_ONLY] for row in every)
    return [(tuple(i for i, _ in one), tuple(w for _, w in one)) for one in named]


def _asked(number: int, merged: Mapping[int, MergedAdapters]) -> MergedList:
    """The adapters and weights of one of LoRAX's numbers."""
    if number in merged:
        return merged[number].ids, merged[number].weights
    return ((number - 1,), (1.0,)) if number else ((), ())


def _lorax(exam: Exam) -> None:
    indices = exam.array("adapter_indices", BASE_ONLY, int32=False)
    s, named = exam.array("adapter_segments", 0), exam.array("segment_indices", -1, int32=False)
    if not exam.has_length("segment_indices", len(named), len(s) - 1):
        return
    exam.has_rows("adapter_indices", len(indices))
    exam.indptr("adapter_segments", s)
    exam.none_is_base("adapter_indices", indices)
    exam.none_is_base("segment_indices", named)
    merged = _merged_of(exam)
    if exam.slots is not None:
        known = slot_table(exam.slots)[0]
        for number, one in merged.items():
            if lacking := set(one.ids) - set(known.tolist()):
                expected, where = "adapters that are loaded", f"number {number}"
                exam.add("merged", "no weights", expected, some(sorted(lacking)), where)
        lost = ~np.isin(named, [*(known + 1), *merged, 0]) & (named > 0)
        expected = "1 more than a loaded id, a merged number, or 0"
        exam.add_at("segment_indices", "no weights", expected, named, "segment", lost)
    if exam.found:
        return
    got = np.repeat(named, np.diff(s))
    exam.add_at("segment_indices", "counts", indices, got, "row", indices != got)
    _launches(exam, s, named)
    if exam.mixture is not None and not exam.found:
        wanted = _rows_lists(*exam.mixture)
        asked = [_asked(i, merged) for i in indices.tolist()]
        differ = [row for row, each in enumerate(wanted) if each != asked[row]]
        if differ:
            lists = (MergedAdapters(*each[differ[0]]) for each in (wanted, asked))
            expected, received = (str(one) or "base only" for one in lists)
            where = f"row {differ[0] if len(differ) == 1 else some(differ)}"
            exam.add("adapter_indices", "stale", expected, received, where)


def _merged_of(exam: Exam) -> dict[int, MergedAdapters]:
    """What the metadata says of merged adapters, where it is lists of ids and weights."""
    found: dict[int, MergedAdapters] = {}
    given = exam.get("merged")
    if given is not None and not isinstance(given, Mapping):
        exam.add("merged", "shape", "a mapping number -> ids and weights", type(given).__name__)
        return found
    for number, one in (given or {}).items():
        within = Exam(one, None, None, None, None)
        ids, weights = within.array("ids", 0, int32=False), within.get("weights")
        with suppress(SgmvError):
            scales = check_weights(weights, len(ids), 1).reshape(-1)
            if len(ids) > 1 and not within.found and is_integer(number):
                found[int(number)] = MergedAdapters(tuple(ids.tolist()), tuple(scales.tolist()))
                continue
        expected = "two ids or more and as many weights"
        exam.add("merged", "shape", expected, shown(repr(one)), f"number {shown(number)}")
    return found


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
        mixtures=True,
    ),
    Examiner(("s_start",), _slices, {}),
)
