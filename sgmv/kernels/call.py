"""One call in compiled code: segment, shrink, expand.

    start    plans the call (segments, slots, row blocks, tasks), opens the gate to helpers where
             that pays, and runs tasks
    resume   runs tasks until none is left, or signals have waited long enough

Each returns MORE if Python is to look after signals, and sleeping helpers, and to resume.
"""

from __future__ import annotations

from typing import Any

from sgmv.kernels.jit import address_of, jit, record
from sgmv.kernels.plan import cut_blocks, plan
from sgmv.kernels.pool import fork_join, has_bell, open_gate, shut_gate
from sgmv.kernels.records import CALL
from sgmv.kernels.tasks import all_begun, leave_undone, take_part

# Outcomes of a call.
DONE, MORE, REFUSED = 0, 1, -1
BETWEEN_SIGNALS_NS = 50_000_000  # of work, about, until a call hears signals, such as Ctrl-C


@jit()
def array_address(array: Any) -> Any:
    """`address_of`, for Python."""
    return address_of(array)


@jit()
def place_x_and_y(address: int, x: Any, y: Any, v: int, v_stride: int) -> None:
    """Tell the call where its operands are: arrays, and memory for v."""
    place_at(address, address_of(x), x.strides[0], address_of(y), y.strides[0], v, v_stride)


@jit()
def place_at(
    address: int, x: int, x_stride: int, y: int, y_stride: int, v: int, v_stride: int
) -> None:
    """The same of addresses, and bytes from row to row."""
    call = record(CALL, address)
    call.x, call.x_stride = x, x_stride
    call.y, call.y_stride = y, y_stride
    call.v, call.v_stride = v, v_stride


@jit()
def place_x_and_v(address: int, x: Any, v: Any) -> None:
    """Tell a call of shrink alone where its operands are."""
    call = record(CALL, address)
    call.x, call.x_stride = address_of(x), x.strides[0]
    call.v, call.v_stride = address_of(v), v.strides[0]


@jit()
def place_v_and_y(address: int, v: Any, y: Any) -> None:
    """Tell a call of expand alone where its operands are."""
    call = record(CALL, address)
    call.v, call.v_stride = address_of(v), v.strides[0]
    call.y, call.y_stride = address_of(y), y.strides[0]


@jit()
def start(
    address: int,
    pool: int,
    shrink: int,
    expand: int,
    table: int,
    segments: int,
    ids: int,
    n: int,
    threads: int,
    worth_sharing_ns: int,
) -> Any:
    """Plan the call whose operands are in place, and run it.

    pool            address of POOL, or 0 where no thread helps
    shrink, expand  addresses of kernels, 0 where a phase is left out
    segments, ids   the address of SEGMENTS, and 0; or 0, and that of n adapter ids
    """
    call = record(CALL, address)
    call.table, call.threads = table, threads
    call.shrink, call.expand = shrink, expand
    call.shrink_next = call.shrink_done = call.expand_next = 0
    if not plan(address, segments, ids, n):
        return REFUSED
    cost_ns = cut_blocks(address, worth_sharing_ns)
    tasks = call.band_count * call.expand_cuts
    if call.shrink != 0 and (call.expand == 0 or call.block_count * call.shrink_cuts < tasks):
        tasks = call.block_count * call.shrink_cuts
    call.limit = max(1, tasks * BETWEEN_SIGNALS_NS // max(cost_ns, 1))
    if cost_ns < worth_sharing_ns:
        pool = 0
    if pool != 0:
        open_gate(pool, address)
        if has_bell(pool):
            return MORE
    return resume(address, pool)


@jit()
def resume(address: int, pool: int) -> Any:
    """Run tasks until none is left, or for as long as signals may wait."""
    if pool == 0 or not fork_join(pool, address):
        take_part(address, record(CALL, address).limit)
    if not all_begun(address):
        return MORE
    if pool != 0:
        shut_gate(pool)
    return DONE


@jit()
def abandon(address: int, pool: int) -> None:
    """End a call whose tasks are not all done: begin no other, and wait for the helpers inside."""
    leave_undone(address)
    if pool != 0:
        shut_gate(pool)
