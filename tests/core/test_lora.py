"""add_lora, apply_batched, apply_single, lora_delta against the reference, on the whole corpus."""

from __future__ import annotations

import itertools

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import reference
import sgmv
from reference import bounds, compare
from reference.workloads import Workload, corpus, integer, real
from tests.conftest import MAX_ELEMENTS
from tests.help.acceptance import (
    assert_same_bits,
    backends_of,
    check,
    check_applied,
    check_case,
    check_reused_ids,
    stack_of,
    type_mixes,
)

pytestmark = pytest.mark.usefixtures("one_blas_thread")
DTYPES = {
    "float32": np.float32,
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
    "float64": np.float64,
}
CASES = list(corpus(MAX_ELEMENTS, DTYPES.values()))


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_corpus(case: Workload) -> None:
    check_case(case)


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_apply_batched_corpus(case: Workload) -> None:
    check_applied(case)


def test_reused_ids_serve_their_new_weights() -> None:
    check_reused_ids()


@pytest.mark.parametrize("build", [real, integer])
@pytest.mark.parametrize("types", type_mixes(DTYPES))
def test_every_mix_of_types(types: tuple[str, str, str], build: object) -> None:
    """x, weights and y each of any float type; sums in float32, or float64 if any of them is."""
    x, weights, y = (DTYPES[name] for name in types)
    case = build(
        f"x {types[0]}, weights {types[1]}, y {types[2]}",
        "a type read as another, or rounded twice",
        [0, 1, -1, 0, 2, 2, 2, 2, 2],
        {0: 3, 1: 17, 2: 8},
        40,
        37,
        dtype=x,
        weight_dtype=weights,
        y_dtype=y,
    )
    check_case(case)


def test_lora_delta_and_apply_single_equal_the_definition() -> None:
    case = integer("textbook", "the textbook form", [0] * 5, {0: 8}, 33, 20)
    A, B = case.adapters[0]
    delta = sgmv.lora_delta(case.x, A, B, 0.5)
    np.testing.assert_array_equal(delta, reference.lora_delta(case.x, A, B, 0.5))
    single = sgmv.apply_single(case.x, case.W, A, B, 0.5)
    np.testing.assert_array_equal(single, reference.apply_single(case.x, case.W, A, B, 0.5))
    assert delta.dtype == single.dtype == np.float32


@pytest.mark.parametrize(
    ("x", "weights", "W", "delta", "applied"),
    [
        ("float32", "float32", "float32", "float32", "float32"),
        ("float16", "float16", "float16", "float16", "float16"),
        ("bfloat16", "bfloat16", "bfloat16", "bfloat16", "bfloat16"),
        ("float16", "float32", "float16", "float32", "float32"),
        ("bfloat16", "float16", "bfloat16", "float32", "float32"),
        ("float32", "float64", "float32", "float64", "float64"),
        ("float16", "float16", "float64", "float16", "float64"),
    ],
)
def test_results_have_the_type_that_holds_all_inputs(
    x: str, weights: str, W: str, delta: str, applied: str
) -> None:
    A, B = np.ones((2, 3), DTYPES[weights]), np.ones((4, 2), DTYPES[weights])
    inputs, base = np.ones((5, 3), DTYPES[x]), np.ones((4, 3), DTYPES[W])
    assert sgmv.lora_delta(inputs, A, B, 1.0).dtype == DTYPES[delta]
    assert sgmv.apply_single(inputs, base, A, B, 1.0).dtype == DTYPES[applied]
    assert sgmv.apply_batched(inputs, base, {}, [-1] * 5).dtype == np.result_type(inputs, base)


def test_adapters_and_scalings_in_every_form() -> None:
    case = integer(
        "forms", "an argument's form changes the result", [1, 0, -1, 1], {0: 2, 1: 3}, 9, 7
    )
    pairs = [case.adapters[0], case.adapters[1]]
    scalings = [case.scalings[0], case.scalings[1]]
    own = [sgmv.Adapter(*pair, scaling) for pair, scaling in zip(pairs, scalings, strict=True)]
    forms = [
        (dict(enumerate(pairs)), dict(enumerate(scalings))),
        (pairs, scalings),
        (tuple(pairs), np.array(scalings)),
        (own, None),
        (dict(enumerate(own)), None),
        ([*own, None], None),
        (sgmv.AdapterStack.from_adapters(own), None),
        ([sgmv.Adapter(*pair, 99.0) for pair in pairs], scalings),
    ]
    for adapters, given_scalings in forms:
        case.check_applied(
            sgmv.apply_batched(case.x, case.W, adapters, case.adapter_ids, given_scalings)
        )
    segments = sgmv.segment(case.adapter_ids)
    case.check_applied(sgmv.apply_batched(case.x, case.W, own, segments))


