"""An Adapter: the very arrays that it was given."""

from __future__ import annotations

import numpy as np

import sgmv


def test_an_adapter_holds_the_very_arrays() -> None:
    A, B = np.ones((2, 6), np.float16), np.ones((5, 2), np.float32)
    made = sgmv.Adapter(A, B, np.float32(2))
    assert made.A is A
    assert made.B is B
    assert (made.r, made.h_in, made.h_out, made.dtype, made.scaling) == (2, 6, 5, np.float32, 2.0)
    assert repr(made) == "Adapter(r=2, h_in=6, h_out=5, float32, scaling=2.0)"
