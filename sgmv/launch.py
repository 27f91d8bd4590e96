"""One call, its arguments checked: memory, threads, and compiled code until the last task is done.

    run_both         x -> v -> y    `add_lora`; v is the workspace's
    run_both_at      the same of rows at addresses, for callers that have no arrays
    run_shrink       x -> v
    run_expand       v -> y

When one returns, or raises, no thread works on the operands any more. Each raises what is wrong
with the ids before anything is written.
"""

from __future__ import annotations

from collections.abc import Callable
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
NO_IDS = np.empty(0, np.int64)  # where a batch is Segments


def run_both(
    kernels: Kernels, table: SlotTable, batch: Segments | Integers, x: Array, y: Array
) -> None:
    """Shrink and expand: add the delta of every row of x to its row of y. Any strides."""
    _run(run_both, kernels, table, batch, x, y, workers.pool_of(y))


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
    operands = *x, *y, kernels.address, table.address, segments.address
    v_bytes = segments.most * table.width * kernels.v_itemsize
    if _start(call.start_at, operands, segments.most, v_bytes, pool) == call.REFUSED:
        table.find(segments.adapter_ids)


def run_shrink(
    kernels: Kernels, table: SlotTable, batch: Segments | Integers, x: Array, v: Array
) -> None:
    """Write v (n, r), contiguous, of x: each row of an adapter, up to its rank."""
    _run(run_shrink, kernels, table, batch, x, v, workers.pool_of(x))


def run_expand(
    kernels: Kernels, table: SlotTable, batch: Segments | Integers, v: Array, y: Array
) -> None:
    """Add the delta of every row of v (n, r), contiguous, to its row of y."""
    _run(run_expand, kernels, table, batch, v, y, workers.pool_of(y))


def _run(
    run: Callable[..., None],
    kernels: Kernels,
    table: SlotTable,
    batch: Segments | Integers,
    source: Array,
    target: Array,
    pool: workers.Pool,
) -> None:
    """`run`, on arrays as `call.start` takes them."""
    if isinstance(batch, Segments):
        segments, ids, n = batch.address, NO_IDS, batch.most
    else:
        segments, ids, n = 0, batch, len(batch)
    arrays = as_bits(source), as_bits(target)
    operands = *arrays, kernels.address, table.address, segments, ids
    v_bytes = n * table.width * kernels.v_itemsize if run is run_both else 0
    outcome = _start(call.start, operands, n, v_bytes, pool)
    if outcome == call.SCATTERED:
        dense = np.ascontiguousarray(target)
        run(kernels, table, batch, np.ascontiguousarray(source), dense)
        if dense is not target:
            _write_back(target, dense, table, batch)
    if outcome == call.REFUSED:
        table.find((batch if isinstance(batch, Segments) else segment(batch)).adapter_ids)


def _start(
    start: Callable[..., int], operands: tuple[Any, ...], n: int, v_bytes: int, pool: workers.Pool
) -> int:
    """Run a call until it is over; returns its outcome. `pool` helps, if its helpers are free.

    n, v_bytes  positions, and bytes of v, that the workspace has room for
    """
    space = workspace.take()
    threads, gate = workers.get_num_threads(), 0
    try:
        if threads > 1 and JITTED:
            pool.prepare(threads - 1)
            gate = pool.address
        space.prepare(n, v_bytes, threads)
        outcome = start(space.address, *operands, gate, WORTH_SHARING_NS)
        while outcome == call.MORE:  # between two bytecodes Python hears signals
            pool.ring()
            outcome = call.resume(space.address)
    except BaseException:
        _give_up(space.address)
        raise
    finally:
        workspace.give_back(space)
    return outcome


def _write_back(y: Any, dense: Any, table: SlotTable, batch: Segments | Integers) -> None:
    """Copy the rows that have an adapter from the dense copy that the kernels worked on."""
    segments = batch if isinstance(batch, Segments) else segment(batch)
    changes = table.changes(*table.find(segments.adapter_ids))
    changed = segments.rows[np.repeat(changes, segments.lengths)]
    y[changed] = dense[changed]


def _give_up(address: int) -> None:
    """Leave the rest undone, and wait for the helpers inside."""
    while True:
        try:
            call.abandon(address)
            return
        except KeyboardInterrupt:  # helpers may still write: be done with them first
            continue
