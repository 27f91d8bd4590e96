"""The kernels, tile by tile: every shape, every mix of types, every edge; and nothing beside it.

The loops go through the same checks. Tiles with a fault are tried in processes of their own; those
for narrower vectors, and a machine without any, in test_cpu.py.
"""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import sgmv
from benchmarks.studies import instructions
from reference import compare
from reference.workloads import integer, real
from sgmv.cpu import JITTED, VECTOR_BITS
from sgmv.kernels import cpu
from sgmv.kernels.cpu import X86
from sgmv.kernels.emit import LANES
from sgmv.kernels.tile_kernels import K_BLOCK, PAIRS_BLOCK
from tests.help.acceptance import backends_of, check, check_case, stack_of, type_mixes
from tests.help.bfloat16 import flush, fused
from tests.help.planting import Fault, run_python
from tests.help.tile_checks import (
    EDGES,
    MIXES,
    RANKS,
    TYPES,
    WIDTHS,
    batch_of_shapes,
    check_fences,
    check_guards,
    check_load,
    check_mix,
    check_shapes,
    check_store,
)

pytestmark = pytest.mark.usefixtures("one_blas_thread")
jitted = pytest.mark.skipif(not JITTED, reason="Python loops take minutes at these widths")
vectors = pytest.mark.skipif(VECTOR_BITS == 0, reason="this CPU, or this run, has no tiles")


@jitted
@pytest.mark.parametrize("number", range(27))
def test_every_shape(number: int) -> None:
    check_shapes([number])


@jitted
@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("number", range(0, 27, 3))
def test_every_third_shape_in_16_bits(number: int, dtype: Any) -> None:
    check_shapes([number], dtype)


def test_shapes_hold_every_pair_and_every_width() -> None:
    cases = [batch_of_shapes(number) for number in range(27)]
    pairs = {(rows, len(case.adapters[rows][0])) for case in cases for rows in case.adapters}
    assert pairs == set(itertools.product(range(1, 14), RANKS))
    assert {case.x.shape[1] for case in cases} == set(WIDTHS)
    assert {case.y.shape[1] for case in cases} == set(WIDTHS)


LOPSIDED = {
    "10,000 slots": lambda name: integer(
        name, "a search among slots", [7_777], dict.fromkeys(range(10_000), 2), 33, 65
    ),
    "fewer rows than adapters": lambda name: integer(
        name, "S = n", [250, 3, 99], dict.fromkeys(range(300), 5), 65, 130
    ),
    "one long segment, many short": lambda name: integer(
        name,
        "blocks of unequal length",
        np.random.default_rng(0).permutation([0] * 3000 + list(range(1, 201))),
        {i: 1 + i % 9 for i in range(201)},
        65,
        130,
    ),
    "two rows, ids far apart": lambda name: integer(
        name, "ids of many digits", [2**62, 0], {0: 3, 2**62: 4}, 17, 70
    ),
}


@jitted
@pytest.mark.parametrize("name", LOPSIDED)
def test_lopsided_batches(name: str) -> None:
    case = LOPSIDED[name](name)
    for threads in (1, 2, 5):
        sgmv.set_num_threads(threads)
        check_case(case)


@settings(max_examples=60)
@given(data=st.data())
def test_any_batch(data: st.DataObject) -> None:
    """Random shapes, ranks, ids, strides, types and threads: exact."""
    most = 200 if JITTED else 40
    h_in, h_out = data.draw(st.integers(1, most)), data.draw(st.integers(1, most))
    ranks = dict(enumerate(data.draw(st.lists(st.integers(0, 40), min_size=1, max_size=5))))
    ids = data.draw(st.lists(st.sampled_from([-1, *ranks]), max_size=40))
    types = [TYPES[data.draw(st.sampled_from(list(TYPES)))] for _ in range(3)]
    sgmv.set_num_threads(data.draw(st.integers(1, 4)))
    case = integer(
        "hypothesis",
        "a batch nobody thought of",
        ids,
        ranks,
        h_in,
        h_out,
        dtype=types[0],
        weight_dtype=types[1],
        y_dtype=types[2],
    )
    apart = [data.draw(st.sampled_from([(1, 1), (1, 2), (3, 1), (-1, 1), (2, -1)])) for _ in "xy"]
    for name in backends_of(case):
        x, y = (strided(a, *steps) for a, steps in zip((case.x, case.y), apart, strict=True))
        sgmv.add_lora(y, x, stack_of(case), case.adapter_ids, backend=name)
        check(case, y.copy(), name)


