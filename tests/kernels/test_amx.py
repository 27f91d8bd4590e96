"""Tile products, computed by the emulation: the same kernel, whose bits a model in numpy foretells.

No CPU with AMX has run these tests: what its compiler makes of the kernel is read as assembly.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

import sgmv
from reference.workloads import integer, popularity, real
from sgmv.cpu import JITTED, VECTOR_BITS
from sgmv.kernels.cpu import X86
from tests.help import acceptance, tile_checks
from tests.help.acceptance import assert_same_bits, check_case, check_rows_keep_their_bits, stack_of
from tests.help.bfloat16 import Matrix, flush
from tests.help.planting import Fault, plant, run_python
from tests.help.tile_products import product

BF16 = np.dtype(ml_dtypes.bfloat16)
pytestmark = [
    pytest.mark.skipif(not JITTED or VECTOR_BITS == 0, reason="no compiled tiles"),
    pytest.mark.usefixtures("one_blas_thread", "emulated_amx"),
]


# the model: the order of kernels/amx.py


def foretold(x: Matrix, wa: Matrix, chains: int = 1, block: int = 1024, step: int = 32) -> Matrix:
    x, wa = (np.pad(m.astype(np.float32), ((0, 0), (0, -m.shape[1] % 128))) for m in (x, wa))
    x, wa = flush(x), flush(wa)
    v = None
    for k in range(0, x.shape[1], block):
        sums = [np.zeros((len(x), len(wa)), np.float32) for _ in range(chains)]
        for i, s in enumerate(range(k, min(k + block, x.shape[1]), step)):
            sums[i % chains] = product(sums[i % chains], x[:, s : s + step], wa[:, s : s + step])
        while len(sums) > 1:
            sums = [a + b for a, b in zip(sums[::2], sums[1::2], strict=True)]
        v = sums[0] if v is None else v + sums[0]
    return v


LENGTHS = (*range(1, 18), 31, 32, 33, 49, 97)
RANKS = (*range(1, 18), 24, 31, 32, 33, 64)


def operands(name: str, h_in: int) -> tuple[Matrix, list[Matrix], np.ndarray]:
    """Rows of x, wa of each adapter, ids: every row count of a panel, every rank of a tile."""
    rng = np.random.default_rng(h_in)
    ids = rng.permutation(np.repeat(np.arange(len(LENGTHS)), LENGTHS))
    scale = {"normal": 0, "near underflow": -63, "overflowing": 62}[name]
    spread = 0 if name == "normal" else 6

    def draw(rows: int) -> Matrix:
        values = rng.standard_normal((rows, h_in)) * 2.0 ** rng.integers(
            scale - spread, scale + spread + 1, (rows, h_in)
        )
        return values.astype(BF16)

    x = draw(len(ids))
    was = [draw(r) for r in rng.permutation(RANKS)]
    if name == "near underflow":
        x[::3, ::2] *= BF16.type(2.0**-60)  # subnormal themselves, or as products
        x[::5] *= BF16.type(0)
    if name == "overflowing":
        x[::7, 0], x[3::7, -1], was[2][0, 0] = np.inf, np.nan, -np.inf
    return x, was, ids


@pytest.mark.once
@np.errstate(all="ignore")
@pytest.mark.parametrize("name", ["normal", "near underflow", "overflowing"])
@pytest.mark.parametrize("h_in", [1, 2, 31, 33, 128, 129, 200, 1024, 1057])
def test_every_bit_is_foretold(h_in: int, name: str) -> None:
    x, was, ids = operands(name, h_in)
    stack = sgmv.AdapterStack.from_adapters([(wa, np.zeros((1, len(wa)), BF16)) for wa in was])
    expected = np.zeros((len(x), stack.max_rank), np.float32)
    for adapter_id, wa in enumerate(was):
        expected[ids == adapter_id, : len(wa)] = foretold(x[ids == adapter_id], wa)
    in_order = np.argsort(ids, kind="stable")
    backwards = np.zeros((2 * len(x), h_in), BF16)[::-2]
    backwards[:] = x[in_order]
    # Rows of a segment that are anywhere, at one stride, and at one that is negative.
    for threads, rows, these in (
        (1, slice(None), x),
        (5, slice(None), x),
        (1, in_order, x[in_order]),
        (5, in_order, backwards),
    ):
        sgmv.set_num_threads(threads)
        segments = sgmv.segment(ids[rows])
        v = sgmv.shrink(these, stack, segments, backend="amx")
        there = expected[rows][segments.rows]
        np.testing.assert_array_equal(v, there)
        number = ~np.isnan(v)
        np.testing.assert_array_equal(np.signbit(v[number]), np.signbit(there)[number])


@pytest.mark.once
@pytest.mark.parametrize(
    "other", [{"chains": 2}, {"chains": 4}, {"block": 512}, {"step": 16}, {"step": 64}], ids=str
)
def test_another_order_would_be_noticed(other: dict[str, int]) -> None:
    x, was, _ids = operands("normal", 1057)
    assert (foretold(x, was[0]) != foretold(x, was[0], **other)).mean() > 0.1


@pytest.mark.once
def test_subnormal_numbers_are_0() -> None:
    """As x, as a weight, as a product, as a sum; each float32 below 2**-126 is lost, no other."""
    every = np.arange(2**16).astype(np.uint16).view(BF16)[:, None]
    one = np.ones((1, 1), BF16)
    with np.errstate(invalid="ignore"):
        expected = flush(every.astype(np.float32))
        stack = sgmv.AdapterStack.from_adapters([(one, one), (every[:512], one.repeat(512, 1))])
        as_x = sgmv.shrink(every, stack, sgmv.segment(np.zeros(len(every), int)), backend="amx")
        as_weight = sgmv.shrink(one, stack, sgmv.segment([1]), backend="amx")
    np.testing.assert_array_equal(as_x[:, :1], expected)
    np.testing.assert_array_equal(as_weight[0], expected[:512, 0])
    half = np.full((1, 1), 2.0**-63, BF16)
    pair = sgmv.AdapterStack.from_adapters([(np.array([[1.5, -1.0]], BF16) * half, one)])
    for x, v in (([1, 0], 1.5 * 2.0**-126), ([1, 1], 0.0), ([0.5, 0], 0.0)):
        found = sgmv.shrink(np.array([x], BF16) * half, pair, sgmv.segment([0]), backend="amx")
        assert found[0, 0] == np.float32(v), x


# right, and the same bits


@pytest.mark.once
@pytest.mark.parametrize("number", range(0, 27, 4))
def test_shapes(number: int) -> None:
    tile_checks.check_shapes([number], BF16)


@pytest.mark.parametrize("y", ["float32", "float16", "bfloat16"])
def test_within_the_bound(y: str) -> None:
    tile_checks.check_mix("bfloat16", "bfloat16", y)


def test_the_whole_corpus() -> None:
    for case in acceptance.corpus(100_000, [BF16]):
        check_case(case)


@pytest.mark.once
def test_nan_all_around_is_not_read_or_written() -> None:
    tile_checks.check_guards([("bfloat16", "bfloat16", "float32")], tile_checks.EDGES)


@pytest.mark.once
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks Linux for fenced pages")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
@pytest.mark.parametrize("at_end", [True, False], ids=["fence after", "fence before"])
def test_no_byte_outside_is_touched(at_end: bool) -> None:
    tile_checks.check_fences(("bfloat16", "bfloat16", "float32"), at_end)


def test_same_row_same_bits(rng: np.random.Generator) -> None:
    """Alone, shuffled, in other company, on 1 to 5 threads."""
    for h_in, r in ((1, 1), (70, 17), (129, 5), (1300, 40)):
        A, B = rng.standard_normal((r, h_in)).astype(BF16), rng.standard_normal((9, r)).astype(BF16)
        stack = sgmv.AdapterStack.from_adapters([(A, B), (A[: r // 2], B[:, : r // 2])])
        ids = rng.integers(-1, 2, 40)
        x, y = (rng.standard_normal((40, h)).astype(BF16) for h in (h_in, 9))
        check_rows_keep_their_bits(rng, y, x, stack, ids, (1, 2, 5), "amx")


@pytest.mark.once
def test_long_segments_cut_for_threads_and_ranks() -> None:
    ids = popularity("skewed", 300, seed=1)
    ranks = dict(enumerate([33, 16, 8, 64, 7, 1, 128, 20] * 8))
    check_case(integer("cuts", "a lost rank", ids, ranks, 2100, 130, dtype=BF16))
    case = real("cuts", "a rank summed twice", ids, ranks, 2100, 130, dtype=BF16)
    stack, ys = stack_of(case), []
    for threads in (1, 2, 3, 8):
        sgmv.set_num_threads(threads)
        ys.append(sgmv.add_lora(case.y.copy(), case.x, stack, ids, backend="amx"))
        assert_same_bits(ys[-1], ys[0], f"{threads} threads")


# what the compiler makes of it for a CPU that has it

SAPPHIRE_RAPIDS = {
    "NUMBA_CPU_NAME": "sapphirerapids",
    "NUMBA_CPU_FEATURES": "+avx2,+fma,+f16c,+avx512f,+avx512bw,+avx512dq,+avx512vl,"
    "+amx-tile,+amx-bf16",
}
COMPILE = """
import numpy as np
from sgmv import amx
from sgmv.kernels import jit
amx.unit = lambda: amx.CPU
amx.shrink_kernel()
(kernel,) = jit._entries.values()
print(*kernel.inspect_asm().values())
"""
# One or two tiles read in place (4, 5) by one or two panels (6, 7): a step of each form.
STEPS = [
    [f"tileloadd {4 + i}" for i in range(m)]
    + [
        line
        for q in range(n)
        for line in (
            f"tileloadd {6 + q}",
            *(f"tdpbf16ps {6 + q} {4 + i} {2 * i + q}" for i in range(m)),
        )
    ]
    for m in (1, 2)
    for n in (1, 2)
]
EXPAND_STEP = ["tileloadd 4"] + [
    line for q in range(4) for line in (f"tileloadd {6 + q % 2}", f"tdpbf16ps {6 + q % 2} 4 {q}")
]


def tile_instructions(program: str, folder: Path) -> list[str]:
    """With their registers, in the order of the assembly."""
    done = run_python(program, NUMBA_CACHE_DIR=str(folder), SGMV_AMX=None, **SAPPHIRE_RAPIDS)
    assert done.returncode == 0, done.stderr
    return [
        " ".join([word, *re.findall(r"%tmm(\d)", operands)])
        for word, operands in re.findall(r"^\t(ldtile\w+|tile\w+|tdp\w+)(.*)", done.stdout, re.M)
    ]


def check_steps(found: list[str], forms: list[list[str]]) -> None:
    """Products come in whole steps of these forms; each form clears and stores its sums once."""
    assert found.count("ldtilecfg") == found.count("tilerelease") == 1
    left = " ".join(line for line in found if not re.match("ldtile|tilere|tilez|tilest", line))
    for form in sorted(forms, key=len, reverse=True):
        step = " ".join(form)
        assert step in left, form
        left = re.sub(rf"{step}( |$)", "", left)
    assert left == ""
    for word in ("tilezero", "tilestored"):
        registers = sorted(line for line in found if line.startswith(word))
        sums = (line.split()[-1] for form in forms for line in form if line.startswith("tdp"))
        assert registers == sorted(f"{word} {register}" for register in sums)


@pytest.mark.once
@pytest.mark.compiles
@pytest.mark.skipif(not X86, reason="another processor's assembly")
def test_assembly_of_sapphire_rapids(tmp_path: Path) -> None:
    """Registers as meant, form by form, and no tile that goes through the stack."""
    check_steps(tile_instructions(COMPILE, tmp_path), STEPS)


@pytest.mark.once
@pytest.mark.compiles
@pytest.mark.skipif(not X86, reason="another processor's assembly")
def test_assembly_of_expand(tmp_path: Path) -> None:
    program = COMPILE.replace("shrink_kernel()", "expand_kernel(np.int16(0))")
    check_steps(tile_instructions(program, tmp_path), [EXPAND_STEP])


# planted faults

FAULTS = {
    "a panel that no product reads": Fault(
        "kernels.amx", "e.load_tile(PANELS[q], there", "e.load_tile(PANELS[0], there"
    ),
    "K blocks overwrite instead of adding": Fault("kernels.amx", "int(k == 0)", "int(k >= 0)"),
    "ranks are added twice": Fault(
        "kernels.amx",
        "builder.and_(e.below(high, SIDE), builder.not_(e.below(low, SIDE)))",
        "e.below(high, SIDE)",
    ),
    "the high parts alone": Fault(
        "kernels.amx_expand", "rest = b.select(finite, rest,", "rest = b.select(finite, value,"
    ),
    "pairs do not come again": Fault(
        "kernels.amx_expand", "SIDE), half)]", "SIDE), b.add(half, half))]"
    ),
}


@pytest.mark.once
@pytest.mark.compiles
@pytest.mark.parametrize("fault", FAULTS)
def test_the_trial_finds_faults(fault: str, tmp_path: Path) -> None:
    """Before the first use, wherever that is: a warning, and the float32 tiles."""
    folder = plant(tmp_path, FAULTS[fault])
    program = "from sgmv import amx; print(amx.is_on())"
    done = run_python(program, folder, SGMV_AMX="emulate", NUMBA_OPT="0")  # compiles faster
    assert done.stdout.strip() == "False", done.stderr
    assert "AMX gave wrong sums" in done.stderr
