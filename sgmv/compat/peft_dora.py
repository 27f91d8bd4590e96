"""DoRA in a PEFT layer: gains of its base weight, and whether what they were taken of has changed.

PEFT takes norms of the base weight anew at each call, and refuses mixed batches. Here they are
taken when an adapter is loaded, and again when its A or B, its magnitude, or the base layer's
weight or bias have changed.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

from sgmv import tensors
from sgmv.adapter import Adapter, with_gains
from sgmv.dora import gains_of
from sgmv.dtypes import BITS, Array
from sgmv.errors import SgmvError
from sgmv.tensors import as_array

CORNER = 8  # values of the first row that tell a change which torch does not count, as a merge
VARIANTS = ("DoraLinearVariant", "DoraEmbeddingVariant")  # PEFT's classes
Home = tuple[Any, Any]  # the module of a magnitude, and the base layer


def home_of(module: Any, name: str) -> Home | None:
    """Where an adapter of a layer has its magnitude; None if it is plain LoRA."""
    magnitudes = module._modules.get("lora_magnitude_vector")
    home = None if magnitudes is None else magnitudes._modules.get(name)
    return None if home is None else (home, module.get_base_layer())


class Norms:
    """What an adapter's gains were taken of, and whether it has changed since."""

    def __init__(self, home: Home) -> None:
        self._home, self._tensors = home, _tensors(home)
        magnitude, weight, bias = self._tensors
        self._magnitude = as_array("lora_magnitude_vector", magnitude)
        self._bias = None if bias is None else as_array("bias", bias)
        arrays = [self._magnitude, self._bias]
        if is_plain(weight):
            arrays.append(as_array("weight", weight)[0])
        self._corners = [array[:CORNER] for array in arrays if array is not None]
        self._seen = self._look()

    def gained(self, adapter: Adapter) -> Adapter:
        """The adapter with its magnitude, and with its gains in this layer."""
        home, base = self._home
        W = weight_of(base)
        made = replace(adapter, magnitude=self._magnitude)
        return with_gains(made, gains_of(made, W.T if home.fan_in_fan_out else W, self._bias))

    def are_current(self, home: Home | None) -> bool:
        """Whether the layer has the same tensors, unchanged."""
        if home is None or home[0] is not self._home[0] or home[1] is not self._home[1]:
            return False
        same = zip(_tensors(home), self._tensors, strict=True)
        return all(now is then for now, then in same) and self._look() == self._seen

    def _look(self) -> list[object]:
        there = [tensor for tensor in self._tensors if tensor is not None]
        seen: list[object] = [(tensor.data_ptr(), tensor._version) for tensor in there]
        return seen + [corner.tobytes() for corner in self._corners]


def _tensors(home: Home) -> tuple[Any, Any, Any]:
    """Magnitude, the base layer's weight, and its bias or None."""
    scale, base = home
    inside = base._parameters
    return scale._parameters["weight"], inside.get("weight"), inside.get("bias")


def weight_of(base: Any) -> Array:
    """The base layer's weight as numbers; a quantised one as PEFT itself dequantises it."""
    weight = base._parameters.get("weight")
    if not is_plain(weight):
        weight = sys.modules["peft"].utils.integrations.dequantize_module_weight(base)
    return as_array("weight", weight.detach())


def is_plain(weight: Any) -> bool:
    """Whether these are numbers of a float type, as they stand in memory."""
    torch = tensors.torch()
    is_dense = type(weight) in (torch.nn.Parameter, torch.Tensor)
    return is_dense and weight.is_cpu and tensors.name_of(weight.dtype) in BITS


def why_not(home: Home) -> str:
    """Why norms cannot be taken of the base layer; "" if they can."""
    magnitude, weight, bias = _tensors(home)
    for tensor in (magnitude, bias):
        if tensor is not None and not is_plain(tensor):
            return "its magnitude, or the bias of its base layer, is on another device"
    if weight is None:
        return "its base layer has no weight of its own"
    if any(tensor is not None and tensor.is_inference() for tensor in (magnitude, weight, bias)):
        return "the base layer was made under inference_mode, where torch counts no changes"
    if is_plain(weight):
        return ""
    try:
        weight_of(home[1])
    except (SgmvError, RuntimeError, TypeError, AttributeError, NotImplementedError) as error:
        return f"its base layer's weight cannot be read: {error}"
    return ""
