"""vLLM's LoRA operations, on the CPU: those of `torch_ops`, and the wrapper that its layers call.

    bgmv_shrink, bgmv_expand, bgmv_expand_slice     an index per row
    sgmv_shrink, sgmv_expand, sgmv_expand_slice     an index per run of rows
    PunicaWrapper                                   the metadata of a step, made once for all layers

The same arguments and in-place meaning. Operands are numpy arrays, or torch tensors on the CPU,
which are not copied. Weights are stacked, (num_loras, r, h_in) and (num_loras, h_out, r), or with a
middle axis of 1, and read where they stand: vLLM gathers one for every row.

Rows of index -1 are base only: zero in shrink's output, and never written by expand. Operands are
widened, not cast to the output's type: a half y gets a sum of float32, rounded once.

Source: vLLM, vllm/lora/ops/torch_ops/lora_ops.py, vllm/lora/punica_wrapper/punica_cpu.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from sgmv.adapter import check_scaling
from sgmv.checks import check_x
from sgmv.compat.arrays import as_array
from sgmv.compat.products import (
    Operand,
    Stack,
    check_output,
    check_stacks,
    expand,
    first_adapted,
    in_order,
    indices_of,
    output_rows,
    rows_of,
    scaled,
    segments_of,
    shrink,
    stack_of,
)
from sgmv.dtypes import Array, sum_dtype
from sgmv.errors import (
    ShapeError,
    StackError,
    UnknownAdapterError,
    ValueRangeError,
    some,
)
from sgmv.kernels.plan import BASE_ONLY
from sgmv.layouts.rows import row_ids
from sgmv.layouts.vllm import VllmV0, vllm_v0
from sgmv.segment import Integers, Segments, check_count, check_several, fits_memory, segment

Operands: TypeAlias = Any  # one for each slice; or an array of them


def bgmv_shrink(
    inputs: Operand,
    lora_b_weights: Operand,
    output_tensor: Operand,
    lora_indices_tensor: Operand,
    scaling: float = 1.0,
) -> None:
    """Every row times its own A: the first half of a LoRA delta.

    Semantics: `output[i, :r] = scaling * inputs[i] @ W[lora_indices[i]].T`; 0 for an index of -1.
    Columns from r on keep their bits.

    inputs               (n, h_in)
    lora_b_weights       W (num_loras, r, h_in); vLLM's name, though they are A
    output_tensor        (n, r or more)  in place
    lora_indices_tensor  (n,) integers from -1 to num_loras - 1

    Raises ShapeError, DtypeError, MemoryLayoutError, ValueRangeError, UnknownAdapterError; the
    output is then as it was. Source: vLLM, lora_ops.py, `bgmv_shrink`.

    >>> A, out = np.array([[[1, 2]], [[3, 4]]], "float32"), np.ones((2, 1), "float32")
    >>> bgmv_shrink(np.ones((2, 2), "float32"), A, out, np.array([1, -1]), scaling=0.5)
    >>> out
    array([[3.5],
           [0. ]], dtype=float32)
    """
    ids = indices_of("lora_indices_tensor", lora_indices_tensor)
    output, weights = ("output_tensor", output_tensor), stack_of("lora_b_weights", lora_b_weights)
    _shrink([output], ("inputs", inputs), [weights], _segments(ids), scaling)


def sgmv_shrink(
    inputs: Operand,
    lora_a_weights: Operand,
    output_tensor: Operand,
    b_seq_start_loc: Operand,
    seq_len_tensor: Operand,
    lora_indices_tensor: Operand,
    batches: int,
    max_seq_length: int,
    token_nums: int,
    scaling: float,
) -> None:
    """`bgmv_shrink` with an index for each run of rows, as `layouts.vllm_v0` has them.

    Semantics: batch b is rows `b_seq_start_loc[b] : b_seq_start_loc[b] + seq_len_tensor[b]`, all of
    index `lora_indices_tensor[b]`; one follows the other.

    b_seq_start_loc, seq_len_tensor, lora_indices_tensor  (batches,) integers
    batches, max_seq_length, token_nums  how many, the longest, all their rows

    Other arguments and errors as `bgmv_shrink`. Source: vLLM, lora_ops.py, `sgmv_shrink`.

    >>> A, out = np.array([[[1, 2]], [[3, 4]]], "float32"), np.ones((3, 1), "float32")
    >>> x = np.ones((3, 2), "float32")
    >>> sgmv_shrink(x, A, out, np.array([0, 2]), np.array([2, 1]), np.array([1, 0]), 2, 2, 3, 1.0)
    >>> out.ravel()
    array([7., 7., 3.], dtype=float32)
    """
    ids = _exploded(b_seq_start_loc, seq_len_tensor, lora_indices_tensor, batches, token_nums)
    output, weights = ("output_tensor", output_tensor), stack_of("lora_a_weights", lora_a_weights)
    _shrink([output], ("inputs", inputs), [weights], _segments(ids), scaling)


def bgmv_expand(
    inputs: Operand,
    lora_b_weights: Operand,
    output_tensor: Operand,
    lora_indices_tensor: Operand,
    add_inputs: bool = True,
) -> None:
    """Every row times its own B, added to the output or in its place.

    Semantics: `output[i, :h] += inputs[i] @ W[lora_indices[i]].T`, or `=` without add_inputs, over
    the h columns that both have; rows of index -1 are not touched. Of more inputs than outputs the
    first are taken; a single one serves all outputs.

    inputs               (n, r)
    lora_b_weights       W (num_loras, h_out, r)
    output_tensor        (n, any width)  in place
    lora_indices_tensor  (n,) integers from -1 to num_loras - 1

    Raises as `bgmv_shrink`. Source: vLLM, lora_ops.py, `bgmv_expand`.

    >>> B, out = np.array([[[1], [2]]], "float32"), np.ones((2, 2), "float32")
    >>> bgmv_expand(np.full((2, 1), 3, "float32"), B, out, np.array([0, -1]))
    >>> out
    array([[4., 7.],
           [1., 1.]], dtype=float32)
    """
    ids = indices_of("lora_indices_tensor", lora_indices_tensor)
    output, weights = ("output_tensor", output_tensor), stack_of("lora_b_weights", lora_b_weights)
    _expand_rows(output, ("inputs", inputs), weights, ids, None, add_inputs)


def sgmv_expand(
    inputs: Operand,
    lora_b_weights: Operand,
    output_tensor: Operand,
    b_seq_start_loc: Operand,
    seq_len_tensor: Operand,
    lora_indices_tensor: Operand,
    batches: int,
    max_seq_length: int,
    token_nums: int,
    add_inputs: bool = False,
) -> None:
    """`bgmv_expand` with an index for each run of rows; add_inputs is False if left out.

    Semantics: `bgmv_expand` of each run's rows. Arguments as there and in `sgmv_shrink`.
    Raises as they do. Source: vLLM, lora_ops.py, `sgmv_expand`.

    >>> B, out = np.array([[[1], [2]]], "float32"), np.ones((2, 2), "float32")
    >>> v, runs = np.array([[3], [4]], "float32"), (np.array([0]), np.array([2]), np.array([0]))
    >>> sgmv_expand(v, B, out, *runs, 1, 2, 2)
    >>> out
    array([[3., 6.],
           [4., 8.]], dtype=float32)
    """
    ids = _exploded(b_seq_start_loc, seq_len_tensor, lora_indices_tensor, batches, token_nums)
    output, weights = ("output_tensor", output_tensor), stack_of("lora_b_weights", lora_b_weights)
    _expand_rows(output, ("inputs", inputs), weights, ids, None, add_inputs)


def bgmv_expand_slice(
    inputs: Operand,
    lora_b_weights: Operand,
    output_tensor: Operand,
    lora_indices_tensor: Operand,
    slice_offset: int,
    slice_size: int,
    add_inputs: bool = True,
) -> None:
    """`bgmv_expand` into some of the columns.

    Semantics: `output[i, slice_offset : slice_offset + slice_size]` takes the place of output[i];
    the weights have just so many columns, and the others keep their bits.

    Arguments and errors as `bgmv_expand`. Source: vLLM, lora_ops.py, `bgmv_expand_slice`.

    >>> B, out = np.array([[[1], [2]]], "float32"), np.zeros((1, 4), "float32")
    >>> bgmv_expand_slice(np.full((1, 1), 3, "float32"), B, out, np.array([0]), 1, 2)
    >>> out
    array([[0., 3., 6., 0.]], dtype=float32)
    """
    ids = indices_of("lora_indices_tensor", lora_indices_tensor)
    output, weights = ("output_tensor", output_tensor), stack_of("lora_b_weights", lora_b_weights)
    columns = _columns(slice_offset, slice_size)
    _expand_rows(output, ("inputs", inputs), weights, ids, columns, add_inputs)


def sgmv_expand_slice(
    inputs: Operand,
    lora_b_weights: Operand,
    output_tensor: Operand,
    b_seq_start_loc: Operand,
    seq_len_tensor: Operand,
    lora_indices_tensor: Operand,
    batches: int,
    max_seq_length: int,
    token_nums: int,
    slice_offset: int,
    slice_size: int,
    add_inputs: bool = False,
) -> None:
    """`bgmv_expand_slice` with an index for each run of rows; add_inputs is False if left out.

    Semantics: `bgmv_expand_slice` of each run's rows. Arguments as there and in `sgmv_shrink`.
    Raises as they do. Source: vLLM, lora_ops.py, `sgmv_expand_slice`.

    >>> B, out = np.array([[[1], [2]]], "float32"), np.ones((1, 4), "float32")
    >>> v, runs = np.array([[3]], "float32"), (np.array([0]), np.array([1]), np.array([0]))
    >>> sgmv_expand_slice(v, B, out, *runs, 1, 1, 1, 2, 2)
    >>> out
    array([[1., 1., 3., 6.]], dtype=float32)
    """
    ids = _exploded(b_seq_start_loc, seq_len_tensor, lora_indices_tensor, batches, token_nums)
    output, weights = ("output_tensor", output_tensor), stack_of("lora_b_weights", lora_b_weights)
    columns = _columns(slice_offset, slice_size)
    _expand_rows(output, ("inputs", inputs), weights, ids, columns, add_inputs)


@dataclass(frozen=True)
class LoRAMapping:
    """Which adapter each row, and each sampled row, belongs to: what a step tells the wrapper.

    Semantics: ids are `LoRARequest.lora_int_id`, >= 1; 0 is the base model.

    index_mapping   (n,) the id of each row
    prompt_mapping  the id of each row that logits are computed for
    is_prefill      whether the step is one

    Source: vLLM, vllm/lora/layers/utils.py.

    >>> LoRAMapping((7, 7, 0), (7, 0), is_prefill=True).index_mapping
    (7, 7, 0)
    """

    index_mapping: Sequence[int]
    prompt_mapping: Sequence[int]
    is_prefill: bool = False


class PunicaWrapper:
    """What vLLM's LoRA layers call: metadata made once for each step, then the products.

    Semantics: `update_metadata`, then any of the products for every layer; each takes as many rows
    as the metadata has. Shrink's v goes on in float32.

    max_num_batched_tokens  the most rows of a step
    max_batches             not needed here: vLLM's buffers have as many runs of rows
    device                  "cpu"

    Source: vLLM, punica_cpu.py, `PunicaWrapperCPU`.

    >>> wrapper = PunicaWrapper(max_num_batched_tokens=8, max_batches=8)
    >>> wrapper.update_metadata(LoRAMapping((7, 0), (7, 0)), [None, 7], max_loras=2)
    >>> wrapper.token_lora_indices
    array([ 1, -1])
    >>> A, B = np.ones((2, 1, 1, 3), "float32"), np.ones((2, 1, 4, 1), "float32")
    >>> x, y = np.ones((2, 3), "float32"), np.zeros((2, 4), "float32")
    >>> wrapper.add_lora_linear(y, x, (A,), (B,), 0.5, (4,))
    >>> y
    array([[1.5, 1.5, 1.5, 1.5],
           [0. , 0. , 0. , 0. ]], dtype=float32)
    """

    def __init__(
        self, max_num_batched_tokens: int, max_batches: int, device: Any = "cpu", **kwargs: Any
    ) -> None:
        if str(device) != "cpu":
            raise ValueRangeError("device", "cpu", str(device), "leave it out")
        self.most_rows = check_count("max_num_batched_tokens", max_num_batched_tokens, 0)
        self.is_prefill = False
        self.metadata = vllm_v0(())
        self._tokens = self._sampled = segment(())

    def update_metadata(
        self,
        mapping: LoRAMapping,
        lora_index_to_id: Sequence[int | None],
        max_loras: int,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        """Make a step's metadata, for all of its layers.

        Semantics: an id's index is its place in lora_index_to_id; that of id 0 is -1.

        mapping           LoRAMapping, or vLLM's own
        lora_index_to_id  the id in each slot, None where it is free
        max_loras         how many slots there are
        args, kwargs      what else vLLM passes, such as the vocabulary's size: not needed here

        Raises StackError for more slots than max_loras, ValueRangeError for more rows than the
        wrapper was made for, UnknownAdapterError for ids in no slot; the metadata is then as it
        was.

        >>> wrapper = PunicaWrapper(8, 8)
        >>> wrapper.update_metadata(LoRAMapping((7, 7, 0), (7, 0)), [None, 7], max_loras=2)
        >>> wrapper.token_lora_indices, wrapper.sampler_indices
        (array([ 1,  1, -1]), array([ 1, -1]))
        """
        slots = _slots(lora_index_to_id)
        if len(lora_index_to_id) > check_count("max_loras", max_loras, 1):
            raise StackError(
                "lora_index_to_id",
                f"at most max_loras = {max_loras} slots",
                str(len(lora_index_to_id)),
                "raise max_loras",
            )
        tokens, sampled = (
            vllm_v0(_indices(name, getattr(mapping, name, None), slots))
            for name in ("index_mapping", "prompt_mapping")
        )
        if tokens.token_nums > self.most_rows:
            raise ValueRangeError(
                "index_mapping",
                f"at most max_num_batched_tokens = {self.most_rows} rows",
                str(tokens.token_nums),
                "make the wrapper for more",
            )
        self.metadata, self.is_prefill = tokens, bool(mapping.is_prefill)
        self._tokens, self._sampled = (segment(v0.adapter_ids()) for v0 in (tokens, sampled))

    @property
    def token_lora_indices(self) -> Integers:
        """(n,) the index of each row, -1 = base only."""
        return row_ids(self._tokens)

    @property
    def sampler_indices(self) -> Integers:
        """The index of each row that logits are computed for."""
        return row_ids(self._sampled)

    @property
    def no_lora(self) -> bool:
        """Whether all rows are base only."""
        return self.metadata.no_lora

    @property
    def prefill_metadata(self) -> tuple[Integers, Integers, Integers, int, int, int]:
        """What `sgmv_shrink` and the like take, in their order."""
        v0: VllmV0 = self.metadata
        arrays = v0.b_seq_start_loc, v0.seq_len_tensor, v0.lora_indices_tensor
        return (*arrays, v0.batches, v0.max_seq_length, v0.token_nums)

    def add_shrink(
        self, y: Operands, x: Operand, lora_a_stacked: Operands, scale: float, **kwargs: Any
    ) -> None:
        """The first product, of one slice or of several; x is read once.

        Semantics: `y[i][:, :r] = scale * x @ A.T` with A of slice i and of each row's index; 0 on
        base-only rows.

        y               of each slice (n, r or more); or (slices, n, r or more)  in place
        x               (n, h_in)
        lora_a_stacked  of each slice (num_loras, 1, r, h_in), alike in shape and type
        """
        stacks = _stacks("lora_a_stacked", lora_a_stacked)
        _shrink(_each("y", y, len(stacks)), ("x", x), stacks, self._tokens, scale)

    def add_expand(
        self,
        y: Operand,
        x: Operands,
        lora_b_stacked: Operands,
        output_slices: Sequence[int],
        offset_start: int = 0,
        add_inputs: bool = True,
        **kwargs: Any,
    ) -> None:
        """The second product, of one slice or of several, side by side in y.

        Semantics: `y[:, offset : offset + output_slices[i]] += x[i] @ B.T` with B of slice i and of
        each row's index; the first offset is offset_start, every other where the last slice ends.

        y               (n, h_out)  in place
        x               of each slice (n, r); or (slices, n, r)
        lora_b_stacked  of each slice (num_loras, 1, output_slices[i], r)
        add_inputs      False: `=`, on rows that have an adapter
        """
        stacks = _stacks("lora_b_stacked", lora_b_stacked)
        rows = [rows_of(*part) for part in _each("x", x, len(stacks))]
        for i, (part, stack) in enumerate(zip(rows, stacks, strict=True)):
            check_x(part, self._tokens.n, stack.weights.inputs, f"x[{i}]")
        columns = _side_by_side(output_slices, offset_start)
        pieces = _pieces(("y", y), rows, stacks, self._tokens, columns)
        _expand(pieces, rows, stacks, self._tokens, add_inputs)

    def add_lora_embedding(
        self,
        y: Operand,
        x: Operand,
        lora_b_stacked: Operand,
        add_inputs: bool = True,
        **kwargs: Any,
    ) -> None:
        """The second product of an embedding, whose first is a look-up that the layer has made.

        Semantics: `y += x @ B.T` with B of each row's index.

        y (n, h_out) in place   x (n, r)   lora_b_stacked (num_loras, 1, h_out, r)
        """
        stack = stack_of("lora_b_stacked", lora_b_stacked)
        _expand_rows(("y", y), ("x", x), stack, self.token_lora_indices, None, add_inputs)

    def add_lora_linear(
        self,
        y: Operand,
        x: Operand,
        lora_a_stacked: Operands,
        lora_b_stacked: Operands,
        scale: float,
        output_slices: Sequence[int],
        *,
        buffer: Operands | None = None,
        **kwargs: Any,
    ) -> None:
        """Both products of a linear layer: of one slice, or of several, as qkv or gate and up.

        Semantics: `y[:, offset : offset + output_slices[i]] += scale * x @ A.T @ B.T` with A and B
        of slice i and of each row's index, side by side from column 0; x is read once.

        y               (n, h_out)  in place
        x               (n, h_in)
        lora_a_stacked  of each slice (num_loras, 1, r, h_in), alike in shape and type
        lora_b_stacked  of each slice (num_loras, 1, output_slices[i], r)
        buffer          where each slice's v is left, as add_shrink leaves it; not needed

        >>> wrapper, one = PunicaWrapper(8, 8), np.ones((1, 1, 2, 1), "float32")
        >>> wrapper.update_metadata(LoRAMapping((1,), (1,)), [1], max_loras=1)
        >>> y, A = np.zeros((1, 3), "float32"), np.ones((1, 1, 1, 2), "float32")
        >>> wrapper.add_lora_linear(y, A[0, 0], (A, A), (one, one[:, :, :1]), 0.5, (2, 1))
        >>> y
        array([[1., 1., 1.]], dtype=float32)
        """
        A, B = _stacks("lora_a_stacked", lora_a_stacked), _stacks("lora_b_stacked", lora_b_stacked)
        buffers = [] if buffer is None else _each("buffer", buffer, len(A))
        columns = _side_by_side(output_slices, 0)
        _both(("y", y), ("x", x), A, B, self._tokens, columns, scale, buffers)

    def add_lora_logits(
        self,
        y: Operand,
        x: Operand,
        lora_a_stacked: Operand,
        lora_b_stacked: Operand,
        scale: float,
        *,
        buffer: Operand | None = None,
        **kwargs: Any,
    ) -> None:
        """Both products of the output layer, on the rows that logits are computed for.

        Semantics: `y += scale * x @ A.T @ B.T` with A and B of each row's `sampler_indices`, over
        the columns that y and B both have.

        y               (rows, vocabulary)  in place
        x               (rows, h_in)
        lora_a_stacked  (num_loras, 1, r, h_in)
        lora_b_stacked  (num_loras, 1, vocabulary, r)
        buffer          where v is left; not needed
        """
        A, B = (
            stack_of("lora_a_stacked", lora_a_stacked),
            stack_of("lora_b_stacked", lora_b_stacked),
        )
        buffers = [] if buffer is None else [("buffer", buffer)]
        _both(("y", y), ("x", x), [A], [B], self._sampled, None, scale, buffers)


def _slots(lora_index_to_id: Sequence[int | None]) -> dict[int, int]:
    """The index of each id; ids are of any size, as vLLM may make them of hashes."""
    check_several("lora_index_to_id", lora_index_to_id, "an id, or None, for each slot")
    return {
        check_count("lora_index_to_id", i, 1, math.inf): slot
        for slot, i in enumerate(lora_index_to_id)
        if i is not None
    }


def _indices(argument: str, ids: Any, slots: Mapping[int, int]) -> list[int]:
    """The index of each row's id, -1 for 0."""
    check_several(argument, ids, "an id for each row, of a LoRAMapping")
    found = ids.tolist() if isinstance(ids, np.ndarray) else list(ids)
    if set(map(type, found)) != {int}:  # each by itself takes longer
        found = [check_count(argument, i, BASE_ONLY, math.inf) for i in found]
    unknown = [i for i in found if i > 0 and i not in slots]
    if unknown:
        raise UnknownAdapterError(
            argument,
            f"0 or ids that have a slot, {some(slots)}",
            some(dict.fromkeys(unknown)),
            "load those adapters first, or name 0 for base only",
        )
    return [slots[i] if i > 0 else BASE_ONLY for i in found]


