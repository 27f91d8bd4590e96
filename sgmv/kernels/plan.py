"""The plan of a call: ids -> segments -> slots -> row blocks -> tasks, all in integers.

    adapter_ids  ->  segments, by a stable sort; Segments made once skip this step
                 ->  the slot and rank of each segment's adapter
                 ->  row blocks of at most ROWS_PER_BLOCK rows; where rows have several adapters,
                     in bands of rows
                 ->  each cut along ranks (shrink) or columns (expand), if there are too few blocks

How a batch is cut never changes a result: cuts fall between the kernels' own units, and rows do
not meet in any sum (see kernels/loops.py, kernels/tiles.py).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from sgmv.kernels.jit import address_of, jit, record, records, vector
from sgmv.kernels.records import (
    BLOCK,
    CALL,
    INTEGER,
    RANK_UNIT,
    SEGMENTS,
    TABLE,
)

BASE_ONLY = -1
NO_SLOT = -1
UNKNOWN = -2

ROWS_PER_BLOCK = 96  # 96 rows of one K block are 384 KiB of float32 x: they stay in L2
ROWS_PER_WIDE_BLOCK = 384  # where ranks exceed RANKS_IN_L2: weights come from memory, once
FEWEST_ROWS_PER_BLOCK = 12  # fewer rows would read the weights once more for too little work
# What a core does per nanosecond, roughly: multiply-adds, and weights read.
PRODUCTS_PER_NS, WEIGHTS_PER_NS = 100, 10
RANKS_IN_L2 = 64  # of 1024 k each, in float32 256 KiB
TASKS_PER_THREAD = 4  # enough that a thread which falls behind leaves work to the others
# Of one band: more, narrower cuts read y in shorter pieces, and took up to 1.2 times as long.
CUTS_PER_THREAD = 2
ROWS_PER_BAND = 4096  # where narrow bands do not pay: a call hears signals between two bands


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
def most_bands(n: int) -> int:
    """An upper bound on the bands of rows that n pairs are in."""
    return n // FEWEST_ROWS_PER_BLOCK + 1


@jit()
def adds_nothing(slot: int, rank: int, gains: Any) -> Any:
    """Whether rows of this slot and rank stay as they are. DoRA's gains change y at any rank."""
    return rank == 0 and (slot < 0 or gains.shape[0] == 0 or gains[slot] == 0)


@jit()
def most_rows(rank: int) -> Any:
    """The most rows of a block of this rank."""
    return ROWS_PER_BLOCK if rank <= RANKS_IN_L2 else ROWS_PER_WIDE_BLOCK