def test_none_among_the_ids_means_base_only() -> None:
    A, B = np.ones((1, 2), np.float32), np.ones((3, 1), np.float32)
    y = sgmv.apply_batched(
        np.ones((3, 2), np.float32), np.zeros((3, 2), np.float32), [(A, B)], [None, 0, -1]
    )
    np.testing.assert_array_equal(y, [[0, 0, 0], [2, 2, 2], [0, 0, 0]])


def test_one_number_scales_all() -> None:
    A, B = np.ones((1, 2), np.float32), np.ones((1, 1), np.float32)
    x, W = np.ones((2, 2), np.float32), np.zeros((1, 2), np.float32)
    y = sgmv.apply_batched(x, W, [(A, B), (2 * A, B)], [0, 1], 0.5)
    np.testing.assert_array_equal(y, [[1], [2]])


def test_adapters_that_the_batch_does_not_name_are_not_read() -> None:
    x, W = np.ones((1, 2), np.float32), np.zeros((1, 2), np.float32)
    pair = np.ones((1, 2), np.float32), np.ones((1, 1), np.float32)
    y = sgmv.apply_batched(x, W, {0: pair, 1: "never opened"}, [0], {0: 1.0})
    np.testing.assert_array_equal(y, [[2]])


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("side", ["x", "y"])
def test_strided_rows(side: str, dtype: type) -> None:
    """Row slices, column slices, reversed rows, Fortran order, a transposed view."""
    case = integer(
        "strides", "contiguous memory assumed", [0, 1, -1, 0, 1], {0: 3, 1: 9}, 33, 21, dtype=dtype
    )
    stack = stack_of(case)
    array = getattr(case, side)
    for backend, view in itertools.product(backends_of(case), _layouts(array)):
        view[:] = array
        if side == "x":
            y = sgmv.add_lora(case.y.copy(), view, stack, case.adapter_ids, backend=backend)
        else:
            y = sgmv.add_lora(view, case.x, stack, case.adapter_ids, backend=backend)
            assert y is view
        check(case, np.ascontiguousarray(y), backend)


@pytest.mark.parametrize("n", [1, 5])
@pytest.mark.parametrize(("h_in", "h_out"), [(1, 1), (1, 4), (4, 1)])
def test_strides_of_axes_of_length_one_say_nothing(n: int, h_in: int, h_out: int) -> None:
    case = integer("ones", "a stride of one element", [0] * n, {0: 3}, h_in, h_out)
    stack = stack_of(case)
    for backend, x, y in itertools.product(backends_of(case), _layouts(case.x), _layouts(case.y)):
        x[:], y[:] = case.x, case.y
        sgmv.add_lora(y, x, stack, case.adapter_ids, backend=backend)
        check(case, y.copy(), backend)


def _layouts(array: np.ndarray) -> list[np.ndarray]:
    n, h = array.shape
    wide = np.full((3 * n, 2 * h + 5), np.nan, np.float32).astype(array.dtype)
    return [
        wide[::3, 2 : h + 2],
        wide[::-3, :h],
        wide[:n, : 2 * h : 2],
        wide[:n, h - 1 :: -1],
        np.empty((h, n), array.dtype).T,
    ]


