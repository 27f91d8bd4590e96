"""How a kernel of each engine's signature is called with a case, and what it makes of y.

    reference     kernel(y, x, rows, seq_start, segment_ids, adapters, scalings)
    punica        add_lora_sgmv(y, x, wa_ptr, wb_ptr, s, layer_idx, lora_rank)
    punica-sgmv   sgmv(y, x, w_ptr, s, layer_idx), once for each half
    vllm-bgmv     bgmv_shrink(inputs, weights, output, lora_indices, scaling)
                  bgmv_expand(inputs, weights, output, lora_indices, add_inputs)
    vllm-sgmv     sgmv_shrink(inputs, weights, output, b_seq_start_loc, seq_len_tensor,
                              lora_indices_tensor, batches, max_seq_length, token_nums, scaling)
                  sgmv_expand(the same up to token_nums, add_inputs)
    sglang        sgemm_lora_a_fwd(x, weights, batch_info) -> v
                  sgemm_lora_b_fwd(v, weights, batch_info, base_output) -> y

A signature that has no place for something gets cases without it. Punica and vLLM have one rank in
a call: they are called once for each rank of the batch (Punica with that rank's rows, sorted; vLLM
with -1 for all others). Punica has no scaling: the cases have 1. vLLM has one in a call: it is
called once for each. Rows of rank 0 are left to the kernels that are told of ranks. The v of
punica-sgmv has x's type: in 16 bits it is rounded, which the bounds do not allow.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from reference.batch import Weights, Workload
from reference.floats import sum_dtype

Kernel = Callable[..., Any]
Array = NDArray[Any]


class SpoiledError(AssertionError):
    """A kernel changed an operand that it only reads."""


class Signature(NamedTuple):
    """What has to be named, how the kernel is called, and what cases it gets."""

    functions: tuple[str, ...]
    call: Callable[[Sequence[Kernel], Workload, "Handed"], Any]
    scaled: bool = True


class Handed:
    """The operands as the kernel gets them; which of them it changed.

    Semantics: `give(name, array)` is the array, or with torch a tensor over its memory.
    """

    def __init__(self, torch: bool = False) -> None:
        self.torch = sys.modules["torch"] if torch else None
        self._given: list[tuple[str, Array, bytes]] = []

    def give(self, name: str, array: Array) -> Any:
        """An operand that the kernel only reads."""
        self._given.append((name, array, array.tobytes()))
        return self.out(array)

    def out(self, array: Array) -> Any:
        """An operand that the kernel writes to."""
        if self.torch is None:
            return array
        if array.dtype.name == "bfloat16":
            return self.torch.from_numpy(array.view(np.uint16)).view(self.torch.bfloat16)
        return self.torch.from_numpy(array)

    def back(self, returned: Any) -> Any:
        """What a kernel returned, as numpy has it."""
        if self.torch is None or not isinstance(returned, self.torch.Tensor):
            return returned
        tensor = returned.detach()
        if tensor.dtype == self.torch.bfloat16:
            return tensor.contiguous().view(self.torch.uint16).numpy().view("bfloat16")
        return tensor.numpy()

    def changed(self) -> list[str]:
        """The names of the operands that are not what was given; they are put back."""
        names = []
        for name, array, was in self._given:
            if array.tobytes() != was:
                array[...] = np.frombuffer(was, array.dtype).reshape(array.shape)
                names.append(name)
        return list(dict.fromkeys(names))


def _reference(kernels: Sequence[Kernel], case: Workload, handed: Handed) -> Any:
    y = case.y.copy()
    target, give = handed.out(y), handed.give
    adapters = {
        adapter_id: pair and (give("A", pair[0]), give("B", pair[1]))
        for adapter_id, pair in case.adapters.items()
    }
    ids = case.segment_ids.tolist() if handed.torch else give("segment_ids", _own(case.segment_ids))
    returned = kernels[0](
        target,
        give("x", case.x),
        give("rows", _own(case.rows)),
        give("seq_start", _own(case.seq_start)),
        ids,
        adapters,
        dict(case.scalings),
    )
    return y if returned is None or returned is target else handed.back(returned)


def _own(array: Array) -> Array:
    """Writable: a kernel that was compiled for writable arrays takes no other."""
    return np.array(array)


class _Group(NamedTuple):
    """The adapters of one rank: their ids, their weights, and each row's place among them or -1."""

    r: int
    weights: list[Weights]
    place: NDArray[np.int64]  # (n,)
    scaling: float


