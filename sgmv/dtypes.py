"""The float types that sgmv stores, and the types in which it sums them.

numba has neither float16 nor bfloat16 arrays, so the kernels see 16-bit floats as their bits:
float16 as uint16 and bfloat16 as int16. The integer type alone says which format it is.
bfloat16 arrays (`ml_dtypes.bfloat16`) are recognised by name; ml_dtypes is never imported.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
FLOAT32, FLOAT64 = np.dtype(np.float32), np.dtype(np.float64)
BITS: dict[str, np.dtype[Any]] = {
    "float32": FLOAT32,
    "float16": np.dtype(np.uint16),
    "bfloat16": np.dtype(np.int16),
    "float64": FLOAT64,
}
# The same by dtype, of those that check_dtype has let pass: a dtype's name is slow to ask for.
bits_of: dict[np.dtype[Any], np.dtype[Any]] = {}


def as_bits(array: Array) -> Array:
    """The array as the kernels see it: 16-bit floats as their bits, others as they are."""
    return array if array.itemsize > 2 else array.view(bits_of[array.dtype])


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
