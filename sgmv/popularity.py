"""Who uses which adapter: the four popularities of Punica's paper."""

from __future__ import annotations

import math

import numpy as np

from sgmv.checks import check_count, fits_memory
from sgmv.errors import ValueRangeError
from sgmv.ids import Integers

POPULARITIES = ("distinct", "uniform", "skewed", "identical")


def popularity(kind: str, n: int, seed: int = 0) -> Integers:
    """One adapter id per row, in one of the mixes that Punica's paper measures, rows shuffled.

    Semantics: id 0 has the most rows, and so on down; with S adapters they have
    distinct   1 row each: S = n
    uniform    as equally many as can be: S = ceil(sqrt(n))
    skewed     floor(1.5**i) rows for i = 0, 1, ... and the rest, which fewer would not take, one
    identical  all rows one: S = 1

    kind     one of the four
    n        rows
    seed     of the shuffle
    returns  (n,) int64

    Raises ValueRangeError for another kind, DtypeError and ValueRangeError for what is no whole
    number >= 0. Source: Punica (arXiv 2310.18547), section 7; punica, benchmarks/.

    >>> for kind in POPULARITIES:
    ...     print(kind, np.bincount(popularity(kind, 8)))
    distinct [1 1 1 1 1 1 1 1]
    uniform [3 3 2]
    skewed [3 2 1 1 1]
    identical [8]
    """
    n, seed = check_count("n", n, 0), check_count("seed", seed, 0, math.inf)
    if kind not in POPULARITIES:
        raise ValueRangeError("kind", f"one of {POPULARITIES}", repr(kind), "choose one of them")
    with fits_memory("n", n):
        np.empty(n, np.int64)  # numpy's repeat does not look whether its result fits
        rows = _rows_per_adapter(kind, n)
        return np.random.default_rng(seed).permutation(np.repeat(np.arange(len(rows)), rows))


def _rows_per_adapter(kind: str, n: int) -> list[int]:
    """The rows of adapter 0, 1, ..., descending."""
    if kind == "distinct":
        return [1] * n
    if kind == "identical":
        return [n]
    if kind == "uniform":
        S = math.isqrt(max(n - 1, 0)) + 1
        return [n // S + (i < n % S) for i in range(S)]
    rows: list[int] = []
    while sum(rows) + math.floor(1.5 ** len(rows)) < n:
        rows.append(math.floor(1.5 ** len(rows)))
    return sorted([*rows, n - sum(rows)], reverse=True)
