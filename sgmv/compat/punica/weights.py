"""Weights in the orders that Punica's kernels take, and the pointers of a batch of them.

Source: punica, src/punica/utils/lora.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from sgmv.checks import check_count, check_dtype, fits_memory
from sgmv.compat.punica.pointers import own
from sgmv.dtypes import BITS
from sgmv.errors import DtypeError, ShapeError, ValueRangeError, shown
from sgmv.products import Operand
from sgmv.tensors import as_array, is_torchs, like, zeros


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
        kind = dtype if is_torchs(dtype) else check_dtype("dtype", dtype)
        with fits_memory(", ".join(sizes), f"{layers}, {h_in}, {h_out}, {r}"):
            self.wa: Operand = zeros((layers, r, h_in), kind)
            self.wb: Operand = zeros((layers, r, h_out), kind)

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
    return like(pointers, arrays[0])