Named: TypeAlias = "tuple[str, Operand]"  # by what the caller calls it
Columns: TypeAlias = "Sequence[tuple[int, int]] | None"  # of each slice: offset, width; None: all


def _stacks(argument: str, operands: Operands) -> list[Stack]:
    """The weights of each slice; one array alone is that of one slice."""
    if not isinstance(operands, list | tuple):
        return [stack_of(argument, operands)]
    if len(operands) == 0:
        raise ShapeError(argument, "the weights of one slice or more", "none", "pass a tuple")
    return [stack_of(f"{argument}[{i}]", operand) for i, operand in enumerate(operands)]


def _each(argument: str, operands: Operands, slices: int) -> list[Named]:
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


def _side_by_side(widths: Sequence[int], start: int) -> list[tuple[int, int]]:
    """Offset and width of every slice, each where the last one ends."""
    check_several("output_slices", widths, "the width of each slice")
    found, offset = [], check_count("offset_start", start, 0)
    for width in widths:
        found.append((offset, check_count("output_slices", width, 0)))
        offset += found[-1][1]
    return found


def _columns(offset: int, width: int) -> tuple[int, int]:
    """Offset and width of the one slice that a call names."""
    return check_count("slice_offset", offset, 0), check_count("slice_size", width, 0)


def _segments(ids: Integers) -> Segments:
    return segments_of("lora_indices_tensor", ids)


