"""A PEFT layer's A and B: whether they have changed, and which of them are left to PEFT."""

from __future__ import annotations

from functools import cache
from typing import Any

from sgmv import tensors
from sgmv.adapter import Adapter
from sgmv.dtypes import BITS
from sgmv.tensors import as_array

CORNER = 8  # how many values of the first rows of A and of B are held to tell a swap


class Source:
    """The tensors that a slot was copied from, and whether they have changed since.

    A change is seen by the tensors' identity, their addresses and torch's count of changes. Writes
    through `.data` are not counted. PEFT's hotswap makes them, of whole tensors: comparing a few
    values shows them. The adapter's arrays hold the memory, so that no address is used again.
    """

    def __init__(self, A: Any, B: Any, scaling: float) -> None:
        self._tensors = A, B
        self.adapter = Adapter(as_array("lora_A", A), as_array("lora_B", B), scaling)
        self._corners = self.adapter.A[0, :CORNER], self.adapter.B[0, :CORNER]
        self._seen = self._look()

    def _look(self) -> tuple[object, ...]:
        (A, B), (a, b) = self._tensors, self._corners
        return A.data_ptr(), B.data_ptr(), A._version, B._version, a.tobytes(), b.tobytes()

    def is_current(self, A: Any, B: Any, scaling: float) -> bool:
        """Whether these are the same tensors, unchanged since they were copied."""
        same = A is self._tensors[0] and B is self._tensors[1]
        return same and scaling == self.adapter.scaling and self._look() == self._seen


def why_odd(module: Any, name: str) -> str:
    """Why an adapter of a layer is more than A, B and scaling on the CPU; "" if it is not."""
    torch = tensors.torch()
    if name in module.lora_variant:
        return type(module.lora_variant[name]).__name__
    for half in (module.lora_A[name], module.lora_B[name]):
        if type(half) is not torch.nn.Linear or type(half.weight) is not torch.nn.Parameter:
            weight = getattr(half, "weight", None)
            return f"its half is a {type(half).__name__} of a {type(weight).__name__}"
        if half.bias is not None:
            return "lora_bias adds a bias to B"
        if not half.weight.is_cpu:
            return f"its weights are on {half.weight.device}"
        if not is_float(half.weight.dtype):
            return f"its weights are {half.weight.dtype}"
        if half.weight.is_inference():
            return "its weights were made under inference_mode, where torch counts no changes"
    return ""


@cache
def is_float(dtype: object) -> bool:
    """Whether the type is one that add_lora takes."""
    return tensors.name_of(dtype) in BITS
