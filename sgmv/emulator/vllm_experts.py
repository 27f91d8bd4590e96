"""vLLM's LoRA on experts: pairs (token, expert) sorted by adapter and expert, padded to blocks.

    adapters   0 0 1           experts of each token   2 5   2 7   2 5
    adapter 0  expert 2: 2 pairs, padded to 16 rows    expert 5: 1, to 16    expert 7: 1, to 16
    adapter 1  expert 2: 1 pair,  padded to 16 rows    expert 5: 1, to 16
    grid       as many blocks of rows as an adapter could have at most, for each of max_loras + 1

Source for all of this file: vLLM 0.32, vllm/lora/ops/triton_ops/fused_moe_lora_op.py,
`_fused_moe_lora_kernel`; lora/punica_wrapper/punica_gpu.py, `moe_lora_align_block_size`; for the
sizes of blocks, `get_default_config` of model_executor/layers/fused_moe/fused_moe.py. Ranks up to
128 have both products in one kernel of the same grid of rows; tuned sizes are not modelled.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from sgmv.checks import check_count
from sgmv.emulator.blocks import Block, Index
from sgmv.emulator.device import A100, Device
from sgmv.emulator.launch import HALF, Launch, Work, ceil_div, laid_out, whole
from sgmv.emulator.run import Kernel, Memory, multiply, zero_filled
from sgmv.errors import ShapeError, UnknownAdapterError, some
from sgmv.ids import BASE_ONLY, Integers, as_pairs
from sgmv.layouts.rows import Batch, as_segments, row_ids

SPARSE = 8  # so many (adapter, expert) for each pair: pairs are not sorted then


@dataclass(frozen=True, kw_only=True)
class _Moe(Launch):
    """What both kernels share. An id of the segments is adapter * experts + expert, of a pair.

    tiles       of each entry of the grid's z, (id, rows) of its blocks of rows
    block_rows  rows of one, padding included
    is_sorted   whether pairs are sorted; else each has a block of its own
    """

    experts: int
    block_rows: int
    block_columns: int
    block_k: int
    is_sorted: bool
    tiles: tuple[tuple[tuple[int, Integers], ...], ...] = field(repr=False, compare=False)

    def program(self, index: Index, memory: Memory) -> Block:
        """Block (tile of rows and of columns; slice; entry): rows run fastest."""
        x, _, z = index
        row_tiles = self.grid[0] // ceil_div(self.width, self.block_columns)
        tile, column = x % row_tiles, x // row_tiles * self.block_columns
        if tile >= len(self.tiles[z]):
            return
        pair_id, rows = self.tiles[z][tile]
        if pair_id == BASE_ONLY:
            return
        columns = slice(column, min(column + self.block_columns, self.width))
        w = memory.weights[pair_id][columns]
        sums = np.zeros((self.block_rows, self.block_columns), np.float32)
        depth = ceil_div(self.k, self.block_k) * self.block_k
        a = zero_filled(memory.x[rows], self.block_rows, depth)
        multiply(sums, a, zero_filled(w, self.block_columns, depth))
        made = memory.rounded(sums[: len(rows), : len(w)])
        at = rows, columns
        memory.out[at] = memory.rounded(made + memory.out[at]) if self.KERNEL.adds else made
        yield from ()

    def own_figures(self) -> dict[str, Any]:
        return {
            "experts": self.experts,
            "block_rows": self.block_rows,
            "sorted": int(self.is_sorted),
        }


@dataclass(frozen=True, kw_only=True)
class MoeShrink(_Moe):
    """v of each pair, rounded."""

    KERNEL: ClassVar[Kernel] = Kernel("vllm_moe_shrink", shrinks=True, adds=False, estimated=True)


@dataclass(frozen=True, kw_only=True)
class MoeExpand(_Moe):
    """y of each pair, the sums rounded before they are added."""

    KERNEL: ClassVar[Kernel] = Kernel("vllm_moe_expand", shrinks=False, estimated=True)


def vllm_moe_shrink(
    batch: Batch,
    expert_ids: npt.ArrayLike,
    h_in: int,
    r: int,
    experts: int,
    max_loras: int,
    device: Device = A100,
) -> MoeShrink:
    """The shrink of adapters on experts of vLLM: v = x @ A.T of each (token, expert).

    Semantics: the pairs of one (adapter, expert) are padded to a whole number of blocks of 16, 32,
    64 or 128 rows, by the tokens of the batch. The grid has for each of max_loras + 1 adapters as
    many blocks as one could need that had all pairs: pairs + experts * (block - 1) rows, or a block
    per pair if there are fewer pairs than experts. Those past an adapter's own return at once.
    Below one pair for 8 (adapter, expert), pairs are not sorted: each has a block of its own, and
    the other rows of that are padding.

    batch       (n,) adapter ids, each below max_loras, or Segments
    expert_ids  (n, k) the experts of each token, -1 for none
    h_in, r     widths of x and v
    experts     E
    max_loras   slots
    device      the GPU

    An id of the figures is adapter * E + expert; rows are pairs. Of one slice: with gate and up
    apart, w13's grid has two. Shared memory is what the tiles take; Triton may need less.
    Raises DtypeError, ShapeError and ValueRangeError; UnknownAdapterError for ids past the slots,
    or experts past E. Source: this file's head.

    >>> launch = vllm_moe_shrink([0, 0, 1], [[2, 5], [2, 7], [2, 5]], 2048, 16, 8, 1 << 1)
    >>> figures = launch.figures()
    >>> launch.grid, figures["rows"], figures["row_slots"]
    ((6, 1, 3), 6, 80)
    """
    h_in, r = whole(device, h_in=h_in, r=r)
    return MoeShrink(**_launch(batch, expert_ids, h_in, r, experts, max_loras, device, True))


def vllm_moe_expand(
    batch: Batch,
    expert_ids: npt.ArrayLike,
    r: int,
    h_out: int,
    experts: int,
    max_loras: int,
    device: Device = A100,
) -> MoeExpand:
    """The expand of adapters on experts of vLLM: y += v @ B.T of each (token, expert).

    Semantics: the grid is that of `vllm_moe_shrink`, with tiles of columns of y; the sums are
    rounded, added to y and rounded again.

    r, h_out    widths of v and y; the other arguments are those of `vllm_moe_shrink`

    Raises as `vllm_moe_shrink`. Source: this file's head.

    >>> vllm_moe_expand([0, 0, 1], [[2, 5], [2, 7], [2, 5]], 16, 1536, 8, 2).grid
    (144, 1, 3)
    """
    r, h_out = whole(device, r=r, h_out=h_out)
    return MoeExpand(**_launch(batch, expert_ids, r, h_out, experts, max_loras, device, False))


def _launch(
    batch: Batch,
    expert_ids: npt.ArrayLike,
    k: int,
    width: int,
    experts: int,
    max_loras: int,
    device: Device,
    shrinks: bool,
) -> dict[str, Any]:
    """The fields of either launch."""
    experts = check_count("experts", experts, 1)
    max_loras = check_count("max_loras", max_loras, 1)
    adapters, pair_ids, tokens = _pairs(batch, expert_ids, experts, max_loras)
    segments, parts = laid_out(pair_ids)
    pairs = len(pair_ids)
    rows = next(
        size for size, most in ((16, 32), (32, 96), (64, 512), (128, tokens)) if tokens <= most
    )
    columns, depth = 64 if tokens <= 64 else 128, 128 if tokens <= 64 else 64
    stages = 4 if tokens <= 32 else 3
    if shrinks:
        columns = min(columns, _power_of_2(width))
    else:
        depth = max(16, min(depth, _power_of_2(k)))
    is_sorted = pairs * SPARSE > experts * max_loras
    if is_sorted:
        padded = pairs * rows if pairs < experts else pairs + experts * (rows - 1)
        row_tiles = ceil_div(padded, rows)
        active = np.unique(adapters).tolist()
        entries = [*active, *[BASE_ONLY] * (max_loras + 1 - len(active))]
        by_adapter = _blocks(parts, experts, rows)
        tiles = tuple(tuple(by_adapter.get(entry, ())) for entry in entries)
    else:
        row_tiles = pairs
        tiles = (tuple((i, np.array([p])) for p, i in enumerate(pair_ids.tolist())),)
    across = ceil_div(width, columns)
    blocks = [ceil_div(len(of), rows) if is_sorted else len(of) for _, of in parts]
    n, busy = sum(len(of) for _, of in parts), sum(blocks)
    weights = busy * k * width
    return {
        "device": device,
        "segments": segments,
        "x_width": k,
        "k": k,
        "width": width,
        "grid": (row_tiles * across, 1, len(tiles)),
        "block": (32 * (4 if tokens <= 128 else 8), 1, 1),
        "work": tuple(
            Work(i, len(of), count * rows, count * across)
            for (i, of), count in zip(parts, blocks, strict=True)
        ),
        "early_exits": row_tiles * across * len(tiles) - busy * across,
        "lanes": busy * across * rows * columns * ceil_div(k, depth) * depth,
        "shared_memory": stages * HALF * depth * (rows + columns),
        "bytes_read": HALF * (n * across * k + weights + (0 if shrinks else n * width)),
        "bytes_written": HALF * n * width,
        "experts": experts,
        "block_rows": rows,
        "block_columns": columns,
        "block_k": depth,
        "is_sorted": is_sorted,
        "tiles": tiles,
    }


def _pairs(
    batch: Batch, expert_ids: npt.ArrayLike, experts: int, max_loras: int
) -> tuple[Integers, Integers, int]:
    """The adapter of each token; the id of each pair, -1 for none; how many tokens."""
    adapters = row_ids(as_segments(batch))
    flat, k = as_pairs(expert_ids, "expert_ids")
    k = 1 if k is None else k
    if len(flat) != len(adapters) * k or k < 1:
        raise ShapeError(
            "expert_ids", f"({len(adapters)}, k)", f"{len(flat)} in all", "give k to each token"
        )
    for argument, ids, most in (("batch", adapters, max_loras), ("expert_ids", flat, experts)):
        if ids.max(initial=BASE_ONLY) >= most:
            beyond = some(np.unique(ids[ids >= most]))
            raise UnknownAdapterError(argument, f"-1, or 0..{most - 1}", beyond, "raise the count")
    of_pair = np.repeat(adapters, k)
    none = (of_pair == BASE_ONLY) | (flat == BASE_ONLY)
    return adapters, np.where(none, BASE_ONLY, of_pair * experts + flat), len(adapters)


def _blocks(
    parts: list[tuple[int, Integers]], experts: int, rows: int
) -> dict[int, list[tuple[int, Integers]]]:
    """The blocks of rows of each adapter: of each of its experts, as many as it needs."""
    found: dict[int, list[tuple[int, Integers]]] = {}
    for i, of in parts:
        blocks = ((i, of[first : first + rows]) for first in range(0, len(of), rows))
        found.setdefault(i // experts, []).extend(blocks)
    return found


def _power_of_2(value: int) -> int:
    """The next power of 2."""
    return 1 << (value - 1).bit_length()
