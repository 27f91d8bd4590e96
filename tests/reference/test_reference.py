"""The definition, the derived bound and the comparison: each held to something independent."""

import ast
import sys
import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import reference
from reference import bounds, by_einsum, by_row, compare, workloads
from reference.floats import float_type
from reference.workloads import Workload

Array = Any  # of any of the four float types
FORMS = pytest.mark.parametrize("form", [by_row, by_einsum], ids=["by_row", "by_einsum"])
DTYPES = [np.dtype(d) for d in (np.float16, ml_dtypes.bfloat16, np.float32, np.float64)]


@st.composite
def integer_workloads(draw: st.DrawFn) -> Workload:
    adapters = draw(st.lists(st.integers(0, 1000), unique=True, max_size=4))
    ranks = {a: draw(st.sampled_from([0, 1, 3, 8, 17, None])) for a in adapters}
    ids = draw(st.lists(st.sampled_from([-1, *adapters]), max_size=12))
    h_in, h_out = draw(st.integers(1, 40)), draw(st.integers(1, 40))
    name = f"drawn {draw(st.integers(0, 2**32))}"
    return workloads.integer(name, "hypothesis", ids, ranks, h_in, h_out)


def added(form: types.ModuleType, case: Workload, rows: Any = slice(None)) -> Array:
    ids = case.adapter_ids[rows]
    return form.add_lora(case.y[rows], case.x[rows], case.adapters, ids, case.scalings)


def weights(case: Workload, adapter_id: int) -> tuple[Array, Array]:
    pair = case.adapters[adapter_id]
    assert pair is not None
    return pair


# The definition


@FORMS
@settings(max_examples=60)
@given(case=integer_workloads(), data=st.data())
def test_rows_in_another_order_give_the_same_rows(
    form: types.ModuleType, case: Workload, data: st.DataObject
) -> None:
    order = np.array(data.draw(st.permutations(range(len(case.x)))), np.int64)
    assert np.array_equal(added(form, case, order), added(form, case)[order])


@FORMS
@settings(max_examples=60)
@given(case=integer_workloads(), data=st.data())
def test_a_batch_in_two_parts_gives_the_same_rows(
    form: types.ModuleType, case: Workload, data: st.DataObject
) -> None:
    cut = data.draw(st.integers(0, len(case.x)))
    parts = [added(form, case, slice(None, cut)), added(form, case, slice(cut, None))]
    assert np.array_equal(np.concatenate(parts), added(form, case))


@FORMS
@settings(max_examples=60)
@given(case=integer_workloads(), factor=st.integers(-4, 4))
def test_the_delta_is_linear_in_scaling(
    form: types.ModuleType, case: Workload, factor: int
) -> None:
    scaled = replace(case, scalings={a: factor * s for a, s in case.scalings.items()})
    assert np.array_equal(added(form, scaled) - case.y, factor * (added(form, case) - case.y))


@FORMS
@settings(max_examples=60)
@given(case=integer_workloads())
def test_zero_B_adds_nothing(form: types.ModuleType, case: Workload) -> None:
    zeroed = {a: pair and (pair[0], 0 * pair[1]) for a, pair in case.adapters.items()}
    assert np.array_equal(added(form, replace(case, adapters=zeroed)), case.y)


@settings(max_examples=60)
@given(case=integer_workloads())
def test_each_form_is_the_sum_written_out(case: Workload) -> None:
    expected = case.y.astype(np.float64)
    for i, adapter_id in enumerate(case.adapter_ids.tolist()):
        A, B = case.adapters.get(adapter_id) or (np.zeros((0, 1)), np.zeros((1, 0)))
        for j in range(len(A)):
            v_j = sum(float(case.x[i, k]) * float(A[j, k]) for k in range(A.shape[1]))
            for column in range(len(B)):
                expected[i, column] += case.scalings[adapter_id] * v_j * float(B[column, j])
    assert np.array_equal(added(by_row, case), expected)
    assert np.array_equal(added(by_einsum, case), expected)


@FORMS
def test_the_other_three_functions_follow_from_add_lora(form: types.ModuleType) -> None:
    case = workloads.integer("follow", "one adapter", [0, 0, 0], {0: 5}, 7, 9, scalings={0: 3})
    A, B = weights(case, 0)
    delta = added(form, case) - case.y
    base = (case.x @ case.W.T).astype(np.float64)
    assert np.array_equal(form.lora_delta(case.x, A, B, 3), delta)
    assert np.array_equal(form.apply_single(case.x, case.W, A, B, 3), base + delta)
    mixed = form.apply_batched(case.x, case.W, [(A, B)], [0, -1, 0], 3)
    assert np.array_equal(mixed, base + delta * [[1], [0], [1]])


