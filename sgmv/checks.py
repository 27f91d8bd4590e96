"""What the calls demand of their arguments: each check looks, and raises or returns.

Those of a type's own objects are beside it: check_id, check_segments, check_stack.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt

from sgmv.dtypes import BITS, FLOAT32, FLOAT64, Array, bits_of
from sgmv.errors import (
    DtypeError,
    MemoryLayoutError,
    SgmvError,
    ShapeError,
    ValueRangeError,
    shown,
)
from sgmv.ids import MOST, is_integer

TO_FLOAT32 = "convert it first, for example with .astype(np.float32)"
# Looked up here, for numpy imports a module at that: a child of a fork would wait for ever for an
# import that another thread was in.
NO_FLAGS = np.zeros(1)[:0].flags  # of a view, which owns nothing
NOT_PLAIN = (np.ma.MaskedArray, np.matrix)


def check_count(argument: str, value: object, least: int, limit: float = MOST) -> int:
    """The value as an int, if it is a whole number from `least` to `limit`, by default int64's."""
    if not is_integer(value):
        raise DtypeError(argument, "an integer", type(value).__name__, "pass a whole number")
    if value < least:
        raise ValueRangeError(argument, f"at least {least}", shown(value), "pass a larger number")
    if value > limit:
        expected = "less than 2**63" if limit == MOST else f"at most {limit}"
        raise ValueRangeError(argument, expected, shown(value), "pass a smaller number")
    return int(value)


def as_float(value: Any) -> float:
    """A number as a float; an int beyond every float is infinite."""
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def check_several(argument: str, values: object, expected: str) -> None:
    """Refuse what has no elements, and text: its elements are letters."""
    single = isinstance(values, (str, bytes)) or not isinstance(values, Iterable)
    if single or (isinstance(values, np.ndarray) and values.ndim == 0):
        raise DtypeError(argument, expected, type(values).__name__, "pass a list")


def check_scaling(argument: str, scaling: object) -> float:
    """The scaling as a float, if it is a real number that float32 can hold."""
    if not is_integer(scaling) and not isinstance(scaling, (float, np.floating)):
        raise DtypeError(
            argument, "a real number", type(scaling).__name__, "pass lora_alpha / r, or 1.0"
        )
    value = as_float(scaling)
    if not math.isfinite(value) or abs(value) > float(np.finfo(np.float32).max):
        raise ValueRangeError(
            argument, "a finite number that float32 holds", repr(value), "pass lora_alpha / r"
        )
    return value


def check_weights(weights: npt.ArrayLike, n: int, k: int) -> npt.NDArray[np.float32]:
    """The weights as float32 (n, k), if they are finite; (n,) will do for k = 1."""
    try:
        given = np.asarray(weights)
    except ValueError:  # lists of unequal lengths
        given = np.empty(0, object)
    if given.dtype.kind not in "fiu" and given.dtype not in bits_of:
        raise DtypeError("weights", "real numbers", str(given.dtype), TO_FLOAT32)
    empty = n == 0 and given.shape[:1] == (0,)  # segments of no rows do not know their k
    if given.shape != (n, k) and (k, given.shape) != (1, (n,)) and not empty:
        raise ShapeError(
            "weights",
            f"shape (n, k) = ({n}, {k})",
            str(given.shape),
            "give one weight for each adapter id",
        )
    with np.errstate(over="ignore"):
        found = np.ascontiguousarray(given, np.float32).reshape(n, k)
    if not np.isfinite(found).all():
        raise ValueRangeError(
            "weights",
            "finite numbers that float32 holds",
            str(given[~np.isfinite(found.reshape(given.shape))][0]),
            "leave a pair out with the id -1",
        )
    return found


@contextmanager
def fits_memory(argument: str, value: object) -> Iterator[None]:
    """Refuse a number of elements for which an array cannot be allocated."""
    try:
        yield
    except SgmvError:
        raise
    except (MemoryError, ValueError, OverflowError) as error:  # numpy's, by how much too large
        expected = "a number for which there is memory"
        raise ValueRangeError(argument, expected, shown(value), "pass a smaller one") from error


