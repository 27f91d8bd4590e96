"""A PEFT layer's A and B: whether they have changed, and which of them are left to PEFT."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from sgmv import tensors
from sgmv.adapter import Adapter
from sgmv.compat.peft_dora import VARIANTS, Home, Norms, home_of, why_not
from sgmv.dtypes import BITS, Array
from sgmv.tensors import as_array

CORNER = 8  # how many values of the first rows of A and of B are held to tell a swap
ALORA = "ALoraLinearVariant"  # PEFT's class: plain LoRA from some token on


# An adapter of a layer as PEFT has it at this moment: A, B, B's bias or None, scaling; and of a
# linear layer the modules of A and B; and where its magnitude is, with DoRA. A plain tuple: one is
# made per layer, adapter and step.
Now = tuple[Any, Any, Any, float, Any, Any, Home | None]


class Source:
    """The tensors that a slot was copied from, and whether they have changed since.

    A change is seen by the tensors' identity, their addresses and torch's count of changes. Writes
    through `.data` are not counted. PEFT's hotswap makes them, of whole tensors: comparing a few
    values shows them. The arrays hold the memory, so that no address is used again.

    adapter    what the slot holds: A and B; of a biased adapter one rank more; of DoRA with gains
    is_biased  whether B's last column is its bias, and A's last row is 0
    """

    def __init__(self, now: Now) -> None:
        self._A, self._B, self._bias, self._scaling, home_a, home_b, home = now
        A = _array(self._A, home_a, "weight")
        B = _array(self._B, home_b, "weight")
        self._corners = [A[0, :CORNER], B[0, :CORNER]]
        self._arrays = [A, B]
        self.is_biased = self._bias is not None
        if self.is_biased:
            bias = _array(self._bias, home_b, "bias")
            self._corners.append(bias[:CORNER])
            self._arrays.append(bias)
            A = np.concatenate([A, np.zeros_like(A[:1])])
            B = np.concatenate([B, bias[:, None].astype(B.dtype)], axis=1)
        self.adapter = Adapter(A, B, self._scaling)
        self._norms = None if home is None else Norms(home)
        if self._norms is not None:
            self.adapter = self._norms.gained(self.adapter)
        self._seen = self._look()

    def _look(self) -> tuple[object, ...]:
        A, B, bias = self._A, self._B, self._bias
        a, b, *c = self._corners
        seen = A.data_ptr(), B.data_ptr(), A._version, B._version, a.tobytes(), b.tobytes()
        return seen if bias is None else (*seen, bias.data_ptr(), bias._version, c[0].tobytes())

    def is_current(self, now: Now) -> bool:
        """Whether these are the same tensors, unchanged since they were copied."""
        A, B, bias, scaling, home_a, home_b, home = now
        same = A is self._A and B is self._B and bias is self._bias and scaling == self._scaling
        if not same or is_hooked(home_a, home_b) or self._look() != self._seen:
            return False
        return home is None if self._norms is None else self._norms.are_current(home)


def _array(tensor: Any, home: Any, part: str) -> Array:
    return as_array("lora_A, lora_B", tensor if tensor.is_cpu else offloaded(home, part))


def linear_now(module: Any, name: str) -> Now | None:
    """A linear layer's adapter; None if the layer lacks it."""
    # Not `lora_A[name].weight`: nn.Module's own look-up took 4 of 5 us per layer and adapter.
    halves = module._modules
    A, B = halves["lora_A"]._modules.get(name), halves["lora_B"]._modules.get(name)
    if A is None or B is None:
        return None
    a, b = A._parameters, B._parameters
    scaling = float(module.scaling[name])  # a tensor, where prepared for PEFT's hotswap
    return a.get("weight"), b.get("weight"), b.get("bias"), scaling, A, B, home_of(module, name)


