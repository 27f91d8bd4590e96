"""16-bit floats, exhaustively against ml_dtypes and numpy."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from sgmv.kernels.floats import decode, encode
from sgmv.kernels.jit import jit
from tests.conftest import JITTED
from tests.help.tile_checks import round_to

FORMATS = {"float16": (np.float16, np.uint16), "bfloat16": (ml_dtypes.bfloat16, np.int16)}
ALL_BITS = np.arange(0, 2**16, 1 if JITTED else 97).astype(np.uint16)


@jit()
def decode_all(elements, out):
    for i in range(elements.shape[0]):
        out[i] = decode(elements[i], out[0])


@jit()
def encode_all(values, out):
    for i in range(values.shape[0]):
        out[i] = encode(values[i], out[0])


@np.errstate(invalid="ignore", over="ignore")  # ml_dtypes warns when it casts NaN
@pytest.mark.parametrize("wide", [np.float32, np.float64])
@pytest.mark.parametrize("name", FORMATS)
def test_decode_every_bit_pattern(name: str, wide: type) -> None:
    dtype, bits = FORMATS[name]
    out = np.empty(len(ALL_BITS), wide)
    decode_all(ALL_BITS.view(bits), out)
    np.testing.assert_array_equal(out, ALL_BITS.view(dtype).astype(wide))
    np.testing.assert_array_equal(np.signbit(out), ALL_BITS >= 2**15)


@np.errstate(invalid="ignore", over="ignore")  # ml_dtypes warns when it casts NaN
@pytest.mark.parametrize("wide", [np.float32, np.float64])
@pytest.mark.parametrize("name", FORMATS)
def test_encode_rounds_to_nearest_even_once(
    name: str, wide: type, rng: np.random.Generator
) -> None:
    """Each 16-bit value, the midpoints above each, a hair off each midpoint, and random bits."""
    dtype, bits = FORMATS[name]
    exact = ALL_BITS.view(dtype).astype(np.float64)
    above = (ALL_BITS + 1).astype(np.uint16).view(dtype).astype(np.float64)
    middle = (exact + above) / 2
    hair = np.abs(middle) * 2.0**-40
    values = np.concatenate([exact, middle, middle - hair, middle + hair])
    values = np.concatenate([values.astype(wide), _random_bits(rng, wide)])
    expected = round_to(values, name)
    out = np.empty(len(values), bits)
    encode_all(values, out)
    actual = out.view(dtype).astype(np.float64)
    np.testing.assert_array_equal(actual, expected)
    finite = ~np.isnan(expected)
    np.testing.assert_array_equal(np.signbit(actual[finite]), np.signbit(expected[finite]))


def _random_bits(rng: np.random.Generator, wide: type) -> np.ndarray:
    integers = np.uint32 if wide == np.float32 else np.uint64
    info = np.iinfo(integers)
    return rng.integers(0, info.max, 5000, integers, endpoint=True).view(wide)