def _exploded(
    starts: Operand, lengths: Operand, indices: Operand, batches: int, token_nums: int
) -> Integers:
    """The index of each row, from those of runs that follow one another."""
    batches, token_nums = (
        check_count("batches", batches, 0),
        check_count("token_nums", token_nums, 0),
    )
    start, length, ids = (
        indices_of(name, operand)
        for name, operand in (
            ("b_seq_start_loc", starts),
            ("seq_len_tensor", lengths),
            ("lora_indices_tensor", indices),
        )
    )
    if not len(start) == len(length) == len(ids) == batches:
        raise ShapeError(
            "lora_indices_tensor",
            f"{batches} entries, as batches says, in it, b_seq_start_loc and seq_len_tensor",
            f"{len(ids)}, {len(start)} and {len(length)}",
            "pass the metadata of one batch",
        )
    ends = np.cumsum(length)
    if (
        ((length < 0) | (length > token_nums)).any()
        or (start != ends - length).any()
        or ends[-1:].sum() != token_nums
    ):
        raise ValueRangeError(
            "b_seq_start_loc",
            f"runs of rows one after the other, from 0 to token_nums = {token_nums}",
            f"starts {some(start)}, lengths {some(length)}",
            "make the metadata anew, with layouts.vllm_v0",
        )
    with fits_memory("token_nums", token_nums):
        np.empty(token_nums, np.int64)  # numpy's repeat does not look whether its result fits
        return np.repeat(ids, length)


