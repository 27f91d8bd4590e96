"""One call in compiled code: its operands, its plan, the gate opened where that pays, its tasks."""

from __future__ import annotations

from typing import Any

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
    INTEGER,
    LIMIT,
    RANK_UNIT,
    SCALINGS,
    SHRINK,
    SHRINK_CUTS,
    SHRINK_DONE,
    SHRINK_NEXT,
    SLICES,
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
    WA,
    WB,
    WB_COLUMN,
    WB_RANK,
)
from sgmv.kernels.jit import jit, vector, where
from sgmv.kernels.plan import cost, cuts, plan
from sgmv.kernels.pool import all_begun, fork_join, open_gate, shut_gate, take_part

# Outcomes of a call.
DONE, MORE, REFUSED = 0, 1, -1
BETWEEN_SIGNALS_NS = 50_000_000  # of work, about, until a call hears signals, such as Ctrl-C


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