def check_dtype(argument: str, dtype: npt.DTypeLike, remedy: str = TO_FLOAT32) -> np.dtype[Any]:
    """The dtype itself, if it is one of the four float types in native byte order."""
    if isinstance(dtype, np.dtype) and dtype in bits_of:
        return dtype
    if isinstance(dtype, str) and dtype == "bfloat16":
        ml_dtypes = sys.modules.get("ml_dtypes")
        if ml_dtypes is None:
            raise DtypeError(
                argument,
                "a numpy dtype",
                "the name 'bfloat16', which numpy itself does not know",
                "`import ml_dtypes` and pass ml_dtypes.bfloat16",
            )
        dtype = ml_dtypes.bfloat16
    try:
        found = None if dtype is None else np.dtype(dtype)  # numpy takes None for float64
    except (TypeError, ValueError, Warning):  # of a name that numpy does not know any more, say
        found = None
    if found is None or found.name not in BITS or not found.isnative:
        raise DtypeError(
            argument,
            "float32, float16, bfloat16 or float64 in native byte order",
            repr(dtype) if found is None else str(found),
            remedy,
        )
    bits_of[found] = BITS[found.name]
    return found


def check_matrix(argument: str, array: object, remedy: str = TO_FLOAT32) -> Array:
    """The argument itself, if it is a two-dimensional numpy array of a float type."""
    if type(array) is np.ndarray and array.ndim == 2 and array.dtype in bits_of:
        return array
    if not isinstance(array, np.ndarray) or isinstance(array, NOT_PLAIN):
        raise DtypeError(
            argument,
            "a plain two-dimensional numpy array",
            type(array).__name__,
            "convert it first, for example with np.asarray (for a torch tensor: .numpy())",
        )
    check_dtype(argument, array.dtype, remedy)
    if array.ndim != 2:
        raise ShapeError(
            argument,
            "two dimensions, rows first",
            f"shape {array.shape}",
            "reshape it, as in x.reshape(-1, h_in)",
        )
    return array


def check_columns(argument: str, array: object, h_out: int) -> Array:
    """The argument itself, if it is a plain array of floats, one for each column of y."""
    if not isinstance(array, np.ndarray) or isinstance(array, NOT_PLAIN):
        raise DtypeError(
            argument, "a plain numpy array", type(array).__name__, "convert it with np.asarray"
        )
    check_dtype(argument, array.dtype)
    if array.shape != (h_out,):
        expected = f"shape (h_out,) = ({h_out},)"
        raise ShapeError(argument, expected, str(array.shape), "give one number per row of B")
    return array


def check_x(x: Array, n: int, h_in: int, argument: str = "x") -> None:
    """Refuse what is no matrix of n rows that are as wide as the layer's input."""
    if type(x) is not np.ndarray or x.shape != (n, h_in) or x.dtype not in bits_of:
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
    """Refuse what shrink cannot have returned for n rows with this highest rank."""
    check_matrix("v", v)
    if v.dtype not in (FLOAT32, FLOAT64):
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
    """Refuse a y of another shape, read-only, or overlapping `operand` (`source`) or itself."""
    if type(y) is not np.ndarray or y.shape != (n, h_out) or y.dtype not in bits_of:
        _check_shape(argument, y, n, "h_out", h_out)
    flags = y.flags
    if not flags.writeable:
        raise MemoryLayoutError(
            argument, "a writable array", "a read-only one", f"pass {argument}.copy()"
        )
    if not flags.c_contiguous and _overlaps_itself(y):
        raise MemoryLayoutError(
            argument,
            "elements that each have their own memory",
            f"strides {y.strides} for shape {y.shape}",
            f"pass {argument}.copy()",
        )
    # Two arrays that each own their memory share none; numpy takes ten times as long to say so.
    apart = flags.owndata and y is not operand and getattr(operand, "flags", NO_FLAGS).owndata
    if not apart and np.may_share_memory(y, operand) and np.shares_memory(y, operand):
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
