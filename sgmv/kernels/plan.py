"""The plan of a call: ids -> segments -> slots -> row blocks. Integers only, in compiled code.

    segment  ->  row blocks of at most ROWS_PER_BLOCK rows
             ->  each cut along ranks (shrink) or columns (expand), if there are too few blocks

How a batch is cut never changes a result: cuts fall between the kernels' own units, and rows do
not meet in any sum (see kernels/loops.py, kernels/tiles.py).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from sgmv.kernels.call import (
    BLOCKS,
    IDS,
    INTEGER,
    LOADED,
    RANKS,
    ROWS,
    SCRATCH,
    SEGMENT_IDS,
    SEGMENT_ROWS,
    SEGMENTS_FIELDS,
    SEQ_START,
    SLOT_OF,
    SLOTS,
    THREADS,
    S,
)
from sgmv.kernels.jit import jit, vector

BASE_ONLY = -1
NO_SLOT = -1
UNKNOWN = -2

ROWS_PER_BLOCK = 96  # 96 rows of one K block are 384 KiB of float32 x: they stay in L2
FEWEST_ROWS_PER_BLOCK = 12  # fewer rows would read the weights once more for too little work
# What a core does per nanosecond, roughly: multiply-adds, and weights read.
PRODUCTS_PER_NS, WEIGHTS_PER_NS = 100, 10
TASKS_PER_THREAD = 4  # enough that a thread which falls behind leaves work to the others


@jit()
def sort(ids: Any, rows: Any, seq_start: Any, segment_ids: Any, target: Any, count: Any) -> int:
    """Stable counting sort, one digit of the ids at a time; returns the number of segments.

    A digit has about as many values as there are rows, so that a pass costs O(n) even where few
    rows name large ids, and ids below n take one pass.
    target (n,) and count (most_digits(n),) are scratch.
    """
    n = ids.shape[0]
    largest = np.uint64(0)
    for i in range(n):
        rows[i] = i
        largest = max(largest, np.uint64(ids[i] + 1))
    bits = np.uint64(4)
    while bits < 16 and (np.uint64(1) << bits) <= n:
        bits += np.uint64(1)
    mask = (np.uint64(1) << bits) - np.uint64(1)
    source = rows
    shift = np.uint64(0)
    while n > 1 and shift < 64 and (largest >> shift) > 0:
        count[: int(mask) + 2] = 0
        for i in range(n):
            count[((np.uint64(ids[i] + 1) >> shift) & mask) + np.uint64(1)] += 1
        for d in range(1, int(mask) + 2):
            count[d] += count[d - 1]
        for p in range(n):
            i = source[p]
            d = (np.uint64(ids[i] + 1) >> shift) & mask
            target[count[d]] = i
            count[d] += 1
        source, target = target, source
        shift += bits
    S = 0
    for p in range(n):
        i = source[p]
        rows[p] = i
        if p == 0 or ids[i] != segment_ids[S - 1]:
            seq_start[S] = p
            segment_ids[S] = ids[i]
            S += 1
    seq_start[S] = n
    return S


@jit()
def most_digits(n: int) -> int:
    """The size of the scratch `count` that sorting n ids takes, at most."""
    return min(max(16, 2 * n), 1 << 16) + 1


@jit()
def find(ids: Any, slots: Any, ranks: Any, adapter_ids: Any, slot: Any, rank: Any) -> int:
    """Slot and rank of every segment's id, from the ascending ids; returns how many are unknown."""
    unknown = 0
    for s in range(adapter_ids.shape[0]):
        slot[s], rank[s] = NO_SLOT, 0
        if adapter_ids[s] == BASE_ONLY:
            continue
        low, high = 0, ids.shape[0]
        while low < high:
            middle = (low + high) // 2
            if ids[middle] < adapter_ids[s]:
                low = middle + 1
            else:
                high = middle
        if low == ids.shape[0] or ids[low] != adapter_ids[s]:
            slot[s] = UNKNOWN
            unknown += 1
        elif slots[low] != NO_SLOT:
            slot[s] = slots[low]
            rank[s] = ranks[slots[low]]
    return unknown


@jit()
def most_blocks(n: int) -> int:
    """An upper bound on the row blocks of n rows."""
    return n // FEWEST_ROWS_PER_BLOCK + n


