"""The segmented products of other engines' calls, over weights where the engine stores them.

    shrink   v[p] = x[rows[p]] @ w.T           of several w for each row, x is read once
    expand   y[rows[p]] += v[p] @ w.T
    add      y[rows[p]] += scaling * x[rows[p]] @ w.T, by shrink or by expand, the faster one

A call reads the engine's own arrays. It copies, packs and keeps no weights, so they are in memory
once and every edit is seen. Only the address, shape and type of a stack are cached; they are right
for any array at that address with that shape and type.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from sgmv.backend import kernels
from sgmv.checks import check_dtype, check_matrix, check_y
from sgmv.dtypes import Array, sum_dtype
from sgmv.errors import (
    DtypeError,
    MemoryLayoutError,
    ShapeError,
    UnknownAdapterError,
    ValueRangeError,
    some,
)
from sgmv.ids import BASE_ONLY, Integers, as_ids
from sgmv.launch import run_expand, run_shrink
from sgmv.segment import Segments, of_pairs, segment
from sgmv.table import SlotTable
from sgmv.tensors import as_array, to_float32

Operand: TypeAlias = Any  # a numpy array, or a torch tensor on the CPU
BATCHES_KNOWN = 16  # by what their indices are: all layers of a step have the same
STACKS_KNOWN = 4096  # layers times modules times two: more than any model has


@dataclass(frozen=True, eq=False)
class Weights:
    """Matrices of one shape and type, each contiguous, at these addresses.

    by_input  False: stored as (outputs, inputs), for x @ w.T; True: as (inputs, outputs)
    holds     an array that keeps the memory alive, if the caller does not
    """

    addresses: Integers  # (count,)
    outputs: int
    inputs: int
    dtype: np.dtype[Any]
    by_input: bool = False
    holds: object = None


def rows_of(argument: str, operand: Operand, remedy: str = "") -> Array:
    """The operand as a matrix, axes but the last made one, without a copy where that can be."""
    array = as_array(argument, operand)
    if array.ndim > 2:
        array = array.reshape(math.prod(array.shape[:-1]), array.shape[-1])
    return check_matrix(argument, array, remedy or to_float32(operand))


def output_rows(argument: str, operand: Operand) -> Array:
    """The same of an output: a view, so that what is written to it is in the operand."""
    array = as_array(argument, operand)
    flat = rows_of(argument, array, to_float32(operand))
    if array.size and not np.may_share_memory(array, flat):
        raise MemoryLayoutError(
            argument,
            "axes that can be seen as rows without a copy",
            f"strides {array.strides} for shape {array.shape}",
            "pass it with contiguous rows",
        )
    return flat


def check_output(argument: str, y: Array, n: int, width: int, inputs: dict[str, Array]) -> None:
    """Refuse an output (n, width) that is read-only or shares memory with an input."""
    for name, array in inputs.items():
        check_y(y, n, width, name, array, argument)


class Stack(NamedTuple):
    """Stacked weights (count, outputs, inputs): the argument's name, the addresses, the array."""

    argument: str
    weights: Weights
    array: Array


def stack_of(argument: str, operand: Operand, remedy: str = "") -> Stack:
    """Stacked weights, not copied; a 1 as the second of four axes is left out.

    If the elements of a weight are not contiguous, all are copied, for this call.
    """
    array = as_array(argument, operand)
    if array.ndim == 4 and array.shape[1] == 1:
        array = array[:, 0]
    if array.ndim != 3:
        raise ShapeError(
            argument,
            "(weights, outputs, inputs), or a 1 as the second of four axes",
            str(array.shape),
            "stack one matrix per weight",
        )
    check_dtype(argument, array.dtype, remedy or to_float32(operand))
    if array[:1].flags.c_contiguous:
        key = int(array.ctypes.data), array.strides[0], *array.shape, array.dtype
        return Stack(argument, _stacked(*key), array)
    copy = np.ascontiguousarray(array)
    addresses = copy.ctypes.data + np.arange(len(copy)) * copy.strides[0]
    return Stack(
        argument, Weights(addresses, copy.shape[1], copy.shape[2], copy.dtype, holds=copy), array
    )


@lru_cache(STACKS_KNOWN)
def _stacked(
    address: int, pitch: int, count: int, outputs: int, inputs: int, dtype: np.dtype[Any]
) -> Weights:
    return Weights(address + np.arange(count) * pitch, outputs, inputs, dtype)


def indices_of(argument: str, indices: Operand) -> Integers:
    """Integers (n,) as int64, refused by the argument's name if they are not."""
    if isinstance(indices, list | tuple):
        return as_ids(indices, argument)
    ids = as_array(argument, indices)
    if ids.ndim != 1:
        raise ShapeError(argument, "one dimension", f"shape {ids.shape}", "give one per row")
    if ids.size and ids.dtype.kind not in "iu":
        raise DtypeError(argument, "integers", str(ids.dtype), "convert it to int64")
    if ids.dtype.kind != "i":
        return as_ids(ids, argument)
    return ids.astype(np.int64, copy=False)


def segments_of(argument: str, ids: Integers) -> Segments:
    """The segments of these indices, cached for the latest few batches."""
    return _segments(argument, ids.tobytes())


@lru_cache(BATCHES_KNOWN)
def _segments(argument: str, ids: bytes) -> Segments:
    indices = np.frombuffer(ids, np.int64).copy()
    if len(indices) and indices.min() < BASE_ONLY:
        least = str(indices.min())
        raise ValueRangeError(
            argument, "integers from -1 on", least, "use -1 for rows without an adapter"
        )
    return segment(indices)


