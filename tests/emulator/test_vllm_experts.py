"""vLLM's LoRA on experts: sorted and unsorted pairs, padding, runs against the definition."""

from __future__ import annotations

import numpy as np
import pytest

from reference.compare import check
from sgmv import emulator
from sgmv.errors import ShapeError, UnknownAdapterError
from tests.help.emulated import HALVES, operands, product


def test_each_expert_of_each_adapter_is_padded() -> None:
    """Six pairs of five (adapter, expert): five blocks of 16 rows."""
    launch = emulator.vllm_moe_shrink([0, 0, 1], [[2, 5], [2, 7], [2, 5]], 256, 16, 8, 2)
    figures = launch.figures()
    assert figures["adapter_ids"] == [2, 5, 7, 8 + 2, 8 + 5]
    assert figures["rows_per_segment"] == [2, 1, 1, 1, 1]
    assert figures["row_slots_per_segment"] == [16] * 5
    assert launch.grid == (6, 1, 3)  # fewer pairs than experts: a block each, for each adapter
    assert launch.early_exits == 6 * 3 - 5


def test_few_pairs_of_many_are_not_sorted() -> None:
    launch = emulator.vllm_moe_shrink([3, -1], [[2, 5], [2, 7]], 256, 16, 128, 16)
    assert launch.grid == (4, 1, 1)
    assert (launch.early_exits, launch.figures()["row_slots"]) == (2, 32)
    assert not launch.is_sorted


def test_blocks_grow_with_the_tokens() -> None:
    for tokens, rows in ((32, 16), (33, 32), (97, 64), (513, 128)):
        ids = np.zeros(tokens, int)
        launch = emulator.vllm_moe_expand(ids, np.zeros((tokens, 1), int), 16, 64, 4, 1)
        assert launch.block_rows == rows
        assert launch.figures()["row_slots"] == -(-tokens // rows) * rows


@pytest.mark.parametrize("order", ["in order", "reversed", "random"])
@pytest.mark.parametrize("experts", [4, 300])
def test_a_run_is_the_definition(experts: int, order: str, rng: np.random.Generator) -> None:
    """With E = 4 pairs are sorted, with E = 300 they are not."""
    adapters = rng.integers(-1, 3, 21)
    ids = rng.integers(-1, 4, (21, 2))
    pairs = np.repeat(adapters, 2) * experts + ids.reshape(-1)
    pairs[(np.repeat(adapters, 2) < 0) | (ids.reshape(-1) < 0)] = -1
    launches = (
        emulator.vllm_moe_shrink(adapters, ids, 300, 24, experts, 3),
        emulator.vllm_moe_expand(adapters, ids, 24, 140, experts, 3),
    )
    for launch in launches:
        assert launch.is_sorted == (experts == 4)
        x, weights = operands(rng, launch)
        start = rng.standard_normal((42, launch.width)).astype(HALVES[0])
        y = start if launch.KERNEL.adds else np.zeros_like(start)
        got = launch.run(x, weights, y if launch.KERNEL.adds else None, order=order, seed=5).out
        expected, bound = product(x, weights, pairs, y, 1.0, HALVES[0])
        check(got, expected, 2 * bound + 2.0**-11 * np.abs(expected - y), launch.KERNEL.name)


def test_what_does_not_fit_is_refused() -> None:
    for error, batch, ids in (
        (ShapeError, [0, 1], [[0]]),
        (UnknownAdapterError, [0, 2], [[0], [1]]),
        (UnknownAdapterError, [0, 1], [[0], [4]]),
    ):
        with pytest.raises(error):
            emulator.vllm_moe_shrink(batch, ids, 64, 8, 4, 2)
