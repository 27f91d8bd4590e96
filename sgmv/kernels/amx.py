"""Shrink by tile products (AMX), for x and weights of bfloat16.

v[p, j] = sum over k of x[rows[p], k] * wa[j, k]. Of the two operands of a product one is read where
it is stored, 16 rows at one stride, and the other from a panel, into which it is packed first:

              in place                panel: pairs, rows          sums
                k ->                    j    j+1   j+2              j   j+1  j+2
    row p     [ 0 1 | 2 3 | .. ]      [ 0 1 | 0 1 | 0 1 | .. ]    [ s | s | s | .. ]
    row p+1   [ 0 1 | 2 3 | .. ]  x   [ 2 3 | 2 3 | 2 3 | .. ] =  [ s | s | s | .. ]
      ..                                ..
    16 rows, 16 pairs of k            16 pairs, 1 to 16 rows      16 rows, 1 to 16 columns

Packing is what is dear: two k of a row are one number of 32 bits, and (rows, pairs) of these are
turned into (pairs, rows). So the operand of fewer rows is packed:

    few rows    x is packed and wa read in place, for which weights need no order of their own; the
                sums are (ranks, rows) and turned back. Panels of a few rows are 1, 2, 4 or 8 wide
    many rows   a K block of wa is packed once for all rows of the task; x is read in place, where
                the rows of a block are at one stride, and else copied side by side

Two tiles in place by two panels are four tiles of sums: a tile is read for each product, and a
product takes twice as long as that. A K block is one chain of products, steps of 32 k ascending; at
its end the sums are added to v.

Same row, same bits: a product of two numbers is the same either way round, and k alone decides in
which order an element's products are added (see amx_instructions.py). Edge rules as in tiles.py:
where fewer than 16 rows are left in place, the tile begins earlier, and sums that v has already are
dropped; the last k are copied beside zeros first.
"""

from __future__ import annotations

from typing import Any, NamedTuple

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
from sgmv.kernels.emit import I16, numbers
from sgmv.kernels.jit import INT64, entry, jit, record, vector
from sgmv.kernels.records import CALL, INTEGER, TABLE
from sgmv.kernels.tasks import NONE, claim_shrink, finish_shrink, item

K_BLOCK = 1024  # of 16 rows, 32 KiB
PACKED = 4 * SIDE  # rows that are packed at a time
WIDTHS = (1, 2, 4, 8, 16)  # of a panel
AHEAD = 512  # bytes before its use that memory read in place is asked for

# A task's memory: the tiles' state, the addresses of rows, panels, rows copied side by side, the
# last k beside zeros, the sums.
PANEL_BYTES = K_BLOCK * SIDE * 2
COPY_STRIDE = K_BLOCK * 2 + 64  # rows a power of two apart would crowd the same sets of the cache
ADDRESSES = STATE_BYTES
PANEL = ADDRESSES + 8 * PACKED
COPY = PANEL + PACKED // SIDE * PANEL_BYTES
LAST = COPY + len(IN_PLACE) * SIDE * COPY_STRIDE
SUM = LAST + len(IN_PLACE) * TILE_BYTES
MEMORY_BYTES = SUM + len(SUMS) * TILE_BYTES

task_memory = on_the_stack(MEMORY_BYTES)

# Lanes of two vectors in turn: of their lower halves, and of their upper ones.
LOWER, UPPER = (
    [lane + vector for lane in half for vector in (0, SIDE)] for half in (range(8), range(8, 16))
)


class Operand(NamedTuple):
    """Rows of bfloat16 in memory: row i is at base + stride * (rows[i], or i if rows is 0)."""

    base: int
    stride: int
    rows: int  # at (total,) int64, or 0: all are at one stride
    total: int


class Target(NamedTuple):
    """Where sums are added: v, its stride, and whether the rows in place are its columns."""

    v: int
    stride: int
    turned: bool


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


