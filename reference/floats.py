"""The four float types, known by the name of their dtype (so bfloat16 needs no import)."""

import contextlib
import importlib
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


def dtype_of(kind: Any) -> np.dtype[Any]:
    """A float type by its name, as numpy's dtype.

    Semantics: `np.dtype(kind)`; "bfloat16" is known once ml_dtypes has been imported, and is
    imported here if it is installed.
    Raises: ValueError for any other type, and for bfloat16 without ml_dtypes.

    >>> dtype_of("float16")
    dtype('float16')
    """
    if kind == "bfloat16":
        try:
            importlib.import_module("ml_dtypes")  # numpy knows the name from then on
        except ImportError:
            raise ValueError(
                "dtypes: expected ml_dtypes to be installed for bfloat16, got none; "
                "pip install ml_dtypes"
            ) from None
    dtype: np.dtype[Any] | None = None
    if kind is not None:  # which numpy takes for float64
        with contextlib.suppress(TypeError):
            dtype = np.dtype(kind)
    if dtype is None or dtype.name not in _FLOAT_TYPES:
        raise ValueError(
            f"dtypes: expected some of {', '.join(_FLOAT_TYPES)}, got {kind}; name them"
        )
    return dtype


def sum_dtype(*arrays: NDArray[Any]) -> np.dtype[Any]:
    """The type in which a kernel sums these operands.

    Semantics: float64 if any operand is float64, else float32.

    >>> sum_dtype(np.zeros(1, np.float16), np.zeros(1, np.float32)).name
    'float32'
    """
    wide = any(array.dtype == np.float64 for array in arrays)
    return np.dtype(np.float64 if wide else np.float32)


def gamma(roundings: int, u: float) -> float:
    """What m roundings in a row can do to a value, as a share of it.

    Semantics: m u / (1 - m u). Raises: ValueError from m u = 1 on, where nothing is promised.
    Source: Higham, lemma 3.1.

    >>> gamma(2, 0.25)
    1.0
    """
    if roundings * u >= 1:
        raise ValueError(f"roundings: expected fewer than {1 / u:.0f}, got {roundings}; sum wider")
    return roundings * u / (1 - roundings * u)
