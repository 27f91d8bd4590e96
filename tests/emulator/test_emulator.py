"""The emulator: published numbers, plain enumerations, runs held to the reference's bounds."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import sgmv
from reference import bounds, by_row, compare
from reference.floats import float_type
from reference.workloads import POPULARITIES, popularity
from sgmv import emulator
from sgmv.emulator import A100, H100, L4, Launch
from sgmv.emulator.blocks import BARRIER, STEP, Races, execute
from tests.help.planting import Fault, imported, plant

pytestmark = pytest.mark.once

HALVES = (np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16))
IDS = [5, 0, -1, 2, 5, 5, 0, -1, 3]
SHRINKS: dict[str, Callable[..., Launch]] = {
    "punica_sgmv_shrink": emulator.punica_sgmv_shrink,
    "punica_bgmv_shrink": emulator.punica_bgmv_shrink,
    "vllm_v1_shrink": lambda *args, **more: emulator.vllm_v1_shrink(*args, 64, **more),
    "sglang_csgmv_shrink": emulator.sglang_csgmv_shrink,
}
EXPANDS: dict[str, Callable[..., Launch]] = {
    "punica_cutlass_expand": emulator.punica_cutlass_expand,
    "punica_bgmv_expand": emulator.punica_bgmv_expand,
    "vllm_v1_expand": lambda *args, **more: emulator.vllm_v1_expand(*args, 64, **more),
    "sglang_csgmv_expand": emulator.sglang_csgmv_expand,
}
KERNELS = {**SHRINKS, **EXPANDS}


def made(name: str, ids: Any, wide: int, r: int) -> Launch:
    """A launch of this kernel, whichever its direction."""
    return SHRINKS[name](ids, wide, r) if name in SHRINKS else EXPANDS[name](ids, r, wide)


def operands(
    rng: np.random.Generator, launch: Launch, dtype: np.dtype[Any] = HALVES[0]
) -> tuple[Any, dict[int, Any]]:
    x = rng.standard_normal((launch.segments.n, launch.x_width)).astype(dtype)
    size = 1 / math.sqrt(launch.k)
    weights = {
        work.adapter_id: (size * rng.standard_normal((launch.width, launch.k))).astype(dtype)
        for work in launch.work
    }
    return x, weights


def ids_of(lengths: list[int]) -> list[int]:
    return [i for i, length in enumerate(lengths) for _ in range(length)]


def product(
    x: Any, weights: dict[int, Any], ids: Any, y: Any, scaling: float, out: np.dtype[Any]
) -> tuple[Any, Any]:
    """`y + scaling * x @ weights.T` per row and its bound: a LoRA delta whose B is the identity."""
    one = np.eye(y.shape[1], dtype=np.float32)
    adapters = {i: (w, one) for i, w in weights.items()}
    scalings = dict.fromkeys(adapters, scaling)
    expected = by_row.add_lora(y, x, adapters, ids, scalings)
    inputs = (y, x, adapters, ids, scalings)
    return expected, bounds.add_lora_bound(*inputs, out=out, expected=expected)


def rounded_apart(expected: Any, y: Any, bound: Any, dtype: np.dtype[Any]) -> Any:
    """What the bound grows by where the delta is rounded once more, before y is added."""
    kind = float_type(dtype)
    size = np.maximum(np.abs(expected - y.astype(np.float64)) + bound, kind.smallest_normal)
    return (1 + kind.unit_roundoff) * kind.unit_roundoff * size


# The numbers of Punica's source and paper


def test_shared_memory_of_each_rank() -> None:
    sizes = {
        r: emulator.punica_sgmv_shrink([0], 4096, r).shared_memory for r in (16, 32, 64, 96, 128)
    }
    assert sizes == {16: 40960, 32: 49152, 64: 65536, 96: 81920, 128: 98304}
    assert all(size == 8192 * (4 + r // 16) for r, size in sizes.items())


@pytest.mark.parametrize(
    ("device", "r", "resident", "at_4096", "at_11008"),
    [
        # SMs x resident blocks, over 16 chunks at 4096 and 43 at 11008
        (A100, 16, 4, 27, 10),
        (A100, 64, 2, 13, 5),
        (H100, 16, 5, 41, 15),
        (H100, 64, 3, 24, 9),
        (L4, 16, 2, 7, 2),
        (L4, 64, 1, 3, 1),
    ],
)
def test_the_split_k_cliff(
    device: emulator.Device, r: int, resident: int, at_4096: int, at_11008: int
) -> None:
    for h_in, most in ((4096, at_4096), (11008, at_11008)):
        chunks = math.ceil(h_in / 256)
        last = emulator.punica_sgmv_shrink(range(most), h_in, r, device)
        past = emulator.punica_sgmv_shrink(range(most + 1), h_in, r, device)
        assert last.split_k_segments == past.split_k_segments == most
        assert last.resident_blocks == resident
        assert last.capacity == device.sms * resident
        assert (last.cooperative, last.split_k, last.chunk) == (True, chunks, 256)
        assert (past.cooperative, past.split_k, past.chunk) == (False, 1, h_in)
        assert past.grid == (1, most + 1, 1)
        assert past.tmp == max(work.barriers for work in past.work) == 0


def test_k_is_never_split_from_rank_64_on_unless_more_than_48_kib_count() -> None:
    for r in (16, 32, 64, 96, 128):
        launch = emulator.punica_sgmv_shrink([0, 1, 1], 4096, r, H100, opted_in=False)
        assert launch.cooperative == (launch.split_k_segments > 0) == (r < 64)
        assert launch.resident_blocks > 0


def test_the_papers_intensities() -> None:
    """The roofline's axis at h_in = 16, h_out = 4096: 0.94 where all differ, 12.8 where none do."""
    found = {
        kind: emulator.punica_cutlass_expand(popularity(kind, 64), 16, 4096).intensity
        for kind in POPULARITIES
    }
    assert round(found["distinct"], 2) == 0.94
    assert round(found["identical"], 1) == 12.8
    assert sorted(found, key=lambda kind: found[kind]) == [
        "distinct", "skewed", "uniform", "identical",  # 64, 9, 8 and 1 segments
    ]  # fmt: skip
    for n in (1, 2, 16):
        launch = emulator.punica_cutlass_expand(range(n), 16, 4096)
        assert launch.intensity == emulator.punica_cutlass_expand([0], 16, 4096).intensity
        assert launch.flops == 2 * n * 16 * 4096
        assert launch.io_bytes == (n * (16 + 4096) + n * 16 * 4096) * 2


