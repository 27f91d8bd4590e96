"""Float types: the one that holds several exactly, and the bits that the kernels see."""

from __future__ import annotations

import itertools

import ml_dtypes
import numpy as np
import pytest

from sgmv.checks import check_dtype
from sgmv.dtypes import BITS, as_bits, promote, sum_dtype

TYPES = [np.dtype(t) for t in (np.float16, ml_dtypes.bfloat16, np.float32, np.float64)]


@pytest.mark.parametrize("pair", list(itertools.product(TYPES, TYPES)), ids=str)
def test_promote_holds_the_largest_and_the_finest_of_both(
    pair: tuple[np.dtype, np.dtype],
) -> None:
    found = promote(*pair)
    for dtype in pair:
        info = ml_dtypes.finfo(dtype)
        for value in (info.max, info.tiny, 1 + np.float64(info.eps)):
            assert np.float64(np.array(value, np.float64).astype(found)) == np.float64(value)
    assert found in pair or found == np.float32


def test_sums_are_in_float64_where_an_operand_is() -> None:
    for dtypes in itertools.product(TYPES, repeat=2):
        assert sum_dtype(*dtypes) == (np.float64 if np.dtype("f8") in dtypes else np.float32)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_bits_are_the_arrays_memory(dtype: np.dtype) -> None:
    array = np.arange(6).astype(check_dtype("x", dtype)).reshape(2, 3)
    bits = as_bits(array)
    assert bits.dtype == BITS[dtype.name]
    assert bits.tobytes() == array.tobytes()
    assert np.shares_memory(bits, array)
