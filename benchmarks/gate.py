"""Right before fast: nothing is timed until it is correct.

Two gates. The corpus gate runs the kernel on every adversarial case of `reference.workloads`. The
case gate holds each variant's result on the very arrays that are about to be timed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

import sgmv
from benchmarks.batch import Batch, Pool
from benchmarks.peers.with_numpy import by_segment
from reference import bounds, by_row, compare, workloads
from sgmv.backend import flushes

# (y, x, adapters, adapter_ids, scalings): adds the deltas to y in place.
Kernel = Callable[[NDArray[Any], NDArray[Any], Mapping[int, Any], NDArray[Any], Any], None]
Update = Callable[[NDArray[Any], NDArray[Any], Batch], None]

# Multiplications that the float64 reference may spend on one case: about a quarter second.
REFERENCE_WORK = 1 << 25
CHECKED_ROWS = 6  # of a call that is no case of the grid


class GateError(AssertionError):
    """A wrong result: what failed, with the reference's own words on the worst element."""


def sgmv_kernel(
    y: NDArray[Any],
    x: NDArray[Any],
    adapters: Mapping[int, Any],
    adapter_ids: NDArray[Any],
    scalings: Mapping[int, float],
) -> None:
    """The library on a corpus case: everything loaded anew, then the call that is timed."""
    loaded = {
        adapter_id: None
        if pair is None
        else sgmv.Adapter(pair[0], pair[1], float(scalings.get(adapter_id, 1.0)))
        for adapter_id, pair in adapters.items()
    }
    if any(adapter is not None for adapter in loaded.values()):
        sgmv.add_lora(y, x, sgmv.AdapterStack.from_adapters(loaded), adapter_ids)


def corpus_failures(
    kernel: Kernel, dtypes: Sequence[np.dtype[Any]], threads: Sequence[int]
) -> tuple[int, list[str]]:
    """Run the corpus with each number of threads.

    Returns the number of cases, and one line per failure: case, threads, what was wrong.
    """
    count, failures = 0, []
    for case in workloads.corpus(dtypes=dtypes):
        count += 1
        for number in threads:
            sgmv.set_num_threads(number)
            y = case.y.copy()
            try:
                kernel(y, case.x, case.adapters, case.adapter_ids, case.scalings)
                case.check(y, flushes=flushes(None, case.x.dtype, case.x.dtype))
            except Exception as error:  # a crash is a failing case, and the next one still runs
                failures.append(f"{case.name}, {number} threads: {type(error).__name__}: {error}")
    return count, failures


def check_case(
    batch: Batch,
    variants: Mapping[str, Update],
    seed: int,
    roundings: Mapping[str, int] = MappingProxyType({}),
) -> int:
    """Hold every variant's result on this batch to the reference; return the rows it checked.

    Semantics: a seeded sample of rows (all, if they are few: the reference takes its time) must be
    within the reference's elementwise bound. Every row must agree with numpy's per-segment loop,
    itself held to that bound, within twice a bound on the row's norms. In a case of 16 bits both
    widen for a variant that makes `roundings` to them on the way, by `rounding_bound`.
    Raises GateError for the first variant that does not.
    """
    rows = _sample(batch, seed)
    ids = batch.adapter_ids[rows]
    adapters = batch.pool.adapters
    expected = by_row.add_lora(batch.y[rows], batch.x[rows], adapters, ids)
    bound = bounds.add_lora_bound(batch.y[rows], batch.x[rows], adapters, ids, expected=expected)
    other = _result(by_segment, batch)
    tolerance = 2 * norm_bound(batch, other)
    sizes: NDArray[np.float32] | None = None
    for name, update in {"by_segment": by_segment, **variants}.items():
        y = other if update is by_segment else _result(update, batch)
        row_bound, whole = bound, tolerance
        if roundings.get(name) and batch.y.dtype != np.float32:
            sizes = product_sizes(batch) if sizes is None else sizes
            wider = rounding_bound(sizes, roundings[name], batch.y.dtype)
            row_bound, whole = bound + wider[rows], tolerance + wider
        try:
            compare.check(y[rows], expected, row_bound)
        except AssertionError as error:
            raise GateError(f"{name}: {error}") from error
        # Written so that a NaN is a failure.
        wrong = ~(np.abs(y.astype(np.float32) - other.astype(np.float32)) <= whole)
        if wrong.any():
            row, column = np.argwhere(wrong)[0]
            raise GateError(
                f"{name}: y[{row}, {column}] is {y[row, column]}, numpy per segment has "
                f"{other[row, column]}; {int(wrong.sum())} of {y.size} elements differ by more "
                "than both may err"
            )
    return len(rows)


