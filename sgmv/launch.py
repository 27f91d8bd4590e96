"""One call, its arguments checked: memory, plan, threads, until the last task is done.

A call needs little memory beside its operands: the plan's integers, some 120 bytes a row, and v.
It takes them from a workspace, which the next call reuses.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from sgmv import workers
from sgmv.backend import Kernels
from sgmv.dtypes import Array, as_bits
from sgmv.ids import Integers
from sgmv.kernels.call import FIELDS, SCRATCH, V_STRIDE, V, X, Y
from sgmv.kernels.jit import JITTED
from sgmv.kernels.plan import scratch_size
from sgmv.kernels.pool import abandon, shut_gate
from sgmv.kernels.start import MORE, REFUSED, address, place, resume, start
from sgmv.segment import Segments, segment
from sgmv.table import SlotTable

# Two cores that meet over less work than this lose more than they gain, helpers awake or not.
WORTH_SHARING_NS = 20_000


class Workspace:
    """The memory of one call at a time, reused by the next."""

    def __init__(self) -> None:
        memory = np.zeros(FIELDS + 8, np.int64)
        start = -memory.ctypes.data // 8 % 8  # to the next cache line
        self.call = memory[start : start + FIELDS]
        self.address = int(self.call.ctypes.data)
        self.rows = self.v_bytes = self.v_address = 0

    def plan_rows(self, n: int) -> None:
        """Have room for the plan of n rows."""
        if n > self.rows:
            self.scratch = np.empty(scratch_size(n), np.int64)
            self.call[SCRATCH], self.rows = address(self.scratch), n

    def place(self, x: int, x_row_bytes: int, y: int, y_row_bytes: int) -> None:
        """Have x and y at these addresses, their rows so far apart."""
        self.call[X], self.call[X + 1] = x, x_row_bytes
        self.call[Y], self.call[Y + 1] = y, y_row_bytes

    def place_v(self, n: int, row_bytes: int) -> None:
        """Have v (n, row_bytes) here."""
        if n * row_bytes > self.v_bytes:
            self.v = np.empty(n * row_bytes // 4, np.float32)
            self.v_bytes, self.v_address = n * row_bytes, address(self.v)
        self.call[V], self.call[V_STRIDE] = self.v_address, row_bytes


_idle: list[Workspace] = []  # as many as calls have run at once


def launch(
    kernels: Kernels,
    table: SlotTable,
    batch: Segments | Integers,
    x: Array | None,
    y: Array | None,
    v: Array | None = None,
) -> None:
    """Run the call's tasks on all threads: shrink writes v, expand reads it and adds to y.

    Semantics: when it returns, or raises, no thread works on the operands any more. Raises what is
    wrong with the ids before anything is written.

    kernels  of shrink, of expand, or of both
    batch    Segments, or the ids themselves: int64 and contiguous
    x, y     checked for this batch, any strides
    v        (n, r) contiguous; a workspace's, if left out
    """
    pool = workers.pool_of(x if y is None else y)
    dense: Any = y
    if x is not None:
        x = as_bits(x if _is_dense(x) else np.ascontiguousarray(x))
    if y is not None:
        dense = y if _is_dense(y) else np.ascontiguousarray(y)
    space = workspace()
    if v is None:
        space.place_v(len(dense), table.width * kernels.v_itemsize)
        place(space.address, x, X, as_bits(dense), Y)
    elif x is None:
        place(space.address, v, V, as_bits(dense), Y)
    else:
        place(space.address, x, X, v, V)
    run(space, pool, kernels, table, batch)
    if dense is not y:
        _write_back(y, dense, table, batch)


def run(
    space: Workspace,
    pool: workers.Pool,
    kernels: Kernels,
    table: SlotTable,
    batch: Segments | Integers,
) -> None:
    """`launch`, once the operands have their places in the workspace.

    The caller keeps their memory alive. `pool` helps, unless another caller has it; the workspace
    is for another call then.
    """
    if isinstance(batch, Segments):
        n, segments, ids = batch.most, batch.address, 0
    else:
        n, segments, ids = len(batch), 0, address(batch)
    threads = workers.get_num_threads()
    held = threads > 1 and JITTED and pool.lock.acquire(False)
    gate = pool.address if held else 0
    try:
        if held:
            pool.prepare(threads - 1)
        space.plan_rows(n)
        whose = space.address, gate, kernels.shrink, kernels.expand
        outcome = start(*whose, table.address, segments, ids, n, threads, WORTH_SHARING_NS)
        while outcome == MORE:  # between two bytecodes Python hears signals
            outcome = resume(space.address, gate)
    except BaseException:
        _give_up(space, gate)
        raise
    finally:
        if held:
            pool.lock.release()
        _idle.append(space)
    if outcome == REFUSED:
        table.find((batch if isinstance(batch, Segments) else segment(batch)).adapter_ids)


def _is_dense(array: Array) -> bool:
    """Whether the elements of each row stand next to each other."""
    return array.flags.c_contiguous or array.shape[1] <= 1 or array.strides[1] == array.itemsize


def _write_back(y: Any, dense: Any, table: SlotTable, batch: Segments | Integers) -> None:
    """Copy the rows that have an adapter from the dense copy that the kernels worked on."""
    segments = batch if isinstance(batch, Segments) else segment(batch)
    _slot, rank = table.find(segments.adapter_ids)
    changed = segments.rows[np.repeat(rank > 0, segments.lengths)]
    y[changed] = dense[changed]


def workspace() -> Workspace:
    """One for a call; `run` hands it back."""
    try:
        return _idle.pop()
    except IndexError:
        return Workspace()


def _give_up(space: Workspace, gate: int) -> None:
    """Leave the rest undone, and wait for the helpers inside."""
    while True:
        try:
            abandon(space.address)
            if gate:
                shut_gate(gate)
            return
        except KeyboardInterrupt:  # helpers may still write: be done with them first
            continue
