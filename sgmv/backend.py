"""Which kernels serve a call: the tiles where this CPU and the float types allow, else the loops.

backend   tiles    float32, float16 and bfloat16 in every mix; vectors of 256 or 512 bits
loops    every float type, every CPU: the readable form, and a cross-check
"""

from __future__ import annotations

import os
from typing import Any, NamedTuple

import numpy as np

from sgmv.dtypes import BITS, FLOAT64, sum_dtype
from sgmv.errors import ValueRangeError
from sgmv.kernels import loops, tiles
from sgmv.kernels.jit import VECTOR_BITS, entry

BACKENDS = ("tiles", "loops")

Dtype = np.dtype[Any]


class Kernels(NamedTuple):
    """What a call of certain float types runs: addresses, 0 for a phase that is left out."""

    shrink: int
    expand: int
    v_itemsize: int


_shrink: dict[tuple[str, Dtype, Dtype, Dtype], int] = {}
_expand: dict[tuple[str, Dtype, Dtype, Dtype], int] = {}
_kernels: dict[tuple[str | None, Dtype | None, Dtype, Dtype | None, Dtype | None], Kernels] = {}


def kernels(
    backend: str | None,
    x: Dtype | None,
    weights: Dtype,
    y: Dtype | None,
    v: Dtype | None = None,
) -> Kernels:
    """The addresses of shrink and expand for these float types; compiled on first use.

    x, y  None leaves out shrink, or expand; its place is then 0
    v     the type in which the others are summed, if left out
    """
    key = (backend, x, weights, y, v)
    found = _kernels.get(key)
    if found is None:
        v = v or sum_dtype(*(dtype for dtype in (x, weights, y) if dtype is not None))
        chosen = choose(backend, v)
        shrink = 0 if x is None else _shrink_kernel(chosen, x, weights, v)
        expand = 0 if y is None else _expand_kernel(chosen, v, weights, y)
        found = _kernels[key] = Kernels(shrink, expand, v.itemsize)
    return found


def choose(backend: str | None, v: Dtype) -> str:
    """The backend by this name, or the best one; raises ValueRangeError where it cannot run."""
    asked = backend or os.environ.get("SGMV_BACKEND") or None
    if asked is not None and asked not in BACKENDS:
        raise ValueRangeError("backend", " or ".join(BACKENDS), repr(asked), "leave it out")
    able = VECTOR_BITS > 0 and v != FLOAT64
    if backend == "tiles" and not able:
        raise ValueRangeError(
            "backend",
            "loops for float64" if VECTOR_BITS else "loops on a CPU without 256-bit vectors",
            "tiles",
            "leave it out",
        )
    return "loops" if asked == "loops" or not able else "tiles"


def _shrink_kernel(backend: str, x: Dtype, weights: Dtype, v: Dtype) -> int:
    key = (backend, x, weights, v)
    if key not in _shrink:
        x_like, w_like, v_like = (BITS[dtype.name].type(0) for dtype in (x, weights, v))
        if backend == "tiles":
            _shrink[key] = _tiles_shrink(x_like, w_like)
        else:
            _shrink[key] = _loops_shrink(x_like, w_like, v_like)
    return _shrink[key]


def _expand_kernel(backend: str, v: Dtype, weights: Dtype, y: Dtype) -> int:
    key = (backend, v, weights, y)
    if key not in _expand:
        v_like, w_like, y_like = (BITS[dtype.name].type(0) for dtype in (v, weights, y))
        if backend == "tiles":
            _expand[key] = _tiles_expand(w_like, y_like)
        else:
            _expand[key] = _loops_expand(v_like, w_like, y_like)
    return _expand[key]


# Each mix of types is a closure over numbers that tell the types, which numba's cache can tell
# apart; over functions it could not.


def _tiles_shrink(x_like: Any, w_like: Any) -> int:
    def tiles_shrink(call: int, limit: int) -> None:
        tiles.shrink(call, limit, x_like, w_like)

    return entry(tiles_shrink)


def _tiles_expand(w_like: Any, y_like: Any) -> int:
    def tiles_expand(call: int, limit: int) -> None:
        tiles.expand(call, limit, w_like, y_like)

    return entry(tiles_expand)


def _loops_shrink(x_like: Any, w_like: Any, v_like: Any) -> int:
    def loops_shrink(call: int, limit: int) -> None:
        loops.shrink(call, limit, x_like, w_like, v_like)

    return entry(loops_shrink)


def _loops_expand(v_like: Any, w_like: Any, y_like: Any) -> int:
    def loops_expand(call: int, limit: int) -> None:
        loops.expand(call, limit, v_like, w_like, y_like)

    return entry(loops_expand)