@pytest.mark.parametrize("name", KERNELS)
def test_flops_and_bytes_are_those_of_segments(name: str) -> None:
    launch = made(name, IDS, 1024, 16)
    stats = launch.segments.stats(1024, 1024, 16)
    traffic = stats.shrink if name in SHRINKS else stats.expand
    assert launch.flops == traffic.flops
    assert launch.io_bytes == traffic.bytes_read + traffic.bytes_written


def test_48_of_vllms_64_splits_multiply_only_zeros() -> None:
    launch = emulator.vllm_v1_shrink([0], 4096, 16, max_loras=1)
    assert launch.split_k == 64
    assert launch.figures()["useful_lanes"] * 4 * 32 == launch.lanes  # 16 of 64, 1 row of 32


# Geometry against plain enumerations of the grids


Block = tuple[int, int, int]  # multiply-adds of its tiles; bytes that it reads, and writes


def totals(blocks: Iterator[Block | None]) -> dict[str, int]:
    found = list(blocks)
    work = [block for block in found if block is not None]
    return {
        "blocks": len(found),
        "early_exits": len(found) - len(work),
        "lanes": sum(block[0] for block in work),
        "bytes_read": sum(block[1] for block in work),
        "bytes_written": sum(block[2] for block in work),
    }


def runs(ids: list[int]) -> list[tuple[int, int]]:
    """(adapter, rows), ascending, base only included."""
    return sorted(Counter(ids).items())


def cut(length: int, most: int) -> list[int]:
    return [min(most, length - start) for start in range(0, length, most)]


def plain_sgmv_shrink(ids: list[int], h_in: int, r: int) -> Iterator[Block | None]:
    own = [rows for i, rows in runs(ids) if i != -1]
    fits = A100.sms * {16: 4, 32: 3, 64: 2, 96: 2, 128: 1}[r]
    chunks = cut(h_in, 256)
    split = 0 < len(own) * len(chunks) <= fits
    chunks = chunks if split else [h_in]
    for rows in own:
        for c, chunk in enumerate(chunks):
            lanes = read = written = 0
            for step in cut(rows, 64):
                lanes += 64 * r * math.ceil((256 if split else h_in) / 128) * 128
                read += 2 * chunk * (step + r)
                if split:
                    written += 4 * 64 * r
                    read += 4 * 64 * r * len(chunks)
                if c == 0:
                    read += 2 * step * r
                    written += 2 * step * r
            yield lanes, read, written


