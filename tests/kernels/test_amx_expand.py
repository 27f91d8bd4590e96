"""Expand by tile products, computed by the emulation: its bits are those of a model in numpy."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

import sgmv
from sgmv.cpu import JITTED, VECTOR_BITS
from tests.help import tile_checks
from tests.help.bfloat16 import Matrix, flush, fused
from tests.help.tile_products import product

BF16 = np.dtype(ml_dtypes.bfloat16)
pytestmark = [
    pytest.mark.skipif(not JITTED or VECTOR_BITS == 0, reason="no compiled tiles"),
    pytest.mark.usefixtures("one_blas_thread", "emulated_amx"),
]

# the model: the order of kernels/amx_expand.py

LENGTHS = (1, 2, 15, 16, 17, 31, 33, 97)
RANKS = (9, 10, 15, 16, 17, 31, 32, 33, 64, 65)


def cut_off(values: Matrix) -> Matrix:
    """The first 8 bits of each significand."""
    return (values.astype(np.float32).view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)


def parts_of(v: Matrix) -> tuple[Matrix, Matrix, Matrix]:
    """Low, middle and high part; the high one alone where v is not finite."""
    high = cut_off(v)
    rest = np.where(np.isfinite(v), v - high, 0).astype(np.float32)
    middle = cut_off(rest)
    return rest - middle, middle, np.where(np.isnan(v), v, high)


def foretold(v: Matrix, B: Matrix, order: tuple[int, ...] = (0, 1, 2), step: int = 32) -> Matrix:
    """v @ B.T, B (h_out, r)."""
    v, B = (np.pad(m.astype(np.float32), ((0, 0), (0, m.shape[1] % 2))) for m in (v, B))
    parts = parts_of(v)
    a = flush(np.concatenate([parts[i] for i in order], axis=1))
    b = flush(np.concatenate([B] * (3 + step), axis=1))
    a = np.pad(a, ((0, 0), (0, -a.shape[1] % step)))
    sums = np.zeros((len(v), len(B)), np.float32)
    for k in range(0, a.shape[1], step):
        sums = product(sums, a[:, k : k + step], b[:, k : k + step])
    return sums


def draw(rng: np.random.Generator, shape: tuple[int, int], name: str) -> Matrix:
    scale, spread = {"normal": (0, 0), "near underflow": (-63, 6), "overflowing": (62, 6)}[name]
    powers = rng.integers(scale - spread, scale + spread + 1, shape)
    return (rng.standard_normal(shape) * 2.0**powers).astype(np.float32)


@pytest.mark.once
@np.errstate(all="ignore")
@pytest.mark.parametrize("name", ["normal", "near underflow", "overflowing"])
@pytest.mark.parametrize("r", RANKS)
@pytest.mark.parametrize("y_type", ["float32", "bfloat16"])
def test_every_bit_is_foretold(r: int, name: str, y_type: str) -> None:
    rng = np.random.default_rng(r)
    h_out, scaling = 201, np.float32(0.7)
    ids = rng.permutation(np.repeat(np.arange(len(LENGTHS)), LENGTHS))
    segments = sgmv.segment(ids)
    v = draw(rng, (len(ids), r), name)
    if name == "near underflow":
        v[::3] *= np.float32(2.0**-40)  # parts that are subnormal
        v[::5] = 0
    if name == "overflowing":
        v[::7, 0], v[3::7, -1], v[5::7, 1] = np.inf, np.nan, np.float32(3.4e38)
    Bs = [draw(rng, (h_out, r), name).astype(BF16) for _ in LENGTHS]
    adapters = [sgmv.Adapter(np.zeros((r, 1), BF16), B, scaling) for B in Bs]
    stack = sgmv.AdapterStack.from_adapters(adapters)
    y = draw(rng, (len(ids), h_out), name).astype(tile_checks.TYPES[y_type])
    expected = y.copy()
    for s, adapter_id in enumerate(segments.adapter_ids):
        p = slice(segments.seq_start[s], segments.seq_start[s + 1])
        rows = segments.rows[p]
        sums = foretold(v[p], Bs[adapter_id])
        expected[rows] = fused(scaling, sums, y[rows].astype(np.float32)).astype(y.dtype)
    for threads in (1, 5):
        sgmv.set_num_threads(threads)
        found = sgmv.expand(v, stack, segments, y.copy(), backend="amx")
        wide = found.astype(np.float32), expected.astype(np.float32)
        np.testing.assert_array_equal(*wide)
        number = ~np.isnan(wide[0])
        np.testing.assert_array_equal(*(np.signbit(one[number]) for one in wide))


@pytest.mark.once
@pytest.mark.parametrize(
    "other", [{"order": (2, 1, 0)}, {"order": (1, 0, 2)}, {"step": 16}, {"step": 64}], ids=str
)
def test_another_order_would_be_noticed(other: dict[str, int]) -> None:
    rng = np.random.default_rng(0)
    v, B = draw(rng, (50, 64), "normal"), draw(rng, (200, 64), "normal").astype(BF16)
    assert (foretold(v, B) != foretold(v, B, **other)).any()


@pytest.mark.once
def test_three_parts_hold_every_number() -> None:
    """Random bits; what is left out is below 2**-126, and only where v is below 2**-102."""
    rng = np.random.default_rng(0)
    v = rng.integers(0, 2**32, 100_000, dtype=np.uint64).astype(np.uint32).view(np.float32)
    v = v[np.isfinite(v)][None]
    parts = [flush(part) for part in parts_of(v)]
    assert all(np.array_equal(part, part.astype(BF16)) for part in parts)
    lost = np.abs(sum(part.astype(np.float64) for part in parts) - v)
    large = np.abs(v) > 2.0**-102
    assert (lost[large] == 0).all()
    assert (lost < 3 * 2.0**-126).all()


@pytest.mark.once
@pytest.mark.parametrize("h_out", [64, 100, 130])
def test_weights_that_are_not_finite(h_out: int) -> None:
    """inf stays inf where v is exact in bfloat16, and the other columns keep their bits."""
    rng = np.random.default_rng(h_out)
    B = draw(rng, (h_out, 16), "normal").astype(BF16)
    bad = B.copy()
    bad[-1, 3], bad[1, 15] = np.inf, np.nan
    v = rng.integers(1, 9, (20, 16)).astype(np.float32)
    ys = []
    for weights in (B, bad):
        stack = sgmv.AdapterStack.from_adapters([(np.zeros((16, 1), BF16), weights)])
        segments = sgmv.segment(np.zeros(20, int))
        for threads in (1, 3):
            sgmv.set_num_threads(threads)
            y = np.zeros((20, h_out), np.float32)
            ys.append(sgmv.expand(v, stack, segments, y, backend="amx"))
        np.testing.assert_array_equal(ys[-2], ys[-1])
    good, found = ys[0], ys[-1]
    assert np.isposinf(found[:, -1]).all()
    assert np.isnan(found[:, 1]).all()
    clean = np.ones(h_out, bool)
    clean[[1, -1]] = False
    np.testing.assert_allclose(found[:, clean], good[:, clean], rtol=1e-5, atol=1e-5)
    beyond = np.arange(h_out) // 64 == (1 if h_out > 128 else -1)  # of a panel that is finite
    np.testing.assert_array_equal(found[:, beyond], good[:, beyond])


@pytest.mark.once
@pytest.mark.parametrize("r", [1, 8])
def test_few_ranks_have_the_bits_of_the_tiles(r: int) -> None:
    rng = np.random.default_rng(r)
    A, B = draw(rng, (r, 40), "normal").astype(BF16), draw(rng, (130, r), "normal").astype(BF16)
    stack = sgmv.AdapterStack.from_adapters([(A, B)])
    segments = sgmv.segment(np.zeros(50, int))
    v = draw(rng, (50, r), "normal")
    ys = [np.zeros((50, 130), BF16) for _ in range(2)]
    for y, backend in zip(ys, ("amx", "tiles"), strict=True):
        sgmv.expand(v, stack, segments, y, backend=backend)
    np.testing.assert_array_equal(*ys)
