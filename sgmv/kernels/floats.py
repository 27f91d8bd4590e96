"""16-bit floats as the kernels see them: bits in, float32 out, and back with one rounding.

The integer type names the format (see sgmv/dtypes.py):

    float16   uint16   s eeeee mmmmmmmmmm        largest 65504, subnormal step 2**-24
    bfloat16  int16    s eeeeeeee mmmmmmm        the upper half of a float32
"""

from __future__ import annotations

import numpy as np
from numba import types
from numba.extending import overload

from sgmv.kernels.jit import jit

SIGN = np.uint32(0x8000_0000)
MAGNITUDE = np.uint32(0x7FFF_FFFF)
QUIET = np.uint32(0x0040_0000)
INFINITY = np.uint32(0x7F80_0000)
HALF_OVERFLOWS = np.uint32(0x4780_0000)  # 65536.0
HALF_NORMAL = np.uint32(0x3880_0000)  # 2**-14
ONE_HALF = np.uint32(0x3F00_0000)
REBIAS = np.uint32((127 - 15) << 23)
REBIAS_FACTOR = np.float32(2.0**112)


@jit()
def float16_to_float32(bits):
    magnitude = np.uint32(bits & 0x7FFF)
    # Moving the bits up leaves the exponent short by 112; a product by 2**112 mends it, and
    # normalises the subnormals on the way.
    value = np.float32(np.uint32(magnitude << 13).view(np.float32) * REBIAS_FACTOR).view(np.uint32)
    if magnitude >= 0x7C00:
        value = np.uint32(INFINITY | (magnitude << 13))
    return np.uint32(value | (np.uint32(bits & 0x8000) << 16)).view(np.float32)


@jit()
def bfloat16_to_float32(bits):
    return np.uint32(np.uint32(np.uint16(bits)) << 16).view(np.float32)


@jit()
def float32_to_float16(value):
    bits = np.float32(value).view(np.uint32)
    magnitude = np.uint32(bits & MAGNITUDE)
    if magnitude >= HALF_OVERFLOWS:
        half = np.uint32(0x7E00 if magnitude > INFINITY else 0x7C00)
    elif magnitude < HALF_NORMAL:
        # In [0.5, 1) a float32 step is 2**-24, float16's subnormal step: the addition rounds.
        shifted = np.float32(magnitude.view(np.float32) + np.float32(0.5)).view(np.uint32)
        half = np.uint32(shifted - ONE_HALF)
    else:
        to_even = np.uint32(0xFFF) + ((magnitude >> 13) & np.uint32(1))
        half = np.uint32((magnitude - REBIAS + to_even) >> 13)
    return np.uint16(half | ((bits & SIGN) >> 16))


@jit()
def float32_to_bfloat16(value):
    bits = np.float32(value).view(np.uint32)
    if bits & MAGNITUDE > INFINITY:
        upper = np.uint32((bits | QUIET) >> 16)
    else:
        to_even = np.uint32(0x7FFF) + ((bits >> 16) & np.uint32(1))
        upper = np.uint32((bits + to_even) >> 16)
    return np.uint16(upper).view(np.int16)


@jit()
def float64_to_odd_float32(value):
    """Truncate, and keep in the last bit whether anything was lost.

    A later rounding to 16 bits then rounds as if from the float64: never twice.
    """
    bits = np.float32(value).view(np.uint32)
    rounded = np.float64(np.float32(value))
    if rounded != value and value == value:
        if abs(rounded) > abs(value):
            bits = np.uint32(bits - np.uint32(1))
        bits = np.uint32(bits | np.uint32(1))
    return np.uint32(bits).view(np.float32)


def decode(element, like):
    """The value of a stored element, exactly, in the type of the number `like`."""
    if isinstance(element, np.uint16):
        element = element.view(np.float16)
    elif isinstance(element, np.int16):
        element = (np.uint32(element.view(np.uint16)) << np.uint32(16)).view(np.float32)
    return type(like)(element)


@overload(decode)
def _decode(element, like):
    wide = np.float64 if like == types.float64 else np.float32
    if element == types.uint16:
        return lambda element, like: wide(float16_to_float32(element))
    if element == types.int16:
        return lambda element, like: wide(bfloat16_to_float32(element))
    return lambda element, like: wide(element)


def encode(value, like):
    """The stored form of a float32 or float64 value in the type of `like`: one rounding."""
    if like.dtype == np.float32 or like.dtype == np.float64:
        return like.dtype.type(value)
    narrow = float64_to_odd_float32(value) if isinstance(value, np.float64) else value
    return (float32_to_float16 if like.dtype == np.uint16 else float32_to_bfloat16)(narrow)


@overload(encode)
def _encode(value, like):
    if like == types.float32:
        return lambda value, like: np.float32(value)
    if like == types.float64:
        return lambda value, like: np.float64(value)
    if like == types.uint16:
        if value == types.float64:
            return lambda value, like: float32_to_float16(float64_to_odd_float32(value))
        return lambda value, like: float32_to_float16(value)
    if value == types.float64:
        return lambda value, like: float32_to_bfloat16(float64_to_odd_float32(value))
    return lambda value, like: float32_to_bfloat16(value)
