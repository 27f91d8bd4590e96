"""Punica's BGMV: one row of x per block, no segments; shrink and expand without tensor cores.

Source for all of this file: punica (release 1.1.0), csrc/bgmv/bgmv_impl.cuh and bgmv_config.h.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from sgmv.emulator.blocks import Block, Index
from sgmv.emulator.device import A100, Device
from sgmv.emulator.launch import HALF, SINGLE, Launch, Work, ceil_div, laid_out, whole
from sgmv.emulator.run import Floats, Kernel, Memory
from sgmv.layouts.rows import Batch
from sgmv.segment import Segments

RANKS = (8, 16, 32, 64)
WIDTHS = (
    768, 1024, 2048, 2560, 3072, 4096, 5120, 7168, 8192, 9216, 10240, 11008, 12288, 13824, 16384,
    20480, 28672, 36864, 49152,
)  # fmt: skip
VECTOR = 8  # half-precision numbers in a load of 16 bytes
WARPS, LANES = 4, 32
TILE_K = LANES * WARPS * VECTOR
STAGES = 2


class _Bgmv(Launch):
    """What both directions share: row i of the grid is row i of those that have an adapter."""

    def row(self, y: int) -> tuple[int, int]:
        """The adapter and the row of the batch at this place."""
        segments = self.segments
        position = segments.n - self.rows + y  # past the base-only rows
        s = int(np.searchsorted(segments.seq_start, position, "right")) - 1
        return int(segments.adapter_ids[s]), int(segments.rows[position])

    def add(self, memory: Memory, at: tuple[int, Any], values: Any) -> None:
        """`Y += sum` on a half-precision Y: the sum is rounded, added, and rounded again."""
        delta = memory.rounded(np.asarray(values, np.float32))
        memory.out[at] = memory.rounded(memory.out[at] + delta)


@dataclass(frozen=True, kw_only=True)
class BgmvShrink(_Bgmv):
    """Block (j, i, 0) makes element j of row i: 128 threads take 8 products each of a tile."""

    KERNEL: ClassVar[Kernel] = Kernel("punica_bgmv_shrink", shrinks=True, scales="once")

    def program(self, index: Index, memory: Memory) -> Block:
        j, i, _ = index
        adapter_id, row = self.row(i)
        products = memory.weights[adapter_id][j] * memory.x[row] * memory.scaling[adapter_id]
        padded = np.zeros(ceil_div(self.k, TILE_K) * TILE_K, np.float32)
        padded[: self.k] = products
        by_lane = _in_order(padded.reshape(-1, WARPS, LANES, VECTOR))
        by_warp = _shuffled_down(by_lane)
        self.add(memory, (row, j), _in_order(by_warp.reshape(1, -1))[0])
        yield from ()


@dataclass(frozen=True, kw_only=True)
class BgmvExpand(_Bgmv):
    """Block (t, i, 0) makes one tile of row i: r / 8 threads per element."""

    KERNEL: ClassVar[Kernel] = Kernel("punica_bgmv_expand", shrinks=False, scales="once")

    def program(self, index: Index, memory: Memory) -> Block:
        t, i, _ = index
        adapter_id, row = self.row(i)
        tx, ty, tz = self.block
        columns = slice(t * ty * tz, (t + 1) * ty * tz)
        products = memory.weights[adapter_id][columns] * memory.x[row] * memory.scaling[adapter_id]
        sums = _shuffled_down(_in_order(products.reshape(-1, tx, VECTOR)))
        self.add(memory, (row, columns), sums)
        yield from ()


def punica_bgmv_shrink(batch: Batch, h_in: int, r: int, device: Device = A100) -> BgmvShrink:
    """Punica's BGMV on the way in: v += scale * x @ A.T, a block per row and rank.

    Semantics: grid (r, rows), 128 threads; a thread sums eight neighbouring products of each tile
    of 1024, a warp adds its lanes pairwise, the block adds warps and tiles in order.

    batch    (n,) adapter ids, or Segments; base-only rows are left out, as Punica knows none
    h_in, r  widths of x and v: one of 19, and 8, 16, 32 or 64
    device   the GPU

    Raises DtypeError and ValueRangeError for widths that are no whole numbers >= 1, and as
    `segment` does. Source: this file's head.

    >>> launch = punica_bgmv_shrink([3, 3, 7], 4096, 16)
    >>> launch.grid, launch.block, punica_bgmv_shrink([3], 3424, 16).unsupported
    ((16, 3, 1), (32, 4, 1), ('width 3424: there are kernels for 19 others',))
    """
    h_in, r = whole(device, h_in=h_in, r=r)
    segments, _ = laid_out(batch)
    work = _work(segments, r)
    n = sum(each.rows for each in work)
    return BgmvShrink(
        device=device,
        segments=segments,
        x_width=h_in,
        k=h_in,
        width=r,
        grid=(r, n, 1),
        block=(LANES, WARPS, 1),
        work=work,
        early_exits=0,
        lanes=n * r * ceil_div(h_in, TILE_K) * TILE_K,
        shared_memory=STAGES * 2 * TILE_K * HALF + WARPS * SINGLE,
        bytes_read=HALF * n * r * (2 * h_in + 1),
        bytes_written=HALF * n * r,
        unsupported=_unsupported(h_in, r),
    )


def punica_bgmv_expand(batch: Batch, r: int, h_out: int, device: Device = A100) -> BgmvExpand:
    """Punica's BGMV on the way out: y += scale * v @ B.T, a block per row and tile of columns.

    Semantics: r / 8 threads share an element, each sums eight products and they add theirs
    pairwise; with 32 threads per warp and 4 warps a block makes 1024 / r elements.

    batch     (n,) adapter ids, or Segments; base-only rows are left out, as Punica knows none
    r, h_out  widths of v and y: 8, 16, 32 or 64, and one of 19
    device    the GPU

    Raises as `punica_bgmv_shrink`. Source: this file's head.

    >>> launch = punica_bgmv_expand([3, 3, 7], 16, 4096)
    >>> launch.grid, launch.block
    ((64, 3, 1), (2, 16, 4))
    """
    r, h_out = whole(device, r=r, h_out=h_out)
    segments, _ = laid_out(batch)
    tx = max(r // VECTOR, 1)
    block = (tx, max(LANES // tx, 1), WARPS)
    tiles = h_out // (block[1] * block[2])
    work = _work(segments, tiles)
    n = sum(each.rows for each in work)
    return BgmvExpand(
        device=device,
        segments=segments,
        x_width=r,
        k=r,
        width=h_out,
        grid=(tiles, n, 1),
        block=block,
        work=work,
        early_exits=0,
        lanes=n * h_out * r,
        shared_memory=0,
        bytes_read=HALF * n * (tiles * r + h_out * r + h_out),
        bytes_written=HALF * n * h_out,
        unsupported=_unsupported(h_out, r),
    )


def _work(segments: Segments, blocks_per_row: int) -> tuple[Work, ...]:
    _, parts = laid_out(segments)
    return tuple(Work(i, len(rows), len(rows), len(rows) * blocks_per_row) for i, rows in parts)


def _unsupported(width: int, r: int) -> tuple[str, ...]:
    found = [] if r in RANKS else [f"rank {r}: there are kernels for {RANKS}"]
    if width not in WIDTHS:
        found.append(f"width {width}: there are kernels for {len(WIDTHS)} others")
    return tuple(found)


def _in_order(values: Floats) -> Floats:
    """Sums over the last axis, first to last."""
    sums: Floats = values[..., 0].copy()
    for i in range(1, values.shape[-1]):
        sums += values[..., i]
    return sums


def _shuffled_down(values: Floats) -> Floats:
    """Sums over the last axis as lanes of a warp add them: the upper half to the lower, again."""
    while values.shape[-1] > 1:
        half = values.shape[-1] // 2
        values = values[..., :half] + values[..., half:]
    return values[..., 0]