@FORMS
def test_y_stays_as_it_was_and_results_are_float64(form: types.ModuleType) -> None:
    case = workloads.real("kept", "inputs", [0, -1], {0: 3}, 5, 4, dtype=np.float16)
    result = added(form, case)
    assert result.dtype == np.float64
    result[:] = 0
    assert case.fingerprint == replace(case).fingerprint


@FORMS
def test_adapters_and_scalings_in_every_spelling(form: types.ModuleType) -> None:
    A, B = np.array([[2.0]]), np.array([[5.0]])
    own = types.SimpleNamespace(A=A, B=B, scaling=3.0)
    y, x, ids = [[1.0]], [[1.0]], [0]
    spellings: list[tuple[Any, Any, float]] = [
        ({0: (A, B)}, None, 11),
        ([(A, B)], None, 11),
        ((own,), None, 31),
        ({0: own}, {0: 2.0}, 21),
        ([own], [2.0], 21),
        ([own], np.array([2.0]), 21),
        ([own], 2, 21),
        ([own], np.float32(2), 21),
        ([own], ml_dtypes.bfloat16(2), 21),
        ([own], np.array(2), 21),
        ([None], None, 1),
        ([None], {}, 1),
    ]
    for adapters, scalings, expected in spellings:
        assert form.add_lora(y, x, adapters, ids, scalings) == [[expected]]


@FORMS
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"adapter_ids": [0, 5]}, r"adapter_ids: .*got 5; add that adapter"),
        ({"adapter_ids": [0, -2]}, r"adapter_ids: .*got -2; .*-1 for base only"),
        ({"adapters": [None], "adapter_ids": [0, 1]}, r"adapter_ids: .*got 1"),
        ({"adapter_ids": [0.0, 0.0]}, r"adapter_ids: expected integers, got float64"),
        ({"adapter_ids": [0]}, r"adapter_ids: expected shape \(2,\) or \(2, k\), got \(1,\)"),
        ({"x": np.ones((3, 4))}, r"x: expected shape \(2, columns\), got \(3, 4\)"),
        ({"x": np.ones(3)}, r"x: expected shape \(2, columns\), got \(3,\)"),
        ({"x": np.ones((2, 3))}, r"adapter 0: expected A of shape \(r, 3\), got \(2, 4\)"),
        ({"y": np.ones((2, 6))}, r"adapter 0: expected B of shape \(6, 2\), got \(5, 2\)"),
        ({"scalings": {1: 1.0}}, r"scalings: expected one for adapter 0"),
        ({"scalings": []}, r"scalings: expected one for adapter 0"),
        ({"scalings": np.inf}, r"adapter 0: expected a finite scaling, got inf"),
        ({"scalings": 10**5000}, r"adapter 0: expected a finite scaling, got inf"),
        ({"scalings": {0: "2"}}, r"adapter 0: expected a real number as scaling, got str; pass"),
        ({"scalings": 2j}, r"adapter 0: expected a real number as scaling, got complex"),
        ({"scalings": np.ones((1, 1))}, r"adapter 0: expected a real number .* got ndarray"),
        ({"adapters": 5}, r"adapters: expected a mapping or a sequence, got int; pass \{id: "),
        ({"adapters": np.ones((1, 2, 4))}, r"adapters: expected .* sequence, got ndarray"),
        ({"adapters": {0}}, r"adapters: expected a mapping or a sequence, got set"),
        ({"adapters": {0: (1, 2, 3)}}, r"adapter 0: expected .*, got tuple of 3; pass \(A, B\)"),
        ({"adapters": {0: 5}}, r"adapter 0: expected \(A, B\), an Adapter or None, got int; pass"),
        ({"adapters": {0: types.SimpleNamespace(A=1)}}, r"adapter 0: .* got SimpleNamespace"),
        ({"adapters": {0: ("a", "b")}}, r"adapter 0: expected A of real numbers, got <U1"),
        ({"x": np.ones((2, 4)) * 1j}, r"x: expected real numbers, got complex128; convert"),
        ({"x": [[1.0], [1.0, 2.0]]}, r"x: expected real numbers, got list that numpy cannot read"),
        ({"y": np.ones((2, 5), object)}, r"y: expected real numbers, got object; convert"),
        ({"adapter_ids": [[0], 0]}, r"adapter_ids: expected integers, got list that numpy cannot"),
        ({"adapter_ids": [2**64 - 1] * 2}, r"adapter_ids: .* got 18446744073709551615; add that"),
        ({"adapter_ids": np.zeros(2, "m8[s]")}, r"adapter_ids: expected integers, got timedelta"),
    ],
)
def test_bad_input_is_refused(form: types.ModuleType, change: dict[str, Any], message: str) -> None:
    good: dict[str, Any] = {
        "y": np.ones((2, 5)),
        "x": np.ones((2, 4)),
        "adapters": {0: (np.ones((2, 4)), np.ones((5, 2)))},
        "adapter_ids": [0, 0],
        "scalings": 1.0,
    }
    form.add_lora(**good)
    with pytest.raises(ValueError, match=message):
        form.add_lora(**{**good, **change})


