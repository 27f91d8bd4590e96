"""LoRA on experts: each pair has the delta of its (expert, adapter), and no other."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

import reference
import sgmv
from reference import bounds
from sgmv import experts
from sgmv.errors import MemoryLayoutError, ShapeError, StackError, UnknownAdapterError
from sgmv.experts import ExpertAdapter, ExpertStack
from tests.help.acceptance import assert_same_bits
from tests.help.experts import layer, stack_of

TYPES = [np.float32, np.float16, ml_dtypes.bfloat16, np.float64]


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("dtype", TYPES)
def test_each_pair_has_its_own_delta(dtype: Any, apart: bool, rng: np.random.Generator) -> None:
    its = layer(rng, dtype, n=30)
    stack = stack_of(its.adapters13, its.W13)
    n, k = its.expert_ids.shape
    x = rng.standard_normal((n, k, 40)).astype(dtype) if apart else its.x
    before = rng.standard_normal((n, k, 48)).astype(dtype)
    y = experts.add_lora(before.copy(), x, stack, its.expert_ids, its.adapter_ids)
    for i, j in np.ndindex(n, k):
        e, found = its.expert_ids[i, j], its.adapters13.get(int(its.adapter_ids[i]))
        pair = None if found is None or e < 0 else (found.A[e], found.B[e])
        row = x[i, j, None] if apart else x[i, None]
        given = before[i, j, None], row, {0: pair}, [0], 1.0 if found is None else found.scaling
        expected = reference.add_lora(*given)
        bound = bounds.add_lora_bound(*given, expected=expected)
        assert (np.abs(y[i, j] - expected) <= bound).all()
        if pair is None:
            assert_same_bits(y[i, j], before[i, j], "base only")


def test_one_expert_per_row(rng: np.random.Generator) -> None:
    its = layer(rng, np.float32, k=1)
    stack, ids = stack_of(its.adapters13, its.W13), np.ascontiguousarray(its.expert_ids[:, 0])
    whole = experts.add_lora(
        np.zeros((7, 1, 48), np.float32), its.x, stack, its.expert_ids, its.adapter_ids
    )
    y = experts.add_lora(np.zeros((7, 48), np.float32), its.x, stack, ids, its.adapter_ids)
    assert_same_bits(y, whole[:, 0], "(n,) ids")


def test_a_factor_may_be_shared(rng: np.random.Generator) -> None:
    A, B = rng.standard_normal((3, 2, 8), np.float32), rng.standard_normal((16, 2), np.float32)
    shared, full = ExpertAdapter(A, B, 0.5), ExpertAdapter(A, np.stack([B] * 3), 0.5)
    assert shared.experts == full.experts == 3
    results = []
    for adapter in (shared, full):
        stack = ExpertStack(3, 8, 16, slots=1, max_rank=2)
        stack.load(1, adapter)
        y, x = np.zeros((4, 2, 16), np.float32), np.ones((4, 8), np.float32)
        results.append(experts.add_lora(y, x, stack, [[0, 1], [2, 0], [1, 1], [-1, 2]], [1] * 4))
    assert_same_bits(*results, "shared B")


def test_a_replaced_adapter_is_the_new_one_on_every_expert() -> None:
    stack = ExpertStack(2, 3, 4, slots=2, max_rank=2)
    ones = ExpertAdapter(np.ones((2, 1, 3)), np.ones((2, 4, 1)))
    x, ids = np.ones((2, 3), np.float32), [[0, 1], [1, 0]]

    def first(adapter_ids: list[int]) -> list[list[float]]:
        y = np.zeros((2, 2, 4), np.float32)
        return experts.add_lora(y, x, stack, ids, adapter_ids)[:, :, 0].tolist()

    stack.load(5, ones)
    stack.load(9, ExpertAdapter(np.ones((2, 1, 3)), np.ones((2, 4, 1)), 10.0))
    assert first([5, 9]) == [[3, 3], [30, 30]]
    stack.load(5, ExpertAdapter(np.ones((2, 1, 3)), np.ones((2, 4, 1)), 2.0))
    assert first([5, 9]) == [[6, 6], [30, 30]]
    stack.unload(5)
    assert stack.ids == [9]
    stack.load(7, ones)
    assert first([7, 9]) == [[3, 3], [30, 30]]
    with pytest.raises(UnknownAdapterError, match="adapter_ids"):
        first([5, 9])
    with pytest.raises(StackError, match="free slot"):
        stack.load(1, ones)
    assert stack.ids == [7, 9]
    assert first([7, 9]) == [[3, 3], [30, 30]]


STACK = ExpertStack(2, 3, 4, slots=2, max_rank=2)
STACK.load(5, ExpertAdapter(np.ones((2, 1, 3)), np.ones((2, 4, 1))))
X, Y, IDS = np.ones((2, 3), np.float32), np.zeros((2, 2, 4), np.float32), [[0, 1], [1, 0]]


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda: experts.add_lora(Y, X, STACK, [[0, 2], [1, 0]], [5, 5]), UnknownAdapterError,
         r"expert_ids: expected experts 0..1, got .*2"),
        (lambda: experts.add_lora(Y, X, STACK, IDS, [5, 6]), UnknownAdapterError, r"adapter_ids"),
        (lambda: experts.add_lora(Y, X, STACK, IDS, [5]), ShapeError, r"adapter_ids: .*\(2,\)"),
        (lambda: experts.add_lora(Y[:, :1], X, STACK, IDS, [5, 5]), ShapeError, r"y: "),
        (lambda: experts.add_lora(Y, X[:, :2], STACK, IDS, [5, 5]), ShapeError, r"x: "),
        (lambda: experts.add_lora(Y[..., :3], X, STACK, IDS, [5, 5]), ShapeError, r"y: "),
        (lambda: experts.add_lora(Y, Y[:, 0, :3], STACK, IDS, [5, 5]), MemoryLayoutError, r"y: "),
        (lambda: ExpertAdapter(np.ones((1, 3)), np.ones((4, 1))), ShapeError, r"A and B: "),
        (lambda: ExpertAdapter(np.ones((2, 1, 3)), np.ones((3, 4, 1))), ShapeError, r"A and B: "),
        (lambda: ExpertAdapter(np.ones(3), np.ones((3, 4, 1))), ShapeError, r"A: "),
        (lambda: STACK.load(6, ExpertAdapter(np.ones((3, 1, 3)), np.ones((3, 4, 1)))), ShapeError,
         r"adapter: expected 2 experts, got 3"),
        (lambda: STACK.unload(77), UnknownAdapterError, r"adapter_id: .*77"),
    ],
)  # fmt: skip
def test_bad_input_is_refused(call: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        call()
    assert not Y.any()
    assert STACK.ids == [5]


def test_it_is_a_plain_batch_of_pairs(rng: np.random.Generator) -> None:
    """To the bit: the (expert, adapter) of each pair as an adapter of its own."""
    its = layer(rng, np.float32, n=20)
    stack = stack_of(its.adapters13, its.W13)
    y = np.zeros((20, 2, 48), np.float32)
    experts.add_lora(y, its.x, stack, its.expert_ids, its.adapter_ids)
    pairs = {
        a * 5 + e: its_factors
        and sgmv.Adapter(its_factors.A[e], its_factors.B[e], its_factors.scaling)
        for a, its_factors in its.adapters13.items()
        for e in range(5)
    }
    ids = its.adapter_ids[:, None] * 5 + its.expert_ids
    ids[(its.expert_ids < 0) | (its.adapter_ids < 0)[:, None]] = -1
    plain = np.zeros((40, 48), np.float32)
    stacked = sgmv.AdapterStack.from_adapters(pairs)
    sgmv.add_lora(plain, np.repeat(its.x, 2, axis=0), stacked, ids.ravel())
    assert_same_bits(y.reshape(40, 48), plain, "as a plain batch")


@pytest.mark.parametrize("scalings", [(0.5, 0.5), (0.5, 2.0)])
def test_joined_is_both_side_by_side(scalings: tuple[float, float]) -> None:
    """Integers: to the bit. One of them shares its A with all experts."""
    rng = np.random.default_rng(1)

    def drawn(*shape: int) -> np.ndarray:
        return rng.integers(-3, 4, shape).astype("float32")

    first = ExpertAdapter(drawn(2, 8), drawn(3, 5, 2), scalings[0])
    second = ExpertAdapter(drawn(3, 1, 8), drawn(3, 4, 1), scalings[1])
    joined = ExpertAdapter.joined(first, second)
    x = drawn(6, 8)
    for e in range(3):
        expected = [one.scaling * (x @ one.A.T) @ one.B.T for one in (first.of(e), second.of(e))]
        its = joined.of(e)
        np.testing.assert_array_equal(
            its.scaling * (x @ its.A.T) @ its.B.T, np.concatenate(expected, axis=1)
        )
    with pytest.raises(ShapeError, match=r"second: expected \(experts, h_in\) = \(3, 8\)"):
        ExpertAdapter.joined(first, ExpertAdapter(drawn(2, 1, 8), drawn(2, 4, 1)))
