"""The tasks of a call: which part each is, how threads claim them, and a thread's way through them.

A call works on row blocks: the sorted positions first:last of one segment. Where there are few
blocks, each is cut along its second axis, shrink's along ranks and expand's along columns, so that
task t is cut t % cuts of block t // cuts. No two tasks write the same element.

    blocks          0              1              2
    tasks       0   1   2      3   4   5      6   7   8         3 cuts

Where a row has several adapters it is in several blocks, and their tasks of expand add to the same
elements. Then blocks are in bands: all those of some rows of y, in the order of their segments.
What a thread claims of expand is a part: one cut of all blocks of a band, from the top down.

                    cut 0   cut 1
    band 0  block 0   |       |
            block 1   |       |        part 0   part 1
            block 2   v       v
    band 1  block 3   |       |
            block 4   v       v        part 2   part 3

No two parts have an element of y in common, and a row's deltas are added in the order of its own
adapters, whatever else is in the batch. In a plain batch each block is a band of its own.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

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


class Part(NamedTuple):
    """A cut of the blocks first:last of a band, which one thread does in this order."""

    number: int
    first: int
    last: int


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
        return load_atomic(address + EXPAND_NEXT) >= call.band_count * call.expand_cuts
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
def claim_expand(address: int) -> Any:
    """A `Part` of expand that no other thread will do; its number is NONE if there is none left."""
    call = record(CALL, address)
    number = add_atomic(address + EXPAND_NEXT, 1)
    if number >= call.band_count * call.expand_cuts:
        return Part(NONE, 0, 0)
    band = number // call.expand_cuts
    if call.bands == 0:
        return Part(number, band, band + 1)
    return Part(number, item(call.bands, band), item(call.bands, band + 1))


@jit()
def task_in_part(address: int, part: Any, block: int) -> Any:
    """The `Task` of expand of one of the part's blocks."""
    call = record(CALL, address)
    table = record(TABLE, call.table)
    number = block * call.expand_cuts + part.number % call.expand_cuts
    return task_of(address, number, call.expand_cuts, table.h_out, table.panel_columns)


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