def _shrink(
    outputs: list[Named], x: Named, stacks: list[Stack], segments: Segments, scaling: float
) -> None:
    """Shrink, checked, into one output for each slice."""
    rows = rows_of(*x)
    _check_x(x[0], rows, stacks, segments)
    left = _left(outputs, rows, stacks, segments)
    scaling = check_scaling("scaling", scaling)
    dtype = sum_dtype(rows.dtype, stacks[0].weights.dtype, *(array.dtype for array in left))
    slices = tuple(stack.weights for stack in stacks)
    _leave(left, scaled(shrink(rows, slices, segments, dtype), scaling), segments)


def _check_x(argument: str, x: Array, stacks: list[Stack], segments: Segments) -> None:
    """Whether these rows can meet the A of every slice."""
    first = stacks[0].weights
    for stack in stacks[1:]:
        if stack.array.shape != stacks[0].array.shape or stack.weights.dtype != first.dtype:
            raise ShapeError(
                stack.argument,
                f"{stacks[0].array.shape} {first.dtype}, as the first slice's",
                f"{stack.array.shape} {stack.weights.dtype}",
                "pad the slices to one rank, and give each as many adapters",
            )
    check_stacks(segments, stacks)
    check_x(x, segments.n, first.inputs, argument)


def _left(outputs: list[Named], x: Array, stacks: list[Stack], segments: Segments) -> list[Array]:
    """The columns of each output that will hold a slice's v."""
    r, found = stacks[0].weights.outputs, []
    inputs = {"x": x, **{stack.argument: stack.array for stack in stacks}}
    for argument, operand in outputs:
        array = output_rows(argument, operand)[:, :r]
        check_output(argument, array, segments.n, r, inputs)
        found.append(array)
    return found


