"""Rows with several adapters: both references agree, and the bound holds and is of use."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from reference import bounds, by_einsum, by_row, mixtures
from reference.bounds import unit_roundoff
from reference.workloads import Workload

pytestmark = pytest.mark.once

TYPES = [np.float32, np.float16, ml_dtypes.bfloat16, np.float64]


def in_turn(case: Workload, order: int) -> np.ndarray:
    """The mixture as a plain numpy user adds it up, y rounded after each place of the ids."""
    y = case.y.copy()
    wide = np.promote_types(case.y.dtype, np.float32)
    places = list(range(case.adapter_ids.shape[1]))[::order]
    for i, j in ((i, j) for j in places for i in range(len(y))):
        pair = case.adapters.get(int(case.adapter_ids[i, j]))
        if pair is not None:
            A, B = (matrix.astype(wide) for matrix in pair)
            scaling = wide.type(case.scalings[int(case.adapter_ids[i, j])])
            weight = wide.type(np.asarray(case.weights)[i, j])
            delta = weight * (scaling * (B @ (A @ case.x[i].astype(wide))))
            y[i] = (y[i].astype(wide) + delta).astype(y.dtype)
    return y


@pytest.mark.parametrize("dtype", TYPES)
def test_two_forms_agree(dtype: type) -> None:
    for case in mixtures.corpus(dtype):
        inputs = case.y, case.x, case.adapters, case.adapter_ids, case.scalings
        again = by_einsum.add_lora(*inputs, weights=case.weights)
        np.testing.assert_allclose(again, case.expected, rtol=1e-10, atol=1e-10, err_msg=case.name)
        applied = case.x, case.W, case.adapters, case.adapter_ids, case.scalings
        np.testing.assert_allclose(
            by_einsum.apply_batched(*applied, weights=case.weights),
            by_row.apply_batched(*applied, weights=case.weights),
            rtol=1e-10, atol=1e-10,
        )  # fmt: skip


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("dtype", TYPES)
def test_numpy_keeps_within_the_bound(dtype: type, order: int) -> None:
    """In either order of a row's adapters."""
    for case in mixtures.corpus(dtype):
        case.check(in_turn(case, order))


@pytest.mark.parametrize("dtype", TYPES)
def test_the_bound_is_no_wider_than_its_roundings(dtype: type) -> None:
    """For each place h_in + 2 r and some of the sums' type, and one of y's.

    Twice for float64, in which the reference errs as much.
    """
    for case in mixtures.corpus(dtype):
        if case.exact or not np.isfinite(case.expected).all():
            continue
        inputs = [case.y, case.x, case.adapters, case.adapter_ids, case.scalings]
        positive = [np.abs(case.y.astype(float)), np.abs(case.x.astype(float))]
        adapters = {
            i: pair and tuple(np.abs(each.astype(float)) for each in pair)
            for i, pair in case.adapters.items()
        }
        sizes = by_row.add_lora(
            *positive, adapters, case.adapter_ids, case.scalings,
            weights=np.abs(np.asarray(case.weights)),
        )  # fmt: skip
        k = case.adapter_ids.shape[1]
        wide = np.promote_types(case.y.dtype, np.float32)
        stores = k * unit_roundoff(dtype) if wide != case.y.dtype else 0.0
        twice = 2 if wide == np.float64 else 1
        share = twice * k * (70 + 2 * 33 + 10) * unit_roundoff(wide) + stores
        assert (bounds.add_lora_bound(*inputs, weights=case.weights) <= 1.1 * share * sizes).all()


def test_ones_are_no_weights() -> None:
    (case, *_) = mixtures.corpus()
    inputs = case.y, case.x, case.adapters, case.adapter_ids, case.scalings
    ones = np.ones(case.adapter_ids.shape)
    np.testing.assert_array_equal(by_row.add_lora(*inputs, weights=ones), by_row.add_lora(*inputs))


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([[1.0]], r"weights: expected shape \(1, 2\), got \(1, 1\)"),
        ([[1.0, np.nan]], r"weights: expected finite numbers"),
        ([["a", "b"]], r"weights: expected real numbers"),
    ],
)
def test_bad_weights_are_refused(weights: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        by_row.add_lora([[1.0]], [[1.0]], {}, [[-1, -1]], weights=weights)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"expected shape \(1,\) or \(1, k\)"):
        by_row.add_lora([[1.0]], [[1.0]], {}, np.zeros((1, 0), int))