@FORMS
def test_a_single_scaling_is_one_number(form: types.ModuleType) -> None:
    x, W, A, B = np.ones((2, 4)), np.ones((5, 4)), np.ones((3, 4)), np.ones((5, 3))
    for scaling in (None, {0: 2.0}, [2.0]):
        with pytest.raises(ValueError, match=r"^adapter: expected a real number as scaling, got "):
            form.apply_single(x, W, A, B, scaling)
        with pytest.raises(ValueError, match=r"^adapter: expected a real number as scaling, got "):
            form.lora_delta(x, A, B, scaling)


def test_a_W_of_another_width_is_refused() -> None:
    with pytest.raises(ValueError, match=r"W: expected shape \(rows, 3\), got \(5, 4\)"):
        reference.apply_batched(np.ones((1, 3)), np.ones((5, 4)), [None], [0])


def test_reference_imports_numpy_only() -> None:
    allowed = {*sys.stdlib_module_names, "numpy", "reference"}
    files = sorted(Path(reference.__file__).parent.glob("*.py"))
    assert len(files) > 5
    for file in files:
        if file.name == "pieces.py":
            continue  # who runs random batches elsewhere: sgmv's campaigns, when asked to
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                assert {alias.name.split(".")[0] for alias in node.names} <= allowed, file
            if isinstance(node, ast.ImportFrom):
                assert node.level == 0, file
                assert (node.module or "").split(".")[0] in allowed, file


# The popularities


@pytest.mark.parametrize("n", [0, 1, 2, 3, 8, 64, 127, 128, 129, 133])
def test_popularities_are_punicas(n: int) -> None:
    lengths = {
        kind: np.bincount(workloads.popularity(kind, n)).tolist() for kind in workloads.POPULARITIES
    }
    assert all(sum(of_kind) == n for of_kind in lengths.values())
    assert lengths["distinct"] == [1] * n
    assert lengths["identical"] == ([n] if n else [])
    if n:
        uniform, skewed = lengths["uniform"], lengths["skewed"]
        assert len(uniform) == int(np.ceil(np.sqrt(n)))
        assert max(uniform) - min(uniform) <= 1
        assert skewed == sorted(skewed, reverse=True)
        full = [int(1.5**i) for i in range(len(skewed) - 1)]
        assert sorted([*full, n - sum(full)], reverse=True) == skewed
        assert sum(full) < n <= sum(full) + int(1.5 ** len(full))


