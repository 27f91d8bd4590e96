"""One call, its arguments checked: memory, plan, threads, until the last task is done.

A call needs little memory beside its operands: the plan's integers, some 120 bytes a row, and v.
It takes them from a workspace, which the next call reuses.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from sgmv import workers
from sgmv.adapters import SlotTable
from sgmv.backend import Kernels
from sgmv.dtypes import Array, as_bits
from sgmv.kernels.call import (
    BLOCK_COUNT,
    BLOCKS,
    COLUMNS,
    EXPAND,
    EXPAND_CUTS,
    EXPAND_NEXT,
    FIELDS,
    H_IN,
    H_OUT,
    IDS,
    INTEGER,
    LIMIT,
    LOADED,
    RANK_UNIT,
    RANKS,
    ROWS,
    SCALINGS,
    SCRATCH,
    SEGMENT_IDS,
    SEGMENT_ROWS,
    SEGMENTS_FIELDS,
    SEQ_START,
    SHRINK,
    SHRINK_CUTS,
    SHRINK_DONE,
    SHRINK_NEXT,
    SLICES,
    SLOT_OF,
    SLOTS,
    TABLE_COLUMNS,
    TABLE_FIELDS,
    TABLE_H_IN,
    TABLE_H_OUT,
    TABLE_SCALINGS,
    TABLE_SLICES,
    TABLE_WA,
    TABLE_WB,
    TABLE_WB_COLUMN,
    TABLE_WB_RANK,
    THREADS,
    V_STRIDE,
    WA,
    WB,
    WB_COLUMN,
    WB_RANK,
    S,
    V,
    X,
    Y,
)
from sgmv.kernels.jit import JITTED, jit, vector, where
from sgmv.kernels.pool import abandon, all_begun, fork_join, open_gate, shut_gate, take_part
from sgmv.schedule import (
    BASE_ONLY,
    cost,
    cuts,
    find,
    most_blocks,
    most_digits,
    row_blocks,
    sort,
)
from sgmv.segment import Integers, Segments, segment

# Outcomes of a launch.
DONE, MORE, REFUSED = 0, 1, -1
# Two cores that meet over less work than this lose more than they gain, helpers awake or not.
WORTH_SHARING_NS = 20_000
BETWEEN_SIGNALS_NS = 50_000_000  # of work, about, until a call hears signals, such as Ctrl-C


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


def scratch_size(n: int) -> int:
    """The integers that the plan of n rows needs."""
    return int(6 * n + 1 + 4 * most_blocks(n) + most_digits(n))


_idle: list[Workspace] = []


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


@jit()
def address(array: Any) -> Any:
    """Where the array's first element stands."""
    return where(array)


@jit()
def place(call: int, one: Any, its: int, other: Any, others: int) -> None:
    """Write two operands' addresses and row strides to these fields of a call, in one call."""
    fields = vector(call, FIELDS, INTEGER)
    fields[its], fields[its + 1] = where(one), one.strides[0]
    fields[others], fields[others + 1] = where(other), other.strides[0]


@jit()
def start(
    call: int,
    gate: int,
    shrink: int,
    expand: int,
    table: int,
    segments: int,
    ids: int,
    n: int,
    threads: int,
    worth_sharing_ns: int,
) -> Any:
    """Plan the call, open the gate to helpers, if any, where it pays, and run tasks."""
    fields, layer = vector(call, FIELDS, INTEGER), vector(table, TABLE_FIELDS, INTEGER)
    h_in, h_out = layer[TABLE_H_IN], layer[TABLE_H_OUT]
    fields[H_IN], fields[H_OUT], fields[THREADS] = h_in, h_out, threads
    fields[SHRINK], fields[EXPAND], fields[COLUMNS] = shrink, expand, layer[TABLE_COLUMNS]
    fields[WA], fields[WB] = layer[TABLE_WA], layer[TABLE_WB]
    fields[WB_RANK], fields[WB_COLUMN] = layer[TABLE_WB_RANK], layer[TABLE_WB_COLUMN]
    fields[SCALINGS], fields[SLICES] = layer[TABLE_SCALINGS], layer[TABLE_SLICES]
    fields[SHRINK_NEXT] = fields[SHRINK_DONE] = fields[EXPAND_NEXT] = 0
    blocks = plan(fields, layer, segments, ids, n)
    if blocks < 0:
        return REFUSED
    widths = (h_in * fields[SLICES] if shrink != 0 else 0) + (h_out if expand != 0 else 0)
    block = vector(fields[BLOCKS], blocks * 4, INTEGER).reshape((blocks, 4))
    cost_ns, rank = cost(block, widths)
    if cost_ns < worth_sharing_ns:
        threads, gate = 1, 0
    fields[BLOCK_COUNT] = blocks
    fields[SHRINK_CUTS] = cuts(blocks, -(-rank // RANK_UNIT), threads)
    fields[EXPAND_CUTS] = cuts(blocks, -(-h_out // fields[COLUMNS]), threads)
    tasks = blocks * max(fields[SHRINK_CUTS], fields[EXPAND_CUTS])
    fields[LIMIT] = max(1, tasks * BETWEEN_SIGNALS_NS // max(cost_ns, 1))
    if gate != 0:
        open_gate(gate, call)
    return resume(call, gate)


@jit()
def resume(call: int, gate: int) -> Any:
    """Run tasks until none is left, or for as long as signals may wait."""
    if gate == 0 or not fork_join(gate, call):
        take_part(call, vector(call, FIELDS, INTEGER)[LIMIT])
    if not all_begun(call):
        return MORE
    if gate != 0:
        shut_gate(gate)
    return DONE


@jit()
def plan(fields: Any, layer: Any, segments: int, ids: int, n: int) -> Any:
    """Find the batch's segments, their slots and row blocks; returns how many, -1 if it cannot."""
    scratch = vector(fields[SCRATCH], 5 * n, INTEGER)
    slot, rank = scratch[:n], scratch[n : 2 * n]
    rest = fields[SCRATCH] + 5 * n * 8
    if segments != 0:
        made = vector(segments, SEGMENTS_FIELDS, INTEGER)
        count = made[S]
        fields[ROWS] = made[SEGMENT_ROWS]
        seq_start = vector(made[SEQ_START], count + 1, INTEGER)
        segment_ids = vector(made[SEGMENT_IDS], count, INTEGER)
    else:
        fields[ROWS] = fields[SCRATCH] + 2 * n * 8
        seq_start = vector(rest, n + 1, INTEGER)
        segment_ids = scratch[3 * n : 4 * n]
        digits = vector(rest + 8 * (n + 1), most_digits(n), INTEGER)
        rows, target = scratch[2 * n : 3 * n], scratch[4 * n :]
        count = sort(vector(ids, n, INTEGER), rows, seq_start, segment_ids, target, digits)
        if count > 0 and segment_ids[0] < BASE_ONLY:
            return -1
    rest += 8 * (n + 1 + most_digits(n))
    fields[BLOCKS] = rest
    known = vector(layer[IDS], layer[LOADED], INTEGER)
    slots = vector(layer[SLOT_OF], layer[LOADED], INTEGER)
    ranks = vector(layer[RANKS], layer[SLOTS], INTEGER)
    if find(known, slots, ranks, segment_ids[:count], slot, rank) > 0:
        return -1
    blocks = vector(rest, 4 * most_blocks(n), INTEGER).reshape((most_blocks(n), 4))
    return row_blocks(seq_start, slot[:count], rank[:count], fields[THREADS], blocks)
