"""SGLang's csgmv: segments cut into chunks, a block per chunk and tile of columns.

Source for all of this file: SGLang, python/sglang/srt/lora/triton_ops/chunked_sgmv_shrink.py,
chunked_sgmv_expand.py and, for the default sizes, lora_tuning_config.py; tuned sizes, which a
server may load, are not modelled. The chunks: lora/backend/chunked_backend.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from sgmv.checks import check_count
from sgmv.emulator.blocks import Block, Index
from sgmv.emulator.device import A100, Device
from sgmv.emulator.launch import HALF, Launch, Work, ceil_div, laid_out, whole, widths
from sgmv.emulator.run import Kernel, Memory, multiply, zero_filled
from sgmv.ids import BASE_ONLY, Integers
from sgmv.layouts.rows import Batch, offsets
from sgmv.layouts.sglang import MIN_CHUNK, chunk_rows, cut
from sgmv.segment import Segments

THREADS = (128, 1, 1)  # Triton's default of 4 warps
STAGES = 3  # Triton's default
SHRINK_COLUMNS, SHRINK_K = 16, 256
EXPAND_COLUMNS, EXPAND_K = 64, 16
MOST_SLICES = 3


@dataclass(frozen=True, kw_only=True)
class _Csgmv(Launch):
    """What both kernels share: chunk c is a run of rows of one adapter.

    chunk      rows that a block's tile holds
    chunk_ids  (chunks,) the adapter of each, -1 for those of base-only rows
    starts     (chunks + 1,) where each chunk starts in the sorted batch
    """

    chunk: int
    chunk_ids: Integers = field(repr=False, compare=False)
    starts: Integers = field(repr=False, compare=False)

    def chunk_of(self, c: int) -> tuple[int, Integers]:
        """The adapter and the rows of the batch of one chunk."""
        rows = self.segments.rows[self.starts[c] : self.starts[c + 1]]
        return int(self.chunk_ids[c]), rows

    def own_figures(self) -> dict[str, Any]:
        return {"chunk": self.chunk}


@dataclass(frozen=True, kw_only=True)
class CsgmvShrink(_Csgmv):
    """Block (tile of columns, chunk, 0) makes 16 columns of v for one chunk."""

    KERNEL: ClassVar[Kernel] = Kernel(
        "sglang_csgmv_shrink", shrinks=True, adds=False, estimated=True
    )

    def program(self, index: Index, memory: Memory) -> Block:
        tile, c, _ = index
        adapter_id, rows = self.chunk_of(c)
        if adapter_id == BASE_ONLY:
            return
        columns = slice(tile * SHRINK_COLUMNS, min((tile + 1) * SHRINK_COLUMNS, self.width))
        depth = ceil_div(self.k, SHRINK_K) * SHRINK_K
        w = memory.weights[adapter_id][columns]
        sums = np.zeros((self.chunk, SHRINK_COLUMNS), np.float32)
        x = zero_filled(memory.x[rows], self.chunk, depth)
        multiply(sums, x, zero_filled(w, SHRINK_COLUMNS, depth))
        memory.out[rows, columns] = memory.rounded(sums[: len(rows), : len(w)])
        yield from ()


@dataclass(frozen=True, kw_only=True)
class CsgmvExpand(_Csgmv):
    """Block (tile of columns, slice, chunk) makes 64 columns of y for one chunk."""

    KERNEL: ClassVar[Kernel] = Kernel(
        "sglang_csgmv_expand", shrinks=False, scales="by adapter", estimated=True
    )

    h_outs: tuple[int, ...]

    def program(self, index: Index, memory: Memory) -> Block:
        tile, piece, c = index
        adapter_id, rows = self.chunk_of(c)
        # No test for a slice's end: past a narrower one every load and store is masked.
        first = tile * EXPAND_COLUMNS
        last = min(first + EXPAND_COLUMNS, self.h_outs[piece])
        if adapter_id == BASE_ONLY or first >= last:
            return
        start = sum(self.h_outs[:piece])
        columns = slice(start + first, start + last)
        depth = ceil_div(self.k, EXPAND_K) * EXPAND_K
        v = memory.x[rows, piece * self.k : (piece + 1) * self.k]
        w = memory.weights[adapter_id][columns]
        sums = np.zeros((self.chunk, EXPAND_COLUMNS), np.float32)
        multiply(sums, zero_filled(v, self.chunk, depth), zero_filled(w, EXPAND_COLUMNS, depth))
        sums *= memory.scaling[adapter_id]
        at = rows, columns
        delta = memory.rounded(sums[: len(rows), : len(w)])
        memory.out[at] = memory.rounded(delta + memory.out[at])
        yield from ()


def sglang_csgmv_shrink(
    batch: Batch,
    h_in: int,
    r: int,
    device: Device = A100,
    *,
    slices: int = 1,
    max_lora_chunk_size: int = MIN_CHUNK,
) -> CsgmvShrink:
    """SGLang's csgmv on the way in: v = x @ A.T, rounded, a block per chunk and 16 columns.

    Semantics: grid (tiles of columns, chunks). Chunks of base-only rows, which SGLang gives a slot
    of rank 0, return at once. K in steps of 256, never split.

    batch                (n,) adapter ids, or Segments
    h_in, r              widths of x and of one slice of v
    device               the GPU
    slices               matrices A that share x, as of q, k and v: v is (n, slices * r)
    max_lora_chunk_size  the server's; see `layouts.sglang`

    Shared memory is what the tiles of three stages take; Triton may need less.
    Raises DtypeError and ValueRangeError for counts that are no whole numbers >= 1, and as
    `segment` does. Source: this file's head.

    >>> launch = sglang_csgmv_shrink([0] * 40 + [-1] * 8, 4096, 16)
    >>> launch.grid, launch.early_exits, launch.figures()["wasted_rows"]
    ((1, 4, 1), 1, 8)
    """
    h_in, r, slices = whole(device, h_in=h_in, r=r, slices=slices)
    segments, parts = laid_out(batch)
    width = r * slices
    chunk, ids, starts, pieces = _cut(segments, max_lora_chunk_size)
    across = ceil_div(width, SHRINK_COLUMNS)
    n, chunks = sum(len(rows) for _, rows in parts), sum(pieces)
    return CsgmvShrink(
        device=device,
        segments=segments,
        x_width=h_in,
        k=h_in,
        width=width,
        grid=(across, len(ids), 1),
        block=THREADS,
        work=tuple(
            Work(i, len(rows), count * chunk, count * across)
            for (i, rows), count in zip(parts, pieces, strict=True)
        ),
        early_exits=across * (len(ids) - chunks),
        lanes=chunks * across * chunk * SHRINK_COLUMNS * ceil_div(h_in, SHRINK_K) * SHRINK_K,
        shared_memory=STAGES * HALF * SHRINK_K * (chunk + SHRINK_COLUMNS),
        bytes_read=HALF * h_in * (n * across + chunks * width),
        bytes_written=HALF * n * width,
        chunk=chunk,
        chunk_ids=ids,
        starts=starts,
    )


def sglang_csgmv_expand(
    batch: Batch,
    r: int,
    h_out: int | Sequence[int],
    device: Device = A100,
    *,
    max_lora_chunk_size: int = MIN_CHUNK,
) -> CsgmvExpand:
    """SGLang's csgmv on the way out: y += scaling * v @ B.T, a block per chunk and 64 columns.

    Semantics: grid (tiles of the widest slice, slices, chunks); K in steps of 16. The sums are
    scaled, rounded, added to y and rounded again.

    batch                (n,) adapter ids, or Segments
    r, h_out             width of one slice of v; width of y, or one of each slice, at most three
    device               the GPU
    max_lora_chunk_size  the server's; see `layouts.sglang`

    v is (n, slices * r) here, weights B of all slices one below the other. Blocks past the end of a
    narrower slice, which compute on zeros, count as early exits.
    Raises as `sglang_csgmv_shrink`. Source: this file's head.

    >>> launch = sglang_csgmv_expand([0] * 40 + [-1] * 8, 16, (4096, 1024, 1024))
    >>> launch.grid, launch.early_exits
    ((64, 3, 4), 480)
    """
    (r,), h_outs = whole(device, r=r), widths("h_out", h_out)
    segments, parts = laid_out(batch)
    chunk, ids, starts, pieces = _cut(segments, max_lora_chunk_size)
    widest, width = ceil_div(max(h_outs), EXPAND_COLUMNS), sum(h_outs)
    across = sum(ceil_div(each, EXPAND_COLUMNS) for each in h_outs)
    n, chunks = sum(len(rows) for _, rows in parts), sum(pieces)
    many = f"{len(h_outs)} slices: the kernel takes at most {MOST_SLICES}"
    return CsgmvExpand(
        device=device,
        segments=segments,
        x_width=r * len(h_outs),
        k=r,
        width=width,
        grid=(widest, len(h_outs), len(ids)),
        block=THREADS,
        work=tuple(
            Work(i, len(rows), count * chunk, count * across)
            for (i, rows), count in zip(parts, pieces, strict=True)
        ),
        early_exits=widest * len(h_outs) * len(ids) - chunks * across,
        lanes=chunks * across * chunk * EXPAND_COLUMNS * ceil_div(r, EXPAND_K) * EXPAND_K,
        shared_memory=STAGES * HALF * EXPAND_K * (chunk + EXPAND_COLUMNS),
        bytes_read=HALF * (n * across * r + chunks * r * width + n * width),
        bytes_written=HALF * n * width,
        unsupported=(many,) if len(h_outs) > MOST_SLICES else (),
        chunk=chunk,
        chunk_ids=ids,
        starts=starts,
        h_outs=h_outs,
    )


def _cut(segments: Segments, limit: int) -> tuple[int, Integers, Integers, list[int]]:
    """Rows per chunk; the adapter of each chunk, where each starts; chunks of each adapter."""
    chunk = chunk_rows(segments.n, check_count("max_lora_chunk_size", limit, 1))
    ids, lengths = cut(segments.adapter_ids, segments.lengths, chunk)
    own = segments.adapter_ids != BASE_ONLY
    pieces = [ceil_div(length, chunk) for length in segments.lengths[own].tolist()]
    return chunk, ids, offsets(lengths), pieces
