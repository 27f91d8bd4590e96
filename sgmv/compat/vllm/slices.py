"""The products of a layer's slices, such as q, k and v: they share x, and are side by side in y.

    shrink_slices   every slice's v at once, so that x is read once
    expand_slices   each slice's delta into its own columns of y
    linear          both, v kept in sorted order between them

All operands are checked before anything is written.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np

from sgmv.checks import check_count, check_scaling, check_several, check_x
from sgmv.dtypes import Array, sum_dtype
from sgmv.errors import ShapeError
from sgmv.ids import Integers
from sgmv.products import (
    Operand,
    Stack,
    check_output,
    check_stacks,
    expand,
    first_adapted,
    in_order,
    output_rows,
    rows_of,
    scaled,
    segments_of,
    shrink,
    stack_of,
)
from sgmv.segment import Segments
from sgmv.tensors import as_array

Operands: TypeAlias = Any  # one for each slice; or an array of them
Named: TypeAlias = "tuple[str, Operand]"  # the argument's name, and its value
Columns: TypeAlias = "Sequence[tuple[int, int]] | None"  # of each slice: offset, width; None: all


def stacks_of(argument: str, operands: Operands) -> list[Stack]:
    """The weights of each slice; a single array is one slice."""
    if not isinstance(operands, list | tuple):
        return [stack_of(argument, operands)]
    if len(operands) == 0:
        raise ShapeError(argument, "the weights of one slice or more", "none", "pass a tuple")
    return [stack_of(f"{argument}[{i}]", operand) for i, operand in enumerate(operands)]


def one_each(argument: str, operands: Operands, slices: int) -> list[Named]:
    """One operand for each slice, from a sequence or along the first axis of three."""
    if not isinstance(operands, list | tuple):
        array = as_array(argument, operands)
        if array.ndim == 2 and slices == 1:
            operands = [operands]
        elif array.ndim == 3:
            operands = list(operands)
        else:
            expected = "(slices, n, columns), or one array for each slice"
            raise ShapeError(argument, expected, str(array.shape), "pass a tuple")
    if len(operands) != slices:
        raise ShapeError(
            argument, f"one for each of {slices} slices", str(len(operands)), "pass a tuple"
        )
    return [(f"{argument}[{i}]", operand) for i, operand in enumerate(operands)]


def side_by_side(widths: Sequence[int], start: int) -> list[tuple[int, int]]:
    """The offset and width of every slice; each starts where the one before it ends."""
    check_several("output_slices", widths, "the width of each slice")
    found, offset = [], check_count("offset_start", start, 0)
    for width in widths:
        found.append((offset, check_count("output_slices", width, 0)))
        offset += found[-1][1]
    return found


def shrink_slices(
    outputs: list[Named], x: Named, stacks: list[Stack], segments: Segments, scaling: float
) -> None:
    """Write every slice's v to its own output; the rows of x meet all slices at once."""
    rows = rows_of(*x)
    _check_x(x[0], rows, stacks, segments)
    kept = _kept(outputs, rows, stacks, segments)
    scaling = check_scaling("scaling", scaling)
    dtype = sum_dtype(rows.dtype, stacks[0].weights.dtype, *(array.dtype for array in kept))
    slices = tuple(stack.weights for stack in stacks)
    _keep(kept, scaled(shrink(rows, slices, segments, dtype), scaling), segments)


def _check_x(argument: str, x: Array, stacks: list[Stack], segments: Segments) -> None:
    """Refuse rows that do not fit the A of every slice."""
    check_alike(stacks)
    check_stacks(segments, stacks)
    check_x(x, segments.n, stacks[0].weights.inputs, argument)


def check_alike(stacks: list[Stack]) -> None:
    """Refuse the A of slices that are not alike: one call computes all."""
    first = stacks[0].weights
    for stack in stacks[1:]:
        if stack.array.shape != stacks[0].array.shape or stack.weights.dtype != first.dtype:
            raise ShapeError(
                stack.argument,
                f"{stacks[0].array.shape} {first.dtype}, as the first slice's",
                f"{stack.array.shape} {stack.weights.dtype}",
                "pad the slices to one rank, and give each as many adapters",
            )


def _kept(outputs: list[Named], x: Array, stacks: list[Stack], segments: Segments) -> list[Array]:
    """The first r columns of each output, which will hold a slice's v."""
    r, found = stacks[0].weights.outputs, []
    inputs = {"x": x, **{stack.argument: stack.array for stack in stacks}}
    for argument, operand in outputs:
        array = output_rows(argument, operand)[:, :r]
        check_output(argument, array, segments.n, r, inputs)
        found.append(array)
    return found