@lru_cache(BATCHES_KNOWN)
def batch_of_pairs(ids: bytes, k: int, share_x: bool) -> Segments:
    """A plain batch of pairs by their ids: both products of a layer of experts have the same."""
    return of_pairs(segment(np.frombuffer(ids, np.int64).reshape(-1, k)), share_x)


def check_stacks(segments: Segments, stacks: Sequence[Stack]) -> None:
    """Whether the stacks hold a weight for every index of the batch."""
    for stack in stacks:
        count = len(stack.weights.addresses)
        if segments.S and segments.adapter_ids[-1] >= count:  # they ascend
            beyond = segments.adapter_ids[segments.adapter_ids >= count]
            raise UnknownAdapterError(
                stack.argument,
                f"weights for every index of the batch, {some(beyond)}",
                f"{count}: indices 0..{count - 1}",
                "check the indices; -1 means base only",
            )


def shrink(
    x: Array, slices: tuple[Weights, ...], segments: Segments, dtype: np.dtype[Any]
) -> Array:
    """The rows v (n, slices * r) in sorted order, of one slice after the other; 0 if base only."""
    weights = slices[0]
    table = _remembering(_shrink_table, *slices)(slices)
    v = np.zeros((len(segments.rows), weights.outputs * len(slices)), dtype)
    run_shrink(kernels(None, x.dtype, weights.dtype, None, dtype), table, segments, x, v)
    return v


def expand(y: Array, v: Array, weights: Weights, segments: Segments) -> None:
    """Add v @ w.T to y, v in sorted order, over the columns that y and the weights both have."""
    h_out = min(y.shape[1], weights.outputs)
    table = _remembering(_expand_table, weights)(weights, h_out)
    compiled = kernels(None, None, weights.dtype, y.dtype, v.dtype)
    run_expand(compiled, table, segments, v, y[:, :h_out])


def _remembering(table: Any, *slices: Weights) -> Callable[..., SlotTable]:
    """The cached function; the plain one for weights that are copied, or held, for one call."""
    plain: Callable[..., SlotTable] = table.__wrapped__
    return table if all(each.holds is None for each in slices) else plain


@lru_cache(STACKS_KNOWN)
def _shrink_table(slices: tuple[Weights, ...]) -> SlotTable:
    weights = slices[0]
    wa = np.stack([each.addresses for each in slices], axis=1)
    return _table(weights, weights.inputs, 0, weights.outputs, wa=wa, slices=len(slices))


@lru_cache(STACKS_KNOWN)
def _expand_table(weights: Weights, h_out: int) -> SlotTable:
    size = weights.dtype.itemsize
    strides = size, weights.inputs * size  # from input to input, from output to output
    if weights.by_input:
        strides = weights.outputs * size, size
    return _table(weights, 0, h_out, weights.inputs, wb=weights.addresses, wb_strides=strides)


def _table(
    weights: Weights,
    h_in: int,
    h_out: int,
    r: int,
    *,
    wa: Integers | None = None,
    wb: Integers | None = None,
    wb_strides: tuple[int, int] = (0, 0),
    slices: int = 1,
) -> SlotTable:
    """Every weight is a slot of its own, and its number the id."""
    shared = _slots(len(weights.addresses), r)
    return SlotTable(
        h_in=h_in,
        h_out=h_out,
        dtype=weights.dtype,
        slot_of=shared.slot_of,
        ids=shared.ids,
        slots=shared.ids,
        wa_address=shared.none if wa is None else wa,
        wb_address=shared.none if wb is None else wb,
        ranks=shared.ranks,
        scalings=shared.scalings,
        weights=(),  # the caller keeps them alive
        wb_strides=wb_strides,
        slices=slices,
    )


class _Slots(NamedTuple):
    """What tables of the same number of weights share, where only addresses differ: most of it."""

    slot_of: dict[int, int]
    ids: Integers
    none: Integers  # no addresses
    ranks: Integers
    scalings: npt.NDArray[np.float64]


@lru_cache(BATCHES_KNOWN)
def _slots(count: int, r: int) -> _Slots:
    ids = np.arange(count)
    same = dict(enumerate(ids.tolist()))
    return _Slots(same, ids, np.zeros(count, np.int64), np.full(count, r), np.ones(count))


def add(y: Array, x: Array, weights: Weights, segments: Segments, scaling: float) -> None:
    """Add scaling * x @ w.T to y; base-only rows keep their bits."""
    dtype = sum_dtype(x.dtype, weights.dtype, y.dtype)
    if weights.by_input or weights.inputs < weights.outputs:
        expand(y, scaled(in_order(x, segments, dtype), scaling), weights, segments)
        return
    v = scaled(shrink(x, (weights,), segments, dtype), scaling)
    start = first_adapted(segments)
    with np.errstate(over="ignore", invalid="ignore"):
        y[segments.rows[start:]] += v[start:]


def first_adapted(segments: Segments) -> int:
    """The sorted position of the first row that has an adapter: base-only ones are before it."""
    base = segments.S > 0 and segments.adapter_ids[0] == BASE_ONLY
    return int(segments.seq_start[1]) if base else 0


def in_order(rows: Array, segments: Segments, dtype: np.dtype[Any]) -> Array:
    """A copy of the rows, in sorted order."""
    return rows[segments.rows].astype(dtype, copy=False)


def scaled(v: Array, scaling: float) -> Array:
    """The rows themselves, multiplied in place."""
    if scaling != 1.0:
        with np.errstate(over="ignore", invalid="ignore"):
            v *= scaling
    return v
