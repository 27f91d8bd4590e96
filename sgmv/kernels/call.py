"""What a kernel is told: one row of int64s, `call`, and the tasks in it.

A call works on row blocks, `(slot, r, first, last)`: the sorted positions first:last of one
segment, whose adapter of rank r stands in `slot`. Where there are few blocks, each is cut along its
second axis, shrink's along ranks and expand's along columns, so that task t is cut t % cuts of
block t // cuts. Threads claim tasks from a counter; no two tasks write the same element.

    blocks          0              1              2
    tasks       0   1   2      3   4   5      6   7   8         3 cuts
"""

from __future__ import annotations

from typing import Any

import numpy as np

from sgmv.kernels.atomics import add_atomic
from sgmv.kernels.jit import jit, vector

# The operands: their addresses, and the bytes from row to row. The layer's widths.
X, X_STRIDE, Y, Y_STRIDE, V, V_STRIDE, H_IN, H_OUT = range(8)
# Which row stands at each sorted position: the address of int64 (n,).
ROWS = 8
# The slot table: addresses of int64 (slots, SLICES) and (slots,) of addresses; of float64 (slots,).
WA, WB, SCALINGS = range(9, 12)
# The plan: the address of int64 (blocks, 4), their number, and how often each phase cuts a block.
BLOCKS, BLOCK_COUNT, SHRINK_CUTS, EXPAND_CUTS = range(12, 16)
# Addresses of the kernels, 0 where a phase is left out; how many threads may take part; how many
# tasks the caller runs before it looks for signals; the address of the plan's memory.
SHRINK, EXPAND, THREADS, LIMIT, SCRATCH = range(16, 21)
COLUMNS = 21  # of a panel of wb
# How wb stands: 0 if in panels; else plainly, so many bytes from rank to rank and column to column.
WB_RANK, WB_COLUMN = 22, 23
SLICES = 24  # so many wa are one slot's: v (n, SLICES * r) has the ranks of one after the other's
# Counters, each on a cache line of its own.
SHRINK_NEXT, SHRINK_DONE, EXPAND_NEXT, MEMBERS = 32, 40, 48, 56  # MEMBERS: of an OpenMP team
FIELDS = 64

# A stack's slot table, as the plan finds it: the layer's widths; how many ids are loaded, how many
# slots there are; addresses as above, of int64 (loaded,) ids ascending and the slot of each, and of
# int64 (slots,) ranks; the columns of a panel, how wb stands, and how many slices there are.
(
    TABLE_H_IN, TABLE_H_OUT, LOADED, SLOTS, TABLE_WA, TABLE_WB, TABLE_SCALINGS, IDS, SLOT_OF, RANKS,
    TABLE_COLUMNS, TABLE_WB_RANK, TABLE_WB_COLUMN, TABLE_SLICES,
) = range(14)  # fmt: skip
TABLE_FIELDS = 14

# Segments, likewise: their number, and the addresses of rows, seq_start and adapter_ids.
S, SEGMENT_ROWS, SEQ_START, SEGMENT_IDS = range(4)
SEGMENTS_FIELDS = 4

# Columns of a panel of wb, (r, PANEL), as the tiles take them; the last is as narrow as what is
# left. Where no tile will read them they are wide: plain loops took 4 times as long over 64.
PANEL, WIDE_PANEL = 64, 1024
RANK_UNIT = 8  # shrink's cuts fall between so many ranks, expand's between panels

INTEGER, FLOAT64 = np.int64(0), np.float64(0)  # tell `vector` what stands at an address


@jit()
def claim(address, counter):
    """The number of a task that no other thread will do."""
    return add_atomic(address + 8 * counter, 1)


@jit()
def block_of(call, task, cuts):
    """The row block `(slot, r, first, last)` of a task."""
    start = task // cuts * 4
    blocks = vector(call[BLOCKS], call[BLOCK_COUNT] * 4, INTEGER)
    return blocks[start], blocks[start + 1], blocks[start + 2], blocks[start + 3]


@jit()
def cut_of(task, cuts, extent, unit):
    """The part low:high of an extent that a task does; cuts fall between whole units."""
    units = -(-extent // unit)
    part = task % cuts
    return units * part // cuts * unit, min(units * (part + 1) // cuts * unit, extent)


@jit()
def item(address: int, index: int) -> Any:
    """The int64 number `index` at this address."""
    return vector(address + 8 * index, 1, INTEGER)[0]