def _groups(case: Workload, *, by_scaling: bool) -> Iterator[_Group]:
    kinds: dict[tuple[int, float], list[int]] = {}
    for adapter_id in np.unique(case.adapter_ids).tolist():
        pair = case.adapters.get(adapter_id)
        if pair is not None and len(pair[0]):
            scaling = case.scalings[adapter_id] if by_scaling else 1.0
            kinds.setdefault((len(pair[0]), scaling), []).append(adapter_id)
    for (r, scaling), ids in kinds.items():
        place = {adapter_id: i for i, adapter_id in enumerate(ids)}
        index = np.array([place.get(i, -1) for i in case.adapter_ids.tolist()], np.int64)
        weights = [pair for i in ids if (pair := case.adapters[i]) is not None]
        yield _Group(r, weights, index, scaling)


def _by_segment(
    case: Workload, handed: Handed, call: Callable[[Any, Any, _Group, Any], None]
) -> Array:
    """What y is after a call for each rank, with its rows, sorted: `call(y, x, group, s)`."""
    y: Array = case.y.copy()
    for group in _groups(case, by_scaling=False):
        order = np.argsort(group.place, kind="stable")
        rows = order[np.count_nonzero(group.place < 0) :]
        s = np.searchsorted(group.place[rows], np.arange(len(group.weights) + 1)).astype(np.int32)
        target = y[rows]
        call(handed.out(target), handed.give("x", case.x[rows]), group, handed.give("s", s))
        y[rows] = target
    return y


def _pointers(handed: Handed, name: str, weights: Sequence[Array]) -> Any:
    """Their addresses, each as (1, outputs, inputs); `handed` keeps them alive."""
    layers = [np.ascontiguousarray(weight)[None] for weight in weights]
    for layer in layers:
        handed.give(name, layer)
    return handed.give(f"{name}_ptr", np.array([w.ctypes.data for w in layers], np.int64))


def _punica(kernels: Sequence[Kernel], case: Workload, handed: Handed) -> Array:
    def call(y: Any, x: Any, group: _Group, s: Any) -> None:
        wa_ptr = _pointers(handed, "wa", [A for A, _ in group.weights])
        wb_ptr = _pointers(handed, "wb", [B for _, B in group.weights])
        kernels[0](y, x, wa_ptr, wb_ptr, s, 0, group.r)

    return _by_segment(case, handed, call)


def _punica_sgmv(kernels: Sequence[Kernel], case: Workload, handed: Handed) -> Array:
    def call(y: Any, x: Any, group: _Group, s: Any) -> None:
        wa_ptr = _pointers(handed, "wa", [A for A, _ in group.weights])
        wb_ptr = _pointers(handed, "wb", [B for _, B in group.weights])
        v = np.zeros((len(x), group.r), case.x.dtype)
        kernels[0](handed.out(v), x, wa_ptr, s, 0)
        kernels[0](y, handed.give("v", v), wb_ptr, s, 0)

    return _by_segment(case, handed, call)


def _vllm(
    kernels: Sequence[Kernel],
    case: Workload,
    handed: Handed,
    rows_of: Callable[[NDArray[np.int64], Handed], tuple[Any, ...]],
) -> Array:
    shrink, expand = kernels
    y: Array = case.y.copy()
    x = handed.give("x", case.x)
    for group in _groups(case, by_scaling=True):
        A, B = (handed.give(f"w{'ab'[i]}", np.stack([w[i] for w in group.weights])) for i in (0, 1))
        rows = rows_of(group.place, handed)
        v = np.zeros((len(case.x), group.r), sum_dtype(case.x))
        shrink(x, A, handed.out(v), *rows, group.scaling)
        expand(handed.give("v", v), B, handed.out(y), *rows, True)
    return y


