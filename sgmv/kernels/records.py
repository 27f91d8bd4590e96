"""What compiled code is told, as records of int64s: Python writes their fields, kernels read them.

    CALL      one call: operands, adapters, plan, and the counters from which threads claim tasks
    KERNELS   the compiled shrink and expand of some float types
    TABLE     a layer's adapters, by slot
    SEGMENTS  a batch's rows, sorted by adapter
    BLOCK     some rows of one segment
    POOL      the gate at which helpers wait
    SEAT      a helper's place at the gate

"At" in a comment means an address. `jit.record` reads and writes one by its fields' names; atomics
and emitted code, which take addresses, find a field at its `offset`.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from sgmv.kernels.cpu import ARM64

CACHE_LINE = 128 if ARM64 else 64  # bytes; 128 are Apple's
INTEGER, FLOAT64 = np.int64(0), np.float64(0)  # tell `vector` what is stored at an address


def _record(*fields: str, lines: tuple[str, ...] = ()) -> np.dtype[Any]:
    """A record of int64s, one after the other; then `lines`, on a cache line each."""
    after = -(-8 * len(fields) // CACHE_LINE) * CACHE_LINE
    offsets = [*range(0, 8 * len(fields), 8), *(after + CACHE_LINE * i for i in range(len(lines)))]
    size = after + CACHE_LINE * len(lines) if lines else 8 * len(fields)
    names = [*fields, *lines]
    kind: Any = {"names": names, "offsets": offsets, "itemsize": size}
    kind["formats"] = [np.int64] * len(names)
    return np.dtype((np.record, np.dtype(kind)))  # fields are attributes in plain Python, too


def offset(kind: np.dtype[Any], field: str) -> int:
    """Bytes from a record's address to its field."""
    return int(kind.fields[field][1])  # type: ignore[index]  # a record has fields


def on_cache_lines(kind: np.dtype[Any]) -> np.ndarray[Any, np.dtype[Any]]:
    """A new record (1,) of zeros that shares no cache line with other memory."""
    memory = np.zeros(kind.itemsize + 2 * CACHE_LINE, np.uint8)
    start = -memory.ctypes.data % CACHE_LINE
    return memory[start : start + kind.itemsize].view(kind)


CALL = _record(
    *("x", "x_stride", "y", "y_stride"),  # at their first elements; bytes from row to row
    *("v", "v_stride"),  # (n, slices * r), in sorted order, the ranks of slice after slice
    *("x_rows", "y_rows"),  # at (n,): the row of x, and of y, that belongs to each sorted position
    "v_room",  # at memory for v
    *("segments", "ids", "n"),  # at SEGMENTS; or 0, and at (n,) adapter ids
    "table",  # at the layer's TABLE
    *("shrink", "expand"),  # at their kernels; 0 leaves the phase out
    "threads",  # how many may take part
    "worth_sharing_ns",  # work that takes one core less than this is not shared
    "pool",  # at the POOL that helps this call; or 0
    *("begin", "outcome"),  # at compiled code that plans and runs a call; how far that came
    "limit",  # tasks that the caller runs of each phase before it looks for signals
    "scratch",  # at the plan's memory
    *("blocks", "block_count"),  # at (block_count,) BLOCK
    "weights",  # at (n,) float32, by sorted position: factors of the rows of v; or 0
    # Where rows have several adapters: at (band_count + 1,), the first block of each band; or 0,
    # where each block is a band of its own.
    *("bands", "band_count"),
    *("shrink_cuts", "expand_cuts"),  # into how many tasks each phase cuts a block
    # Counters: tasks claimed and done, and the threads that came to an OpenMP team's region.
    lines=("shrink_next", "shrink_done", "expand_next", "members"),
)

KERNELS = _record(
    *("shrink", "expand"),  # addresses; 0 leaves the phase out
    "v_itemsize",  # bytes of a number of v
)

TABLE = _record(
    *("h_in", "h_out"),
    "width",  # columns of v: the highest rank, for each slice
    "loaded",  # ids that are known
    *("ids", "slot_of"),  # at (loaded,): the ids ascending, the slot of each
    "slots",
    *("wa", "wb"),  # at (slots, slices) and (slots,) of addresses
    *("ranks", "scalings"),  # at (slots,); scalings are float64
    # At (slots,) of addresses, each 0 or at (h_out,) numbers of the type that a stack sums in:
    # DoRA's factors of y and what is added then, see dora.py. Or 0: no slot has any.
    *("gains", "offsets"),
    "slices",  # wa of one slot, which share a wb: vLLM's q, k and v
    "panel_columns",  # wb (r, h_out) is stored in panels of this number of columns, if it is packed
    # Bytes from rank to rank and from column to column of a wb that is not packed; else 0, 0.
    *("wb_rank_stride", "wb_column_stride"),
)

SEGMENTS = _record(
    "count",
    "most",  # positions, or segments if these are more: what a plan has to have room for
    *("rows", "seq_start", "adapter_ids"),  # at (n,), (count + 1,), (count,)
    "x_rows",  # at (n,): the row of x at each position, where it is not that of y; or 0
    "weights",  # at (n,) float32, or 0
    "k",  # adapters that each row names; above 1 a row may be in several segments
)

BLOCK = _record(
    *("slot", "r"),
    *("first", "last"),  # sorted positions first:last
)

POOL = _record(
    # Linux's, or 0: libc's syscall(2), and the numbers of four system calls.
    *("syscall", "futex", "getcpu", "setaffinity", "gettid"),
    *("cpu", "kept_clear"),  # the caller's core, now and when helpers were last kept off it
    "helpers",
    "thread_ids",  # at (helpers,)
    *("cpus", "mask"),  # at (CPU_WORDS,): the cores helpers may use, a bit each; and scratch
    *("team", "member"),  # GOMP_parallel, or 0; what its threads run
    # The gate is SHUT, or CLOSED for good, or the number of the call at hand, and no number comes
    # twice; the helpers inside, and asleep; the address of the call; the last number; how many
    # callers asked for the helpers since they were free, the first of whom has them.
    lines=("gate", "inside", "sleepers", "call", "number", "asked"),
)
SEAT = _record("pool", "index", "thread_id")  # of a native thread: at POOL, its number, its id
CPU_WORDS = 16  # int64s: 1,024 cores, as many as libc's own set of them has

# Columns of a panel of wb, (r, PANEL), as the tiles take them; the last is as narrow as what is
# left. Where no tile will read them they are wide: plain loops took 4 times as long over 64.
PANEL, WIDE_PANEL = 64, 1024
RANK_UNIT = 8  # shrink's cuts fall between this number of ranks, expand's between panels
