"""One call, its arguments checked: memory, threads, and compiled code until the last task is done.

    run_both         x -> v -> y    `add_lora`; v is the workspace's
    run_both_at      the same of rows at addresses, for callers that have no arrays
    run_shrink       x -> v
    run_expand       v -> y

When one returns, or raises, no thread works on the operands any more. Each raises what is wrong
with the ids before anything is written.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from sgmv import workers, workspace
from sgmv.backend import Kernels
from sgmv.cpu import JITTED
from sgmv.dtypes import Array, as_bits
from sgmv.ids import Integers
from sgmv.kernels import call
from sgmv.segment import Segments, segment
from sgmv.table import SlotTable

# Two cores that meet over less work than this lose more than they gain, helpers awake or not.
WORTH_SHARING_NS = 20_000


def run_both(
    kernels: Kernels, table: SlotTable, batch: Segments | Integers, x: Array, y: Array
) -> None:
    """Shrink and expand: add the delta of every row of x to its row of y. Any strides."""
    space, row = workspace.take(), table.width * kernels.v_itemsize
    x, dense = _dense(x), _dense(y)  # copies are kept alive until the call is over
    v = space.v_of(_positions(batch) * row)
    call.place_x_and_y(space.address, as_bits(x), as_bits(dense), v, row)
    _run(space, workers.pool_of(y), kernels, table, batch)
    if dense is not y:
        _write_back(y, dense, table, batch)


def run_both_at(
    kernels: Kernels,
    table: SlotTable,
    segments: Segments,
    pool: workers.Pool,
    x: tuple[int, int],
    y: tuple[int, int],
) -> None:
    """`run_both` of rows given as an address and the bytes from row to row.

    The caller keeps their memory alive, and says which pool helps.
    """
    space, row = workspace.take(), table.width * kernels.v_itemsize
    call.place_at(space.address, *x, *y, space.v_of(segments.most * row), row)
    _run(space, pool, kernels, table, segments)


def run_shrink(
    kernels: Kernels, table: SlotTable, batch: Segments | Integers, x: Array, v: Array
) -> None:
    """Write v (n, r), contiguous, of x: each row of an adapter, up to its rank."""
    space, dense = workspace.take(), _dense(x)
    call.place_x_and_v(space.address, as_bits(dense), v)
    _run(space, workers.pool_of(x), kernels, table, batch)


def run_expand(
    kernels: Kernels, table: SlotTable, batch: Segments | Integers, v: Array, y: Array
) -> None:
    """Add the delta of every row of v (n, r), contiguous, to its row of y."""
    space, dense = workspace.take(), _dense(y)
    call.place_v_and_y(space.address, v, as_bits(dense))
    _run(space, workers.pool_of(y), kernels, table, batch)
    if dense is not y:
        _write_back(y, dense, table, batch)


def _run(
    space: workspace.Workspace,
    pool: workers.Pool,
    kernels: Kernels,
    table: SlotTable,
    batch: Segments | Integers,
) -> None:
    """Run the call: its operands are in the record. `pool` helps, unless another caller has it."""
    if isinstance(batch, Segments):
        segments, ids = batch.address, 0
    else:
        segments, ids = 0, call.array_address(batch)
    n = _positions(batch)
    threads = workers.get_num_threads()
    held = threads > 1 and JITTED and pool.lock.acquire(False)
    gate = pool.address if held else 0
    try:
        if held:
            pool.prepare(threads - 1)
        space.plan_rows(n)
        records = space.address, gate, kernels.shrink, kernels.expand, table.address
        outcome = call.start(*records, segments, ids, n, threads, WORTH_SHARING_NS)
        while outcome == call.MORE:  # between two bytecodes Python hears signals
            if held:
                pool.ring()
            outcome = call.resume(space.address, gate)
    except BaseException:
        _give_up(space.address, gate)
        raise
    finally:
        if held:
            pool.lock.release()
        workspace.give_back(space)
    if outcome == call.REFUSED:
        table.find((batch if isinstance(batch, Segments) else segment(batch)).adapter_ids)


def _positions(batch: Segments | Integers) -> int:
    """Room that v and the plan need."""
    return batch.most if isinstance(batch, Segments) else len(batch)


def _dense(array: Array) -> Array:
    """The array, or a copy, with the elements of each row side by side in memory."""
    dense = array.flags.c_contiguous or array.shape[1] <= 1 or array.strides[1] == array.itemsize
    return array if dense else np.ascontiguousarray(array)


def _write_back(y: Any, dense: Any, table: SlotTable, batch: Segments | Integers) -> None:
    """Copy the rows that have an adapter from the dense copy that the kernels worked on."""
    segments = batch if isinstance(batch, Segments) else segment(batch)
    changes = table.changes(*table.find(segments.adapter_ids))
    changed = segments.rows[np.repeat(changes, segments.lengths)]
    y[changed] = dense[changed]


def _give_up(address: int, gate: int) -> None:
    """Leave the rest undone, and wait for the helpers inside."""
    while True:
        try:
            call.abandon(address, gate)
            return
        except KeyboardInterrupt:  # helpers may still write: be done with them first
            continue
