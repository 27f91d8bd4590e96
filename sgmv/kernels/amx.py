"""Shrink on AMX: tile products, for x and weights of bfloat16.

v[p, j] = sum over k of x[rows[p], k] * wa[j, k], transposed, so that wa stands as it is stored:

                 wa (r, h_in)             panel of x                      v.T
                  k ->                     row p  p+1  p+2 ..           p  p+1  p+2
     rank j     [ 0 1 | 2 3 | .. ]       [ 0 1 | 0 1 | 0 1 | .. ]     [ s | s | s ]
     rank j+1   [ 0 1 | 2 3 | .. ]   x   [ 2 3 | 2 3 | 2 3 | .. ]  =  [ s | s | s ]
       ..                                  ..
     16 ranks, read where they stand     16 pairs of k, 1 to 16 rows  16 ranks x 1 to 16 rows

The rows of x, wherever they stand, are first gathered into the panel, one K block long: pairs of k
of one row are numbers of 32 bits, and (rows, pairs) is turned into (pairs, rows), 16 pairs at a
time. Few rows make a narrow panel: 1, 2, 4, 8 or 16 columns, the last row again where one is over.

Four tiles of sums take turns, q = 0, 1, 2, 3, as the steps of 32 k go by: one waits some 50 cycles
for the product before. At the end of a K block they become (s0 + s1) + (s2 + s3), turned back, and
are added to v.

Same row, same bits: all segments, of one row or of thousands, take this way, and an element's
products are added in an order that only k decides (see amx_instructions.py). Where fewer than 16
ranks are left, a tile begins earlier, and what stands in v already is dropped. Tiles never reach
past a row's end: the last k are copied beside zeros first, weights and x alike.
"""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from sgmv.kernels.amx_instructions import NUMBERS, PAIRS, SIDE, STATE_BYTES, WORDS
from sgmv.kernels.atomics import add_atomic
from sgmv.kernels.call import (
    BLOCK_COUNT,
    FIELDS,
    H_IN,
    INTEGER,
    RANK_UNIT,
    ROWS,
    SHRINK_CUTS,
    SHRINK_DONE,
    SHRINK_NEXT,
    V_STRIDE,
    WA,
    X_STRIDE,
    V,
    X,
    block_of,
    claim,
    cut_of,
    item,
)
from sgmv.kernels.emit import I8, I16, Emit, numbers
from sgmv.kernels.jit import INT64, jit, vector

CHAINS = 4  # tiles 0 to 3 hold sums, 4 and 5 weights, 6 and 7 rows of x
WEIGHTS, COLUMNS = (4, 5), (6, 7)
STEP = 32  # k of one product
TURN = CHAINS * STEP
K_BLOCK = 1024  # its panel, and the weights of 16 ranks, are 32 KiB each
WIDTHS = (1, 2, 4, 8, 16)  # of a panel

# A task's own memory: the tiles' state, the panel, the last weights beside zeros, the sums.
PANEL = STATE_BYTES
LAST = PANEL + K_BLOCK * SIDE * 2
SUMS = LAST + SIDE * TURN * 2
MEMORY_BYTES = SUMS + CHAINS * SIDE * SIDE * 4

# Lanes of two vectors in turn: of their lower halves, and of their upper ones.
LOWER, UPPER = (
    [lane + vector for lane in half for vector in (0, SIDE)] for half in (range(8), range(8, 16))
)
BYTE = np.uint8(0)


def _read_pairs(e, address, count=None):
    """The 32 bfloat16 at this address as 16 pairs; those from `count` on are 0 and not read."""
    mask = None if count is None else e.below(count, STEP)
    return e.builder.bitcast(e.read(address, ir.VectorType(I16, STEP), 2, mask), PAIRS)


def _turn(e, vectors, times):
    """Take the first bit of every number's place, vector and lane in one, to its end: so often.

    As often as bits count the vectors, it turns them (vectors, 16) into (16, vectors); four times,
    it turns (16, vectors) into them.
    """
    half = len(vectors) // 2
    for _ in range(times if half else 0):
        vectors = [
            e.builder.shuffle_vector(vectors[i], vectors[i + half], numbers(chosen))
            for i in range(half)
            for chosen in (LOWER, UPPER)
        ]
    return vectors


@intrinsic
def _reserve(typingctx):
    """The address of a task's memory, on the stack."""

    def codegen(context, builder, signature, args):
        with builder.goto_entry_block():
            memory = builder.alloca(ir.ArrayType(I8, MEMORY_BYTES))
            memory.align = 64
        return builder.ptrtoint(memory, INT64)

    return types.int64(), codegen


