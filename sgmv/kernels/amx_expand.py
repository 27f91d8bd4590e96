"""Expand by tile products (AMX), for weights of bfloat16 and v of float32.

y[rows[p], c] += scaling * sum over j of v[p, j] * wb[j, c]. v has more digits than bfloat16 holds, so
each number is cut into three of 8 bits, v = high + middle + low, exactly. A row of v becomes its low
parts, then the middle ones, then the high ones, the smallest first; wb is read three times:

         parts of v   k ->                        wb, in pairs of ranks   c ->
    p   [ low 0 1 .. | middle 0 1 .. | high .. ]      j=0,1  [ 0 1 | 0 1 | .. ]
    |     ..                                          j=2,3  [ 2 3 | 2 3 | .. ]
    v   16 rows, steps of 32 k                        ..     64 columns, in four tiles
                                                      j=0,1  [ 0 1 | 0 1 | .. ]   again, to 15 more

A step takes 16 pairs of ranks from where the last one ended; the pairs go round, so 15 of them are
stored again behind the last. For each panel of 64 columns wb is turned into pairs once, which all
rows of the task share, and the sums of 16 rows are added to y while the next rows' products run.

The float32 tiles do what this cannot: up to 8 ranks, where they are faster; and a panel with inf or
NaN among its weights, which times a part that is 0 would be NaN.

Same row, same bits: the way depends on the adapter's weights and the panel alone, and so does the
order of an element's products (see amx_instructions.py). Edge rules as in amx.py.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from sgmv.kernels.amx import IN_PLACE, PANELS, SIDE, STEP, SUMS, TILE_BYTES, configure, release
from sgmv.kernels.amx import write_configuration
from sgmv.kernels.amx_instructions import NUMBERS, PAIRS, START, STATE_BYTES, WORDS
from sgmv.kernels.emit import I8, I16, LANES, numbers, size
from sgmv.kernels.jit import INT64, address_of, entry, jit, record, vector
from sgmv.kernels.panels import panels, plain_rank, scratch
from sgmv.kernels.records import CALL, FLOAT64, PANEL, TABLE
from sgmv.kernels.tasks import NONE, claim_expand, leave_expand, no_task
from sgmv.kernels.tiles import Y_AHEAD, columns_in_l2, expand_block

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


@intrinsic
def _task_memory(typingctx):
    """Its address, on the stack, at the start of a cache line."""

    def codegen(context, builder, signature, args):
        with builder.goto_entry_block():
            memory = builder.alloca(ir.ArrayType(I8, MEMORY_BYTES))
            memory.align = 64
        return builder.ptrtoint(memory, INT64)

    return types.int64(), codegen


@intrinsic
def _split(typingctx, unit, v, v_stride, count, r, parts, width):
    """parts (count, width), bfloat16: the low, the middle, the high parts of v[:count, :r], zeros.

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
    """Pairs of the ranks of w (r, width), each row 64 columns long; 0 if one is not finite, or 1."""

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


