"""A correct kernel in plain numpy, and kernels that are right but for one thing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import ml_dtypes
import numpy as np

from reference import workloads
from reference.floats import sum_dtype
from reference.workloads import Workload

DTYPES = tuple(
    np.dtype(dtype) for dtype in (np.float32, np.float16, ml_dtypes.bfloat16, np.float64)
)
CASES = list(workloads.corpus(dtypes=DTYPES))

Array = Any  # of any of the four float types
Kernel = Callable[[Workload], Array]


@dataclass(frozen=True)
class Segment:
    """What plain numpy needs to add one adapter's delta: the rows of x and y, and the weights."""

    id: int
    rows: Array
    A: Array
    B: Array
    scaling: float


def segments_of(case: Workload) -> list[Segment]:
    segments = []
    for s, adapter_id in enumerate(case.segment_ids.tolist()):
        pair = case.adapters.get(adapter_id)
        if pair is not None:
            rows = case.rows[case.seq_start[s] : case.seq_start[s + 1]]
            segments.append(Segment(adapter_id, rows, *pair, case.scalings[adapter_id]))
    return segments


def delta_of(x: Array, segment: Segment, v_dtype: Any = None) -> Array:
    """One segment's delta in the type of the sums."""
    wide = sum_dtype(x, segment.A)
    v = x[segment.rows].astype(wide) @ segment.A.astype(wide).T
    if v_dtype is not None:
        v = v.astype(v_dtype).astype(wide)
    return wide.type(segment.scaling) * (v @ segment.B.astype(wide).T)


def add(y: Array, rows: Array, delta: Array) -> None:
    y[rows] = (y[rows].astype(delta.dtype) + delta).astype(y.dtype)


def plain(case: Workload, segments: list[Segment] | None = None, v_dtype: Any = None) -> Array:
    """The correct kernel: numpy's matmul over one segment after the other."""
    y = case.y.copy()
    for segment in segments_of(case) if segments is None else segments:
        add(y, segment.rows, delta_of(case.x, segment, v_dtype))
    return y


def plain_applied(case: Workload) -> Array:
    """`apply_batched` by plain numpy: the base product stays in the sums' type until the store."""
    wide = sum_dtype(case.x, case.W)
    y = case.x.astype(wide) @ case.W.astype(wide).T
    for segment in segments_of(case):
        y[segment.rows] += delta_of(case.x, segment)
    return y.astype(case.x.dtype)


# The planted faults: each is a kernel that is right but for one thing. FAULTS names the case that
# must find it, besides any others that do.


def per_segment(change: Callable[[Segment, list[Segment]], Segment]) -> Kernel:
    """The correct kernel, on segments that the fault has changed."""

    def kernel(case: Workload) -> Array:
        segments = segments_of(case)
        return plain(case, [change(segment, segments) for segment in segments])

    return kernel


def padded(segment: Segment, segments: list[Segment], garbage: float) -> Segment:
    largest = max(len(other.A) for other in segments)
    more = largest - len(segment.A)
    A = np.pad(segment.A.astype(np.float32), ((0, more), (0, 0)), constant_values=garbage)
    B = np.pad(segment.B.astype(np.float32), ((0, 0), (0, more)), constant_values=garbage)
    return replace(segment, A=A, B=B)


def swapped_adapters(case: Workload) -> Array:
    segments = segments_of(case)
    others = segments[1:] + segments[:1]
    return plain(case, [replace(s, A=o.A, B=o.B) for s, o in zip(segments, others, strict=True)])


def offset_by_one(case: Workload) -> Array:
    segments = segments_of(case)
    return plain(case, [replace(s, rows=(s.rows + 1) % len(case.x)) for s in segments])


def delta_added_twice(case: Workload) -> Array:
    return plain(case, segments_of(case) * 2)


