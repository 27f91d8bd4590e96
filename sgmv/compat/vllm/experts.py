"""What vLLM's layers of experts call: the deltas of both of a layer's products, in one batch.

    add_lora_w13, add_lora_w2   vLLM 0.32's calls, one for each product
    add_lora_fused_moe          what both come to, and the only one of earlier releases

vLLM sorts pairs (token, expert) by (adapter, expert) and pads each group to a block's rows. Here a
pair is a row of one batch, and its index is that of (adapter, expert) in the stacks. What vLLM has
sorted is read back; what is made here for the second product is its unsorted form.

Source: vLLM 0.32, lora/punica_wrapper/punica_gpu.py, lora/ops/triton_ops/fused_moe_lora_op.py.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from sgmv.checks import check_count, check_dtype, check_matrix, check_weights
from sgmv.compat.vllm.slices import Operands, check_alike, columns_of, side_by_side
from sgmv.dtypes import sum_dtype
from sgmv.errors import ShapeError, UnknownAdapterError, ValueRangeError, some
from sgmv.ids import BASE_ONLY, Integers
from sgmv.products import (
    STACKS_KNOWN,
    Operand,
    Stack,
    Weights,
    batch_of_pairs,
    expand,
    first_adapted,
    indices_of,
    output_rows,
    rows_of,
    shrink,
)
from sgmv.segment import Segments
from sgmv.tensors import as_array, to_float32

# What vLLM's layers get of add_lora_w13 and hand on: sorted ids, experts, padded counts, adapters.
Handed = tuple[Any, Any, Any, Any]


class ExpertProducts:
    """The products of layers of experts: a part of `PunicaWrapper`, which has the adapters."""

    @property
    def token_lora_indices(self) -> Integers:
        """(n,) the adapter of each row."""
        raise NotImplementedError

    def add_lora_fused_moe(
        self,
        y: Operand,
        x: Operand,
        lora_a_stacked: Operands,
        lora_b_stacked: Operands,
        topk_weights: Operand,
        sorted_token_ids: Operand | None,
        expert_ids: Operand,
        num_tokens_post_padded: Operand | None,
        max_lora_rank: int,
        top_k_num: int,
        shrink_config: Any,
        expand_config: Any,
        adapter_enabled: Operand,
        mul_routed_weight: bool = False,
        fully_sharded: bool = False,
        offset: int = 0,
        token_lora_mapping: Operand | None = None,
        add_inputs: bool = True,
    ) -> None:
        """Add to each pair's product the delta of its adapter on its expert, of every slice.

        Semantics: `y[i, j] += B @ (A @ x[i])` with A and B of the token's adapter and the pair's
        expert, slice after slice from column `offset` on. With mul_routed_weight x has a row for
        each pair, and the delta is multiplied by topk_weights[i, j]. An adapter or expert of -1,
        and an adapter that is not enabled, add nothing. v stays in float32, where vLLM rounds it.

        y                       (n, k, columns)  in place
        x                       (n, h_in), or (n * k, h_in) with mul_routed_weight
        lora_a_stacked          of each slice (max_loras, E, r, h_in); E may be a view of one
        lora_b_stacked          of each slice (max_loras, E, h_out, r)
        topk_weights            (n, k)
        sorted_token_ids        None, or (max_loras, padded), as `moe_lora_align_block_size` sorts
        expert_ids              (n * k,); or (max_loras, blocks), of each block of sorted ids
        num_tokens_post_padded  None, or (max_loras,)
        shrink_config           BLOCK_SIZE_M, 64 if left out: rows of a block of sorted ids
        adapter_enabled         (max_loras or more,) 0 for none
        token_lora_mapping      (n,) the adapter of each token, -1 for none; else the step's
        add_inputs              False: `=`, on pairs that have an adapter
        max_lora_rank, top_k_num, expand_config   not needed here

        Raises ValueRangeError for fully_sharded: vLLM sums over devices between the products.

        >>> from sgmv.compat.vllm import PunicaWrapper
        >>> A, B = np.ones((1, 2, 1, 3), "float32"), np.ones((1, 2, 4, 1), "float32")
        >>> B[0, 1] = 10
        >>> x, y = np.ones((1, 3), "float32"), np.zeros((1, 2, 4), "float32")
        >>> routed = np.ones((1, 2), "float32"), None, np.array([0, 1]), None
        >>> PunicaWrapper(8, 8).add_lora_fused_moe(
        ...     y, x, (A,), (B,), *routed, 1, 2, {}, {}, [1], token_lora_mapping=[0]
        ... )
        >>> y[0, :, 0]
        array([ 3., 30.], dtype=float32)
        """
        if fully_sharded:
            raise ValueRangeError("fully_sharded", "False", "True", "run it on one device")
        weights = check_matrix("topk_weights", as_array("topk_weights", topk_weights))
        n, k = weights.shape
        A, B = (
            _stacks_of("lora_a_stacked", lora_a_stacked),
            _stacks_of("lora_b_stacked", lora_b_stacked),
        )
        E = A[0].array.shape[1]
        if sorted_token_ids is None:
            adapters = np.repeat(self._adapters(token_lora_mapping, n), k)
            experts = indices_of("expert_ids", expert_ids)
        else:
            rows = check_count("BLOCK_SIZE_M", dict(shrink_config).get("BLOCK_SIZE_M") or 64, 1)
            adapters, experts = _of_sorted(
                sorted_token_ids, expert_ids, num_tokens_post_padded, rows, n * k
            )
        if experts.shape != (n * k,):
            raise ShapeError(
                "expert_ids", f"({n * k},), one for each pair", str(experts.shape), "pass topk_ids"
            )
        enabled = (
            as_array("adapter_enabled", adapter_enabled)
            if not isinstance(adapter_enabled, list)
            else np.array(adapter_enabled)
        )
        slots = len(A[0].array)
        if enabled.ndim != 1 or len(enabled) < slots:
            raise ShapeError(
                "adapter_enabled", f"({slots} or more,), one for each slot", str(enabled.shape),
                "pass the layer's",
            )  # fmt: skip
        if adapters.size and adapters.max() >= slots:
            raise UnknownAdapterError(
                "token_lora_mapping",
                f"adapters 0..{slots - 1}, or -1",
                some(np.unique(adapters)),
                "pass the stacks of all slots",
            )
        if experts.size and experts.max() >= E:
            raise UnknownAdapterError(
                "expert_ids", f"experts 0..{E - 1}, or -1", some(np.unique(experts)),
                "pass this layer's ids",
            )  # fmt: skip
        none = (experts < 0) | (adapters < 0) | (enabled[np.maximum(adapters, 0)] == 0)
        ids = np.where(none, BASE_ONLY, adapters * E + experts)
        batch = batch_of_pairs(ids.tobytes(), k, not mul_routed_weight)
        factors = check_weights(weights, n, k).reshape(-1) if mul_routed_weight else None
        rows_of_x, offset = n * k if mul_routed_weight else n, check_count("offset", offset, 0)
        _add(y, x, A, B, batch, rows_of_x, offset, factors, add_inputs)

    def add_lora_w13(
        self,
        y: Operand,
        x: Operand,
        lora_a_stacked: Operands,
        lora_b_stacked: Operands,
        topk_ids: Operand,
        topk_weights: Operand,
        expert_map: Operand | None,
        w1: Any,
        w2: Any,
        num_tokens: int,
        top_k_num: int,
        max_loras: int,
        adapter_enabled: Operand,
        *args: Any,
        add_inputs: bool = True,
        token_lora_mapping: Operand | None = None,
        **kwargs: Any,
    ) -> Handed:
        """Gate and up: `add_lora_fused_moe` of the router's choices.

        Semantics: as there, without weights; y may be (n * k, columns). expert_map gives this
        device's number of each expert, -1 if it has none.

        topk_ids    (n, k) the experts of each token
        args, kwargs, w1, w2, max_loras   not needed here: what vLLM chooses its launch by
        returns     what `add_lora_w2` takes

        >>> from sgmv.compat.vllm import PunicaWrapper
        >>> A, B = np.ones((1, 2, 1, 3), "float32"), np.ones((1, 2, 4, 1), "float32")
        >>> x, y = np.ones((1, 3), "float32"), np.zeros((1, 2, 4), "float32")
        >>> routed = np.array([[1, 0]]), np.ones((1, 2), "float32"), None
        >>> wrapper, rest = PunicaWrapper(8, 8), (None, None, 1, 2, 1, [1])
        >>> wrapper.add_lora_w13(y, x, (A,), (B,), *routed, *rest, token_lora_mapping=[0])
        (None, array([1, 0]), None, [0])
        """
        ids = as_array("topk_ids", topk_ids)
        if ids.ndim != 2:
            raise ShapeError("topk_ids", "(n, k)", str(ids.shape), "pass what the router chose")
        n, k = ids.shape
        experts = indices_of("topk_ids", ids.reshape(-1))
        if expert_map is not None:
            here = np.append(indices_of("expert_map", expert_map), BASE_ONLY)
            if experts.size and experts.max() >= len(here) - 1:
                expected = f"experts 0..{len(here) - 2}, as expert_map has them"
                beyond = some(np.unique(experts))
                raise UnknownAdapterError("topk_ids", expected, beyond, "pass the model's map")
            experts = here[np.maximum(experts, BASE_ONLY)]
        if token_lora_mapping is None:
            token_lora_mapping = self._adapters(None, n)
        rows = output_rows("y", y)
        if len(rows) != n * k:
            raise ShapeError("y", f"({n}, {k}, columns)", str(rows.shape), "pass a row per pair")
        self.add_lora_fused_moe(
            rows.reshape(n, k, rows.shape[1]), x, lora_a_stacked, lora_b_stacked, topk_weights,
            None, experts, None, 0, top_k_num, {}, {}, adapter_enabled,
            token_lora_mapping=token_lora_mapping, add_inputs=add_inputs,
        )  # fmt: skip
        return None, experts, None, token_lora_mapping

    def add_lora_w2(
        self,
        y: Operand,
        x: Operand,
        lora_a_stacked: Operands,
        lora_b_stacked: Operands,
        topk_weights: Operand,
        sorted_token_ids_lora: Operand | None,
        expert_ids_lora: Operand,
        num_tokens_post_padded_lora: Operand | None,
        token_lora_mapping: Operand | None,
        num_tokens: int,
        w1: Any,
        w2: Any,
        top_k_num: int,
        max_loras: int,
        adapter_enabled: Operand,
        top_k: int = 0,
        fully_sharded: bool = False,
        *args: Any,
        add_inputs: bool = True,
        **kwargs: Any,
    ) -> None:
        """Down: `add_lora_fused_moe` of the pairs' own rows, times the router's weights.

        y (n, k, hidden) in place   x (n * k, inter)
        sorted_token_ids_lora, expert_ids_lora, num_tokens_post_padded_lora, token_lora_mapping
            as `add_lora_w13` returned them
        """
        self.add_lora_fused_moe(
            y, x, lora_a_stacked, lora_b_stacked, topk_weights, sorted_token_ids_lora,
            expert_ids_lora, num_tokens_post_padded_lora, 0, top_k_num, {}, {}, adapter_enabled,
            True, fully_sharded, 0, token_lora_mapping, add_inputs,
        )  # fmt: skip

    def _adapters(self, mapping: Operand | None, n: int) -> Integers:
        """(n,) the adapter of each token; a mapping may be longer than the tokens."""
        given = self.token_lora_indices if mapping is None else mapping
        found = indices_of("token_lora_mapping", given)
        if len(found) < n:
            raise ShapeError(
                "token_lora_mapping", f"({n},)", str(found.shape), "give one per token"
            )
        return found[:n]


def _of_sorted(
    sorted_ids: Operand, expert_ids: Operand, padded: Operand | None, rows: int, pairs: int
) -> tuple[Integers, Integers]:
    """The adapter and the expert of each pair, of blocks of pairs; past the pairs is padding."""
    ids, experts = as_array("sorted_token_ids", sorted_ids), as_array("expert_ids", expert_ids)
    counts = None if padded is None else as_array("num_tokens_post_padded", padded)
    if (
        ids.ndim != 2
        or experts.ndim != 2
        or counts is None
        or not len(ids) == len(experts) == len(counts)
    ):
        raise ShapeError(
            "sorted_token_ids, expert_ids, num_tokens_post_padded",
            "(max_loras, padded), (max_loras, blocks), (max_loras,)",
            f"{ids.shape}, {experts.shape}, {None if counts is None else counts.shape}",
            "pass what moe_lora_align_block_size returned",
        )
    adapter_of, expert_of = (np.full(pairs, BASE_ONLY, np.int64) for _ in range(2))
    for adapter in range(len(ids)):
        used = ids[adapter, : max(int(counts[adapter]), 0)]
        at = np.flatnonzero((used >= 0) & (used < pairs))
        adapter_of[used[at]] = adapter
        expert_of[used[at]] = experts[adapter, at // rows]
    return adapter_of, expert_of


def _add(
    y: Operand,
    x: Operand,
    A: list[Stack],
    B: list[Stack],
    batch: Segments,
    n: int,
    offset: int,
    weights: npt.NDArray[np.float32] | None,
    add_inputs: bool,
) -> None:
    """Both products of all slices, over a batch of pairs that read n rows of x."""
    rows = rows_of("x", x)
    first, r = A[0].weights, A[0].weights.outputs
    check_alike(A)
    if len(A) != len(B) or any(stack.weights.inputs != r for stack in B):
        raise ShapeError(
            "lora_b_stacked",
            f"{len(A)} slices (max_loras, E, h_out, {r}), as lora_a_stacked has rank {r}",
            str([stack.array.shape for stack in B]),
            "pass A and B of the same adapters",
        )
    if rows.shape != (n, first.inputs):
        raise ShapeError("x", f"({n}, {first.inputs})", str(rows.shape), "pass a row for each")
    columns = side_by_side([stack.weights.outputs for stack in B], offset)
    pieces = columns_of(("y", y), [rows], B, batch, columns)
    dtype = sum_dtype(rows.dtype, first.dtype, B[0].weights.dtype, pieces[0].dtype)
    v = shrink(rows, tuple(stack.weights for stack in A), batch, dtype)
    if weights is not None:
        with np.errstate(over="ignore", invalid="ignore", under="ignore"):
            v *= weights[batch.rows][:, np.newaxis].astype(dtype)
    for i, (piece, stack) in enumerate(zip(pieces, B, strict=True)):
        if not add_inputs:
            piece[batch.rows[first_adapted(batch) :]] = 0
        expand(piece, v[:, i * r : (i + 1) * r], stack.weights, batch)


def _stacks_of(argument: str, operands: Operands) -> list[Stack]:
    """The weights of each slice, (max_loras, E, outputs, inputs): one per (adapter, expert)."""
    if not isinstance(operands, list | tuple) or not operands:
        raise ShapeError(
            argument, "a tuple of arrays, one for each slice", type(operands).__name__, "pass one"
        )
    return [_stack_of(f"{argument}[{i}]", operand) for i, operand in enumerate(operands)]


def _stack_of(argument: str, operand: Operand) -> Stack:
    array = as_array(argument, operand)
    if array.ndim != 4:
        raise ShapeError(
            argument, "(max_loras, E, outputs, inputs)", str(array.shape), "stack them so"
        )
    check_dtype(argument, array.dtype, to_float32(operand))
    if not array[:1, :1].flags.c_contiguous:
        copy = np.ascontiguousarray(array)
        stored = _stored.__wrapped__(
            int(copy.ctypes.data), copy.strides[:2], copy.shape, copy.dtype
        )
        return Stack(argument, replace(stored, holds=copy), array)
    key = int(array.ctypes.data), array.strides[:2], array.shape, array.dtype
    return Stack(argument, _stored(*key), array)


@lru_cache(STACKS_KNOWN)
def _stored(
    address: int, pitches: tuple[int, int], shape: tuple[int, ...], dtype: np.dtype[Any]
) -> Weights:
    """A weight for each (adapter, expert); a pitch of 0 is a factor that all experts share."""
    of_adapters, of_experts = (
        np.arange(n) * pitch for n, pitch in zip(shape[:2], pitches, strict=True)
    )
    addresses = address + of_adapters[:, np.newaxis] + of_experts
    return Weights(addresses.reshape(-1), shape[2], shape[3], dtype)