def strided(array: np.ndarray, rows_apart: int, columns_apart: int) -> np.ndarray:
    """The same values in a larger array, so many rows and columns apart."""
    n, h = array.shape
    shape = (n * abs(rows_apart) + 1, h * abs(columns_apart) + 3)
    wide = np.full(shape, np.nan, np.float32).astype(array.dtype)
    view = wide[::rows_apart, ::columns_apart][:n, :h]
    view[:] = array
    return view


# every mix of types


@jitted
@pytest.mark.parametrize("mix", type_mixes(TYPES))
def test_every_mix_of_types(mix: tuple[str, str, str]) -> None:
    """x, weights, y: several K blocks and panels, each with a remainder, within the bound."""
    check_mix(*mix)


@jitted
@vectors
@pytest.mark.parametrize("dtype", TYPES.values(), ids=TYPES)
def test_tiles_and_loops_differ_by_no_more_than_the_bounds_of_both(dtype: Any) -> None:
    ids = np.arange(64) % 3
    case = real("both", "a bias", ids, {0: 8, 1: 16, 2: 64}, 4096, 4096, dtype=dtype)
    ys = {
        name: sgmv.add_lora(case.y.copy(), case.x, stack_of(case), ids, backend=name)
        for name in ("tiles", "loops")
    }
    compare.check(ys["tiles"], ys["loops"].astype(np.float64), 2 * case.bound)
    compare.check_no_worse(ys["tiles"], ys["loops"], case.expected)


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_y_is_rounded_to_nearest_even(name: str) -> None:
    """Ties, overflow to inf, subnormals, NaN."""
    check_store(name)


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_every_bit_pattern_is_read_exactly(name: str) -> None:
    check_load(name)


@pytest.mark.parametrize("mix", MIXES, ids="-".join)
def test_nan_all_around_is_not_read_or_written(mix: tuple[str, ...]) -> None:
    check_guards([mix], EDGES if JITTED else EDGES[:4])


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks Linux for fenced pages")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
@pytest.mark.parametrize("at_end", [True, False], ids=["fence after", "fence before"])
@pytest.mark.parametrize("mix", MIXES, ids="-".join)
def test_no_byte_outside_is_touched(mix: tuple[str, ...], at_end: bool) -> None:
    """Not even one that is read and dropped: in a child, which would not survive it."""
    check_fences(mix, at_end)


# what the compiler made of them


@pytest.mark.once
@pytest.mark.compiles
@jitted
@vectors
@pytest.mark.skipif(not X86, reason="another processor's assembly")
def test_inner_loops_keep_their_sums_in_registers() -> None:
    """With 4 weights before 3 values, 16 registers were one too few: half the speed."""
    found = [loop for loop in instructions.loops("float32") if not loop.masked]
    assert {loop.kernel for loop in found} == {"tiles_shrink", "tiles_expand"}
    assert max(loop.multiplies for loop in found) >= 12
    for loop in found:
        assert loop.spills <= loop.multiplies // 12, loop


@pytest.mark.once
@jitted
@pytest.mark.parametrize("arm", ["neoverse-n1", "apple-m1"])
@pytest.mark.parametrize("dtype", TYPES)
def test_loops_for_arm_keep_their_sums_in_registers(dtype: str, arm: str) -> None:
    """A tile for each number of rows up to 6, and its sums in 24 of the 32 registers or fewer.

    Beside 24 fused multiply-adds a loop loads 10 vectors, and widens those of 16 bits.
    """
    found = [loop for loop in instructions.loops(dtype, arm) if not loop.masked]
    for kernel, sums in {"tiles_shrink": [8, 16, 16, 20, 24, 24], "tiles_expand": None}.items():
        loops = [loop for loop in found if loop.kernel == kernel]
        multiplies = sorted(loop.multiplies for loop in loops)
        assert sums in (None, multiplies)
        assert multiplies[-1] == 24
        for loop in loops:
            assert loop.spills == 0, loop
            if loop.multiplies == 24:
                assert loop.instructions <= (40 if dtype == "float32" else 50), loop