def _vllm_bgmv(kernels: Sequence[Kernel], case: Workload, handed: Handed) -> Array:
    return _vllm(kernels, case, handed, lambda index, handed: (handed.give("lora_indices", index),))


def _vllm_sgmv(kernels: Sequence[Kernel], case: Workload, handed: Handed) -> Array:
    def rows_of(index: NDArray[np.int64], handed: Handed) -> tuple[Any, ...]:
        start, length, of_run = _runs(index)
        return (
            handed.give("b_seq_start_loc", start),
            handed.give("seq_len_tensor", length),
            handed.give("lora_indices_tensor", of_run),
            len(start),
            int(length.max(initial=0)),
            len(index),
        )

    return _vllm(kernels, case, handed, rows_of)


def _sglang(kernels: Sequence[Kernel], case: Workload, handed: Handed) -> Any:
    shrink, expand = kernels
    give, wide = handed.give, sum_dtype(case.x)
    held = {i: pair for i, pair in case.adapters.items() if pair is not None}
    slot_of = {adapter_id: slot for slot, adapter_id in enumerate(held)}
    base = len(held)  # a slot of rank 0
    ranks = np.array([*(len(A) for A, _ in held.values()), 0], np.int32)
    h_in, h_out, r = case.x.shape[1], case.y.shape[1], int(ranks.max())
    wa = np.full((base + 1, r, h_in), np.nan, case.x.dtype)
    wb = np.full((base + 1, h_out, r), np.nan, case.x.dtype)
    for slot, (A, B) in enumerate(held.values()):
        wa[slot, : len(A)], wb[slot, :, : len(A)] = A, B
    index = np.array([slot_of.get(i, base) for i in case.adapter_ids.tolist()], np.int64)
    start, length, of_run = (array.astype(np.int32) for array in _runs(index))
    info = SimpleNamespace(
        bs=len(start),
        num_segments=len(start),
        seg_indptr=give("seg_indptr", np.append(start, np.int32(len(index))).astype(np.int32)),
        seg_lens=give("seg_lens", length),
        max_len=int(length.max(initial=0)),
        weight_indices=give("weight_indices", of_run),
        lora_ranks=give("lora_ranks", ranks),
        scalings=give("scalings", np.array([*(case.scalings[i] for i in held), 0.0], wide)),
        permutation=None,
    )
    y: Array = case.y.copy()
    target = handed.out(y)
    v = shrink(give("x", case.x), give("wa", wa), info)
    returned = expand(v, give("wb", wb), info, target)
    return y if returned is None or returned is target else handed.back(returned)


def _runs(index: NDArray[np.int64]) -> tuple[Array, Array, Array]:
    """Where each run of equal neighbours starts, its length, and its value."""
    changes = np.flatnonzero(np.diff(index)) + 1
    start = np.concatenate(([0], changes)).astype(np.int64)[: len(index)]
    length = np.diff(np.append(start, len(index)))
    return start, length, index[start]


SIGNATURES = {
    "reference": Signature(("kernel",), _reference),
    "punica": Signature(("add_lora_sgmv",), _punica, scaled=False),
    "punica-sgmv": Signature(("sgmv",), _punica_sgmv, scaled=False),
    "vllm-bgmv": Signature(("bgmv_shrink", "bgmv_expand"), _vllm_bgmv),
    "vllm-sgmv": Signature(("sgmv_shrink", "sgmv_expand"), _vllm_sgmv),
    "sglang": Signature(("sgemm_lora_a_fwd", "sgemm_lora_b_fwd"), _sglang),
}


def posed(case: Workload, like: str) -> Workload:
    """The case as this signature can pose it: without scalings, where it has none.

    >>> from reference.batch import real
    >>> posed(real("demo", "scalings", [0], {0: 2}, 3, 4), "punica").scalings
    {0: 1.0}
    """
    if SIGNATURES[like].scaled:
        return case
    return replace(case, scalings=dict.fromkeys(case.scalings, 1.0))
