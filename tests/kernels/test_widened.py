"""16-bit floats widened for a task of many rows: the bits of each row alone, and no other read."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

import sgmv
from sgmv import products
from sgmv.cpu import JITTED, VECTOR_BITS
from sgmv.kernels import emit, widened
from sgmv.kernels.jit import address_of, jit
from sgmv.kernels.plan import RANKS_IN_L2
from sgmv.kernels.tile_kernels import FEW_ROWS, MANY_RANKS, MANY_ROWS
from sgmv.kernels.tiles import MOST_ROWS
from tests.help import tile_checks
from tests.help.acceptance import assert_same_bits
from tests.help.tile_checks import TYPES

pytestmark = pytest.mark.skipif(
    not JITTED or not VECTOR_BITS, reason="tiles are emitted, and need vectors"
)


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("types", [(x, w) for x in TYPES for w in TYPES], ids="-".join)
def test_many_rows_have_the_bits_of_each_alone(types: tuple[str, str], wide: bool) -> None:
    tile_checks.check_many_rows(*types, wide)


@pytest.mark.parametrize("r", [2 * MANY_RANKS + 1, RANKS_IN_L2 + 5])
def test_slices_of_many_rows_have_the_bits_of_each_alone(r: int) -> None:
    """Slices share the rows of x that are widened, and have ranks of their own side by side."""
    rng = np.random.default_rng(0)
    n, h_in = MANY_ROWS + 2, 1100

    def drawn(*shape: int) -> Any:
        return rng.standard_normal(shape).astype(ml_dtypes.bfloat16)

    x, slices = drawn(n, h_in), [products.stack_of("A", drawn(1, r, h_in)) for _ in range(3)]
    weights = tuple(stack.weights for stack in slices)
    sgmv.set_num_threads(1)

    def v(rows: Any) -> Any:
        segments = sgmv.segment(np.zeros(len(rows), np.int64))
        return products.shrink(rows, weights, segments, np.dtype(np.float32))

    together = v(x)
    exact = np.concatenate(
        [x.astype(float) @ stack.array[0].astype(float).T for stack in slices], 1
    )
    np.testing.assert_allclose(together, exact, atol=h_in * 2.0**-20)
    for i in (0, 5, n - 1):
        assert_same_bits(v(x[i : i + 1]), together[i : i + 1], f"row {i}")


@pytest.mark.parametrize("count", [1, emit.LANES, emit.LANES + 3, 2 * emit.LANES, 70])
@pytest.mark.parametrize("dtype", [np.uint16, np.int16])
def test_every_element_once_and_zeros_up_to_a_whole_step(count: int, dtype: Any) -> None:
    """Odd before even where products take bfloat16 so; NaN behind the last is not read.

    Where the CPU multiplies bfloat16 itself, it is widened to meet other types alone.
    """
    name = "float16" if dtype == np.uint16 else "bfloat16"
    in_halves = emit.HALVES_BFLOAT16 and name == "bfloat16"
    step = 2 * emit.LANES if in_halves else emit.LANES
    padded = -(-count // step) * step
    given = np.full(count + 64, np.nan, TYPES[name])
    given[:count] = np.arange(1, count + 1)
    found = np.full(padded + 64, 7, np.float32)
    other = np.float32(0) if emit.SUMS_BFLOAT16 else dtype(0)
    assert _widen(dtype(0), other, given.view(dtype), count, found) == padded
    expected = np.zeros(padded, np.float32)
    expected[:count] = given[:count]
    if in_halves:
        expected = expected.reshape(-1, emit.LANES, 2)[:, :, ::-1].transpose(0, 2, 1).reshape(-1)
    np.testing.assert_array_equal(found[:padded], expected)
    assert (found[padded:] == 7).all()


@jit()
def _widen(like: Any, other: Any, given: Any, count: int, found: Any) -> Any:
    return widened.widen(like, other, like, address_of(given), count, address_of(found))


def test_a_room_is_kept_while_it_is_large_enough() -> None:
    room = widened.room_of(np.empty(0, np.float32), 100)
    start = widened.start_of(room)
    assert start % 64 == 0
    assert start + 400 <= room.ctypes.data + room.nbytes
    assert widened.room_of(room, 50) is room
    assert len(widened.room_of(room, 1000)) >= 1000


def test_groups_of_more_than_few_rows_are_full_or_one_short() -> None:
    """There are no tiles of fewer that copy weights, or read rows from the room."""
    for n in range(FEW_ROWS + 1, 400):
        groups = -(-n // MOST_ROWS)
        assert n // groups >= MOST_ROWS - 1