def test_popularity_follows_its_seed() -> None:
    first, again, other = (workloads.popularity("uniform", 64, seed) for seed in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    assert np.array_equal(np.sort(first), np.sort(other))
    assert np.bincount(workloads.popularity("Nx8", 24)).tolist() == [3] * 8


@pytest.mark.parametrize(
    ("kind", "n", "message"),
    [
        ("Nx8", 12, r"n: expected a multiple of 8 for Nx8, got 12; pass 16"),
        ("zipf", 8, r"kind: expected one of distinct, .*Nx8, got 'zipf'"),
        ("uniform", -1, r"n: expected 0 or more rows, got -1"),
    ],
)
def test_unknown_popularities_are_refused(kind: str, n: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        workloads.popularity(kind, n)


def test_integers_too_large_to_be_exact_are_refused() -> None:
    with pytest.raises(ValueError, match=r"sums up to 2\*\*24, got scalings \[1000000\.0\]"):
        workloads.integer("large", "overflow", [0], {0: 8}, 64, 8, scalings={0: 1e6})
    with pytest.raises(ValueError, match=r"expected integer scalings .*\[0\.1\]"):
        workloads.integer("fraction", "rounds", [0], {0: 8}, 64, 8, scalings={0: 0.1})


# The float types


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_float_types_are_what_the_arrays_do(dtype: np.dtype[Any]) -> None:
    finfo: Any = ml_dtypes.finfo
    kind, info = float_type(dtype), finfo(dtype)
    assert kind.unit_roundoff == bounds.unit_roundoff(dtype.name) == float(info.eps) / 2
    assert kind.smallest_normal == float(info.smallest_normal)
    if dtype != np.float64:
        assert kind.half_smallest_subnormal == float(info.smallest_subnormal) / 2
        with np.errstate(over="ignore"):
            assert np.isinf(np.float64(kind.overflow_threshold).astype(dtype))
            # From float32, as ml_dtypes rounds float64 to bfloat16 in two steps.
            below = np.nextafter(np.float64(kind.overflow_threshold), 0)
            if dtype != np.float32:
                below = np.nextafter(np.float32(kind.overflow_threshold), np.float32(0))
            assert below.astype(dtype) == info.max


def test_other_types_are_refused() -> None:
    with pytest.raises(ValueError, match=r"dtype: expected one of float16, .*, got int32"):
        float_type(np.int32)


# The bound


def kernel(case: Workload, order: Any, scale_v: bool, y_first: bool) -> Array:
    """A correct kernel of scalar loops: K and r in the given order, y added first or last."""
    wide: Any = np.float64 if np.float64 in (case.x.dtype, case.y.dtype) else np.float32
    y = case.y.copy()
    for i, adapter_id in enumerate(case.adapter_ids.tolist()):
        pair = case.adapters.get(adapter_id)
        if pair is None:
            continue
        scaling = wide(case.scalings[adapter_id])
        A, B, x = pair[0].astype(wide), pair[1].astype(wide), case.x[i].astype(wide)
        v = np.zeros(len(A), wide)
        for k in order(len(x)):
            v += x[k] * A[:, k]
        if scale_v:
            v *= scaling
        rest = wide(1) if scale_v else scaling
        total = y[i].astype(wide) if y_first else np.zeros(len(B), wide)
        for j in order(len(A)):
            total += rest * (v[j] * B[:, j]) if y_first else v[j] * B[:, j]
        y[i] = (
            total.astype(y.dtype) if y_first else (y[i].astype(wide) + rest * total).astype(y.dtype)
        )
    return y


@settings(max_examples=150)
@given(
    dtype=st.sampled_from(DTYPES[:3]),
    exponents=st.tuples(*[st.integers(-60, 30)] * 4),
    h_in=st.integers(1, 70),
    r=st.integers(1, 20),
    seed=st.integers(0, 2**32),
    reverse=st.booleans(),
    scale_v=st.booleans(),
    y_first=st.booleans(),
)
def test_correct_kernels_of_any_order_and_magnitude_are_within_the_bound(
    dtype: np.dtype[Any],
    exponents: tuple[int, int, int, int],
    h_in: int,
    r: int,
    seed: int,
    reverse: bool,
    scale_v: bool,
    y_first: bool,
) -> None:
    case = workloads.real(f"drawn {seed}", "", [0, 0, -1], {0: r}, h_in, 5, dtype=dtype)
    if dtype == np.float16:
        exponents = tuple(max(min(e // 4, 5), -15) for e in exponents)  # type: ignore[assignment]
    A, B = weights(case, 0)
    x, y, A, B = (
        np.ldexp(array.astype(np.float64), e).astype(dtype)
        for array, e in zip((case.x, case.y, A, B), exponents, strict=True)
    )
    case = replace(case, x=x, y=y, adapters={0: (A, B)})
    order = (lambda n: reversed(range(n))) if reverse else range
    with np.errstate(all="ignore"):
        case.check(kernel(case, order, scale_v, y_first))


def test_the_bound_is_nearly_attained_by_an_adversarial_sum() -> None:
    # Each 2**-24 added to 1 is lost to the tie: an ordered sum errs by u for every term.
    h_in, u = 512, 2.0**-24
    x = np.ones((1, h_in), np.float32)
    A = np.full((1, h_in), u, np.float32)
    A[0, 0] = 1
    case = Workload(
        "adversarial", "", x, np.zeros((1, 1), np.float32), {0: (A, np.ones((1, 1), np.float32))},
        {0: 1.0}, np.array([0]),
    )  # fmt: skip
    actual = kernel(case, range, scale_v=False, y_first=False)
    case.check(actual)
    statistics = compare.error_statistics(actual, case.expected, case.bound)
    assert statistics.largest == (h_in - 1) * u
    # The bound allows h_in + r + 3 roundings; three of them, scaling, B and y, are exact here.
    assert statistics.largest_in_bounds > (h_in - 1) / (h_in + 1 + 3) - 0.001
    assert statistics.mean_signed == -(h_in - 1) * u


def test_products_that_underflow_after_scaling_are_within_the_bound() -> None:
    """Each of r products rounds up to twice its size, and small scaling no longer shrinks that."""
    r = 64
    A = np.ones((r, 1), np.float32)
    B = np.full((1, r), (1 + 2.0**-23) * 2.0**-80, np.float32)
    case = workloads.Workload(
        "underflow", "", x=np.full((1, 1), 2.0**-60, np.float32), y=np.zeros((1, 1), np.float32),
        adapters={0: (A, B)}, scalings={0: 2.0**-10}, adapter_ids=np.zeros(1, np.int64),
    )  # fmt: skip
    actual = kernel(case, range, scale_v=True, y_first=False)
    assert actual[0, 0] == r * 2.0**-149
    assert compare.error_statistics(actual, case.expected, case.bound).largest > 60 * 2.0**-150
    case.check(actual)


def test_the_bound_by_hand() -> None:
    # One product: u each for x A, v B, the rounding of scaling and its product, the sum with y.
    u, one = 2.0**-24, np.ones((1, 1), np.float32)
    bound = bounds.add_lora_bound(one, one, [(one, one)], [0], 1.0)
    assert bound[0, 0] == pytest.approx(5 * u + u, rel=1e-6)
    half = one.astype(np.float16)
    bound = bounds.add_lora_bound(half, half, [(half, half)], [0], 1.0)
    assert bound[0, 0] == pytest.approx(2 * 2.0**-11 + 6 * u, rel=1e-3)
    bound = bounds.apply_batched_bound(one, one, [None], [0])
    assert bound[0, 0] == pytest.approx(u, rel=1e-6)
    bound = bounds.apply_batched_bound(one, one, [(one, one)], [0])
    assert bound[0, 0] == pytest.approx(5 * u + 2 * u, rel=1e-6)
    wide = bounds.add_lora_bound(one.astype(np.float64), one, [(one, one)], [0], 1.0)
    assert wide[0, 0] == pytest.approx(3 * u, rel=1e-6)  # x A, the rounding of scaling, v scaling
    stored = bounds.lora_delta_bound(one, one, one, 1.0, out=np.float16)
    assert stored[0, 0] == pytest.approx(2.0**-11 + 5 * u, rel=1e-3)
    assert bounds.lora_delta_bound(one, one, one, 1.0)[0, 0] == pytest.approx(5 * u, rel=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_where_nothing_is_added_the_bound_is_zero(dtype: np.dtype[Any]) -> None:
    case = workloads.real("nothing", "", [0, 1, 2, 3, -1], {0: 0, 1: 3, 2: 3, 3: None}, 4, 5,
                          scalings={0: 1.0, 1: 0.0, 2: 1.0}, dtype=dtype)  # fmt: skip
    A, B = weights(case, 2)
    B = B.copy()
    B[:4] = 0
    case = replace(case, adapters={**case.adapters, 2: (A, B)})
    assert np.argwhere(case.bound).tolist() == [[2, 4]]


def test_the_bound_covers_a_float16_subnormal_store() -> None:
    tiny = np.full((1, 1), 2.0**-24, np.float16)
    one = np.ones((1, 1), np.float16)
    # The exact value, 1.5 * 2**-24, lies between two subnormals: half a gap, 2**-25, is lost.
    bound = bounds.add_lora_bound(tiny, tiny, [(one, one)], [0], 0.5)
    compare.check(np.full((1, 1), 2.0**-23, np.float16), [[1.5 * 2.0**-24]], bound)
    assert bound[0, 0] == pytest.approx(2.0**-25, rel=1e-3)


def test_too_many_roundings_are_refused() -> None:
    with pytest.raises(ValueError, match="roundings: expected fewer than 4, got 4; sum wider"):
        bounds.gamma(4, 0.25)


# The comparison

ZERO = np.zeros((1, 3))


@pytest.mark.parametrize(
    ("actual", "expected", "wrong"),
    [
        ([1, 2, 3], [1, 2, 3], [0, 0, 0]),
        ([1, 2.1, 3], [1, 2, 3], [0, 1, 0]),
        ([np.nan, 1, np.inf], [np.nan, 1, np.inf], [0, 0, 0]),
        ([1, np.nan, 3], [np.nan, 1, 3], [1, 1, 0]),
        ([np.inf, np.nan, -np.inf], [np.nan, np.inf, np.inf], [1, 1, 1]),
        ([np.inf, -np.inf, 3], [65520, -65519, 3], [0, 1, 0]),
        ([-np.inf, np.inf, 65504], [65520, 1, 65520], [1, 1, 1]),
        ([0.0, -0.0, 0.0], [-0.0, 0.0, 0.0], [0, 0, 0]),
    ],
)
def test_violations_are_strict_about_kind_and_place(
    actual: list[float], expected: list[float], wrong: list[int]
) -> None:
    result = compare.violations(np.array([actual], np.float16), [expected], ZERO)
    assert result.astype(int).tolist() == [wrong]
    if any(wrong):
        with pytest.raises(AssertionError, match=f"{sum(wrong)} of 3 elements wrong"):
            compare.check(np.array([actual], np.float16), [expected], ZERO)


def test_check_names_the_worst_element() -> None:
    expected = np.zeros((2, 3))
    actual = np.array([[0, 0.5, 0], [0, 0, 2.0]], np.float32)
    with pytest.raises(
        AssertionError,
        match=r"mine: 2 of 6 elements wrong, worst at row 1, column 2: got 2\.0, expected 0\.0, "
        r"error 2, bound 0\.25",
    ):
        compare.check(actual, expected, np.full((2, 3), 0.25), "mine")


@pytest.mark.parametrize(
    ("actual", "bound", "message"),
    [
        (np.zeros((1, 2)), ZERO, r"actual: expected the shape of expected, \(1, 3\), got \(1, 2\)"),
        (np.zeros((1, 3)), np.zeros((3, 1)), r"bound: expected the shape of expected"),
        (np.zeros((1, 3)), ZERO + np.nan, r"bound: expected finite numbers >= 0"),
        (np.zeros((1, 3)), ZERO + np.inf, r"bound: expected finite numbers >= 0"),
        (np.zeros((1, 3)), ZERO - 1, r"bound: expected finite numbers >= 0"),
        (np.zeros((1, 3), np.int32), ZERO, r"dtype: expected one of float16, .*got int32"),
    ],
)
def test_a_comparison_that_proves_nothing_is_refused(
    actual: Array, bound: Array, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        compare.violations(actual, ZERO, bound)


def test_statistics_of_known_errors() -> None:
    actual = np.array([[1.5, 2.0, np.nan, 8.0]], np.float16)
    statistics = compare.error_statistics(actual, [[1.0, 4.0, np.nan, 8.0]], [[1.0, 4.0, 0, 0]])
    assert statistics.mean_signed == -0.5
    assert statistics.largest == 2.0
    assert statistics.largest_in_bounds == 0.5
    assert statistics.root_mean_square == np.sqrt(4.25 / 3)
    assert (
        statistics.largest_in_ulps == 512.0
    )  # float16 has 1024 gaps in [1, 2), 256 a unit in [4, 8)
    nothing = compare.error_statistics(np.zeros((0, 3)), np.zeros((0, 3)), np.zeros((0, 3)))
    assert nothing == compare.ErrorStatistics(0.0, 0.0, 0.0, 0.0, 0.0)


def test_no_worse_allows_twice_plain_and_one_rounding() -> None:
    expected = np.ones((1, 1))
    plain = np.array([[1 + 2.0**-10]])
    compare.check_no_worse(np.array([[1 + 2.0**-9]]), plain, expected)
    with pytest.raises(AssertionError, match=r"largest error: expected at most .* 2\.0 times"):
        compare.check_no_worse(np.array([[1 + 2.1 * 2.0**-10]]), plain, expected)
    exact = np.ones((1, 1), np.float32)
    compare.check_no_worse(np.nextafter(exact, np.float32(0)), exact, expected)
    with pytest.raises(AssertionError, match="and one rounding"):
        compare.check_no_worse(np.nextafter(exact, np.float32(2)), exact, expected)