@jit()
def row_blocks(seq_start: Any, slot: Any, rank: Any, threads: int, blocks: Any) -> int:
    """Cut every segment into row blocks `(slot, r, first, last)`; returns how many there are.

    seq_start (S+1,), slot (S,), rank (S,) of each segment; one of rank 0, or empty, gets no block.
    """
    rows = 0
    for s in range(slot.shape[0]):
        if rank[s] > 0:
            rows += seq_start[s + 1] - seq_start[s]
    # Where rows are few for the threads, smaller blocks keep all of them busy.
    wanted = -(-rows // (threads * TASKS_PER_THREAD))
    most = min(ROWS_PER_BLOCK, max(FEWEST_ROWS_PER_BLOCK, wanted))
    if threads == 1:
        most = ROWS_PER_BLOCK
    count = 0
    for s in range(slot.shape[0]):
        if rank[s] == 0:
            continue
        start = seq_start[s]
        m = seq_start[s + 1] - start
        pieces = max(m // most, -(-m // ROWS_PER_BLOCK))
        for i in range(pieces):
            blocks[count, 0], blocks[count, 1] = slot[s], rank[s]
            blocks[count, 2] = start + m * i // pieces
            blocks[count, 3] = start + m * (i + 1) // pieces
            count += 1
    return count


@jit()
def cuts(blocks: int, units: int, threads: int) -> int:
    """Into how many parts to cut each of so many blocks, between its units, to busy all threads."""
    if threads == 1 or blocks == 0:
        return 1
    return max(1, min(-(-threads * TASKS_PER_THREAD // blocks), units))


@jit()
def cost(blocks: Any, widths: int) -> Any:
    """What row blocks cost one core, roughly, and their highest rank. Units: nanoseconds.

    widths  h_in, h_out or their sum: what every row and every rank meet
    """
    products, weights, rank = 0, 0, 0
    for b in range(blocks.shape[0]):
        m, r = blocks[b, 3] - blocks[b, 2], blocks[b, 1]
        products += m * r * widths
        weights += r * widths
        rank = max(rank, r)
    return products // PRODUCTS_PER_NS + weights // WEIGHTS_PER_NS, rank


def scratch_size(n: int) -> int:
    """The integers that the plan of n rows needs."""
    return int(6 * n + 1 + 4 * most_blocks(n) + most_digits(n))


@jit()
def plan(fields: Any, layer: Any, segments: int, ids: int, n: int) -> Any:
    """Find the batch's segments, their slots and row blocks; returns how many, -1 if it cannot."""
    scratch = vector(fields[SCRATCH], 5 * n, INTEGER)
    slot, rank = scratch[:n], scratch[n : 2 * n]
    rest = fields[SCRATCH] + 5 * n * 8
    if segments != 0:
        made = vector(segments, SEGMENTS_FIELDS, INTEGER)
        count = made[S]
        fields[ROWS] = made[SEGMENT_ROWS]
        seq_start = vector(made[SEQ_START], count + 1, INTEGER)
        segment_ids = vector(made[SEGMENT_IDS], count, INTEGER)
    else:
        fields[ROWS] = fields[SCRATCH] + 2 * n * 8
        seq_start = vector(rest, n + 1, INTEGER)
        segment_ids = scratch[3 * n : 4 * n]
        digits = vector(rest + 8 * (n + 1), most_digits(n), INTEGER)
        rows, target = scratch[2 * n : 3 * n], scratch[4 * n :]
        count = sort(vector(ids, n, INTEGER), rows, seq_start, segment_ids, target, digits)
        if count > 0 and segment_ids[0] < BASE_ONLY:
            return -1
    rest += 8 * (n + 1 + most_digits(n))
    fields[BLOCKS] = rest
    known = vector(layer[IDS], layer[LOADED], INTEGER)
    slots = vector(layer[SLOT_OF], layer[LOADED], INTEGER)
    ranks = vector(layer[RANKS], layer[SLOTS], INTEGER)
    if find(known, slots, ranks, segment_ids[:count], slot, rank) > 0:
        return -1
    blocks = vector(rest, 4 * most_blocks(n), INTEGER).reshape((most_blocks(n), 4))
    return row_blocks(seq_start, slot[:count], rank[:count], fields[THREADS], blocks)
