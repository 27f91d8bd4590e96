"""What the CPU's products of bfloat16 do to one number: the words of every model of their bits."""

from __future__ import annotations

import numpy as np

Matrix = np.ndarray


def flush(values: Matrix) -> Matrix:
    """Subnormal numbers as 0 of their sign."""
    return np.where(np.abs(values) < 2.0**-126, np.copysign(np.float32(0), values), values)


def fused(a: Matrix, b: Matrix, c: Matrix) -> Matrix:
    """A * b + c, rounded once: in float64 the product is exact, and the sum has over twice the bits
    of a float32, so that rounding it first changes nothing (Figueroa 1995).
    """
    return (a.astype(np.float64) * b + c).astype(np.float32)
