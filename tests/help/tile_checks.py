"""What tiles must pass: every shape, every mix of types, every edge, and nothing beside it.

For this process, and for others whose tiles are narrower, or hold a fault.
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

import sgmv
from reference.workloads import Workload, integer, real
from sgmv import backend, launch, table
from sgmv.checks import check_matrix
from sgmv.cpu import JITTED, VECTOR_BITS
from sgmv.errors import SgmvError
from sgmv.kernels import emit, plan, tile_kernels
from sgmv.kernels.records import PANEL
from tests.help import acceptance
from tests.help.acceptance import backends, backends_of, check, check_case, stack_of
from tests.help.planting import outcome, replaced

TYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
WIDTHS = (1, 15, 16, 17, 63, 64, 65, 127, 1023, 1024, 1025, 3424)
# In the order of their imports: what is compiled from one is compiled anew from the next.
PLANTED = ("kernels.emit", "kernels.tiles", "kernels.widened", "kernels.tile_kernels", "backend")
RANKS = (*range(1, 21), 31, 32, 33, 64, 65, 128, 512)


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


@np.errstate(invalid="ignore")
def check_load(name: str) -> None:
    """Every bit pattern of x, A, B and y means what numpy says."""
    bits = np.arange(0, 2**16, 1 if JITTED else 97).astype(np.uint16)
    stored, wide = bits.view(TYPES[name]), np.float32
    expected = stored.astype(wide)
    one, many = np.ones((1, 1), TYPES[name]), stored[:, None]
    for backend_name in backends(np.float32):
        how = {"backend": backend_name}
        shrunk = expected.copy()
        if backend.flushes(backend_name, one.dtype, one.dtype):
            shrunk[np.abs(shrunk) < np.finfo(np.float32).smallest_normal] = 0
        stack = sgmv.AdapterStack.from_adapters([(one, one)])
        y = np.zeros((len(bits), 1), wide)
        sgmv.add_lora(y, many, stack, np.zeros(len(bits), int), **how)
        np.testing.assert_array_equal(y[:, 0], shrunk)
        stack = sgmv.AdapterStack.from_adapters([(many, np.zeros_like(stored)[None])])
        v = sgmv.shrink(one, stack, sgmv.segment([0]), **how)
        np.testing.assert_array_equal(v[0], shrunk)
        stack = sgmv.AdapterStack.from_adapters([(one, many)])
        y = np.zeros((1, len(bits)), wide)
        sgmv.add_lora(y, one, stack, [0], **how)
        np.testing.assert_array_equal(y[0], expected)
        stack = sgmv.AdapterStack.from_adapters([(one, np.zeros_like(many))])
        y = many.T.copy()
        sgmv.add_lora(y, one, stack, [0], **how)
        np.testing.assert_array_equal(y[0].astype(wide), expected)


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
    launch.run_shrink(backend.kernels(name, *kinds[:2], None), stack.table, batch, x, v)
    launch.run_expand(backend.kernels(name, None, *kinds[1:]), stack.table, batch, v, y)


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


def check_fences(mix: tuple[str, ...], at_end: bool) -> None:
    check_case(case_of_edges(1, 1, mix))  # compiles here what is not compiled yet
    assert outcome(lambda: run_between_fences(mix, at_end)) == "nothing"


# narrower vectors, or none, in processes of their own


def check_briefly(bits: int) -> None:
    """A sample of these checks for a process whose vectors are forced to this width."""
    assert bits == VECTOR_BITS
    chosen = backend.choose(None, np.dtype(np.float32))
    if bits == 0:
        assert (chosen, backends(np.float32)) == ("loops", ["loops"])
        with pytest.raises(SgmvError, match="loops where tiles have no vectors"):
            backend.choose("tiles", np.dtype(np.float32))
        check_shapes(range(0, 27, 2))
        return
    assert (chosen, emit.LANES) == ("tiles", bits // 32)
    acceptance.BACKENDS = ("tiles",)  # the loops do not depend on the vectors' width
    check_shapes(range(27))
    check_guards(MIXES, EDGES)
    for mix in MIXES:
        check_mix(*mix)
    for name in ("float16", "bfloat16"):
        check_store(name)
        check_load(name)


def plant_here(*faults: tuple[str, str, str]) -> None:
    """Let this process compile its tiles from the changed source; all else comes from the cache.

    faults  (module, text, its replacement) of each
    """
    for name in PLANTED:
        package, _, short = f"sgmv.{name}".rpartition(".")
        source = Path(sys.modules[f"sgmv.{name}"].__file__).read_text()
        for module, text, instead in faults:
            source = replaced(source, text, instead) if name == module else source
        fresh = sys.modules[f"sgmv.{name}"] = ModuleType(f"sgmv.{name}")
        setattr(sys.modules[package], short, fresh)
        exec(compile(source, f"planted {name}", "exec"), vars(fresh))
    for caller in ("lora", "shrink", "expand"):
        sys.modules[f"sgmv.{caller}"].kernels = sys.modules["sgmv.backend"].kernels
    globals()["backend"] = sys.modules["sgmv.backend"]
    acceptance.BACKENDS = ("tiles",)


def round_to(values: np.ndarray, name: str) -> np.ndarray:
    """To nearest even, straight from the value: the type's grid around it, in float64."""
    if name == "float16":
        return values.astype(np.float16).astype(np.float64)
    values = values.astype(np.float64)
    _, exponent = np.frexp(values)
    step = np.ldexp(1.0, np.maximum(exponent - 8, -133))
    rounded = np.where(np.isfinite(values), np.rint(values / step) * step, values)
    largest = float(ml_dtypes.finfo(ml_dtypes.bfloat16).max)
    return np.where(np.abs(rounded) > largest, np.copysign(np.inf, rounded), rounded)


def check_many_rows(x: str, weights: str, wide: bool = False) -> None:
    """A task of many rows and ranks, on one thread: each row has the bits that it has alone.

    Of 33 ranks and 2,100 columns the last do not stay in L2 with the first, and follow them.
    wide: more ranks than stay in L2, as an expert has; the last of 2,100 k do not fill a vector.
    """
    many, rank, h_in = tile_kernels.FEW_ROWS + 2, 2 * tile_kernels.MANY_RANKS + 1, 1100
    if wide:
        many, rank, h_in = tile_kernels.MANY_ROWS + 2, plan.RANKS_IN_L2 + rank, 2100
    ids, ranks = [0] * many + [1] * 5, {0: rank, 1: 3}
    case = real(
        f"many rows {x}, {weights}", "another order", ids, ranks, h_in, 2100,
        dtype=TYPES[x], weight_dtype=TYPES[weights],
    )  # fmt: skip
    stack, ids = stack_of(case), case.adapter_ids
    sgmv.set_num_threads(1)
    together = sgmv.add_lora(case.y.copy(), case.x, stack, ids, backend="tiles")
    check(case, together, "tiles")
    for i in range(0, len(ids), 5):
        row = slice(i, i + 1)
        alone = sgmv.add_lora(case.y[row].copy(), case.x[row], stack, ids[row], backend="tiles")
        acceptance.assert_same_bits(alone, together[row], f"row {i}")