def _leave(left: list[Array], v: Array, segments: Segments) -> None:
    """Write each slice's part of v where its rows stand."""
    with np.errstate(over="ignore", invalid="ignore"):
        for i, array in enumerate(left):
            r = array.shape[1]
            array[segments.rows] = v[:, i * r : (i + 1) * r]


def _expand_rows(
    output: Named,
    inputs: Named,
    stack: Stack,
    indices: Integers,
    columns: tuple[int, int] | None,
    add_inputs: bool,
) -> None:
    """Expand, checked, of one slice: more inputs than outputs, or one for all, will do."""
    rows, n = rows_of(*inputs), len(output_rows(*output))
    check_x(rows, len(indices), stack.weights.inputs, inputs[0])
    if len(rows) == 1 and n > 1:
        rows, indices = np.broadcast_to(rows, (n, rows.shape[1])), np.repeat(indices, n)
    rows, segments = rows[:n], _segments(indices[:n])
    pieces = _pieces(output, [rows], [stack], segments, columns and [columns])
    _expand(pieces, [rows], [stack], segments, add_inputs)


def _pieces(
    output: Named, inputs: list[Array], stacks: list[Stack], segments: Segments, columns: Columns
) -> list[Array]:
    """The columns of the output that each slice is added to, all of it checked."""
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


