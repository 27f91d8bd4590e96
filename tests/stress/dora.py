"""Random batches with DoRA held to the reference: `python -m tests.stress.dora --batches 100000`.

Batches of 1 to 40 rows, plain adapters and adapters with magnitudes, with and without a bias, in
all float types and on all backends, on 1 to 5 threads: in integers to the bit, else within the
bound. A failure names the seed; `--first SEED --batches 1` runs that batch alone.
"""

from __future__ import annotations

from collections.abc import Iterable

import ml_dtypes
import numpy as np

import sgmv
from reference import dora
from tests.help.acceptance import backends_of, check, stack_of
from tests.help.stress import main

TYPES = (np.float32, np.float16, ml_dtypes.bfloat16, np.float64)
EXACT_RANKS = (0, 1, 2, 3, 4, 6, 12)


def run(seeds: Iterable[int]) -> int:
    """Hold the batch of each seed to the reference; returns how many there were."""
    done = 0
    for seed in seeds:
        rng = np.random.default_rng(seed)
        dtype, exact = TYPES[seed % 4], bool(rng.integers(2))
        n, loaded = (int(rng.integers(1, most)) for most in (40, 8))
        drawn = rng.choice(EXACT_RANKS, loaded) if exact else rng.integers(0, 24, loaded)
        ranks: dict[int, int | None] = dict(enumerate(drawn.tolist()))
        h_in, h_out = int(rng.integers(56 if exact else 1, 150)), int(rng.integers(1, 150))
        ids = rng.integers(-1, loaded, n)
        if rng.integers(4) == 0:
            places = np.full((n, int(rng.integers(2, 4))), -1)
            places[np.arange(n), rng.integers(0, places.shape[1], n)] = ids
            ids = places
        plain = np.flatnonzero(rng.integers(3, size=loaded) == 0).tolist()
        case = dora.scaled(
            f"seed {seed}", "random", ids, ranks, h_in, h_out, plain=plain,
            bias=bool(rng.integers(2)), exact=exact, dtype=dtype,
        )  # fmt: skip
        stack = stack_of(case)
        for backend in backends_of(case):
            sgmv.set_num_threads(int(rng.integers(1, 6)))
            y = sgmv.add_lora(case.y.copy(), case.x, stack, ids, backend=backend)
            check(case, y, backend)
        done += 1
    return done


if __name__ == "__main__":
    main(__doc__, run, "batches with DoRA")
