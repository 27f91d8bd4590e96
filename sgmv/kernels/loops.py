"""The readable kernels: plain loops over rows, ranks and columns, for every float type.

A task is six integers `(slot, r, first, last, low, high)`: the sorted positions first:last of one
segment, whose adapter of rank r stands in `slot`, and a part of the second axis: ranks low:high for
shrink, columns for expand. Threads claim tasks one by one; no two tasks write the same element.

    shrink    v[p, j]        = sum over k of  x[rows[p], k] * wa[j, k]
    expand    y[rows[p], c] += scaling * sum over j of  v[p, j] * wb[j, c]

            k ->                         j ->                  c ->
        x  [ . . . . ] . wa j [ . . . . ]    v [ . . ]  x  wb j [ . . . . . . ]
                                                              j [ . . . . . . ]

Same row, same bits. An element's sum is made by one piece of code, in one order, whatever rows
stand around it: shrink cuts k every K_BLOCK and adds the blocks in ascending order, each block
summed by the one loop in `dot4`, whose lane depends on j alone; expand adds j = 0, 1, 2, ... and
vectorises over columns, where no order is at stake.

Edge rules. Nothing past a slot's rank is read or written, in wa, wb or v; rows of rank 0 get no
task. shrink overwrites v, expand accumulates into y and rounds once, at the store. NaN and inf
stay in their row: no padding is multiplied in. Rows are found by their own address: x_row[p] is
where x[rows[p]] begins, so any distance between rows will do, and no offset can overflow.
"""

from __future__ import annotations

import numpy as np

from sgmv.kernels.floats import decode, encode
from sgmv.kernels.jit import ANY_ORDER, claim, jit, vector

K_BLOCK = 1024  # four rows of wa and one of x stay in L1: 5 * 1024 * 4 B = 20 KiB
RANK_BLOCK = 4  # ranks that share one read of x
COLUMN_BLOCK = 1024  # columns of wb, of the sums and of y that one pass of expand keeps in L1


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


@jit()
def shrink(next_task, batch, tasks, x_row, x_like, wa_address, wa_like, h_in, v):
    """Run up to `batch` tasks of v[first:last, low:high] = x[rows[first:last]] @ wa[low:high].T."""
    zero = v.dtype.type(0)
    row_bytes = h_in * wa_like.itemsize
    for _ in range(batch):
        t = claim(next_task)
        if t >= tasks.shape[0]:
            return
        slot, _r, first, last, low, high = tasks[t]
        v[first:last, low:high] = zero
        for k in range(0, h_in, K_BLOCK):
            width = min(K_BLOCK, h_in - k)
            for j in range(low, high, RANK_BLOCK):
                a = wa_address[slot] + j * row_bytes + k * wa_like.itemsize
                # Past the last rank the last one is read again, and its sum is dropped.
                last_a = a + (high - 1 - j) * row_bytes
                a0 = vector(a, width, wa_like)
                a1 = vector(min(a + row_bytes, last_a), width, wa_like)
                a2 = vector(min(a + 2 * row_bytes, last_a), width, wa_like)
                a3 = vector(min(a + 3 * row_bytes, last_a), width, wa_like)
                for p in range(first, last):
                    xp = vector(x_row[p] + k * x_like.itemsize, width, x_like)
                    s0, s1, s2, s3 = dot4(xp, a0, a1, a2, a3, zero)
                    v[p, j] += s0
                    if j + 1 < high:
                        v[p, j + 1] += s1
                    if j + 2 < high:
                        v[p, j + 2] += s2
                    if j + 3 < high:
                        v[p, j + 3] += s3


@jit()
def add_ranks(sums, v, wb, low):
    """One row: sums += v @ wb[:, low:high], j ascending, eight ranks a pass over the columns."""
    high = low + sums.shape[0]
    j = 0
    while j + 8 <= v.shape[0]:
        v0, v1, v2, v3, v4, v5, v6, v7 = v[j : j + 8]
        b0, b1 = wb[j, low:high], wb[j + 1, low:high]
        b2, b3 = wb[j + 2, low:high], wb[j + 3, low:high]
        b4, b5 = wb[j + 4, low:high], wb[j + 5, low:high]
        b6, b7 = wb[j + 6, low:high], wb[j + 7, low:high]
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
        bj = wb[j, low:high]
        for c in range(sums.shape[0]):
            sums[c] += vj * decode(bj[c], vj)
        j += 1


@jit()
def add_4_ranks_to_4_rows(s0, s1, s2, s3, v, wb, j, low):
    """Four rows: s0..s3 += v[:, j:j + 4] @ wb[j:j + 4, low:high]: one read of wb for all four.

    The sums come as four vectors: with one (4, width) array here, expand took 1.4 times as long.
    """
    high = low + s0.shape[0]
    v00, v01, v02, v03 = v[0, j : j + 4]
    v10, v11, v12, v13 = v[1, j : j + 4]
    v20, v21, v22, v23 = v[2, j : j + 4]
    v30, v31, v32, v33 = v[3, j : j + 4]
    b0, b1 = wb[j, low:high], wb[j + 1, low:high]
    b2, b3 = wb[j + 2, low:high], wb[j + 3, low:high]
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
def expand(next_task, batch, tasks, y_row, y_like, wb_address, wb_like, h_out, scalings, v):
    """Run up to `batch` tasks of y[rows[first:last], low:high] += scaling * v[first:last] @ wb."""
    scratch = np.empty(4 * COLUMN_BLOCK, v.dtype)
    for _ in range(batch):
        t = claim(next_task)
        if t >= tasks.shape[0]:
            return
        slot, r, first, last, low, high = tasks[t]
        scaling = v.dtype.type(scalings[slot])
        wb = vector(wb_address[slot], r * h_out, wb_like).reshape((r, h_out))
        for c in range(low, high, COLUMN_BLOCK):
            width = min(COLUMN_BLOCK, high - c)
            sums = scratch[: 4 * width].reshape((4, width))
            for p in range(first, last, 4):
                together = min(4, last - p)
                scratch[: together * width] = v.dtype.type(0)
                in_fours = r // 4 * 4 if together == 4 else 0
                for j in range(0, in_fours, 4):
                    add_4_ranks_to_4_rows(
                        sums[0], sums[1], sums[2], sums[3], v[p : p + 4], wb, j, c
                    )
                for i in range(together):
                    add_ranks(sums[i], v[p + i, in_fours:r], wb[in_fours:], c)
                    y = vector(y_row[p + i] + c * y_like.itemsize, width, y_like)
                    store(y, scaling, sums[i], y_like)