def last_adapter_on_base_rows(case: Workload) -> Array:
    segments = segments_of(case)
    base_only = np.flatnonzero(case.adapter_ids == -1)
    return plain(case, segments + [replace(s, rows=base_only) for s in segments[-1:]])


def last_segment_dropped(case: Workload) -> Array:
    return plain(case, segments_of(case)[:-1])


def eight_slots_only(case: Workload) -> Array:
    return plain(case, segments_of(case)[:8])


def ids_in_a_byte(case: Workload) -> Array:
    adapters = {id_ & 0xFF: pair for id_, pair in reversed(list(case.adapters.items()))}
    wrapped = replace(case, adapter_ids=np.where(case.adapter_ids < 0, -1, case.adapter_ids & 0xFF))
    scalings = {id_ & 0xFF: scaling for id_, scaling in reversed(list(case.scalings.items()))}
    return plain(replace(wrapped, adapters=adapters, scalings=scalings))


def ids_taken_for_slots(case: Workload) -> Array:
    slots = list(case.adapters.values())

    def change(segment: Segment, _: list[Segment]) -> Segment:
        pair = slots[segment.id % len(slots)]
        return segment if pair is None else replace(segment, A=pair[0], B=pair[1])

    return per_segment(change)(case)


def rows_not_put_back(case: Workload) -> Array:
    y = case.y.copy()
    for segment in segments_of(case):
        start = np.searchsorted(case.adapter_ids[case.rows], segment.id)
        positions = np.arange(start, start + len(segment.rows))
        add(y, positions, delta_of(case.x, segment))
    return y


