"""Random mixtures held to the reference: `python -m tests.stress.mixtures --batches 100000`.

Batches of 1 to 40 rows with 1 to 5 weighted adapters each, in all float types and on all backends,
on 1 to 5 threads: in integers to the bit where y's type holds every sum, else within the bound. A
failure names the seed; `--first SEED --batches 1` runs that batch alone.
"""

from __future__ import annotations

from collections.abc import Iterable

import ml_dtypes
import numpy as np

import sgmv
from reference import mixtures
from tests.help.acceptance import backends_of, check, stack_of
from tests.help.stress import main

TYPES = (np.float32, np.float16, ml_dtypes.bfloat16, np.float64)


def run(seeds: Iterable[int]) -> int:
    """Hold the batch of each seed to the reference; returns how many there were."""
    done = 0
    for seed in seeds:
        rng = np.random.default_rng(seed)
        dtype = TYPES[seed % 4]
        n, k, loaded = (int(rng.integers(1, most)) for most in (40, 6, 8))
        ranks: dict[int, int | None] = {i: int(rng.integers(0, 24)) for i in range(loaded)}
        h_in, h_out = (int(rng.integers(1, 150)) for _ in range(2))
        ids = rng.integers(-1, loaded, (n, k))
        exact = dtype in (np.float32, np.float64) and bool(rng.integers(2))
        name = f"seed {seed}"
        case = mixtures.mixture(name, "random", ids, ranks, h_in, h_out, exact=exact, dtype=dtype)
        stack = stack_of(case)
        for backend in backends_of(case):
            sgmv.set_num_threads(int(rng.integers(1, 6)))
            y = sgmv.add_lora(
                case.y.copy(), case.x, stack, ids, weights=case.weights, backend=backend
            )
            check(case, y, backend)
        done += 1
    return done


if __name__ == "__main__":
    main(__doc__, run, "mixtures")