@intrinsic
def _configure(typingctx, unit, memory):
    def codegen(context, builder, signature, args):
        WORDS[unit](builder, args[1]).configure()
        return context.get_dummy_value()

    return types.void(unit, types.int64), codegen


@intrinsic
def _release(typingctx, unit, memory):
    def codegen(context, builder, signature, args):
        WORDS[unit](builder, args[1]).release()
        return context.get_dummy_value()

    return types.void(unit, types.int64), codegen


@intrinsic
def _gather(typingctx, call, p, count, columns, k, width, memory):
    """Panel of x[rows[p:p + count], k:k + width], with zeros to the end of the last turn."""

    def codegen(context, builder, signature, args):
        e = Emit(builder)
        call, p, count, columns, k, width, memory = args
        x, x_stride, rows = (e.integer(e.add(call, 8 * field)) for field in (X, X_STRIDE, ROWS))
        x = e.add(x, e.multiply(k, 2))
        rows = e.add(rows, e.multiply(p, 8))
        last = e.add(count, -1)
        whole = builder.and_(width, ir.Constant(INT64, -STEP))
        padded = builder.and_(e.add(width, TURN - 1), ir.Constant(INT64, -TURN))

        def all_steps(n):
            numbers = [e.integer(e.add(rows, e.multiply(e.at_most(m, last), 8))) for m in range(n)]
            x_rows = [e.add(x, e.multiply(x_stride, number)) for number in numbers]

            def step(k, count=None):
                pairs = [_read_pairs(e, e.add(row, e.multiply(k, 2)), count) for row in x_rows]
                target = e.add(memory, PANEL, e.multiply(k, 2 * n))
                for i, turned in enumerate(_turn(e, pairs, n.bit_length() - 1)):
                    e.store(turned, e.add(target, 64 * i))
                return []

            e.loop(ir.Constant(INT64, 0), whole, STEP, [], lambda k, _: step(k))
            e.loop(whole, padded, STEP, [], lambda k, _: step(k, builder.sub(width, k)))

        e.switch(columns, WIDTHS, all_steps)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 7), codegen


def _multiply(e, w, w_stride, ranks, columns, width, memory):
    """Sums (4, 16, columns) of w[:ranks, :width] and the panel."""
    for q in range(CHAINS):
        e.zero_tile(q)
    stride = e.multiply(columns, 4)

    def turn(k, weights, w_stride):
        panel = e.add(memory, PANEL, e.multiply(k, e.multiply(columns, 2)))
        for q in range(CHAINS):
            e.load_tile(WEIGHTS[q % 2], e.add(weights, q * 2 * STEP), w_stride)
            e.load_tile(COLUMNS[q % 2], e.add(panel, e.multiply(columns, q * 2 * STEP)), stride)
            e.multiply_tiles(q, WEIGHTS[q % 2], COLUMNS[q % 2])
        return []

    def last_turn(k, nothing):
        copy = e.add(memory, LAST)

        def rank(j, nothing):
            source = e.add(w, e.multiply(w_stride, j), e.multiply(k, 2))
            for start in range(0, TURN, STEP):
                left = e.add(width, e.multiply(k, -1), -start)
                pairs = _read_pairs(e, e.add(source, 2 * start), left)
                e.store(pairs, e.add(copy, e.multiply(j, 2 * TURN), 2 * start))
            return nothing

        e.loop(ir.Constant(INT64, 0), ranks, 1, [], rank)
        return turn(k, copy, ir.Constant(INT64, 2 * TURN))

    whole = e.builder.and_(width, ir.Constant(INT64, -TURN))
    start = ir.Constant(INT64, 0)
    e.loop(start, whole, TURN, [], lambda k, _: turn(k, e.add(w, e.multiply(k, 2)), w_stride))
    e.loop(whole, width, TURN, [], last_turn)
    for q in range(CHAINS):
        e.store_tile(q, e.add(memory, SUMS + q * SIDE * SIDE * 4), stride)