def embedding_now(module: Any, name: str) -> Now | None:
    """An embedding's adapter; None if the layer lacks it."""
    halves = module._modules
    A = halves["lora_embedding_A"]._parameters.get(name)
    B = halves["lora_embedding_B"]._parameters.get(name)
    if A is None or B is None:
        return None
    # Of Gemma 3, where the base layer multiplies its own result by it.
    scale = module._get_embed_scale() if hasattr(module, "_get_embed_scale") else None
    scaling = float(module.scaling[name]) * (1.0 if scale is None else float(scale))
    return A, B, None, scaling, None, None, home_of(module, name)


def is_hooked(*halves: Any) -> bool:
    """Whether somebody listens to A's or B's own forward, which add_lora does not call."""
    for half in halves:
        if half is None:
            continue
        inside = half.__dict__
        if inside["_forward_hooks"] or inside["_forward_pre_hooks"]:
            return True
        if "forward" in inside and "_hf_hook" not in inside:
            return True
    return False


def why_odd(module: Any, name: str) -> str:
    """Why an adapter of a layer is more than A, B, bias and scaling; "" if it is not."""
    torch = tensors.torch()
    if why := why_odd_variant(module, name):
        return why
    if is_hooked(module.lora_A[name], module.lora_B[name]):
        return "a forward hook, or another forward, of its lora_A or lora_B"
    for half in (module.lora_A[name], module.lora_B[name]):
        if type(half) is not torch.nn.Linear or type(half.weight) is not torch.nn.Parameter:
            weight = getattr(half, "weight", None)
            return f"its half is a {type(half).__name__} of a {type(weight).__name__}"
        for part, weight in half.named_parameters():
            if why := why_odd_tensor(weight, offloaded(half, part)):
                return why
    if module.lora_A[name].bias is not None:
        return "a bias of lora_A"
    return ""


def why_odd_variant(module: Any, name: str, known: tuple[str, ...] = (ALORA, *VARIANTS)) -> str:
    """Why what PEFT makes of an adapter cannot be made here; "" if it can, or is plain LoRA."""
    variant = type(module.lora_variant.get(name)).__name__
    if name in module.lora_variant and variant not in known:
        return variant
    home = home_of(module, name)
    if home is None:
        return ""
    return "a forward hook of its magnitude" if is_hooked(home[0]) else why_not(home)


def why_odd_embedding(module: Any, name: str) -> str:
    """Why an adapter of an embedding is more than A, B, scaling and magnitude; "" if it is not."""
    if why := why_odd_variant(module, name, VARIANTS):
        return why
    scaled = hasattr(module, "_get_embed_scale") and module._get_embed_scale() is not None
    if name in module.lora_variant and scaled:
        return "DoRA of an embedding whose result is multiplied"
    if module.get_base_layer().max_norm is not None:
        return "max_norm of its base layer, which PEFT applies to A, too"
    halves = module.lora_embedding_A[name], module.lora_embedding_B[name]
    return next(filter(None, (why_odd_tensor(half) for half in halves)), "")


def why_odd_tensor(weight: Any, kept: Any = None) -> str:
    """Why a weight cannot be read; `kept` is what is in its place where it is offloaded."""
    if not weight.is_cpu and kept is None:
        return f"its weights are on {weight.device}"
    if not is_float(weight.dtype):
        return f"its weights are {weight.dtype}"
    if weight.is_inference():
        return "its weights were made under inference_mode, where torch counts no changes"
    return ""


def offloaded(half: Any, part: str) -> Any:
    """A parameter that accelerate's hook brings from memory or disk when it is needed, or None."""
    hook: Any = getattr(half, "_hf_hook", None)
    weights = getattr(hook, "weights_map", None) if getattr(hook, "offload", False) else None
    try:
        found: Any = None if weights is None else weights[part]
    except KeyError:
        return None
    return found if tensors.is_tensor(found) and found.device.type == "cpu" else None


@cache
def is_float(dtype: object) -> bool:
    """Whether the type is one that add_lora takes."""
    return tensors.name_of(dtype) in BITS
