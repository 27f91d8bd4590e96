"""Punica's SGMV: the hand-written shrink, with its split of K and its grid barriers, and CUTLASS.

Source for all of this file: punica (release 1.1.0), csrc/sgmv_flashinfer/sgmv_all.cu and
sgmv_flashinfer.cuh for the shrink, csrc/sgmv/sgmv_cutlass.cuh for the expand,
src/punica/ops/__init__.py for `tmp`; its pull request 35 for the barriers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from sgmv.emulator.blocks import BARRIER, Block, Deadlock, Index
from sgmv.emulator.device import A100, Device
from sgmv.emulator.launch import HALF, SINGLE, Launch, Work, ceil_div, laid_out, whole
from sgmv.emulator.run import Kernel, Memory, multiply, zero_filled
from sgmv.errors import ValueRangeError
from sgmv.layouts.rows import Batch

RANKS = (16, 32, 64, 96, 128)
RELEASES = ("1.0.0", "1.1.0")
WARPS, LANES = 4, 32
STEP_ROWS = WARPS * 16  # rows that a block takes at once
STAGE_K = 8 * 16  # products that one stage of shared memory holds per element
STAGES = 2
CHUNK = 256  # products that a block sums where K is split
TMP_LIMIT = 8 << 20
WITHOUT_OPT_IN = 48 << 10  # bytes that a block may take of shared memory unasked
UINT32 = 1 << 32

TILE_ROWS, TILE_COLUMNS, TILE_K, INSTRUCTION_K = 32, 128, 16, 8
WALKERS = 512
ALIGNMENT = 8  # elements that one load of CUTLASS takes


@dataclass(frozen=True, kw_only=True)
class SgmvShrink(Launch):
    """Block (c, s, 0) sums chunk c of K for segment s, 64 rows at a time.

    release           "1.0.0" or "1.1.0": before and after the fix of the deadlock
    chunk             products that a block sums for each element: 256, or h_in if K is not split
    split_k_segments  the most segments for which K is split, at this width, rank and device
    """

    KERNEL: ClassVar[Kernel] = Kernel("punica_sgmv_shrink", shrinks=True)

    release: str
    chunk: int
    split_k_segments: int

    @property
    def deadlock(self) -> Deadlock | None:
        barriers = {work.barriers for work in self.work}
        if len(barriers) < 2:
            return None
        first = min(barriers)
        ended: list[Index] = []
        stuck: list[Index] = []
        for s, work in enumerate(self.work):
            blocks = ended if work.barriers == first else stuck
            blocks += [(c, s, 0) for c in range(self.split_k)]
        return Deadlock(first + 1, tuple(stuck), tuple(ended))

    @property
    def race(self) -> bool:
        steps = max((work.row_slots for work in self.work), default=0) // STEP_ROWS
        return self.cooperative and self.split_k > 1 and steps > 1

    @property
    def faults(self) -> tuple[str, ...]:
        found = list(super().faults)
        if self.race:
            found.append(
                f"race: no barrier stands between reading tmp and the next {STEP_ROWS} rows' writes"
            )
        if self.tmp > TMP_LIMIT:
            found.append(f"overflow: tmp takes {self.tmp} bytes of {TMP_LIMIT}")
        if self.rows * self.k > UINT32:
            found.append("overflow: offsets in x wrap around at 2**32")
        return tuple(found)

    def own_figures(self) -> dict[str, Any]:
        return {
            "release": self.release,
            "chunk": self.chunk,
            "split_k_segments": self.split_k_segments,
            "tmp_limit": TMP_LIMIT,
            "deadlock": self.deadlock is not None,
            "race": self.race,
        }

    def program(self, index: Index, memory: Memory) -> Block:
        c, s, _ = index
        rows = self.segment_rows(s)
        columns = slice(c * self.chunk, min((c + 1) * self.chunk, self.k))
        depth = ceil_div(self.chunk, STAGE_K) * STAGE_K
        w = memory.weights[self.work[s].adapter_id][:, columns]
        w = zero_filled(w, self.width, depth)
        steps = ceil_div(len(rows), STEP_ROWS)
        for step in range(steps):
            at = rows[step * STEP_ROWS : (step + 1) * STEP_ROWS]
            tile = zero_filled(memory.x[at, columns], STEP_ROWS, depth)
            start = memory.out[at] if c == 0 else memory.out[:0]
            sums = zero_filled(start, STEP_ROWS, self.width)
            multiply(sums, tile, w)
            if self.cooperative:
                memory.tmp[s * self.split_k + c] = sums
                memory.races.write(s * self.split_k + c, index)
                yield BARRIER
                sums = np.zeros_like(sums)
                for slot in range(s * self.split_k, (s + 1) * self.split_k):
                    memory.races.read(slot, index)
                    sums += memory.tmp[slot]
            if c == 0:
                memory.out[at] = memory.rounded(sums[: len(at)])
        for _ in range(steps, self.work[s].barriers):
            yield BARRIER


def punica_sgmv_shrink(
    batch: Batch,
    h_in: int,
    r: int,
    device: Device = A100,
    release: str = "1.1.0",
    *,
    opted_in: bool = True,
) -> SgmvShrink:
    """Punica's hand-written shrink: v += x @ A.T, K cut into chunks of 256 where all blocks fit.

    Semantics: grid (chunks, S), 4 warps of 32 lanes per block. A block takes 64 rows a step, K in
    stages of 128, two of them in shared memory. Block 0 of a segment starts from y, the others
    from 0; after each step all write float32 sums to `tmp`, wait at a grid barrier and add the
    chunks in ascending order; block 0 rounds and stores. Where chunks * S blocks are more than
    fit the device at once, K is not split and there are no barriers: another order of summation.

    batch     (n,) adapter ids, or Segments; base-only rows are left out, as Punica knows none
    h_in, r   widths of x and v
    device    the GPU
    release   "1.0.0": a segment's blocks pass one barrier per step, so that segments of different
              numbers of steps wait for each other for ever; "1.1.0": all pass the most of any
    opted_in  whether CUDA, asked how many blocks fit, counts those of more than 48 KiB

    From rank 64 on a block takes more than 48 KiB, and Punica opts in to that after it has asked.
    NVIDIA's own calculator (cuda_occupancy.h of CUDA 12.9) answers 0 for a kernel that has not:
    then K is never split at these ranks, and nothing hangs, races or overflows. opted_in=False is
    that case; which one a GPU shows has not been tried here.
    Raises ValueRangeError for another release; DtypeError and ValueRangeError for widths that are
    no whole numbers >= 1, and as `segment` does. Source: this file's head.

    >>> launch = punica_sgmv_shrink([0] * 1 + [1] * 132, 4096, 16, release="1.0.0")
    >>> launch.grid, launch.block, launch.early_exits
    ((16, 2, 1), (32, 4, 1), 0)
    >>> print(launch.deadlock)
    deadlock: blocks (0..15, 1, 0) wait at grid barrier 2 for blocks (0..15, 0, 0), \
