"""16-bit floats as float32 in a task's scratch, widened once where many rows meet them.

A tile widens what it reads: an operation or two for each vector. A task of many rows passes over
its weights once for every six rows, and over a row of x once for every few ranks. There both are
widened once, and the tiles for float32 run on them:

    shrink   a K block of wa, by the first rows that meet it, and six rows of x, before they are
             multiplied: rows side by side, ROW bytes apart
    expand   the panels of wb that stay in L2, before rows meet them: as they are packed

The vectors are in the order in which tiles for 16 bits multiply them: odd k before even ones, where
those do so. So the sums, and the bits, are the same.
"""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from sgmv.kernels.emit import LANES, Emit, size
from sgmv.kernels.jit import INT64, address_of, jit, record, size_of, vector
from sgmv.kernels.records import CALL, INTEGER

K_BLOCK = 1024  # six rows of one K block are 24 KiB of x: they stay in L1 for all ranks
ROW = 4 * K_BLOCK + 64  # bytes; rows a power of two apart would crowd the same sets of L1
LINE = 64  # bytes
STEP = 2 * LANES  # elements that may be written at a time, zeros past the last


@intrinsic
def widen(typingctx, x_like, w_like, like, source, count, target):
    """target[:] = the `count` elements of like's type at source, in the order of shrink's products.

    Semantics: zeros up to a whole step of the products; nothing past the last element is read.
    Returns the number of elements written.
    x_like, w_like  what is multiplied
    """

    def codegen(context, builder, signature, args):
        e = Emit(builder)
        source, count, target = args[3:]
        products = e.products(x_like, w_like)

        def piece(k, nothing, mask=None):
            here = e.add(source, e.multiply(k, size(like)))
            there = e.add(target, e.multiply(k, 4))
            for part, found in enumerate(products.read(here, like, mask, products.parts)):
                e.store(found, e.add(there, part * LANES * 4))
            return nothing

        def last_piece(k, nothing):
            return piece(k, nothing, e.below(builder.sub(count, k), products.step))

        whole = builder.and_(count, ir.Constant(INT64, -products.step))
        e.loop(ir.Constant(INT64, 0), whole, products.step, [], piece)
        e.loop(whole, count, products.step, [], last_piece)
        return builder.and_(e.add(count, products.step - 1), ir.Constant(INT64, -products.step))

    return types.int64(x_like, w_like, like, *[types.int64] * 3), codegen


@jit()
def room_of(room, elements):
    """A float32 array with this number of elements from `start_of` on; the given one, if it has."""
    if room.shape[0] >= elements + LINE // 4:
        return room
    return np.empty(elements + LINE // 4, np.float32)


@jit()
def start_of(room):
    """The address of the room's first cache line."""
    return (address_of(room) + LINE - 1) // LINE * LINE


@jit()
def widen_rows(x_like, w_like, address, p, count, k, width, target):
    """k:k + width of the rows of x at sorted positions p:p + count; returns the width written."""
    written = width
    call = record(CALL, address)
    rows = vector(call.x_rows, p + count, INTEGER)
    for m in range(count):
        x = call.x + rows[p + m] * call.x_stride + k * size_of(x_like)
        written = widen(x_like, w_like, x_like, x, width, target + m * ROW)
    return written


@jit()
def widened_panels(w_like, wb, elements, room):
    """The address of float32 that are `elements` of packed wb; `room` has STEP more."""
    widen(np.float32(0), w_like, w_like, wb, elements, start_of(room))
    return start_of(room)
