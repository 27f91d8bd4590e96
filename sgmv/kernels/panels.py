"""Panels of weights that are not packed: gathered by the task that needs them, into its scratch.

An AdapterStack packs wb when it is loaded. Other engines' weights stay where they are, and are read
there at every call: nothing is kept of them, so no edit of theirs can be missed. Of both orders

    wb (r, h_out)   Punica's: a row of a panel is a part of one of its rows, copied
    B (h_out, r)    vLLM's: a panel is 64 of its rows transposed, a square of LANES at a time

expand's tiles then take the panel as they take a packed one: the same code, the same sums, the
same bits. Weights keep their type: nothing is rounded on the way.
"""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from sgmv.kernels.emit import LANES, STORED, Emit, lanes, size
from sgmv.kernels.jit import INT64, address_of, jit, record, records, size_of, vector
from sgmv.kernels.records import BLOCK, CALL, PANEL, TABLE
from sgmv.kernels.tasks import item

SPILL = LANES * PANEL  # a square may have ranks that do not exist, below the last panel


@jit()
def plain_rank(address):
    """The rank of weights that are not packed, one for all of a call's; 0 where they are packed."""
    call = record(CALL, address)
    if record(TABLE, call.table).wb_column_stride == 0 or call.block_count == 0:
        return 0
    return records(BLOCK, call.blocks, 1)[0].r


@jit()
def scratch(rank, columns, w_like):
    """Room for the panels of this number of columns, none if the rank is 0."""
    return np.empty(rank * columns + SPILL if rank > 0 else 0, type(w_like))


@jit()
def panel_at(table, slot, r, c, width, room, w_like):
    """The panel (r, width) that begins at column c; in this room, if wb is not packed."""
    wb = item(table.wb, slot)
    if table.wb_column_stride == 0:
        return vector(wb + c * r * size_of(w_like), r * width, w_like).reshape((r, width))
    panel = room[: r * width].reshape((r, width))
    strides = table.wb_rank_stride, table.wb_column_stride
    gather(panel, wb + c * table.wb_column_stride, *strides, w_like)
    return panel


@jit()
def gather(panel, w, rank_stride, column_stride, w_like):
    """panel[j, c] = the weight j * rank_stride + c * column_stride bytes from w."""
    for j in range(panel.shape[0]):
        for c in range(panel.shape[1]):
            panel[j, c] = vector(w + j * rank_stride + c * column_stride, 1, w_like)[0]


@jit()
def panels(table, slot, r, low, high, room, w_like):
    """Where the adapter's panels would begin if those of columns low:high stood among them all."""
    wb = item(table.wb, slot)
    rank_stride, column_stride = table.wb_rank_stride, table.wb_column_stride
    if column_stride == 0:
        return wb
    whole = low + (high - low) // PANEL * PANEL
    if column_stride == size_of(w_like):
        for j in range(r):  # a row at a time: rows may be pages apart
            row = wb + j * rank_stride + low * size_of(w_like)
            deal(w_like, row, whole - low, r, address_of(room[j * PANEL :]))
    else:
        for c in range(low, whole, PANEL):
            start = wb + c * column_stride
            transpose(w_like, start, column_stride, r, address_of(room[(c - low) * r :]))
    rest = room[(whole - low) * r : (high - low) * r].reshape((r, high - whole))
    gather(rest, wb + whole * column_stride, rank_stride, column_stride, w_like)
    return address_of(room) - low * r * size_of(w_like)


@intrinsic
def deal(typingctx, w_like, w, columns, r, panel):
    """Row j of every panel (r, PANEL) = row j of w, whole panels of columns; panel: the first's."""

    def codegen(context, builder, signature, args):
        e = Emit(builder)
        w, columns, r, panel = args[1:]
        row = lanes(STORED[w_like])

        def piece(c, nothing):
            source = e.add(w, e.multiply(c, size(w_like)))
            target = e.add(panel, e.multiply(e.multiply(c, r), size(w_like)))
            for start in range(0, PANEL * size(w_like), LANES * size(w_like)):
                found = e.read(e.add(source, start), row, size(w_like))
                e.store_as(found, e.add(target, start), size(w_like))
            return nothing

        e.loop(ir.Constant(INT64, 0), columns, PANEL, [], piece)
        return context.get_dummy_value()

    return types.void(w_like, *[types.int64] * 4), codegen


@intrinsic
def transpose(typingctx, w_like, w, stride, r, panel):
    """panel[j, c] = w[c, j] for PANEL rows of w, `stride` bytes apart, and r ranks.

    Semantics: up to LANES - 1 rows of zeros may be written after the panel.

        w     j ->            panel   c ->
        c   [ a0 a1 a2 ]            j  [ a0 b0 c0 ]        LANES rows in as many registers;
        |   [ b0 b1 b2 ]      =>    |  [ a1 b1 c1 ]        neighbours swap halves, then
        v   [ c0 c1 c2 ]            v  [ a2 b2 c2 ]        quarters, and so on
    """

    def codegen(context, builder, signature, args):
        e = Emit(builder)
        w, stride, r, panel = args[1:]
        row = lanes(STORED[w_like])
        zero, columns = ir.Constant(INT64, 0), ir.Constant(INT64, PANEL)

        def ranks(j, nothing):
            there = e.below(builder.sub(r, j))

            def square(c, nothing):
                start = e.add(w, e.multiply(stride, c), e.multiply(j, size(w_like)))
                rows = [
                    e.read(e.add(start, e.multiply(stride, i)), row, size(w_like), there)
                    for i in range(LANES)
                ]
                target = e.add(panel, e.multiply(e.add(e.multiply(j, PANEL), c), size(w_like)))
                for t, column in enumerate(e.transposed(rows)):
                    e.store_as(column, e.add(target, t * PANEL * size(w_like)), size(w_like))
                return nothing

            e.loop(zero, columns, LANES, [], square)
            return nothing

        e.loop(zero, r, LANES, [], ranks)
        return context.get_dummy_value()

    return types.void(w_like, *[types.int64] * 4), codegen
