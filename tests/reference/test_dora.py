"""Batches with DoRA: both references agree, the bound holds for float32 norms, and it is of use."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

import reference
from reference import by_einsum, by_row, compare, dora
from reference.arguments import Adapter
from reference.floats import float_type
from reference.gains import Gain
from reference.workloads import Workload

pytestmark = pytest.mark.once

TYPES = [np.float32, np.float16, ml_dtypes.bfloat16, np.float64]


def plainly(case: Workload, how: str = "") -> np.ndarray:
    """As a numpy user writes it, norms too in the type of the sums; or wrong in one way."""
    assert case.dora is not None
    wide = np.promote_types(case.y.dtype, np.float32)
    W = case.dora.W.astype(wide)
    bias = 0 if case.dora.bias is None else case.dora.bias.astype(wide)
    y = case.y.copy()
    for i, ids in enumerate(case.adapter_ids.reshape(len(y), -1).tolist()):
        for adapter_id in ids:
            pair = case.adapters.get(adapter_id)
            if pair is None:
                continue
            A, B = (matrix.astype(wide) for matrix in pair)
            s, m = wide.type(case.scalings[adapter_id]), case.dora.magnitudes.get(adapter_id)
            total = y[i].astype(wide) + s * (B @ (A @ case.x[i].astype(wide)))
            if m is not None:
                in_norm = {"scaling squared": s * s, "norms of W alone": wide.type(0)}.get(how, s)
                with np.errstate(divide="ignore", invalid="ignore"):
                    g = m.astype(wide) / np.linalg.norm(W + in_norm * B @ A, axis=1)
                    if how == "another row's gain":
                        g = np.roll(g, 1)
                    total = g * total
                    if case.dora.bias is not None and how != "bias scaled":
                        total += (1 - g) * bias
            elif how == "plain rows gained":
                total = 2 * total
            y[i] = total.astype(y.dtype)
    return y


def given(case: Workload) -> tuple[tuple[Any, ...], dict[str, Any]]:
    adapters, ids, scalings = case._pairs
    return (case.y, case.x, adapters, ids, scalings), case._more


@pytest.mark.parametrize("dtype", TYPES)
def test_two_forms_agree(dtype: type) -> None:
    for case in dora.corpus(dtype):
        inputs, more = given(case)
        again = by_einsum.add_lora(*inputs, **more)
        np.testing.assert_allclose(again, case.expected, rtol=1e-10, atol=1e-10, err_msg=case.name)
        applied = case.x, case.W, *inputs[2:]
        np.testing.assert_allclose(
            by_einsum.apply_batched(*applied), by_row.apply_batched(*applied), 1e-10, 1e-10
        )


@pytest.mark.parametrize("dtype", TYPES)
def test_numpy_keeps_within_the_bound(dtype: type) -> None:
    for case in dora.corpus(dtype):
        if case.name.startswith("beside mixtures"):  # y is rounded after each
            continue
        if case.exact and case.y.dtype.itemsize == 2:
            continue
        assert case.wrong(plainly(case)) is None, case.name


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_bound_of_a_gain_is_near_its_roundings(dtype: type) -> None:
    """Where W is not taken away by B @ A: h_in + r and some, of the sums' type."""
    rng = np.random.default_rng(0)
    A, B = rng.uniform(0.5, 1, (4, 50)).astype(dtype), rng.uniform(0.5, 1, (30, 4)).astype(dtype)
    W, m = rng.uniform(0.5, 1, (30, 50)).astype(dtype), np.ones(30, dtype)
    gain = Gain(Adapter(A, B, 1.0, m), W, None)
    kind = float_type(dtype)
    assert (gain.error(kind) <= (50 + 2 * 4 + 12) * kind.unit_roundoff * gain.value).all()
    cancelled = Gain(Adapter(A, B, -1.0, m), (B.astype(float) @ A).astype(dtype), None)
    assert not np.isfinite(cancelled.error(kind)).all(), "nothing is promised"


@pytest.mark.parametrize(
    "how",
    ["scaling squared", "norms of W alone", "another row's gain", "bias scaled",
     "plain rows gained"],
)  # fmt: skip
def test_the_corpus_tells_wrong_gains(how: str) -> None:
    cases = [case for case in dora.corpus() if not case.name.startswith("beside mixtures")]
    caught = [case for case in cases if case.wrong(plainly(case, how))]
    assert caught


def test_it_is_the_adapter_that_its_magnitude_makes() -> None:
    """The row's output is that of a weight with rows of these lengths."""
    rng = np.random.default_rng(0)
    x, W, A, B = (rng.standard_normal(shape) for shape in ((3, 9), (5, 9), (2, 9), (5, 2)))
    m = rng.random(5)
    whole = W + 0.5 * B @ A
    whole *= (m / np.linalg.norm(whole, axis=1))[:, np.newaxis]
    found = reference.apply_single(x, W, A, B, 0.5, m)
    np.testing.assert_allclose(found, x @ whole.T, rtol=1e-12)
    bias, y = rng.standard_normal(5), x @ W.T
    biased = reference.add_lora(y + bias, x, [Adapter(A, B, 0.5, m)], [0, 0, 0], W=W, bias=bias)
    np.testing.assert_allclose(biased, x @ whole.T + bias, rtol=1e-12)
    np.testing.assert_allclose(
        by_einsum.apply_single(x, W, A, B, 0.5, m), found, rtol=1e-12
    )  # fmt: skip
    compare.check(found, found, np.zeros(found.shape))


def test_refusals() -> None:
    one = Adapter(np.ones((1, 3)), np.ones((2, 1)), 1.0, np.ones(2))
    y, x, W = np.ones((1, 2)), np.ones((1, 3)), np.ones((2, 3))
    for wrong, message in (
        ({"adapter_ids": [0]}, "W: expected the base weight"),
        ({"adapter_ids": [0], "W": W.T}, "W: expected shape"),
        ({"adapter_ids": [0], "W": W, "bias": np.ones(3)}, "bias: expected shape"),
        ({"adapter_ids": [[0, 0]], "W": W}, "alone in its rows"),
        ({"adapter_ids": [[0, -1]], "W": W, "weights": [[2, 1]]}, "alone in its rows"),
    ):
        with pytest.raises(ValueError, match=message):
            reference.add_lora(y, x, [one], **wrong)
    with pytest.raises(ValueError, match="magnitude of adapter 0: expected shape"):
        reference.add_lora(y, x, [one._replace(magnitude=np.ones(3))], [0], W=W)