@pytest.mark.parametrize("step", [1, 2], ids=["rows", "columns apart"])
def test_nothing_around_a_strided_y_is_written(step: int) -> None:
    case = integer("margins", "writes past a row", [0, 0, -1, 0, 0, 0], {0: 5}, 17, 30)
    wide = np.full((8, 70), 7, np.float32)
    inside = np.zeros(wide.shape, bool)
    inside[1:7, 4 : 4 + 30 * step : step] = True
    y = wide[1:7, 4 : 4 + 30 * step : step]
    for backend in backends_of(case):
        y[:] = case.y
        sgmv.add_lora(y, case.x, stack_of(case), case.adapter_ids, backend=backend)
        check(case, y.copy(), backend)
        assert (wide[~inside] == 7).all(), backend


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_error_is_at_most_twice_numpys(dtype: type, rng: np.random.Generator) -> None:
    """On a real layer's widths, against numpy's products of the same type; and no bias."""
    h = 4096 if MAX_ELEMENTS is None else 256
    ids = rng.integers(0, 3, 24)
    ranks = {0: 8, 1: 16, 2: 64}
    case = real("comparative", "a careless order of summation", ids, ranks, h, h, dtype=dtype)
    wide = np.float64 if dtype == np.float64 else np.float32
    plain = case.y.copy()
    for i, pair in case.adapters.items():
        A, B = (weights.astype(wide) for weights in pair)
        delta = wide(case.scalings[i]) * (case.x[ids == i].astype(wide) @ A.T @ B.T)
        plain[ids == i] = (plain[ids == i].astype(wide) + delta).astype(dtype)
    for backend in backends_of(case):
        y = sgmv.add_lora(case.y.copy(), case.x, stack_of(case), ids, backend=backend)
        compare.check_no_worse(y, plain, case.expected)
        errors = compare.error_statistics(y, case.expected, case.bound)
        # The mean of n errors without bias stays within a few rms / sqrt(n) of 0.
        assert abs(errors.mean_signed) < 8 * errors.root_mean_square / np.sqrt(y.size)


@settings(max_examples=60)
@given(data=st.data())
def test_any_shape(data: st.DataObject) -> None:
    h_in, h_out = data.draw(st.integers(1, 70)), data.draw(st.integers(1, 70))
    ranks = dict(enumerate(data.draw(st.lists(st.integers(0, 20), min_size=1, max_size=5))))
    ids = data.draw(st.lists(st.sampled_from([-1, *ranks]), max_size=20))
    check_case(integer("hypothesis", "a shape nobody thought of", ids, ranks, h_in, h_out))


@settings(max_examples=30)
@given(seed=st.integers(0, 2**32 - 1))
def test_row_permutation_split_and_merge(seed: int) -> None:
    """Permuting rows permutes the result; halves of a batch give the halves of its result."""
    rng = np.random.default_rng(seed)
    case = real(f"permuted {seed}", "", rng.integers(-1, 3, 11), {0: 5, 1: 0, 2: 12}, 19, 23)
    stack = stack_of(case)
    whole = sgmv.add_lora(case.y.copy(), case.x, stack, case.adapter_ids)
    order = rng.permutation(11)
    permuted = sgmv.add_lora(case.y[order], case.x[order], stack, case.adapter_ids[order])
    assert_same_bits(permuted, whole[order], "permuted")
    for part in (slice(0, 4), slice(4, 11)):
        y = sgmv.add_lora(case.y[part].copy(), case.x[part], stack, case.adapter_ids[part])
        assert_same_bits(y, whole[part], "split")


@settings(max_examples=30)
@given(scaling=st.sampled_from([-4.0, -1.0, 0.0, 0.5, 2.0]))
def test_linear_in_scaling_and_zero_B_adds_nothing(scaling: float) -> None:
    case = integer("linear", "", [0] * 6, {0: 7}, 12, 9)
    A, B = case.adapters[0]
    unscaled = sgmv.lora_delta(case.x, A, B, 1.0)
    np.testing.assert_array_equal(sgmv.lora_delta(case.x, A, B, scaling), scaling * unscaled)
    assert not sgmv.lora_delta(case.x, A, np.zeros_like(B), scaling).any()


def test_the_base_product_is_within_the_bound_of_numpys(rng: np.random.Generator) -> None:
    x = rng.standard_normal((6, 300), np.float32)
    W = rng.standard_normal((40, 300), np.float32)
    y = sgmv.apply_batched(x, W, [], [-1] * 6)
    expected = reference.apply_batched(x, W, [], [-1] * 6)
    compare.check(y, expected, bounds.apply_batched_bound(x, W, [], [-1] * 6))
