"""Punica's calls: one product, or both, of a weight for each row or for each segment.

Source: punica, src/punica/ops/__init__.py.
"""

from __future__ import annotations

import numpy as np

from sgmv.checks import check_count, check_scaling, check_x
from sgmv.compat.punica.pointers import weights_at
from sgmv.dtypes import Array, sum_dtype
from sgmv.errors import DtypeError, ShapeError, ValueRangeError, some
from sgmv.ids import as_ids
from sgmv.products import (
    Operand,
    Stack,
    Weights,
    add,
    check_output,
    check_stacks,
    expand,
    indices_of,
    output_rows,
    rows_of,
    scaled,
    segments_of,
    shrink,
    stack_of,
)
from sgmv.segment import Segments
from sgmv.tensors import as_array, to_float32


def bgmv(
    y: Operand, x: Operand, w_T_all: Operand, indicies: Operand, layer_idx: int, scale: float
) -> None:
    """One product, of a weight for each row.

    Semantics: `y[i] += scale * x[i] @ w_T_all[indicies[i], layer_idx].T`, summed in float32 and
    rounded once; rows of index -1, which Punica does not know, keep their bits.

    y         (n, outputs)  in place
    x         (n, inputs)
    w_T_all   (count, L, outputs, inputs)
    indicies  (n,) integers; Punica's spelling

    Raises ShapeError, DtypeError, MemoryLayoutError, ValueRangeError, UnknownAdapterError; y is
    then as it was. Source: punica, ops/__init__.py, `bgmv`.

    >>> w = np.array([[[[1, 2]]], [[[3, 4]]]], "float32")  # two weights, one layer, 2 -> 1
    >>> y = np.zeros((2, 1), "float32")
    >>> bgmv(y, np.ones((2, 2), "float32"), w, np.array([1, 0]), layer_idx=0, scale=0.5)
    >>> y
    array([[3.5],
           [1.5]], dtype=float32)
    """
    stack = _layer("w_T_all", w_T_all, layer_idx)
    segments = segments_of("indicies", indices_of("indicies", indicies))
    target, rows = _operands(y, x, [stack], segments)
    add(target, rows, stack.weights, segments, check_scaling("scale", scale))


def add_lora_bgmv(
    y: Operand,
    x: Operand,
    wa_T_all: Operand,
    wb_T_all: Operand,
    indicies: Operand,
    layer_idx: int,
    scale: float,
) -> None:
    """Both products of a LoRA delta, of an adapter for each row.

    Semantics: `y[i] += scale * x[i] @ wa_T_all[indicies[i], layer_idx].T @
    wb_T_all[indicies[i], layer_idx].T`; rows of index -1 keep their bits.

    y         (n, h_out)  in place
    x         (n, h_in)
    wa_T_all  (count, L, r, h_in)
    wb_T_all  (count, L, h_out, r)
    indicies  (n,) integers

    Raises as `bgmv`. Source: punica, ops/__init__.py, `add_lora_bgmv`.

    >>> wa, wb = np.ones((1, 1, 1, 2), "float32"), np.ones((1, 1, 2, 1), "float32")
    >>> y = np.zeros((1, 2), "float32")
    >>> add_lora_bgmv(y, np.array([[1, 2]], "float32"), wa, wb, np.array([0]), 0, scale=2.0)
    >>> y
    array([[6., 6.]], dtype=float32)
    """
    wa, wb = _layer("wa_T_all", wa_T_all, layer_idx), _layer("wb_T_all", wb_T_all, layer_idx)
    segments = segments_of("indicies", indices_of("indicies", indicies))
    if wa.weights.outputs != wb.weights.inputs:
        raise ShapeError(
            "wb_T_all",
            f"(count, L, h_out, {wa.weights.outputs}), as wa_T_all has rank {wa.weights.outputs}",
            f"rank {wb.weights.inputs}",
            "pass A and B of the same adapters",
        )
    target, rows = _operands(y, x, [wa, wb], segments)
    scaling = check_scaling("scale", scale)
    _add_lora(target, rows, wa.weights, wb.weights, segments, scaling)


def sgmv(y: Operand, x: Operand, w_ptr: Operand, s: Operand, layer_idx: int) -> None:
    """One product, of a weight for each segment, in either direction.

    Semantics: `y[s[i]:s[i+1]] += x[s[i]:s[i+1]] @ deref(w_ptr[i])[layer_idx].T`, summed in float32
    and rounded once. An empty segment's pointer is not looked at.

    y      (n, outputs)  in place
    x      (n, inputs)
    w_ptr  (S,) int64, addresses of (L, outputs, inputs) in x's type
    s      (S+1,) integers, ascending from 0 to n

    Raises ShapeError, DtypeError, MemoryLayoutError, ValueRangeError; y is then as it was. Punica
    has it for shrink alone. Source: punica, ops/__init__.py, `sgmv`.

    >>> w = np.array([[[1, 2]]], "float32")  # one layer, 2 -> 1
    >>> y = np.zeros((2, 1), "float32")
    >>> sgmv(y, np.ones((2, 2), "float32"), np.array([w.ctypes.data]), np.array([0, 2]), 0)
    >>> y
    array([[3.],
           [3.]], dtype=float32)
    """
    _sgmv(y, x, w_ptr, s, layer_idx, by_input=False)