def steps_of_the_first_segment(case: Workload) -> Array:
    segments = segments_of(case)
    reached = 64 * -(-len(segments[0].rows) // 64) if segments else 0
    return plain(case, [replace(s, rows=s.rows[:reached]) for s in segments])


def y_overwritten(case: Workload) -> Array:
    y = case.y.copy()
    for segment in segments_of(case):
        y[segment.rows] = delta_of(case.x, segment).astype(y.dtype)
    return y


def y_rounded_twice(case: Workload) -> Array:
    y = case.y.copy()
    for segment in segments_of(case):
        add(y, segment.rows, delta_of(case.x, segment).astype(y.dtype).astype(np.float32))
    return y


def masked_sum(case: Workload) -> Array:
    """Every adapter on every row, times 0 or 1."""
    y = case.y.copy()
    every = np.arange(len(case.x))
    for segment in segments_of(case):
        mask = np.isin(every, segment.rows).astype(np.float32)[:, None]
        add(y, every, mask * delta_of(case.x, replace(segment, rows=every)))
    return y


def unused_adapters_masked(case: Workload) -> Array:
    y = plain(case)
    for adapter_id, pair in case.adapters.items():
        if pair is not None and adapter_id not in case.adapter_ids:
            every = Segment(adapter_id, np.arange(len(case.x)), *pair, 1.0)
            add(y, every.rows, np.float32(0) * delta_of(case.x, every))
    return y


def base_rows_rewritten(case: Workload) -> Array:
    y = plain(case)
    base_only = case.adapter_ids == -1
    y[base_only] += y.dtype.type(0)
    return y


def subnormals_flushed(case: Workload) -> Array:
    y = case.y.copy()
    smallest = np.finfo(np.float32).tiny
    for segment in segments_of(case):
        products = case.x[segment.rows, None, :].astype(np.float32) * segment.A.astype(np.float32)
        v = np.where(np.abs(products) < smallest, 0, products).sum(axis=2)
        add(y, segment.rows, np.float32(segment.scaling) * (v @ segment.B.astype(np.float32).T))
    return y


def sums_in_16_bits(case: Workload) -> Array:
    y = case.y.copy()
    for segment in segments_of(case):
        v = np.zeros((len(segment.rows), len(segment.A)), case.x.dtype)
        for k in range(case.x.shape[1]):
            v += case.x[segment.rows, k, None] * segment.A[None, :, k]
        delta = np.float32(segment.scaling) * (
            v.astype(np.float32) @ segment.B.astype(np.float32).T
        )
        add(y, segment.rows, delta)
    return y


def store_saturates(case: Workload) -> Array:
    y = plain(case)
    largest = np.finfo(y.dtype).max
    finite = np.isfinite(case.y).all() and np.isfinite(case.x).all()
    return np.clip(y, -largest, largest) if finite else y


def contiguous_x_assumed(case: Workload) -> Array:
    step = (case.x.shape[1] * case.x.itemsize, case.x.itemsize)
    misread = np.lib.stride_tricks.as_strided(case.x, case.x.shape, step)
    return plain(replace(case, x=misread.copy()))


def wrapped_offsets(case: Workload) -> Array:
    """Element offsets in 32 bits; only where they wrap does this read elsewhere."""
    n, h_in = case.x.shape
    apart = case.x.strides[0] // case.x.itemsize
    if case.x.strides[1] != case.x.itemsize or n * apart < 2**32:
        return plain(case)
    flat = np.lib.stride_tricks.as_strided(case.x, ((n - 1) * apart + h_in,), case.x.strides[1:])
    offsets = [(row * apart) % 2**32 for row in range(n)]
    return plain(replace(case, x=np.stack([flat[o : o + h_in] for o in offsets])))


def input_changed(case: Workload) -> Array:
    y = plain(case)
    kept = case.x.copy()
    try:
        case.x[...] = 0
        case.check(y)
    finally:
        case.x[...] = kept
    return y


def wrong_type(case: Workload) -> Array:
    return plain(case).astype(np.float64)


def stale_metadata() -> Kernel:
    """Keeps the sorted rows of the first batch of each shape."""
    kept: dict[tuple[int, ...], Array] = {}

    def kernel(case: Workload) -> Array:
        ids = kept.setdefault((*case.x.shape, *case.y.shape), case.adapter_ids)
        return plain(replace(case, adapter_ids=ids))

    return kernel


def stale_weights() -> Kernel:
    """Keeps the weights of the first adapter that it saw under an id and a shape."""
    kept: dict[Any, Segment] = {}

    def kernel(case: Workload) -> Array:
        segments = [
            (s, kept.setdefault((s.id, s.A.shape, s.B.shape), s)) for s in segments_of(case)
        ]
        return plain(case, [replace(s, A=old.A, B=old.B) for s, old in segments])

    return kernel


def scaling_by_weights(case: Workload) -> Array:
    kept: dict[int, float] = {}
    segments = segments_of(case)
    return plain(case, [replace(s, scaling=kept.setdefault(id(s.A), s.scaling)) for s in segments])


def rank_cut(multiple: int) -> Kernel:
    def change(segment: Segment, _: list[Segment]) -> Segment:
        r = len(segment.A) // multiple * multiple
        return replace(segment, A=segment.A[:r], B=segment.B[:, :r])

    return per_segment(change)


def k_cut(multiple: int) -> Kernel:
    def change(segment: Segment, _: list[Segment]) -> Segment:
        A = segment.A.copy()
        A[:, A.shape[1] // multiple * multiple :] = 0
        return replace(segment, A=A)

    return per_segment(change)


def columns_cut(case: Workload) -> Array:
    y = plain(case)
    whole = y.shape[1] // 16 * 16
    y[:, whole:] = case.y[:, whole:]
    return y


def each(change: Callable[[Segment], Segment]) -> Kernel:
    return per_segment(lambda segment, _: change(segment))


FAULTS: dict[str, tuple[Callable[[], Kernel], str]] = {
    "swapped adapters": (lambda: swapped_adapters, "alternating"),
    "last row dropped": (lambda: each(lambda s: replace(s, rows=s.rows[:-1])), "one row"),
    "first row dropped": (lambda: each(lambda s: replace(s, rows=s.rows[1:])), "64-row steps"),
    "last segment dropped": (lambda: last_segment_dropped, "first and last slot"),
    "offset by one": (lambda: offset_by_one, "base-only rows between"),
    "unscaled B": (lambda: each(lambda s: replace(s, scaling=1.0)), "scalings"),
    "sign of scaling lost": (
        lambda: each(lambda s: replace(s, scaling=abs(s.scaling))),
        "scalings",
    ),
    "scaling squared": (lambda: each(lambda s: replace(s, scaling=s.scaling**2)), "scalings"),
    "one scaling for all": (
        lambda: per_segment(lambda s, all_: replace(s, scaling=all_[0].scaling)),
        "mixed ranks",
    ),
    "scaling kept by weights": (lambda: scaling_by_weights, "same weights, two scalings"),
    "delta added twice": (lambda: delta_added_twice, "one row"),
    "y overwritten": (lambda: y_overwritten, "one row"),
    "y rounded twice": (lambda: y_rounded_twice, "cancellation, float16"),
    "last adapter on base-only rows": (lambda: last_adapter_on_base_rows, "base-only rows between"),
    "base-only rows rewritten": (lambda: base_rows_rewritten, "base-only bits"),
    "garbage past the rank": (
        lambda: per_segment(lambda s, all_: padded(s, all_, garbage=1.0)),
        "mixed ranks, integers",
    ),
    "computed at the largest rank": (
        lambda: per_segment(lambda s, all_: padded(s, all_, garbage=0.0)),
        "NaN and inf in x",
    ),
    "one rank for all": (
        lambda: per_segment(
            lambda s, all_: (
                replace(s, A=s.A[: len(all_[1].A)], B=s.B[:, : len(all_[1].A)])
                if len(all_) > 1
                else s
            )
        ),
        "mixed ranks, integers",
    ),
    "rank 0 divides": (
        lambda: each(lambda s: replace(s, scaling=s.scaling * len(s.A) / np.float64(len(s.A)))),
        "rank 0 only",
    ),
    "rank tail of 8 dropped": (lambda: rank_cut(8), "rank 17"),
    "rank tail of 2 dropped": (lambda: rank_cut(2), "rank 129"),
    "K tail of 16 dropped": (lambda: k_cut(16), "mixed ranks, integers"),
    "K tail of 256 dropped": (lambda: k_cut(256), "3424 to 48"),
    "column tail dropped": (lambda: columns_cut, "16 to 32001"),
    "v rounded to float16": (
        lambda: lambda case: plain(case, v_dtype=np.float16),
        "mixed ranks",
    ),
    "sums kept in 16 bits": (lambda: sums_in_16_bits, "long sum of one sign, float16"),
    "subnormals flushed": (lambda: subnormals_flushed, "subnormal"),
    "store saturates": (lambda: store_saturates, "store beyond float16"),
    "NaN through a mask": (lambda: masked_sum, "NaN in a used adapter"),
    "NaN from an unused adapter": (lambda: unused_adapters_masked, "NaN in an unused adapter"),
    "rows not put back": (lambda: rows_not_put_back, "descending"),
    "steps of the first segment": (lambda: steps_of_the_first_segment, "1 row against 133"),
    "ids taken for slots": (lambda: ids_taken_for_slots, "ids far apart"),
    "ids in a byte": (lambda: ids_in_a_byte, "300 adapters"),
    "eight slots only": (lambda: eight_slots_only, "300 adapters"),
    "stale metadata": (stale_metadata, "cached metadata, second batch"),
    "stale weights": (stale_weights, "reused ids, second tenant"),
    "contiguous x assumed": (lambda: contiguous_x_assumed, "views"),
    "32-bit offsets": (lambda: wrapped_offsets, "far rows"),
    "input changed": (lambda: input_changed, "one row"),
    "result in the wrong type": (lambda: wrong_type, "one row"),
}
