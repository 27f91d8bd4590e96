"""The fast kernels: register tiles of vectors, of 512, 256 or 128 bits.

A tile is a small block of the result that stays in registers while the sums run. MR is its rows;
LANES is a register's float32: 16, or 8 in 256 bits, 4 in 128. Shrink and expand form their sums
differently.

shrink    v[p, j] = sum over k of x[rows[p], k] * wa[j, k]. x and wa both run along k: a register
          holds LANES consecutive k of one row, and every (row, rank) has a register of partial
          sums, one per lane. MR rows and NR ranks load MR + NR registers for MR * NR fused
          multiply-adds:

                         k ->                               rank j  j+1  j+2  j+3
              x row p    [################]           row p   [ s ][ s ][ s ][ s ]
              x row p+1  [################]     =>    row p+1 [ s ][ s ][ s ][ s ]      6 x 4 tile:
              wa rank j  [################]            ...                              24 registers
              wa j+1     [################]

          At the end of a K block a register's lanes are added up, neighbours first, and the sum is
          added to v. Weights are stored as Punica has them, wa (r, h_in).

expand    y[rows[p], c] += scaling * sum over j of v[p, j] * wb[j, c]. wb and y both run along c, so
          a register holds LANES columns of one row's sum, and each v[p, j] is spread over a whole
          register. 6 rows x 64 columns are 24 registers. wb (r, h_out) would be read in leaps of a
          whole row, so it is packed when loaded, in panels of 64 columns:

              wb     j=0 [ panel 0 | panel 1 | panel 2 ]        in memory, each panel (r, 64):
                     j=1 [         |         |         ]
                     j=2 [         |         |         ]        panel 0 j=0 j=1 j=2, panel 1 j=0 ...

          Other engines' weights are not packed: a task packs what it is about to read (panels.py).
          With DoRA y is multiplied by the gains of its columns before it is stored.

Same row, same bits. In shrink, lane k % LANES adds the k of its own in ascending order, K is cut
every K_BLOCK whatever the tile, and blocks are added in ascending order (for bfloat16 with
AVX512_BF16, lane k // 2 % LANES, an odd k before the even one below it, K cut every PAIRS_BLOCK);
in expand, every element adds j = 0, 1, 2, ... in one register. Neither depends on MR or NR: a row's
tile may have any shape.

Edge rules as in loops.py: nothing past a rank, a row or a column is read or written. The last
k of a row, the last ranks and the last columns are masked, not padded.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from sgmv.kernels.cpu import ASKS_AHEAD, FUSES, REGISTERS, SUMS_BFLOAT16
from sgmv.kernels.emit import F32, LANES, ZERO, Emit, size
from sgmv.kernels.jit import INT64, entry, jit, record, size_of, vector
from sgmv.kernels.panels import panels, plain_rank, scratch
from sgmv.kernels.records import CALL, FLOAT64, PANEL, TABLE
from sgmv.kernels.tasks import (
    NONE,
    claim_expand,
    claim_shrink,
    finish_shrink,
    gain_addresses,
    item,
    leave_expand,
    no_task,
)

# The other registers are for what the sums are made of, and for products that are not fused.
SUMS = REGISTERS * 3 // 4 if FUSES else REGISTERS // 2
MOST_ROWS = SUMS // 4


def _as_many(rows: int, most: int) -> int:
    """The most sums of a row, a power of two, that there are registers for; at most `most`."""
    return next((n for n in (16, 8, 4) if n <= most and n * rows <= SUMS), 1)


# A tile of few rows takes more ranks at once, for fewer reads of x; and more vectors of columns,
# since a single row needs eight sums and more to hide a FMA's latency.
RANKS = {rows: _as_many(rows, 8) for rows in range(1, MOST_ROWS + 1)}
COLUMN_VECTORS = {rows: _as_many(rows, PANEL // LANES) for rows in range(1, MOST_ROWS + 1)}
K_BLOCK = 1024  # six rows of one K block are 24 KiB of x: they stay in L1 for all ranks
PAIRS_BLOCK = 2 * K_BLOCK  # where a lane takes two k at a time: as many bytes, and steps
L2_BYTES = 256 << 10  # of packed wb, that stay in L2 while all rows of a task pass over them
Y_AHEAD = 512  # bytes before its use that y is asked for
W_AHEAD = 512  # and wa, where that is worth while
PAIR = types.UniTuple(types.int64, 2)


def _shrink_tile(e, x_rows, w, w_stride, ranks, width, targets, fresh, x_like, w_like):
    """targets[m][:ranks] (+)= x_rows[m][:width] @ w[:ranks, :width].T: the drawing above."""
    mr, nr = len(x_rows), RANKS[len(x_rows)]
    # Past the last rank the last one is read again, and its sum is dropped.
    last = e.add(ranks, -1)
    w_rows = [e.add(w, e.multiply(w_stride, e.at_most(q, last))) for q in range(nr)]

    read, multiply, per_vector = e.products(x_like, w_like)

    def step(k, sums, mask=None):
        sums = list(sums)
        kx, kw = e.multiply(k, size(x_like)), e.multiply(k, size(w_like))
        values = [read(e.add(row, kx), x_like, mask) for row in x_rows]
        for q in range(nr):
            place = e.add(w_rows[q], kw)
            weight = read(place, w_like, mask)
            if mr == 1 and mask is None and ASKS_AHEAD:  # one row waits for weights alone
                for line in range(0, per_vector * size(w_like), 64):
                    e.prefetch(e.add(place, line + W_AHEAD))
            for m in range(mr):
                sums[m * nr + q] = multiply(values[m], weight, sums[m * nr + q])
        return sums

    def masked_step(k, sums):
        return step(k, sums, e.below(e.builder.sub(width, k), per_vector))

    zero = ir.Constant(INT64, 0)
    whole = e.builder.and_(width, ir.Constant(INT64, -per_vector))
    sums = e.loop(zero, whole, per_vector, [ZERO] * (mr * nr), step)
    sums = e.loop(whole, width, per_vector, sums, masked_step)

    row = ir.VectorType(F32, nr)
    present = e.below(ranks, nr)
    together = max(1, LANES // nr)
    for m in range(mr):
        if m % together == 0:
            totals = e.sums(sums[m * nr : (m + together) * nr])
        old = e.load(targets[m], types.float32, present, row)
        old = e.builder.select(fresh, ir.Constant(row, None), old)
        total = e.builder.fadd(old, e.part(totals, m % together * nr, nr))
        e.store(total, targets[m], types.float32, present)


@intrinsic
def shrink_tiles(typingctx, x_like, w_like, call, some_rows, wa, some_ranks, some_k):
    """v[p:p + count, low:high] (+)= x[rows[p:p + count], k:k + width] @ wa[low:high, k:].T.

    Semantics: k = 0 overwrites v, any other adds to it. 1 <= count <= MOST_ROWS.
    call  address of the call;  wa  address of the adapter's wa (r, h_in)
    some_rows  (p, count);  some_ranks  (low, high);  some_k  (k, width)
    """

    def codegen(context, builder, signature, args):
        e = Emit(builder)
        call, wa = args[2], args[4]
        (p, count), (low, high), (k, width) = (e.pair(args[i]) for i in (3, 5, 6))
        x, x_stride, v, v_stride = e.fields(CALL, call, "x", "x_stride", "v", "v_stride")
        rows, table = e.fields(CALL, call, "x_rows", "table")
        [h_in] = e.fields(TABLE, table, "h_in")
        x = e.add(x, e.multiply(k, size(x_like)))
        w = e.add(wa, e.multiply(k, size(w_like)))
        w_stride = e.multiply(h_in, size(w_like))
        rows = e.add(rows, e.multiply(p, 8))
        v = e.add(v, e.multiply(v_stride, p))
        fresh = builder.icmp_signed("==", k, ir.Constant(INT64, 0))

        def all_ranks(mr):
            numbers = [e.integer(e.add(rows, 8 * m)) for m in range(mr)]
            x_rows = [e.add(x, e.multiply(x_stride, number)) for number in numbers]
            v_rows = [e.add(v, e.multiply(v_stride, m)) for m in range(mr)]

            def tile(j, nothing):
                w_j = e.add(w, e.multiply(w_stride, j))
                targets = [e.add(row, e.multiply(j, 4)) for row in v_rows]
                ranks = builder.sub(high, j)
                _shrink_tile(e, x_rows, w_j, w_stride, ranks, width, targets, fresh, x_like, w_like)
                return nothing

            e.loop(low, high, RANKS[mr], [], tile)

        e.switch(count, range(1, MOST_ROWS + 1), all_ranks)
        return context.get_dummy_value()

    return types.void(x_like, w_like, types.int64, PAIR, types.int64, PAIR, PAIR), codegen


def _expand_tile(e, nv, y_rows, v_rows, w_row, r, factors, mask, w_like, y_like):
    """y_rows[m][:nv * LANES] += scale * (v_rows[m][:r] @ w[:r, :nv * LANES]), rounded once.

    w_row(j)  the address of w[j]
    factors   scale; None, or the addresses of DoRA's gains and offsets; the tile's first column
    """
    mr = len(y_rows)

    def value(m, j):
        return e.broadcast(e.add(v_rows[m], e.multiply(j, 4)))

    def weight(q, j):
        return e.load(e.add(w_row(j), q * LANES * size(w_like)), w_like, mask)

    def step(j, sums):
        sums = list(sums)
        if mr <= nv:  # the fewer wait in registers, the others pass through one
            values = [value(m, j) for m in range(mr)]
            for q in range(nv):
                passing = weight(q, j)
                for m in range(mr):
                    sums[m * nv + q] = e.fma(values[m], passing, sums[m * nv + q])
        else:
            weights = [weight(q, j) for q in range(nv)]
            for m in range(mr):
                passing = value(m, j)
                for q in range(nv):
                    sums[m * nv + q] = e.fma(passing, weights[q], sums[m * nv + q])
        return sums

    for row in y_rows:
        for offset in range(0, nv * LANES * size(y_like), 64):
            e.prefetch(e.add(row, offset + Y_AHEAD), write=True)
    sums = e.loop(ir.Constant(INT64, 0), r, 1, [ZERO] * (mr * nv), step)
    scale, gained, column = factors
    if gained:
        gains, offsets = _gains(e, nv, *gained, column, mask)
    for m in range(mr):
        for q in range(nv):
            target = e.add(y_rows[m], q * LANES * size(y_like))
            total = e.fma(scale, sums[m * nv + q], e.load(target, y_like, mask))
            if gained:
                total = e.fma(gains[q], total, offsets[q])
            e.store(total, target, y_like, mask)


def _gains(e, nv, gains, offsets, column, mask):
    """Vectors of the gains and offsets from this column on; 0 where there are no offsets."""

    def row(address):
        first = e.add(address, e.multiply(column, 4))
        return [e.load(e.add(first, q * LANES * 4), mask=mask) for q in range(nv)]

    return row(gains), e.when(e.is_there(offsets), [ZERO] * nv, lambda _: row(offsets))


@intrinsic
def expand_tiles(typingctx, w_like, y_like, call, some_rows, wb, r, scaling, gains, some_columns):
    """y[rows[p:p + count], low:high] += scaling * (v[p:p + count, :r] @ wb[:, low:high]).

    Semantics: low is a multiple of PANEL, high too or else h_out. 1 <= count <= MOST_ROWS.
    call  address of the call;  wb  address of the adapter's panels
    gains  None; or DoRA's, at two addresses, the second may be 0: y = gains * y + offsets then
    some_rows  (p, count);  some_columns  (low, high)
    """

    def codegen(context, builder, signature, args):
        e = Emit(builder)
        call, some_rows, wb, r, scaling, at, some_columns = args[2:]
        (p, count), (low, high) = e.pair(some_rows), e.pair(some_columns)
        gained = None if gains == types.none else e.pair(at)
        y, y_stride, v, v_stride = e.fields(CALL, call, "y", "y_stride", "v", "v_stride")
        [rows] = e.fields(CALL, call, "y_rows")
        rows = e.add(rows, e.multiply(p, 8))
        v = e.add(v, e.multiply(v_stride, p))
        scale = e.everywhere(scaling)
        whole = e.add(low, builder.and_(builder.sub(high, low), ir.Constant(INT64, -PANEL)))

        def all_columns(mr):
            nv = COLUMN_VECTORS[mr]
            numbers = [e.integer(e.add(rows, 8 * m)) for m in range(mr)]
            y_rows = [e.add(y, e.multiply(y_stride, number)) for number in numbers]
            v_rows = [e.add(v, e.multiply(v_stride, m)) for m in range(mr)]

            def tile(column, w, w_stride, nv, mask=None):
                here = [e.add(row, e.multiply(column, size(y_like))) for row in y_rows]

                def w_row(j):
                    return e.add(w, e.multiply(j, w_stride))

                factors = scale, gained, column
                _expand_tile(e, nv, here, v_rows, w_row, r, factors, mask, w_like, y_like)

            def panel(column, nothing):
                w = e.add(wb, e.multiply(e.multiply(column, r), size(w_like)))
                for start in range(0, PANEL, nv * LANES):
                    w_start = e.add(w, start * size(w_like))
                    tile(e.add(column, start), w_start, PANEL * size(w_like), nv)
                return nothing

            def remainder(column, nothing):
                w = e.add(wb, e.multiply(e.multiply(whole, r), size(w_like)))
                w = e.add(w, e.multiply(builder.sub(column, whole), size(w_like)))
                w_stride = e.multiply(builder.sub(high, whole), size(w_like))
                tile(column, w, w_stride, 1, e.below(builder.sub(high, column)))
                return nothing

            e.loop(low, whole, PANEL, [], panel)
            e.loop(whole, high, LANES, [], remainder)

        e.switch(count, range(1, MOST_ROWS + 1), all_columns)
        return context.get_dummy_value()

    integer = types.int64
    operands = integer, PAIR, integer, integer, types.float32, gains, PAIR
    return types.void(w_like, y_like, *operands), codegen


def shrink_kernel(x_like: Any, w_like: Any) -> int:
    """The kernel v = x @ wa.T: up to `limit` tasks of the call at an address, block by block."""
    in_pairs = SUMS_BFLOAT16 and x_like.dtype == w_like.dtype == np.int16
    block = PAIRS_BLOCK if in_pairs else K_BLOCK

    def tiles_shrink(address, limit):
        table = record(TABLE, record(CALL, address).table)
        row = table.h_in * size_of(w_like)
        for _ in range(limit):
            task = claim_shrink(address)
            if task.number == NONE:
                return
            groups = -(-(task.last - task.first) // MOST_ROWS)
            for k in range(0, table.h_in, block):
                width = min(block, table.h_in - k)
                p = task.first
                for g in range(groups):
                    count = (task.last - p) // (groups - g)
                    for s in range(table.slices):  # x is read once, and stays in L1 for the others
                        j = s * task.r  # in v; wa is passed as if its ranks began there
                        wa = item(table.wa, task.slot * table.slices + s) - j * row
                        ranks = j + task.low, j + task.high
                        shrink_tiles(x_like, w_like, address, (p, count), wa, ranks, (k, width))
                    p += count
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
        operands = w_like, y_like, address, (p, count), wb, task.r, scaling
        if gains[0] == 0:
            expand_tiles(*operands, None, columns)
        else:
            expand_tiles(*operands, gains, columns)
        p += count


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

    def tiles_expand(address, limit):
        table = record(TABLE, record(CALL, address).table)
        rank = plain_rank(address)
        room = scratch(rank, columns_in_l2(rank, w_like), w_like)
        task = no_task()
        for _ in range(limit):
            task = claim_expand(address, task)
            if task.number == NONE:
                return
            scaling = np.float32(vector(table.scalings + 8 * task.slot, 1, FLOAT64)[0])
            expand_task(w_like, y_like, address, task, room, scaling)
        leave_expand(address, task)

    return entry(tiles_expand)
