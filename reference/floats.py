"""The four float types, known by the name of their dtype (so bfloat16 needs no import)."""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray


class FloatType(NamedTuple):
    """Significand bits (hidden one included) and the exponents of the normal range."""

    bits: int
    min_exponent: int
    max_exponent: int

    @property
    def unit_roundoff(self) -> float:
        """Half the gap after 1.0: rounding to nearest errs by at most this share of the value."""
        return 2.0**-self.bits

    @property
    def smallest_normal(self) -> float:
        """Below it the gaps stop shrinking, and the error of a rounding is absolute."""
        return 2.0**self.min_exponent

    @property
    def half_smallest_subnormal(self) -> float:
        """The largest error of a rounding below `smallest_normal`."""
        # The last factor is exact unless it is itself below float64's range; then 0 would be
        # too small, so the smallest number there is stands in for its half.
        return max(self.unit_roundoff * self.smallest_normal, 5e-324)

    @property
    def overflow_threshold(self) -> float:
        """From here on a value rounds to inf: the largest finite one plus half its gap."""
        return (2.0 - self.unit_roundoff) * 2.0**self.max_exponent


_FLOAT_TYPES = {
    "float16": FloatType(bits=11, min_exponent=-14, max_exponent=15),
    "bfloat16": FloatType(bits=8, min_exponent=-126, max_exponent=127),
    "float32": FloatType(bits=24, min_exponent=-126, max_exponent=127),
    "float64": FloatType(bits=53, min_exponent=-1022, max_exponent=1023),
}


def float_type(dtype: Any) -> FloatType:
    """The float type of a dtype, a scalar type or a name.

    Semantics: looked up by `np.dtype(dtype).name`, or by that name itself.
    Raises: ValueError for any other type. Source: IEEE 754-2019; bfloat16 is float32's top half.

    >>> float_type(np.float16).unit_roundoff == 2.0**-11
    True
    """
    name = dtype if isinstance(dtype, str) else np.dtype(dtype).name
    if name not in _FLOAT_TYPES:
        raise ValueError(
            f"dtype: expected one of {', '.join(_FLOAT_TYPES)}, got {name}; convert the array"
        )
    return _FLOAT_TYPES[name]


def sum_dtype(*arrays: NDArray[Any]) -> np.dtype[Any]:
    """The type in which a kernel sums these operands.

    Semantics: float64 if any operand is float64, else float32.

    >>> sum_dtype(np.zeros(1, np.float16), np.zeros(1, np.float32)).name
    'float32'
    """
    wide = any(array.dtype == np.float64 for array in arrays)
    return np.dtype(np.float64 if wide else np.float32)
