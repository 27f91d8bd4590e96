"""Adapters with magnitudes: gains, who gets them, whose bits they leave alone, what is refused."""

from __future__ import annotations

import copy
import pickle
from types import ModuleType
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import sgmv
from reference import dora as batches
from reference.bounds import gamma
from sgmv import dora, memory
from sgmv.errors import ShapeError, StackError, ValueRangeError
from tests.conftest import JITTED
from tests.help import acceptance
from tests.help.acceptance import (
    assert_same_bits,
    backends,
    backends_of,
    check,
    check_rows_keep_their_bits,
    stack_of,
)
from tests.help.planting import SMALL_BLOCKS, Fault, verdict
from tests.stress import dora as random_batches

TYPES = [np.float32, np.float16, ml_dtypes.bfloat16, np.float64]
H_IN, H_OUT = 130, 200
RANKS = (8, 3, 0, 17)
PLAIN = 1  # the one adapter of these without magnitudes


def drawn(rng: np.random.Generator, dtype: Any = np.float32) -> dict[int, sgmv.Adapter]:
    """Adapters of RANKS, all but one with magnitudes."""
    return {
        i: sgmv.Adapter(
            rng.standard_normal((r, H_IN)).astype(dtype),
            rng.standard_normal((H_OUT, r)).astype(dtype),
            0.5,
            None if i == PLAIN else rng.random(H_OUT).astype(np.float32),
        )
        for i, r in enumerate(RANKS)
    }


@pytest.mark.parametrize("dtype", TYPES)
def test_gains_are_magnitudes_over_lengths_of_rows(dtype: Any, rng: np.random.Generator) -> None:
    """Rounded once from float64, whatever the blocks of W, its strides and what it is read from."""
    W, bias = rng.standard_normal((H_OUT, H_IN)).astype(dtype), rng.standard_normal(H_OUT)
    stack = sgmv.AdapterStack.from_adapters(drawn(rng, dtype), W=W, bias=bias)
    wide = np.float64 if dtype == np.float64 else np.float32
    for i in stack:
        adapter = stack[i]
        assert adapter is not None
        if i == PLAIN:
            assert adapter.magnitude is None
            assert adapter._gains is None
            continue
        A, B = adapter.A.astype(np.float64), adapter.B.astype(np.float64)
        assert adapter.magnitude is not None
        length = np.linalg.norm(W.astype(np.float64) + 0.5 * B @ A, axis=1)
        gain = adapter.magnitude / length
        assert adapter._gains is not None
        assert adapter._gains.dtype == wide
        sums = gamma(2 * H_IN, 2.0**-53)
        np.testing.assert_allclose(adapter._gains[0], gain, rtol=np.finfo(wide).eps / 2 + sums)
        offset = (1 - adapter._gains[0].astype(np.float64)) * bias
        np.testing.assert_array_equal(adapter._gains[1], offset.astype(wide))


class Quantised:
    """Weights as a caller dequantises them, some rows at a time."""

    def __init__(self, W: np.ndarray) -> None:
        self.shape, self._W, self.most = W.shape, W, 0

    def __getitem__(self, rows: slice) -> np.ndarray:
        self.most = max(self.most, rows.stop - rows.start)
        return self._W[rows].copy()


