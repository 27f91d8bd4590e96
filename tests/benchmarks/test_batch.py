"""A batch counts what one call on it does."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.batch import make_batch, make_pool

pytestmark = pytest.mark.once


def test_footprint_and_flops_count_what_one_call_does() -> None:
    pool = make_pool(10, 20, 4, 3, np.dtype(np.float32), seed=0)
    batch = make_batch(pool, np.array([0, 2, 2]), seed=0)
    assert batch.footprint() == 4 * (2 * 4 * (10 + 20) + 3 * 10 + 2 * 3 * 20)
    assert batch.flops() == 2 * 3 * 4 * (10 + 20)