def check_rows(
    y: NDArray[Any], x: NDArray[Any], stack: sgmv.AdapterStack, ids: NDArray[np.int64]
) -> None:
    """Hold rows at both ends and between of one call to the reference: it is not timed if wrong."""
    rows = spread(len(ids), CHECKED_ROWS)
    adapters = {i: stack[i] for i in np.unique(ids[rows]).tolist()}
    expected = by_row.add_lora(y[rows], x[rows], adapters, ids[rows])
    bound = bounds.add_lora_bound(y[rows], x[rows], adapters, ids[rows], expected=expected)
    result = sgmv.add_lora(y.copy(), x, stack, ids)
    compare.check(result[rows], expected, bound, f"{len(stack.ids)} adapters, {len(ids)} rows")


def spread(n: int, count: int) -> NDArray[np.int64]:
    """At most so many row numbers below n, evenly, both ends among them.

    >>> spread(9, 3).tolist()
    [0, 4, 8]
    """
    return np.unique(np.linspace(0, n - 1, count).astype(np.int64))


def norm_bound(batch: Batch, result: NDArray[Any]) -> NDArray[np.float32]:
    """How far a correct row may be from the exact one, from norms alone: (n, h_out).

    By Cauchy-Schwarz, twice, |x| |A|' |B|' <= |x|_2 |A|_F max_c |B_c|_2. Rounding errors that are
    independent with mean 0 add up to 6 * sqrt(terms) * u of it, but for one chance in millions
    (Higham and Mary 2019, theorem 2.4); then y's two roundings. A bound that always holds would be
    `terms * u`: so wide at 4096 columns that a row without its delta could pass.
    """
    pool, ids = batch.pool, batch.adapter_ids
    terms = pool.A.shape[2] + pool.A.shape[1] + 4
    share = 6 * math.sqrt(terms) * bounds.unit_roundoff(np.float32)
    x_norms = np.linalg.norm(batch.x.astype(np.float32), axis=1)
    norms = _weight_norms(pool, batch.slots)[ids] * x_norms
    magnitude = np.abs(result.astype(np.float32))
    rounding = 2 * bounds.unit_roundoff(result.dtype)
    return np.asarray(share * norms[:, np.newaxis] + rounding * magnitude, np.float32)


def product_sizes(batch: Batch) -> NDArray[np.float32]:
    """|scaling| * |v| @ |B|.T: what a rounding of v, or of the delta, can move, (n, h_out)."""
    pool = batch.pool
    sizes = np.zeros(batch.y.shape, np.float32)
    for slot, rows in zip(batch.slots, batch.takes, strict=True):
        v = batch.x[rows].astype(np.float32) @ pool.A[slot].T
        sizes[rows] = abs(pool.scalings[slot]) * (np.abs(v) @ np.abs(pool.wb[slot]))
    return sizes


def rounding_bound(
    sizes: NDArray[np.float32], roundings: int, dtype: np.dtype[Any]
) -> NDArray[np.float32]:
    """How much further from the exact row one may be that rounds so often on the way to y.

    Each rounding to `dtype` errs by at most u of its value; values are at most `sizes`, to which
    float32's own errors and the last rounding of a moved sum add a share of u, hence one more.
    """
    share = (1 + bounds.unit_roundoff(dtype)) * bounds.gamma(roundings, bounds.unit_roundoff(dtype))
    return np.asarray(share * sizes, np.float32)


def _weight_norms(pool: Pool, slots: Sequence[int]) -> NDArray[np.float64]:
    """Norms scaling * |A|_F * max_c |B_c|_2 of the given slots, 0 for the others."""
    norms = np.zeros(len(pool.ranks))
    for slot in slots:
        widest = np.sqrt(np.square(pool.wb[slot]).sum(axis=0).max(initial=0.0))
        norms[slot] = abs(pool.scalings[slot]) * np.linalg.norm(pool.A[slot]) * widest
    return norms


def _sample(batch: Batch, seed: int) -> NDArray[np.int64]:
    """Rows for the reference: the ends of segments first, for that is where kernels go wrong."""
    n = len(batch.adapter_ids)
    pool = batch.pool
    per_row = pool.A.shape[1] * (pool.A.shape[2] + pool.wb.shape[2])
    limit = max(8, REFERENCE_WORK // max(per_row, 1))
    if n <= limit:
        return np.arange(n)
    rng = np.random.default_rng(seed)
    ends = np.unique([row for rows in batch.rows for row in (rows[0], rows[-1])])
    first = rng.permutation(ends)[: limit // 2]
    rest = rng.permutation(np.setdiff1d(np.arange(n), first))[: limit - len(first)]
    return np.sort(np.concatenate([first, rest]))


def _result(update: Update, batch: Batch) -> NDArray[Any]:
    y: NDArray[Any] = batch.y.copy()
    update(y, batch.x, batch)
    return y
