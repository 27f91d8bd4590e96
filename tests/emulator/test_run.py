"""How a launch is run: held to the reference's bounds, in every order of its blocks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import sgmv
from reference import compare
from reference.floats import float_type
from reference.workloads import popularity
from sgmv import emulator
from sgmv.emulator import Launch
from tests.help.emulated import EXPANDS, HALVES, IDS, KERNELS, SHRINKS, made, operands, product

pytestmark = pytest.mark.once


def rounded_apart(expected: Any, y: Any, bound: Any, dtype: np.dtype[Any]) -> Any:
    """What the bound grows by where the delta is rounded once more, before y is added."""
    kind = float_type(dtype)
    size = np.maximum(np.abs(expected - y.astype(np.float64)) + bound, kind.smallest_normal)
    return (1 + kind.unit_roundoff) * kind.unit_roundoff * size


UNSCALED = {"punica_sgmv_shrink", "punica_cutlass_expand", "sglang_csgmv_shrink"}
UNSCALED |= {"vllm_moe_shrink", "vllm_moe_expand"}


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("name", SHRINKS)
@pytest.mark.parametrize(("kind", "n"), [("distinct", 9), ("skewed", 70), ("identical", 130)])
def test_a_shrink_lies_within_the_bound(
    name: str, kind: str, n: int, dtype: np.dtype[Any], rng: np.random.Generator
) -> None:
    ids = popularity(kind, n)
    ids[3] = -1
    launch = made(name, ids, 768, 32)
    x, weights = operands(rng, launch, dtype)
    # 130 rows of one segment race in Punica's: other orders than this give wrong rows.
    out = launch.run(x, weights, order="in order" if launch.race else "random").out
    stored = np.dtype(np.float32) if name == "vllm_v1_shrink" else dtype
    assert out.dtype == stored
    nothing = np.zeros((n, 32), np.float32)
    compare.check(out, *product(x, weights, ids, nothing, 1.0, stored), name)
    assert (out[3] == 0).all()


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("name", EXPANDS)
@pytest.mark.parametrize(("kind", "n"), [("distinct", 9), ("skewed", 70), ("identical", 130)])
def test_an_expand_lies_within_the_bound(
    name: str, kind: str, n: int, dtype: np.dtype[Any], rng: np.random.Generator
) -> None:
    ids = popularity(kind, n)
    ids[3] = -1
    launch = made(name, ids, 768 if "bgmv" in name else 200, 32)  # its narrowest; half a tile
    v, weights = operands(rng, launch, dtype)
    y = rng.standard_normal((n, launch.width)).astype(dtype)
    before = y.copy()
    out = launch.run(v, weights, y, order="random").out
    expected, bound = product(v, weights, ids, y, 1.0, dtype)
    if name != "punica_cutlass_expand":
        bound += rounded_apart(expected, y, bound, dtype) * (np.asarray(ids) >= 0)[:, None]
    compare.check(out, expected, bound, name)
    assert y.tobytes() == before.tobytes()
    assert out[3].tobytes() == y[3].tobytes()


def test_scalings_where_each_kernel_takes_them(rng: np.random.Generator) -> None:
    for name in KERNELS:
        launch = made(name, IDS, 768, 16)
        x, weights = operands(rng, launch)
        if name in UNSCALED:
            with pytest.raises(sgmv.SgmvError, match="scaling"):
                launch.run(x, weights, scaling=0.5)
            continue
        if name == "vllm_v1_expand":
            with pytest.raises(sgmv.SgmvError, match="scaling"):
                launch.run(x, weights, scaling=0.5)
            continue
        halved = launch.run(x, weights, scaling=0.5).out.astype(np.float32)
        expected = launch.run(x, weights).out.astype(np.float32) / 2
        normal = np.abs(expected) >= np.finfo(np.float16).tiny  # smaller ones are rounded again
        assert (halved == expected)[normal].all(), name
        assert np.abs(halved - expected).max() <= np.finfo(np.float16).smallest_subnormal, name
    by_adapter = emulator.sglang_csgmv_expand([0, 1], 16, 64)
    v, B = operands(rng, by_adapter)
    out, one = by_adapter.run(v, B, scaling={0: 1.0, 1: 2.0}).out, by_adapter.run(v, B).out
    assert (out[0] == one[0]).all()
    assert (out[1] == 2 * one[1]).all()
    with pytest.raises(sgmv.SgmvError, match=r"^scaling: expected an entry .* none for \[1\]"):
        by_adapter.run(v, B, scaling={0: 1.0})


def test_slices_are_computed_where_they_belong(rng: np.random.Generator) -> None:
    widths, ids = (192, 64, 70), [1, 0, 1, -1]
    for expand in (
        emulator.vllm_v1_expand(ids, 16, widths, 2),
        emulator.sglang_csgmv_expand(ids, 16, widths),
    ):
        v, B = operands(rng, expand)
        out, start = expand.run(v, B).out, 0
        for piece, width in enumerate(widths):
            one = v[:, piece * 16 : (piece + 1) * 16]
            part = {i: w[start : start + width] for i, w in B.items()}
            nothing = np.zeros((4, width), np.float16)
            expected, bound = product(one, part, ids, nothing, 1.0, v.dtype)
            compare.check(out[:, start : start + width], expected, bound)
            start += width
    for shrink in (
        emulator.vllm_v1_shrink(ids, 512, 24, 2, slices=3),
        emulator.sglang_csgmv_shrink(ids, 512, 24, slices=3),
    ):
        x, A = operands(rng, shrink)
        out = shrink.run(x, A).out
        assert out.shape == (4, 72)
        compare.check(out, *product(x, A, ids, np.zeros((4, 72), np.float32), 1.0, out.dtype))


@pytest.mark.parametrize("name", KERNELS)
def test_only_atomics_let_the_order_show(name: str, rng: np.random.Generator) -> None:
    """60 rows in 5 segments: no segment has a second step, so that nothing races."""
    ids = popularity("uniform", 25)
    launch = made(name, ids, 3072, 16)
    x, weights = operands(rng, launch)
    spread = launch.spread(x, weights, seeds=range(4))
    orders = {
        launch.run(x, weights, order=order).out.tobytes() for order in ("in order", "reversed")
    }
    atomics = name == "vllm_v1_shrink"
    assert (spread > 0).any() == atomics == (len(orders) > 1)
    assert launch.figures()["deterministic"] != atomics


@pytest.mark.parametrize(
    ("launch", "what"),
    [
        (emulator.punica_sgmv_shrink([0], 4096, 8), "rank 8"),
        (emulator.punica_sgmv_shrink([0], 4097, 16), "width 4097"),
        (emulator.punica_cutlass_expand([0], 12, 4096), "rank 12"),
        (emulator.punica_cutlass_expand([0], 64, 64), "rank 64 and width 64"),
        (emulator.punica_bgmv_shrink([0], 3424, 16), "width 3424"),
        (emulator.punica_bgmv_expand([0], 128, 4096), "rank 128"),
        (emulator.punica_bgmv_expand([0], 16, 22016), "width 22016"),
    ],
)
def test_ranks_and_widths_without_a_kernel(
    launch: Launch, what: str, rng: np.random.Generator
) -> None:
    assert launch.faults[0].startswith(what)
    with pytest.raises(sgmv.SgmvError, match=what):
        launch.run(*operands(rng, launch))


def test_operands_that_do_not_fit_are_named(rng: np.random.Generator) -> None:
    launch = emulator.punica_sgmv_shrink([0, 1], 256, 16)
    x, A = operands(rng, launch)
    for args, name in (
        ((x[:1], A), "x"),
        ((x.astype(np.float32), A), "x"),
        ((x.astype(np.float32), {i: w.astype(np.float32) for i, w in A.items()}), "x"),
        ((x, {0: A[0]}), "weights"),
        ((x, {0: A[0], 1: A[1].T}), r"weights\[1\]"),
        ((x, A, np.zeros((2, 15), np.float16)), "y"),
        ((x, A, np.zeros((2, 16), np.float32)), "y"),
    ):
        with pytest.raises(sgmv.SgmvError, match=f"^{name}: expected"):
            launch.run(*args)
    with pytest.raises(sgmv.SgmvError, match=r"^order: expected"):
        launch.run(x, A, order="sideways")
    with pytest.raises(sgmv.SgmvError, match=r"^y: expected None"):
        emulator.sglang_csgmv_shrink([0, 1], 256, 16).run(x, A, np.zeros((2, 16), np.float16))


def test_random_orders_follow_their_seed(rng: np.random.Generator) -> None:
    launch = emulator.vllm_v1_shrink([0] * 9, 2048, 16, 1)
    x, A = operands(rng, launch)
    same = [launch.run(x, A, order="random", seed=3).out.tobytes() for _ in range(2)]
    assert same[0] == same[1]


@pytest.mark.parametrize("kind", ["distinct", "skewed"])
def test_64_rows_of_a_real_layer(kind: str, rng: np.random.Generator) -> None:
    ids = popularity(kind, 64)
    shrink = emulator.punica_sgmv_shrink(ids, 4096, 16)
    x, A = operands(rng, shrink)
    nothing = np.zeros((64, 16), np.float32)
    compare.check(shrink.run(x, A).out, *product(x, A, ids, nothing, 1.0, x.dtype))
    assert shrink.cooperative == (kind == "skewed")
