"""Same row, same bits; and nothing else is touched."""

from __future__ import annotations

import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest

import sgmv
from reference.workloads import integer, popularity, real
from sgmv.kernels import loops
from tests.acceptance import assert_same_bits, check_case, check_same_bits, stack_of
from tests.conftest import JITTED


def test_200_random_batches(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """Alone, shuffled, in other company, on 1 to 5 threads: always the same bits."""
    monkeypatch.setattr(sys.modules["sgmv.workers"], "WORTH_WAKING", 0)
    check_same_bits(rng, batches=200 if JITTED else 8, threads=(1, 2, 5), wide=JITTED)


@pytest.mark.skipif(not JITTED, reason="Python loops take minutes at these widths")
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16, np.float64])
@pytest.mark.parametrize(("h_in", "h_out"), [(4096, 4096), (3424, 1025), (1023, 11008)])
def test_several_blocks_and_threads(
    h_in: int, h_out: int, dtype: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Widths of several K and column blocks, long enough that helpers really join."""
    monkeypatch.setattr(sys.modules["sgmv.workers"], "WORTH_WAKING", 0)
    ids = popularity("skewed", 150, seed=3) - 1
    ranks = {i: r for i, r in enumerate([1, 8, 17, 64, 3, 16, 5, 130, 2, 12, 9])}
    # At these widths the derived bound would hide a lost column; integers show it to the bit.
    check_case(integer("blocks", "a lost column", ids, ranks, h_in, h_out, dtype=dtype))
    case = real("blocks", "cuts that move with the batch", ids, ranks, h_in, h_out, dtype=dtype)
    stack = stack_of(case)
    sgmv.set_num_threads(1)
    expected = sgmv.add_lora(case.y.copy(), case.x, stack, ids)
    case.check(expected)
    for threads in (2, 3, 8):
        sgmv.set_num_threads(threads)
        y = sgmv.add_lora(case.y.copy(), case.x, stack, ids)
        assert_same_bits(y, expected, f"{threads} threads")
    for i in range(0, 150, 7):
        alone = sgmv.add_lora(case.y[i : i + 1].copy(), case.x[i : i + 1], stack, ids[i : i + 1])
        assert_same_bits(alone, expected[i : i + 1], "alone")


def test_bits_do_not_depend_on_strides(rng: np.random.Generator) -> None:
    case = real("strides", "another loop for another layout", [0, 1, 0], {0: 9, 1: 4}, 300, 200)
    stack = stack_of(case)
    expected = sgmv.add_lora(case.y.copy(), case.x, stack, case.adapter_ids)
    x = np.asfortranarray(case.x)
    y = np.asfortranarray(case.y)
    sgmv.add_lora(y, x, stack, case.adapter_ids)
    assert_same_bits(np.ascontiguousarray(y), expected, "Fortran order")


def test_another_process_gives_the_same_bits() -> None:
    program = (
        "from reference.workloads import real; from tests.acceptance import stack_of; import sgmv;"
        "c = real('process', '', [0, 1, 0, -1] * 9, {0: 17, 1: 8}, 200, 90);"
        "y = sgmv.add_lora(c.y.copy(), c.x, stack_of(c), c.adapter_ids); print(y.tobytes().hex())"
    )
    command = [sys.executable, "-c", program]
    runs = {subprocess.run(command, capture_output=True, check=True).stdout for _ in range(2)}
    case = real("process", "", [0, 1, 0, -1] * 9, {0: 17, 1: 8}, 200, 90)
    here = sgmv.add_lora(case.y.copy(), case.x, stack_of(case), case.adapter_ids)
    assert {run.decode().strip() for run in runs} == {here.tobytes().hex()}


def test_base_rows_keep_even_odd_bits(rng: np.random.Generator) -> None:
    """Every bit pattern there is: signalling NaNs, -0.0, subnormals."""
    y = rng.integers(0, 2**32, (64, 50), np.uint32).view(np.float32)
    y[::2] = 1.0
    before = y.copy()
    A, B = np.ones((4, 10), np.float32), np.ones((50, 4), np.float32)
    stack = sgmv.AdapterStack.from_adapters({0: (A, B), 3: None})
    ids = np.array([0, -1, 0, 3] * 16)
    for array in (y, np.asfortranarray(y)):
        sgmv.add_lora(array, np.ones((64, 10), np.float32), stack, ids)
        unchanged = np.ascontiguousarray(array[1::2]).view(np.uint32)
        np.testing.assert_array_equal(unchanged, before[1::2].view(np.uint32))
        assert (array[::2] != 1.0).all()


RANKS = {0: 5, 1: 0, 2: 9}


@pytest.mark.parametrize("r", [1, 3, 4, 5, 8, 9, 17])
def test_nothing_outside_the_arrays_is_read_or_written(
    r: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """x, v, y and the weights stand amid NaN: a read past an end shows, and so does a write."""
    monkeypatch.setattr(sys.modules["sgmv.adapters"].AdapterStack, "_store", _store_amid_nan)
    case = real("amid NaN", "reads past the end", [0, 1, 0, 0, 0, 0], {0: r, 1: r}, 37, 29)
    x, x_around = _amid_nan(case.x)
    y, y_around = _amid_nan(case.y)
    stack = stack_of(case)
    segments = sgmv.segment(case.adapter_ids)
    v, v_around = _amid_nan(np.ascontiguousarray(sgmv.shrink(x, stack, segments)))
    sgmv.expand(v, stack, segments, y)
    case.check(y.copy())
    for around in (x_around, y_around, v_around):
        assert np.isnan(around[:8]).all()
        assert np.isnan(around[-8:]).all()


def _amid_nan(array: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    around = np.full(array.size + 16, np.nan, array.dtype)
    inside = around[8:-8].reshape(array.shape)
    inside[:] = array
    return inside, around


def _store_amid_nan(self: sgmv.AdapterStack, adapter: sgmv.Adapter) -> object:
    stored = sys.modules["sgmv.adapters"].Stored
    wa, _ = _amid_nan(np.ascontiguousarray(adapter.A))
    wb, _ = _amid_nan(np.ascontiguousarray(adapter.B.T))
    return stored(wa, wb, adapter.scaling)


def test_scratch_is_written_before_it_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """New memory holds NaN or huge numbers here; without the jit, the kernels' own as well."""
    empty = np.empty

    def poisoned(shape: object, dtype: object = float, *rest: object, **named: object) -> object:
        made = empty(shape, dtype, *rest, **named)
        made.fill(np.nan if np.dtype(dtype).kind == "f" else np.iinfo(dtype).max // 2)
        return made

    case = real("poisoned", "reads what was never written", [2, 0, -1, 1, 0], RANKS, 33, 40)
    stack = stack_of(case)
    y = case.y.copy()
    with monkeypatch.context() as patch:
        patch.setattr(np, "empty", poisoned)
        sgmv.add_lora(y, case.x, stack, case.adapter_ids)
    case.check(y)


def test_blocks_are_multiples_of_what_shares_a_read() -> None:
    """Tasks may only be cut where the kernels cut by themselves."""
    assert loops.K_BLOCK % 64 == 0
    assert loops.COLUMN_BLOCK % 64 == 0
    assert loops.RANK_BLOCK == 4
