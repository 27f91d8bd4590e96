"""One call in compiled code: segment, shrink, expand. Python enters it once, but for long work.

    start    tells the call where its operands are, then begins it
    begin    plans the call (segments, slots, row blocks, tasks), opens the gate to helpers where
             that pays, and resumes
    resume   runs tasks until none is left, or signals have waited long enough
    abandon  ends a call before all of its tasks are done

`start` is compiled for each mix of operands, and so enters `begin` by its address: that one is
compiled once.
"""

from __future__ import annotations

from typing import Any

from sgmv.kernels.jit import address_of, enter, jit, record
from sgmv.kernels.plan import cut_blocks, plan
from sgmv.kernels.pool import (
    fork_join,
    free_helpers,
    has_bell,
    open_gate,
    shut_gate,
    take_helpers,
)
from sgmv.kernels.records import CALL, KERNELS, TABLE
from sgmv.kernels.tasks import all_begun, leave_undone, take_part

# Outcomes of a call. After MORE Python looks for signals and sleeping helpers, and resumes;
# SCATTERED and REFUSED are said before anything is written.
DONE, MORE, SCATTERED, REFUSED = range(4)
BETWEEN_SIGNALS_NS = 50_000_000  # of work, about, until a call hears signals, such as Ctrl-C


@jit()
def start(
    address: int,
    source: Any,
    target: Any,
    kernels: int,
    table: int,
    segments: int,
    ids: Any,
    pool: int,
    worth_sharing_ns: int,
) -> Any:
    """Run a call on arrays; returns its outcome, SCATTERED where a row's elements are apart.

    source, target  x and y; where expand is left out x and v, where shrink is, v and y
    kernels, table  addresses of KERNELS and TABLE
    segments, ids   the address of SEGMENTS; or 0, and adapter ids
    pool            address of the POOL that may help, or 0
    """
    if not (is_dense(source) and is_dense(target)):
        return SCATTERED
    call = record(CALL, address)
    phases = record(KERNELS, kernels)
    call.ids, call.n = address_of(ids), ids.shape[0]
    place_v(address, kernels, table)
    if phases.shrink != 0:
        call.x, call.x_stride = address_of(source), source.strides[0]
    else:
        call.v, call.v_stride = address_of(source), source.strides[0]
    if phases.expand != 0:
        call.y, call.y_stride = address_of(target), target.strides[0]
    else:
        call.v, call.v_stride = address_of(target), target.strides[0]
    return start_in_place(address, kernels, table, segments, pool, worth_sharing_ns)


@jit()
def start_at(
    address: int,
    x: int,
    x_stride: int,
    y: int,
    y_stride: int,
    kernels: int,
    table: int,
    segments: int,
    pool: int,
    worth_sharing_ns: int,
) -> Any:
    """The same of both phases, of x and y at addresses, and bytes from row to row; of Segments."""
    call = record(CALL, address)
    call.x, call.x_stride, call.y, call.y_stride = x, x_stride, y, y_stride
    place_v(address, kernels, table)
    return start_in_place(address, kernels, table, segments, pool, worth_sharing_ns)


@jit()
def place_v(address: int, kernels: int, table: int) -> None:
    """Have v in the workspace."""
    call = record(CALL, address)
    call.v = call.v_room
    call.v_stride = record(TABLE, table).width * record(KERNELS, kernels).v_itemsize


@jit()
def start_in_place(
    address: int, kernels: int, table: int, segments: int, pool: int, worth_sharing_ns: int
) -> Any:
    """Run the call; its operands are in place. Returns the outcome."""
    call = record(CALL, address)
    phases = record(KERNELS, kernels)
    call.shrink, call.expand = phases.shrink, phases.expand
    call.table, call.segments, call.worth_sharing_ns = table, segments, worth_sharing_ns
    enter(call.begin, address, pool)
    return call.outcome


@jit()
def is_dense(array: Any) -> Any:
    """Whether the elements of each row are side by side in memory."""
    return array.size == 0 or array.shape[1] == 1 or array.strides[1] == array.itemsize


def begin(address: int, pool: int) -> None:
    """Plan the call and run it: operands are in the record, and so is the outcome then."""
    call = record(CALL, address)
    call.shrink_next = call.shrink_done = call.expand_next = 0
    if not plan(address):
        call.outcome = REFUSED
        return
    cost_ns = cut_blocks(address)
    tasks = call.band_count * call.expand_cuts
    if call.shrink != 0 and (call.expand == 0 or call.block_count * call.shrink_cuts < tasks):
        tasks = call.block_count * call.shrink_cuts
    call.limit = max(1, tasks * BETWEEN_SIGNALS_NS // max(cost_ns, 1))
    if pool != 0 and cost_ns >= call.worth_sharing_ns and take_helpers(pool):
        call.pool = pool
        open_gate(pool, address)
        if has_bell(pool):
            call.outcome = MORE
            return
    call.outcome = resume(address)


@jit()
def resume(address: int) -> Any:
    """Run tasks until none is left, or for as long as signals may wait; returns the outcome."""
    call = record(CALL, address)
    if call.pool == 0 or not fork_join(call.pool, address):
        take_part(address, call.limit)
    if not all_begun(address):
        return MORE
    let_helpers_go(address)
    return DONE


@jit()
def abandon(address: int) -> None:
    """End a call whose tasks are not all done: begin no other, and wait for the helpers inside."""
    leave_undone(address)
    let_helpers_go(address)


@jit()
def let_helpers_go(address: int) -> None:
    """Wait for the helpers inside, if the call has any, and free them."""
    call = record(CALL, address)
    if call.pool != 0:
        shut_gate(call.pool)
        free_helpers(call.pool)
        call.pool = 0
