"""Rows with several weighted adapters: exact, same row same bits, and planted faults are seen."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import reference
import sgmv
from reference import mixtures
from reference.workloads import Workload
from sgmv import layouts
from sgmv.backend import flushes
from sgmv.errors import ShapeError
from tests.conftest import JITTED
from tests.help import acceptance
from tests.help.acceptance import assert_same_bits, backends, backends_of, check, stack_of
from tests.help.planting import SMALL_BLOCKS, Fault, verdict
from tests.stress import mixtures as random_mixtures

TYPES = [np.float32, np.float16, ml_dtypes.bfloat16, np.float64]


def run(case: Workload, backend: str | None = None, **how: Any) -> np.ndarray:
    return sgmv.add_lora(
        case.y.copy(), case.x, stack_of(case), case.adapter_ids,
        weights=case.weights, backend=backend, **how,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", TYPES)
def test_corpus(dtype: Any) -> None:
    for case in mixtures.corpus(dtype):
        for backend in backends_of(case):
            results = []
            for threads in (1, 2, 5):
                sgmv.set_num_threads(threads)
                results.append(run(case, backend))
                check(case, results[-1], backend, f", {threads} threads")
                assert_same_bits(results[-1], results[0], f"{case.name}, {threads} threads")
            stack, segments = stack_of(case), sgmv.segment(case.adapter_ids)
            v = sgmv.shrink(case.x, stack, segments, backend=backend)
            y = case.y.copy()
            sgmv.expand(v, stack, segments, y, weights=case.weights, backend=backend)
            assert_same_bits(y, results[0], f"{case.name}, in two steps")


@pytest.mark.parametrize("dtype", TYPES)
def test_applied(dtype: Any) -> None:
    for case in mixtures.corpus(dtype):
        pairs = {i: pair and sgmv.Adapter(*pair) for i, pair in case.adapters.items()}
        given = case.x, case.W, pairs, case.adapter_ids, case.scalings
        result = sgmv.apply_batched(*given, weights=case.weights)
        case.check_applied(result, flushes=flushes(None, case.x.dtype, np.dtype(dtype)))


def test_random_mixtures() -> None:
    """The same many times over: python -m tests.stress.mixtures --batches 100000."""
    random_mixtures.run(range(300 if JITTED else 20))


@pytest.mark.parametrize("dtype", TYPES)
def test_a_row_depends_on_its_own_ids_and_weights_alone(
    dtype: Any, rng: np.random.Generator
) -> None:
    ids = rng.integers(-1, 6, (90 if JITTED else 12, 3))
    ranks: dict[int, int | None] = {i: r for i, r in enumerate((16, 3, 40, 8, 0, 17))}
    case = mixtures.mixture("bits", "company", ids, ranks, 1100, 300, dtype=dtype)
    stack, w = stack_of(case), np.asarray(case.weights)

    def rows(order: np.ndarray, backend: str, of_row: np.ndarray | None = None) -> np.ndarray:
        named, factor = ids[order], w[order]
        if of_row is not None:
            named, factor = (np.take_along_axis(each, of_row, 1) for each in (named, factor))
        y = case.y[order]
        return sgmv.add_lora(y, case.x[order], stack, named, weights=factor, backend=backend)

    for backend in backends(dtype):
        sgmv.set_num_threads(1)
        expected = rows(np.arange(len(ids)), backend)
        for threads in (1, 2, 5):
            sgmv.set_num_threads(threads)
            order = rng.permutation(len(ids))
            assert_same_bits(rows(order, backend), expected[order], "shuffled")
            company = rng.integers(0, len(ids), 2 * len(ids))
            assert_same_bits(rows(company, backend), expected[company], "in other company")
            for i in range(0, len(ids), 7):
                one = np.array([i])
                assert_same_bits(rows(one, backend), expected[one], "alone")
        # A row's pairs are added in the order of their ids, wherever they stand in the row.
        apart = np.flatnonzero([len(set(row)) == 3 for row in ids.tolist()])
        places = rng.permuted(np.tile(np.arange(3), (len(apart), 1)), axis=1)
        assert_same_bits(rows(apart, backend, places), expected[apart], "ids in another order")


def test_one_adapter_per_row_is_a_plain_batch(rng: np.random.Generator) -> None:
    """To the bit, also with weights of 1."""
    case = mixtures.mixture("plain", "k = 1", [[0], [2], [-1], [0]] * 9, {0: 16, 2: 5}, 700, 200)
    stack, ids = stack_of(case), np.ascontiguousarray(case.adapter_ids[:, 0])
    for backend in backends_of(case):
        plain = sgmv.add_lora(case.y.copy(), case.x, stack, ids, backend=backend)
        for named, weights in (
            (case.adapter_ids, None),
            (case.adapter_ids, np.ones((36, 1))),
            (ids, np.ones(36)),
            (sgmv.segment(ids), np.ones(36, np.float16)),
        ):
            y = sgmv.add_lora(case.y.copy(), case.x, stack, named, weights=weights, backend=backend)
            assert_same_bits(y, plain, backend)
        sgmv.add_lora(case.y.copy(), case.x, stack, ids, weights=np.full(36, 7), backend=backend)
        y = sgmv.add_lora(case.y.copy(), case.x, stack, ids, backend=backend)
        assert_same_bits(y, plain, f"{backend}, weights of the call before")


def test_rows_without_an_adapter_keep_their_bits() -> None:
    y = np.full((3, 5), np.nan, np.float32)
    stack = sgmv.AdapterStack.from_adapters({0: None, 1: (np.ones((2, 4)), np.ones((5, 2)))})
    before = y.copy()
    sgmv.add_lora(y, np.ones((3, 4), np.float64), stack, [[-1, -1], [0, -1], [0, 0]])
    assert_same_bits(y, before, "base only")


def test_a_mixture_may_have_any_strides_and_lists(rng: np.random.Generator) -> None:
    case = mixtures.mixture(
        "strides", "y of other strides", [[0, 2], [2, 2]] * 4, {0: 3, 2: 9}, 60, 70
    )
    expected, stack = run(case), stack_of(case)
    y, x = np.asfortranarray(case.y), np.asfortranarray(case.x)
    ids: Any = [[None if i == -1 else i for i in row] for row in case.adapter_ids.tolist()]
    weights = np.asarray(case.weights).tolist()
    sgmv.add_lora(y, x, stack, ids, weights=weights)
    assert_same_bits(np.ascontiguousarray(y), expected, "Fortran order")
    wide = np.repeat(case.adapter_ids, 2, axis=1)[:, ::2].astype(np.int32)
    assert_same_bits(
        sgmv.add_lora(case.y.copy(), case.x, stack, wide, weights=case.weights), expected, "int32"
    )


def test_many_threads_may_mix_at_once() -> None:
    cases = [case for case in mixtures.corpus() if not case.name.startswith("a ")]
    expected = [run(case) for case in cases]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            for y, right, case in zip(pool.map(run, cases), expected, cases, strict=True):
                assert_same_bits(y, right, case.name)


def test_segments_of_pairs() -> None:
    segments = sgmv.segment([[2, 0], [0, 5], [0, 0]])
    assert (segments.n, segments.k, segments.S) == (3, 2, 4)
    assert segments.adapter_ids.tolist() == [0, 0, 2, 5], "what a row names again comes apart"
    assert segments.rows.tolist() == [0, 1, 2, 2, 0, 1]
    assert segments.pairs.tolist() == [1, 2, 4, 5, 0, 3]
    assert segments.seq_start.tolist() == [0, 3, 4, 5, 6]
    for again in (
        pickle.loads(pickle.dumps(segments)),
        sgmv.Segments(segments.rows, segments.seq_start, segments.adapter_ids, segments.pairs),
    ):
        assert (again.n, again.k) == (3, 2)
        assert again.pairs.tolist() == segments.pairs.tolist()
    plain = sgmv.segment([2, 0])
    assert (plain.k, plain.pairs is plain.rows) == (1, True)
    assert sgmv.segment([[-1, -1]]).S == 1
    assert sgmv.segment(np.zeros((0, 3), int)).n == 0
    y = np.ones((0, 5), np.float32)
    stack = sgmv.AdapterStack.from_adapters({1: (np.ones((2, 4)), np.ones((5, 2)))})
    empty = np.zeros((0, 3), np.int64)
    assert sgmv.add_lora(y, np.ones((0, 4)), stack, empty, weights=np.ones((0, 3))) is y


def test_the_cost_is_that_of_the_pairs() -> None:
    one, two = (sgmv.segment(ids).stats(64, 32, 8) for ids in ([3, 3], [[3, 4], [3, 4]]))
    assert two.total.flops == 2 * one.total.flops


@pytest.mark.once
@pytest.mark.parametrize("lay_out", [layouts.vllm_v0, layouts.flashinfer])
def test_no_engine_has_such_metadata(lay_out: Callable[..., Any]) -> None:
    with pytest.raises(ShapeError, match=r"batch: expected one adapter per row, got 2"):
        lay_out([[0, 1], [1, 0]])


FAULTS = {
    "the last pair is lost": Fault(
        "segment",
        "return Segments._trusted(rows, seq_start, ids, pairs)",
        "return Segments._trusted(rows, np.minimum(seq_start, len(rows) - 1), ids, pairs)",
    ),
    "pairs are read as rows": Fault(
        "segment", "rows = pairs // k\n", "rows = pairs % (max(pairs) // k + 1)\n"
    ),
    "what is named again comes before the others": Fault(
        "segment", 'pieces, kind="stable")', 'pieces, kind="stable")[::-1]'
    ),
    "a weight is squared": Fault("kernels.tasks", "v[j] *= weights[p]", "v[j] *= weights[p] ** 2"),
    "a weight is another pair's": Fault(
        "kernels.tasks", "v[j] *= weights[p]", "v[j] *= weights[task.first]"
    ),
    "weights are those of the unsorted pairs": Fault(
        "segment", ".reshape(-1)[segments.pairs]", ".reshape(-1)[np.arange(len(segments.pairs))]"
    ),
    "weights are left out": Fault("kernels.tasks", "if call.weights != 0:", "if False:"),
    "a band begins with its second block": Fault(
        "kernels.tasks",
        "return Part(number, item(call.bands, band), ",
        "return Part(number, item(call.bands, band) + (call.block_count > 1), ",
    ),
    "the last band is lost": Fault(
        "kernels.plan", "    found.bands[q] = count\n    return q", "    return max(q - 1, 1)"
    ),
}  # fmt: skip


def accept(modules: dict[str, ModuleType]) -> None:
    acceptance.sgmv = modules["sgmv"]  # type: ignore[assignment]
    acceptance.VECTOR_BITS = 0
    copy = modules["sgmv"]
    copy.set_num_threads(2)
    for case in mixtures.corpus():
        if len(case.x) <= 24:
            stack = stack_of(case)
            y = case.y.copy()
            copy.add_lora(y, case.x, stack, case.adapter_ids, weights=case.weights)
            case.check(y)


@pytest.mark.once
def test_accepted_without_a_fault() -> None:
    assert verdict(accept, *SMALL_BLOCKS) == "nothing"


@pytest.mark.once
@pytest.mark.parametrize("fault", FAULTS)
def test_rejected(fault: str) -> None:
    assert verdict(accept, *SMALL_BLOCKS, FAULTS[fault]) != "nothing"


@pytest.mark.once
def test_the_reference_tells_wrong_mixtures() -> None:
    """Each of these forms is right for plain batches."""

    def wrong(how: str, case: Workload) -> np.ndarray:
        ids, w = case.adapter_ids, np.asarray(case.weights, np.float64)
        if how == "a place lost":
            ids = np.where(np.arange(ids.shape[1]) == ids.shape[1] - 1, -1, ids)
        if how == "named again adds once":
            first = [[i in row[:j] for j, i in enumerate(row)] for row in ids.tolist()]
            ids = np.where(np.reshape(first, ids.shape), -1, ids)
        factor = {"squared": w**2, "left out": w**0, "another row's": np.roll(w, 1, 0)}.get(how, w)
        y = reference.add_lora(
            case.y, case.x, case.adapters, ids, case.scalings, weights=factor
        )  # fmt: skip
        return y.astype(case.y.dtype)

    for how in ("a place lost", "named again adds once", "squared", "left out", "another row's"):
        caught = [case.name for case in mixtures.corpus() if case.wrong(wrong(how, case))]
        assert caught, how
    assert not [case.name for case in mixtures.corpus() if case.wrong(wrong("", case))]
