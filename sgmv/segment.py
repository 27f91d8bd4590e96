"""adapter_ids -> Segments: the rows of a batch, sorted by adapter into contiguous segments.

    adapter_ids   2  0 -1  2  0          one id per row of x
    rows          2  1  4  0  3          row of x at each sorted position, stable
    seq_start     0  1     3     5       segment s is positions seq_start[s]:seq_start[s + 1]
    segment ids  -1  0     2             ascending, base-only rows first

Where a row names k adapters, each is a pair (row, adapter), and the pairs are what is sorted:

    adapter_ids   2 0   0 5              (n, k) = (2, 2): the pairs 0 1 and 2 3
    pairs         1 2   0   3            the pair at each sorted position
    rows          0 1   0   1            its row of x, and of y: pair // k
    segment ids   0     2   5

Integers only: nothing here knows about weights, so Segments made once serve every layer of a step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from operator import mul
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from sgmv.checks import check_count, check_weights
from sgmv.errors import (
    DtypeError,
    ShapeError,
    UnknownAdapterError,
    ValueRangeError,
    some,
)
from sgmv.ids import BASE_ONLY, Integers, as_integers, as_pairs
from sgmv.kernels.plan import most_digits, sort
from sgmv.kernels.records import SEGMENTS

SHOWN_AT_EACH_END = 6


@dataclass(frozen=True)
class Traffic:
    """Work and memory traffic of one SGMV, by Punica's formulas.

    Semantics: `flops` floating-point operations; `bytes_read`, `bytes_written` bytes;
    `intensity` FLOP per byte. Source: Punica (arXiv 2310.18547), section 7.1.

    >>> Traffic(flops=12, bytes_read=4, bytes_written=2).intensity
    2.0
    """

    flops: int
    bytes_read: int
    bytes_written: int

    @property
    def intensity(self) -> float:
        moved = self.bytes_read + self.bytes_written
        return self.flops / moved if moved else 0.0

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(
            self.flops + other.flops,
            self.bytes_read + other.bytes_read,
            self.bytes_written + other.bytes_written,
        )


@dataclass(frozen=True)
class Stats:
    """What shrink, expand and both together cost for one batch: three `Traffic` values."""

    shrink: Traffic
    expand: Traffic

    @property
    def total(self) -> Traffic:
        return self.shrink + self.expand

    def __str__(self) -> str:
        lines = [f"{'':8}{'MFLOP':>12}{'read MB':>12}{'written MB':>12}{'FLOP/B':>10}"]
        for name, cost in (
            ("shrink", self.shrink),
            ("expand", self.expand),
            ("both", self.total),
        ):
            lines.append(
                f"{name:8}{cost.flops / 1e6:12.3f}{cost.bytes_read / 1e6:12.3f}"
                f"{cost.bytes_written / 1e6:12.3f}{cost.intensity:10.2f}"
            )
        return "\n".join(lines)


@dataclass(frozen=True, eq=False)
class Segments:
    """A batch's rows grouped by adapter: frozen int64 arrays, reusable for every layer.

    Semantics: segment s holds the rows `rows[seq_start[s]:seq_start[s + 1]]` of x, all of which
    name adapter `adapter_ids[s]`. There are m = n positions; m = n * k if a row names k adapters.

    rows         (m,)    the row of x at each position: for k = 1 a permutation of 0..n-1
    seq_start    (S+1,)  ascending, from 0 to m
    adapter_ids  (S,)    strictly ascending; -1, the base-only segment, first if there is one. For
                         k > 1 an adapter has a further segment for rows that name it once more
    pairs        (m,)    for k > 1: `i * k + j` for the j-th adapter of row i; left out, k = 1

    Made by `segment`. One made by hand is copied, checked and frozen.
    Raises ShapeError, DtypeError or ValueRangeError when an invariant does not hold.
    Source: Punica (arXiv 2310.18547), figure 3; punica/ops/__init__.py, argument `s`.

    >>> print(segment([2, 0, -1, 2, 0]))
    segment  adapter  rows  offsets
          0     base     1      0:1
          1        0     2      1:3
          2        2     2      3:5
      total        3     5      0:5
    """

    rows: Integers
    seq_start: Integers
    adapter_ids: Integers
    pairs: Integers = None  # type: ignore[assignment]  # rows, then
    _weights: ClassVar[Any] = None  # set by `weighted`
    _x_rows: ClassVar[Any] = None  # set by `of_pairs`

    def __post_init__(self) -> None:
        if self.pairs is None:
            object.__setattr__(self, "pairs", self.rows)
            object.__setattr__(self, "k", 1)
        for name in ("rows", "seq_start", "adapter_ids", "pairs"):
            frozen = as_integers(name, getattr(self, name)).copy()
            frozen.flags.writeable = False
            object.__setattr__(self, name, frozen)
        m, seq_start, ids = len(self.rows), self.seq_start, self.adapter_ids
        if len(seq_start) != len(ids) + 1:
            raise ShapeError(
                "seq_start",
                f"{len(ids) + 1} offsets for {len(ids)} adapter_ids",
                f"{len(seq_start)}",
                "give one offset per segment and n at the end",
            )
        if seq_start[0] != 0 or seq_start[-1] != m or (np.diff(seq_start) < 0).any():
            raise ValueRangeError(
                "seq_start",
                f"ascending offsets from 0 to {'n' if self.k == 1 else 'm'} = {m}",
                some(seq_start),
                "make it the running sum of the segments' lengths",
            )
        self._check_rows(m)
        least = 1 if self.k == 1 else 0
        if (np.diff(ids) < least).any() or (len(ids) and ids[0] < BASE_ONLY):
            raise ValueRangeError(
                "adapter_ids",
                f"{'strictly ' * least}ascending ids, -1 (base only) first",
                some(ids),
                "merge segments of one adapter and sort them by id",
            )

    def _check_rows(self, m: int) -> None:
        """Each pair once, its row beside it, and no row twice in a segment of an adapter."""
        if self.k == 1:
            if not np.array_equal(np.sort(self.rows), np.arange(m)):
                raise ValueRangeError(
                    "rows",
                    f"each of 0..{m - 1} once",
                    some(self.rows),
                    "give a permutation of the rows of x",
                )
            return
        right = len(self.pairs) == m and np.array_equal(np.sort(self.pairs), np.arange(m))
        if not right or not np.array_equal(self.rows, self.pairs // self.k):
            raise ValueRangeError(
                "pairs",
                f"each of 0..{m - 1} once, and rows = pairs // {self.k}",
                some(self.pairs),
                "make them with segment(adapter_ids)",
            )
        named = np.repeat(self.adapter_ids != BASE_ONLY, self.lengths)
        s = np.repeat(np.arange(self.S), self.lengths)
        if len(np.unique(s[named] * self.n + self.rows[named])) < named.sum():
            raise ValueRangeError(
                "rows",
                "each row once at most in a segment, whose rows are added to y at the same time",
                some(self.rows),
                "give the adapter a further segment for rows that name it again",
            )

    @classmethod
    def _trusted(
        cls,
        rows: Integers,
        seq_start: Integers,
        adapter_ids: Integers,
        pairs: Integers | None = None,
        **more: Any,
    ) -> Segments:
        """Without copies and checks, for arrays that `segment` made itself."""
        made = object.__new__(cls)
        for name, array in (
            ("rows", rows),
            ("seq_start", seq_start),
            ("adapter_ids", adapter_ids),
            ("pairs", rows if pairs is None else pairs),
        ):
            array.flags.writeable = False
            object.__setattr__(made, name, array)
        for name, value in more.items():
            object.__setattr__(made, name, value)
        return made

    def __reduce__(self) -> tuple[type[Segments], tuple[Integers, ...]]:
        pairs = () if self.k == 1 else (self.pairs,)
        return Segments, (self.rows, self.seq_start, self.adapter_ids, *pairs)

    @cached_property
    def _record(self) -> npt.NDArray[Any]:
        """The segments as compiled code takes them."""
        found = np.zeros(1, SEGMENTS)
        found["count"], found["most"], found["rows"] = self.S, self.most, self.rows.ctypes.data
        found["seq_start"] = self.seq_start.ctypes.data
        found["adapter_ids"] = self.adapter_ids.ctypes.data
        for name, array in (("x_rows", self._x_rows), ("weights", self._weights)):
            found[name] = 0 if array is None else array.ctypes.data
        found["k"] = self.k
        return found

    @cached_property
    def address(self) -> int:
        """The address of `_record`."""
        return int(self._record.ctypes.data)

    @cached_property
    def most(self) -> int:
        """Room that a plan needs: m positions; or S, as segments made by hand may be empty."""
        return max(len(self.rows), self.S)

    @cached_property
    def n(self) -> int:
        """Rows in the batch."""
        return len(self.rows) if self.pairs is self.rows else len(self.rows) // self.k

    @cached_property
    def k(self) -> int:
        """Adapters that each row names."""
        if self.pairs is self.rows or not len(self.rows):
            return 1
        return int(np.count_nonzero(self.rows == self.rows[0]))

    @cached_property
    def named(self) -> Integers:
        """(m,) the id of each pair, in the order of the pairs."""
        found = np.empty(len(self.rows), np.int64)
        found[self.pairs] = np.repeat(self.adapter_ids, self.lengths)
        found.flags.writeable = False
        return found

    @property
    def S(self) -> int:
        """Segments, the base-only one included."""
        return len(self.adapter_ids)

    @property
    def lengths(self) -> Integers:
        """(S,) positions of each segment."""
        return np.diff(self.seq_start)

    def stats(
        self,
        h_in: int,
        h_out: int,
        ranks: int | Sequence[int] | Mapping[int, int],
        itemsize: int = 2,
    ) -> Stats:
        """Work and traffic of this batch at one layer, by Punica's formulas.

        Semantics: per segment of m rows and rank r, summed over all but the base-only segment:
        shrink costs 2*m*h_in*r FLOP, reads m*h_in + h_in*r and writes m*r elements;
        expand costs 2*m*r*h_out FLOP, reads m*r + r*h_out and writes m*h_out elements.

        ranks     one rank for all; or a mapping id -> r; or one rank per segment (S,)
        itemsize  bytes per element; 2, as in the paper, if left out

        Raises ShapeError when the number of ranks is not S, UnknownAdapterError when the mapping
        lacks an id, DtypeError and ValueRangeError for what is no integer >= 0.
        Source: Punica (arXiv 2310.18547), section 7.1.

        >>> round(segment(range(64)).stats(16, 4096, 16).expand.intensity, 2)
        0.94
        """
        h_in, h_out = check_count("h_in", h_in, 0), check_count("h_out", h_out, 0)
        itemsize = check_count("itemsize", itemsize, 0)
        m = self.lengths
        r = self._ranks(ranks)
        m, r = m[self.adapter_ids != BASE_ONLY], r[self.adapter_ids != BASE_ONLY]
        rows, weights = int(m[r > 0].sum()), sum(r.tolist())
        values = sum(map(mul, m.tolist(), r.tolist()))  # may be beyond int64
        return Stats(
            shrink=Traffic(
                2 * values * h_in, (rows * h_in + weights * h_in) * itemsize, values * itemsize
            ),
            expand=Traffic(
                2 * values * h_out, (values + weights * h_out) * itemsize, rows * h_out * itemsize
            ),
        )

    def _ranks(self, ranks: int | Sequence[int] | Mapping[int, int]) -> Integers:
        if isinstance(ranks, Mapping):
            used = [int(i) for i in self.adapter_ids if i != BASE_ONLY]
            missing = [i for i in used if i not in ranks]
            if missing:
                raise UnknownAdapterError(
                    "ranks",
                    "a rank for every adapter of the batch",
                    f"none for {some(missing)}",
                    "add them to the mapping",
                )
            ranks = [ranks.get(int(i), 0) for i in self.adapter_ids]
        if not isinstance(ranks, (np.ndarray, Sequence)):
            ranks = [check_count("ranks", ranks, 0)] * self.S
        given = as_integers("ranks", ranks)
        if len(given) and given.min() < 0:
            raise ValueRangeError("ranks", "ranks >= 0", str(given.min()), "use 0 for none")
        if given.shape != (self.S,):
            raise ShapeError(
                "ranks",
                f"one number, a mapping, or one rank for each of {self.S} segments",
                f"shape {given.shape}",
                "give the base-only segment a rank of 0",
            )
        return given

    def __str__(self) -> str:
        shown: list[int | None] = list(range(self.S))
        if self.S > 2 * SHOWN_AT_EACH_END + 1:
            shown = [*shown[:SHOWN_AT_EACH_END], None, *shown[-SHOWN_AT_EACH_END:]]
        table = [("segment", "adapter", "rows", "offsets")]
        for s in shown:
            if s is None:
                table.append(("...",) * 4)
                continue
            start, end = self.seq_start[s], self.seq_start[s + 1]
            name = "base" if self.adapter_ids[s] == BASE_ONLY else str(self.adapter_ids[s])
            table.append((str(s), name, str(end - start), f"{start}:{end}"))
        table.append(("total", str(self.S), str(self.n), f"0:{self.n}"))
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        return "\n".join(
            "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))
            for line in table
        )


def segment(adapter_ids: npt.ArrayLike | Sequence[int | None]) -> Segments:
    """Group the rows of a batch by adapter: a stable sort into contiguous segments.

    Semantics: `rows = argsort(adapter_ids, stable)`; segment s is the run of equal ids
    `adapter_ids[rows[seq_start[s]:seq_start[s + 1]]]`. Of k ids per row the pairs are sorted:
    `pairs = argsort(adapter_ids.ravel(), stable)`, `rows = pairs // k`.

    adapter_ids  (n,) any integers >= -1, in any order; -1 or None means base only; or (n, k), the
                 k adapters of each row
    returns      Segments; time linear in the ids, whatever their size

    Raises DtypeError for anything but integers, ShapeError unless (n,) or (n, k) with k of 1 or
    more, ValueRangeError for an id below -1. Source: Punica (arXiv 2310.18547), section 4.

    >>> segment([7, -1, 7]).rows
    array([1, 0, 2])
    >>> segment([[2, 0], [0, 5]]).rows
    array([0, 1, 0, 1])
    """
    ids, k = as_pairs(adapter_ids)
    if len(ids) and ids.min() < BASE_ONLY:
        raise ValueRangeError(
            "adapter_ids",
            "ids >= 0, or -1 for base only",
            some(np.unique(ids[ids < BASE_ONLY])),
            "use -1, or None, for rows without an adapter",
        )
    rows = np.empty(len(ids), np.int64)
    seq_start = np.empty(len(ids) + 1, np.int64)
    segment_ids = np.empty(len(ids), np.int64)
    scratch = np.empty(len(ids), np.int64), np.empty(most_digits(len(ids)), np.int64)
    S = sort(ids, rows, seq_start, segment_ids, *scratch)
    seq_start, segment_ids = seq_start[: S + 1], segment_ids[:S]
    if k is None:
        return Segments._trusted(rows, seq_start, segment_ids)
    return _of_pairs(rows, seq_start, segment_ids, k)


def _of_pairs(pairs: Integers, seq_start: Integers, ids: Integers, k: int) -> Segments:
    """Segments of sorted pairs; what a row names again goes into a further segment.

    In a segment the pairs of a row are neighbours, for the sort is stable.
    """
    rows = pairs // k
    segment_of = np.repeat(np.arange(len(ids)), np.diff(seq_start))
    again = (rows[1:] == rows[:-1]) & (segment_of[1:] == segment_of[:-1])
    again &= ids[segment_of[1:]] != BASE_ONLY
    if again.any():
        first = np.flatnonzero(np.concatenate(([True], ~again)))
        position = np.arange(len(pairs))
        before = position - np.repeat(first, np.diff(first, append=len(pairs)))
        part, pieces = np.unique(segment_of * k + before, return_inverse=True)
        order = np.argsort(pieces, kind="stable")
        pairs, rows, ids = pairs[order], rows[order], ids[part // k]
        seq_start = np.searchsorted(pieces[order], np.arange(len(part) + 1))
    return Segments._trusted(rows, seq_start, ids, pairs)


def of_pairs(segments: Segments, share_x: bool) -> Segments:
    """The same pairs as a plain batch of n * k rows: pair i * k + j has row i * k + j of y.

    share_x  whether it reads row i of x (n, h_in), else row i * k + j of x (n * k, h_in)
    """
    arrays = segments.pairs, segments.seq_start, segments.adapter_ids
    return Segments._trusted(*arrays, _x_rows=segments.rows if share_x else None)


def weighted(segments: Segments, weights: npt.ArrayLike | None) -> Segments:
    """The same segments, which one call multiplies by a weight for each pair; None for none.

    Raises ShapeError, DtypeError and ValueRangeError unless they are (n, k) finite numbers, or
    (n,) for k = 1.
    """
    if weights is None:
        return segments
    arrays = segments.rows, segments.seq_start, segments.adapter_ids, segments.pairs
    return Segments._trusted(*arrays, _weights=_of_positions(segments, weights))


def times_weights(v: Any, segments: Segments, weights: npt.ArrayLike) -> Any:
    """The rows of v, each times the weight of its pair; errors as `weighted`."""
    with np.errstate(invalid="ignore", over="ignore", under="ignore"):
        return v * _of_positions(segments, weights)[:, np.newaxis].astype(v.dtype)


def _of_positions(segments: Segments, weights: npt.ArrayLike) -> npt.NDArray[np.float32]:
    """(m,) the weight of the pair at each position."""
    return check_weights(weights, segments.n, segments.k).reshape(-1)[segments.pairs]


def check_segments(segments: object) -> None:
    """Refuse what is no Segments."""
    if not isinstance(segments, Segments):
        raise DtypeError(
            "segments", "Segments", type(segments).__name__, "make them with segment(adapter_ids)"
        )
