"""The questions that wrong results answer: other batches, each the mark of one fault.

A kernel that drops the scaling is right about the batch whose scalings are all 1. So each fault
here is a change of a case: the changed case is asked of the reference, and its answer, with its own
derived bound, is held against the kernel's.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from reference.batch import Weights, Workload


class Answer(NamedTuple):
    """What y would be, and how far from it each element may be."""

    expected: NDArray[np.float64]
    bound: NDArray[np.float64]


Question = Callable[[Workload], Workload | Answer | None]  # None: this case would be answered right


def questions() -> Iterator[tuple[str, Question]]:
    """All of them, with the fault that each stands for; of equals the likelier first.

    >>> len([what for what, _ in questions()]) > 80
    True
    """
    yield from _of_y()
    yield from _of_scalings()
    yield from _of_adapters()
    yield from _of_rows()
    yield from _of_sizes()


def of_history(cases: Sequence[Workload]) -> Iterator[tuple[str, Question]]:
    """What a kernel kept from earlier calls; the cases are in the order of the calls.

    >>> from reference.batch import real
    >>> len(list(of_history([real("demo", "a first call", [0], {0: 2}, 3, 4)])))
    3
    """
    ids: dict[Any, NDArray[np.int64]] = {}
    last: dict[int, NDArray[np.int64]] = {}
    weights: dict[Any, Weights] = {}
    before: NDArray[np.int64] | None = None
    for case in cases:
        ids.setdefault((case.x.shape, case.y.shape), case.adapter_ids)
        if before is not None:
            last[id(case)] = before
        before = case.adapter_ids
        for i in used(case):
            pair = case.adapters[i]
            if pair is not None:
                weights.setdefault((i, pair[0].shape, pair[1].shape), pair)

    def kept(case: Workload) -> Workload | None:
        old: dict[int, Weights | None] = {}
        for i in used(case):
            A, B = case.adapters[i] or (np.empty(0), np.empty(0))
            old[i] = weights[i, A.shape, B.shape]
        return _weights(case, old)

    yield (
        "metadata of an earlier batch is kept: that of the first of these shapes",
        lambda case: _ids(case, ids[case.x.shape, case.y.shape]),
    )
    yield (
        "metadata of an earlier batch is kept: that of the one before",
        lambda case: _ids(case, last[id(case)]) if id(case) in last else None,
    )
    yield "weights of an earlier batch are kept: the first of this id and these shapes", kept


def _of_y() -> Iterator[tuple[str, Question]]:
    yield (
        "y is left as it was: no delta is added (a kernel changes y in place, or returns it)",
        lambda case: _ids(case, np.full_like(case.adapter_ids, -1)),
    )
    yield (
        "y is overwritten: the delta takes its place instead of being added",
        lambda case: replace(case, y=np.where(adapted(case)[:, None], 0, case.y)),
    )
    yield (
        "y is not added: the result is the delta alone, and 0 on base-only rows",
        lambda case: replace(case, y=np.zeros_like(case.y)),
    )


def _of_scalings() -> Iterator[tuple[str, Question]]:
    def each(change: Callable[[float], float]) -> Question:
        return lambda case: _scalings(case, {i: change(s) for i, s in case.scalings.items()})

    yield "the scaling is dropped: every delta counts as if it were 1", each(lambda s: 1.0)
    yield "the scaling's sign is lost", each(abs)
    yield "the delta is subtracted instead of added", each(lambda s: -s)
    yield "the delta is added twice", each(lambda s: 2 * s)
    yield "the scaling is applied twice, in both halves", each(lambda s: s * s)
    yield "the scaling divides instead of multiplying", each(lambda s: 1 / s if s else math.nan)
    for where, place in (("first", 0), ("last", -1)):
        yield (
            f"one scaling for all: that of the batch's {where} adapter",
            lambda case, place=place: _scalings(  # type: ignore[misc]
                case, dict.fromkeys(case.scalings, case.scalings[used(case)[place]])
            ),
        )
    yield (
        "the scaling is taken by the segment's number instead of by its id",
        lambda case: _scalings(case, _by_place(case, list(case.scalings.values()))),
    )


def _of_adapters() -> Iterator[tuple[str, Question]]:
    for which, place in (("last", -1), ("first", 0)):
        yield (
            f"base-only rows, of id -1, get the {which} adapter's delta",
            lambda case, place=place: _ids(  # type: ignore[misc]
                case, np.where(case.adapter_ids >= 0, case.adapter_ids, used(case)[place])
            ),
        )
        yield (
            f"base-only rows, of id -1, get the delta of the {which} adapter in the list",
            lambda case, place=place: _ids(  # type: ignore[misc]
                case, np.where(case.adapter_ids >= 0, case.adapter_ids, held(case)[place])
            ),
        )
    yield (
        "ids are taken for places in the list of adapters",
        lambda case: _weights(
            case, {i: list(case.adapters.values())[i % len(case.adapters)] for i in used(case)}
        ),
    )
    for step, which in ((1, "next"), (-1, "previous")):
        yield (
            f"adapters are swapped: each segment gets the {which} one's weights",
            lambda case, step=step: _weights(  # type: ignore[misc]
                case,
                {
                    i: case.adapters[used(case)[(place + step) % len(used(case))]]
                    for place, i in enumerate(used(case))
                },
            ),
        )
    yield (
        "weights are taken by the segment's number instead of by its id",
        lambda case: _weights(case, _by_place(case, list(case.adapters.values()))),
    )
    for which, at in (("first", 0), ("last", -1)):
        yield (
            f"all rows get the batch's {which} adapter",
            lambda case, at=at: _ids(  # type: ignore[misc]
                case, np.where(adapted(case), used(case)[at], case.adapter_ids)
            ),
        )
    yield (
        "ids are kept in a byte: 256 and 0 are one",
        lambda case: _ids(case, np.where(case.adapter_ids < 0, -1, case.adapter_ids & 0xFF)),
    )
    yield (
        "every adapter is computed on every row, times 0 or 1: 0 * NaN is NaN",
        lambda case: _masked(case, used(case)),
    )
    yield (
        "adapters that no row uses are computed, times 0: their NaN is not theirs alone",
        lambda case: _masked(case, [i for i in held(case) if i not in used(case)]),
    )
    yield (
        "every adapter is computed at the batch's largest rank, padded with 0: inf * 0 is NaN",
        _padded,
    )


def _of_rows() -> Iterator[tuple[str, Question]]:
    yield (
        "rows are not put back: deltas are written by sorted position",
        lambda case: replace(case, x=case.x[case.rows], adapter_ids=case.adapter_ids[case.rows]),
    )
    yield (
        "rows is not used: x and y are taken as if they were sorted",
        lambda case: _ids(case, case.adapter_ids[case.rows]),
    )
    yield (
        "x is read by sorted position: rows is not used there",
        lambda case: replace(case, x=_unsorted(case, case.x)),
    )
    for step, which in ((1, "late"), (-1, "early")):
        yield (
            f"rows are offset by one: each row of y gets the delta of one row too {which}",
            lambda case, step=step: _ids(case, np.roll(case.adapter_ids, step)),  # type: ignore[misc]
        )
        yield (
            f"segments start and end one row too {which}",
            lambda case, step=step: _ids(  # type: ignore[misc]
                case, _unsorted(case, np.roll(case.adapter_ids[case.rows], step))
            ),
        )
    yield (
        "the last row of every segment is left out",
        lambda case: _only(case, lambda s, p, m: p < m - 1),
    )
    yield (
        "the first row of every segment is left out",
        lambda case: _only(case, lambda s, p, m: p > 0),
    )
    yield (
        "the last segment is left out",
        lambda case: _only(case, lambda s, p, m: s < s.max(initial=0)),
    )
    yield (
        "the first segment is left out",
        lambda case: _only(case, lambda s, p, m: s > s.min(initial=0)),
    )
    for most in (1, 2, 4, 8, 16, 32, 64, 128):
        yield (
            f"a segment's rows from {most} on are left out",
            lambda case, most=most: _only(case, lambda s, p, m: p < most),  # type: ignore[misc]
        )
    for step in (16, 32, 64, 128):
        yield (
            f"every segment takes as many steps of {step} rows as the first",
            lambda case, step=step: _first_steps(case, step),  # type: ignore[misc]
        )
    for most in (1, 2, 4, 8, 16, 32, 64, 128, 255, 256):
        yield (
            f"adapters of a batch beyond the first {most} are left out",
            lambda case, most=most: _ids(  # type: ignore[misc]
                case,
                np.where(np.isin(case.adapter_ids, used(case)[:most]), case.adapter_ids, -1),
            ),
        )


def _of_sizes() -> Iterator[tuple[str, Question]]:
    def cut(A: Any, B: Any, r: int) -> Weights:
        return A[:r], B[:, :r]

    for m in (2, 4, 8, 16, 32, 64, 128):
        yield (
            f"the end of a rank that {m} does not divide is left out",
            lambda case, m=m: _each(  # type: ignore[misc]
                case, lambda A, B: cut(A, B, len(A) // m * m)
            ),
        )
    for place, which in ((1, "second"), (0, "first"), (-1, "last")):
        yield (
            f"one rank for all: that of the batch's {which} adapter",
            lambda case, place=place: _each(  # type: ignore[misc]
                case, lambda A, B: cut(A, B, rank_of(case, used(case)[place]))
            ),
        )
    for most in (1, 2, 4, 8, 16, 32, 64, 96, 128):
        yield (
            f"ranks above {most} are cut to it",
            lambda case, most=most: _each(case, lambda A, B: cut(A, B, most)),  # type: ignore[misc]
        )
    for m in (2, 4, 8, 16, 32, 64, 128, 256, 512, 1024):
        yield (
            f"the end of h_in that {m} does not divide is left out: the tail of K",
            lambda case, m=m: _each(  # type: ignore[misc]
                case, lambda A, B: (_zero_from(A, 1, A.shape[1] // m * m), B)
            ),
        )
    for m in (2, 4, 8, 16, 32, 64, 128, 256, 512, 1024):
        yield (
            f"the end of h_out that {m} does not divide is left out: the last columns of y",
            lambda case, m=m: _columns(case, case.y.shape[1] // m * m),  # type: ignore[misc]
        )
    yield (
        "B is read as (r, h_out): the other storage order",
        lambda case: _each(
            case, lambda A, B: (A, np.ascontiguousarray(B).reshape(B.shape[::-1]).T)
        ),
    )
    yield (
        "B is taken untransposed where it is square",
        lambda case: _each(case, lambda A, B: (A, B.T if len(B) == len(A) else B)),
    )
    yield (
        "A is taken untransposed where it is square",
        lambda case: _each(case, lambda A, B: (A.T if A.shape[0] == A.shape[1] else A, B)),
    )
    yield (
        "A is read as (h_in, r): the other storage order",
        lambda case: _each(
            case, lambda A, B: (np.ascontiguousarray(A).reshape(A.shape[::-1]).T, B)
        ),
    )


# The other batches that the questions are about


def used(case: Workload) -> list[int]:
    """Ids of this batch that have weights, ascending."""
    return [i for i in case.segment_ids.tolist() if case.adapters.get(i) is not None]


def held(case: Workload) -> list[int]:
    """Ids that have weights, as they were loaded."""
    return [i for i, pair in case.adapters.items() if pair is not None]


def adapted(case: Workload) -> NDArray[np.bool_]:
    return np.isin(case.adapter_ids, used(case))


def _ids(case: Workload, adapter_ids: NDArray[np.int64]) -> Workload | None:
    same = np.array_equal(adapter_ids, case.adapter_ids)
    return None if same else replace(case, adapter_ids=adapter_ids)


def _scalings(case: Workload, scalings: dict[int, float]) -> Workload | None:
    same = all(scalings.get(i) == case.scalings[i] for i in used(case))
    return None if same else replace(case, scalings={**case.scalings, **scalings})


def _weights(case: Workload, adapters: Mapping[int, Weights | None]) -> Workload | None:
    same = all(pair is case.adapters[i] for i, pair in adapters.items())
    return None if same else replace(case, adapters={**case.adapters, **adapters})


def _each(case: Workload, change: Callable[[Any, Any], Weights]) -> Workload | None:
    changed = {}
    for i in used(case):
        pair = case.adapters[i]
        if pair is not None:
            A, B = change(*pair)
            same = A is pair[0] and B is pair[1]
            same = same or (
                A.shape == pair[0].shape
                and B.shape == pair[1].shape
                and np.array_equal(A, pair[0])
                and np.array_equal(B, pair[1])
            )
            changed[i] = pair if same else (A, B)
    return _weights(case, changed)


def _by_place(case: Workload, values: Sequence[Any]) -> dict[int, Any]:
    """Of each segment's id: the value at the segment's own place."""
    return {i: values[s] for s, i in enumerate(case.segment_ids.tolist()) if i in used(case)}


def rank_of(case: Workload, adapter_id: int) -> int:
    pair = case.adapters[adapter_id]
    return 0 if pair is None else len(pair[0])


def _zero_from(weight: Any, axis: int, start: int) -> Any:
    if start == weight.shape[axis]:
        return weight
    kept = weight.copy()
    np.moveaxis(kept, axis, 0)[start:] = 0
    return kept


def _unsorted(case: Workload, values: NDArray[Any]) -> NDArray[Any]:
    """Values by sorted position, at the rows of these positions."""
    out = np.empty_like(values)
    out[case.rows] = values
    return out


def places(case: Workload) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Of each row: its segment's number, its place in it, and the segment's length."""
    lengths = np.diff(case.seq_start)
    s = np.repeat(np.arange(len(lengths)), lengths)
    p = np.arange(len(s)) - case.seq_start[:-1][s]
    return _unsorted(case, s), _unsorted(case, p), _unsorted(case, lengths[s])


