"""The readable kernels: plain loops over rows, ranks and columns, for every float type.

Threads claim tasks, parts of row blocks (see tasks.py), and no two tasks write the same element.

    shrink    v[p, j]        = sum over k of  x[rows[p], k] * wa[j, k]
    expand    y[rows[p], c] += scaling * sum over j of  v[p, j] * wb[j, c]
              y[rows[p], c] = gain[c] * y[rows[p], c] + offset[c], with DoRA, in the same store

            k ->                         j ->                  c ->
        x  [ . . . . ] . wa j [ . . . . ]    v [ . . ]  x  wb j [ . . . . . . ]
                                                              j [ . . . . . . ]

wa is stored as Punica has it, (r, h_in); wb, (r, h_out), in panels of columns, as the tiles want it
(see tiles.py): panel after panel, (r, columns) each. Other engines' weights are not packed, and a
task gathers its panels (see panels.py).

Same row, same bits. An element's sum is made by one piece of code, in one order, whatever rows
are around it: shrink cuts k every K_BLOCK and adds the blocks in ascending order, each block summed
by the one loop in `dot4`, where an element's lane depends on j alone; expand adds j = 0, 1, 2, ...
and vectorises over columns, where no order is at stake.

Edge rules. Nothing past a slot's rank is read or written, in wa, wb or v; rows of rank 0 get no
task. shrink overwrites v, expand accumulates into y and rounds once, at the store. NaN and inf
stay in their row: no padding is multiplied in. Rows are found by their own address, so any
distance between them will do, and no offset can overflow.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from sgmv.kernels.floats import decode, encode
from sgmv.kernels.jit import ANY_ORDER, entry, jit, record, size_of, vector
from sgmv.kernels.panels import panel_at, plain_rank, scratch
from sgmv.kernels.records import CALL, FLOAT64, TABLE
from sgmv.kernels.tasks import (
    NONE,
    claim_expand,
    claim_shrink,
    finish_shrink,
    gain_addresses,
    item,
    task_in_part,
)

K_BLOCK = 1024  # four rows of wa and one of x stay in L1: 5 * 1024 * 4 B = 20 KiB


@jit(ANY_ORDER)
def dot4(x, a0, a1, a2, a3, zero):
    s0 = s1 = s2 = s3 = zero
    for k in range(x.shape[0]):
        xk = decode(x[k], zero)
        s0 += xk * decode(a0[k], zero)
        s1 += xk * decode(a1[k], zero)
        s2 += xk * decode(a2[k], zero)
        s3 += xk * decode(a3[k], zero)
    return s0, s1, s2, s3


def shrink_kernel(x_like: Any, w_like: Any, v_like: Any) -> int:
    """The kernel v[p] = x[rows[p]] @ wa.T: up to `limit` tasks of the call at an address."""

    def loops_shrink(address, limit):
        call = record(CALL, address)
        table = record(TABLE, call.table)
        row = table.h_in * size_of(w_like)
        for _ in range(limit):
            task = claim_shrink(address)
            if task.number == NONE:
                return
            for k in range(0, table.h_in, K_BLOCK):
                width = min(K_BLOCK, table.h_in - k)
                for s in range(table.slices):
                    wa = item(table.wa, task.slot * table.slices + s) + k * size_of(w_like)
                    v_0 = call.v + s * task.r * size_of(v_like)
                    for j in range(task.low, task.high, 4):
                        # Past the last rank the last one is read again, and its sum is dropped.
                        last = task.high - 1
                        a0 = vector(wa + j * row, width, w_like)
                        a1 = vector(wa + min(j + 1, last) * row, width, w_like)
                        a2 = vector(wa + min(j + 2, last) * row, width, w_like)
                        a3 = vector(wa + min(j + 3, last) * row, width, w_like)
                        for p in range(task.first, task.last):
                            x = call.x + item(call.x_rows, p) * call.x_stride + k * size_of(x_like)
                            v = vector(v_0 + p * call.v_stride, task.high, v_like)
                            sums = dot4(vector(x, width, x_like), a0, a1, a2, a3, v_like)
                            add_sums(v[j:], sums, k == 0)
            finish_shrink(address, task, v_like)

    return entry(loops_shrink)


@jit()
def add_sums(v, sums, fresh):
    """Add the four sums to v, as far as it reaches; if fresh, overwrite it."""
    if fresh:
        v[:4] = 0
    v[0] += sums[0]
    if v.shape[0] > 1:
        v[1] += sums[1]
    if v.shape[0] > 2:
        v[2] += sums[2]
    if v.shape[0] > 3:
        v[3] += sums[3]


@jit()
def add_ranks(sums, v, wb):
    """One row: sums += v @ wb, j ascending, eight ranks a pass over the columns."""
    j = 0
    while j + 8 <= v.shape[0]:
        v0, v1, v2, v3, v4, v5, v6, v7 = v[j : j + 8]
        b0, b1 = wb[j], wb[j + 1]
        b2, b3 = wb[j + 2], wb[j + 3]
        b4, b5 = wb[j + 4], wb[j + 5]
        b6, b7 = wb[j + 6], wb[j + 7]
        for c in range(sums.shape[0]):
            total = sums[c]
            total += v0 * decode(b0[c], v0)
            total += v1 * decode(b1[c], v0)
            total += v2 * decode(b2[c], v0)
            total += v3 * decode(b3[c], v0)
            total += v4 * decode(b4[c], v0)
            total += v5 * decode(b5[c], v0)
            total += v6 * decode(b6[c], v0)
            total += v7 * decode(b7[c], v0)
            sums[c] = total
        j += 8
    while j < v.shape[0]:
        vj = v[j]
        bj = wb[j]
        for c in range(sums.shape[0]):
            sums[c] += vj * decode(bj[c], vj)
        j += 1


@jit()
def add_4_ranks_to_4_rows(s0, s1, s2, s3, v, wb, j):
    """Four rows: s0..s3 += v[:, j:j + 4] @ wb[j:j + 4]: one read of wb for all four.

    The sums come as four vectors: with one (4, width) array here, expand took 1.4 times as long.
    """
    v00, v01, v02, v03 = v[0, j : j + 4]
    v10, v11, v12, v13 = v[1, j : j + 4]
    v20, v21, v22, v23 = v[2, j : j + 4]
    v30, v31, v32, v33 = v[3, j : j + 4]
    b0, b1 = wb[j], wb[j + 1]
    b2, b3 = wb[j + 2], wb[j + 3]
    for c in range(s0.shape[0]):
        c0, c1 = decode(b0[c], v00), decode(b1[c], v00)
        c2, c3 = decode(b2[c], v00), decode(b3[c], v00)
        s0[c] = s0[c] + v00 * c0 + v01 * c1 + v02 * c2 + v03 * c3
        s1[c] = s1[c] + v10 * c0 + v11 * c1 + v12 * c2 + v13 * c3
        s2[c] = s2[c] + v20 * c0 + v21 * c1 + v22 * c2 + v23 * c3
        s3[c] = s3[c] + v30 * c0 + v31 * c1 + v32 * c2 + v33 * c3


@jit()
def store(y, scaling, sums, like):
    """Add scaling * sums to y, rounded once."""
    for c in range(y.shape[0]):
        y[c] = encode(decode(y[c], scaling) + scaling * sums[c], like)


@jit()
def store_gained(y, scaling, sums, gains, offsets, like):
    """Y = gains * (y + scaling * sums) + offsets, rounded once."""
    for c in range(y.shape[0]):
        total = scaling * sums[c] + decode(y[c], scaling)
        total = decode(gains[c], scaling) * total + decode(offsets[c], scaling)
        y[c] = encode(total, like)


def expand_kernel(v_like: Any, w_like: Any, y_like: Any) -> int:
    """The kernel y[rows[p]] += scaling * v[p] @ wb: up to `limit` tasks, panel by panel."""
    gain_like = FLOAT64 if type(w_like) is np.float64 else np.float32(0)

    def loops_expand(address, limit):
        call = record(CALL, address)
        table = record(TABLE, call.table)
        columns = table.panel_columns
        four = np.zeros(4 * columns, type(v_like))
        room = scratch(plain_rank(address), min(columns, table.h_out), w_like)
        none = np.zeros(0 if table.gains == 0 else columns, type(gain_like))  # offsets
        for _ in range(limit):
            part = claim_expand(address)
            if part.number == NONE:
                return
            for block in range(part.first, part.last):
                task = task_in_part(address, part, block)
                scaling = type(v_like)(vector(table.scalings + 8 * task.slot, 1, FLOAT64)[0])
                gains = gain_addresses(table, task.slot)
                for c in range(task.low, task.high, columns):
                    width = min(columns, task.high - c)
                    wb = panel_at(table, task.slot, task.r, c, width, room, w_like)
                    sums = four[: 4 * width].reshape((4, width))
                    for p in range(task.first, task.last, 4):
                        count = min(4, task.last - p)
                        multiply(sums, call, p, count, wb, v_like)
                        add_to_y(sums[:count], call, p, c, scaling, gains, none, y_like, gain_like)

    return entry(loops_expand)


@jit()
def add_to_y(sums, call, p, c, scaling, gains, none, y_like, gain_like):
    """Add the rows' sums to columns from c on; gains: at two addresses; none: no offsets."""
    count, width = sums.shape
    for i in range(count):
        row = call.y + item(call.y_rows, p + i) * call.y_stride
        y = vector(row + c * size_of(y_like), width, y_like)
        if gains[0] == 0:
            store(y, scaling, sums[i], y_like)
            continue
        offsets = none[:width]
        if gains[1] != 0:
            offsets = vector(gains[1] + c * size_of(gain_like), width, gain_like)
        factors = vector(gains[0] + c * size_of(gain_like), width, gain_like)
        store_gained(y, scaling, sums[i], factors, offsets, y_like)


@jit()
def multiply(sums, call, p, count, wb, v_like):
    """sums[:count] = v[p:p + count] @ wb, up to four rows."""
    r = wb.shape[0]
    pitch = call.v_stride // size_of(v_like)
    v = vector(call.v + p * call.v_stride, count * pitch, v_like).reshape((count, pitch))
    sums[:] = 0
    in_fours = r // 4 * 4 if count == 4 else 0
    for j in range(0, in_fours, 4):
        add_4_ranks_to_4_rows(sums[0], sums[1], sums[2], sums[3], v, wb, j)
    for i in range(count):
        add_ranks(sums[i], v[i, in_fours:r], wb[in_fours:])
