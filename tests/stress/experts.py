"""Random batches of experts, held to the reference: `python -m tests.stress.experts`.

Batches of 1 to 12 rows, each with 1 to 4 of 1 to 6 experts, some of them none, and adapters on
these, in all float types, on all backends and on 1 to 5 threads: products and deltas in integers to
the bit, or within the bound; of every fourth four batches whole layers, too. Four of every 64 have
up to 300 rows for one or two wide experts: their weights are copied side by side. A failure names
the seed; `--first SEED --batches 1` runs that batch alone.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import ml_dtypes
import numpy as np

import sgmv
from reference import bounds, by_row
from reference import experts as reference
from reference.compare import check
from sgmv import experts
from sgmv.experts import ExpertAdapter, ExpertStack
from tests.help.acceptance import backends
from tests.help.experts import layer
from tests.help.stress import main

TYPES = (np.float32, np.float16, ml_dtypes.bfloat16, np.float64)


def run(seeds: Iterable[int]) -> int:
    """Hold the batch of each seed to the reference; returns how many there were."""
    done = 0
    for seed in seeds:
        rng = np.random.default_rng(seed)
        dtype = TYPES[seed % 4]
        sgmv.set_num_threads(int(rng.integers(1, 6)))
        _products_and_deltas(rng, dtype, f"seed {seed}", wide=8 <= seed % 64 < 12)
        if seed % 16 < 4:
            its = layer(rng, dtype, n=int(rng.integers(1, 6)), k=int(rng.integers(1, 4)))
            check(its.run(), *reference.moe_layer(*its), f"seed {seed}, a layer")
        done += 1
    return done


def _products_and_deltas(rng: np.random.Generator, dtype: Any, name: str, wide: bool) -> None:
    n, k, E, loaded = (int(rng.integers(1, most)) for most in (13, 5, 7, 5))
    h_in, h_out = (int(rng.integers(1, 120)) for _ in range(2))
    if wide:
        n, k, E = int(rng.integers(60, 300)), 1, int(rng.integers(1, 3))
        h_in, h_out = int(rng.integers(1, 2500)), int(rng.integers(65, 200))
    exact = dtype in (np.float32, np.float64) and bool(rng.integers(2))

    def drawn(*shape: int) -> np.ndarray:
        if exact:
            return rng.integers(-4, 5, shape).astype(dtype)
        return (rng.standard_normal(shape) / shape[-1] ** 0.5).astype(dtype)

    ids, of_row = rng.integers(-1, E, (n, k)), rng.integers(-1, loaded, n)
    apart = bool(rng.integers(2))
    x, W = drawn(n, k, h_in) if apart else drawn(n, h_in), drawn(E, h_out, h_in)
    rows = x.reshape(n * k, h_in) if apart else np.repeat(x, k, axis=0)
    flat = ids.reshape(-1)
    expected, bound = np.zeros((n * k, h_out)), np.zeros((n * k, h_out))
    for e in range(E):
        of = np.flatnonzero(flat == e)
        given: Any = rows[of], W[e], {}, [-1] * len(of)
        expected[of] = by_row.apply_batched(*given)
        bound[of] = bounds.apply_batched_bound(*given, out=np.dtype(dtype), expected=expected[of])
    products = experts.grouped_matmul(x, W, ids).reshape(n * k, h_out)
    check(products, expected, 0 * bound if exact else bound, f"{name}, products")

    stack = ExpertStack(E, h_in, h_out, slots=loaded, max_rank=20, dtype=dtype)
    factors: dict[int, Any] = {}
    for adapter in range(loaded):
        r, scaling = int(rng.integers(0, 20)), float(rng.choice([0.5, 1.0, 2.0]))
        A, B = drawn(E, r, h_in) if r else np.zeros((E, 0, h_in), dtype), drawn(E, h_out, max(r, 1))
        stack.load(adapter, ExpertAdapter(A, B[..., :r], scaling))
        factors |= {adapter * E + e: ((A[e], B[e][:, :r]), scaling) for e in range(E)}
    of_pair = np.repeat(of_row, k)
    pair_ids = np.where((flat < 0) | (of_pair < 0), -1, of_pair * E + flat)
    before = drawn(n * k, h_out)
    pairs: Any = {i: pair for i, (pair, _) in factors.items()}
    scalings: Any = {i: scaling for i, (_, scaling) in factors.items()}
    given = before, rows, pairs, pair_ids, scalings
    right = by_row.add_lora(*given)
    room = 0 * right if exact else bounds.add_lora_bound(*given, expected=right)
    for backend in backends(dtype, dtype, dtype):
        y = before.copy().reshape(n, k, h_out)
        experts.add_lora(y, x, stack, ids, of_row, backend=backend)
        check(y.reshape(n * k, h_out), right, room, f"{name}, deltas, {backend}")


if __name__ == "__main__":
    main(__doc__, run, "batches")
