"""What a launch is: figures against plain enumerations of the grids."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import sgmv
from reference.workloads import POPULARITIES, popularity
from sgmv import emulator
from sgmv.emulator import A100
from tests.help.emulated import IDS, KERNELS, SHRINKS, ids_of, made

pytestmark = pytest.mark.once


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


def plain_moe(ids: list[int], tile: Callable[[int], Iterator[Block]]) -> Iterator[Block | None]:
    """64 adapters of 3 experts: blocks of rows of each pair of both, by the tokens of the batch."""
    n = len(ids)
    rows = 16 if n <= 32 else 32 if n <= 96 else 64 if n <= 512 else 128
    across = len(list(tile(1)))
    if n * 8 <= 3 * 64:
        for i in ids:
            yield from [None] * across if i == -1 else tile(1)
        return
    padded = n * rows if n < 3 else n + 3 * (rows - 1)
    busy = 0
    for adapter_id, length in runs(ids):
        for first in range(0, length if adapter_id != -1 else 0, rows):
            yield from tile(min(rows, length - first))
            busy += 1
    yield from [None] * (across * (65 * math.ceil(padded / rows) - busy))


def plain_moe_shrink(ids: list[int], h_in: int, r: int) -> Iterator[Block | None]:
    n = len(ids)
    rows = 16 if n <= 32 else 32 if n <= 96 else 64 if n <= 512 else 128
    column, depth = min(64 if n <= 64 else 128, r), 128 if n <= 64 else 64

    def tile(length: int) -> Iterator[Block]:
        for across in cut(r, column):
            lanes = rows * column * math.ceil(h_in / depth) * depth
            yield lanes, 2 * h_in * (length + across), 2 * length * across

    yield from plain_moe(ids, tile)


def plain_moe_expand(ids: list[int], h_out: int, r: int) -> Iterator[Block | None]:
    n = len(ids)
    rows = 16 if n <= 32 else 32 if n <= 96 else 64 if n <= 512 else 128
    column, depth = 64 if n <= 64 else 128, max(16, min(128 if n <= 64 else 64, r))

    def tile(length: int) -> Iterator[Block]:
        for across in cut(h_out, column):
            read = 2 * (length * r + r * across + length * across)
            yield rows * column * math.ceil(r / depth) * depth, read, 2 * length * across

    yield from plain_moe(ids, tile)


PLAIN: dict[str, Callable[[list[int], int, int], Iterator[Block | None]]] = {
    "punica_sgmv_shrink": plain_sgmv_shrink,
    "punica_cutlass_expand": plain_cutlass_expand,
    "punica_bgmv_shrink": plain_bgmv_shrink,
    "punica_bgmv_expand": plain_bgmv_expand,
    "vllm_v1_shrink": plain_vllm_shrink,
    "vllm_v1_expand": plain_vllm_expand,
    "sglang_csgmv_shrink": plain_csgmv_shrink,
    "sglang_csgmv_expand": plain_csgmv_expand,
    "vllm_moe_shrink": plain_moe_shrink,
    "vllm_moe_expand": plain_moe_expand,
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
