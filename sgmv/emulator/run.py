"""How a launch is run: its operands are checked and widened, then its thread blocks are executed.

    Kernel        what a kernel takes and leaves, whatever it is launched for
    Memory        what all blocks see while they run; memory_of() makes it of a caller's operands
    run_blocks()  the blocks in one of the orders that a GPU may take, and the Result

The kernels' own files build their tiles with `zero_filled` and `multiply`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from sgmv.checks import check_count, check_matrix, check_scaling, check_x
from sgmv.dtypes import Array
from sgmv.emulator.blocks import ORDERS, Block, Index, Races, execute
from sgmv.errors import DtypeError, ShapeError, UnknownAdapterError, ValueRangeError, some

Floats = npt.NDArray[np.float32]
HALF_TYPES = ("float16", "bfloat16")
MMA_K = 16  # products that one tensor core instruction adds at once


@dataclass(frozen=True)
class Kernel:
    """What a kernel takes and leaves, whatever it is launched for.

    shrinks     whether the weights are A (r, h_in), or else B (h_out, r)
    adds        whether out is added to y, or else overwritten
    scales      "never", "once" (one number for all rows) or "by adapter"
    atomics     whether blocks add to out by atomics
    single_x    whether x may be float32
    single_out  whether out is float32
    estimated   whether shared memory is the compiler's to decide
    """

    name: str
    shrinks: bool
    adds: bool = True
    scales: str = "never"
    atomics: bool = False
    single_x: bool = False
    single_out: bool = False
    estimated: bool = False


class Shapes(NamedTuple):
    """The shapes that a launch's operands must have."""

    x: tuple[int, int]
    weights: tuple[int, int]
    out: tuple[int, int]


@dataclass(frozen=True)
class Result:
    """What a run left behind.

    out       (n, width) rows in the order of the batch; those without an adapter hold y, or 0
    barriers  grid barriers that the blocks passed
    races     (slot of tmp, block that wrote, block that read), with no barrier between the two
    """

    out: Array
    barriers: int
    races: tuple[tuple[int, Index, Index], ...]


@dataclass
class Memory:
    """What all blocks see while they run. Half-precision numbers are held as float32.

    dtype      the half type of the weights
    out_dtype  the type that out is stored in
    """

    x: Floats
    weights: Mapping[int, Floats]
    out: Floats
    scaling: Mapping[int, np.float32]
    dtype: np.dtype[Any]
    out_dtype: np.dtype[Any]

    def __post_init__(self) -> None:
        self.tmp: dict[int, Floats] = {}
        self.races = Races()

    def rounded(self, values: Floats) -> Floats:
        """The values as the half type would store them."""
        return values.astype(self.dtype).astype(np.float32)


def check_order(order: str, seed: int) -> int:
    """The seed as an int; refuses an order that there is not."""
    if not isinstance(order, str) or order not in ORDERS:
        raise ValueRangeError("order", f"one of {ORDERS}", repr(order), "choose one of them")
    return check_count("seed", seed, 0, math.inf)


def memory_of(
    kernel: Kernel,
    shapes: Shapes,
    ids: Sequence[int],
    x: Array,
    weights: Mapping[int, Array],
    y: Array | None,
    scaling: float | Mapping[int, float],
) -> Memory:
    """The operands of a run, checked; ids are those of the batch's adapters."""
    held = _check_weights(weights, ids, shapes.weights)
    check_x(x, *shapes.x)
    dtype = held[ids[0]].dtype if ids else x.dtype
    if x.dtype != dtype and not (kernel.single_x and x.dtype == np.float32):
        raise DtypeError("x", f"{dtype}, as the weights", str(x.dtype), "convert one of them")
    if dtype.name not in HALF_TYPES:
        raise DtypeError("x", " or ".join(HALF_TYPES), dtype.name, "convert x and weights")
    return Memory(
        x.astype(np.float32),
        {i: array.astype(np.float32) for i, array in held.items()},
        _first_out(kernel, y, shapes.out, dtype),
        {i: np.float32(each) for i, each in _scalings(kernel, scaling, ids).items()},
        dtype,
        np.dtype(np.float32) if kernel.single_out else dtype,
    )


