"""Launches of every kernel, their operands, and what a run of them must give."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np

from reference import bounds, by_row
from sgmv import emulator
from sgmv.emulator import Launch

HALVES = (np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16))
IDS = [5, 0, -1, 2, 5, 5, 0, -1, 3]
EXPERTS = 3


def as_experts(ids: Any) -> tuple[list[int], list[list[int]]]:
    """The tokens of these pairs, one each: an id is that of (adapter, expert)."""
    pairs = [(-1, -1) if i == -1 else divmod(i, EXPERTS) for i in np.asarray(ids).tolist()]
    return [adapter for adapter, _ in pairs], [[expert] for _, expert in pairs]


SHRINKS: dict[str, Callable[..., Launch]] = {
    "punica_sgmv_shrink": emulator.punica_sgmv_shrink,
    "punica_bgmv_shrink": emulator.punica_bgmv_shrink,
    "vllm_v1_shrink": lambda *args, **more: emulator.vllm_v1_shrink(*args, 64, **more),
    "sglang_csgmv_shrink": emulator.sglang_csgmv_shrink,
    "vllm_moe_shrink": lambda ids, h_in, r: emulator.vllm_moe_shrink(
        *as_experts(ids), h_in, r, EXPERTS, 64
    ),
}
EXPANDS: dict[str, Callable[..., Launch]] = {
    "punica_cutlass_expand": emulator.punica_cutlass_expand,
    "punica_bgmv_expand": emulator.punica_bgmv_expand,
    "vllm_v1_expand": lambda *args, **more: emulator.vllm_v1_expand(*args, 64, **more),
    "sglang_csgmv_expand": emulator.sglang_csgmv_expand,
    "vllm_moe_expand": lambda ids, r, h_out: emulator.vllm_moe_expand(
        *as_experts(ids), r, h_out, EXPERTS, 64
    ),
}
KERNELS = {**SHRINKS, **EXPANDS}


def made(name: str, ids: Any, wide: int, r: int) -> Launch:
    """A launch of this kernel, whichever its direction."""
    return SHRINKS[name](ids, wide, r) if name in SHRINKS else EXPANDS[name](ids, r, wide)


def operands(
    rng: np.random.Generator, launch: Launch, dtype: np.dtype[Any] = HALVES[0]
) -> tuple[Any, dict[int, Any]]:
    x = rng.standard_normal((launch.segments.n, launch.x_width)).astype(dtype)
    size = 1 / math.sqrt(launch.k)
    weights = {
        work.adapter_id: (size * rng.standard_normal((launch.width, launch.k))).astype(dtype)
        for work in launch.work
    }
    return x, weights


def ids_of(lengths: list[int]) -> list[int]:
    return [i for i, length in enumerate(lengths) for _ in range(length)]


def product(
    x: Any, weights: dict[int, Any], ids: Any, y: Any, scaling: float, out: np.dtype[Any]
) -> tuple[Any, Any]:
    """`y + scaling * x @ weights.T` per row and its bound: a LoRA delta whose B is the identity."""
    one = np.eye(y.shape[1], dtype=np.float32)
    adapters = {i: (w, one) for i, w in weights.items()}
    scalings = dict.fromkeys(adapters, scaling)
    expected = by_row.add_lora(y, x, adapters, ids, scalings)
    inputs = (y, x, adapters, ids, scalings)
    return expected, bounds.add_lora_bound(*inputs, out=out, expected=expected)