@intrinsic
def _pack(typingctx, unit, memory, number, columns, k, width):
    """Panel `number` of the rows at the first `columns` addresses: k:k + width, and zeros."""

    def codegen(context, builder, signature, args):
        memory, number, columns, k, width = args[1:]
        e = WORDS[unit](builder, memory)
        whole = builder.and_(width, ir.Constant(INT64, -STEP))

        def pack(n):
            first = e.multiply(number, 8 * SIDE)
            rows = [
                e.add(e.integer(e.add(memory, first, ADDRESSES + 8 * m)), e.multiply(k, 2))
                for m in range(n)
            ]
            panel = e.add(memory, PANEL, e.multiply(number, PANEL_BYTES))

            def step(k, count=None):
                pairs = [_read_pairs(e, e.add(row, e.multiply(k, 2)), count) for row in rows]
                for i, turned in enumerate(_rotate_numbers(e, pairs, n.bit_length() - 1)):
                    e.store(turned, e.add(panel, 64 * i, e.multiply(k, 2 * n)))
                return []

            e.loop(START, whole, STEP, [], lambda k, _: step(k))
            e.loop(whole, width, STEP, [], lambda k, _: step(k, builder.sub(width, k)))

        e.switch(columns, WIDTHS, pack)
        return context.get_dummy_value()

    return types.void(unit, *[types.int64] * 5), codegen


@intrinsic
def _copy(typingctx, unit, memory, number, k, width):
    """The 16 rows at the first addresses, k:k + width and zeros, side by side as tile `number`."""

    def codegen(context, builder, signature, args):
        memory, number, k, width = args[1:]
        e = WORDS[unit](builder, memory)
        whole = builder.and_(width, ir.Constant(INT64, -STEP))
        target = e.add(memory, COPY, e.multiply(number, SIDE * COPY_STRIDE))

        def row(m, _):
            address = e.integer(e.add(memory, ADDRESSES, e.multiply(m, 8)))
            source, copy = (
                e.add(address, e.multiply(k, 2)),
                e.add(target, e.multiply(m, COPY_STRIDE)),
            )

            def piece(k, count=None):
                offset = e.multiply(k, 2)
                e.store(_read_pairs(e, e.add(source, offset), count), e.add(copy, offset))
                return []

            e.loop(START, whole, STEP, [], lambda k, _: piece(k))
            return e.loop(whole, width, STEP, [], lambda k, _: piece(k, builder.sub(width, k)))

        e.loop(START, ir.Constant(INT64, SIDE), 1, [], row)
        return context.get_dummy_value()

    return types.void(unit, *[types.int64] * 4), codegen


def _copy_last(e, places, stride, rows, count, copies):
    """The last `count` k of the rows of each place, beside zeros."""

    def row(j, _):
        for place, copy in zip(places, copies):  # noqa: B905
            pairs = _read_pairs(e, e.add(place, e.multiply(stride, j)), count)
            e.store(pairs, e.add(copy, e.multiply(j, 64)))
        return []

    e.loop(START, rows, 1, [], row)


@intrinsic
def _multiply(typingctx, unit, memory, shape, addresses, stride, rows, panel, columns, width):
    """The sums of one or two tiles in place, and of one or two panels from `panel` on.

    shape  (tiles in place, panels);  addresses  of both tiles' first rows;  rows  of a tile
    """

    def codegen(context, builder, signature, args):
        memory, shape, addresses, stride, rows, panel, columns, width = args[1:]
        e = WORDS[unit](builder, memory)
        (tiles, panels), addresses = e.numbers(shape), e.numbers(addresses)
        panel = e.add(memory, PANEL, e.multiply(panel, PANEL_BYTES))
        panel_stride = e.multiply(columns, 4)
        whole = builder.and_(width, ir.Constant(INT64, -STEP))
        form = e.add(e.multiply(tiles, 4), panels)

        def multiply(form):
            m, n = divmod(form, 4)

            def products(k, places, stride):
                for i in range(m):
                    e.load_tile(IN_PLACE[i], places[i], stride)
                for q in range(n):
                    there = e.add(panel, q * PANEL_BYTES, e.multiply(columns, e.multiply(k, 2)))
                    e.load_tile(PANELS[q], there, panel_stride)
                    for i in range(m):
                        e.multiply_tiles(SUMS[2 * i + q], IN_PLACE[i], PANELS[q])
                return []

            def step(k, _):
                places = [e.add(address, e.multiply(k, 2)) for address in addresses[:m]]
                if n == 1:  # few products for each tile: they wait for memory
                    for place in places:
                        for i in range(SIDE):
                            e.prefetch(e.add(place, AHEAD, e.multiply(stride, i)))
                return products(k, places, stride)

            def last_step(k, _):
                copies = [e.add(memory, LAST + i * TILE_BYTES) for i in range(m)]
                places = [e.add(address, e.multiply(k, 2)) for address in addresses[:m]]
                _copy_last(e, places, stride, rows, builder.sub(width, k), copies)
                return products(k, copies, ir.Constant(INT64, 64))

            sums = [2 * i + q for i in range(m) for q in range(n)]
            for tile in sums:
                e.zero_tile(SUMS[tile])
            e.loop(START, whole, STEP, [], step)
            e.loop(whole, width, STEP, [], last_step)
            for tile in sums:
                e.store_tile(SUMS[tile], e.add(memory, SUM + tile * TILE_BYTES), panel_stride)

        e.switch(form, [4 * m + n for m in (1, 2) for n in (1, 2)], multiply)
        return context.get_dummy_value()

    pair = types.UniTuple(types.int64, 2)
    return types.void(unit, types.int64, pair, pair, *[types.int64] * 5), codegen