which returned after 1
    """
    if not isinstance(release, str) or release not in RELEASES:
        raise ValueRangeError("release", f"one of {RELEASES}", repr(release), "choose one of them")
    h_in, r = whole(device, h_in=h_in, r=r)
    segments, parts = laid_out(batch)
    S = len(parts)
    shared_memory = STAGES * HALF * STAGE_K * 16 * (WARPS + r // 16)
    counted = bool(opted_in) or shared_memory <= WITHOUT_OPT_IN
    capacity = device.sms * device.resident_blocks(LANES * WARPS, shared_memory) * counted
    chunks = ceil_div(h_in, CHUNK)
    cooperative = 0 < chunks * S <= capacity
    if not cooperative:
        chunks = 1
    chunk = CHUNK if cooperative else h_in
    steps = [ceil_div(len(rows), STEP_ROWS) for _, rows in parts]
    longest = max(steps, default=0)
    work = tuple(
        Work(
            adapter_id=i,
            rows=len(rows),
            row_slots=count * STEP_ROWS,
            blocks=chunks,
            barriers=(longest if release == "1.1.0" else count) if cooperative else 0,
        )
        for (i, rows), count in zip(parts, steps, strict=True)
    )
    n, partial = sum(len(rows) for _, rows in parts), STEP_ROWS * r * SINGLE
    reduced = sum(steps) * chunks * partial if cooperative else 0
    unsupported = [] if r in RANKS else [f"rank {r}: there are kernels for {RANKS}"]
    if h_in % ALIGNMENT:
        unsupported.append(f"width {h_in}: loads of 16 bytes need a multiple of {ALIGNMENT}")
    return SgmvShrink(
        device=device,
        segments=segments,
        x_width=h_in,
        k=h_in,
        width=r,
        grid=(chunks, S, 1),
        block=(LANES, WARPS, 1),
        work=work,
        early_exits=steps.count(0) * chunks,
        lanes=sum(steps) * STEP_ROWS * r * chunks * ceil_div(chunk, STAGE_K) * STAGE_K,
        shared_memory=shared_memory,
        bytes_read=HALF * (n * h_in + sum(steps) * r * h_in + n * r) + reduced * chunks,
        bytes_written=HALF * n * r + reduced,
        split_k=chunks,
        cooperative=cooperative,
        tmp=chunks * S * partial if cooperative else 0,
        unsupported=tuple(unsupported),
        release=release,
        chunk=chunk,
        split_k_segments=capacity // ceil_div(h_in, CHUNK),
    )


@dataclass(frozen=True, kw_only=True)
class CutlassExpand(Launch):
    """Block w walks tiles w, w + 512, w + 1024 ... of all segments."""

    KERNEL: ClassVar[Kernel] = Kernel("punica_cutlass_expand", shrinks=False)

    def program(self, index: Index, memory: Memory) -> Block:
        tiles = [
            (s, row, column)
            for s, work in enumerate(self.work)
            for row in range(0, work.row_slots, TILE_ROWS)
            for column in range(0, self.width, TILE_COLUMNS)
        ]
        for s, row, column in tiles[index[0] :: WALKERS]:
            at = self.segment_rows(s)[row : row + TILE_ROWS]
            columns = slice(column, min(column + TILE_COLUMNS, self.width))
            depth = ceil_div(self.k, TILE_K) * TILE_K
            tile = zero_filled(memory.x[at], TILE_ROWS, depth)
            w = zero_filled(memory.weights[self.work[s].adapter_id][columns], TILE_COLUMNS, depth)
            sums = np.zeros((TILE_ROWS, TILE_COLUMNS), np.float32)
            multiply(sums, tile, w, INSTRUCTION_K)
            inside = sums[: len(at), : columns.stop - columns.start]
            memory.out[at, columns] = memory.rounded(inside + memory.out[at, columns])
        yield from ()


def punica_cutlass_expand(batch: Batch, r: int, h_out: int, device: Device = A100) -> CutlassExpand:
    """Punica's expand: y += v @ B.T by CUTLASS's grouped GEMM.

    Semantics: 512 blocks of 64 threads walk the tiles of all segments, 32 rows x 128 columns each,
    K in tiles of 16 and instructions of 8; float32 sums, y added to them, one rounding.

    batch     (n,) adapter ids, or Segments; base-only rows are left out, as Punica knows none
    r, h_out  widths of v and y
    device    the GPU

    Blocks for which no tile is left count as early exits. Shared memory is that of the main loop.
    Raises DtypeError and ValueRangeError for widths that are no whole numbers >= 1, and as
    `segment` does. Source: this file's head; CUTLASS, gemm/device/gemm_grouped.h.

    >>> launch = punica_cutlass_expand(range(4), 16, 4096)
    >>> launch.grid, launch.block, launch.early_exits
    ((512, 1, 1), (64, 1, 1), 384)
    """
    r, h_out = whole(device, r=r, h_out=h_out)
    segments, parts = laid_out(batch)
    across = ceil_div(h_out, TILE_COLUMNS)
    down = [ceil_div(len(rows), TILE_ROWS) for _, rows in parts]
    tiles = sum(down) * across
    n = sum(len(rows) for _, rows in parts)
    unsupported = tuple(
        f"{name} {width}: loads of 16 bytes need a multiple of {ALIGNMENT}"
        for name, width in (("rank", r), ("width", h_out))
        if width % ALIGNMENT
    )
    if r >= h_out:
        unsupported += (f"rank {r} and width {h_out}: that is a shrink",)
    return CutlassExpand(
        device=device,
        segments=segments,
        x_width=r,
        k=r,
        width=h_out,
        grid=(WALKERS, 1, 1),
        block=(64, 1, 1),
        work=tuple(
            Work(i, len(rows), count * TILE_ROWS, min(count * across, WALKERS))
            for (i, rows), count in zip(parts, down, strict=True)
        ),
        early_exits=max(0, WALKERS - tiles),
        lanes=tiles * TILE_ROWS * TILE_COLUMNS * ceil_div(r, TILE_K) * TILE_K,
        shared_memory=STAGES * HALF * TILE_K * (TILE_ROWS + TILE_COLUMNS),
        bytes_read=HALF * (n * across * r + sum(down) * r * h_out + n * h_out),
        bytes_written=HALF * n * h_out,
        unsupported=unsupported,
    )