@pytest.mark.once
@pytest.mark.compiles
@jitted
@vectors
def test_weights_asked_for_ahead_change_no_bit() -> None:
    """As on a CPU where it pays; asking may go beyond the weights, and touches nothing there."""
    always = Fault("kernels.tiles", "and ASKS_AHEAD:", "and True:")
    done = run_python(
        f"from tests.help import tile_checks; tile_checks.plant_here({tuple(always)!r})\n"
        "from sgmv.kernels import jit, tile_kernels, tiles\n"
        "import numpy as np\n"
        "tile_kernels.shrink_kernel(np.float32(0), np.float32(0))\n"
        "[kernel] = jit._entries.values()\n"
        "[assembly] = kernel.inspect_asm().values()\n"
        "print(assembly.count('prefetch') + assembly.count('prfm') >= tiles.RANKS[1])\n"
        "tile_checks.check_guards(tile_checks.MIXES[:1], tile_checks.EDGES[:4])\n"
        "tile_checks.check_shapes([0, 5])"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "True"


def widening(widens: bool) -> Fault:
    """What this CPU does not do, or does."""
    choices = "import HALVES_BFLOAT16, SUMS_BFLOAT16"
    return Fault("kernels.tile_kernels", f"{choices}, WIDENS", f"{choices}; WIDENS = {widens}")


@pytest.mark.once
@pytest.mark.compiles
@jitted
@vectors
@pytest.mark.parametrize("widens", [True, False])
def test_many_rows_have_the_bits_of_each_alone_widened_or_not(widens: bool) -> None:
    done = run_python(
        f"from tests.help import tile_checks; tile_checks.plant_here({tuple(widening(widens))!r})\n"
        "for x, w in ('float16', 'float16'), ('bfloat16', 'bfloat16'), ('float32', 'bfloat16'):\n"
        "    tile_checks.check_many_rows(x, w)\n"
        "    tile_checks.check_many_rows(x, w, wide=True)\n"
        "print('checked')",
        NUMBA_OPT="0",  # compiles faster
    )
    assert done.stdout.strip() == "checked", done.stderr


# planted faults

FAULTS = {
    "lanes are added up in another order": (
        Fault("kernels.emit", "for c in (0, LANES) for lane", "for c in (LANES, 0) for lane"),
        "check_shapes([2])",
    ),
    "the last k are not masked": (
        Fault("kernels.tiles", "e.below(e.builder.sub(width, k), per_vector)", "None"),
        "check_guards(MIXES[:1], EDGES[:4])",
    ),
    "the last k are dropped": (
        Fault(
            "kernels.tiles", "sums = e.loop(whole, width, per_vector, sums, masked_step)", "pass"
        ),
        "check_shapes([1])",
    ),
    "K blocks overwrite instead of adding": (
        Fault(
            "kernels.tiles", 'fresh = builder.icmp_signed("=="', 'fresh = builder.icmp_signed(">="'
        ),
        "check_shapes([10])",
    ),
    "ranks past the last are stored": (
        Fault(
            "kernels.tiles",
            "e.store(total, targets[m], types.float32, present)",
            "e.store(total, targets[m], types.float32)",
        ),
        "check_guards(MIXES[:1], EDGES[:4])",
    ),
    "weights of the wrong rank": (
        Fault("kernels.tiles", "e.at_most(q, last)", "e.at_most(max(q - 1, 0), last)"),
        "check_shapes([2])",
    ),
    "a rank past the last is read, and dropped": (
        Fault("kernels.tiles", "e.at_most(q, last)", "e.add(q)"),
        "check_fences(MIXES[0], True)",
    ),
    "the last columns are dropped": (
        Fault("kernels.tiles", "e.loop(whole, high, LANES, [], remainder)", "pass"),
        "check_shapes([2])",
    ),
    "bfloat16 is truncated": (
        Fault(
            "kernels.emit",
            "rounded = b.add(b.add(bits, numbers(0x7FFF)), odd)",
            "rounded = bits",
        ),
        "check_store('bfloat16')",
    ),
    "many rows take what is widened in another order": (
        Fault("kernels.widened", "part * LANES * 4", "(1 - part) * LANES * 4"),
        "check_many_rows('float16', 'float16')",
    ),
    "the rows of x that are widened are others": (
        Fault("kernels.widened", "rows[p + m]", "rows[m]"),
        "check_many_rows('float16', 'float16')",
    ),
    "the weights of the next rank are copied": (
        Fault("kernels.tiles", "e.multiply(copies[1], place)", "e.multiply(copies[1], last)"),
        "check_many_rows('float32', 'float32', wide=True)",
    ),
    "the last weights of a K block are not copied": (
        Fault("kernels.tiles", "if copies:  # a", "if copies and mask is None:  # a"),
        "check_many_rows('float32', 'float32', wide=True)",
    ),
    "panels that are widened are others": (
        Fault("kernels.tile_kernels", " + c * task.r * size_of(w_like)", ""),
        "check_many_rows('float16', 'float16')",
    ),
}


@pytest.mark.once
@pytest.mark.compiles
@jitted
@vectors
@pytest.mark.parametrize("fault", [None, *FAULTS])
def test_planted_faults_are_rejected(fault: str | None) -> None:
    """Without one, the same way of planting is accepted."""
    nothing = Fault("kernels.tiles", "Y_AHEAD = 512", "Y_AHEAD = 256")
    change, hunter = FAULTS.get(fault, (nothing, "check_guards(MIXES[:1], EDGES[:4])"))
    faults = tuple(change), tuple(widening(True))
    program = (
        f"from tests.help import tile_checks; tile_checks.plant_here(*{faults!r})\n"
        f"print('planted', flush=True)\neval({hunter!r}, vars(tile_checks))\nprint('accepted')"
    )
    done = run_python(program, NUMBA_OPT="0")  # compiles faster
    if fault is None:
        assert done.stdout.split() == ["planted", "accepted"], done.stderr
    else:
        assert done.stdout.split() == ["planted"], done.stderr
        assert "AssertionError" in done.stderr


PRODUCTS = """
import sys, numpy as np, ml_dtypes, sgmv
x, A = (np.load(path).view(ml_dtypes.bfloat16) for path in sys.argv[1:3])
stack = sgmv.AdapterStack.from_adapters([(A, np.zeros((1, len(A)), A.dtype))])
np.save(sys.argv[3], sgmv.shrink(x, stack, sgmv.segment([0] * len(x)), backend="tiles"))
"""


@jitted
@vectors
@pytest.mark.skipif(
    not (cpu.SUMS_BFLOAT16 or cpu.HALVES_BFLOAT16), reason="bfloat16 is not taken in pairs"
)
@pytest.mark.parametrize("scale", [1.0, 2.0**-63], ids=["normal", "subnormal"])
def test_products_of_bfloat16_in_pairs_give_the_bits_of_fused_ones(
    tmp_path: Path, scale: float
) -> None:
    """An odd k before the even one below it, each rounded once; the CPU's own flush subnormals.

    Lanes, blocks of k and what is left over are held by 4,500 k; SGMV_BFLOAT16=exact keeps
    subnormal numbers.
    """
    rng = np.random.default_rng(0)
    n, r, h_in = 40, 33, 2 * PAIRS_BLOCK + 2 * LANES * 14 + 5
    paths = [tmp_path / f"{name}.npy" for name in ("x", "A", "v")]
    x, A = ((rng.standard_normal((m, h_in)) * scale).astype(ml_dtypes.bfloat16) for m in (n, r))
    for path, array in zip(paths, (x, A), strict=False):
        np.save(path, array.view(np.uint16))
    found = {}
    for setting in (None, "exact"):
        done = run_python(PRODUCTS, arguments=[str(path) for path in paths], SGMV_BFLOAT16=setting)
        assert done.returncode == 0, done.stderr
        found[setting] = np.load(paths[2])
    summed = summed_in_pairs(x[:7], A[:9])  # of 40 rows and 33 ranks, which are widened
    np.testing.assert_array_equal(found[None][:7, :9].view(np.int32), summed.view(np.int32))
    exact = x.astype(np.float64) @ A.astype(np.float64).T
    size = np.abs(x.astype(np.float64)) @ np.abs(A.astype(np.float64)).T
    bound = h_in * 2.0**-23 * size + h_in * 2.0**-149
    assert (np.abs(found["exact"] - exact) <= bound).all()
    flushed = (np.abs(found[None] - exact) > bound).any()
    assert flushed == (scale != 1.0 and cpu.SUMS_BFLOAT16)


def summed_in_pairs(x: np.ndarray, A: np.ndarray) -> np.ndarray:
    """What the tiles sum by the instruction's definition, or by two for it, in numpy.

    Source: Intel 64 and IA-32 Architectures Software Developer's Manual, volume 2: VDPBF16PS.
    """
    block_of, made = (PAIRS_BLOCK, flush) if cpu.SUMS_BFLOAT16 else (K_BLOCK, np.float32)
    x, A = (made(a.astype(np.float32)) for a in (x, A))
    v = np.zeros((len(x), len(A)), np.float32)
    for block in range(0, x.shape[1], block_of):
        width = min(block_of, x.shape[1] - block)
        padded = -(-width // (2 * LANES)) * 2 * LANES
        xb, Ab = np.zeros((len(x), padded)), np.zeros((len(A), padded))
        xb[:, :width], Ab[:, :width] = (a[:, block : block + width] for a in (x, A))
        lanes = np.zeros((len(x), len(A), LANES), np.float32)
        for k in range(0, padded, 2 * LANES):
            for odd in (1, 0):
                at = slice(k + odd, k + 2 * LANES, 2)
                lanes = made(fused(xb[:, None, at], Ab[None, :, at], lanes))
        while lanes.shape[2] > 1:
            lanes = lanes[:, :, 0::2] + lanes[:, :, 1::2]
        v = v + lanes[:, :, 0]
    return v
