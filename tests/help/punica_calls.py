"""Punica's calls: a batch of segments, and each call against plain loops of its contract."""

from __future__ import annotations

import ctypes
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from tests.conftest import JITTED
from tests.help.compat_forms import check, delta, drawn, indices, product

posix = pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "writev"), reason="no writev")
LAYERS, COUNT = 2, 5
# inputs, outputs: shrink, expand, square; what no tile divides; ranks that Punica has no kernel for
SHAPES = [(100, 1), (515, 17), (1, 129), (64, 200), (70, 256), (256, 33), (16, 16)]
LENGTHS = [3, 0, 1, 17, 0, 9]  # of the segments
S = np.cumsum([0, *LENGTHS]).astype(np.int32)
N = int(S[-1])
SEGMENT_OF_ROW = np.repeat(np.arange(len(LENGTHS)), LENGTHS)
if not JITTED:
    SHAPES = [(20, 3), (3, 20)]


def addresses(weights: Any) -> np.ndarray:
    """Pointers to weights, null for the empty segments: nobody may look at those."""
    found = np.array([each.ctypes.data for each in weights])
    return np.where(np.array(LENGTHS) > 0, found, 0)


def check_bgmv(punica: ModuleType, rng: np.random.Generator, shape: Any, dtype: Any) -> None:
    inputs, outputs = shape
    ids = indices(rng, 40, COUNT)
    x, y = drawn(rng, (40, inputs), dtype), drawn(rng, (40, outputs), dtype)
    W, out = drawn(rng, (COUNT, LAYERS, outputs, inputs), dtype), y.copy()
    punica.bgmv(out, x, W, ids, 1, 0.5)
    check(out, product(y, x, W[:, 1], ids, 0.5), "bgmv")
    assert out[ids == -1].tobytes() == y[ids == -1].tobytes()


def check_add_lora_bgmv(
    punica: ModuleType, rng: np.random.Generator, r: int, dtype: Any, widths: Any = (90, 70)
) -> None:
    h_in, h_out = widths
    ids = indices(rng, 40, COUNT)
    x, y = drawn(rng, (40, h_in), dtype), drawn(rng, (40, h_out), dtype)
    A, B = drawn(rng, (COUNT, LAYERS, r, h_in), dtype), drawn(rng, (COUNT, LAYERS, h_out, r), dtype)
    out = y.copy()
    punica.add_lora_bgmv(out, x, A, B, ids, 1, 2.0)
    check(out, delta(y, x, A[:, 1], B[:, 1], ids, 2.0), "add_lora_bgmv")


def check_sgmv(punica: ModuleType, rng: np.random.Generator, shape: Any, dtype: Any) -> None:
    inputs, outputs = shape
    x, y = drawn(rng, (N, inputs), dtype), drawn(rng, (N, outputs), dtype)
    W = [drawn(rng, (LAYERS, outputs, inputs), dtype) for _ in LENGTHS]
    W_T = [np.ascontiguousarray(each.transpose(0, 2, 1)) for each in W]
    right = product(y, x, [each[1] for each in W], SEGMENT_OF_ROW)
    for call, weights in ((punica.sgmv, W), (punica.sgmv_cutlass, W_T)):
        out = y.copy()
        call(out, x, addresses(weights), S, 1)
        check(out, right, call.__name__)


LORA_CALLS = {  # and whether wa and wb stand as (inputs, outputs)
    "add_lora_sgmv": (False, False),
    "add_lora_sgmv_cutlass": (True, True),
    "add_lora_sgmv_custom_cutlass": (False, True),
}


def check_add_lora_sgmv(
    punica: ModuleType, rng: np.random.Generator, r: int, dtype: Any, widths: Any = (90, 70)
) -> None:
    h_in, h_out = widths
    x, y = drawn(rng, (N, h_in), dtype), drawn(rng, (N, h_out), dtype)
    A = [drawn(rng, (LAYERS, r, h_in), dtype) for _ in LENGTHS]
    B = [drawn(rng, (LAYERS, h_out, r), dtype) for _ in LENGTHS]
    pairs = [each[1] for each in A], [each[1] for each in B]
    right = delta(y, x, *pairs, SEGMENT_OF_ROW)
    for name, turned in LORA_CALLS.items():
        wa, wb = (
            [np.ascontiguousarray(w.transpose(0, 2, 1)) for w in weights] if turn else weights
            for weights, turn in zip((A, B), turned, strict=True)
        )
        out = y.copy()
        getattr(punica, name)(out, x, addresses(wa), addresses(wb), S, 1, r)
        check(out, right, name)
