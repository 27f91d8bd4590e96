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

FLOAT32, FLOAT64 = np.dtype(np.float32), np.dtype(np.float64)
BITS: dict[str, np.dtype[Any]] = {
    "float32": FLOAT32,
    "float16": np.dtype(np.uint16),
    "bfloat16": np.dtype(np.int16),
    "float64": FLOAT64,
}
# dtype -> an empty array that tells a kernel the element type behind a bare address. Filled as
# dtypes are met, because a dtype's name, which bfloat16 is known by, is slow to ask for.
_like: dict[np.dtype[Any], Array] = {}


def check_dtype(argument: str, dtype: npt.DTypeLike) -> np.dtype[Any]:
    """The dtype itself, if it is one of the four float types in native byte order."""
    if isinstance(dtype, np.dtype) and dtype in _like:
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
        found = np.dtype(dtype)
    except TypeError:
        found = None
    if found is None or found.name not in BITS or not found.isnative:
        raise DtypeError(
            argument,
            "float32, float16, bfloat16 or float64 in native byte order",
            repr(dtype) if found is None else str(found),
            "convert it first, for example with .astype(np.float32)",
        )
    _like[found] = np.empty(0, BITS[found.name])
    return found


def check_matrix(argument: str, array: object) -> Array:
    """The argument itself, if it is a two-dimensional numpy array of a float type."""
    if not isinstance(array, np.ndarray) or isinstance(array, (np.ma.MaskedArray, np.matrix)):
        raise DtypeError(
            argument,
            "a plain two-dimensional numpy array",
            type(array).__name__,
            "convert it first, for example with np.asarray (for a torch tensor: .numpy())",
        )
    check_dtype(argument, array.dtype)
    if array.ndim != 2:
        raise ShapeError(
            argument,
            "two dimensions, rows first",
            f"shape {array.shape}",
            "reshape it, as in x.reshape(-1, h_in)",
        )
    return array


def like(dtype: np.dtype[Any]) -> Array:
    """The empty array that stands for this checked dtype in a kernel's arguments."""
    return _like[dtype]


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
