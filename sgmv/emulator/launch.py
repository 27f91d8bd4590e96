"""A launch: its geometry in integers, and every figure that follows from it.

    figures()   what the launch costs, one flat dict of numbers
    run()       its thread blocks, executed in the order asked for: see run.py

A launch multiplies rows of x by the weights of each row's adapter, and adds or stores:

    out[row] (+)= x[row] @ weights[adapter id of row].T       shrink: weights are A (r, h_in)
                                                              expand: weights are B (h_out, r)
Each kernel is a subclass. Its constructor function lays out the grid; `program` is one block.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from sgmv.checks import check_count, check_several
from sgmv.dtypes import Array
from sgmv.emulator.blocks import Block, Deadlock, Index
from sgmv.emulator.device import Device
from sgmv.emulator.run import Kernel, Memory, Result, Shapes, check_order, memory_of, run_blocks
from sgmv.errors import DtypeError, ShapeError, ValueRangeError, some
from sgmv.ids import BASE_ONLY, Integers
from sgmv.layouts.rows import Batch, as_segments
from sgmv.segment import Segments

HALF, SINGLE = 2, 4  # bytes


@dataclass(frozen=True)
class Work:
    """What a launch does for the rows of one adapter.

    rows       of the batch
    row_slots  rows that its tiles hold, padding included, each counted once
    blocks     thread blocks that do some of it
    barriers   grid barriers that each of them passes
    """

    adapter_id: int
    rows: int
    row_slots: int
    blocks: int
    barriers: int = 0


@dataclass(frozen=True, kw_only=True)
class Launch(ABC):
    """One kernel launch: a grid of thread blocks, laid out for a batch, a layer and a device.

    Semantics: integers only; `figures` gives all that follows from them.

    x_width, k, width    columns of x; products per element of out; columns of out
    grid, block          blocks in x, y, z; threads of one in x, y, z
    work                 one entry per adapter, in the order of the segments
    early_exits          blocks that find nothing to do
    lanes                multiply-adds that the tiles of all blocks hold
    shared_memory        bytes per block
    bytes_read, bytes_written   what all blocks ask of memory, before any cache
    split_k              blocks that share the products of one element of out
    cooperative          whether the grid has barriers, so that all blocks must be resident
    tmp                  bytes of scratch memory
    unsupported          why there is no such kernel: `run` refuses
    """

    KERNEL: ClassVar[Kernel]

    device: Device
    segments: Segments = field(repr=False, compare=False)
    x_width: int
    k: int
    width: int
    grid: Index
    block: Index
    work: tuple[Work, ...]
    early_exits: int
    lanes: int
    shared_memory: int
    bytes_read: int
    bytes_written: int
    split_k: int = 1
    cooperative: bool = False
    tmp: int = 0
    unsupported: tuple[str, ...] = ()

    @abstractmethod
    def program(self, index: Index, memory: Memory) -> Block:
        """One thread block, as a coroutine."""

    def indices(self) -> Iterator[Index]:
        """Every block's index."""
        return product(*map(range, self.grid))  # type: ignore[return-value]  # three ranges

    def segment_rows(self, s: int) -> Integers:
        """Rows of the batch that have the adapter of `work[s]`."""
        s += self.segments.S - len(self.work)  # past the base-only segment
        start, end = self.segments.seq_start[s : s + 2]
        return self.segments.rows[start:end]

    @property
    def blocks(self) -> int:
        return int(np.prod(self.grid))

    @property
    def threads(self) -> int:
        return int(np.prod(self.block))

    @property
    def resident_blocks(self) -> int:
        """Blocks that one SM holds at once."""
        return self.device.resident_blocks(self.threads, self.shared_memory)

    @property
    def capacity(self) -> int:
        """Blocks that the device holds at once."""
        return self.device.sms * self.resident_blocks

    @property
    def waves(self) -> int:
        """Times that the device is filled with blocks; 0 where not one block fits."""
        return ceil_div(self.blocks, self.capacity) if self.capacity else 0

    @property
    def rows(self) -> int:
        """Rows of the batch that have an adapter."""
        return sum(work.rows for work in self.work)

    @property
    def flops(self) -> int:
        """Useful multiplications and additions: Punica's 2 n h_in h_out."""
        return 2 * self.rows * self.k * self.width

    @property
    def io_bytes(self) -> int:
        """Every operand through memory once: Punica's formula, section 7.1, at 2 bytes each."""
        weights = len(self.work) * self.k * self.width
        return HALF * (self.rows * (self.x_width + self.width) + weights)

    @property
    def intensity(self) -> float:
        """FLOP per byte."""
        return self.flops / self.io_bytes if self.io_bytes else 0.0

    @property
    def deadlock(self) -> Deadlock | None:
        """The deadlock that a run would end in, found without running anything."""
        return None

    @property
    def race(self) -> bool:
        """Whether blocks may overwrite scratch memory that others still read."""
        return False

    @property
    def faults(self) -> tuple[str, ...]:
        """All that is wrong with this launch, in words."""
        found = [*self.unsupported]
        if not self.capacity and not self.KERNEL.estimated:
            found.append(f"no block of {self.shared_memory} bytes fits an SM of {self.device.name}")
        if self.deadlock:
            found.append(str(self.deadlock))
        return tuple(found)

    def figures(self) -> dict[str, Any]:
        """Every figure by name: numbers, strings, and lists of them; fit for json.dumps."""
        inner, outer = ("h_in", "r") if self.KERNEL.shrinks else ("r", "h_out")
        useful = self.flops // 2
        row_slots = sum(work.row_slots for work in self.work)
        seconds = self.device.roofline_s(self.flops, self.io_bytes)
        return {
            "kernel": self.KERNEL.name,
            "device": self.device.name,
            "n": self.segments.n,
            "S": len(self.work),
            inner: self.k,
            outer: self.width,
            **dict(zip(("grid_x", "grid_y", "grid_z"), self.grid, strict=True)),
            **dict(zip(("block_x", "block_y", "block_z"), self.block, strict=True)),
            "blocks": self.blocks,
            "threads": self.threads,
            "early_exits": self.early_exits,
            "shared_memory": self.shared_memory,
            "shared_memory_estimated": self.KERNEL.estimated,
            "resident_blocks": self.resident_blocks,
            "capacity": self.capacity,
            "waves": self.waves,
            "split_k": self.split_k,
            "cooperative": self.cooperative,
            "barriers": max((work.barriers for work in self.work), default=0),
            "deterministic": not (self.race or (self.KERNEL.atomics and self.split_k > 1)),
            "tmp_bytes": self.tmp,
            "rows": self.rows,
            "row_slots": row_slots,
            "wasted_rows": row_slots - self.rows,
            "lanes": self.lanes,
            "useful_lanes": useful,
            "wasted_lanes": self.lanes - useful,
            "flops": self.flops,
            "io_bytes": self.io_bytes,
            "intensity": self.intensity,
            "bytes_read": self.bytes_read,
            "bytes_written": self.bytes_written,
            "roofline_us": seconds * 1e6,
            **self.own_figures(),
            "adapter_ids": [work.adapter_id for work in self.work],
            "rows_per_segment": [work.rows for work in self.work],
            "row_slots_per_segment": [work.row_slots for work in self.work],
            "blocks_per_segment": [work.blocks for work in self.work],
            "barriers_per_segment": [work.barriers for work in self.work],
            "faults": list(self.faults),
        }

    def own_figures(self) -> dict[str, Any]:
        """What only this kernel has."""
        return {}

    def __str__(self) -> str:
        figures = self.figures()
        width = max(map(len, figures))
        return "\n".join(f"{name:{width}}  {_shown(value)}" for name, value in figures.items())

    def run(
        self,
        x: Array,
        weights: Mapping[int, Array],
        y: Array | None = None,
        *,
        scaling: float | Mapping[int, float] = 1.0,
        order: str = "in order",
        seed: int = 0,
    ) -> Result:
        """Execute every thread block, in one of the orders that a GPU may take.

        Semantics: `out[row] = y[row] + x[row] @ weights[id].T`, in this kernel's tiles, steps,
        orders of summation and roundings. Tensor cores may sum the products of one step in any
        order, and in more than float32; here they are summed in float32.

        x        (n, x_width) float16 or bfloat16, rows in the order of the batch
        weights  adapter id -> (width, k), of x's type
        y        (n, width), of x's type, not changed; left out: zeros
        scaling  for kernels that scale: one number, or where each adapter has its own, a mapping
        order    "in order", "reversed" or "random", which the seed draws

        Raises DeadlockError where the launch would never end; ValueRangeError where there is no
        such kernel, or for a scaling that it does not take; ShapeError, DtypeError and
        UnknownAdapterError for operands that do not fit.
        """
        if self.unsupported:
            raise ValueRangeError(
                "launch",
                f"what {self.KERNEL.name} is built for",
                self.unsupported[0],
                "run another kernel",
            )
        seed = check_order(order, seed)
        shapes = Shapes(
            x=(self.segments.n, self.x_width),
            weights=(self.width, self.k),
            out=(self.segments.n, self.width),
        )
        ids = [work.adapter_id for work in self.work]
        memory = memory_of(self.KERNEL, shapes, ids, x, weights, y, scaling)
        blocks = {index: self.program(index, memory) for index in self.indices()}
        return run_blocks(blocks, memory, order, seed)

    def spread(
        self,
        x: Array,
        weights: Mapping[int, Array],
        y: Array | None = None,
        *,
        scaling: float | Mapping[int, float] = 1.0,
        seeds: Iterable[int] = range(8),
    ) -> npt.NDArray[np.float64]:
        """How far apart runs in several random orders end: (n, width), largest less smallest.

        Semantics: 0 for every element of a deterministic kernel. Arguments and errors as `run`.
        """
        check_several("seeds", seeds, "several seeds")
        drawn = [check_count("seeds", seed, 0, math.inf) for seed in seeds]
        if not drawn:
            raise ShapeError("seeds", "at least one", "none", "pass some")
        runs = [
            self.run(x, weights, y, scaling=scaling, order="random", seed=seed).out
            for seed in drawn
        ]
        with np.errstate(invalid="ignore"):  # of inf and NaN it is NaN
            between: npt.NDArray[np.float64] = np.ptp(np.stack(runs).astype(np.float64), axis=0)
        return between