@intrinsic
def _add_rows(typingctx, unit, memory, tile, columns, rows, v, v_stride, ranks, fresh):
    """v[i, :ranks] (+)= row i of a tile of sums, from row low to high.

    rows  (low, high): the rows of the tile that v has not yet
    """

    def codegen(context, builder, signature, args):
        memory, tile, columns, rows, v, v_stride, ranks, fresh = args[1:]
        e = WORDS[unit](builder, memory)
        low, high = e.numbers(rows)
        sums = e.add(memory, SUM, e.multiply(tile, TILE_BYTES))
        present = e.below(ranks, SIDE)
        fresh = builder.icmp_signed("!=", fresh, START)

        def row(i, _):
            target = e.add(v, e.multiply(v_stride, i))
            total = e.read(e.add(sums, e.multiply(e.multiply(i, columns), 4)), NUMBERS, 4, present)
            both = builder.fadd(e.read(target, NUMBERS, 4, present), total)
            e.store(builder.select(fresh, total, both), target, mask=present)
            return []

        e.loop(low, high, 1, [], row)
        return context.get_dummy_value()

    pair, integer = types.UniTuple(types.int64, 2), types.int64
    return types.void(unit, integer, integer, integer, pair, *[integer] * 4), codegen


@intrinsic
def _add_turned(typingctx, unit, memory, tile, columns, lanes, v, v_stride, count, fresh):
    """v[i, lanes] (+)= column i of a tile of sums, for the first `count` columns.

    lanes  (low, high): the ranks of the tile that v has not yet
    """

    def codegen(context, builder, signature, args):
        memory, tile, columns, lanes, v, v_stride, count, fresh = args[1:]
        e = WORDS[unit](builder, memory)
        low, high = e.numbers(lanes)
        lanes = builder.and_(e.below(high, SIDE), builder.not_(e.below(low, SIDE)))
        sums = e.add(memory, SUM, e.multiply(tile, TILE_BYTES))
        fresh = builder.icmp_signed("!=", fresh, START)

        def add(n):
            totals = [e.read(e.add(sums, 64 * i), NUMBERS, 4) for i in range(n)]
            for i, total in enumerate(_rotate_numbers(e, totals, 4)):
                exists = builder.icmp_signed("<", ir.Constant(INT64, i), count)
                present = builder.select(exists, lanes, ir.Constant(lanes.type, None))
                row = e.add(v, e.multiply(v_stride, i))
                both = builder.fadd(e.read(row, NUMBERS, 4, present), total)
                e.store(builder.select(fresh, total, both), row, mask=present)

        e.switch(columns, WIDTHS, add)
        return context.get_dummy_value()

    pair, integer = types.UniTuple(types.int64, 2), types.int64
    return types.void(unit, integer, integer, integer, pair, *[integer] * 4), codegen


@jit()
def address_of_row(operand, i):
    if operand.rows == 0:
        return operand.base + operand.stride * i
    return operand.base + operand.stride * item(operand.rows, i)


@jit()
def at_one_stride(operand):
    """The same rows without their numbers, where these are at one distance from each other."""
    first = item(operand.rows, 0)
    apart = item(operand.rows, 1) - first if operand.total > 1 else 0
    for i in range(2, operand.total):
        if item(operand.rows, i) - item(operand.rows, i - 1) != apart:
            return operand
    base, stride = operand.base + operand.stride * first, operand.stride * apart
    return Operand(base, stride, 0, operand.total)


@jit()
def _write_addresses(memory, operand, first, count):
    """Of `count` rows from `first` on, past the last its own again."""
    addresses = vector(memory + ADDRESSES, count, INTEGER)
    for i in range(count):
        addresses[i] = address_of_row(operand, min(first + i, operand.total - 1))