@jit()
def rows_per_block(rows: int, rank: int, threads: int) -> Any:
    """The rows that a block should have: where rows are few, smaller ones keep all threads busy."""
    if threads == 1:
        return most_rows(rank)
    parts = -(-rank // RANKS_IN_L2)  # into which shrink cuts a block anyway
    wanted = -(-rows * parts // (threads * TASKS_PER_THREAD))
    return min(most_rows(rank), max(FEWEST_ROWS_PER_BLOCK, wanted))


@jit()
def row_blocks(seq_start: Any, slot: Any, rank: Any, gains: Any, threads: int, blocks: Any) -> int:
    """Cut every segment into row blocks, records of BLOCK; returns how many there are.

    seq_start (S+1,), slot (S,), rank (S,) of each segment; gains (slots,) of addresses, or (0,).
    A segment that is empty, or adds nothing, gets no block.
    """
    rows = 0
    for s in range(slot.shape[0]):
        if not adds_nothing(slot[s], rank[s], gains):
            rows += seq_start[s + 1] - seq_start[s]
    count, most = 0, rows_per_block(rows, RANKS_IN_L2, threads)
    for s in range(slot.shape[0]):
        if not adds_nothing(slot[s], rank[s], gains):
            some = seq_start[s], seq_start[s + 1]
            wide = rank[s] > RANKS_IN_L2
            these = rows_per_block(rows, rank[s], threads) if wide else most
            count = cut_segment(some, these, slot[s], rank[s], blocks, count)
    return count


@jit()
def cut_segment(some: Any, most: int, slot: int, rank: int, blocks: Any, count: int) -> int:
    """Add the blocks of positions some[0]:some[1]; returns how many there are then."""
    start, m = some[0], some[1] - some[0]
    pieces = min(m, 1) if m <= most else max(m // most, -(-m // most_rows(rank)))
    for i in range(pieces):
        block = blocks[count]
        block.slot, block.r = slot, rank
        block.first = start + m * i // pieces
        block.last = start + m * (i + 1) // pieces
        count += 1
    return count


@jit()
def rows_per_band(seq_start: Any, rank: Any, rows: Any, k: int, threads: int) -> Any:
    """The rows of a band. x and y of few rows stay in L2 while all their segments pass.

    But each band reads the weights of its segments. So few rows pay where most of them are in most
    segments, and the weights read again are less than the rows that are not.
    """
    pairs = seq_start[rank.shape[0]]
    adapted = segments = ranks = 0
    for s in range(rank.shape[0]):
        for p in range(seq_start[s] + 1, seq_start[s + 1]):
            if rows[p] < rows[p - 1]:  # Segments made by hand: all rows are one band
                return pairs
        if rank[s] > 0:
            adapted += seq_start[s + 1] - seq_start[s]
            segments, ranks = segments + 1, ranks + rank[s]
    n = pairs // k
    few = rows_per_block(n, RANKS_IN_L2, threads)
    again = (-(-n // few) - 1) * ranks
    return few if segments * n <= 2 * adapted and again <= adapted - n else ROWS_PER_BAND


@jit()
def blocks_in_bands(
    seq_start: Any, slot: Any, rank: Any, gains: Any, rows: Any, band: int, most: int, found: Any
) -> int:
    """Cut the rows into bands 0:band, band:2 * band, ..., and each band's segments into blocks.

    Semantics: bands[q] becomes the first block of band q; a band's blocks are in the order of their
    segments, of at most `most` rows. rows (m,) ascend in each segment, or one band has them all.
    Returns how many bands there are.
    """
    at, S = found.target, slot.shape[0]
    at[:S] = seq_start[:S]
    left = seq_start[S]
    count = q = 0
    while left > 0:
        found.bands[q] = count
        for s in range(S):
            first = last = at[s]
            while last < seq_start[s + 1] and rows[last] < (q + 1) * band:
                last += 1
            at[s] = last
            left -= last - first
            if not adds_nothing(slot[s], rank[s], gains):
                some = first, last
                count = cut_segment(some, most, slot[s], rank[s], found.blocks, count)
        q += 1
    found.bands[q] = count
    return q


@jit()
def cuts(blocks: int, units: int, threads: int) -> int:
    """Into how many parts to cut each block, between its units, to busy all threads."""
    if threads == 1 or blocks == 0:
        return 1
    wanted = -(-threads * TASKS_PER_THREAD // blocks)
    if wanted == 1 or units < threads:
        return max(1, min(wanted, units))
    return min(-(-wanted // threads), units // threads) * threads  # as many for each thread


@jit()
def cuts_of_shrink(blocks: int, rank: int, threads: int) -> Any:
    """Into how many parts to cut each block of shrink: a part's weights of a K block stay in L2.

    Ranks are many where weights are those of an expert, as wide as a layer.
    """
    return max(cuts(blocks, -(-rank // RANK_UNIT), threads), -(-rank // RANKS_IN_L2))


@jit()
def cost(blocks: Any, widths: int) -> Any:
    """What row blocks cost one core, roughly, and their highest rank. Units: nanoseconds.

    widths  h_in, h_out or their sum: what every row and every rank meet
    """
    products, weights, rank = 0, 0, 0
    for b in range(blocks.shape[0]):
        block = blocks[b]
        products += (block.last - block.first) * block.r * widths
        weights += block.r * widths
        rank = max(rank, block.r)
    return products // PRODUCTS_PER_NS + weights // WEIGHTS_PER_NS, rank


@jit()
def cuts_of_both(blocks: Any, widths: int, panels: int, threads: int, worth_sharing_ns: int) -> Any:
    """Into how many parts to cut each block of shrink, and of expand; what all cost one core.

    Where that is less than is worth sharing, one thread gets the blocks whole. Units: nanoseconds.
    """
    cost_ns, rank = cost(blocks, widths)
    if cost_ns < worth_sharing_ns:
        threads = 1
    count = blocks.shape[0]
    return cuts_of_shrink(count, rank, threads), cuts(count, panels, threads), cost_ns


class Views(NamedTuple):
    """A plan's arrays, side by side in its memory."""

    slot: Any  # (n,) of each segment
    rank: Any  # (n,)
    rows: Any  # (n,) the segments themselves, where they are made here
    seq_start: Any  # (n + 1,)
    segment_ids: Any  # (n,)
    target: Any  # (n,) scratch of the sort
    digits: Any  # (most_digits(n),)
    bands: Any  # (most_bands(n) + 1,)
    blocks: Any  # (most_blocks(n),)


@jit()
def views(scratch: int, n: int) -> Any:
    """The arrays of a plan of n rows, in the memory at `scratch`."""
    slot = vector(scratch, n, INTEGER)
    rank = vector(end_of(slot), n, INTEGER)
    rows = vector(end_of(rank), n, INTEGER)
    seq_start = vector(end_of(rows), n + 1, INTEGER)
    segment_ids = vector(end_of(seq_start), n, INTEGER)
    target = vector(end_of(segment_ids), n, INTEGER)
    digits = vector(end_of(target), most_digits(n), INTEGER)
    bands = vector(end_of(digits), most_bands(n) + 1, INTEGER)
    blocks = records(BLOCK, end_of(bands), most_blocks(n))
    return Views(slot, rank, rows, seq_start, segment_ids, target, digits, bands, blocks)


@jit()
def end_of(array: Any) -> Any:
    """The address behind the array's last element."""
    return address_of(array) + array.nbytes


@jit()
def scratch_size(n: int) -> Any:
    """The bytes that the plan of n rows needs."""
    start = 64  # an address like any other: nothing is read there
    return end_of(views(start, n).blocks) - start


@jit()
def plan(address: int) -> Any:
    """Write the call's row blocks; False if an id is not known."""
    call = record(CALL, address)
    n = call.n if call.segments == 0 else record(SEGMENTS, call.segments).most
    table = record(TABLE, call.table)
    found = views(call.scratch, n)
    rows, seq_start, segment_ids = found.rows, found.seq_start, found.segment_ids
    call.x_rows = call.weights = call.bands = 0
    k = 1
    if call.segments != 0:
        made = record(SEGMENTS, call.segments)
        count = made.count
        call.x_rows, call.weights = made.x_rows, made.weights
        k = made.k
        rows = vector(made.rows, n, INTEGER)
        seq_start = vector(made.seq_start, count + 1, INTEGER)
        segment_ids = vector(made.adapter_ids, count, INTEGER)
    else:
        given = vector(call.ids, n, INTEGER)
        count = sort(given, rows, seq_start, segment_ids, found.target, found.digits)
        if count > 0 and segment_ids[0] < BASE_ONLY:
            return False
    if call.x_rows == 0:
        call.x_rows = address_of(rows)
    call.y_rows = address_of(rows)
    known = vector(table.ids, table.loaded, INTEGER)
    slot_of = vector(table.slot_of, table.loaded, INTEGER)
    ranks = vector(table.ranks, table.slots, INTEGER)
    if find(known, slot_of, ranks, segment_ids[:count], found.slot, found.rank) > 0:
        return False
    seq_start, slot, rank = seq_start[: count + 1], found.slot[:count], found.rank[:count]
    call.blocks = address_of(found.blocks)
    gains = vector(table.gains, 0 if table.gains == 0 else table.slots, INTEGER)
    if k == 1:
        call.block_count = row_blocks(seq_start, slot, rank, gains, call.threads, found.blocks)
        call.band_count = call.block_count
        return True
    call.bands = address_of(found.bands)
    band = rows_per_band(seq_start, rank, rows, k, call.threads)
    most = rows_per_block(seq_start[count], RANKS_IN_L2, call.threads)
    call.band_count = blocks_in_bands(seq_start, slot, rank, gains, rows, band, most, found)
    call.block_count = found.bands[call.band_count]
    return True


@jit()
def cut_blocks(address: int) -> Any:
    """Cut the blocks into tasks; returns what all of them cost one core, in nanoseconds."""
    call = record(CALL, address)
    table = record(TABLE, call.table)
    widths = table.h_in * table.slices if call.shrink != 0 else 0
    widths += table.h_out if call.expand != 0 else 0
    blocks = records(BLOCK, call.blocks, call.block_count)
    panels = -(-table.h_out // table.panel_columns)
    call.shrink_cuts, call.expand_cuts, cost_ns = cuts_of_both(
        blocks, widths, panels, call.threads, call.worth_sharing_ns
    )
    if call.bands != 0:
        threads = call.threads if cost_ns >= call.worth_sharing_ns else 1
        parts = cuts(call.band_count, panels, threads)
        call.expand_cuts = max(1, min(parts, CUTS_PER_THREAD * threads))
    return cost_ns
