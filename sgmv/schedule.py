"""Segments -> tasks: who does which rows and which ranks or columns. Integers only.

    segment  ->  row blocks of at most ROWS_PER_TASK rows
             ->  each cut along ranks (shrink) or columns (expand), if there are too few tasks

How a batch is cut never changes a result: a task's cuts along ranks and columns fall between the
kernels' own blocks, and rows do not meet in any sum (see kernels/loops.py).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from sgmv.kernels.jit import jit
from sgmv.kernels.loops import COLUMN_BLOCK, RANK_BLOCK

ROWS_PER_TASK = 64  # 64 rows of one K block are 256 KiB of float32 x: they stay in L2
TASKS_PER_THREAD = 4  # enough that a thread which falls behind leaves work to the others


@jit()
def shrink_tasks(seq_start: Any, slot: Any, rank: Any, threads: int) -> Any:
    """Tasks (T, 6) `(slot, r, first, last, low, high)` of shrink, low:high ranks; and their work.

    seq_start (S+1,), slot (S,), rank (S,) of each segment; segments of rank 0 get no task.
    The work is multiply-adds plus weights read, per unit of h_in.
    """
    return _cut(seq_start, slot, rank, rank, RANK_BLOCK, threads)


@jit()
def expand_tasks(seq_start: Any, slot: Any, rank: Any, h_out: int, threads: int) -> Any:
    """Tasks (T, 6) `(slot, r, first, last, low, high)` of expand, low:high columns; and their work.

    As for shrink; the work is per unit of h_out.
    """
    return _cut(seq_start, slot, rank, np.full_like(rank, h_out), COLUMN_BLOCK, threads)


@jit()
def _cut(seq_start: Any, slot: Any, rank: Any, extent: Any, block: int, threads: int) -> Any:
    """Cut every segment into row blocks; where those are few, cut its extent as well."""
    row_blocks = 0
    work = 0
    for s in range(slot.shape[0]):
        if rank[s] > 0:
            m = seq_start[s + 1] - seq_start[s]
            row_blocks += -(-m // ROWS_PER_TASK)
            work += (m + 1) * rank[s]
    parts = -(-threads * TASKS_PER_THREAD // max(row_blocks, 1))
    if threads == 1:
        parts = 1
    tasks = np.empty((row_blocks * parts, 6), np.int64)
    t = 0
    for s in range(slot.shape[0]):
        if rank[s] == 0:
            continue
        start = seq_start[s]
        m = seq_start[s + 1] - start
        pieces = -(-m // ROWS_PER_TASK)
        blocks = -(-extent[s] // block)
        cuts = min(parts, blocks)
        for i in range(pieces):
            first = start + m * i // pieces
            last = start + m * (i + 1) // pieces
            for q in range(cuts):
                low = blocks * q // cuts * block
                high = min(blocks * (q + 1) // cuts * block, extent[s])
                tasks[t, 0], tasks[t, 1] = slot[s], rank[s]
                tasks[t, 2], tasks[t, 3] = first, last
                tasks[t, 4], tasks[t, 5] = low, high
                t += 1
    return tasks[:t], work
