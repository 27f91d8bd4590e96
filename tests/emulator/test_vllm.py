"""vLLM V1's kernels: their grids, their slots, their atomics."""

from __future__ import annotations

import numpy as np
import pytest

from reference import compare
from reference.workloads import popularity
from sgmv import emulator
from tests.help.emulated import operands, product

pytestmark = pytest.mark.once


def test_48_of_vllms_64_splits_multiply_only_zeros() -> None:
    launch = emulator.vllm_v1_shrink([0], 4096, 16, max_loras=1)
    assert launch.split_k == 64
    assert launch.figures()["useful_lanes"] * 4 * 32 == launch.lanes  # 16 of 64, 1 row of 32


def test_vllm_launches_for_all_slots_or_for_those_in_use() -> None:
    ids = [0, 3, 3, -1]
    assert emulator.vllm_v1_shrink(ids, 512, 16, 8).grid[2] == 9
    assert emulator.vllm_v1_shrink(ids, 512, 16, 8, specialize_active_lora=True).grid[2] == 3
    assert emulator.vllm_v1_shrink([-1, -1], 512, 16, 8).blocks == 0
    assert emulator.vllm_v1_expand([-1, -1], 16, 512, 8).blocks == 0


def test_slots_in_another_order_than_the_ids(rng: np.random.Generator) -> None:
    slots = {7: 1, 9: 0, 100: 2}
    launch = emulator.vllm_v1_shrink([7, 9, 7, 100, -1], 256, 16, 4, slots=slots)
    x, A = operands(rng, launch)
    nothing = np.zeros((5, 16), np.float32)
    out = launch.run(x, A).out
    compare.check(out, *product(x, A, [7, 9, 7, 100, -1], nothing, 1.0, out.dtype))


def test_batch_invariant_vllm_has_no_spread(rng: np.random.Generator) -> None:
    launch = emulator.vllm_v1_shrink(popularity("uniform", 25), 3072, 16, 8, batch_invariant=True)
    assert (launch.spread(*operands(rng, launch), seeds=range(3)) == 0).all()
    assert launch.figures()["deterministic"]