def _expand(
    pieces: list[Array],
    inputs: list[Array],
    stacks: list[Stack],
    segments: Segments,
    add_inputs: bool,
) -> None:
    """Expand of every slice, from rows as they stand."""
    for piece, rows, stack in zip(pieces, inputs, stacks, strict=True):
        if not add_inputs:
            piece[segments.rows[first_adapted(segments) :]] = 0
        dtype = sum_dtype(rows.dtype, stack.weights.dtype, piece.dtype)
        expand(piece, in_order(rows, segments, dtype), stack.weights, segments)


def _both(
    output: Named,
    x: Named,
    A: list[Stack],
    B: list[Stack],
    segments: Segments,
    columns: Columns,
    scale: float,
    buffers: list[Named],
) -> None:
    """Shrink of all slices, then expand of each, v staying in sorted order between them."""
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
    pieces = _pieces(output, [rows], B, segments, columns)
    left = _left(buffers, rows, A, segments)
    scale = check_scaling("scale", scale)
    dtype = sum_dtype(rows.dtype, *(stack.weights.dtype for stack in [*A, *B]), pieces[0].dtype)
    v = scaled(shrink(rows, tuple(stack.weights for stack in A), segments, dtype), scale)
    _leave(left, v, segments)
    for i, (piece, stack) in enumerate(zip(pieces, B, strict=True)):
        expand(piece, v[:, i * r : (i + 1) * r], stack.weights, segments)
