"""The corpus is tested itself: a correct kernel passes all of it, every planted fault fails."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from reference import bounds, by_einsum, by_row, compare, workloads
from reference.workloads import Workload
from tests.help.wrong_kernels import CASES, DTYPES, FAULTS, Kernel, plain, plain_applied

pytestmark = pytest.mark.usefixtures("one_blas_thread")


def ids_of(case: Workload) -> str:
    return case.name


@pytest.fixture(autouse=True)
def _quiet_floats() -> Iterator[None]:
    # The corpus is full of NaN, inf and overflow on purpose.
    with np.errstate(all="ignore"):
        yield


@pytest.mark.parametrize("case", CASES, ids=ids_of)
def test_a_correct_kernel_passes(case: Workload) -> None:
    case.check(plain(case))


@pytest.mark.parametrize("case", CASES, ids=ids_of)
def test_a_correct_apply_batched_passes(case: Workload) -> None:
    case.check_applied(plain_applied(case))


@pytest.mark.parametrize("case", CASES, ids=ids_of)
def test_the_two_forms_agree_to_the_rounding_of_float64(case: Workload) -> None:
    inputs = (case.adapters, case.adapter_ids, case.scalings)
    y, x, W = (array.astype(np.float64) for array in (case.y, case.x, case.W))
    in_float64 = {
        id_: pair and (pair[0].astype(np.float64), pair[1].astype(np.float64))
        for id_, pair in case.adapters.items()
    }
    bound = bounds.add_lora_bound(y, x, in_float64, *inputs[1:], expected=case.expected)
    compare.check(by_einsum.add_lora(case.y, case.x, *inputs), case.expected, bound)
    bound = bounds.apply_batched_bound(
        x, W, in_float64, *inputs[1:], expected=case.expected_applied
    )
    compare.check(by_einsum.apply_batched(case.x, case.W, *inputs), case.expected_applied, bound)
    if case.exact:
        assert np.array_equal(by_einsum.add_lora(case.y, case.x, *inputs), case.expected)


@pytest.mark.parametrize("case", CASES, ids=ids_of)
def test_exact_cases_leave_nothing_to_rounding(case: Workload) -> None:
    if case.exact:
        assert np.array_equal(case.expected.astype(case.y.dtype), case.expected)
        assert not case.bound.any()
    else:
        has_adapter = [case.adapters.get(i) is not None for i in case.adapter_ids.tolist()]
        assert not case.bound[~np.array(has_adapter, bool)].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_names_are_unique_and_say_why(dtype: np.dtype[Any]) -> None:
    cases = [case for case in CASES if case.x.dtype == dtype]
    assert len({case.name for case in cases}) == len(cases) > 60
    assert all(case.why for case in cases)


def test_the_corpus_is_the_same_in_every_run() -> None:
    again = {case.name: case.fingerprint for case in workloads.corpus(dtypes=DTYPES)}
    assert again == {case.name: case.fingerprint for case in CASES}


def test_max_elements_leaves_out_the_large_cases_only() -> None:
    def size(case: Workload) -> int:
        n, h_in = case.x.shape
        ranks = sum(len(pair[0]) for pair in case.adapters.values() if pair is not None)
        return int((n + ranks) * (h_in + case.y.shape[1]))

    float32 = [case for case in CASES if case.x.dtype == np.float32]
    small = {case.name for case in workloads.corpus(max_elements=3_000)}
    assert small == {case.name for case in float32 if size(case) <= 3_000}
    assert 0 < len(small) < len(float32)


@pytest.mark.parametrize("kind", workloads.POPULARITIES)
def test_every_popularity_comes_real_and_exact(kind: str) -> None:
    of_kind = [c for c in CASES if c.name.startswith(kind) and c.name.endswith("float32")]
    assert {case.exact for case in of_kind} == {True, False}
    assert {len(case.x) for case in of_kind} == {1, 3, 127, 128, 129, 133}


def verdict(case: Workload, kernel: Kernel) -> str:
    """What the corpus says to a kernel; nothing if it passes."""
    try:
        case.check(kernel(case))
    except AssertionError as rejection:
        return str(rejection)
    return ""


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_rejected(fault: str) -> None:
    make_kernel, hunter = FAULTS[fault]
    dtype = "float16" if hunter.endswith("float16") else "float32"
    hunter = f"{hunter.removesuffix(', float16')}, {dtype}"
    cases = [case for case in CASES if case.x.dtype == dtype]
    if fault == "32-bit offsets" and not any(c.name == hunter for c in cases):
        pytest.skip("the system refused the address space of 'far rows'")
    kernel = make_kernel()
    verdicts = {case.name: verdict(case, kernel) for case in cases}
    rejected = {name for name, message in verdicts.items() if name in message}
    assert hunter in rejected


@pytest.mark.parametrize("case", [c for c in CASES if c.x.dtype != np.float64], ids=ids_of)
def test_twice_the_bound_is_rejected_and_half_of_it_accepted(case: Workload) -> None:
    # As float64, so that no store rounding blurs the step.
    sign = np.where(np.indices(case.y.shape).sum(axis=0) % 2, 1.0, -1.0)
    at = np.isfinite(case.expected)
    step = np.where(case.bound > 0, case.bound, np.spacing(np.abs(case.expected)))
    compare.check(case.expected + 0.5 * case.bound * sign, case.expected, case.bound)
    wrong = compare.violations(case.expected + 2 * step * sign, case.expected, case.bound)
    assert wrong[at].all()


def test_no_worse_than_plain_rejects_a_rounded_v_and_accepts_plain() -> None:
    ids = workloads.popularity("uniform", 64)
    case = workloads.real(
        "comparison", "a layer's shape", ids, dict.fromkeys(range(8), 16), 512, 512
    )
    compare.check_no_worse(plain(case), plain(case), case.expected)
    with pytest.raises(AssertionError, match="largest error: expected at most"):
        compare.check_no_worse(plain(case, v_dtype=np.float16), plain(case), case.expected)


def test_a_fresh_copy_of_y_is_all_that_a_kernel_may_write() -> None:
    case = workloads.real("in place", "y itself given", [0], {0: 2}, 3, 4)
    case.y[...] += 1
    with pytest.raises(AssertionError, match=r"kernel changed y; give it y\.copy\(\)"):
        case.check(by_row.add_lora(case.y, case.x, case.adapters, case.adapter_ids).astype("f4"))