def sgmv_cutlass(y: Operand, x: Operand, w_ptr: Operand, s: Operand, layer_idx: int) -> None:
    """`sgmv` over weights in the other order.

    Semantics: `y[s[i]:s[i+1]] += x[s[i]:s[i+1]] @ deref(w_ptr[i])[layer_idx]`, of weights (L,
    inputs, outputs) in x's type. Arguments and errors as `sgmv`.

    Source: punica, ops/__init__.py, `sgmv_cutlass`.

    >>> w = np.array([[[1, 2]]], "float32")  # one layer, 1 -> 2
    >>> y = np.zeros((1, 2), "float32")
    >>> sgmv_cutlass(y, np.ones((1, 1), "float32"), np.array([w.ctypes.data]), np.array([0, 1]), 0)
    >>> y
    array([[1., 2.]], dtype=float32)
    """
    _sgmv(y, x, w_ptr, s, layer_idx, by_input=True)


def add_lora_sgmv(
    y: Operand,
    x: Operand,
    wa_ptr: Operand,
    wb_ptr: Operand,
    s: Operand,
    layer_idx: int,
    lora_rank: int,
) -> None:
    """Both products of a LoRA delta, of an adapter for each segment: `sgmv` twice.

    Semantics: `y[s[i]:s[i+1]] += x[s[i]:s[i+1]] @ wa.T @ wb.T` with wa =
    `deref(wa_ptr[i])[layer_idx]`, wb likewise.

    y          (n, h_out)  in place
    x          (n, h_in)
    wa_ptr     (S,) int64, addresses of (L, r, h_in)
    wb_ptr     (S,) int64, addresses of (L, h_out, r), the order of `sgmv`: Punica has none yet
    s          (S+1,) integers, ascending from 0 to n
    lora_rank  r

    Raises as `sgmv`. Source: punica, ops/__init__.py, `add_lora_sgmv`, which stops half-way.

    >>> wa, wb = np.ones((1, 1, 2), "float32"), np.array([[[1], [10]]], "float32")
    >>> y = np.zeros((1, 2), "float32")
    >>> pointers = np.array([wa.ctypes.data]), np.array([wb.ctypes.data])
    >>> add_lora_sgmv(y, np.array([[1, 2]], "float32"), *pointers, np.array([0, 1]), 0, lora_rank=1)
    >>> y
    array([[ 3., 30.]], dtype=float32)
    """
    _add_lora_sgmv(y, x, wa_ptr, wb_ptr, s, layer_idx, lora_rank, (False, False))


def add_lora_sgmv_cutlass(
    y: Operand,
    x: Operand,
    wa_ptr: Operand,
    wb_ptr: Operand,
    s: Operand,
    layer_idx: int,
    lora_rank: int,
) -> None:
    """The same of weights in the other order: `sgmv_cutlass` twice.

    Semantics: `y[s[i]:s[i+1]] += x[s[i]:s[i+1]] @ wa @ wb`, of wa (L, h_in, r) and wb (L, r,
    h_out). Arguments and errors as `add_lora_sgmv`.

    Source: punica, ops/__init__.py, `add_lora_sgmv_cutlass`.

    >>> wa, wb = np.ones((1, 2, 1), "float32"), np.array([[[1, 10]]], "float32")
    >>> y, x = np.zeros((1, 2), "float32"), np.array([[1, 2]], "float32")
    >>> pointers = np.array([wa.ctypes.data]), np.array([wb.ctypes.data])
    >>> add_lora_sgmv_cutlass(y, x, *pointers, np.array([0, 1]), 0, lora_rank=1)
    >>> y
    array([[ 3., 30.]], dtype=float32)
    """
    _add_lora_sgmv(y, x, wa_ptr, wb_ptr, s, layer_idx, lora_rank, (True, True))


def add_lora_sgmv_custom_cutlass(
    y: Operand,
    x: Operand,
    wa_ptr: Operand,
    wb_ptr: Operand,
    s: Operand,
    layer_idx: int,
    lora_rank: int,
) -> None:
    """Both products of a LoRA delta, of weights as `LoraWeight` has them.

    Semantics: `y[s[i]:s[i+1]] += x[s[i]:s[i+1]] @ wa.T @ wb`, of wa (L, r, h_in) and wb (L, r,
    h_out). Arguments and errors as `add_lora_sgmv`.

    Source: punica, ops/__init__.py, `add_lora_sgmv_custom_cutlass`.

    >>> from sgmv.compat.punica import BatchedLoraWeight, LoraWeight
    >>> weight = LoraWeight(1, in_features=2, out_features=2, lora_rank=1, dtype="float32")
    >>> weight.copy_from_tensor(np.ones((1, 1, 2)), np.array([[[1], [10]]]))
    >>> batched = BatchedLoraWeight([weight])
    >>> y, x = np.zeros((1, 2), "float32"), np.array([[1, 2]], "float32")
    >>> add_lora_sgmv_custom_cutlass(y, x, batched.wa_ptr, batched.wb_ptr, np.array([0, 1]), 0, 1)
    >>> y
    array([[ 3., 30.]], dtype=float32)
    """
    _add_lora_sgmv(y, x, wa_ptr, wb_ptr, s, layer_idx, lora_rank, (False, True))


