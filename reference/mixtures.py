"""Batches of rows with several adapters: seeded ones, and a corpus of hard cases.

    y[i] + sum over j of weights[i, j] * scaling * B @ (A @ x[i])    adapter_ids, weights (n, k)

Each is a `Workload` with weights; `case.check(my_y)` is the verdict, as for plain batches.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from reference.batch import Workload, integer, real
from reference.floats import float_type

K = 3
EXACT_WEIGHTS = (-1.0, 0.0, 1.0, 2.0)


def mixture(
    name: str,
    why: str,
    adapter_ids: ArrayLike,
    ranks: dict[int, int | None],
    h_in: int,
    h_out: int,
    *,
    weights: ArrayLike | None = None,
    exact: bool = False,
    dtype: DTypeLike = np.float32,
) -> Workload:
    """A batch of rows with k adapters each; the name is its seed.

    Semantics: the operands of `workloads.real`, or of `integer` where exact; adapter_ids (n, k).
    weights, if left out, are like a router's, positive with sum 1 in each row; where exact, small
    integers.

    >>> mixture("demo", "a pair lost", [[0, 1]], {0: 2, 1: 1}, 3, 4).weights.sum()
    np.float32(1.0)
    """
    ids = np.asarray(adapter_ids, np.int64)
    make = integer if exact else real
    first: Any = ids[:, 0]
    case = make(name, why, first, ranks, h_in, h_out, dtype=dtype)
    rng = np.random.default_rng(sum(map(ord, name)))
    if weights is not None:
        given = np.asarray(weights, np.float32)
    elif exact:
        given = rng.choice(EXACT_WEIGHTS, ids.shape).astype(np.float32)
    else:
        given = rng.dirichlet(np.ones(ids.shape[1]), len(ids)).astype(np.float32)
    return replace(case, adapter_ids=ids, weights=given)


def corpus(dtype: DTypeLike = np.float32) -> Iterator[Workload]:
    """The hard cases in one float type.

    Semantics: each in normal deviates; and in integers, where y's type holds every sum on the way,
    as y may be rounded after each of a row's deltas.

    >>> len(list(corpus()))
    21
    """
    for name, why, ids, weights in _ids():
        for exact in (True, False) if float_type(dtype).bits >= 24 else (False,):
            kind = "integers" if exact else "reals"
            yield mixture(
                f"{name}, {kind}", why, ids, RANKS, 70, 90, weights=weights, exact=exact,
                dtype=dtype,
            )  # fmt: skip
    for name, why, edit in _EDITS:
        case = mixture(name, why, [[0, 1, 2], [1, 3, -1], [2, 2, 4]], RANKS, 70, 90, dtype=dtype)
        yield replace(case, name=name, **edit(case))


RANKS: dict[int, int | None] = {0: 16, 1: 1, 2: 8, 3: None, 4: 0, 5: 33, 900: 4}
Weights = NDArray[np.float32] | None


def _ids() -> Iterator[tuple[str, str, NDArray[np.int64], Weights]]:
    rng = np.random.default_rng(0)
    used = np.array(list(RANKS))
    shared = np.tile(np.array([[0, 2]]), (40, 1))
    yield "all rows share two adapters", "two tasks that add to one row at once", shared, None
    yield "each row its own pair", "a pair lost", rng.choice(used, (24, K)), None
    again = np.array([[0, 0, 0], [5, 0, 5], [-1, -1, 2], [2, 2, 2]] * 5)
    yield "an adapter named again", "a repeated pair that adds once", again, None
    empty = np.array([[-1, -1], [3, -1], [4, 4], [-1, 5]])
    yield "rows without an adapter", "base-only pairs that touch y", empty, None
    yield "one row, many adapters", "a sum over the places", rng.choice(used, (1, 40)), None
    one = rng.choice(used, (9, 1))
    yield "one adapter per row", "another path for k = 1", one, None
    ones = np.ones((4, 2), np.float32)
    halves = ones * np.array([[0, 1]], np.float32)
    yield "weights of 0", "0 for what was not named", rng.choice(used, (4, 2)), halves
    swapped = rng.choice(used, (12, K))
    most = np.arange(12 * K, dtype=np.float32).reshape(12, K) % 7 - 3
    yield "a weight for each pair", "weights in sorted order, or of another row", swapped, most
    long = rng.choice([0, 2, 5], (300, 2))
    yield "more rows than a block", "blocks of one row that overlap", long, None


def _nan_member(case: Workload) -> dict[str, Any]:
    A, B = case.adapters[2] or (None, None)
    assert A is not None
    return {"adapters": {**case.adapters, 2: (np.full_like(A, np.nan), B)}}


def _nan_row(case: Workload) -> dict[str, Any]:
    x = case.x.copy()
    x[1, 3] = np.nan
    return {"x": x}


def _large_weights(case: Workload) -> dict[str, Any]:
    assert case.weights is not None
    return {"weights": case.weights * np.float32(math.pi * 100)}


_EDITS: tuple[tuple[str, str, Callable[[Workload], dict[str, Any]]], ...] = (
    ("a member of NaN", "a NaN in rows that do not name its adapter", _nan_member),
    ("a row of NaN", "a NaN in its neighbours", _nan_row),
    ("large weights", "weights that are left out", _large_weights),
)
