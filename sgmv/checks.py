"""What the calls demand of their arguments. Each check is pure: it looks, and raises or returns.

Weights are checked where they are loaded, in stack.py.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from sgmv.dtypes import Array, check_matrix
from sgmv.errors import DtypeError, MemoryLayoutError, ShapeError
from sgmv.segment import Segments
from sgmv.stack import AdapterStack


def check_stack(stack: object) -> None:
    if not isinstance(stack, AdapterStack):
        raise DtypeError(
            "stack",
            "an AdapterStack",
            type(stack).__name__,
            "make one with AdapterStack.from_adapters",
        )


def check_segments(segments: object) -> None:
    if not isinstance(segments, Segments):
        raise DtypeError(
            "segments", "Segments", type(segments).__name__, "make them with segment(adapter_ids)"
        )


def check_x(x: Array, n: int, h_in: int, argument: str = "x") -> None:
    _check_shape(argument, x, n, "h_in", h_in)


def _check_shape(argument: str, array: Array, n: int, name: str, width: int) -> None:
    check_matrix(argument, array)
    if array.shape != (n, width):
        raise ShapeError(
            argument,
            f"shape (n, {name}) = ({n}, {width})",
            str(array.shape),
            f"give one row per adapter id, as wide as the adapters' {name}",
        )


def check_v(v: Array, n: int, rank: int) -> None:
    check_matrix("v", v)
    if v.dtype.name not in ("float32", "float64"):
        raise DtypeError(
            "v", "float32 or float64", v.dtype.name, "pass what shrink returned, unrounded"
        )
    if v.shape[0] != n or v.shape[1] < rank:
        raise ShapeError(
            "v",
            f"shape (n, at least the batch's highest rank) = ({n}, >= {rank})",
            str(v.shape),
            "pass what shrink returned for these segments",
        )


def check_y(y: Array, n: int, h_out: int, source: str, operand: Any, argument: str = "y") -> None:
    """Refuse a y whose writing would change `operand`, the array named `source`, or y elsewhere."""
    _check_shape(argument, y, n, "h_out", h_out)
    if not y.flags.writeable:
        raise MemoryLayoutError(
            argument, "a writable array", "a read-only one", f"pass {argument}.copy()"
        )
    if not y.flags.c_contiguous and _overlaps_itself(y):
        raise MemoryLayoutError(
            argument,
            "elements that each have their own memory",
            f"strides {y.strides} for shape {y.shape}",
            f"pass {argument}.copy()",
        )
    if np.may_share_memory(y, operand) and np.shares_memory(y, operand):
        raise MemoryLayoutError(
            argument, f"memory apart from {source}", "arrays that overlap", f"pass {source}.copy()"
        )


def _overlaps_itself(y: Array) -> bool:
    (inner, inner_size), (outer, outer_size) = sorted(
        (abs(stride), size) for stride, size in zip(y.strides, y.shape, strict=True)
    )
    if inner_size > 1 and inner < y.itemsize:
        return True
    return outer_size > 1 and outer < inner * (inner_size - 1) + y.itemsize and y.size > 0