def _layer(argument: str, weights: Operand, layer_idx: int) -> Stack:
    """One layer of stacked weights (count, L, outputs, inputs)."""
    array = as_array(argument, weights)
    if array.ndim != 4:
        raise ShapeError(
            argument, "(weights, layers, outputs, inputs)", str(array.shape), "give all four axes"
        )
    if check_count("layer_idx", layer_idx, 0) >= array.shape[1]:
        raise ValueRangeError(
            "layer_idx",
            f"a layer of {argument}, which has {array.shape[1]}",
            str(layer_idx),
            "count layers from 0",
        )
    return stack_of(argument, array[:, layer_idx], to_float32(weights))


def _segments(s: Operand, n: int) -> Segments:
    """The segments in their own order; each has its own weight, and its number is the id."""
    seq_start = as_ids(s, "s") if isinstance(s, list) else as_array("s", s)
    if seq_start.ndim != 1 or len(seq_start) == 0:
        raise ShapeError(
            "s", "S + 1 offsets", f"shape {seq_start.shape}", "give s[0] == 0 at least"
        )
    if seq_start.dtype.kind not in "iu":
        raise DtypeError("s", "integers", str(seq_start.dtype), "convert it to int32")
    seq_start = as_ids(seq_start, "s")
    if seq_start[0] != 0 or seq_start[-1] != n or (seq_start[1:] < seq_start[:-1]).any():
        raise ValueRangeError(
            "s",
            f"ascending offsets from 0 to {n}, the rows of x",
            some(seq_start.tolist()),
            "make it the running sum of the segments' lengths",
        )
    return Segments(np.arange(n), seq_start, np.arange(len(seq_start) - 1))


def _operands(
    y: Operand, x: Operand, stacks: list[Stack], segments: Segments
) -> tuple[Array, Array]:
    """The arrays of y and x, checked against the stacks that x passes one after the other."""
    target, rows = output_rows("y", y), rows_of("x", x)
    check_stacks(segments, stacks)
    check_x(rows, segments.n, stacks[0].weights.inputs)
    operands = {"x": rows, **{stack.argument: stack.array for stack in stacks}}
    check_output("y", target, segments.n, stacks[-1].weights.outputs, operands)
    return target, rows


def _sgmv(
    y: Operand, x: Operand, w_ptr: Operand, s: Operand, layer_idx: int, *, by_input: bool
) -> None:
    target, rows = output_rows("y", y), rows_of("x", x)
    segments = _segments(s, len(rows))
    check_output("y", target, len(rows), target.shape[1], {"x": rows})
    weights = weights_at(
        "w_ptr",
        w_ptr,
        segments.lengths > 0,
        check_count("layer_idx", layer_idx, 0),
        target.shape[1],
        rows.shape[1],
        rows.dtype,
        by_input=by_input,
        apart_from=target,
    )
    add(target, rows, weights, segments, 1.0)


def _add_lora_sgmv(
    y: Operand,
    x: Operand,
    wa_ptr: Operand,
    wb_ptr: Operand,
    s: Operand,
    layer_idx: int,
    lora_rank: int,
    by_input: tuple[bool, bool],
) -> None:
    target, rows = output_rows("y", y), rows_of("x", x)
    segments = _segments(s, len(rows))
    check_output("y", target, len(rows), target.shape[1], {"x": rows})
    layer, r = check_count("layer_idx", layer_idx, 0), check_count("lora_rank", lora_rank, 0)
    used, h_in, h_out = segments.lengths > 0, rows.shape[1], target.shape[1]
    wa, wb = (
        weights_at(
            argument, pointers, used, layer, outputs, inputs, rows.dtype,
            by_input=turned, apart_from=target,
        )
        for argument, pointers, outputs, inputs, turned in (
            ("wa_ptr", wa_ptr, r, h_in, by_input[0]),
            ("wb_ptr", wb_ptr, h_out, r, by_input[1]),
        )
    )  # fmt: skip
    _add_lora(target, rows, wa, wb, segments, 1.0)


def _add_lora(
    y: Array, x: Array, wa: Weights, wb: Weights, segments: Segments, scaling: float
) -> None:
    dtype = sum_dtype(x.dtype, wa.dtype, wb.dtype, y.dtype)
    if wa.by_input:
        v = np.zeros((segments.n, wa.outputs), dtype)
        add(v, x, wa, segments, 1.0)
    else:
        v = shrink(x, (wa,), segments, dtype)
    expand(y, scaled(v, scaling), wb, segments)