def _only(case: Workload, keep: Callable[[Any, Any, Any], Any]) -> Workload | None:
    """The batch with the other rows base only; segments without an adapter are not counted."""
    s, p, m = places(case)
    at = adapted(case)
    kept = np.zeros(len(s), bool)
    kept[at] = keep(s[at], p[at], m[at])
    return _ids(case, np.where(kept | ~at, case.adapter_ids, -1))


def _first_steps(case: Workload, step: int) -> Workload | None:
    first = np.count_nonzero(case.adapter_ids == used(case)[0]) if used(case) else 0
    return _only(case, lambda s, p, m: p < step * -(-first // step))


def _columns(case: Workload, end: int) -> Answer | None:
    """The columns from `end` on left as they were."""
    expected = case.expected.copy()
    expected[:, end:] = case.y[:, end:]
    return Answer(expected, np.where(np.isfinite(expected), case.bound, 0.0))


def _masked(case: Workload, ids: Iterable[int]) -> Answer | None:
    """Each of these adapters' deltas times 0, on the rows that do not use it."""
    expected = case.expected.copy()
    x = case.x.astype(np.float64)
    for i in ids:
        A, B = (weight.astype(np.float64) for weight in case.adapters[i] or ())
        if all(np.isfinite(array).all() for array in (x, A, B)):
            continue  # 0 times it is 0
        others = case.adapter_ids != i
        with np.errstate(invalid="ignore", over="ignore"):
            expected[others] += 0 * ((x[others] @ A.T) @ B.T)
    if np.array_equal(expected, case.expected, equal_nan=True):
        return None
    return Answer(expected, np.where(np.isfinite(expected), case.bound, 0.0))


def _padded(case: Workload) -> Workload | None:
    largest = max((rank_of(case, i) for i in used(case)), default=0)
    return _each(
        case,
        lambda A, B: (
            np.pad(A, ((0, largest - len(A)), (0, 0))),
            np.pad(B, ((0, 0), (0, largest - len(A)))),
        ),
    )
