"""Shrink by tile products (AMX), for x and weights of bfloat16.

v[p, j] = sum over k of x[rows[p], k] * wa[j, k], computed transposed, so that wa needs no packing:

              wa (r, h_in)             panel of x: pairs, rows          v.T
                k ->                     p    p+1   p+2               p   p+1  p+2
    rank j    [ 0 1 | 2 3 | .. ]       [ 0 1 | 0 1 | 0 1 | .. ]     [ s | s | s | .. ]
    rank j+1  [ 0 1 | 2 3 | .. ]   x   [ 2 3 | 2 3 | 2 3 | .. ]  =  [ s | s | s | .. ]
      ..                                 ..
    16 ranks, 16 pairs of k            16 pairs, 1 to 16 rows       16 ranks, 1 to 16 rows

Rows of x are first gathered into the panel, one K block long. Two k of a row are one number of 32
bits, and (rows, pairs) of these are turned into (pairs, rows), 16 pairs at a time. Segments of few
rows have a narrow panel of 1, 2, 4 or 8 columns; columns without a row repeat the last one.

Four tiles of sums take turns as steps of 32 k go by, for a product waits some 50 cycles for the one
before. At the end of a K block they become (s0 + s1) + (s2 + s3), are turned back and added to v.

Same row, same bits: segments of any length take this way, and k alone decides in which order an
element's products are added (see amx_instructions.py). Edge rules as in tiles.py: where fewer than
16 ranks are left, the tile begins earlier, and the ranks that v has already are dropped; the last k
are copied beside zeros first.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from sgmv.kernels.amx_instructions import NUMBERS, PAIRS, SIDE, START, STATE_BYTES, WORDS
from sgmv.kernels.emit import I8, I16, numbers
from sgmv.kernels.jit import INT64, entry, jit, record, vector
from sgmv.kernels.records import CALL, TABLE
from sgmv.kernels.tasks import NONE, claim_shrink, finish_shrink, item

CHAINS = 4  # tiles 0 to 3 hold sums,
WEIGHTS, COLUMNS = (4, 5), (6, 7)  # these the operands, in turn
STEP = 2 * SIDE  # k of one product
TURN = CHAINS * STEP
K_BLOCK = 1024  # its panel, and its weights of 16 ranks, are 32 KiB each
WIDTHS = (1, 2, 4, 8, 16)  # of a panel

# A task's memory: the tiles' state, the panel, the last weights beside zeros, the sums.
PANEL = STATE_BYTES
LAST = PANEL + K_BLOCK * SIDE * 2
SUMS = LAST + SIDE * TURN * 2
SUM_BYTES = SIDE * SIDE * 4
MEMORY_BYTES = SUMS + CHAINS * SUM_BYTES

# Lanes of two vectors in turn: of their lower halves, and of their upper ones.
LOWER, UPPER = (
    [lane + vector for lane in half for vector in (0, SIDE)] for half in (range(8), range(8, 16))
)
BYTE = np.uint8(0)


def _read_pairs(e, address, count=None):
    """32 bfloat16 as 16 pairs; those from `count` on are not read, and 0."""
    mask = None if count is None else e.below(count, STEP)
    return e.builder.bitcast(e.read(address, ir.VectorType(I16, STEP), 2, mask), PAIRS)


def _rotate_numbers(e, vectors, times):
    """Move the first bit of each element's number (vector, lane) to its end, `times` times.

    Of n vectors, log2(n) times make (16, n) of (n, 16), and four times make (n, 16) of (16, n).
    """
    half = len(vectors) // 2
    for _ in range(times if half else 0):
        vectors = [
            e.builder.shuffle_vector(vectors[i], vectors[i + half], numbers(lanes))
            for i in range(half)
            for lanes in (LOWER, UPPER)
        ]
    return vectors


def _gather(e, n, x, x_stride, rows, count, width):
    """The panel of x[rows[:count], :width], n columns wide, with zeros to the end of its turn."""
    last = e.add(count, -1)
    found = [e.integer(e.add(rows, e.multiply(e.at_most(m, last), 8))) for m in range(n)]
    x_rows = [e.add(x, e.multiply(x_stride, row)) for row in found]

    def step(k, count=None):
        pairs = [_read_pairs(e, e.add(row, e.multiply(k, 2)), count) for row in x_rows]
        for i, turned in enumerate(_rotate_numbers(e, pairs, n.bit_length() - 1)):
            e.store(turned, e.add(e.state, PANEL + 64 * i, e.multiply(k, 2 * n)))
        return []

    whole = e.builder.and_(width, ir.Constant(INT64, -STEP))
    padded = e.builder.and_(e.add(width, TURN - 1), ir.Constant(INT64, -TURN))
    e.loop(START, whole, STEP, [], lambda k, _: step(k))
    e.loop(whole, padded, STEP, [], lambda k, _: step(k, e.builder.sub(width, k)))


def _multiply(e, w, w_stride, ranks, columns, width):
    """Sums (CHAINS, 16, columns) of w[:ranks, :width] and the panel."""
    stride = e.multiply(columns, 4)

    def turn(k, w, w_stride):
        panel = e.add(e.state, PANEL, e.multiply(columns, e.multiply(k, 2)))
        for q in range(CHAINS):
            a, b = WEIGHTS[q % 2], COLUMNS[q % 2]
            e.load_tile(a, e.add(w, 2 * STEP * q), w_stride)
            e.load_tile(b, e.add(panel, e.multiply(columns, 2 * STEP * q)), stride)
            e.multiply_tiles(q, a, b)
        return []

    def last_turn(k, _):
        copy, left = e.add(e.state, LAST), e.builder.sub(width, k)

        def rank(j, _):
            row = e.add(w, e.multiply(w_stride, j), e.multiply(k, 2))
            for i in range(0, TURN, STEP):
                pairs = _read_pairs(e, e.add(row, 2 * i), e.add(left, -i))
                e.store(pairs, e.add(copy, e.multiply(j, 2 * TURN), 2 * i))
            return []

        e.loop(START, ranks, 1, [], rank)
        return turn(k, copy, ir.Constant(INT64, 2 * TURN))

    for q in range(CHAINS):
        e.zero_tile(q)
    whole = e.builder.and_(width, ir.Constant(INT64, -TURN))
    e.loop(START, whole, TURN, [], lambda k, _: turn(k, e.add(w, e.multiply(k, 2)), w_stride))
    e.loop(whole, width, TURN, [], last_turn)
    for q in range(CHAINS):
        e.store_tile(q, e.add(e.state, SUMS + SUM_BYTES * q), stride)


def _add_to_v(e, n, v, v_stride, count, lanes, fresh):
    """Add the sums to `count` rows of v, in these lanes; if fresh, overwrite it."""
    add = e.builder.fadd
    chains = [
        [e.read(e.add(e.state, SUMS + SUM_BYTES * q + 64 * i), NUMBERS, 4) for i in range(n)]
        for q in range(CHAINS)
    ]
    totals = [add(add(a, b), add(c, d)) for a, b, c, d in zip(*chains)]  # noqa: B905
    for m, total in enumerate(_rotate_numbers(e, totals, 4)):
        exists = e.builder.icmp_signed("<", ir.Constant(INT64, m), count)
        present = e.builder.select(exists, lanes, ir.Constant(lanes.type, None))
        row = e.add(v, e.multiply(v_stride, m))
        old = e.builder.select(fresh, ir.Constant(NUMBERS, None), e.read(row, NUMBERS, 4, present))
        e.store(add(old, total), row, mask=present)


@intrinsic
def _task_memory(typingctx):
    """Its address, on the stack."""

    def codegen(context, builder, signature, args):
        with builder.goto_entry_block():
            memory = builder.alloca(ir.ArrayType(I8, MEMORY_BYTES))
            memory.align = 64
        return builder.ptrtoint(memory, INT64)

    return types.int64(), codegen


@intrinsic
def _tile_products(typingctx, unit, call, memory, columns, wa, first, last, low, high):
    """v[first:last, low:high] = x[rows[first:last]] @ wa[low:high].T, in a panel of `columns`."""

    def codegen(context, builder, signature, args):
        call, memory, columns, wa, first, last, low, high = args[1:]
        e = WORDS[unit](builder, memory)
        x, x_stride, v, v_stride = e.fields(CALL, call, "x", "x_stride", "v", "v_stride")
        rows, table = e.fields(CALL, call, "x_rows", "table")
        [h_in] = e.fields(TABLE, table, "h_in")
        w_stride = e.multiply(h_in, 2)
        ranks = e.at_most(SIDE, builder.sub(high, low))
        top = builder.sub(high, ranks)

        def block(k, _):
            width = e.at_most(K_BLOCK, builder.sub(h_in, k))
            fresh = builder.icmp_signed("==", k, START)
            offset = e.multiply(k, 2)

            def group(p, _):
                count = e.at_most(SIDE, builder.sub(last, p))
                rows_p = e.add(rows, e.multiply(p, 8))
                operands = e.add(x, offset), x_stride, rows_p, count, width
                e.switch(columns, WIDTHS, lambda n: _gather(e, n, *operands))

                def tile(j, _):
                    start = e.at_most(j, top)
                    w = e.add(wa, e.multiply(w_stride, start), offset)
                    _multiply(e, w, w_stride, ranks, columns, width)
                    new = builder.not_(e.below(builder.sub(j, start), SIDE))
                    lanes = builder.and_(e.below(ranks, SIDE), new)
                    target = e.add(v, e.multiply(v_stride, p), e.multiply(start, 4))
                    sums = target, v_stride, count, lanes, fresh
                    e.switch(columns, WIDTHS, lambda n: _add_to_v(e, n, *sums))
                    return []

                return e.loop(low, high, SIDE, [], tile)

            return e.loop(first, last, SIDE, [], group)

        e.configure()
        e.loop(START, h_in, K_BLOCK, [], block)
        e.release()
        return context.get_dummy_value()

    return types.void(unit, *[types.int64] * 8), codegen


@jit()
def _write_configuration(memory, ranks, columns):
    """Sums (ranks, columns), weights (ranks, 16 pairs), panel (16 pairs, columns)."""
    configuration = vector(memory, 64, BYTE)
    configuration[:] = 0
    configuration[0] = 1
    for tile in range(8):
        configuration[16 + 2 * tile] = 4 * (SIDE if tile in WEIGHTS else columns)
        configuration[48 + tile] = SIDE if tile in COLUMNS else ranks


def shrink_kernel(unit: Any) -> int:
    """The kernel v = x @ wa.T: up to `limit` tasks of the call at an address, block by block.

    unit  what computes tile products, see amx_instructions.py
    """

    def amx_shrink(address, limit):
        table = record(TABLE, record(CALL, address).table)
        memory = _task_memory()
        for _ in range(limit):
            task = claim_shrink(address)
            if task.number == NONE:
                return
            low, high = task.low, task.high
            if low < high:  # a configuration of no rank is refused
                columns = 1
                while columns < min(task.last - task.first, SIDE):
                    columns *= 2
                _write_configuration(memory, min(high - low, SIDE), columns)
                rows = task.first, task.last
                wa = item(table.wa, task.slot)
                _tile_products(unit, address, memory, columns, wa, *rows, low, high)
            finish_shrink(address, task, np.float32(0))

    return entry(amx_shrink)
