"""grouped_matmul: every pair's own product, exact, the same bits in any company."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

import sgmv
from reference import bounds, by_row
from sgmv import experts
from sgmv.errors import DtypeError, ShapeError, UnknownAdapterError, ValueRangeError
from tests.help.acceptance import assert_same_bits

TYPES = [np.float32, np.float16, ml_dtypes.bfloat16, np.float64]


@pytest.mark.parametrize("dtype", TYPES)
def test_products_are_exact(dtype: Any, rng: np.random.Generator) -> None:
    """Integers that every type holds, to the bit; of rows, and of pairs with rows of their own."""
    W = rng.integers(-1, 2, (6, 30, 50)).astype(dtype)
    x = (rng.random((9, 50)) < 0.1).astype(dtype)
    ids = rng.integers(-1, 6, (9, 3))
    own = (rng.random((9, 3, 50)) < 0.1).astype(dtype)
    zero = np.zeros((1, 30, 50))
    matrices = np.concatenate([W.astype(float), zero])[ids]  # the id -1 is the last
    for threads in (1, 3):
        sgmv.set_num_threads(threads)
        shared = np.einsum("nh,nkoh->nko", x.astype(float), matrices)
        np.testing.assert_array_equal(experts.grouped_matmul(x, W, ids).astype(float), shared)
        apart = np.einsum("nkh,nkoh->nko", own.astype(float), matrices)
        np.testing.assert_array_equal(experts.grouped_matmul(own, W, ids).astype(float), apart)
        one = experts.grouped_matmul(x, W, np.ascontiguousarray(ids[:, 0]))
        np.testing.assert_array_equal(one.astype(float), shared[:, 0])
        assert one.dtype == dtype
        weights = rng.integers(-2, 3, (9, 3))
        total = experts.grouped_matmul(x, W, sgmv.segment(ids), weights=weights)
        np.testing.assert_array_equal(total.astype(float), (shared * weights[..., None]).sum(1))


@pytest.mark.parametrize("dtype", TYPES)
def test_products_are_within_the_bound(dtype: Any, rng: np.random.Generator) -> None:
    W = rng.standard_normal((4, 33, 1500)).astype(dtype)
    x = rng.standard_normal((20, 1500)).astype(dtype)
    ids = rng.integers(0, 4, 20)
    result = experts.grouped_matmul(x, W, ids)
    for i, e in enumerate(ids.tolist()):
        row = x[i : i + 1]
        expected = by_row.apply_batched(row, W[e], {}, [-1])
        bound = bounds.apply_batched_bound(row, W[e], {}, [-1], out=dtype, expected=expected)
        assert (np.abs(result[i] - expected) <= bound).all()


@pytest.mark.parametrize("dtype", TYPES)
def test_a_row_has_its_bits_in_any_company(dtype: Any, rng: np.random.Generator) -> None:
    W, x = rng.standard_normal((5, 70, 300)), rng.standard_normal((60, 300))
    W, x = W.astype(dtype), x.astype(dtype)
    ids, weights = rng.integers(-1, 5, (60, 2)), rng.random((60, 2), np.float32)
    sgmv.set_num_threads(1)
    expected = experts.grouped_matmul(x, W, ids, weights=weights)
    for threads in (2, 5):
        sgmv.set_num_threads(threads)
        order = rng.integers(0, 60, 90)
        again = experts.grouped_matmul(x[order], W, ids[order], weights=weights[order])
        assert_same_bits(again, expected[order], "in other company")
        for i in (0, 31, 59):
            one = slice(i, i + 1)
            alone = experts.grouped_matmul(x[one], W, ids[one], weights=weights[one])
            assert_same_bits(alone, expected[one], "alone")


def test_tensors_are_read_in_place(rng: np.random.Generator) -> None:
    torch = pytest.importorskip("torch")
    W = torch.randn(3, 8, 16, dtype=torch.bfloat16)
    x = rng.standard_normal((4, 16)).astype(ml_dtypes.bfloat16)
    result = experts.grouped_matmul(x, W, [0, 2, -1, 1])
    again = experts.grouped_matmul(x, W.view(torch.int16).numpy().view(x.dtype), [0, 2, -1, 1])
    assert_same_bits(result, again, "of torch")


def test_no_rows() -> None:
    W = np.ones((2, 3, 4), np.float32)
    assert experts.grouped_matmul(np.ones((0, 4), np.float32), W, []).shape == (0, 3)


X, W = np.ones((4, 6), np.float32), np.ones((3, 5, 6), np.float32)


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda: experts.grouped_matmul(X, W, [0, 1, 2, 3]), UnknownAdapterError, r"W: .*3"),
        (
            lambda: experts.grouped_matmul(X[:, :5], W, [0] * 4),
            ShapeError,
            r"x: expected 6 columns",
        ),
        (lambda: experts.grouped_matmul(X, W, [0] * 3), ShapeError, r"x: expected shape \(3, h_in"),
        (lambda: experts.grouped_matmul(X, W[0], [0] * 4), ShapeError, r"W: "),
        (lambda: experts.grouped_matmul(X, W.astype(int), [0] * 4), DtypeError, r"W: "),
        (lambda: experts.grouped_matmul(X.tolist(), W, [0] * 4), DtypeError, r"x: "),  # type: ignore[arg-type]
        (
            lambda: experts.grouped_matmul(X, W, [[0, 1]] * 4, weights=[[np.inf, 1]] * 4),
            ValueRangeError,
            r"weights: expected finite",
        ),
    ],
)
def test_bad_input_is_refused(call: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        call()
