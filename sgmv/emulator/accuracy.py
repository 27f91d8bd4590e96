"""What rounding v to half precision costs, as Punica's shrink does and vLLM's does not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from sgmv.checks import check_dtype, check_matrix
from sgmv.dtypes import Array
from sgmv.errors import DtypeError, ShapeError, some

EDGES = (0.0, 0.125, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, np.inf)  # ulps
BAR = 40  # characters of the longest bar
# Bits of the significand, the hidden one included, and the exponent of the smallest normal number.
SIGNIFICAND = {"float16": (11, -14), "bfloat16": (8, -126), "float32": (24, -126)}


@dataclass(frozen=True)
class Histogram:
    """How many elements err by how many ulps: `counts[i]` from edges[i] to below edges[i+1].

    exact    elements without an error
    largest  the largest error, in ulps
    """

    exact: int
    counts: tuple[int, ...]
    largest: float
    edges: tuple[float, ...] = EDGES

    def __str__(self) -> str:
        named = [("exact", self.exact)]
        named += [
            (f"{low:g} to {high:g}" if high < np.inf else f"above {low:g}", count)
            for low, high, count in zip(self.edges, self.edges[1:], self.counts, strict=False)
        ]
        total = max(sum(count for _, count in named), 1)
        largest = max(count for _, count in named) or 1
        lines = [f"{'ulps':>12}{'elements':>10}{'share':>8}"]
        for name, count in named:
            bar = "█" * round(BAR * count / largest)
            lines.append(f"{name:>12}{count:>10}{count / total:>8.1%}  {bar}".rstrip())
        return "\n".join(lines)


def half_v_error(v: Array, B: Array, dtype: npt.DTypeLike = np.float16) -> Histogram:
    """The error that a half-precision v alone brings into v @ B.T, in ulps of that type.

    Semantics: `|round(v) @ B.T - v @ B.T| / ulp(v @ B.T)` in float64, so that no other rounding
    takes part; one ulp is the gap between neighbouring numbers of `dtype` at the exact value.

    v      (n, r) float32, as a shrink with float32 output leaves it
    B      (h_out, r)
    dtype  float16 or bfloat16

    Raises ShapeError and DtypeError for operands that do not fit.
    Source: vLLM's pull request 1804, which names a half-precision v as its reason against SGMV.

    >>> third = np.full((1, 1), 1 / 3, np.float32)
    >>> histogram = half_v_error(third, np.ones((1, 1), np.float32))
    >>> histogram.exact, sum(histogram.counts), round(histogram.largest, 2)
    (0, 1, 0.33)
    """
    if check_matrix("v", v).shape[1] != check_matrix("B", B).shape[1]:
        raise ShapeError(
            "v", f"rank {B.shape[1]}, as B", f"{v.shape[1]}", "pass v (n, r), B (h_out, r)"
        )
    kind = check_dtype("dtype", dtype)
    if kind.name not in SIGNIFICAND:
        raise DtypeError("dtype", some(SIGNIFICAND), kind.name, "pass the type that v is kept in")
    with np.errstate(invalid="ignore", over="ignore"):  # inf and NaN have no error
        exact = v.astype(np.float64) @ B.astype(np.float64).T
        rounded = v.astype(kind).astype(np.float64) @ B.astype(np.float64).T
        error = np.abs(rounded - exact) / _ulp(exact, kind)
    counts, _ = np.histogram(error[error > 0], EDGES)
    return Histogram(
        exact=int(np.count_nonzero(error == 0)),
        counts=tuple(counts.tolist()),
        largest=float(error.max(initial=0.0)),
    )


def _ulp(values: npt.NDArray[np.float64], dtype: np.dtype[Any]) -> npt.NDArray[np.float64]:
    bits, smallest = SIGNIFICAND[dtype.name]
    _, exponent = np.frexp(np.maximum(np.abs(values), 2.0**smallest))
    gaps: npt.NDArray[np.float64] = np.ldexp(1.0, exponent - bits)
    return gaps