def test_W_is_read_in_blocks_and_never_changed(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    W, bias = rng.standard_normal((H_OUT, H_IN), np.float32), rng.standard_normal(H_OUT)
    adapter = drawn(rng)[0]
    expected = dora.gains_of(adapter, W, bias)
    monkeypatch.setattr(dora, "BLOCK", 7 * H_IN)
    W.flags.writeable = False
    quantised = Quantised(W)
    forms = [W, np.asfortranarray(W), np.repeat(W, 2, 1)[:, ::2], W[::-1].copy()[::-1], quantised]
    for form in forms:
        assert_same_bits(dora.gains_of(adapter, form, bias), expected, "another form of W")
    assert quantised.most == 7


@pytest.mark.parametrize("dtype", TYPES)
def test_same_row_same_bits(dtype: Any, rng: np.random.Generator) -> None:
    W = rng.standard_normal((H_OUT, H_IN)).astype(dtype)
    for bias in (None, rng.standard_normal(H_OUT)):
        adapters = drawn(rng, dtype)
        stack = sgmv.AdapterStack.from_adapters(adapters, W=W, bias=bias)
        ids = rng.integers(-1, len(RANKS), 30)
        x = rng.standard_normal((30, H_IN)).astype(dtype)
        y = rng.standard_normal((30, H_OUT)).astype(dtype)
        plain = sgmv.AdapterStack.from_adapters({PLAIN: adapters[PLAIN]})
        rows = ids == PLAIN
        for backend in backends(dtype):
            check_rows_keep_their_bits(rng, y, x, stack, ids, (1, 2, 5), backend)
            got = sgmv.add_lora(y.copy(), x, stack, ids, backend=backend)
            alone = sgmv.add_lora(y[rows], x[rows], plain, ids[rows], backend=backend)
            assert_same_bits(got[rows], alone, f"{backend}, a plain adapter's")
            assert_same_bits(got[ids < 0], y[ids < 0], f"{backend}, base only")
            v = sgmv.shrink(x, stack, sgmv.segment(ids), backend=backend)
            apart = sgmv.expand(v, stack, sgmv.segment(ids), y.copy(), backend=backend)
            assert_same_bits(apart, got, f"{backend}, in two steps")
            far = np.asfortranarray(y)
            sgmv.add_lora(far, x, stack, ids, backend=backend)
            assert_same_bits(np.ascontiguousarray(far), got, f"{backend}, other strides")


@pytest.mark.parametrize("dtype", TYPES)
def test_corpus(dtype: Any) -> None:
    for case in batches.corpus(dtype):
        stack = stack_of(case)
        for backend in backends_of(case):
            results = []
            for threads in (1, 2, 5):
                sgmv.set_num_threads(threads)
                y = sgmv.add_lora(case.y.copy(), case.x, stack, case.adapter_ids, backend=backend)
                check(case, y, backend, f", {threads} threads")
                results.append(y)
                assert_same_bits(y, results[0], f"{case.name}, {threads} threads")


@pytest.mark.parametrize("dtype", TYPES)
def test_applied_corpus(dtype: Any) -> None:
    for case in batches.corpus(dtype):
        adapters, ids, _ = case._pairs
        its = {
            i: one and sgmv.Adapter(*one[:2], case.scalings[i], getattr(one, "magnitude", None))
            for i, one in adapters.items()
        }
        case.check_applied(sgmv.apply_batched(case.x, case.W, its, ids))


def test_random_batches() -> None:
    """The same many times over: python -m tests.stress.dora --batches 100000."""
    random_batches.run(range(300 if JITTED else 20))


def test_nan_stays_in_its_own_rows(rng: np.random.Generator) -> None:
    W = rng.standard_normal((H_OUT, H_IN), np.float32)
    W[3, 5] = np.nan
    W[4] = 0
    adapters = drawn(rng)
    damaged = np.ones(H_OUT, np.float32)
    damaged[[7, 9]] = np.nan, np.inf
    adapters[0] = sgmv.Adapter(adapters[0].A, adapters[0].B, 0.0, damaged)
    stack = sgmv.AdapterStack.from_adapters(adapters, W=W)
    x, y = (rng.standard_normal((20, h), np.float32) for h in (H_IN, H_OUT))
    ids = rng.integers(-1, 2, 20)
    got = sgmv.add_lora(y.copy(), x, stack, ids)
    assert np.isfinite(got[ids != 0]).all()
    assert np.isnan(got[ids == 0][:, [3, 7]]).all()
    assert np.isinf(got[ids == 0][:, [4, 9]]).all()
    others = np.setdiff1d(np.arange(H_OUT), [3, 4, 7, 9])
    assert np.isfinite(got[ids == 0][:, others]).all()


def test_what_a_stack_returns_keeps_its_gains(rng: np.random.Generator) -> None:
    W, bias = rng.standard_normal((H_OUT, H_IN), np.float32), rng.standard_normal(H_OUT)
    stack = sgmv.AdapterStack.from_adapters(drawn(rng), W=W, bias=bias)
    x, y = (rng.standard_normal((8, h), np.float32) for h in (H_IN, H_OUT))
    ids = np.arange(8) % len(RANKS)
    expected = sgmv.add_lora(y.copy(), x, stack, ids)
    other = sgmv.AdapterStack(H_IN, H_OUT, slots=9, dtype=np.float32)
    for i in stack:
        other.load(i, stack[i])
    for again in (other, copy.deepcopy(stack), pickle.loads(pickle.dumps(stack))):
        assert_same_bits(sgmv.add_lora(y.copy(), x, again, ids), expected, "loaded again")
    other.load(0, stack[0], W=2 * W)
    assert (sgmv.add_lora(y.copy(), x, other, ids)[0] != expected[0]).any(), "W given counts"
    other.load(0, stack[PLAIN])
    plain = sgmv.add_lora(y[:1].copy(), x[:1], stack, [PLAIN])
    assert_same_bits(sgmv.add_lora(y[:1].copy(), x[:1], other, [0]), plain, "the slot's gains went")
    stack.unload(0)
    stack.unload(2)
    stack.unload(3)
    assert stack.table.gains is None


def test_gains_move_with_the_weights(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is left of slabs that are emptied is somewhere else, and all of it."""
    for name, value in {"_slabs": type(memory._slabs)(), "_latest": None, "SLAB": 1 << 13}.items():
        monkeypatch.setattr(memory, name, value)
    W, ones = np.ones((32, 32), np.float32), np.ones(32, np.float32)
    stack = sgmv.AdapterStack(32, 32, slots=60, max_rank=16)
    for i in range(60):
        A = np.full((16 if i % 4 else 1, 32), i + 1, np.float32)
        stack.load(i, sgmv.Adapter(A, np.ones((32, len(A)), "f"), 1.0, ones), W=W, bias=ones)
    x, y = (rng.standard_normal((15, 32), np.float32) for _ in range(2))
    ids = 4 * np.arange(15)
    before, expected = stack.table.gains, sgmv.add_lora(y.copy(), x, stack, ids)
    for i in range(60):
        if i % 4:
            stack.unload(i)
    after = stack.table.gains
    assert before is not None
    assert after is not None
    assert (before[:, ids] != after[:, ids]).any(), "nothing was moved"
    held = memory.totals()
    assert held.slabs <= 1.5 * held.pieces + memory.SLAB
    assert_same_bits(sgmv.add_lora(y.copy(), x, stack, ids), expected, "moved")


def test_applied(rng: np.random.Generator) -> None:
    """The base product's W is the one of the gains; scalings given apart count in them."""
    x, W = (rng.standard_normal((n, H_IN), np.float32) for n in (5, H_OUT))
    adapter, ids = drawn(rng)[0], [0, 0, -1, 0, 0]
    A, B, m = adapter.A, adapter.B, adapter.magnitude
    assert m is not None
    given = sgmv.apply_batched(x, W, {0: adapter}, ids, 0.25)
    single = sgmv.apply_single(x, W, A, B, 0.25, m)
    whole = W + 0.25 * B @ A
    expected = x @ (m / np.linalg.norm(whole, axis=1) * whole.T)
    np.testing.assert_allclose(single, expected, rtol=1e-4, atol=1e-5)
    rows = [0, 1, 3, 4]
    np.testing.assert_allclose(given[rows], single[rows], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(given[2], x[2] @ W.T, rtol=1e-5, atol=1e-5)


def test_an_embedding_is_gained_like_a_one_hot_row(rng: np.random.Generator) -> None:
    stack = sgmv.AdapterStack.from_adapters(
        drawn(rng), W=rng.standard_normal((H_OUT, H_IN), np.float32)
    )
    tokens, ids = rng.integers(0, H_IN, 12), rng.integers(-1, len(RANKS), 12)
    y = rng.standard_normal((12, H_OUT), np.float32)
    one_hot = np.eye(H_IN, dtype=np.float32)[tokens]
    expected = sgmv.add_lora(y.copy(), one_hot, stack, ids)
    assert_same_bits(sgmv.add_lora_embedding(y, tokens, stack, ids), expected, "embedding")


def test_beside_others_it_is_alone_in_its_row(rng: np.random.Generator) -> None:
    """In a batch of several ids per row, rows that name it alone have the bits of a plain batch."""
    stack = sgmv.AdapterStack.from_adapters(
        drawn(rng), W=rng.standard_normal((H_OUT, H_IN), np.float32)
    )
    x, y = (rng.standard_normal((3, h), np.float32) for h in (H_IN, H_OUT))
    expected = sgmv.add_lora(y.copy(), x, stack, [0, 3, 2])
    stack.load(9, None)
    ids = [[0, -1], [-1, 3], [2, 9]]
    weights = [[1, 5], [5, 1], [1, 5]]
    for given in (None, weights):
        got = sgmv.add_lora(y.copy(), x, stack, ids, weights=given)
        assert_same_bits(got, expected, "alone in its row")
    v = sgmv.shrink(x, stack, sgmv.segment(ids))
    tokens = np.zeros(3, np.int64)
    before = y.copy()
    for wrong, its in (
        ([[0, 1], [-1, 3], [2, -1]], None),
        ([[0, -1], [3, 3], [2, -1]], None),
        ([[0, -1], [-1, 3], [2, -1]], [[1, 1], [1, 2], [1, 1]]),
    ):
        segments = sgmv.segment(wrong)
        for call in (
            lambda s=segments, w=its: sgmv.add_lora(y, x, stack, s, weights=w),
            lambda s=segments, w=its: sgmv.expand(v, stack, s, y, weights=w),
            lambda s=segments, w=its: sgmv.add_lora_embedding(y, tokens, stack, s, weights=w),
        ):
            with pytest.raises(ValueRangeError, match=r"magnitudes \(DoRA\) alone in its rows"):
                call()
    assert_same_bits(y, before, "refused")
    got = sgmv.add_lora(y.copy(), x, stack, [[1, 1], [-1, 3], [2, -1]])
    assert_same_bits(got[1:], expected[1:], "a mixture of plain adapters beside it")


def test_refusals_leave_the_stack_as_it_was(rng: np.random.Generator) -> None:
    adapter, W = drawn(rng)[0], rng.standard_normal((H_OUT, H_IN), np.float32)
    stack = sgmv.AdapterStack(H_IN, H_OUT)
    with pytest.raises(StackError, match=r"W: expected the layer's weight \(200, 130\)"):
        stack.load(0, adapter)
    for wrong in (W.T, W[1:], 3, [[1.0]]):
        with pytest.raises(ShapeError, match="W: expected"):
            stack.load(0, adapter, W=wrong)
    with pytest.raises(ShapeError, match="bias: expected"):
        stack.load(0, adapter, W=W, bias=np.ones(3))
    with pytest.raises(ShapeError, match="magnitude: expected"):
        sgmv.Adapter(adapter.A, adapter.B, 1.0, np.ones(3))
    short = Quantised(W)
    short.__class__ = type("Short", (Quantised,), {"__getitem__": lambda self, rows: W[:3]})
    with pytest.raises(ShapeError, match=r"W: expected 200 rows of 130 from W\[0:200\]"):
        stack.load(0, adapter, W=short)
    assert stack.ids == []
    stack.load(1, drawn(rng)[PLAIN], W="not read")
    assert stack.ids == [1]


FAULTS = {
    "gains of the first slot": Fault(
        "kernels.tasks", "item(table.gains, slot), item(", "item(table.gains, 0), item("
    ),
    "gains of the first columns": Fault(
        "kernels.loops", "gains[0] + c * size_of(gain_like)", "gains[0]"
    ),
    "offsets of the first columns": Fault(
        "kernels.loops", "gains[1] + c * size_of(gain_like)", "gains[1]"
    ),
    "the bias is scaled": Fault(
        "kernels.loops", " + decode(offsets[c], scaling)", ""
    ),
    "gains of y alone": Fault(
        "kernels.loops",
        "total = scaling * sums[c] + decode(y[c], scaling)",
        "total = decode(y[c], scaling)",
    ),
    "no task where there is no rank": Fault(
        "kernels.plan", "rank == 0 and (slot < 0", "rank == 0 and (True or slot < 0"
    ),
    "the scaling squared in norms": Fault("dora", "adapter.scaling * (", "adapter.scaling**2 * ("),
    "norms of B @ A alone": Fault("dora", "summed += block", "summed += 0 * block"),
    "norms not squared": Fault("dora", "np.sqrt(np.einsum(", "(np.einsum("),
    "the offset has the bias whole": Fault("dora", "(1 - gains[0].astype(np.float64))", "(1)"),
    "norms of another block": Fault("dora", "W[rows]", "W[: rows.stop - rows.start]"),
    "a slot keeps the gains of the one before": Fault("table", "gains[:, slot] = 0", "pass"),
}  # fmt: skip


def accept(modules: dict[str, ModuleType]) -> None:
    acceptance.sgmv = modules["sgmv"]  # type: ignore[assignment]
    acceptance.VECTOR_BITS = 0
    copy = modules["sgmv"]
    modules["sgmv.dora"].BLOCK = 7 * 70
    copy.set_num_threads(2)
    for case in batches.corpus():
        if len(case.x) <= 40:
            stack = stack_of(case)
            for i in (0, 2):  # into the other's slot
                adapter = stack[i]
                stack.unload(i)
                stack.load(i, adapter)
            y = copy.add_lora(case.y.copy(), case.x, stack, case.adapter_ids)
            case.check(y)
    before, after = stack[0], stack[2]  # one with gains, and one without
    for i in (0, 2):
        stack.unload(i)
    stack.load(2, after)
    stack.load(0, before)
    case.check(copy.add_lora(case.y.copy(), case.x, stack, case.adapter_ids))


@pytest.mark.once
def test_accepted_without_a_fault() -> None:
    assert verdict(accept, *SMALL_BLOCKS) == "nothing"


@pytest.mark.once
@pytest.mark.parametrize("fault", FAULTS)
def test_rejected(fault: str) -> None:
    assert verdict(accept, *SMALL_BLOCKS, FAULTS[fault]) != "nothing"
