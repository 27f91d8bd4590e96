"""DoRA in the bounds: how far off a gain may be, and what a row that it multiplies is off by then.

A row of an adapter with a magnitude m (DoRA): t = y_i + d_i as above, t' with its error E, then
g t + (1 - g) b with g = m / n, n = |w|, w_k = W_ik + s sum_j B_ij A_jk. Where the kernel sums n in
a type of u and eta, 1 rounding for W, or B_ij A_jk, 2 for s, r additions:
    |w' - w| <= D = |gamma_{r+3} (|W_ik| + |s| sum_j |B_ij| |A_jk|) + (|s| r + 1) eta + eta sum_j
                |A_jk||, as lengths of vectors over k
    |n' - n| <= N = D + gamma_{h_in+2} (n + D) + sqrt(h_in eta)     squares, their sum, the root
    |g' - g| <= G = |m| N / (n (n - N)) + gamma_2 |m| / (n - N) + eta     m rounded, the division
which promises nothing unless N < n. What is stored is then off by at most
    (|g| + G) E + G |t|                          what g' and t' are off by
    + u (|g| + G) (|t| + E) + eta                their product
    + G |b| + gamma_3 (|1 - g| + G) |b| + eta    the offset (1 - g') b, and b rounded
    + u (|g t| + |(1 - g) b| + all of the above) its addition; no offset, no addition
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from reference import by_row
from reference.arguments import Adapter, scaled_rows
from reference.floats import FloatType, gamma

Bound = NDArray[np.float64]


class Gain(NamedTuple):
    """The gains of one adapter."""

    adapter: Adapter
    W: NDArray[Any]
    bias: Bound | None

    @property
    def value(self) -> Bound:
        """g, (h_out,)."""
        A, B, m, W = self._operands()
        return by_row.gain(A, B, self.adapter.scaling, m, W)

    def _operands(self) -> list[NDArray[np.float64]]:
        operands = *self.adapter[:2], self.adapter.magnitude, self.W
        return [np.asarray(operand, np.float64) for operand in operands]

    def error(self, kind: FloatType) -> Bound:
        """G, where norms are summed in this type; infinite where nothing is promised."""
        A, B, m, W = self._operands()
        norm = by_row.gain(A, B, self.adapter.scaling, np.ones_like(m), W) ** -1.0
        A, B, m, W = (np.abs(operand) for operand in (A, B, m, W))
        s, (r, h_in) = abs(self.adapter.scaling), A.shape
        u, eta = kind.unit_roundoff, kind.half_smallest_subnormal
        rows = gamma(r + 3, u) * (W + s * (B @ A)) + (s * r + 1) * eta + eta * A.sum(axis=0)
        D = np.sqrt((rows * rows).sum(axis=1))
        N = D + gamma(h_in + 2, u) * (norm + D) + np.sqrt(h_in * eta)
        left = np.where(norm > N, norm - N, 0.0)
        with np.errstate(divide="ignore"):
            found = np.where(left > 0, m * N / (norm * left) + gamma(2, u) * m / left, np.inf)
        return np.where(m > 0, found + eta, eta)

    def carried(self, error: Bound, most: Bound, kind: FloatType, own: FloatType) -> Bound:
        """The error of g t + (1 - g) b, where |t| <= most and t is off by this error.

        kind, own  the type that t, and that the norm, is summed in
        """
        u, eta = kind.unit_roundoff, kind.half_smallest_subnormal
        g, G = np.abs(self.value), self.error(own)
        total: Bound = (g + G) * error + G * most
        total = total + u * (g + G) * (most + error) + eta
        if self.bias is None:
            return total
        b, apart = np.abs(self.bias), np.abs(1 - self.value)
        total = total + G * b + gamma(3, own.unit_roundoff) * (apart + G) * b + eta
        found: Bound = total + u * (g * most + apart * b + total)
        return found


Gains = dict[int, tuple[NDArray[np.intp], Gain]]  # rows of each adapter with magnitudes


def gains_of(
    ids: NDArray[np.int64],
    chosen: dict[int, Adapter | None],
    weights: ArrayLike | None,
    W: ArrayLike | None,
    bias: ArrayLike | None,
    x: NDArray[Any],
) -> Gains:
    """The rows of each adapter with magnitudes that they use, and its gains."""
    h_out = next((len(one.B) for one in chosen.values() if one), 0)
    rows_of, W, b = scaled_rows(ids, chosen, weights, W, bias, (h_out, x.shape[1]))
    b = None if b is None else b.astype(np.float64)
    return {i: (rows, Gain(one, W, b)) for i, rows in rows_of.items() if (one := chosen[i])}