def whole(device: object, **counts: int) -> Iterator[int]:
    """The counts as int, which must be whole numbers >= 1, on a Device."""
    if not isinstance(device, Device):
        raise DtypeError("device", "a Device", type(device).__name__, "pass emulator.A100, say")
    return (check_count(name, value, 1) for name, value in counts.items())


def widths(argument: str, given: int | Sequence[int]) -> tuple[int, ...]:
    """One width, or several, at least one, as a tuple of int."""
    each = given if isinstance(given, (list, tuple, range)) else (given,)
    if not each:
        raise ShapeError(argument, "a width, or one for each slice", "none", "pass at least one")
    return tuple(check_count(argument, width, 1) for width in each)


def laid_out(batch: Batch) -> tuple[Segments, list[tuple[int, Integers]]]:
    """The batch's segments, and (id, rows) of those with an adapter."""
    segments = as_segments(batch)
    parts = np.split(segments.rows, segments.seq_start[1:-1]) if segments.S else []
    named = zip(segments.adapter_ids.tolist(), parts, strict=True)
    return segments, [(i, rows) for i, rows in named if i != BASE_ONLY]


def ceil_div(a: int, b: int) -> int:
    """The quotient, rounded up.

    >>> ceil_div(65, 64)
    2
    """
    return -(-a // b)


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return some(value)
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
