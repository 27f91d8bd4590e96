"""Bits do not depend on the floating-point mode of the caller's thread."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import numpy as np
import pytest

import sgmv
from sgmv.kernels.cpu import ARM64, X86
from sgmv.kernels.jit import jit
from sgmv.kernels.modes import DEFAULT, set_mode
from tests.conftest import JITTED
from tests.help.acceptance import backends

pytestmark = pytest.mark.once
jitted = pytest.mark.skipif(not JITTED, reason="nothing is compiled, and nothing runs in parallel")


FLUSH = {"subnormals are 0": 0x8040, "rounded down": 0x2000, "both, upwards": 0xC040}
# In FPCR they are higher; one bit flushes both ways, and in the place of the other is a trap.
FLUSH = {name: bits if X86 else (bits & ~0x40) << 9 for name, bits in FLUSH.items()}


@jit()
def exchange(mode: int) -> int:
    return set_mode(mode)  # type: ignore[no-any-return]


def without_flags(mode: int) -> int:
    """Of x86, whose mode also notes what has happened."""
    return mode & ~0x3F if X86 else mode


@contextlib.contextmanager
def in_mode(mode: int) -> Iterator[None]:
    """This thread in that mode; afterwards the mode is still the same."""
    before = exchange(mode)
    try:
        yield
    finally:
        after = exchange(before)
    assert without_flags(after) == mode


@jitted
@pytest.mark.skipif(not (X86 or ARM64), reason="modes of this processor are not known")
@pytest.mark.parametrize("dtype", ["float32", "float16", "float64"])
@pytest.mark.parametrize("backend", ["tiles", "loops"])
@pytest.mark.parametrize("mode", FLUSH)
def test_bits_do_not_depend_on_the_callers_mode(
    mode: str, backend: str, dtype: str, rng: np.random.Generator
) -> None:
    """512 equal rows of numbers near the smallest, on helpers that were there before the mode."""
    tiny = {"float32": 1e-39, "float16": 1e-6, "float64": 1e-309}[dtype]
    x = np.tile(tiny * rng.standard_normal((1, 300)), (512, 1)).astype(dtype)
    A, B = rng.standard_normal((8, 300)), 1e-2 * rng.standard_normal((100, 8))
    stack = sgmv.AdapterStack.from_adapters([(A.astype(dtype), B.astype(dtype))])
    if backend not in backends(*[np.dtype(dtype)] * 3):
        pytest.skip("this backend has no such type here")

    def call(threads: int) -> np.ndarray:
        sgmv.set_num_threads(threads)
        y = np.zeros((512, 100), dtype)
        return sgmv.add_lora(y, x, stack, [0] * 512, backend=backend)

    expected = call(2)
    with in_mode(DEFAULT | FLUSH[mode]):
        found = [call(1), call(2)]
    assert expected.view(f"u{expected.itemsize}").any()
    assert {row.tobytes() for y in (expected, *found) for row in y} == {expected[0].tobytes()}
