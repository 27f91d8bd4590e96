"""add_lora_embedding: the delta of a one-hot x, and what it refuses."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

import sgmv
from reference import bounds, by_row, compare
from sgmv.errors import MemoryLayoutError, ShapeError, UnknownAdapterError, ValueRangeError
from tests.help.acceptance import backends

VOCABULARY, WIDTH = 50, 37
IDS = [7, -1, 3, 7, 7, 9, 3, -1, 9]


def random_adapters(rng: np.random.Generator, dtype: object) -> dict[int, sgmv.Adapter | None]:
    def one(r: int, scaling: float) -> sgmv.Adapter:
        A = rng.standard_normal((r, VOCABULARY)).astype(dtype)
        return sgmv.Adapter(A, rng.standard_normal((WIDTH, r)).astype(dtype), scaling)

    return {3: one(1, -0.5), 7: one(5, 2.0), 9: None}


@pytest.mark.parametrize("y_dtype", ["float32", "float16", ml_dtypes.bfloat16, "float64"])
@pytest.mark.parametrize("dtype", ["float32", "float16", ml_dtypes.bfloat16, "float64"])
def test_it_is_add_lora_of_one_hot_rows(
    dtype: object, y_dtype: object, rng: np.random.Generator
) -> None:
    adapters = random_adapters(rng, dtype)
    stack = sgmv.AdapterStack.from_adapters(adapters)
    tokens = rng.integers(0, VOCABULARY, len(IDS))
    before = rng.standard_normal((len(IDS), WIDTH)).astype(y_dtype)
    x = np.zeros((len(IDS), VOCABULARY), "float32")
    x[np.arange(len(IDS)), tokens] = 1
    expected = by_row.add_lora(before.copy(), x, adapters, IDS)
    bound = bounds.add_lora_bound(before, x, adapters, IDS, expected=expected)
    for backend in (None, *backends(dtype, dtype, y_dtype)):
        y = before.copy()
        assert sgmv.add_lora_embedding(y, tokens, stack, IDS, backend=backend) is y
        compare.check(y, expected, bound)
        base = [i for i, adapter_id in enumerate(IDS) if adapter_id in (-1, 9)]
        assert y[base].tobytes() == before[base].tobytes()
        segments = sgmv.segment(IDS)
        again = sgmv.add_lora_embedding(before.copy(), tokens, stack, segments, backend=backend)
        assert again.tobytes() == y.tobytes()


def test_a_row_depends_on_itself_alone(rng: np.random.Generator) -> None:
    stack = sgmv.AdapterStack.from_adapters(random_adapters(rng, "float32"))
    tokens = rng.integers(0, VOCABULARY, len(IDS))
    y = sgmv.add_lora_embedding(np.zeros((len(IDS), WIDTH), "float32"), tokens, stack, IDS)
    for i, adapter_id in enumerate(IDS):
        alone = np.zeros((1, WIDTH), "float32")
        sgmv.add_lora_embedding(alone, tokens[i : i + 1], stack, [adapter_id])
        assert alone[0].tobytes() == y[i].tobytes()


def test_rows_without_an_adapter_may_have_any_token(rng: np.random.Generator) -> None:
    """A vocabulary that has grown for the base model alone."""
    stack = sgmv.AdapterStack.from_adapters(random_adapters(rng, "float32"))
    y = np.ones((3, WIDTH), "float32")
    sgmv.add_lora_embedding(y, [VOCABULARY + 8, -100, 4], stack, [-1, 9, 3])
    assert (y[:2] == 1).all()
    assert (y[2] != 1).any()


def test_no_rows(rng: np.random.Generator) -> None:
    stack = sgmv.AdapterStack.from_adapters(random_adapters(rng, "float32"))
    y = np.zeros((0, WIDTH), "float32")
    assert sgmv.add_lora_embedding(y, [], stack, []) is y


@pytest.mark.parametrize(
    ("tokens", "ids", "error", "words"),
    [
        ([0, VOCABULARY], [3, 3], ValueRangeError, "tokens from 0 to 49"),
        ([-1, 0], [3, 3], ValueRangeError, r"got \[-1\]"),
        ([0], [3, 3], ShapeError, r"tokens: expected shape \(n,\) = \(2,\)"),
        ([0.5, 1.0], [3, 3], ValueError, "tokens: expected integers"),
        ([0, 1], [3, 4], UnknownAdapterError, "4"),
    ],
)
def test_refusals_leave_y(
    tokens: list[float],
    ids: list[int],
    error: type[Exception],
    words: str,
    rng: np.random.Generator,
) -> None:
    stack = sgmv.AdapterStack.from_adapters(random_adapters(rng, "float32"))
    y = np.ones((2, WIDTH), "float32")
    with pytest.raises(error, match=words):
        sgmv.add_lora_embedding(y, tokens, stack, ids)
    assert (y == 1).all()


def test_tokens_that_are_y_are_refused(rng: np.random.Generator) -> None:
    stack = sgmv.AdapterStack.from_adapters(random_adapters(rng, "float64"))
    y = np.zeros((2, WIDTH))
    with pytest.raises(MemoryLayoutError, match="apart from tokens"):
        sgmv.add_lora_embedding(y, y.reshape(-1)[:2].view(np.int64), stack, [3, 3])


def test_a_row_may_have_several_adapters(rng: np.random.Generator) -> None:
    adapters = random_adapters(rng, "float32")
    stack = sgmv.AdapterStack.from_adapters(adapters)
    ids, weights = [[7, 3], [3, 3], [-1, 9], [7, -1]], rng.random((4, 2), np.float32)
    tokens = rng.integers(0, VOCABULARY, 4)
    before = rng.standard_normal((4, WIDTH), np.float32)
    x = np.zeros((4, VOCABULARY), np.float32)
    x[np.arange(4), tokens] = 1
    expected = by_row.add_lora(before, x, adapters, ids, weights=weights)
    bound = bounds.add_lora_bound(before, x, adapters, ids, weights=weights, expected=expected)
    y = sgmv.add_lora_embedding(before.copy(), tokens, stack, ids, weights=weights)
    compare.check(y, expected, bound)
