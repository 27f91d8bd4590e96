"""vLLM V1's Triton shrink and expand: a grid for the worst case, and blocks that leave it early.

Source for all of this file: vLLM, vllm/lora/ops/triton_ops/lora_shrink_op.py, lora_expand_op.py,
kernel_utils.py and, for the default sizes, utils.py (`get_lora_op_configs`); tuned sizes, which a
server may load, are not modelled. Batch-invariant mode: its pull request 30097.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from sgmv.emulator.blocks import STEP, Block, Index
from sgmv.emulator.device import A100, Device
from sgmv.emulator.launch import HALF, SINGLE, Launch, Work, ceil_div, laid_out, whole, widths
from sgmv.emulator.run import MMA_K, Kernel, Memory, multiply, zero_filled
from sgmv.ids import BASE_ONLY
from sgmv.layouts.rows import Batch, Int32, Slots, ids_of
from sgmv.layouts.vllm import LoRAKernelMeta, vllm_v1

THREADS = (128, 1, 1)  # 4 warps
STAGES = 2
SHRINK_ROWS, SHRINK_COLUMNS = 32, 16
FEW_ROWS = 128  # rows of the batch from which on shrink splits K less
EXPAND_ROWS, EXPAND_K = 64, 16


@dataclass(frozen=True, kw_only=True)
class _Triton(Launch):
    """What both kernels share: rows by the metadata, tails that repeat the tile's first rows."""

    meta: LoRAKernelMeta = field(repr=False, compare=False)
    entries: tuple[int, ...] = field(repr=False)  # the adapter of each entry, -1 for none

    def tile_rows(self, z: int, first: int, limit: int) -> tuple[Int32, int]:
        """Rows of the batch of one tile, and how many of them count: the rest are repeats."""
        length = min(limit, int(self.meta.num_tokens_per_lora[z]) - first)
        start = self.meta.lora_token_start_loc[z] + first
        rows = self.meta.token_indices_sorted_by_lora_ids[start : start + length]
        return rows[np.arange(limit) % length], length

    def leaves(self, z: int, first_row: int) -> bool:
        """Whether a block has no rows: base only, an entry of padding, or past the segment."""
        base_only = self.meta.active_lora_ids[z] == BASE_ONLY
        return bool(base_only or first_row >= self.meta.num_tokens_per_lora[z])


@dataclass(frozen=True, kw_only=True)
class VllmShrink(_Triton):
    """Block (split, tile of rows, tile of columns in x; slice; entry) adds a part of the sums."""

    KERNEL: ClassVar[Kernel] = Kernel(
        "vllm_v1_shrink",
        shrinks=True,
        adds=False,
        scales="once",
        atomics=True,
        single_out=True,
        estimated=True,
    )

    slices: int
    block_k: int

    def program(self, index: Index, memory: Memory) -> Block:
        x, piece, z = index
        split, tile = x % self.split_k, x // self.split_k
        r = self.width // self.slices
        # All row tiles of a column tile come first, in groups of 8; which tile a block gets
        # changes nothing but caches, so rows simply run fastest here.
        row_tiles = ceil_div(self.segments.n, SHRINK_ROWS)
        first, column = tile % row_tiles * SHRINK_ROWS, tile // row_tiles * SHRINK_COLUMNS
        if self.leaves(z, first):
            return
        rows, length = self.tile_rows(z, first, SHRINK_ROWS)
        columns = slice(piece * r + column, piece * r + min(column + SHRINK_COLUMNS, r))
        w = memory.weights[self.entries[z]][columns]
        sums = np.zeros((SHRINK_ROWS, w.shape[0]), np.float32)
        for k in range(split * self.block_k, self.k, self.block_k * self.split_k):
            part = slice(k, min(k + self.block_k, self.k))
            multiply(sums, memory.x[rows, part], w[:, part])
        sums *= memory.scaling[self.entries[z]]
        yield STEP
        memory.out[rows[:length], columns] += sums[:length]


