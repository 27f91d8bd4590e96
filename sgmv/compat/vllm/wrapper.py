"""What vLLM's LoRA layers call: the metadata of a step, and the products of its layers.

Source: vLLM, vllm/lora/punica_wrapper/punica_cpu.py, vllm/lora/layers/utils.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sgmv.checks import check_count, check_several, check_x
from sgmv.compat.vllm.experts import ExpertProducts
from sgmv.compat.vllm.slices import (
    Operands,
    columns_of,
    expand_one,
    expand_slices,
    linear,
    one_each,
    shrink_slices,
    side_by_side,
    stacks_of,
)
from sgmv.errors import StackError, UnknownAdapterError, ValueRangeError, some
from sgmv.ids import BASE_ONLY, Integers
from sgmv.layouts.rows import row_ids
from sgmv.layouts.vllm import VllmV0, vllm_v0
from sgmv.products import Operand, rows_of, stack_of
from sgmv.segment import segment


@dataclass(frozen=True)
class LoRAMapping:
    """The adapter of each row, and of each sampled row: what a step passes to the wrapper.

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


class PunicaWrapper(ExpertProducts):
    """What vLLM's LoRA layers call: metadata made once for each step, then the products.

    Semantics: `update_metadata`, then any of the products for every layer; each takes as many rows
    as the metadata has. Shrink's v goes on in float32.

    max_num_batched_tokens  the most rows of a step
    max_batches             not needed here: the most runs of rows, for vLLM's buffers
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

        Semantics: an id's index is its position in lora_index_to_id; that of id 0 is -1.

        mapping           LoRAMapping, or vLLM's own
        lora_index_to_id  the id in each slot, None where it is free
        max_loras         how many slots there are
        args, kwargs      not needed here: what else vLLM passes, such as the vocabulary's size

        Raises StackError for more slots than max_loras, ValueRangeError for more rows than
        max_num_batched_tokens, UnknownAdapterError for ids in no slot; the metadata is then as it
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
        """The arguments of `sgmv_shrink` and the like that describe the batch, in their order."""
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
        stacks = stacks_of("lora_a_stacked", lora_a_stacked)
        shrink_slices(one_each("y", y, len(stacks)), ("x", x), stacks, self._tokens, scale)

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
        each row's index; the first slice starts at offset_start, every other where the one
        before it ends.

        y               (n, h_out)  in place
        x               of each slice (n, r); or (slices, n, r)
        lora_b_stacked  of each slice (num_loras, 1, output_slices[i], r)
        add_inputs      False: `=`, on rows that have an adapter
        """
        stacks = stacks_of("lora_b_stacked", lora_b_stacked)
        rows = [rows_of(*part) for part in one_each("x", x, len(stacks))]
        for i, (part, stack) in enumerate(zip(rows, stacks, strict=True)):
            check_x(part, self._tokens.n, stack.weights.inputs, f"x[{i}]")
        columns = side_by_side(output_slices, offset_start)
        pieces = columns_of(("y", y), rows, stacks, self._tokens, columns)
        expand_slices(pieces, rows, stacks, self._tokens, add_inputs)

    def add_lora_embedding(
        self,
        y: Operand,
        x: Operand,
        lora_b_stacked: Operand,
        add_inputs: bool = True,
        **kwargs: Any,
    ) -> None:
        """The second product of an embedding; the first is a look-up, which the layer has made.

        Semantics: `y += x @ B.T` with B of each row's index.

        y (n, h_out) in place   x (n, r)   lora_b_stacked (num_loras, 1, h_out, r)
        """
        stack = stack_of("lora_b_stacked", lora_b_stacked)
        expand_one(("y", y), ("x", x), stack, row_ids(self._tokens), None, add_inputs)

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
        buffer          takes each slice's v, as add_shrink writes it; may be left out

        >>> wrapper, one = PunicaWrapper(8, 8), np.ones((1, 1, 2, 1), "float32")
        >>> wrapper.update_metadata(LoRAMapping((1,), (1,)), [1], max_loras=1)
        >>> y, A = np.zeros((1, 3), "float32"), np.ones((1, 1, 1, 2), "float32")
        >>> wrapper.add_lora_linear(y, A[0, 0], (A, A), (one, one[:, :, :1]), 0.5, (2, 1))
        >>> y
        array([[1., 1., 1.]], dtype=float32)
        """
        A, B = (
            stacks_of("lora_a_stacked", lora_a_stacked),
            stacks_of("lora_b_stacked", lora_b_stacked),
        )
        buffers = [] if buffer is None else one_each("buffer", buffer, len(A))
        columns = side_by_side(output_slices, 0)
        linear(("y", y), ("x", x), A, B, self._tokens, columns, scale, buffers)

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
        buffer          takes v; may be left out
        """
        A, B = (
            stack_of("lora_a_stacked", lora_a_stacked),
            stack_of("lora_b_stacked", lora_b_stacked),
        )
        buffers = [] if buffer is None else [("buffer", buffer)]
        linear(("y", y), ("x", x), [A], [B], self._sampled, None, scale, buffers)


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
    if set(map(type, found)) != {int}:  # one by one takes longer
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
