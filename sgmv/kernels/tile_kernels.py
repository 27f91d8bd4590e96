"""The kernels of the tiles: a task's rows, ranks and columns, tile after tile.

    shrink   a K block at a time: six rows of x stay in L1 for all of the task's ranks
    expand   as many panels of wb as stay in L2 while all of the task's rows pass over them

Many rows meet each weight many times. Where it pays, weights of 16 bits are widened once for all of
them, and so are six rows of x for many ranks (widened.py). Weights as wide as a layer, those of an
expert, have rows as far apart as a row is long, often a power of two, so that they crowd the same
sets of L2: the first six rows of x that meet them copy them side by side. The bits are the same.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from sgmv.kernels.cpu import HALVES_BFLOAT16, SUMS_BFLOAT16, WIDENS
from sgmv.kernels.jit import entry, jit, record, records, size_of, vector
from sgmv.kernels.panels import panels, plain_rank, scratch
from sgmv.kernels.plan import RANKS_IN_L2
from sgmv.kernels.records import BLOCK, CALL, FLOAT64, PANEL, TABLE
from sgmv.kernels.tasks import (
    NONE,
    claim_expand,
    claim_shrink,
    finish_shrink,
    gain_addresses,
    item,
    task_in_part,
)
from sgmv.kernels.tiles import MOST_ROWS, expand_tiles, shrink_tiles
from sgmv.kernels.widened import (
    K_BLOCK,
    ROW,
    STEP,
    room_of,
    start_of,
    widen_rows,
    widened_panels,
)

PAIRS_BLOCK = 2 * K_BLOCK  # where a lane takes two k at a time: as many bytes, and steps
L2_BYTES = 256 << 10  # of packed wb, that stay in L2 while all rows of a task pass over them
# A task of more rows, and of this number of ranks, is worth widening for, one of many rows and of
# weights as wide as a layer worth packing: see docs/kernels.md.
FEW_ROWS, MANY_ROWS = 30, 48
MANY_RANKS = 16


@jit()
def next_wa(address, task):
    """The address of the wa that this thread reads after the task's, if all threads take turns."""
    call = record(CALL, address)
    table = record(TABLE, call.table)
    number = min(task.number + call.threads, call.block_count * call.shrink_cuts - 1)
    block = records(BLOCK, call.blocks, call.block_count)[number // call.shrink_cuts]
    return item(table.wa, block.slot * table.slices)


@jit()
def shrink_task(x_like, w_like, address, task, block):
    """v[rows of the task, its ranks] = x @ wa.T, `block` k after the other."""
    table = record(TABLE, record(CALL, address).table)
    row = table.h_in * size_of(w_like)
    groups = -(-(task.last - task.first) // MOST_ROWS)
    for k in range(0, table.h_in, block):
        width = min(block, table.h_in - k)
        p = task.first
        for g in range(groups):
            count = (task.last - p) // (groups - g)
            for s in range(table.slices):  # x is read once, and stays in L1 for the others
                j = s * task.r  # in v; wa is passed as if its ranks began there
                w = item(table.wa, task.slot * table.slices + s) - j * row
                after = w + (j + task.low) * row + (k + width) * size_of(w_like)
                if k + width == table.h_in:
                    after = next_wa(address, task) + task.low * row
                w_at, some_k = (w, row, after), (k, width)
                ranks = j + task.low, j + task.high
                shrink_tiles(x_like, w_like, address, (p, count), None, w_at, None, ranks, some_k)
            p += count


@jit()
def shrink_packed(x_like, w_like, packed_like, widened_x, address, task, room, block):
    """The same of many rows: the first six leave the weights of a K block side by side in the room.

    packed_like  what they are there: float32, or as they are stored
    widened_x    None, and rows of x are read where they are; or float32: they go into the room, too
    """
    table = record(TABLE, record(CALL, address).table)
    groups = -(-(task.last - task.first) // MOST_ROWS)
    packed = start_of(room)
    x = packed + table.slices * (task.high - task.low) * ROW
    for k in range(0, table.h_in, block):
        width = min(block, table.h_in - k)
        p = task.first
        for g in range(groups):
            count = (task.last - p) // (groups - g)
            if g == 0:
                pack_ranks(x_like, w_like, address, task, count, packed, (k, width))
            elif widened_x is None:
                operands = address, task, (p, count), None, packed, (k, width)
                packed_ranks(x_like, packed_like, *operands)
            else:
                written = widen_rows(x_like, w_like, address, p, count, k, width, x)
                operands = address, task, (p, count), (x - 4 * k, ROW), packed, (k, written)
                packed_ranks(widened_x, packed_like, *operands)
            p += count


@jit()
def pack_ranks(x_like, w_like, address, task, count, packed, some_k):
    """The task's first rows of x by its weights where they are stored, which are copied as well."""
    table = record(TABLE, record(CALL, address).table)
    row = table.h_in * size_of(w_like)
    some_rows = task.first, count
    for s in range(table.slices):
        before = s * task.r  # in v; wa and its copy are passed as if their ranks began there
        low, high = before + task.low, before + task.high
        w = item(table.wa, task.slot * table.slices + s) - before * row
        copy_at = packed + (s * (high - low) - low) * ROW, ROW
        w_at = w, row, w
        shrink_tiles(x_like, w_like, address, some_rows, None, w_at, copy_at, (low, high), some_k)


@jit()
def packed_ranks(x_like, packed_like, address, task, some_rows, x_at, packed, some_k):
    """Rows of x, or those at x_at, by the weights that `pack_ranks` has left."""
    slices = record(TABLE, record(CALL, address).table).slices
    for s in range(slices):
        low, high = s * task.r + task.low, s * task.r + task.high
        w = packed + (s * (high - low) - low) * ROW - some_k[0] * size_of(packed_like)
        w_at = w, ROW, w
        shrink_tiles(x_like, packed_like, address, some_rows, x_at, w_at, None, (low, high), some_k)


def shrink_kernel(x_like: Any, w_like: Any) -> int:
    """The kernel v = x @ wa.T: up to `limit` tasks of the call at an address, block by block."""
    both_bfloat16 = x_like.dtype == w_like.dtype == np.int16
    in_pairs, in_halves = SUMS_BFLOAT16 and both_bfloat16, HALVES_BFLOAT16 and both_bfloat16
    block = PAIRS_BLOCK if in_pairs else K_BLOCK
    packed_like = w_like if in_pairs else np.float32(0)
    widens = WIDENS and not in_pairs and min(x_like.itemsize, w_like.itemsize) == 2
    many_ranks = 2 * MANY_RANKS if in_halves else MANY_RANKS  # halves are widened at half the cost
    # Rows of x have to be in the order of the weights in the room.
    widened_x = packed_like if x_like.itemsize == 2 and (widens or in_halves) else None

    def tiles_shrink(address, limit):
        slices = record(TABLE, record(CALL, address).table).slices
        room = np.empty(0, np.float32)
        for _ in range(limit):
            task = claim_shrink(address)
            if task.number == NONE:
                return
            rows, ranks = task.last - task.first, task.high - task.low
            widening_pays = widens and rows > FEW_ROWS and ranks >= many_ranks
            if widening_pays or (rows > MANY_ROWS and task.r > RANKS_IN_L2):
                room = room_of(room, (slices * ranks + MOST_ROWS) * ROW // 4)
                shrink_packed(x_like, w_like, packed_like, widened_x, address, task, room, block)
            else:
                shrink_task(x_like, w_like, address, task, block)
            finish_shrink(address, task, np.float32(0))

    return entry(tiles_shrink)


@jit()
def columns_in_l2(r, w_like):
    """The number of columns of wb that stay in L2, whole panels."""
    return max(1, L2_BYTES // (PANEL * max(r, 1) * size_of(w_like))) * PANEL


@jit()
def expand_block(w_like, y_like, address, task, wb, columns, scaling):
    """The task's rows and these columns (low, high), a tile of rows after the other."""
    gains = gain_addresses(record(TABLE, record(CALL, address).table), task.slot)
    groups = -(-(task.last - task.first) // MOST_ROWS)
    p = task.first
    for g in range(groups):
        count = (task.last - p) // (groups - g)
        after = p + count if g + 1 < groups else p  # they are as many, or one more
        operands = w_like, y_like, address, (p, count, after), wb, task.r, scaling
        if gains[0] == 0:
            expand_tiles(*operands, None, columns)
        else:
            expand_tiles(*operands, gains, columns)
        p += count


@jit()
def expand_widened(w_like, y_like, address, task, room, wide_room, scaling):
    """The same as `expand_task` over wb as float32 in `wide_room`."""
    float32 = np.float32(0)
    step = columns_in_l2(task.r, float32)
    for c in range(task.low, task.high, step):
        end = min(c + step, task.high)
        table = record(TABLE, record(CALL, address).table)
        wb = panels(table, task.slot, task.r, c, end, room, w_like) + c * task.r * size_of(w_like)
        wide = widened_panels(w_like, wb, (end - c) * task.r, wide_room) - 4 * c * task.r
        expand_block(float32, y_like, address, task, wide, (c, end), scaling)


@jit()
def expand_task(w_like, y_like, address, task, room, scaling):
    """All of the task's columns, as many at a time as stay in L2."""
    step = columns_in_l2(task.r, w_like)
    for c in range(task.low, task.high, step):
        end = min(c + step, task.high)
        table = record(TABLE, record(CALL, address).table)
        wb = panels(table, task.slot, task.r, c, end, room, w_like)
        expand_block(w_like, y_like, address, task, wb, (c, end), scaling)


def expand_kernel(w_like: Any, y_like: Any) -> int:
    """The kernel y += scaling * v @ wb: up to `limit` tasks of the call, row block by row block."""
    widens = WIDENS and w_like.itemsize == 2

    def tiles_expand(address, limit):
        table = record(TABLE, record(CALL, address).table)
        rank = plain_rank(address)
        room = scratch(rank, columns_in_l2(rank, w_like), w_like)
        wide_room = np.empty(0, np.float32)
        for _ in range(limit):
            part = claim_expand(address)
            if part.number == NONE:
                return
            for block in range(part.first, part.last):
                task = task_in_part(address, part, block)
                scaling = np.float32(vector(table.scalings + 8 * task.slot, 1, FLOAT64)[0])
                if widens and task.last - task.first > FEW_ROWS:
                    elements = columns_in_l2(task.r, np.float32(0)) * task.r
                    wide_room = room_of(wide_room, elements + STEP)
                    expand_widened(w_like, y_like, address, task, room, wide_room, scaling)
                else:
                    expand_task(w_like, y_like, address, task, room, scaling)

    return entry(tiles_expand)