@dataclass(frozen=True, kw_only=True)
class VllmExpand(_Triton):
    """Block (tile of rows and columns in x; slice; entry) makes one tile of y."""

    KERNEL: ClassVar[Kernel] = Kernel(
        "vllm_v1_expand", shrinks=False, single_x=True, estimated=True
    )

    h_outs: tuple[int, ...]
    block_n: int

    def program(self, index: Index, memory: Memory) -> Block:
        x, piece, z = index
        row_tiles = ceil_div(self.segments.n, EXPAND_ROWS)
        first, column = x % row_tiles * EXPAND_ROWS, x // row_tiles * self.block_n
        if self.leaves(z, first) or column >= self.h_outs[piece]:
            return
        rows, length = self.tile_rows(z, first, EXPAND_ROWS)
        start = sum(self.h_outs[:piece])
        columns = slice(start + column, start + min(column + self.block_n, self.h_outs[piece]))
        depth = ceil_div(self.k, EXPAND_K) * EXPAND_K
        v = memory.rounded(memory.x[rows, piece * self.k : (piece + 1) * self.k])
        w = memory.weights[self.entries[z]][columns]
        sums = np.zeros((EXPAND_ROWS, w.shape[0]), np.float32)
        multiply(sums, zero_filled(v, EXPAND_ROWS, depth), zero_filled(w, len(w), depth), MMA_K)
        at = rows[:length], columns
        memory.out[at] = memory.rounded(memory.rounded(sums[:length]) + memory.out[at])
        yield from ()


def vllm_v1_shrink(
    batch: Batch,
    h_in: int,
    r: int,
    max_loras: int,
    device: Device = A100,
    *,
    slots: Slots = None,
    slices: int = 1,
    specialize_active_lora: bool = False,
    batch_invariant: bool = False,
) -> VllmShrink:
    """The shrink of vLLM V1: v = scale * x @ A.T in float32, partial sums added by atomics.

    Semantics: grid (SPLIT_K * tiles of 32 rows * tiles of 16 ranks, slices, max_loras + 1), tiles
    counted for the whole batch, as if one adapter had all its rows. Blocks of the base-only
    segment, of unused slots and past a segment's end return at once. Split s sums products
    s * BLOCK_K + i * BLOCK_K * SPLIT_K of each: 64 splits of 256 below 128 rows, else 8 of 32.
    Each scales its sums and adds them to v atomically, in any order.

    batch                   (n,) adapter ids, or Segments
    h_in, r                 widths of x and of one slice of v; r is the padded max rank
    max_loras               slots of the server
    device                  the GPU
    slots                   id -> slot, as in `layouts.vllm_v1`; left out, the ids are slots
    slices                  matrices A that share x, as of q, k and v: v is (n, slices * r) here
    specialize_active_lora  launch for the segments that there are, not for max_loras + 1
    batch_invariant         SPLIT_K = 1: no atomics

    Where no row has an adapter vLLM launches nothing: a grid of no blocks. Shared memory is what
    the tiles of both stages take; Triton may need less.
    Raises as `layouts.vllm_v1`, and DtypeError and ValueRangeError for counts that are no whole
    numbers >= 1. Source: this file's head.

    >>> launch = vllm_v1_shrink([0, 1, -1, 1], 4096, 16, max_loras=4)
    >>> launch.grid, launch.blocks, launch.early_exits
    ((64, 1, 5), 320, 192)
    """
    h_in, r, slices = whole(device, h_in=h_in, r=r, slices=slices)
    meta = vllm_v1(batch, max_loras, slots)
    segments, parts = laid_out(meta.adapter_ids(slots))
    few = segments.n < FEW_ROWS
    block_k, split_k = (256, 64) if few else (32, 8)
    split_k = 1 if batch_invariant else split_k
    row_tiles, column_tiles = ceil_div(segments.n, SHRINK_ROWS), ceil_div(r, SHRINK_COLUMNS)
    z = _depth(meta, specialize_active_lora)
    down = [ceil_div(len(rows), SHRINK_ROWS) for _, rows in parts]
    working = sum(down) * column_tiles * split_k * slices
    n, deep = sum(len(rows) for _, rows in parts), ceil_div(h_in, block_k * split_k) * block_k
    added = SINGLE * n * r * slices * split_k
    return VllmShrink(
        device=device,
        segments=segments,
        x_width=h_in,
        k=h_in,
        width=r * slices,
        grid=(split_k * row_tiles * column_tiles, slices, z) if z else (0, 0, 0),
        block=THREADS,
        work=tuple(
            Work(i, len(rows), count * SHRINK_ROWS, count * column_tiles * split_k * slices)
            for (i, rows), count in zip(parts, down, strict=True)
        ),
        early_exits=split_k * row_tiles * column_tiles * slices * z - working,
        lanes=working * SHRINK_ROWS * SHRINK_COLUMNS * deep,
        shared_memory=STAGES * HALF * block_k * (SHRINK_ROWS + SHRINK_COLUMNS),
        bytes_read=HALF * h_in * slices * (n * column_tiles + sum(down) * r)
        + (added if split_k > 1 else 0),
        bytes_written=added + SINGLE * segments.n * r * slices * (z > 0),
        split_k=split_k,
        meta=meta,
        entries=_entries(meta, slots),
        slices=slices,
        block_k=block_k,
    )


