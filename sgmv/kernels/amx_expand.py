"""Expand by tile products (AMX), for weights of bfloat16 and v of float32.

y[rows[p], c] += scaling * sum over j of v[p, j] * wb[j, c]. v has more digits than bfloat16 holds,
so each number is cut into three of 8 bits, v = high + middle + low, exactly. A row of v becomes its
low parts, then the middle ones, then the high ones; for each of them wb is read again:

         parts of v   k ->                        wb, in pairs of ranks   c ->
    p   [ low 0 1 .. | middle 0 1 .. | high .. ]      j=0,1  [ 0 1 | 0 1 | .. ]
    |     ..                                          j=2,3  [ 2 3 | 2 3 | .. ]
    v   16 rows, steps of 32 k                        ..     64 columns, in four tiles
                                                      j=0,1  [ 0 1 | 0 1 | .. ]   again, to 15 more

A step takes 16 pairs of ranks from where the last one ended; the pairs go round, so 15 of them are
stored again behind the last. For each panel of 64 columns wb is turned into pairs once, which all
rows of the task share, and the sums of 16 rows are added to y while the next rows' products run.

The float32 tiles do what this cannot: up to 8 ranks, where they are faster; adapters with DoRA's
gains; and a panel with inf or NaN among its weights, which times a part that is 0 would be NaN.

Same row, same bits: the way depends on the adapter's weights and the panel alone, and so does the
order of an element's products (see amx_instructions.py). Edge rules as in amx.py.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from sgmv.kernels.amx_instructions import (
    IN_PLACE,
    NUMBERS,
    PAIRS,
    PANELS,
    SIDE,
    START,
    STATE_BYTES,
    STEP,
    SUMS,
    TILE_BYTES,
    WORDS,
    configure,
    on_the_stack,
    release,
    write_configuration,
)
from sgmv.kernels.emit import I16, LANES, numbers, size
from sgmv.kernels.jit import INT64, address_of, entry, jit, record, vector
from sgmv.kernels.panels import panels, plain_rank, scratch
from sgmv.kernels.records import CALL, FLOAT64, PANEL, TABLE
from sgmv.kernels.tasks import NONE, claim_expand, gain_addresses, task_in_part
from sgmv.kernels.tile_kernels import columns_in_l2, expand_block, expand_task
from sgmv.kernels.tiles import Y_AHEAD

BFLOAT16 = np.int16(0)
PARTS = 3
FEWEST_RANKS = 9
W_AHEAD = 4096  # bytes before its use that wb is asked for
ROW_BYTES = 4 * PANEL  # of 64 columns of pairs
BUFFER_BYTES = len(SUMS) * TILE_BYTES
SUM = STATE_BYTES  # in a task's memory: two buffers of sums, in turn
MEMORY_BYTES = SUM + 2 * BUFFER_BYTES

HALVES = ir.VectorType(I16, SIDE)
EXPONENT, QUIET = 0x7F80, 0x400000


task_memory = on_the_stack(MEMORY_BYTES)


@intrinsic
def _split(typingctx, unit, v, v_stride, count, r, parts, width):
    """Write parts (count, width): the low, middle and high parts of v[:count, :r], then zeros.

    An odd number of ranks has one more, of zeros.
    """

    def codegen(context, builder, signature, args):
        v, v_stride, count, r, parts, width = args[1:]
        e, b = WORDS[unit](builder, None), builder
        even = e.multiply(b.lshr(e.add(r, 1), ir.Constant(INT64, 1)), 2)

        def upper(value):
            """Its first 8 bits of significand, as bits: what bfloat16 holds, cut off."""
            return b.and_(b.bitcast(value, PAIRS), numbers([-0x10000] * SIDE))

        def row(p, _):
            source, target = e.add(v, e.multiply(v_stride, p)), e.multiply(e.multiply(width, p), 2)
            target = e.add(parts, target)

            def clear(k, _):
                e.store_as(ir.Constant(PAIRS, None), e.add(target, e.multiply(k, 2)), 2)
                return []

            def ranks(j, _):
                present = e.below(b.sub(r, j), SIDE)
                value = e.read(e.add(source, e.multiply(j, 4)), NUMBERS, 4, present)
                is_nan = b.fcmp_unordered("uno", value, value)
                high = upper(value)
                high = b.select(is_nan, b.or_(high, numbers([QUIET] * SIDE)), high)
                rest = b.fsub(value, b.bitcast(upper(value), NUMBERS))
                # What is not finite has no other parts.
                finite = b.fcmp_ordered("oeq", rest, rest)
                rest = b.select(finite, rest, ir.Constant(NUMBERS, None))
                middle = upper(rest)
                low = b.bitcast(b.fsub(rest, b.bitcast(middle, NUMBERS)), PAIRS)
                for i, part in enumerate((low, middle, high)):
                    stored = b.trunc(b.lshr(part, numbers([16] * SIDE)), HALVES)
                    place = e.multiply(e.add(e.multiply(even, i), j), 2)
                    e.store_as(stored, e.add(target, place), 2, present)
                return []

            e.loop(START, width, STEP, [], clear)
            return e.loop(START, r, SIDE, [], ranks)

        e.loop(START, count, 1, [], row)
        return context.get_dummy_value()

    return types.void(unit, *[types.int64] * 6), codegen


@intrinsic
def _pair(typingctx, unit, w, width, r, pairs):
    """Write pairs of the ranks of w (r, width), rows of 64 columns; 1 if all are finite, else 0."""

    def codegen(context, builder, signature, args):
        w, width, r, pairs = args[1:]
        e, b = WORDS[unit](builder, None), builder
        stride = e.multiply(width, 2)
        masks = [e.below(e.add(width, -c), SIDE) for c in range(0, PANEL, SIDE)]
        flags = ir.VectorType(ir.IntType(1), STEP)
        half = ir.VectorType(I16, STEP)
        special = ir.Constant(half, [EXPONENT] * STEP)

        def pair(j, found):
            found = found[0]
            first = e.add(w, e.multiply(j, stride))
            exists = b.icmp_signed("<", e.add(j, 1), r)
            target = e.add(pairs, e.multiply(j, ROW_BYTES // 2))
            for row in (first, e.add(first, stride)):
                for line in range(0, 2 * PANEL, 64):
                    e.prefetch(e.add(row, line + W_AHEAD))
            for i, mask in enumerate(masks):
                even = e.read(e.add(first, 2 * SIDE * i), HALVES, 2, mask)
                both = b.select(exists, mask, ir.Constant(mask.type, None))
                odd = e.read(e.add(first, stride, 2 * SIDE * i), HALVES, 2, both)
                upper = b.shl(b.zext(odd, PAIRS), numbers([16] * SIDE))
                pairs_of = b.or_(b.zext(even, PAIRS), upper)
                exponents = b.and_(b.bitcast(pairs_of, half), special)
                found = b.or_(found, b.icmp_unsigned("==", exponents, special))
                e.store_as(pairs_of, e.add(target, 64 * i), 4)
            return [found]

        def again(j, _):  # a row may be one that was stored again itself
            target = e.add(pairs, e.multiply(j, ROW_BYTES))
            source = b.sub(target, e.multiply(b.lshr(e.add(r, 1), one), ROW_BYTES))
            for line in range(0, ROW_BYTES, 64):
                e.store_as(e.read(e.add(source, line), PAIRS, 4), e.add(target, line), 4)
            return []

        one = ir.Constant(INT64, 1)
        [found] = e.loop(START, r, 2, [ir.Constant(flags, None)], pair)
        rows = b.lshr(e.add(r, 1), one)
        e.loop(rows, e.add(rows, SIDE - 1), 1, [], again)
        none = ir.Constant(ir.IntType(STEP), 0)
        finite = b.icmp_unsigned("==", b.bitcast(found, none.type), none)
        return b.zext(finite, INT64)

    return types.int64(unit, *[types.int64] * 4), codegen


def _add_to_y(e, y_like, call, some_rows, some_columns, scale, buffer):
    """Y += scale * the sums in a buffer: 16 rows of 64 columns, or of fewer.

    some_rows  (p, low, high): rows low:high of the tile whose first row is at sorted position p
    """
    b = e.builder
    (p, low, high), (c, width) = some_rows, some_columns
    y, y_stride, y_rows = e.fields(CALL, call, "y", "y_stride", "y_rows")
    y = e.add(y, e.multiply(c, size(y_like)))

    def row(i, whole):
        number = e.integer(e.add(y_rows, e.multiply(e.add(p, i), 8)))
        target = e.add(y, e.multiply(y_stride, number))
        for line in range(0, PANEL * size(y_like), 64):
            e.prefetch(e.add(target, line + Y_AHEAD), write=True)
        for column in range(0, PANEL, LANES):
            tile, lane = divmod(column, SIDE)
            place = e.add(buffer, e.multiply(i, 64), tile * TILE_BYTES + 4 * lane)
            there = e.add(target, column * size(y_like))
            mask = None if whole else e.below(e.add(width, -column))
            old = e.load(there, y_like, mask)
            e.store(e.fma(scale, e.load(place), old), there, y_like, mask)
        return []

    is_whole = b.icmp_signed("==", width, ir.Constant(INT64, PANEL))
    with b.if_else(is_whole) as branches:
        for branch, whole in zip(branches, (True, False)):  # noqa: B905
            with branch:
                e.loop(low, high, 1, [], lambda i, _, whole=whole: row(i, whole))


@intrinsic
def _multiply_panel(
    typingctx, unit, y_like, call, memory, left, right, some_rows, some_columns, scale
):
    """y[rows[p:p + count], c:c + width] += scale * (v @ wb), from the parts and the pairs of both.

    left  (parts, the steps of 32 k in a row);  right  (pairs, how many until they come again)
    some_rows  (p, count);  some_columns  (c, width)
    """

    def codegen(context, builder, signature, args):
        call, memory, left, right, some_rows, some_columns, scale = args[2:]
        e, b = WORDS[unit](builder, memory), builder
        (parts, steps), (pairs, half) = e.numbers(left), e.numbers(right)
        (p, count), (c, width) = e.numbers(some_rows), e.numbers(some_columns)
        rows = e.at_most(SIDE, count)
        top = b.sub(count, rows)
        stride = e.multiply(steps, 2 * STEP)
        turn = ir.Constant(INT64, SIDE)

        def add(first, buffer):
            start = e.at_most(first, top)
            some_rows = e.add(p, start), b.sub(first, start), rows
            _add_to_y(e, y_like, call, some_rows, (c, width), e.everywhere(scale), buffer)

        def step(t, places):
            place = e.add(pairs, e.multiply(places[0], ROW_BYTES))
            a = IN_PLACE[0]
            e.load_tile(a, e.add(here[0], e.multiply(t, 2 * STEP)), stride)
            for q in SUMS:
                panel = PANELS[q % 2]
                e.load_tile(panel, e.add(place, 64 * q), ir.Constant(INT64, ROW_BYTES))
                e.multiply_tiles(q, a, panel)
            return [b.urem(e.add(places[0], SIDE), half)]

        def rows_of_a_tile(first, buffers):
            buffer, before = buffers
            here[:] = [e.add(parts, e.multiply(stride, e.at_most(first, top)))]
            for q in SUMS:
                e.zero_tile(q)
            e.loop(START, steps, 1, [START], step)
            with b.if_then(b.icmp_signed(">", first, START)):
                add(b.sub(first, turn), before)
            for q in SUMS:
                e.store_tile(q, e.add(buffer, q * TILE_BYTES), ir.Constant(INT64, 64))
            return [before, buffer]

        here = []
        first_buffer = e.add(memory, SUM)
        buffers = [first_buffer, e.add(first_buffer, BUFFER_BYTES)]
        [_, last] = e.loop(START, count, SIDE, buffers, rows_of_a_tile)
        tiles = b.udiv(e.add(count, -1), turn)
        add(e.multiply(tiles, SIDE), last)
        return context.get_dummy_value()

    integer = types.int64
    pairs = [types.UniTuple(integer, 2)] * 4
    return types.void(unit, y_like, integer, integer, *pairs, types.float32), codegen


@jit()
def products_task(unit, y_like, address, memory, task, room, scaling):
    """Y += scaling * v @ wb, for the rows and columns of a task of 9 ranks or more."""
    call = record(CALL, address)
    rows = task.first, task.last - task.first
    half = -(-task.r // 2)
    steps = -(-PARTS * 2 * half // STEP)
    parts = np.empty(rows[1] * steps * STEP, np.int16)
    pairs = np.empty((half + SIDE - 1) * PANEL, np.int32)
    left, right = (address_of(parts), steps), (address_of(pairs), half)
    v = call.v + call.v_stride * task.first
    _split(unit, v, call.v_stride, rows[1], task.r, left[0], steps * STEP)
    write_configuration(memory, min(rows[1], SIDE), SIDE)
    configure(unit, memory)
    l2 = columns_in_l2(task.r, BFLOAT16)
    for c in range(task.low, task.high, l2):
        end = min(c + l2, task.high)
        wb = panels(record(TABLE, call.table), task.slot, task.r, c, end, room, BFLOAT16)
        for low in range(c, end, PANEL):
            columns = low, min(PANEL, end - low)
            if _pair(unit, wb + 2 * low * task.r, columns[1], task.r, right[0]) != 0:
                operands = left, right, rows, columns, scaling
                _multiply_panel(unit, y_like, address, memory, *operands)
            else:
                ends = low, low + columns[1]
                expand_block(BFLOAT16, y_like, address, task, wb, ends, scaling)
    release(unit, memory)


def expand_kernel(unit: Any, y_like: Any) -> int:
    """The kernel y += scaling * v @ wb: up to `limit` tasks of the call, row block by row block.

    unit  what computes tile products, see amx_instructions.py
    """

    def amx_expand(address, limit):
        table = record(TABLE, record(CALL, address).table)
        rank = plain_rank(address)
        room = scratch(rank, columns_in_l2(rank, BFLOAT16), BFLOAT16)
        memory = task_memory()
        for _ in range(limit):
            part = claim_expand(address)
            if part.number == NONE:
                return
            for block in range(part.first, part.last):
                task = task_in_part(address, part, block)
                scaling = np.float32(vector(table.scalings + 8 * task.slot, 1, FLOAT64)[0])
                if task.r >= FEWEST_RANKS and gain_addresses(table, task.slot)[0] == 0:
                    products_task(unit, y_like, address, memory, task, room, scaling)
                else:
                    expand_task(BFLOAT16, y_like, address, task, room, scaling)

    return entry(amx_expand)
