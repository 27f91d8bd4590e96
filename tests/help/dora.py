"""How far PEFT's own result of a DoRA layer may be from the exact one."""

from __future__ import annotations

from typing import Any

import numpy as np

from reference.arguments import Adapter as Reference
from reference.bounds import gamma, unit_roundoff
from reference.floats import float_type
from reference.gains import Gain


def peft_bound(x: Any, W: Any, bias: Any, adapter: Reference, exact: Any, out: Any) -> Any:
    """How far PEFT may be from the exact result: each of its stages, rounded to the layer's type.

    base = round(x W + b), and base - b and base + more are rounded; (g - 1) and g from rounded
    norms; v, d, d * s and the two products, rounded each. In float32 the sums are gamma_n, too.
    """
    u, kind = unit_roundoff(out), float_type(out)
    x, A, B, W = (np.abs(np.asarray(a, np.float64)) for a in (x, adapter.A, adapter.B, W))
    gain = Gain(adapter, W, None)
    s, g, G = abs(adapter.scaling), np.abs(gain.value), gain.error(float_type("float32"))
    if u > unit_roundoff("float32"):  # B @ A, the sum with W, the norm and m / norm, rounded
        G = G + 8 * u * np.linalg.norm(W + s * (B @ A), axis=1) * g * g / np.abs(adapter.magnitude)
    b = 0 if bias is None else np.abs(np.asarray(bias, np.float64))
    in_sums = gamma(x.shape[1] + len(A) + 4, unit_roundoff("float32"))
    base, delta = x @ W.T + b, s * ((x @ A.T) @ B.T)
    error = (1 + g + G) * (in_sums * (base + delta) + 8 * u * (base + b + delta))
    return error + G * (base + b + delta) + 8 * u * np.abs(exact) + kind.half_smallest_subnormal