def _keep(kept: list[Array], v: Array, segments: Segments) -> None:
    """Write each slice's part of v, which is in sorted order, in the order of the batch."""
    with np.errstate(over="ignore", invalid="ignore"):
        for i, array in enumerate(kept):
            r = array.shape[1]
            array[segments.rows] = v[:, i * r : (i + 1) * r]


def expand_one(
    output: Named,
    inputs: Named,
    stack: Stack,
    indices: Integers,
    columns: tuple[int, int] | None,
    add_inputs: bool,
) -> None:
    """Add one slice's delta to y. Inputs past the last output are left out; one serves all."""
    rows, n = rows_of(*inputs), len(output_rows(*output))
    check_x(rows, len(indices), stack.weights.inputs, inputs[0])
    if len(rows) == 1 and n > 1:
        rows, indices = np.broadcast_to(rows, (n, rows.shape[1])), np.repeat(indices, n)
    rows, segments = rows[:n], segments_of("lora_indices_tensor", indices[:n])
    pieces = columns_of(output, [rows], [stack], segments, columns and [columns])
    expand_slices(pieces, [rows], [stack], segments, add_inputs)


def columns_of(
    output: Named, inputs: list[Array], stacks: list[Stack], segments: Segments, columns: Columns
) -> list[Array]:
    """The part of y that each slice is added to; refuses operands that do not fit."""
    y = output_rows(*output)
    widths = [stack.weights.outputs for stack in stacks]
    if columns is None:
        columns = [(0, min(y.shape[1], widths[0]))]
    elif [width for _, width in columns] != widths:
        raise ShapeError(
            stacks[0].argument,
            f"weights with {[width for _, width in columns]} outputs, as the slices are wide",
            str(widths),
            "name the width of every slice",
        )
    if columns and sum(columns[-1]) > y.shape[1]:
        raise ShapeError(
            output[0],
            f"at least {sum(columns[-1])} columns, where the last slice ends",
            str(y.shape),
            "check the slices' offset and widths",
        )
    check_stacks(segments, stacks)
    operands = {stack.argument: stack.array for stack in stacks}
    operands |= {f"input {i}": rows for i, rows in enumerate(inputs)}
    check_output(output[0], y, segments.n, y.shape[1], operands)
    return [y[:, offset : offset + width] for offset, width in columns]


def expand_slices(
    pieces: list[Array],
    inputs: list[Array],
    stacks: list[Stack],
    segments: Segments,
    add_inputs: bool,
) -> None:
    """Add every slice's delta to its part of y; the inputs are in the order of the batch."""
    for piece, rows, stack in zip(pieces, inputs, stacks, strict=True):
        if not add_inputs:
            piece[segments.rows[first_adapted(segments) :]] = 0
        dtype = sum_dtype(rows.dtype, stack.weights.dtype, piece.dtype)
        expand(piece, in_order(rows, segments, dtype), stack.weights, segments)


def linear(
    output: Named,
    x: Named,
    A: list[Stack],
    B: list[Stack],
    segments: Segments,
    columns: Columns,
    scale: float,
    buffers: list[Named],
) -> None:
    """Shrink of all slices, then expand of each; v stays in sorted order between them."""
    rows = rows_of(*x)
    _check_x(x[0], rows, A, segments)
    r = A[0].weights.outputs
    if len(A) != len(B) or any(stack.weights.inputs != r for stack in B):
        raise ShapeError(
            "lora_b_stacked",
            f"{len(A)} slices (num_loras, 1, h_out, {r}), as lora_a_stacked has rank {r}",
            str([stack.array.shape for stack in B]),
            "pass A and B of the same adapters",
        )
    pieces = columns_of(output, [rows], B, segments, columns)
    kept = _kept(buffers, rows, A, segments)
    scale = check_scaling("scale", scale)
    dtype = sum_dtype(rows.dtype, *(stack.weights.dtype for stack in [*A, *B]), pieces[0].dtype)
    v = scaled(shrink(rows, tuple(stack.weights for stack in A), segments, dtype), scale)
    _keep(kept, v, segments)
    for i, (piece, stack) in enumerate(zip(pieces, B, strict=True)):
        expand(piece, v[:, i * r : (i + 1) * r], stack.weights, segments)