def run_blocks(blocks: Mapping[Index, Block], memory: Memory, order: str, seed: int) -> Result:
    """Execute all blocks on this memory."""
    with np.errstate(over="ignore", invalid="ignore"):
        barriers = execute(blocks, order, seed, memory.races.barrier)
        out = memory.out.astype(memory.out_dtype)
    return Result(out, barriers, tuple(memory.races.found.values()))


def multiply(sums: Floats, a: Floats, b: Floats, step: int = MMA_K) -> None:
    """Add a @ b.T to the sums, `step` products at a time, as tensor core instructions do."""
    for k in range(0, a.shape[1], step):
        sums += a[:, k : k + step] @ b[:, k : k + step].T


def zero_filled(values: Floats, rows: int, columns: int) -> Floats:
    """A tile of this size: the values in its first rows and columns, 0 elsewhere."""
    tile = np.zeros((rows, columns), np.float32)
    tile[: values.shape[0], : values.shape[1]] = values
    return tile


def _first_out(
    kernel: Kernel, y: Array | None, shape: tuple[int, int], dtype: np.dtype[Any]
) -> Floats:
    """What out holds before the first block runs."""
    if y is None:
        return np.zeros(shape, np.float32)
    if not kernel.adds:
        raise ValueRangeError(
            "y", f"None, as {kernel.name} overwrites its output", "an array", "leave y out"
        )
    if check_matrix("y", y).shape != shape or y.dtype != dtype:
        raise ShapeError("y", f"{shape} of {dtype}", f"{y.shape} of {y.dtype}", "convert y")
    return y.astype(np.float32)


def _scalings(
    kernel: Kernel, scaling: float | Mapping[int, float], ids: Sequence[int]
) -> Mapping[int, float]:
    """The scaling of each adapter."""
    one = not isinstance(scaling, Mapping)
    if not isinstance(scaling, Mapping):
        scaling = check_scaling("scaling", scaling)
    takes = {"never": one and scaling == 1.0, "once": one, "by adapter": True}
    if not takes[kernel.scales]:
        raise ValueRangeError(
            "scaling",
            f"what {kernel.name} takes: {'1.0' if kernel.scales == 'never' else 'one number'}",
            repr(scaling),
            "multiply it into the weights",
        )
    if not isinstance(scaling, Mapping):
        return dict.fromkeys(ids, scaling)
    _check_held("scaling", scaling, ids)
    return {i: check_scaling(f"scaling[{i}]", scaling[i]) for i in ids}


def _check_weights(
    weights: Mapping[int, Array], ids: Sequence[int], shape: tuple[int, int]
) -> dict[int, Array]:
    _check_held("weights", weights, ids)
    held = {i: check_matrix(f"weights[{i}]", weights[i]) for i in ids}
    for i, array in held.items():
        if array.shape != shape or array.dtype != held[ids[0]].dtype:
            raise ShapeError(
                f"weights[{i}]",
                f"(width of out, width of x) = {shape}, all of one type",
                f"{array.shape} of {array.dtype}",
                "pass A (r, h_in) to a shrink, B (h_out, r) to an expand",
            )
    return held


def _check_held(argument: str, mapping: Mapping[int, Any], ids: Sequence[int]) -> None:
    if not isinstance(mapping, Mapping):
        kind = type(mapping).__name__
        raise DtypeError(argument, "a mapping id -> entry", kind, "pass a dict")
    missing = [i for i in ids if i not in mapping]
    if missing:
        raise UnknownAdapterError(
            argument,
            "an entry for every adapter of the batch",
            f"none for {some(missing)}",
            "add them to the mapping",
        )