def vllm_v1_expand(
    batch: Batch,
    r: int,
    h_out: int | Sequence[int],
    max_loras: int,
    device: Device = A100,
    *,
    slots: Slots = None,
    specialize_active_lora: bool = False,
) -> VllmExpand:
    """The expand of vLLM V1: y += v @ B.T, v in float32 rounded to B's type as it is loaded.

    Semantics: grid (tiles of 64 rows * tiles of columns, slices, max_loras + 1), tiles counted for
    the whole batch and the widest slice: 128 columns, or 64 with several slices. Blocks without
    rows, and those past the end of a narrower slice, return at once. The sums are rounded, added
    to y and rounded again; no block shares its tile with another.

    batch                   (n,) adapter ids, or Segments
    r, h_out                width of one slice of v; width of y, or one of each slice
    max_loras               slots of the server
    device                  the GPU
    slots                   id -> slot, as in `layouts.vllm_v1`; left out, the ids are slots
    specialize_active_lora  launch for the segments that there are, not for max_loras + 1

    v is (n, slices * r) here, weights B of all slices one below the other.
    Raises as `vllm_v1_shrink`. Source: this file's head.

    >>> launch = vllm_v1_expand([0, 1, -1, 1], 16, 4096, max_loras=4)
    >>> launch.grid, launch.blocks, launch.early_exits
    ((32, 1, 5), 160, 96)
    """
    (r,), h_outs = whole(device, r=r), widths("h_out", h_out)
    meta = vllm_v1(batch, max_loras, slots)
    segments, parts = laid_out(meta.adapter_ids(slots))
    slices, widest = len(h_outs), max(h_outs)
    block_n = 128 if slices == 1 else 64
    row_tiles, column_tiles = ceil_div(segments.n, EXPAND_ROWS), ceil_div(widest, block_n)
    across = sum(ceil_div(width, block_n) for width in h_outs)
    z = _depth(meta, specialize_active_lora)
    down = [ceil_div(len(rows), EXPAND_ROWS) for _, rows in parts]
    n, width = sum(len(rows) for _, rows in parts), sum(h_outs)
    return VllmExpand(
        device=device,
        segments=segments,
        x_width=r * slices,
        k=r,
        width=width,
        grid=(row_tiles * column_tiles, slices, z) if z else (0, 0, 0),
        block=THREADS,
        work=tuple(
            Work(i, len(rows), count * EXPAND_ROWS, count * across)
            for (i, rows), count in zip(parts, down, strict=True)
        ),
        early_exits=row_tiles * column_tiles * slices * z - sum(down) * across,
        lanes=sum(down) * across * EXPAND_ROWS * block_n * ceil_div(r, EXPAND_K) * EXPAND_K,
        shared_memory=STAGES * HALF * EXPAND_K * (EXPAND_ROWS + block_n),
        bytes_read=SINGLE * n * across * r + HALF * (sum(down) * r * width + n * width),
        bytes_written=HALF * n * width,
        meta=meta,
        entries=_entries(meta, slots),
        h_outs=h_outs,
        block_n=block_n,
    )


def _entries(meta: LoRAKernelMeta, slots: Slots) -> tuple[int, ...]:
    return tuple(ids_of(meta.active_lora_ids.astype(np.int64), slots).tolist())


def _depth(meta: LoRAKernelMeta, specialize_active_lora: bool) -> int:
    """The grid's third extent; 0 where vLLM launches nothing."""
    if meta.no_lora_flag_cpu[0]:
        return 0
    return (
        int(meta.num_active_loras_cpu[0]) if specialize_active_lora else len(meta.active_lora_ids)
    )
