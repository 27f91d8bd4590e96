"""The kernels, tile by tile: every shape, every mix of types, every edge; and nothing beside it.

The loops go through the same checks. The tiles for narrower vectors, and a machine without any,
are tried in processes of their own, and so are tiles with a fault.
"""

from __future__ import annotations

import ctypes
import itertools
import mmap
import sys
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import sgmv
from benchmarks import instructions
from reference import compare
from reference.workloads import Workload, integer, real
from sgmv import backend, launch, table
from sgmv.checks import check_matrix
from sgmv.errors import SgmvError
from sgmv.kernels import emit, tiles
from sgmv.kernels.call import PANEL
from sgmv.kernels.jit import JITTED, VECTOR_BITS, X86
from tests.help import acceptance
from tests.help.acceptance import backends, backends_of, check, check_case, stack_of, type_mixes
from tests.help.planting import Fault, outcome, run_python
from tests.kernels.test_floats import round_to

pytestmark = pytest.mark.usefixtures("one_blas_thread")
jitted = pytest.mark.skipif(not JITTED, reason="Python loops take minutes at these widths")
vectors = pytest.mark.skipif(VECTOR_BITS == 0, reason="this CPU, or this run, has no tiles")
TYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
WIDTHS = (1, 15, 16, 17, 63, 64, 65, 127, 1023, 1024, 1025, 3424)
RANKS = (*range(1, 21), 31, 32, 33, 64, 65, 128, 512)


# every shape


