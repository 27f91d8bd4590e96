"""vLLM's operations on stacked weights: an index for each row, or for each run of rows.

Source: vLLM, vllm/lora/ops/torch_ops/lora_ops.py.
"""

from __future__ import annotations

import numpy as np

from sgmv.checks import check_count, fits_memory
from sgmv.compat.vllm.slices import expand_one, shrink_slices
from sgmv.errors import ShapeError, ValueRangeError, some
from sgmv.ids import Integers
from sgmv.products import Operand, indices_of, segments_of, stack_of
from sgmv.segment import Segments


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
    shrink_slices([output], ("inputs", inputs), [weights], _by_index(ids), scaling)


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
    ids = _row_indices(b_seq_start_loc, seq_len_tensor, lora_indices_tensor, batches, token_nums)
    output, weights = ("output_tensor", output_tensor), stack_of("lora_a_weights", lora_a_weights)
    shrink_slices([output], ("inputs", inputs), [weights], _by_index(ids), scaling)


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
    expand_one(output, ("inputs", inputs), weights, ids, None, add_inputs)


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
    ids = _row_indices(b_seq_start_loc, seq_len_tensor, lora_indices_tensor, batches, token_nums)
    output, weights = ("output_tensor", output_tensor), stack_of("lora_b_weights", lora_b_weights)
    expand_one(output, ("inputs", inputs), weights, ids, None, add_inputs)


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
    the weights have slice_size outputs, and other columns keep their bits.

    Arguments and errors as `bgmv_expand`. Source: vLLM, lora_ops.py, `bgmv_expand_slice`.

    >>> B, out = np.array([[[1], [2]]], "float32"), np.zeros((1, 4), "float32")
    >>> bgmv_expand_slice(np.full((1, 1), 3, "float32"), B, out, np.array([0]), 1, 2)
    >>> out
    array([[0., 3., 6., 0.]], dtype=float32)
    """
    ids = indices_of("lora_indices_tensor", lora_indices_tensor)
    output, weights = ("output_tensor", output_tensor), stack_of("lora_b_weights", lora_b_weights)
    columns = _columns(slice_offset, slice_size)
    expand_one(output, ("inputs", inputs), weights, ids, columns, add_inputs)


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
    ids = _row_indices(b_seq_start_loc, seq_len_tensor, lora_indices_tensor, batches, token_nums)
    output, weights = ("output_tensor", output_tensor), stack_of("lora_b_weights", lora_b_weights)
    columns = _columns(slice_offset, slice_size)
    expand_one(output, ("inputs", inputs), weights, ids, columns, add_inputs)


def _columns(offset: int, width: int) -> tuple[int, int]:
    """The offset and width of the slice that a call names."""
    return check_count("slice_offset", offset, 0), check_count("slice_size", width, 0)


def _by_index(ids: Integers) -> Segments:
    return segments_of("lora_indices_tensor", ids)


def _row_indices(
    starts: Operand, lengths: Operand, indices: Operand, batches: int, token_nums: int
) -> Integers:
    """The index of each row, from one for each run of rows; refuses runs that do not adjoin."""
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
        np.empty(token_nums, np.int64)  # np.repeat does not check that its result fits
        return np.repeat(ids, length)
