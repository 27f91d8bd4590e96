"""The tasks of a call: which part each is, how threads claim them, and a thread's way through them.

A call works on row blocks: the sorted positions first:last of one segment. Where there are few
blocks, each is cut along its second axis, shrink's along ranks and expand's along columns, so that
task t is cut t % cuts of block t // cuts. No two tasks write the same element.

    blocks          0              1              2
    tasks       0   1   2      3   4   5      6   7   8         3 cuts
"""

from __future__ import annotations

from typing import Any, NamedTuple

from sgmv.kernels.atomics import add_atomic, load_atomic, pause, store_atomic
from sgmv.kernels.jit import enter, jit, record, records, vector
from sgmv.kernels.modes import DEFAULT, set_mode
from sgmv.kernels.records import BLOCK, CALL, INTEGER, RANK_UNIT, TABLE, offset

SHRINK_NEXT, SHRINK_DONE, EXPAND_NEXT = (
    offset(CALL, field) for field in ("shrink_next", "shrink_done", "expand_next")
)
EVERY_TASK = 1 << 62
NONE = -1  # the number of a task when none is left
RANKS = -1  # in the place of a number of columns: each block's own ranks


class Task(NamedTuple):
    """Part of a row block: ranks low:high in shrink, columns low:high in expand."""

    number: int
    slot: int
    r: int
    first: int
    last: int
    low: int
    high: int


@jit()
def take_part(address: int, limit: int) -> None:
    """Run shrink's tasks, then expand's, at most `limit` of each, in the one floating-point mode.

    Other threads do the same. No task of expand begins before all of shrink's are done: v is whole.
    """
    mode = set_mode(DEFAULT)
    call = record(CALL, address)
    if call.shrink != 0:
        enter(call.shrink, address, limit)
    if call.expand != 0 and shrink_is_done(address):
        enter(call.expand, address, limit)
    set_mode(mode)


@jit()
def shrink_is_done(address: int) -> Any:
    """Whether v is whole, once the tasks that have begun are done; False if some have not begun."""
    call = record(CALL, address)
    if call.shrink != 0:
        tasks = call.block_count * call.shrink_cuts
        if load_atomic(address + SHRINK_NEXT) < tasks:
            return False
        while load_atomic(address + SHRINK_DONE) < tasks:
            pause()
    return True


@jit()
def all_begun(address: int) -> Any:
    """Whether no task is left that no thread has begun."""
    call = record(CALL, address)
    if call.expand != 0:
        return load_atomic(address + EXPAND_NEXT) >= call.block_count * call.expand_cuts
    return load_atomic(address + SHRINK_NEXT) >= call.block_count * call.shrink_cuts


@jit()
def leave_undone(address: int) -> None:
    """Let no thread begin another task."""
    for counter in (SHRINK_NEXT, SHRINK_DONE, EXPAND_NEXT):
        store_atomic(address + counter, EVERY_TASK)


@jit()
def claim_shrink(address: int) -> Any:
    """A `Task` of shrink that no other thread will do; its number is NONE if there is none left."""
    return claim(address, SHRINK_NEXT, record(CALL, address).shrink_cuts, RANKS, RANK_UNIT)


@jit()
def finish_shrink(address: int) -> None:
    """A task of shrink is done: its part of v is written."""
    add_atomic(address + SHRINK_DONE, 1)


@jit()
def claim_expand(address: int) -> Any:
    """A `Task` of expand that no other thread will do; its number is NONE if there is none left."""
    call = record(CALL, address)
    table = record(TABLE, call.table)
    return claim(address, EXPAND_NEXT, call.expand_cuts, table.h_out, table.panel_columns)


@jit()
def claim(address: int, counter: int, cuts: int, columns: int, unit: int) -> Any:
    """The next `Task` of a phase, one of `cuts` of a block's columns; for RANKS, of its ranks."""
    call = record(CALL, address)
    number = add_atomic(address + counter, 1)
    if number >= call.block_count * cuts:
        return Task(NONE, 0, 0, 0, 0, 0, 0)
    block = records(BLOCK, call.blocks, call.block_count)[number // cuts]
    extent = block.r if columns == RANKS else columns  # there may be no column: h_out is 0
    low, high = cut(number % cuts, cuts, extent, unit)
    return Task(number, block.slot, block.r, block.first, block.last, low, high)


@jit()
def cut(part, cuts, extent, unit):
    """Part low:high of an extent that is cut between whole units."""
    units = -(-extent // unit)
    return units * part // cuts * unit, min(units * (part + 1) // cuts * unit, extent)


@jit()
def item(address: int, index: int) -> Any:
    """The int64 number `index` at this address."""
    return vector(address + 8 * index, 1, INTEGER)[0]