def batch_of_shapes(number: int, dtype: Any = np.float32) -> Workload:
    """Segments of 1 to 13 rows, each of another rank: 27 batches bring every pair of these."""
    h_in = WIDTHS[number % 12]
    h_out = WIDTHS[(5 * number + number // 12) % 12]
    ranks = {m: RANKS[(m + number) % len(RANKS)] for m in range(1, 14)}
    ids = np.random.default_rng(number).permutation(np.repeat(list(ranks), list(ranks)))
    name = f"shapes {number}: {h_in} to {h_out}, {np.dtype(dtype).name}"
    return integer(name, "an edge of a tile", ids, ranks, h_in, h_out, dtype=dtype)


def check_shapes(numbers: Iterable[int], dtype: Any = np.float32) -> None:
    """Bit for bit, on one thread and on several, where the blocks are cut."""
    for number, threads in itertools.product(numbers, (1, 5)):
        sgmv.set_num_threads(threads)
        check_case(batch_of_shapes(number, dtype))


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


def check_mix(x: str, weights: str, y: str) -> None:
    case = real(
        f"mix of {x}, {weights}, {y}",
        "a type read as another, or rounded twice",
        [0, 1, -1, 0, 2, 2, 2, 2, 2, 1, 2, 2],
        {0: 3, 1: 40, 2: 17},
        1100,
        200,
        dtype=TYPES[x],
        weight_dtype=TYPES[weights],
        y_dtype=TYPES[y],
    )
    check_case(case)


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


def values_to_round(name: str) -> np.ndarray:
    """Every value of the 16-bit type, and float32 numbers on and around the middle of each two."""
    bits = np.arange(2**16 if JITTED else 2**9, dtype=np.uint16) * np.uint16(1 if JITTED else 128)
    with np.errstate(invalid="ignore", over="ignore"):
        exact = bits.view(TYPES[name]).astype(np.float32)
        above = (bits + np.uint16(1)).view(TYPES[name]).astype(np.float32)
        middle = ((exact.astype(np.float64) + above) / 2).astype(np.float32)
        around = [np.nextafter(middle, np.float32(way)) for way in (np.inf, -np.inf)]
    return np.concatenate([exact, middle, *around])


def check_store(name: str) -> None:
    """y = 0 + 1 * value: rounded once, to nearest even; whole vectors, and a masked last column."""
    values = values_to_round(name)
    x, one = values[:, None], np.ones((1, 1), np.float32)
    columns = PANEL + 1
    B = np.ones((columns, 1), np.float32)
    stack = sgmv.AdapterStack.from_adapters([(one, B)])
    ids = np.zeros(len(x), np.int64)
    with np.errstate(invalid="ignore", over="ignore"):
        expected = round_to(np.float32(0) + values, name)
    for backend_name in backends(np.float32):
        y = np.zeros((len(x), columns), TYPES[name])
        with np.errstate(invalid="ignore", over="ignore"):
            sgmv.add_lora(y, x, stack, ids, backend=backend_name)
            actual = y.astype(np.float64)
        np.testing.assert_array_equal(actual, np.repeat(expected[:, None], columns, axis=1))


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_y_is_rounded_to_nearest_even(name: str) -> None:
    """Ties, overflow to inf, subnormals, NaN."""
    check_store(name)


@np.errstate(invalid="ignore")
def check_load(name: str) -> None:
    """Every bit pattern of x, A, B and y means what numpy says."""
    bits = np.arange(0, 2**16, 1 if JITTED else 97).astype(np.uint16)
    stored, wide = bits.view(TYPES[name]), np.float32
    expected = stored.astype(wide)
    one, many = np.ones((1, 1), TYPES[name]), stored[:, None]
    for how in ({"backend": b} for b in backends(np.float32)):
        stack = sgmv.AdapterStack.from_adapters([(one, one)])
        y = np.zeros((len(bits), 1), wide)
        sgmv.add_lora(y, many, stack, np.zeros(len(bits), int), **how)
        np.testing.assert_array_equal(y[:, 0], expected)
        stack = sgmv.AdapterStack.from_adapters([(many, np.zeros_like(stored)[None])])
        v = sgmv.shrink(one, stack, sgmv.segment([0]), **how)
        np.testing.assert_array_equal(v[0], expected)
        stack = sgmv.AdapterStack.from_adapters([(one, many)])
        y = np.zeros((1, len(bits)), wide)
        sgmv.add_lora(y, one, stack, [0], **how)
        np.testing.assert_array_equal(y[0], expected)
        stack = sgmv.AdapterStack.from_adapters([(one, np.zeros_like(many))])
        y = many.T.copy()
        sgmv.add_lora(y, one, stack, [0], **how)
        np.testing.assert_array_equal(y[0].astype(wide), expected)


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_every_bit_pattern_is_read_exactly(name: str) -> None:
    check_load(name)


# nothing beside it

GUARD = 64
MIXES = [("float32",) * 3, ("float16", "bfloat16", "float16"), ("bfloat16", "float16", "bfloat16")]
EDGES = [(1, 1), (15, 65), (17, 63), (37, 29), (64, 128), (1025, 130)]


def case_of_edges(h_in: int, h_out: int, mix: tuple[str, ...]) -> Workload:
    """Row counts and ranks on both sides of every tile's."""
    ranks = {m: r for m, r in enumerate([1, 3, 4, 5, 8, 9, 17, 0], 1)}
    ids = np.random.default_rng(h_in).permutation(np.repeat(list(ranks), list(ranks)))
    name = f"amid NaN, {h_in} to {h_out}, {mix}"
    types = dict(zip(("dtype", "weight_dtype", "y_dtype"), (TYPES[t] for t in mix), strict=True))
    return integer(name, "reads past an end", ids, ranks, h_in, h_out, **types)


def amid_nan(array: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """NaN before and after every row, and whole rows of it; a view of the array inside."""
    n, h = array.shape
    around = np.full((n + 2, h + 2 * GUARD), np.nan, np.float32).astype(array.dtype)
    inside = around[1:-1, GUARD:-GUARD]
    inside[:] = array
    return around, inside


def weights_amid_nan(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """In place of memory that starts on a cache line."""
    size = int(np.prod(shape))
    around = np.full(size + 2 * GUARD, np.nan, np.float32).astype(dtype)
    return around[GUARD : GUARD + size].reshape(shape)


def two_launches(
    name: str, stack: sgmv.AdapterStack, batch: sgmv.Segments, x: Any, y: Any, v: Any
) -> None:
    """Shrink, then expand, with this very v between them."""
    kinds = [check_matrix(side, a).dtype for side, a in (("x", x), ("y", y))]
    kinds.insert(1, stack.dtype)
    launch.launch(backend.kernels(name, *kinds[:2], None), stack.table, batch, x, None, v)
    launch.launch(backend.kernels(name, None, *kinds[1:]), stack.table, batch, None, y, v)


def check_guards(mixes: Iterable[tuple[str, ...]], edges: Iterable[tuple[int, int]]) -> None:
    for mix, (h_in, h_out), threads in itertools.product(mixes, edges, (1, 5)):
        sgmv.set_num_threads(threads)
        case = case_of_edges(h_in, h_out, mix)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(table, "aligned", weights_amid_nan)
            stack = stack_of(case)
        batch = sgmv.segment(case.adapter_ids)
        rank = np.repeat(stack.table.find(batch.adapter_ids)[1], batch.lengths)
        past_rank = np.arange(stack.max_rank) >= rank[:, None]
        for name in backends_of(case):
            x_around, x = amid_nan(case.x)
            y_around, y = amid_nan(case.y)
            v_around, v = amid_nan(np.full((batch.n, stack.max_rank), np.nan, np.float32))
            two_launches(name, stack, batch, x, y, v)
            check(case, y.copy(), name)
            assert np.isnan(v[past_rank]).all(), f"{name}, {case.name}: v past the rank"
            assert np.isfinite(v[~past_rank]).all()
            for around, inside in ((x_around, x), (y_around, y), (v_around, v)):
                inside[:] = np.nan
                assert np.isnan(around).all(), f"{name}, {case.name}: written outside"


@pytest.mark.parametrize("mix", MIXES, ids="-".join)
def test_nan_all_around_is_not_read_or_written(mix: tuple[str, ...]) -> None:
    check_guards([mix], EDGES if JITTED else EDGES[:4])


class Fences:
    """Memory that ends, or begins, exactly where a page begins that nobody may touch."""

    def __init__(self, at_end: bool) -> None:
        self.at_end = at_end
        self.protect = ctypes.CDLL(None, use_errno=True).mprotect
        self.kept: list[mmap.mmap] = []

    def empty(self, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        page, size = mmap.PAGESIZE, int(np.prod(shape)) * np.dtype(dtype).itemsize
        pages = -(-max(size, 1) // page) * page
        memory = mmap.mmap(-1, pages + 2 * page)
        self.kept.append(memory)
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        for fence in (address, address + page + pages):
            assert self.protect(ctypes.c_void_p(fence), ctypes.c_size_t(page), 0) == 0
        start = page + (pages - size if self.at_end else 0)
        return np.frombuffer(memory, np.uint8, size, start).view(dtype).reshape(shape)

    def copy(self, array: np.ndarray) -> np.ndarray:
        made = self.empty(array.shape, array.dtype)
        made[:] = array
        return made


def run_between_fences(mix: tuple[str, ...], at_end: bool) -> None:
    for (h_in, h_out), threads in itertools.product(EDGES if JITTED else EDGES[:3], (1, 5)):
        sgmv.set_num_threads(threads)
        case, fences = case_of_edges(h_in, h_out, mix), Fences(at_end)
        table.aligned = fences.empty
        stack, batch = stack_of(case), sgmv.segment(case.adapter_ids)
        for name in backends_of(case):
            x, y = fences.copy(case.x), fences.copy(case.y)
            v = fences.empty((batch.n, stack.max_rank), np.float32)
            two_launches(name, stack, batch, x, y, v)
            check(case, y.copy(), name)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks Linux for fenced pages")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
@pytest.mark.parametrize("at_end", [True, False], ids=["fence after", "fence before"])
@pytest.mark.parametrize("mix", MIXES, ids="-".join)
def test_no_byte_outside_is_touched(mix: tuple[str, ...], at_end: bool) -> None:
    """Not even one that is read and dropped: in a child, which would not survive it."""
    check_fences(mix, at_end)


def check_fences(mix: tuple[str, ...], at_end: bool) -> None:
    check_case(case_of_edges(1, 1, mix))  # compiles here what is not compiled yet
    assert outcome(lambda: run_between_fences(mix, at_end)) == "nothing"


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


# which backend


def test_the_backend_is_the_best_that_can(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SGMV_BACKEND", raising=False)
    best = "tiles" if VECTOR_BITS else "loops"
    single, double = np.dtype(np.float32), np.dtype(np.float64)
    assert backend.choose(None, single) == best
    assert backend.choose(None, double) == "loops"
    assert backend.choose("loops", single) == "loops"
    for asked in ("loops", "tiles"):
        monkeypatch.setenv("SGMV_BACKEND", asked)
        assert backend.choose(None, single) == (asked if VECTOR_BITS else "loops")
        assert backend.choose(None, double) == "loops"
    monkeypatch.setenv("SGMV_BACKEND", "cuda")
    with pytest.raises(SgmvError, match=r"^backend: expected amx, tiles or loops, got 'cuda'"):
        backend.choose(None, single)


@pytest.mark.once
@jitted
@vectors
def test_the_environment_names_the_backend() -> None:
    """The loops' bits, which on this batch are not the tiles'."""
    program = (
        "from tests.kernels.test_tiles import *;"
        "case = real('env', '', [0, 0], {0: 9}, 300, 70); print(default_bits(case))"
    )
    case = real("env", "", [0, 0], {0: 9}, 300, 70)
    bits = {}
    for name in ("tiles", "loops"):
        y = sgmv.add_lora(case.y.copy(), case.x, stack_of(case), [0, 0], backend=name)
        bits[name] = y.tobytes().hex()
    assert bits["tiles"] != bits["loops"]
    for name in ("tiles", "loops"):
        assert run_python(program, SGMV_BACKEND=name).stdout.strip() == bits[name]


def default_bits(case: Workload) -> str:
    return sgmv.add_lora(case.y.copy(), case.x, stack_of(case), [0, 0]).tobytes().hex()


# narrower vectors, or none, in processes of their own


def check_briefly(bits: int) -> None:
    """A sample of this file for a process whose vectors are forced to this width."""
    assert bits == VECTOR_BITS
    chosen = backend.choose(None, np.dtype(np.float32))
    if bits == 0:
        assert (chosen, backends(np.float32)) == ("loops", ["loops"])
        with pytest.raises(SgmvError, match="loops on a CPU without 256-bit vectors"):
            backend.choose("tiles", np.dtype(np.float32))
        check_shapes(range(0, 27, 2))
        return
    assert (chosen, emit.LANES, tiles.MOST_ROWS) == ("tiles", 8, 3)
    acceptance.BACKENDS = ("tiles",)  # the loops do not depend on the vectors' width
    check_shapes(range(27))
    check_guards(MIXES, EDGES)
    for mix in MIXES:
        check_mix(*mix)
    check_store("bfloat16")


@pytest.mark.once
@pytest.mark.compiles
@jitted
@vectors
@pytest.mark.parametrize("bits", [256, 0])
def test_forced_vectors(bits: int, tmp_path: Path) -> None:
    """A cache of its own: this one would be emptied by another width, and the other by this."""
    done = run_python(
        f"from tests.kernels import test_tiles; test_tiles.check_briefly({bits}); print('checked')",
        SGMV_VECTOR_BITS=str(bits),
        NUMBA_CACHE_DIR=str(tmp_path),
    )
    assert done.stdout.strip() == "checked", done.stderr


# planted faults

FAULTS = {
    "lanes are added up in another order": (
        Fault("kernels.emit", "for c in (0, LANES) for lane", "for c in (LANES, 0) for lane"),
        "check_shapes([2])",
    ),
    "the last k are not masked": (
        Fault("kernels.tiles", "e.below(e.builder.sub(width, k))", "None"),
        "check_guards(MIXES[:1], EDGES[:4])",
    ),
    "the last k are dropped": (
        Fault("kernels.tiles", "sums = e.loop(whole, width, LANES, sums, masked_step)", "pass"),
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
}


def plant_here(module: str, text: str, instead: str) -> None:
    """Let this process compile its tiles from the changed source; all else comes from the cache."""
    for name in ("kernels.emit", "kernels.tiles", "backend"):
        package, _, short = f"sgmv.{name}".rpartition(".")
        source = Path(sys.modules[f"sgmv.{name}"].__file__).read_text()
        if name == module:
            assert source.count(text) == 1, f"{text!r} stands {source.count(text)} times in {name}"
            source = source.replace(text, instead)
        fresh = sys.modules[f"sgmv.{name}"] = ModuleType(f"sgmv.{name}")
        setattr(sys.modules[package], short, fresh)
        exec(compile(source, f"planted {name}", "exec"), vars(fresh))
    for caller in ("lora", "shrink", "expand"):
        sys.modules[f"sgmv.{caller}"].kernels = sys.modules["sgmv.backend"].kernels
    globals()["backend"] = sys.modules["sgmv.backend"]
    acceptance.BACKENDS = ("tiles",)


@pytest.mark.once
@pytest.mark.compiles
@jitted
@vectors
@pytest.mark.parametrize("fault", [None, *FAULTS])
def test_planted_faults_are_rejected(fault: str | None) -> None:
    """Without one, the same way of planting is accepted."""
    nothing = Fault("kernels.tiles", "Y_AHEAD = 512", "Y_AHEAD = 256")
    change, hunter = FAULTS.get(fault, (nothing, "check_guards(MIXES[:1], EDGES[:4])"))
    program = (
        f"from tests.kernels import test_tiles; test_tiles.plant_here(*{tuple(change)!r})\n"
        f"print('planted', flush=True)\neval({hunter!r}, vars(test_tiles))\nprint('accepted')"
    )
    done = run_python(program)
    if fault is None:
        assert done.stdout.split() == ["planted", "accepted"], done.stderr
    else:
        assert done.stdout.split() == ["planted"], done.stderr
        assert "AssertionError" in done.stderr