def plain_cutlass_expand(ids: list[int], h_out: int, r: int) -> Iterator[Block | None]:
    tiles = [
        (rows, columns)
        for i, length in runs(ids)
        if i != -1
        for rows in cut(length, 32)
        for columns in cut(h_out, 128)
    ]
    for walker in range(512):
        mine = tiles[walker::512]
        if not mine:
            yield None
            continue
        yield (
            sum(32 * 128 * math.ceil(r / 16) * 16 for _ in mine),
            sum(2 * (rows * r + r * columns + rows * columns) for rows, columns in mine),
            sum(2 * rows * columns for rows, columns in mine),
        )


def plain_bgmv_shrink(ids: list[int], h_in: int, r: int) -> Iterator[Block | None]:
    for _ in [i for i in ids if i != -1]:
        for _ in range(r):
            yield math.ceil(h_in / 1024) * 1024, 2 * (2 * h_in + 1), 2


def plain_bgmv_expand(ids: list[int], h_out: int, r: int) -> Iterator[Block | None]:
    for _ in [i for i in ids if i != -1]:
        for columns in cut(h_out, 1024 // r):
            yield columns * r, 2 * (r + columns * r + columns), 2 * columns


def plain_vllm(
    ids: list[int], rows_per_tile: int, tile: Callable[[int, int], Block | None], tiles: int
) -> Iterator[Block | None]:
    """A grid for the whole batch and 65 entries; `tile` gets the column tile and the rows."""
    if set(ids) == {-1}:
        return
    entries = [*runs(ids), *[(-1, 0)] * 65][:65]
    for adapter_id, length in entries:
        for first in range(0, len(ids), rows_per_tile):
            for column in range(tiles):
                left = min(rows_per_tile, length - first)
                yield None if adapter_id == -1 or left <= 0 else tile(column, left)


def plain_vllm_shrink(ids: list[int], h_in: int, r: int) -> Iterator[Block | None]:
    block_k, splits = (256, 64) if len(ids) < 128 else (32, 8)
    columns = cut(r, 16)

    def tile(column: int, rows: int) -> Block:
        across, split = columns[column // splits], column % splits
        loops = math.ceil(h_in / (block_k * splits))
        deep = sum(
            min(block_k, max(0, h_in - start))
            for start in range(split * block_k, loops * block_k * splits, block_k * splits)
        )
        added = 4 * rows * across
        return 32 * 16 * loops * block_k, 2 * deep * (rows + across) + added, added

    yield from plain_vllm(ids, 32, tile, len(columns) * splits)


def plain_vllm_expand(ids: list[int], h_out: int, r: int) -> Iterator[Block | None]:
    def tile(column: int, rows: int) -> Block:
        across = cut(h_out, 128)[column]
        y = 2 * rows * across
        return 64 * 128 * math.ceil(r / 16) * 16, 4 * rows * r + 2 * r * across + y, y

    yield from plain_vllm(ids, 64, tile, len(cut(h_out, 128)))


def plain_csgmv(ids: list[int]) -> Iterator[int]:
    """Rows of each chunk; -1 for one of base-only rows. The server's default caps it at 16."""
    for adapter_id, length in runs(ids):
        for rows in cut(length, 16):
            yield -1 if adapter_id == -1 else rows


def plain_csgmv_shrink(ids: list[int], h_in: int, r: int) -> Iterator[Block | None]:
    for rows in plain_csgmv(ids):
        for across in cut(r, 16):
            deep = math.ceil(h_in / 256) * 256
            read = 2 * h_in * (rows + across)
            yield None if rows == -1 else (16 * 16 * deep, read, 2 * rows * across)


def plain_csgmv_expand(ids: list[int], h_out: int, r: int) -> Iterator[Block | None]:
    for rows in plain_csgmv(ids):
        for across in cut(h_out, 64):
            deep = math.ceil(r / 16) * 16
            read = 2 * (rows * r + r * across + rows * across)
            yield None if rows == -1 else (16 * 64 * deep, read, 2 * rows * across)


PLAIN: dict[str, Callable[[list[int], int, int], Iterator[Block | None]]] = {
    "punica_sgmv_shrink": plain_sgmv_shrink,
    "punica_cutlass_expand": plain_cutlass_expand,
    "punica_bgmv_shrink": plain_bgmv_shrink,
    "punica_bgmv_expand": plain_bgmv_expand,
    "vllm_v1_shrink": plain_vllm_shrink,
    "vllm_v1_expand": plain_vllm_expand,
    "sglang_csgmv_shrink": plain_csgmv_shrink,
    "sglang_csgmv_expand": plain_csgmv_expand,
}


@pytest.mark.oracle
@pytest.mark.parametrize("name", KERNELS)
@settings(max_examples=60)
@given(
    st.lists(st.integers(0, 150), min_size=1, max_size=6),
    st.integers(0, 40),
    st.sampled_from([16, 32, 64]),
    st.sampled_from([768, 1024, 4096, 11008]),
)
def test_figures_are_those_of_a_plain_enumeration(
    name: str, lengths: list[int], base_only: int, r: int, wide: int
) -> None:
    ids = [-1] * base_only + ids_of(lengths)
    figures = made(name, ids, wide, r).figures()
    plain = totals(PLAIN[name](ids, wide, r))
    if name == "vllm_v1_shrink":  # v is cleared before the launch
        plain["bytes_written"] += 4 * len(ids) * r if plain["blocks"] else 0
    assert {key: figures[key] for key in plain} == plain


@pytest.mark.parametrize("name", KERNELS)
def test_figures_are_flat_and_survive_json(name: str) -> None:
    launch = made(name, IDS, 1024, 16)
    figures = launch.figures()
    assert json.loads(json.dumps(figures)) == figures
    for value in figures.values():
        for item in value if isinstance(value, list) else [value]:
            assert isinstance(item, int | float | str)
    assert figures["kernel"] == name
    assert figures["blocks"] == math.prod(figures[f"grid_{axis}"] for axis in "xyz")
    assert figures["wasted_lanes"] >= 0
    assert sum(figures["rows_per_segment"]) == figures["rows"] == 7
    assert str(launch).splitlines()[0] == f"kernel{' ' * 19}{name}"
    assert len(str(launch).splitlines()) == len(figures)


def test_several_slices_of_vllm_and_sglang() -> None:
    """q, k and v of grouped-query attention: narrower slices let their blocks go."""
    widths = (512, 128, 128)
    for launch, across in (
        (emulator.vllm_v1_expand([0, 1], 16, widths, max_loras=2), 64),
        (emulator.sglang_csgmv_expand([0, 1], 16, widths), 64),
    ):
        tiles = sum(math.ceil(width / across) for width in widths)
        assert launch.grid[1] == 3
        assert launch.blocks - launch.early_exits == 2 * tiles
        assert launch.flops == 2 * 2 * 16 * sum(widths)
    assert emulator.sglang_csgmv_expand([0], 16, (64,) * 4).unsupported


def test_vllm_launches_for_all_slots_or_for_those_in_use() -> None:
    ids = [0, 3, 3, -1]
    assert emulator.vllm_v1_shrink(ids, 512, 16, 8).grid[2] == 9
    assert emulator.vllm_v1_shrink(ids, 512, 16, 8, specialize_active_lora=True).grid[2] == 3
    assert emulator.vllm_v1_shrink([-1, -1], 512, 16, 8).blocks == 0
    assert emulator.vllm_v1_expand([-1, -1], 16, 512, 8).blocks == 0


# Execution against the reference


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


def test_punicas_two_launches_lie_within_the_bound_for_vs_rounding(
    rng: np.random.Generator,
) -> None:
    """|y - exact| <= what expand may add, for the v that it got, + |B| times what v may err by."""
    ids, dtype = popularity("skewed", 40), HALVES[0]
    shrink = emulator.punica_sgmv_shrink(ids, 64, 16)
    expand = emulator.punica_cutlass_expand(ids, 16, 256)
    x, A = operands(rng, shrink)
    _, B = operands(rng, expand)
    y = rng.standard_normal((40, 256)).astype(dtype)
    v = shrink.run(x, A).out
    out = expand.run(v, B, y).out
    _, of_expand = product(v, B, ids, y, 1.0, dtype)
    _, of_v = product(x, A, ids, np.zeros((40, 16), np.float32), 1.0, dtype)
    through_B = np.stack([e @ np.abs(B[i].astype(float)).T for e, i in zip(of_v, ids, strict=True)])
    exact = by_row.add_lora(y, x, {i: (A[i], B[i]) for i in A}, ids)
    compare.check(out, exact, of_expand + through_B)
    # And v is to blame: no later rounding takes part here, yet a float32 v's bound is too tight.
    deltas = by_row.add_lora(0.0 * y, x, {i: (A[i], B[i]) for i in A}, ids)
    of_single_v = bounds.add_lora_bound(
        0.0 * y, x, {i: (A[i], B[i]) for i in A}, ids, out=np.float32
    )
    from_half_v = np.stack([v[i].astype(float) @ B[a].T.astype(float) for i, a in enumerate(ids)])
    assert compare.violations(from_half_v, deltas, of_single_v).mean() > 0.5


def test_scalings_where_each_kernel_takes_them(rng: np.random.Generator) -> None:
    for name in KERNELS:
        launch = made(name, IDS, 768, 16)
        x, weights = operands(rng, launch)
        if name in ("punica_sgmv_shrink", "punica_cutlass_expand", "sglang_csgmv_shrink"):
            with pytest.raises(sgmv.SgmvError, match="scaling"):
                launch.run(x, weights, scaling=0.5)
            continue
        if name == "vllm_v1_expand":
            with pytest.raises(sgmv.SgmvError, match="scaling"):
                launch.run(x, weights, scaling=0.5)
            continue
        halved = launch.run(x, weights, scaling=0.5).out.astype(np.float32)
        assert (halved == launch.run(x, weights).out.astype(np.float32) / 2).all(), name
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


def test_slots_in_another_order_than_the_ids(rng: np.random.Generator) -> None:
    slots = {7: 1, 9: 0, 100: 2}
    launch = emulator.vllm_v1_shrink([7, 9, 7, 100, -1], 256, 16, 4, slots=slots)
    x, A = operands(rng, launch)
    nothing = np.zeros((5, 16), np.float32)
    out = launch.run(x, A).out
    compare.check(out, *product(x, A, [7, 9, 7, 100, -1], nothing, 1.0, out.dtype))


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


def test_batch_invariant_vllm_has_no_spread(rng: np.random.Generator) -> None:
    launch = emulator.vllm_v1_shrink(popularity("uniform", 25), 3072, 16, 8, batch_invariant=True)
    assert (launch.spread(*operands(rng, launch), seeds=range(3)) == 0).all()
    assert launch.figures()["deterministic"]


def test_k_not_split_is_another_order_of_summation(rng: np.random.Generator) -> None:
    """The cliff shows in a row's bits: the same row, in a batch of one segment more."""
    tiny = emulator.Device("tiny", 1, 164 << 10, 163 << 10, 32, 2048, 10**12, 10**14)
    few = emulator.punica_sgmv_shrink([0, 1], 512, 16, tiny)
    more = emulator.punica_sgmv_shrink([0, 1, 2], 512, 16, tiny)
    assert (few.cooperative, more.cooperative) == (True, False)
    x, w = np.ones((3, 512), np.float16), np.full((16, 512), 1 / 32, np.float16)
    x[:, 0], x[:, 256], w[:, ::256] = 32768, -32768, 512  # 2**24, taken back after 256 products
    A = dict.fromkeys(range(3), w)
    # Beside 2**24 steps of 16 / 32 vanish: split, all of them do; else the second chunk's stay.
    split, whole = few.run(x[:2], A).out[0, 0], more.run(x, A).out[0, 0]
    assert (split, round(float(whole))) == (0, 8)


# Faults


def test_1_and_132_rows_hang_and_the_fix_does_not(rng: np.random.Generator) -> None:
    ids = ids_of([1, 132])
    before = emulator.punica_sgmv_shrink(ids, 512, 16, release="1.0.0")
    after = emulator.punica_sgmv_shrink(ids, 512, 16, release="1.1.0")
    x, A = operands(rng, before)
    with pytest.raises(emulator.DeadlockError) as raised:
        before.run(x, A)
    report = raised.value.deadlock
    assert report == before.deadlock
    assert report.barrier == 2
    assert report.waiting == ((0, 1, 0), (1, 1, 0))
    assert report.returned == ((0, 0, 0), (1, 0, 0))
    assert "blocks (0..1, 1, 0) wait at grid barrier 2 for blocks (0..1, 0, 0)" in str(report)
    assert str(report) in before.faults
    assert after.deadlock is None
    assert after.run(x, A).barriers == 3


def test_it_is_the_steps_that_differ_not_the_rows(rng: np.random.Generator) -> None:
    """64 and 65 rows hang, one row apart; 1 and 64 do not."""
    for lengths, hangs in (([64, 65], True), ([1, 64], False), ([64, 128, 64], True)):
        launch = emulator.punica_sgmv_shrink(ids_of(lengths), 512, 16, release="1.0.0")
        assert (launch.deadlock is not None) == hangs
    lonely = emulator.punica_sgmv_shrink(ids_of([132]), 512, 16, release="1.0.0")
    assert lonely.deadlock is None


def test_an_empty_segment_hangs_the_old_release(rng: np.random.Generator) -> None:
    segments = sgmv.Segments([0, 1], [0, 0, 2], [3, 4])
    old = emulator.punica_sgmv_shrink(segments, 512, 16, release="1.0.0")
    assert old.deadlock is not None
    assert old.deadlock.barrier == 1
    assert old.early_exits == 2
    new = emulator.punica_sgmv_shrink(segments, 512, 16)
    x, A = operands(rng, new)
    assert new.run(x, A).barriers == 1
    with pytest.raises(emulator.DeadlockError):
        old.run(x, A)


@pytest.mark.oracle
def test_deadlock_and_race_in_1000_random_batches(rng: np.random.Generator) -> None:
    """Found where they are, and nowhere else: predicted, executed and as a loop would tell them."""
    toy = emulator.Device("toy", 3, 164 << 10, 163 << 10, 32, 2048, 10**12, 10**14)  # 12 blocks
    seen: Counter[tuple[bool, bool]] = Counter()
    all_x = rng.standard_normal((7 * 160, 640)).astype(np.float16)
    all_A = rng.standard_normal((7, 16, 640)).astype(np.float16)
    for _ in range(1000):
        lengths = np.floor(1.5 ** rng.uniform(0, 12.5, rng.integers(1, 8))).astype(int)
        h_in = int(rng.choice([128, 256, 512, 640]))
        release = str(rng.choice(["1.0.0", "1.1.0"]))
        ids = ids_of(lengths.tolist())
        launch = emulator.punica_sgmv_shrink(ids, h_in, 16, toy, release)

        chunks = math.ceil(h_in / 256)
        steps = {math.ceil(length / 64) for length in lengths}
        split = chunks * len(lengths) <= 12
        hangs = split and release == "1.0.0" and len(steps) > 1
        races = split and chunks > 1 and max(steps) > 1
        assert launch.cooperative == split
        assert (launch.deadlock is not None) == hangs
        assert launch.race == races
        assert launch.figures()["deterministic"] != races
        seen[hangs, races] += 1

        x, A = all_x[: len(ids), :h_in], dict(enumerate(all_A[:, :, :h_in]))
        seed = int(rng.integers(1 << 30))
        if hangs:
            with pytest.raises(emulator.DeadlockError) as raised:
                launch.run(x, A, order="random", seed=seed)
            assert raised.value.deadlock == launch.deadlock
            continue
        result = launch.run(x, A, order="random", seed=seed)
        assert result.barriers == (max(steps) if split else 0)
        assert bool(result.races) == races
        in_order = launch.run(x, A).out
        assert in_order.tobytes() == result.out.tobytes() or races
        assert (launch.run(x, A, order="reversed").out.tobytes() != in_order.tobytes()) == races
    assert min(seen[key] for key in ((False, False), (True, True), (False, True))) > 50, seen


def test_the_race_gives_wrong_rows(rng: np.random.Generator) -> None:
    """Block 0 adds what chunk 1 wrote for the next 64 rows to its own sums of these."""
    ids = [0] * 70
    launch = emulator.punica_sgmv_shrink(ids, 512, 16)
    x, A = operands(rng, launch)
    expected, bound = product(x, A, ids, np.zeros((70, 16), np.float32), 1.0, x.dtype)
    right, wrong = launch.run(x, A), launch.run(x, A, order="reversed")
    compare.check(right.out, expected, bound)
    assert set(np.flatnonzero(compare.violations(wrong.out, expected, bound).any(1))) == set(
        range(64)
    )
    assert {writer != reader for _, writer, reader in right.races} == {True}
    assert any("race" in fault for fault in launch.faults)


def test_a_race_is_seen_whatever_the_order_of_its_accesses() -> None:
    for order in (("read", "write"), ("write", "read")):
        races = Races()
        for access in order:
            getattr(races, access)(7, (0, 0, 0) if access == "read" else (1, 0, 0))
        races.write(8, (0, 0, 0))
        races.read(8, (0, 0, 0))  # its own
        races.write(8, (0, 0, 0))
        races.write(9, (1, 0, 0))
        races.barrier()
        races.read(9, (0, 0, 0))  # after it
        assert races.found == {7: (7, (1, 0, 0), (0, 0, 0))}
        races.write(9, (0, 0, 0))
        races.write(9, (1, 0, 0))
        assert races.found[9] == (9, (1, 0, 0), (0, 0, 0))


def test_tmp_overflows_on_the_h100_at_rank_128() -> None:
    """6 segments of 43 chunks fit its 264 blocks; their sums take 258 x 32 KiB of 8 MiB."""
    fits = emulator.punica_sgmv_shrink(range(16), 4096, 128, H100)
    over = emulator.punica_sgmv_shrink(range(6), 11008, 128, H100)
    assert (fits.tmp, over.tmp) == (8 << 20, 258 * 64 * 128 * 4)
    assert not fits.faults
    assert over.cooperative
    assert over.faults == (f"overflow: tmp takes {over.tmp} bytes of 8388608",)


def test_no_rank_overflows_tmp_on_the_a100() -> None:
    for r in (16, 32, 64, 96, 128):
        full = A100.sms * A100.resident_blocks(128, 8192 * (4 + r // 16))
        assert full * 64 * r * 4 <= 8 << 20


def test_offsets_that_wrap() -> None:
    segments = sgmv.segment(np.zeros(390_171, np.int64))
    assert not emulator.punica_sgmv_shrink(segments, 11000, 16).faults[1:]
    assert "2**32" in emulator.punica_sgmv_shrink(segments, 11008, 16).faults[-1]


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


def test_a_block_that_fits_no_sm() -> None:
    small = emulator.Device("small", 4, 48 << 10, 32 << 10, 16, 1024, 10**12, 10**14)
    launch = emulator.punica_sgmv_shrink([0], 512, 16, small)
    assert (launch.resident_blocks, launch.waves, launch.cooperative) == (0, 0, False)
    assert launch.faults == ("no block of 40960 bytes fits an SM of small",)


# Operands and options that do not fit


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


def test_counts_that_are_none_are_named() -> None:
    for call in (
        lambda: emulator.punica_sgmv_shrink([0], 0, 16),
        lambda: emulator.punica_cutlass_expand([0], 16, 1.5),
        lambda: emulator.punica_bgmv_expand([0], 0, 4096),
        lambda: emulator.vllm_v1_shrink([0], 512, 16, 0),
        lambda: emulator.vllm_v1_shrink([9], 512, 16, 4),
        lambda: emulator.vllm_v1_expand([0], 16, (512, 0), 4),
        lambda: emulator.sglang_csgmv_shrink([0], 512, 16, max_lora_chunk_size=0),
        lambda: emulator.punica_sgmv_shrink([0], 512, 16, release="1.0"),
    ):
        with pytest.raises(sgmv.SgmvError):
            call()


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("ids", [[], [-1, -1]], ids=["no rows", "base only"])
def test_nothing_to_do_is_fine(name: str, ids: list[int]) -> None:
    launch = made(name, ids, 1024, 16)
    assert not launch.faults
    out = launch.run(np.ones((len(ids), launch.x_width), np.float16), {}).out
    assert out.shape == (len(ids), launch.width)
    assert (out == 0).all()
    assert launch.figures()["flops"] == 0


# Blocks


def test_orders_are_all_and_legal() -> None:
    """In every order, no block passes a barrier before all have come to it."""
    for order, seed in (("in order", 0), ("reversed", 0), *(("random", s) for s in range(20))):
        log: list[tuple[int, str]] = []

        def block(i: int, log: list[tuple[int, str]] = log) -> Iterator[Any]:
            for step in "abc":
                log.append((i, step))
                yield STEP
                yield BARRIER

        assert execute({(i % 2, i // 2, 0): block(i) for i in range(6)}, order, seed) == 3
        assert [step for _, step in log] == sorted(step for _, step in log)
        assert Counter(log) == Counter((i, step) for i in range(6) for step in "abc")
        if order == "in order":
            assert [i for i, step in log if step == "a"] == [0, 1, 2, 3, 4, 5]


def test_random_orders_follow_their_seed(rng: np.random.Generator) -> None:
    launch = emulator.vllm_v1_shrink([0] * 9, 2048, 16, 1)
    x, A = operands(rng, launch)
    same = [launch.run(x, A, order="random", seed=3).out.tobytes() for _ in range(2)]
    assert same[0] == same[1]


# The size that the emulator is meant for


@pytest.mark.parametrize("kind", ["distinct", "skewed"])
def test_64_rows_of_a_real_layer(kind: str, rng: np.random.Generator) -> None:
    ids = popularity(kind, 64)
    shrink = emulator.punica_sgmv_shrink(ids, 4096, 16)
    x, A = operands(rng, shrink)
    nothing = np.zeros((64, 16), np.float32)
    compare.check(shrink.run(x, A).out, *product(x, A, ids, nothing, 1.0, x.dtype))
    assert shrink.cooperative == (kind == "skewed")


# What a half-precision v costs


def test_the_histogram_counts_every_element_once(rng: np.random.Generator) -> None:
    v = rng.standard_normal((40, 16)).astype(np.float32)
    B = (rng.standard_normal((300, 16)) / 4).astype(np.float16)
    histogram = emulator.half_v_error(v, B)
    assert histogram.exact + sum(histogram.counts) == 40 * 300
    exact = v.astype(np.float64) @ B.astype(np.float64).T
    half = v.astype(np.float16).astype(np.float64) @ B.astype(np.float64).T
    ulps = np.abs(half - exact) / np.spacing(np.abs(exact).astype(np.float16)).astype(float)
    for low, high, count in zip(
        histogram.edges, histogram.edges[1:], histogram.counts, strict=False
    ):
        assert abs(np.count_nonzero((ulps >= low) & (ulps < high) & (ulps > 0)) - count) <= 12
    assert histogram.largest > 0.5
    assert str(histogram).splitlines()[0].split() == ["ulps", "elements", "share"]
    assert "█" in str(histogram)


def test_a_v_that_half_precision_holds_costs_nothing(rng: np.random.Generator) -> None:
    v = rng.integers(-8, 9, (4, 16)).astype(np.float32)
    histogram = emulator.half_v_error(v, rng.standard_normal((32, 16)).astype(np.float16))
    assert (histogram.exact, histogram.largest) == (128, 0.0)
    with pytest.raises(sgmv.SgmvError, match=r"^v: expected"):
        emulator.half_v_error(v, np.ones((32, 8), np.float16))


def test_bfloat16_loses_no_less_than_float16(rng: np.random.Generator) -> None:
    """In units of their own last place both lose alike; the place itself is eight times larger."""
    v = rng.standard_normal((40, 16)).astype(np.float32)
    B = (rng.standard_normal((100, 16)) / 4).astype(np.float32)
    for dtype in HALVES:
        histogram = emulator.half_v_error(v, B, dtype)
        assert sum(histogram.counts[3:]) > 0  # beyond half an ulp, what one rounding could explain


# The checks can fail

FAULTS = {
    "the fix is left out": (
        Fault("emulator.punica", "range(steps, self.work[s].barriers)", "range(0)"),
        "deadlock",
    ),
    "a barrier opens for those that are there": (
        Fault("emulator.blocks", "if len(waiting) < len(blocks):", "if False:"),
        "no deadlock",
    ),
    "tmp is never written": (
        Fault("emulator.punica", "self.split_k + c] = sums", "self.split_k + c] = 0 * sums"),
        "wrong",
    ),
    "the last chunk is not added": (
        Fault("emulator.punica", "(s + 1) * self.split_k):", "(s + 1) * self.split_k - 1):"),
        "wrong",
    ),
    "every chunk starts from y": (
        Fault("emulator.punica", "memory.out[at] if c == 0 else memory.out[:0]", "memory.out[at]"),
        "wrong",
    ),
    "a second barrier after the reduction": (
        Fault(
            "emulator.punica",
            "                    sums += memory.tmp[slot]\n",
            "                    sums += memory.tmp[slot]\n                yield BARRIER\n",
        ),
        "no race",
    ),
    "the last product of each step is dropped": (
        Fault("emulator.run", "a[:, k : k + step] @ b[:, k : k + step].T",
              "a[:, k : k + step - 1] @ b[:, k : k + step - 1].T"),
        "wrong",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_found(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator
) -> None:
    fault, sign = FAULTS[name]
    planted = imported(plant(tmp_path, fault), monkeypatch, "sgmv.emulator")["sgmv.emulator"]
    # Equal steps where barriers are doubled: else the last ones, not doubled, would hang.
    ids = ids_of([66, 70] if sign == "no race" else [1, 70])
    x = rng.standard_normal((len(ids), 512)).astype(np.float16)
    A = {i: rng.standard_normal((16, 512)).astype(np.float16) for i in (0, 1)}
    y = rng.standard_normal((len(ids), 16)).astype(np.float16)
    assert sign in signs(planted, ids, x, A, y)
    assert sign not in signs(emulator, ids, x, A, y)


def signs(room: Any, ids: list[int], x: Any, A: dict[int, Any], y: Any) -> set[str]:
    """What this emulator says of a batch that hung the old release, and races in the new one."""
    found = set()
    old = room.punica_sgmv_shrink(ids, 512, 16, release="1.0.0")
    new = room.punica_sgmv_shrink(ids, 512, 16)
    try:
        old.run(x, A, y)
        found.add("no deadlock")
    except room.DeadlockError:
        pass
    try:
        result = new.run(x, A, y)
    except room.DeadlockError:
        return found | {"deadlock"}
    found |= set() if result.races else {"no race"}
    if compare.violations(result.out, *product(x, A, ids, y, 1.0, x.dtype)).any():
        found.add("wrong")
    return found


# Contracts


def test_public_names_have_contracts() -> None:
    for name in emulator.__all__:
        value = getattr(emulator, name)
        if not callable(value):
            continue
        doc = value.__doc__ or ""
        assert doc.splitlines()[0].strip(), name
        if name in KERNELS or name in ("Device", "half_v_error"):
            assert "Semantics:" in doc, name
            assert "Source:" in doc, name
            assert ">>>" in doc, name
