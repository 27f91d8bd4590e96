"""Batches with DoRA: seeded ones, and a corpus of hard cases.

    gain * (y[i] + scaling * B @ (A @ x[i])) + (1 - gain) * bias     gain = magnitude / length of
                                                                    each row of W + scaling * B @ A

Each is a `Workload` with `dora`; `case.check(my_y)` is the verdict, as for plain batches.
"""

import math
from collections.abc import Callable, Collection, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from reference.batch import Scaled, Weights, Workload, integer, real

# Where exact, products of B and A have 48 columns of 1 and -1 in each row, or 12 of 2 and -2; W has
# four of 2 and -2 elsewhere. So rows are 8 long, or 4 of rank 0, and gains are powers of two.
SHARED, OWN = 48, 8
EXACT_GAINS = (-2.0, -1.0, 0.5, 1.0, 2.0)
RANKS: dict[int, int | None] = {0: 16, 1: 1, 2: 8, 3: None, 4: 0, 5: 12, 900: 4}
PLAIN = (2, 900)


def scaled(
    name: str,
    why: str,
    adapter_ids: ArrayLike,
    ranks: dict[int, int | None],
    h_in: int,
    h_out: int,
    *,
    plain: Collection[int] = (),
    bias: bool = False,
    exact: bool = False,
    dtype: DTypeLike = np.float32,
) -> Workload:
    """A batch of rows with adapters of DoRA, but for those in plain; the name is its seed.

    Semantics: the operands of `workloads.real`, or of `integer` where exact: then h_in is 56 or
    more, and each rank divides 48, every third 12. adapter_ids (n,), or (n, k) with -1 beside
    them. Magnitudes are the lengths of the rows times a factor around 1.

    >>> scaled("demo", "a gain lost", [0, -1], {0: 2}, 60, 4, exact=True).dora.magnitudes[0].shape
    (4,)
    """
    ids = np.asarray(adapter_ids, np.int64)
    first: Any = ids.reshape(len(ids), -1)[:, 0]
    case = (integer if exact else real)(name, why, first, ranks, h_in, h_out, dtype=dtype)
    rng = np.random.default_rng(sum(map(ord, name)))
    W: Any = rng.standard_normal((h_out, h_in)) / math.sqrt(h_in)
    b: Any = rng.standard_normal(h_out)
    adapters, scalings = case.adapters, case.scalings
    if exact:
        W, b = np.zeros((h_out, h_in)), 2.0 * rng.integers(-9, 10, h_out)
        columns = SHARED + rng.permuted(np.tile(np.arange(h_in - SHARED), (h_out, 1)), axis=1)
        np.put_along_axis(W, columns[:, :4], rng.choice((-2, 2), (h_out, 4)), 1)
        scalings = {i: (1.0, -1.0, 2.0)[place % 3] for place, i in enumerate(ranks)}
        adapters = {
            i: None if r is None else _of_length_8(rng, r, scalings[i], h_in, h_out, dtype)
            for i, r in ranks.items()
        }
    W = W.astype(dtype)
    magnitudes = {}
    for i, pair in adapters.items():
        if pair is not None and i not in plain:
            A, B = (half.astype(np.float64) for half in pair)
            lengths = np.linalg.norm(W.astype(np.float64) + scalings[i] * B @ A, axis=1)
            factor = rng.choice(EXACT_GAINS, h_out) if exact else rng.uniform(0.5, 1.5, h_out)
            magnitudes[i] = (factor * lengths).astype(np.float32)
    dora = Scaled(magnitudes, W, b.astype(dtype) if bias else None)
    its = replace(case, adapters=adapters, scalings=scalings)
    return replace(its, adapter_ids=ids, dora=dora)


def _of_length_8(
    rng: np.random.Generator, r: int, scaling: float, h_in: int, h_out: int, dtype: DTypeLike
) -> Weights:
    """A, of which each row has columns of its own, and B of 1 and -1."""
    A, of_each = np.zeros((r, h_in)), int(SHARED / scaling**2) // max(r, 1)
    columns = rng.permutation(SHARED)[: r * of_each].reshape(r, of_each)
    np.put_along_axis(A, columns, rng.choice((-1, 1), columns.shape), 1)
    return A.astype(dtype), rng.choice((-1, 1), (h_out, r)).astype(dtype)


def corpus(dtype: DTypeLike = np.float32) -> Iterator[Workload]:
    """The hard cases in one float type.

    Semantics: each in normal deviates and in integers, with and without a bias.

    >>> len(list(corpus()))
    31
    """
    for name, why, ids in _ids():
        for exact in (True, False):
            for bias in (True, False):
                kind = f"{'integers' if exact else 'reals'}{', bias' * bias}"
                yield scaled(
                    f"{name}, {kind}", why, ids, RANKS, 70, 90, plain=PLAIN, bias=bias,
                    exact=exact, dtype=dtype,
                )  # fmt: skip
    for name, why, edit in _EDITS:
        case = scaled(name, why, [0, 1, 2, 3, 0, -1], RANKS, 70, 90, plain=PLAIN, dtype=dtype)
        yield replace(case, name=name, **edit(case))


def _ids() -> Iterator[tuple[str, str, NDArray[np.int64]]]:
    rng = np.random.default_rng(0)
    used = np.array([*RANKS, -1])
    yield "rows of all kinds", "a gain in rows of other adapters", rng.choice(used, 40)
    yield "one row", "a tile of one row", np.zeros(1, np.int64)
    yield "rank 0", "no task where there is no rank", np.array([4, -1, 4, 900])
    yield "more rows than a block", "gains of another block", rng.choice([0, 2, 5], 300)
    yield "no gain at all", "rows of plain adapters", rng.choice([*PLAIN, 3, -1], 20)
    alone = np.full((30, 3), -1)
    alone[np.arange(30), rng.integers(0, 3, 30)] = rng.choice(used, 30)
    yield "alone in its row", "a gain once for each place", alone
    yield "beside mixtures", "a gain of pairs", np.vstack([alone[:8], [[2, 900, 2]] * 4])


def _magnitude(case: Workload, i: int, value: float) -> dict[str, Any]:
    assert case.dora is not None
    magnitude = case.dora.magnitudes[i].copy()
    magnitude[3] = value
    return {"dora": case.dora._replace(magnitudes={**case.dora.magnitudes, i: magnitude})}


def _zero_rows(case: Workload) -> dict[str, Any]:
    assert case.dora is not None
    W = case.dora.W.copy()
    W[5:7] = 0
    return {"dora": case.dora._replace(W=W), "scalings": {**case.scalings, 0: 0.0}}


_EDITS: tuple[tuple[str, str, Callable[[Workload], dict[str, Any]]], ...] = (
    ("a magnitude of NaN", "a NaN in rows of others", lambda case: _magnitude(case, 0, math.nan)),
    ("a magnitude of 0", "a gain that is not taken", lambda case: _magnitude(case, 1, 0.0)),
    ("rows of no length", "a gain that is 0 where it is inf", _zero_rows),
)
