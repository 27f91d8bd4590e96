"""vLLM's calls: shapes, types and metadata, and each call against plain loops of its contract."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np

from sgmv import layouts
from sgmv.compat import vllm
from tests.conftest import JITTED
from tests.help.compat_forms import BFLOAT16, DTYPES, check, drawn, indices, product

LORAS = 5
# r, h_in, h_out: every rank class, and widths that no tile, panel or vector divides.
SHAPES = [(1, 33, 65), (8, 100, 129), (16, 515, 64), (17, 64, 131), (64, 70, 200), (256, 130, 77)]
MIXES = [  # x, weights, y
    *((dtype, dtype, dtype) for dtype in DTYPES),
    (DTYPES[0], BFLOAT16, BFLOAT16),
    (BFLOAT16, BFLOAT16, DTYPES[0]),
    (DTYPES[1], DTYPES[0], DTYPES[3]),
]
if not JITTED:
    SHAPES = [(1, 9, 17), (5, 12, 9)]


def named(mix: Any) -> str:
    return "-".join(dtype.name for dtype in mix)


def runs(ids: np.ndarray) -> tuple[Any, ...]:
    """What the sgmv calls take for these indices."""
    v0 = layouts.vllm_v0(ids)
    arrays = v0.b_seq_start_loc, v0.seq_len_tensor, v0.lora_indices_tensor
    return (*arrays, v0.batches, v0.max_seq_length, v0.token_nums)


def check_shrink(vllm: ModuleType, rng: np.random.Generator, shape: Any, mix: Any) -> None:
    r, h_in, _ = shape
    ids = indices(rng, 40, LORAS)
    x, A = drawn(rng, (40, h_in), mix[0]), drawn(rng, (LORAS, r, h_in), mix[1])
    right = product(np.zeros((40, r), mix[2]), x, A, ids, 0.5)
    for call, metadata in ((vllm.bgmv_shrink, (ids,)), (vllm.sgmv_shrink, runs(ids))):
        for weights in (A, A[:, None]):
            out = np.full((40, r + 3), np.nan, np.float32).astype(mix[2])
            call(x, weights, out, *metadata, 0.5)
            check(out[:, :r], right, call.__name__)
            assert np.isnan(out[:, r:].astype(np.float32)).all()


def check_expand(vllm: ModuleType, rng: np.random.Generator, shape: Any, mix: Any) -> None:
    r, _, h_out = shape
    ids = indices(rng, 40, LORAS)
    v, B = drawn(rng, (40, r), mix[0]), drawn(rng, (LORAS, h_out, r), mix[1])
    y = drawn(rng, (40, h_out + 6), mix[2])
    base = ids == -1
    for add_inputs in (True, False):
        start = y[:, 2:-4] if add_inputs else np.zeros((40, h_out), mix[2])
        right = product(start, v, B, ids)
        for weights in (B, B[:, None]):
            sliced, out = y.copy(), y[:, 2:-4].copy()
            vllm.bgmv_expand_slice(v, weights, sliced, ids, 2, h_out, add_inputs)
            vllm.bgmv_expand(v, weights, out, ids, add_inputs)
            again, repeated = y.copy(), y[:, 2:-4].copy()
            vllm.sgmv_expand_slice(v, weights, again, *runs(ids), 2, h_out, add_inputs)
            vllm.sgmv_expand(v, weights, repeated, *runs(ids), add_inputs)
            check(out, right, "bgmv_expand", ~base)
            for other in (sliced[:, 2:-4], repeated, again[:, 2:-4]):
                assert other.tobytes() == out.tobytes()
            untouched = np.r_[0, 1, h_out + 2 : h_out + 6]
            assert sliced[:, untouched].tobytes() == y[:, untouched].tobytes()
            assert out[base].tobytes() == y[base, 2:-4].tobytes()


def wrapper_of(ids: list[int], sampled: list[int] | None = None) -> vllm.PunicaWrapper:
    """The wrapper of a step whose rows have these indices; the ids in the slots are others."""
    slots = [40 + index for index in range(LORAS)]
    tokens, samples = ([0 if i < 0 else slots[i] for i in each] for each in (ids, sampled or ids))
    wrapper = vllm.PunicaWrapper(max_num_batched_tokens=256, max_batches=64, device="cpu")
    wrapper.update_metadata(vllm.LoRAMapping(tokens, samples, True), slots, LORAS, 32000, 256)
    return wrapper
