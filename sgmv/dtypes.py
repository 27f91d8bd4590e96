"""The float types that sgmv stores, and the types in which it sums them.

numba has neither float16 nor bfloat16 arrays, so the kernels see 16-bit floats as their bits:
float16 as uint16 and bfloat16 as int16. The integer type alone says which format it is.
bfloat16 arrays (`ml_dtypes.bfloat16`) are recognised by name; ml_dtypes is never imported.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import numpy.typing as npt

from sgmv.errors import DtypeError, ShapeError

Array = npt.NDArray[Any]
# Looked up here, for numpy imports a module at that: a child of a fork would wait for ever for an
# import that another thread was in.
NOT_PLAIN = (np.ma.MaskedArray, np.matrix)

FLOAT32, FLOAT64 = np.dtype(np.float32), np.dtype(np.float64)
BITS: dict[str, np.dtype[Any]] = {
    "float32": FLOAT32,
    "float16": np.dtype(np.uint16),
    "bfloat16": np.dtype(np.int16),
    "float64": FLOAT64,
}
TO_FLOAT32 = "convert it first, for example with .astype(np.float32)"
# The dtypes met so far: a dtype's name, which bfloat16 is known by, is slow to ask for.
_bits: dict[np.dtype[Any], np.dtype[Any]] = {}


def check_dtype(argument: str, dtype: npt.DTypeLike, remedy: str = TO_FLOAT32) -> np.dtype[Any]:
    """The dtype itself, if it is one of the four float types in native byte order."""
    if isinstance(dtype, np.dtype) and dtype in _bits:
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
    _bits[found] = BITS[found.name]
    return found


def check_matrix(argument: str, array: object, remedy: str = TO_FLOAT32) -> Array:
    """The argument itself, if it is a two-dimensional numpy array of a float type."""
    if type(array) is np.ndarray and array.ndim == 2 and array.dtype in _bits:
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


def as_bits(array: Array) -> Array:
    """The array as the kernels see it: 16-bit floats as their bits, others as they are."""
    return array if array.itemsize > 2 else array.view(_bits[array.dtype])


def promote(*dtypes: np.dtype[Any]) -> np.dtype[Any]:
    """The smallest of the float types that holds all of these exactly.

    >>> promote(np.dtype("float16"), np.dtype("float32"))
    dtype('float32')
    """
    if all(dtype == dtypes[0] for dtype in dtypes):
        return dtypes[0]
    return sum_dtype(*dtypes)


def sum_dtype(*dtypes: np.dtype[Any]) -> np.dtype[Any]:
    """The type in which products of these are summed: float64 if any of them is, else float32.

    >>> sum_dtype(np.dtype("float16"), np.dtype("float32"))
    dtype('float32')
    """
    return FLOAT64 if FLOAT64 in dtypes else FLOAT32
