"""Same row, same bits; and nothing else is touched."""

from __future__ import annotations

import itertools
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest

import sgmv
from reference.workloads import Workload, integer, popularity, real
from sgmv import workspace
from sgmv.kernels import cpu, emit, loops, tile_kernels, tiles
from sgmv.kernels.records import PANEL, RANK_UNIT, WIDE_PANEL
from tests.conftest import JITTED
from tests.help.acceptance import (
    assert_same_bits,
    backends,
    backends_of,
    check,
    check_case,
    check_same_bits,
    stack_of,
)


def test_200_random_batches(rng: np.random.Generator) -> None:
    """Alone, shuffled, in other company, on 1 to 5 threads: always the same bits."""
    check_same_bits(rng, batches=200 if JITTED else 8, threads=(1, 2, 5), wide=JITTED)


@pytest.mark.skipif(not JITTED, reason="Python loops take minutes at these widths")
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16, np.float64])
@pytest.mark.parametrize(("h_in", "h_out"), [(4096, 4096), (3424, 1025), (1023, 11008)])
def test_several_blocks_and_threads(h_in: int, h_out: int, dtype: type) -> None:
    """Widths of several K and column blocks, enough work to wake helpers for."""
    ids = popularity("skewed", 150, seed=3) - 1
    ranks = {i: r for i, r in enumerate([1, 8, 17, 64, 3, 16, 5, 130, 2, 12, 9])}
    # At these widths the derived bound would hide a lost column; integers show it to the bit.
    check_case(integer("blocks", "a lost column", ids, ranks, h_in, h_out, dtype=dtype))
    case = real("blocks", "cuts that move with the batch", ids, ranks, h_in, h_out, dtype=dtype)
    for backend in backends(dtype):
        _check_bits_of_threads_and_lone_rows(case, backend)


def _check_bits_of_threads_and_lone_rows(case: Workload, backend: str) -> None:
    stack, ids = stack_of(case), case.adapter_ids
    sgmv.set_num_threads(1)
    expected = sgmv.add_lora(case.y.copy(), case.x, stack, ids, backend=backend)
    check(case, expected, backend)
    for threads in (2, 3, 8):
        sgmv.set_num_threads(threads)
        y = sgmv.add_lora(case.y.copy(), case.x, stack, ids, backend=backend)
        assert_same_bits(y, expected, f"{backend}, {threads} threads")
    for i in range(0, len(ids), 7):
        one = slice(i, i + 1)
        alone = sgmv.add_lora(case.y[one].copy(), case.x[one], stack, ids[one], backend=backend)
        assert_same_bits(alone, expected[one], f"{backend}, alone")


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16, np.float64])
def test_bits_do_not_depend_on_the_way_of_calling(dtype: type) -> None:
    """From ids, from Segments, or in two steps: the same kernels on the same rows."""
    case = real(
        "ways", "two orders of summation", [2, 0, -1, 1, 0, 0], RANKS, 1100, 130, dtype=dtype
    )
    stack, segments = stack_of(case), sgmv.segment(case.adapter_ids)
    for backend in backends(dtype):
        how = {"backend": backend}
        expected = sgmv.add_lora(case.y.copy(), case.x, stack, case.adapter_ids, **how)
        y = sgmv.add_lora(case.y.copy(), case.x, stack, segments, **how)
        assert_same_bits(y, expected, f"{backend}, from segments")
        v = sgmv.shrink(case.x, stack, segments, **how)
        y = sgmv.expand(v, stack, segments, case.y.copy(), **how)
        assert_same_bits(y, expected, f"{backend}, in two steps")


def test_bits_do_not_depend_on_strides(rng: np.random.Generator) -> None:
    case = real("strides", "another loop for another layout", [0, 1, 0], {0: 9, 1: 4}, 300, 200)
    stack = stack_of(case)
    for backend in backends_of(case):
        how = {"backend": backend}
        expected = sgmv.add_lora(case.y.copy(), case.x, stack, case.adapter_ids, **how)
        x, y = np.asfortranarray(case.x), np.asfortranarray(case.y)
        sgmv.add_lora(y, x, stack, case.adapter_ids, **how)
        assert_same_bits(np.ascontiguousarray(y), expected, f"{backend}, Fortran order")


def test_another_process_gives_the_same_bits() -> None:
    program = (
        "import sgmv; from reference.workloads import real; "
        "from tests.help.acceptance import stack_of; "
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
    x = np.ones((64, 10), np.float32)
    for backend, array in itertools.product(backends(y.dtype), (y.copy(), np.asfortranarray(y))):
        array[::2] = 1.0
        sgmv.add_lora(array, x, stack, ids, backend=backend)
        unchanged = np.ascontiguousarray(array[1::2]).view(np.uint32)
        np.testing.assert_array_equal(unchanged, before[1::2].view(np.uint32))
        assert (array[::2] != 1.0).all()


pytestmark = pytest.mark.usefixtures("one_blas_thread")
RANKS = {0: 5, 1: 0, 2: 9}


def test_scratch_is_written_before_it_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """New memory holds NaN or huge numbers here; without the jit, the kernels' own as well."""
    empty = np.empty

    def poisoned(shape: object, dtype: object = float, *rest: object, **named: object) -> object:
        made = empty(shape, dtype, *rest, **named)
        made.fill(np.nan if np.dtype(dtype).kind == "f" else np.iinfo(dtype).max // 2)
        return made

    case = real("poisoned", "reads what was never written", [2, 0, -1, 1, 0], RANKS, 33, 40)
    stack = stack_of(case)
    for backend in backends_of(case):
        y = case.y.copy()
        with monkeypatch.context() as patch:
            patch.setattr(workspace, "_idle", [])  # no workspace that an earlier call has filled
            patch.setattr(np, "empty", poisoned)
            sgmv.add_lora(y, case.x, stack, case.adapter_ids, backend=backend)
        check(case, y, backend)


def test_blocks_are_multiples_of_what_shares_a_read() -> None:
    """Tasks may only be cut where the kernels cut by themselves."""
    assert RANK_UNIT % 4 == 0  # loops.dot4
    assert all(PANEL % (vectors * emit.LANES) == 0 for vectors in tiles.COLUMN_VECTORS.values())
    assert WIDE_PANEL % PANEL == 0
    assert loops.K_BLOCK % 64 == tile_kernels.K_BLOCK % emit.LANES == 0


def test_every_shape_of_a_tile_has_registers_for_its_sums() -> None:
    """A register of row sums holds whole rows; the sums leave room for what they are made of."""
    assert list(tiles.RANKS) == list(tiles.COLUMN_VECTORS) == [*range(1, tiles.MOST_ROWS + 1)]
    most = cpu.REGISTERS * 3 // 4 if cpu.FUSES else cpu.REGISTERS // 2
    for rows, ranks in tiles.RANKS.items():
        assert emit.LANES % ranks == 0 or ranks in (emit.LANES, 2 * emit.LANES)
        assert rows * ranks <= most
    for rows, vectors in tiles.COLUMN_VECTORS.items():
        assert rows * vectors <= most