def _add_to_v(e, n, v_rows, count, lanes, fresh, memory):
    """v_rows[:count] (+)= the sums of the four chains, in the lanes that are these ranks."""
    chains = [
        [e.read(e.add(memory, SUMS + q * SIDE * SIDE * 4 + 64 * i), NUMBERS, 4) for i in range(n)]
        for q in range(CHAINS)
    ]
    add = e.builder.fadd
    totals = [add(add(a, b), add(c, d)) for a, b, c, d in zip(*chains)]  # noqa: B905
    none = ir.Constant(lanes.type, None)
    for m, total in enumerate(_turn(e, totals, 4)):
        there = e.builder.icmp_signed("<", ir.Constant(INT64, m), count)
        present = e.builder.select(there, lanes, none)
        old = e.read(v_rows[m], NUMBERS, 4, present)
        old = e.builder.select(fresh, ir.Constant(NUMBERS, None), old)
        e.store(add(old, total), v_rows[m], mask=present)


@intrinsic
def _products(typingctx, unit, call, p, count, columns, w, low, high, k, width, memory):
    """v[p:p + count, low:high] (+)= panel.T @ w[:, :width].T; k = 0 overwrites.

    w  address of wa[low, k]
    """

    def codegen(context, builder, signature, args):
        call, p, count, columns, w, low, high, k, width, memory = args[1:]
        e = WORDS[unit](builder, memory)
        v, v_stride, h_in = (e.integer(e.add(call, 8 * field)) for field in (V, V_STRIDE, H_IN))
        v = e.add(v, e.multiply(v_stride, p))
        w_stride = e.multiply(h_in, 2)
        fresh = builder.icmp_signed("==", k, ir.Constant(INT64, 0))
        ranks = e.at_most(SIDE, builder.sub(high, low))
        last = builder.sub(high, ranks)

        def tile(j, nothing):
            start = builder.select(builder.icmp_signed("<", j, last), j, last)
            w_start = e.add(w, e.multiply(w_stride, builder.sub(start, low)))
            _multiply(e, w_start, w_stride, ranks, columns, width, memory)
            stand = builder.not_(e.below(builder.sub(j, start), SIDE))
            lanes = builder.and_(e.below(ranks, SIDE), stand)
            v_start = e.add(v, e.multiply(start, 4))

            def rows(n):
                v_rows = [e.add(v_start, e.multiply(v_stride, m)) for m in range(n)]
                _add_to_v(e, n, v_rows, count, lanes, fresh, memory)

            e.switch(columns, WIDTHS, rows)
            return nothing

        e.loop(low, high, SIDE, [], tile)
        return context.get_dummy_value()

    return types.void(unit, *[types.int64] * 10), codegen


@jit()
def _write_configuration(memory, ranks, columns):
    """Of tiles for so many ranks and columns, as amx_instructions.py draws it."""
    configuration = vector(memory, 64, BYTE)
    configuration[:] = 0
    configuration[0] = 1
    for tile in range(8):
        configuration[16 + 2 * tile] = 64 if tile in WEIGHTS else 4 * columns
        configuration[48 + tile] = SIDE if tile in COLUMNS else ranks


@jit()
def _do_task(address, unit, memory, wa, first, last, low, high):
    call = vector(address, FIELDS, INTEGER)
    groups = -(-(last - first) // SIDE)
    columns = 1
    while columns * groups < last - first:
        columns *= 2
    _write_configuration(memory, min(high - low, SIDE), columns)
    _configure(unit, memory)
    for k in range(0, call[H_IN], K_BLOCK):
        width = min(K_BLOCK, call[H_IN] - k)
        w = wa + (low * call[H_IN] + k) * 2
        p = first
        for g in range(groups):
            count = (last - p) // (groups - g)
            _gather(address, p, count, columns, k, width, memory)
            _products(unit, address, p, count, columns, w, low, high, k, width, memory)
            p += count
    _release(unit, memory)


@jit()
def shrink(address, limit, unit):
    """Run up to `limit` tasks of the call at this address: v = x @ wa.T, row block by row block.

    unit  who computes tile products: amx_instructions.CPU or EMULATION
    """
    call = vector(address, FIELDS, INTEGER)
    memory = _reserve()
    for _ in range(limit):
        task = claim(address, SHRINK_NEXT)
        if task >= call[BLOCK_COUNT] * call[SHRINK_CUTS]:
            return
        slot, r, first, last = block_of(call, task, call[SHRINK_CUTS])
        low, high = cut_of(task, call[SHRINK_CUTS], r, RANK_UNIT)
        if low < high:  # of no rank there is no configuration
            wa = item(call[WA], slot)
            _do_task(address, unit, memory, wa, first, last, low, high)
        add_atomic(address + 8 * SHRINK_DONE, 1)
