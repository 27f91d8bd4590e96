"""moe_layer: within its derived bound of float64, row by row, and planted faults are seen."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import sgmv
from reference import experts as reference
from sgmv import experts
from sgmv.errors import ShapeError, ValueRangeError
from sgmv.experts import adapters, grouped
from sgmv.experts import layer as layers
from tests.help.acceptance import assert_same_bits
from tests.help.experts import Layer, layer

TYPES = [np.float32, np.float16, ml_dtypes.bfloat16, np.float64]


def share(its: Layer) -> float:
    """The largest error, as a share of what is allowed."""
    expected, bound = reference.moe_layer(*its)
    return float((np.abs(its.run() - expected) / np.maximum(bound, 1e-300)).max())


@pytest.mark.parametrize("dtype", TYPES)
def test_within_the_bound(dtype: Any) -> None:
    for seed in range(8):
        rng = np.random.default_rng(seed)
        sizes = int(rng.integers(1, 9)), int(rng.integers(1, 4))
        assert share(layer(rng, dtype, *sizes)) <= 1


@pytest.mark.parametrize("dtype", TYPES)
def test_a_row_has_its_bits_in_any_company(dtype: Any, rng: np.random.Generator) -> None:
    its = layer(rng, dtype, n=40, hidden=300)
    sgmv.set_num_threads(1)
    expected = its.run()
    for threads in (2, 5):
        sgmv.set_num_threads(threads)
        order = rng.integers(0, 40, 60)
        assert_same_bits(its.run(order), expected[order], "in other company")
        for i in (0, 17, 39):
            assert_same_bits(its.run(slice(i, i + 1)), expected[i : i + 1], "alone")


def test_without_adapters(rng: np.random.Generator) -> None:
    its = layer(rng, np.float32)
    routing = its.expert_ids, its.weights
    alone = its._replace(adapter_ids=np.full(7, -1))
    assert_same_bits(experts.moe_layer(its.x, routing, its.W13, its.W2), alone.run(), "base only")


def bare(its: Layer, W13: np.ndarray, W2: np.ndarray) -> np.ndarray:
    return experts.moe_layer(its.x, (its.expert_ids, its.weights), W13, W2)


def _squared(plain: Callable[..., Any]) -> Callable[..., Any]:
    return lambda out, pairs, weights: plain(out, pairs, np.square(weights))


def _first_place_twice(plain: Callable[..., Any]) -> Callable[..., Any]:
    return lambda out, *rest: plain(np.repeat(out[:, :1], out.shape[1], 1), *rest)


def _off_by_one(plain: Callable[..., Any]) -> Callable[..., Any]:
    def _pair_ids(self: Any, expert_ids: Any, adapter_ids: Any) -> Any:
        return plain(self, np.where(expert_ids > 0, expert_ids - 1, expert_ids), adapter_ids)

    return _pair_ids


def _of_the_next_row(plain: Callable[..., Any]) -> Callable[..., Any]:
    return lambda self, expert_ids, adapter_ids: plain(self, expert_ids, np.roll(adapter_ids, 1))


FAULTS = {
    "a weight is squared": (layers, "combined", _squared),
    "a place is lost": (layers, "combined", _first_place_twice),
    "the expert before": (adapters.ExpertStack, "_pair_ids", _off_by_one),
    "another row's adapter": (adapters.ExpertStack, "_pair_ids", _of_the_next_row),
    "products in sorted order": (
        grouped,
        "products",
        lambda plain: lambda x, W, batch, dtype: plain(x, W, batch, dtype)[batch.pairs],
    ),
    "no deltas": (layers, "add_lora", lambda plain: lambda y, *rest: y),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_seen(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    where, name, planted = FAULTS[fault]
    its = layer(np.random.default_rng(1), np.float32, n=9, k=3)
    assert share(its) <= 1
    monkeypatch.setattr(where, name, planted(getattr(where, name)))
    assert share(its) > 1


def test_top_k_is_softmax_renormalised(rng: np.random.Generator) -> None:
    logits = rng.standard_normal((50, 8)).astype(np.float32)
    ids, weights = experts.top_k(logits, 3)
    softmax = np.exp(logits.astype(float))
    chosen = np.take_along_axis(softmax, np.argsort(-softmax, axis=1)[:, :3], axis=1)
    np.testing.assert_allclose(weights, chosen / chosen.sum(1, keepdims=True), rtol=1e-5)
    np.testing.assert_array_equal(ids, np.argsort(-softmax, axis=1)[:, :3])
    same, _ = experts.top_k(np.zeros((1, 4), np.float32), 2)
    assert same.tolist() == [[0, 1]], "of equal logits the first"
    huge, weights = experts.top_k(np.array([[1e30, -np.inf, 0]], np.float32), 2)
    assert (huge.tolist(), weights.tolist()) == ([[0, 2]], [[1, 0]])


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda its: experts.top_k(its.x, 41), ValueRangeError, "k: "),
        (lambda its: experts.top_k(its.x * np.nan, 1), ValueRangeError, "router_logits: "),
        (lambda its: bare(its, its.W13[:, 1:], its.W2), ShapeError, "W13: .*even"),
        (lambda its: bare(its, its.W13, its.W2[:, :, 1:]), ShapeError, "x: .* as W2 has"),
        (
            lambda its: experts.moe_layer(
                its.x, (its.expert_ids, its.weights), its.W13, its.W2,
                stack2=experts.ExpertStack(5, 24, 40, slots=1, max_rank=1),
            ),
            ShapeError,
            "adapter_ids: ",
        ),
    ],
)  # fmt: skip
def test_bad_input_is_refused(
    call: Any, kind: type[Exception], message: str, rng: np.random.Generator
) -> None:
    with pytest.raises(kind, match=message):
        call(layer(rng, np.float32))