@jit()
def _place(unit, memory, in_place, starts, k, width):
    """Addresses of two tiles' rows from k on, their stride, and the k to multiply.

    Rows that are not at one stride are copied side by side first, with zeros up to whole steps.
    """
    if in_place.rows == 0:
        a, b = address_of_row(in_place, starts[0]), address_of_row(in_place, starts[1])
        return (a + 2 * k, b + 2 * k), in_place.stride, width
    for tile in range(2):
        _write_addresses(memory, in_place, starts[tile], SIDE)
        _copy(unit, memory, tile, k, width)
    copies = memory + COPY, memory + COPY + SIDE * COPY_STRIDE
    return copies, COPY_STRIDE, -(-width // STEP) * STEP


@jit()
def width_of_panels(packed):
    """The power of two that holds the packed rows, at most 16."""
    columns = 1
    while columns < min(packed.total, SIDE):
        columns *= 2
    return columns


@jit()
def _block(unit, memory, packed, first, in_place, k, width, target):
    """Add one K block of the products of rows in place and the packed ones from `first` on to v."""
    rows, columns = min(in_place.total, SIDE), width_of_panels(packed)
    top = in_place.total - rows
    last = min(first + PACKED, packed.total)
    panels = -(-(last - first) // SIDE)
    _write_addresses(memory, packed, first, panels * SIDE)
    for panel in range(panels):
        _pack(unit, memory, panel, columns, k, width)
    for i in range(0, in_place.total, 2 * SIDE):
        tiles = 2 if i + SIDE < in_place.total else 1
        starts = min(i, top), min(i + SIDE, top)
        places, stride, wide = _place(unit, memory, in_place, starts, k, width)
        for panel in range(0, panels, 2):
            shape = tiles, min(2, panels - panel)
            _multiply(unit, memory, shape, places, stride, rows, panel, columns, wide)
            for tile in range(tiles):
                new = i + tile * SIDE - starts[tile], rows
                for q in range(shape[1]):
                    low = first + (panel + q) * SIDE
                    some = low, min(SIDE, last - low)
                    _add(unit, memory, 2 * tile + q, columns, target, starts[tile], new, some, k)


@jit()
def _add(unit, memory, tile, columns, target, start, new, some, k):
    """Add a tile of sums to v: the rows in place from `start` on, new[0]:new[1] of which v lacks.

    some  (first, count) of the packed rows
    """
    sums, fresh = (unit, memory, tile, columns), int(k == 0)
    if target.turned:
        place = target.v + target.stride * some[0] + 4 * start
        _add_turned(*sums, new, place, target.stride, some[1], fresh)
    else:
        place = target.v + target.stride * start + 4 * some[0]
        _add_rows(*sums, new, place, target.stride, some[1], fresh)


@jit()
def shrink_task(unit, memory, x, wa, h_in, v, v_stride):
    """v[:x.total, :wa.total] = x @ wa.T; v is the address of its first element."""
    turned = x.total <= SIDE or x.total < wa.total
    packed, in_place = (x, wa) if turned else (wa, x)
    write_configuration(memory, min(in_place.total, SIDE), width_of_panels(packed))
    configure(unit, memory)
    target = Target(v, v_stride, turned)
    for first in range(0, packed.total, PACKED):
        for k in range(0, h_in, K_BLOCK):
            width = min(K_BLOCK, h_in - k)
            _block(unit, memory, packed, first, in_place, k, width, target)
    release(unit, memory)


def shrink_kernel(unit: Any) -> int:
    """The kernel v = x @ wa.T: up to `limit` tasks of the call at an address, block by block.

    unit  what computes tile products, see amx_instructions.py
    """

    def amx_shrink(address, limit):
        call = record(CALL, address)
        table = record(TABLE, call.table)
        row = 2 * table.h_in
        memory = task_memory()
        for _ in range(limit):
            task = claim_shrink(address)
            if task.number == NONE:
                return
            if task.low < task.high:  # a configuration of no rank is refused
                rows = call.x_rows + 8 * task.first
                x = Operand(call.x, call.x_stride, rows, task.last - task.first)
                x = at_one_stride(x)
                for s in range(table.slices):
                    wa = item(table.wa, task.slot * table.slices + s) + task.low * row
                    ranks = Operand(wa, row, 0, task.high - task.low)
                    v = call.v + call.v_stride * task.first + 4 * (s * task.r + task.low)
                    shrink_task(unit, memory, x, ranks, table.h_in, v, call.v_stride)
            finish_shrink(address, task, np.float32(0))

    return entry(amx_shrink)
