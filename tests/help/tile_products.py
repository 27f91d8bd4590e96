"""The model of tile products: Intel's pseudo-code of TDPBF16PS, over matrices."""

from __future__ import annotations

import numpy as np

from tests.help.bfloat16 import Matrix, flush, fused


def product(c: Matrix, a: Matrix, b: Matrix) -> Matrix:
    """C (n, m) + a (n, 32) @ b (m, 32).T."""
    even = odd = np.zeros_like(c)
    for k in range(0, a.shape[1], 2):
        even = flush(fused(a[:, k, None], b[:, k], even))
        odd = flush(fused(a[:, k + 1, None], b[:, k + 1], odd))
    return flush(c + flush(even + odd))
