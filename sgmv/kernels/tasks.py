"""The tasks of a call: which part each is, how threads claim them, and a thread's way through them.

A call works on row blocks: the sorted positions first:last of one segment. Where there are few
blocks, each is cut along its second axis, shrink's along ranks and expand's along columns, so that
task t is cut t % cuts of block t // cuts. No two tasks write the same element.

    blocks          0              1              2
    tasks       0   1   2      3   4   5      6   7   8         3 cuts

Where a row has several adapters it is in several blocks, and their tasks of expand add to the same
elements. Then a thread holds a cut while it does a task of it, and the tasks of a cut are done from
block 0 on:

                cut 0   cut 1   cut 2
    block 0       0       1       2
    block 1       3       4       5      down each cut, in order
    block 2       6       7       8

No two threads write the same columns at a time, none waits for another, and a row's deltas are
added in the order of its own adapters, whatever else is in the batch.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from sgmv.kernels.atomics import add_atomic, load_atomic, pause, store_atomic
from sgmv.kernels.jit import enter, jit, record, records, vector
from sgmv.kernels.modes import DEFAULT, set_mode
from sgmv.kernels.records import BLOCK, CALL, INTEGER, RANK_UNIT, TABLE, TURN, offset

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
    number = add_atomic(address + SHRINK_NEXT, 1)
    return task_of(address, number, record(CALL, address).shrink_cuts, RANKS, RANK_UNIT)


@jit()
def finish_shrink(address: int, task: Any, v_like: Any) -> None:
    """A task of shrink is done: its part of v is written, and its pairs are weighted here."""
    call = record(CALL, address)
    if call.weights != 0:
        weigh(address, task, v_like)
    add_atomic(address + SHRINK_DONE, 1)


@jit()
def weigh(address: int, task: Any, v_like: Any) -> None:
    """v[p, ranks of the task] *= weights[p], in each slice."""
    call = record(CALL, address)
    slices = record(TABLE, call.table).slices
    weights = vector(call.weights, task.last, np.float32(0))
    for p in range(task.first, task.last):
        v = vector(call.v + p * call.v_stride, slices * task.r, v_like)
        for s in range(slices):
            for j in range(s * task.r + task.low, s * task.r + task.high):
                v[j] *= weights[p]


@jit()
def claim_expand(address: int, before: Any) -> Any:
    """A `Task` of expand that no other thread will do; its number is NONE if there is none left.

    before  the task that this thread has done, `no_task()` at first
    """
    call = record(CALL, address)
    table = record(TABLE, call.table)
    if call.turns != 0:
        number = next_of_a_cut(address, before.number)
    else:
        number = add_atomic(address + EXPAND_NEXT, 1)
    return task_of(address, number, call.expand_cuts, table.h_out, table.panel_columns)


@jit()
def next_of_a_cut(address: int, before: int) -> Any:
    """The number of the next task of the cut that this thread holds; then of one that none holds.

    Where two threads reach for one cut at once, both may leave it: the caller comes back for what
    no thread has begun. A cut counts as begun with its last task.
    """
    call = record(CALL, address)
    if (
        before == NONE
    ):  # far from the others: y is asked for ahead, and what two cores ask for waits
        cut = add_atomic(call.turns + 16, 1) * call.expand_cuts // call.threads % call.expand_cuts
    else:
        cut = before % call.expand_cuts
        number = begin_block(address, cut)
        if number != EVERY_TASK:
            return number
        let_go(address, cut)
    for _ in range(call.expand_cuts):
        holders = call.turns + 8 * TURN * cut
        if load_atomic(holders) == 0 and load_atomic(holders + 8) < call.block_count:
            if add_atomic(holders, 1) == 0:
                number = begin_block(address, cut)
                if number != EVERY_TASK:
                    return number
            let_go(address, cut)
        cut = (cut + 1) % call.expand_cuts
    return EVERY_TASK


@jit()
def begin_block(address: int, cut: int) -> Any:
    """The next task of a cut that this thread holds, or EVERY_TASK if none is left to do."""
    call = record(CALL, address)
    counter = call.turns + 8 * TURN * cut + 8
    block = load_atomic(counter)
    if block == call.block_count or load_atomic(address + EXPAND_NEXT) >= EVERY_TASK:
        return EVERY_TASK
    store_atomic(counter, block + 1)
    if block + 1 == call.block_count:
        add_atomic(address + EXPAND_NEXT, call.block_count)
    return block * call.expand_cuts + cut


@jit()
def let_go(address: int, cut: int) -> None:
    """Another thread may hold this cut."""
    add_atomic(record(CALL, address).turns + 8 * TURN * cut, -1)


@jit()
def leave_expand(address: int, task: Any) -> None:
    """The thread leaves after this task, though there may be others."""
    call = record(CALL, address)
    if call.turns != 0 and task.number != NONE:
        let_go(address, task.number % call.expand_cuts)


@jit()
def no_task() -> Any:
    return Task(NONE, 0, 0, 0, 0, 0, 0)


@jit()
def task_of(address: int, number: int, cuts: int, columns: int, unit: int) -> Any:
    """The `Task` of this number: one of `cuts` of a block's columns; for RANKS, of its ranks."""
    call = record(CALL, address)
    if number >= call.block_count * cuts:
        return no_task()
    block = records(BLOCK, call.blocks, call.block_count)[number // cuts]
    extent = block.r if columns == RANKS else columns  # there may be no column: h_out is 0
    low, high = cut(apart(number % cuts, cuts, call.threads), cuts, extent, unit)
    return Task(number, block.slot, block.r, block.first, block.last, low, high)


@jit()
def apart(part, cuts, threads):
    """Which part comes at this place: neighbours in time are far from each other in memory.

    A core asks for memory ahead of its use. Where the next columns were another core's, the two
    took y's cache lines from each other: one to 48 rows took 1.2 times as long on two threads of an
    EPYC Zen 3 (geometric mean of 24 cases).
    """
    if cuts % threads != 0:
        return part
    return part % threads * (cuts // threads) + part // threads


@jit()
def cut(part, cuts, extent, unit):
    """Part low:high of an extent that is cut between whole units."""
    units = -(-extent // unit)
    return units * part // cuts * unit, min(units * (part + 1) // cuts * unit, extent)


@jit()
def gain_addresses(table: Any, slot: int) -> Any:
    """The addresses of a slot's gains and offsets, 0 for what it has not."""
    if table.gains == 0:
        return 0, 0
    return item(table.gains, slot), item(table.offsets, slot)


@jit()
def item(address: int, index: int) -> Any:
    """The int64 number `index` at this address."""
    return vector(address + 8 * index, 1, INTEGER)[0]
