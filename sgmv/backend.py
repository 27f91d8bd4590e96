"""Which kernels serve a call: the first of these that this CPU and the float types allow.

backend   amx      x and weights of bfloat16: shrink by tile products, expand by the tiles
          tiles    float32, float16 and bfloat16 in every mix; vectors of 128 to 512 bits; shrink of
                   bfloat16 alone by an AMD's own products, where it has them (AVX512_BF16)
          loops    every float type, every CPU: the readable form, and a cross-check
"""

from __future__ import annotations

from typing import Any

import numpy as np

from sgmv import amx
from sgmv.cpu import SUMS_BFLOAT16, VECTOR_BITS
from sgmv.dtypes import BITS, FLOAT64, sum_dtype
from sgmv.errors import ValueRangeError
from sgmv.kernels import loops, tile_kernels
from sgmv.kernels.records import KERNELS
from sgmv.settings import BACKEND

BACKENDS = ("amx", "tiles", "loops")

Dtype = np.dtype[Any]


class Kernels:
    """What a call of certain float types runs: addresses, 0 for a phase that is left out.

    v_itemsize  bytes of a number of v
    address     of these three, as compiled code takes them
    """

    def __init__(self, shrink: int, expand: int, v_itemsize: int) -> None:
        self.v_itemsize = v_itemsize
        self._record = np.array([(shrink, expand, v_itemsize)], KERNELS)
        self.address = int(self._record.ctypes.data)


_shrink: dict[tuple[str, Dtype, Dtype, Dtype], int] = {}
_expand: dict[tuple[str, Dtype, Dtype, Dtype], int] = {}
_last: tuple[Any, Any, Any, Any, Any, Kernels] = (0, 0, 0, 0, 0, Kernels(0, 0, 0))
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
    if backend is not None and not isinstance(backend, str):
        raise ValueRangeError("backend", "amx, tiles or loops", repr(backend), "leave it out")
    global _last
    last = _last
    # Layer after layer has the same types: four comparisons, where the hash of a dtype is slow.
    if last[0] is x and last[1] is weights and last[2] is y and last[3] is v and last[4] is backend:
        return last[5]
    key = (backend, x, weights, y, v)
    found = _kernels.get(key)
    if found is None:
        v = v or sum_dtype(*(dtype for dtype in (x, weights, y) if dtype is not None))
        operands = [dtype for dtype in (x, weights) if dtype is not None]
        chosen = choose(backend, v, all(dtype.name == "bfloat16" for dtype in operands))
        shrink = 0 if x is None else _shrink_kernel(chosen, x, weights, v)
        expand = 0 if y is None else _expand_kernel(chosen, v, weights, y)
        found = _kernels[key] = Kernels(shrink, expand, v.itemsize)
    _last = x, weights, y, v, backend, found
    return found


def choose(backend: str | None, v: Dtype, bfloat16: bool = False) -> str:
    """The backend by this name, or the best one; raises ValueRangeError where it cannot run.

    backend   where left out, the environment's SGMV_BACKEND, or else the next that can
    bfloat16  whether x and weights are, as far as they take part
    """
    asked = backend or BACKEND.read() or BACKENDS[0]
    if asked not in BACKENDS:
        raise ValueRangeError("backend", "amx, tiles or loops", repr(asked), "leave it out")
    able = ["loops"]
    if VECTOR_BITS and v != FLOAT64:
        able.insert(0, "tiles")
        if bfloat16 and asked == "amx" and amx.is_on():
            able.insert(0, "amx")
    if backend and backend not in able:
        raise ValueRangeError("backend", _alternatives(v), backend, "leave it out")
    return next(name for name in BACKENDS[BACKENDS.index(asked) :] if name in able)


def flushes(backend: str | None, x: Dtype, weights: Dtype) -> tuple[str, ...]:
    """The phases that take subnormal numbers for 0, as the CPU's own products of bfloat16 do."""
    if x.name != "bfloat16" or weights.name != "bfloat16":
        return ()
    chosen = choose(backend, sum_dtype(x, weights), bfloat16=True)
    if chosen == "amx":
        return ("shrink", "expand")
    return ("shrink",) if chosen == "tiles" and SUMS_BFLOAT16 else ()


def _alternatives(v: Dtype) -> str:
    """The backends that can run instead of the one asked for, and why it cannot."""
    if not VECTOR_BITS:
        return "loops where tiles have no vectors, as sgmv.info() tells"
    if v == FLOAT64:
        return "loops for float64"
    return f"tiles or loops {'but for bfloat16' if amx.is_on() else 'where AMX is not on'}"


def _shrink_kernel(backend: str, x: Dtype, weights: Dtype, v: Dtype) -> int:
    key = (backend, x, weights, v)
    if key not in _shrink:
        x_like, w_like, v_like = (BITS[dtype.name].type(0) for dtype in (x, weights, v))
        if backend == "amx":
            _shrink[key] = amx.shrink_kernel()
        elif backend == "tiles":
            _shrink[key] = tile_kernels.shrink_kernel(x_like, w_like)
        else:
            _shrink[key] = loops.shrink_kernel(x_like, w_like, v_like)
    return _shrink[key]


def _expand_kernel(backend: str, v: Dtype, weights: Dtype, y: Dtype) -> int:
    key = (backend, v, weights, y)
    if key not in _expand:
        v_like, w_like, y_like = (BITS[dtype.name].type(0) for dtype in (v, weights, y))
        if backend == "amx":
            _expand[key] = amx.expand_kernel(y_like)
        elif backend == "tiles":
            _expand[key] = tile_kernels.expand_kernel(w_like, y_like)
        else:
            _expand[key] = loops.expand_kernel(v_like, w_like, y_like)
    return _expand[key]