@intrinsic
def _multiply_panel(
    typingctx, unit, y_like, call, memory, parts, steps, pairs, half, some_rows, some_columns, scale
):
    """y[rows[p:p + count], c:c + width] += scale * (v @ wb), from the parts and the pairs of both.

    steps  of 32 k, in a row of parts;  half  the pairs until they come again
    some_rows  (p, count);  some_columns  (c, width)
    """

    def codegen(context, builder, signature, args):
        call, memory, parts, steps, pairs, half, some_rows, some_columns, scale = args[2:]
        e, b = WORDS[unit](builder, memory), builder
        (p, count), (c, width) = e.pair(some_rows), e.pair(some_columns)
        y, y_stride, y_rows = e.fields(CALL, call, "y", "y_stride", "y_rows")
        y = e.add(y, e.multiply(c, size(y_like)))
        y_rows = e.add(y_rows, e.multiply(p, 8))
        scale = e.everywhere(scale)
        rows = e.at_most(SIDE, count)
        top = b.sub(count, rows)
        stride = e.multiply(steps, 2 * STEP)
        turn = ir.Constant(INT64, SIDE)

        def add_to_y(first, buffer, whole):
            """The sums in a buffer, of the rows from `first` on."""
            start = e.at_most(first, top)

            def row(i, _):
                number = e.integer(e.add(y_rows, e.multiply(e.add(start, i), 8)))
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

            e.loop(b.sub(first, start), rows, 1, [], row)

        def either_add(first, buffer):
            with b.if_else(b.icmp_signed("==", width, ir.Constant(INT64, PANEL))) as (whole, part):
                with whole:
                    add_to_y(first, buffer, True)
                with part:
                    add_to_y(first, buffer, False)

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
                either_add(b.sub(first, turn), before)
            for q in SUMS:
                e.store_tile(q, e.add(buffer, q * TILE_BYTES), ir.Constant(INT64, 64))
            return [before, buffer]

        here = []
        first_buffer = e.add(memory, SUM)
        buffers = [first_buffer, e.add(first_buffer, BUFFER_BYTES)]
        [_, last] = e.loop(START, count, SIDE, buffers, rows_of_a_tile)
        tiles = b.udiv(e.add(count, -1), turn)
        either_add(e.multiply(tiles, SIDE), last)
        return context.get_dummy_value()

    integer = types.int64
    pair = types.UniTuple(integer, 2)
    operands = *[integer] * 6, pair, pair, types.float32
    return types.void(unit, y_like, *operands), codegen


def expand_kernel(unit: Any, y_like: Any) -> int:
    """The kernel y += scaling * v @ wb: up to `limit` tasks of the call, row block by row block.

    unit  what computes tile products, see amx_instructions.py
    """

    def amx_expand(address, limit):
        call = record(CALL, address)
        table = record(TABLE, call.table)
        rank = plain_rank(address)
        room = scratch(rank, columns_in_l2(rank, BFLOAT16), BFLOAT16)
        memory = _task_memory()
        task = no_task()
        for _ in range(limit):
            task = claim_expand(address, task)
            if task.number == NONE:
                return
            scaling = np.float32(vector(table.scalings + 8 * task.slot, 1, FLOAT64)[0])
            rows = task.first, task.last - task.first
            half = -(-task.r // 2)
            steps = -(-PARTS * 2 * half // STEP)
            by_products = task.r >= FEWEST_RANKS
            parts = np.empty(rows[1] * steps * STEP if by_products else 0, np.int16)
            pairs = np.empty((half + SIDE - 1) * PANEL if by_products else 0, np.int32)
            at_parts, at_pairs = address_of(parts), address_of(pairs)
            if by_products:
                v = call.v + call.v_stride * task.first
                _split(unit, v, call.v_stride, rows[1], task.r, at_parts, steps * STEP)
                write_configuration(memory, min(rows[1], SIDE), SIDE)
                configure(unit, memory)
            l2 = columns_in_l2(task.r, BFLOAT16)
            for c in range(task.low, task.high, l2):
                end = min(c + l2, task.high)
                wb = panels(table, task.slot, task.r, c, end, room, BFLOAT16)
                if not by_products:
                    expand_block(BFLOAT16, y_like, address, task, wb, (c, end), scaling)
                    continue
                for low in range(c, end, PANEL):
                    width = min(PANEL, end - low)
                    if _pair(unit, wb + 2 * low * task.r, width, task.r, at_pairs) == 0:
                        ends = low, low + width
                        expand_block(BFLOAT16, y_like, address, task, wb, ends, scaling)
                        continue
                    operands = at_parts, steps, at_pairs, half, rows, (low, width), scaling
                    _multiply_panel(unit, y_like, address, memory, *operands)
            if by_products:
                release(unit, memory)
        leave_expand(address, task)

    return entry(amx_expand)
