"""`punica.ops`, on the CPU: the same calls, arguments and in-place meaning.

    bgmv, add_lora_bgmv                 an index per row, into stacked weights
    sgmv, add_lora_sgmv                 a pointer per segment; weights (L, outputs, inputs)
    sgmv_cutlass, add_lora_sgmv_cutlass                         weights (L, inputs, outputs)
    add_lora_sgmv_custom_cutlass        wa of the former, wb of the latter: LoraWeight's

Operands are numpy arrays, or torch tensors on the CPU, which are not copied. All float types, every
rank and width, both directions: also what Punica never finished. v stays in float32 between the
two products, where Punica rounds it to half. Weight pointers are addresses, as in Punica: see
pointers.py. The weights behind them are of x's type.

Source: punica, src/punica/ops/__init__.py, src/punica/utils/lora.py.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from sgmv.adapter import check_scaling
from sgmv.checks import check_x
from sgmv.compat.arrays import as_array, to_float32
from sgmv.compat.pointers import own, weights_at
from sgmv.compat.products import (
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
from sgmv.dtypes import BITS, Array, check_dtype, sum_dtype
from sgmv.errors import DtypeError, ShapeError, ValueRangeError, shown, some
from sgmv.segment import Segments, as_ids, check_count, fits_memory


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

    >>> weight = LoraWeight(1, in_features=2, out_features=2, lora_rank=1, dtype="float32")
    >>> weight.copy_from_tensor(np.ones((1, 1, 2)), np.array([[[1], [10]]]))
    >>> batched = BatchedLoraWeight([weight])
    >>> y, x = np.zeros((1, 2), "float32"), np.array([[1, 2]], "float32")
    >>> add_lora_sgmv_custom_cutlass(y, x, batched.wa_ptr, batched.wb_ptr, np.array([0, 1]), 0, 1)
    >>> y
    array([[ 3., 30.]], dtype=float32)
    """
    _add_lora_sgmv(y, x, wa_ptr, wb_ptr, s, layer_idx, lora_rank, (False, True))


class LoraWeight:
    """One adapter's weights for all layers of a model, in the orders that Punica's kernels take.

    Semantics: `wa` (L, r, h_in) and `wb` (L, r, h_out), zeros until `copy_from_tensor`; numpy
    arrays, or torch tensors for a torch dtype.

    Raises DtypeError and ValueRangeError for sizes and types that no call takes.
    Source: punica, utils/lora.py, `LoraWeight`.

    >>> LoraWeight(2, in_features=64, out_features=32, lora_rank=8, dtype="float16").wb.shape
    (2, 8, 32)
    """

    def __init__(
        self,
        num_layers: int,
        in_features: int,
        out_features: int,
        lora_rank: int,
        dtype: Any,
        device: Any = "cpu",
    ) -> None:
        if str(device) != "cpu":
            raise ValueRangeError("device", "cpu", str(device), "leave it out")
        sizes = {"num_layers": num_layers, "in_features": in_features}
        sizes |= {"out_features": out_features, "lora_rank": lora_rank}
        layers, h_in, h_out, r = (check_count(name, size, 0) for name, size in sizes.items())
        torch = sys.modules.get("torch")
        if torch is not None and isinstance(dtype, torch.dtype):
            zeros, kind = torch.zeros, dtype
        else:
            zeros, kind = np.zeros, check_dtype("dtype", dtype)
        with fits_memory(", ".join(sizes), f"{layers}, {h_in}, {h_out}, {r}"):
            self.wa: Operand = zeros((layers, r, h_in), dtype=kind)
            self.wb: Operand = zeros((layers, r, h_out), dtype=kind)

    def copy_from_tensor(self, a: Operand, b: Operand) -> None:
        """Copy the weights as PEFT has them: a (L, r, h_in), b (L, h_out, r), any float type."""
        copies = (
            ("a", as_array("a", a), as_array("wa", self.wa)),
            ("b", as_array("b", b), as_array("wb", self.wb).transpose(0, 2, 1)),
        )
        for name, source, target in copies:
            if source.dtype.kind not in "iuf" and source.dtype.name not in BITS:
                raise DtypeError(name, "a float type", str(source.dtype), "convert it first")
            if source.shape != target.shape:
                raise ShapeError(
                    name, str(target.shape), str(source.shape), "pass the weights of all layers"
                )
        with np.errstate(over="ignore", invalid="ignore"):
            for _, source, target in copies:
                target[...] = source

    @property
    def device(self) -> Any:
        """Of torch tensors theirs, else "cpu"."""
        return getattr(self.wa, "device", "cpu")

    @property
    def dtype(self) -> Any:
        """Of the arrays, or tensors."""
        return self.wa.dtype

    @property
    def num_layers(self) -> int:
        return int(self.wa.shape[0])

    @property
    def in_features(self) -> int:
        return int(self.wa.shape[2])

    @property
    def out_features(self) -> int:
        return int(self.wb.shape[2])

    @property
    def lora_rank(self) -> int:
        return int(self.wa.shape[1])


class BatchedLoraWeight:
    """The pointers of a batch, one adapter per segment.

    Semantics: `wa_ptr`, `wb_ptr` (S,) int64 are the addresses of the weights' wa and wb; of torch
    tensors, a torch tensor. `weights` holds them alive, which Punica leaves to its caller.

    Raises ValueRangeError where there are none. Source: punica, utils/lora.py.

    >>> weight = LoraWeight(1, 64, 32, 8, "float32")
    >>> int(BatchedLoraWeight([weight]).wa_ptr[0]) == weight.wa.ctypes.data
    True
    """

    def __init__(self, weights: Sequence[LoraWeight]) -> None:
        if not isinstance(weights, Sequence) or not all(
            isinstance(weight, LoraWeight) for weight in weights
        ):
            kinds = shown(weights)
            raise DtypeError("weights", "a list of LoraWeight", kinds, "make each with LoraWeight")
        if len(weights) == 0:
            raise ValueRangeError("weights", "at least one LoraWeight", "none", "skip the call")
        self.weights = tuple(weights)
        self.wa_ptr: Operand = _pointers([weight.wa for weight in weights])
        self.wb_ptr: Operand = _pointers([weight.wb for weight in weights])


def _pointers(arrays: list[Operand]) -> Operand:
    pointers = np.array([own(array) for array in arrays], np.int64)
    if isinstance(arrays[0], np.ndarray):
        return pointers
    return sys.modules["torch"].from_numpy(pointers)


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
    """Segments as they stand, each with a weight of its own: its number is the id."""
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
