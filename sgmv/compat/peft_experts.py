"""Layers of experts whose parameters are adapted: mixed batches, which PEFT refuses there.

    PEFT   one adapter at a time: all experts' W + scaling * B @ A, made anew at every call
    here   the products of the experts' own W, and `experts.add_lora` of each token's adapter

PEFT puts a ParamWrapper around the module for each adapted parameter, one around the other. The
outermost gets tokens, their experts and the router's weights, as transformers 5's modules of
experts do; the module itself is left out, but for its activation.

Source: peft 0.21, lora/layer.py, `ParamWrapper`; transformers 5, integrations/moe.py.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from sgmv import tensors
from sgmv.adapter import ExpertAdapter
from sgmv.compat.peft_batches import Batches
from sgmv.compat.peft_hooks import Replacement
from sgmv.compat.peft_weights import Source, is_float, linear_now, why_odd, why_odd_tensor
from sgmv.dtypes import Array, promote, sum_dtype
from sgmv.errors import ShapeError
from sgmv.experts.adapters import ExpertStack, add_lora
from sgmv.experts.grouped import products_of
from sgmv.ids import BASE_ONLY
from sgmv.layouts.peft import BASE_NAME
from sgmv.peft_experts import unpacked
from sgmv.segment import Segments, segment
from sgmv.tensors import as_array

CALL, KEYWORD = "forward", "adapter_names"
PARAMETERS = ("gate_up_proj", "down_proj")


def is_outermost(module: Any) -> bool:
    """Whether this is a wrapper around experts whose products are known here.

    The wrappers inside of it are not asked: the outermost stands for them.
    """
    lora: Any = sys.modules["peft"].tuners.lora
    wrapper = getattr(lora.layer, "ParamWrapper", None)
    if wrapper is None or not isinstance(module, wrapper):
        return False
    base = module.get_base_layer()
    parameters: list[Any] = [getattr(base, name, None) for name in PARAMETERS]
    known = getattr(base, "has_gate", False) and hasattr(base, "_apply_gate")
    plain = not (
        getattr(base, "_is_expert_parallel", True) or getattr(base, "has_post_expert_norm", True)
    )
    return (
        bool(known and plain)
        and all(
            tensors.is_tensor(each)
            and each.ndim == 3
            and is_float(each.dtype)
            and not why_odd_tensor(each)
            for each in parameters
        )
        and {each.parameter_name for each in _wrappers(module)} <= {*PARAMETERS}
    )


def _wrappers(module: Any) -> list[Any]:
    """The wrappers, from the outermost to the innermost."""
    found = []
    while hasattr(module, "parameter_name"):
        found.append(module)
        module = module.base_layer
    return found


class _Part:
    """One adapted parameter: its adapters in a stack, by the ids that all layers share."""

    def __init__(self, wrapper: Any, batches: Batches) -> None:
        self.wrapper = wrapper
        self.sources: dict[str, Source] = {}
        self.odd: dict[str, str] = {}
        self._batches = batches
        self.stack = self._empty(0, 1, np.dtype(np.float32))

    def _empty(self, slots: int, rank: int, dtype: np.dtype[Any]) -> ExpertStack:
        widths = self.wrapper.in_features, self.wrapper.out_features
        return ExpertStack(
            self.wrapper.num_experts, *widths, slots=slots, max_rank=rank, dtype=dtype
        )

    def is_current(self, name: str) -> bool:
        source, now = self.sources.get(name), linear_now(self.wrapper, name)
        if now is None:
            return source is None and name not in self.odd
        return source is not None and source.is_current(now)

    def forget(self, name: str, adapter_id: int) -> None:
        self.sources.pop(name, None)
        self.odd.pop(name, None)
        if adapter_id in self.stack:
            self.stack.unload(adapter_id)

    def load(self, names: Sequence[str]) -> None:
        """Have these adapters as they are now: from PEFT's two matrices, an A and B per expert."""
        for name in names:
            self.forget(name, self._batches.id(name))
            now = linear_now(self.wrapper, name)
            if now is None:
                continue
            if why := why_odd(self.wrapper, name):
                self.odd[name] = why
            else:
                self.sources[name] = Source(now)
        made = {name: self._adapter(source) for name, source in self.sources.items()}
        ranks = [adapter.of(0).r for adapter in made.values()]
        types = [adapter.of(0).dtype for adapter in made.values()]
        stack = self.stack
        if made and (
            promote(*types) != stack.stack.dtype
            or max(ranks) > stack.stack.max_rank
            or len(made) * stack.experts > stack.stack.slots
        ):
            stack = self._empty(2 * len(made), max(ranks), promote(*types))
        for name, adapter in made.items():
            if name in names or stack is not self.stack:
                stack.load(self._batches.id(name), adapter)
        self.stack = stack

    def _adapter(self, source: Source) -> ExpertAdapter:
        packed = source.adapter
        A, B = unpacked(packed.A, packed.B, self.wrapper.num_experts, swapped=False)
        return ExpertAdapter(A, B, packed.scaling)


class ExpertsLayer:
    """A layer of experts, as `Accelerated` has layers."""

    def __init__(self, name: str, module: Any, batches: Batches) -> None:
        self.name, self.module, self._batches = name, module, batches
        self.inside = _wrappers(module)[1:]
        self._parts = {each.parameter_name: _Part(each, batches) for each in _wrappers(module)}
        self._own_call = module.forward
        # A graph of torch.compile's ends here: what runs is this, not what is read of it.
        self._replacement = Replacement(module, CALL, tensors.torch().compiler.disable(self._call))

    @property
    def sources(self) -> dict[str, Source]:
        """What the stacks hold, by adapter name."""
        return {name: s for part in self._parts.values() for name, s in part.sources.items()}

    @property
    def odd(self) -> dict[str, str]:
        """Adapters that are left to PEFT, and why."""
        return {name: why for part in self._parts.values() for name, why in part.odd.items()}

    def take(self) -> None:
        self._replacement.take()

    def restore(self) -> None:
        self._replacement.restore()

    def has(self, name: str) -> bool:
        """Whether the layer has this adapter in PEFT."""
        return any(linear_now(part.wrapper, name) is not None for part in self._parts.values())

    def forget(self, name: str, adapter_id: int) -> None:
        """Have nothing of an adapter that PEFT has deleted."""
        for part in self._parts.values():
            part.forget(name, adapter_id)

    def refresh(self, names: Iterable[str]) -> None:
        """Have these adapters in the stacks as they are now."""
        names = list(names)
        for part in self._parts.values():
            if not all(map(part.is_current, names)):
                with self._batches.changing:
                    part.load([name for name in names if not part.is_current(name)])

    def types(self) -> tuple[np.dtype[Any], ...]:
        """The float types of x, weights and y."""
        (part, *_) = self._parts.values()
        dtype = tensors.float_dtype("weight", self.module.get_base_layer().down_proj.dtype)
        return dtype, part.stack.stack.dtype, np.dtype(np.float32)

    def _call(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        """In place of the outermost wrapper's `forward`."""
        if KEYWORD not in kwargs and self._batches.is_mixed:
            kwargs[KEYWORD] = self._batches.names_now
        names = kwargs.get(KEYWORD)
        if names is None or not self._serves(names, x, args):
            return self._own_call(x, *args, **kwargs)
        return self._mixed(x, args[0], args[1], names)

    def _serves(self, names: Sequence[str], x: Any, args: Sequence[Any]) -> bool:
        """Whether nothing about this batch is left to PEFT, which refuses it."""
        module, torch = self.module, tensors.torch()
        if not self._batches.here.are_fresh:
            self.refresh({name for name in names if name != BASE_NAME and self.has(name)})
        is_plain = not (module.training or module.disable_adapters or module.merged)
        records = torch.is_grad_enabled() and (
            x.requires_grad or any(weight.requires_grad for weight in module.parameters())
        )
        is_known = len(args) == 2 and x.ndim == 2 and x.is_cpu and is_float(x.dtype)
        return is_plain and not records and is_known and self.odd.keys().isdisjoint(names)

    def _mixed(self, x: Any, experts: Any, weights: Any, names: Sequence[str]) -> Any:
        """The layer of tokens x (n, hidden), of len(names) samples one after the other."""
        base, (n, hidden) = self.module.get_base_layer(), x.shape
        if n % len(names):
            raise ShapeError(
                f"{self.name}: x", f"as many tokens of each of {len(names)} samples", str(n),
                "give one name in adapter_names per sample",
            )  # fmt: skip
        ids = as_array("top_k_index", experts).astype(np.int64)
        pairs = segment(np.where(ids < base.num_experts, ids, BASE_ONLY))
        of_row = self._batches.of(names).segments(n // len(names)).named
        inner = base._apply_gate(self._product("gate_up_proj", x, pairs, of_row, experts))
        y = self._product(
            "down_proj", inner.reshape(n, pairs.k, inner.shape[-1]), pairs, of_row, experts
        )
        return (y.reshape(n, pairs.k, hidden) * weights.unsqueeze(-1)).sum(1).to(x.dtype)

    def _product(self, name: str, x: Any, pairs: Segments, of_row: Array, experts: Any) -> Any:
        """(n * k, columns) of x's type: a parameter's products, with deltas, and its bias."""
        base, torch = self.module.get_base_layer(), tensors.torch()
        W = getattr(base, name).detach()
        rows = as_array("x", x.detach().contiguous())
        if base.is_transposed:  # read as it is stored: by torch
            flat = x.reshape(-1, x.shape[-1])
            out = np.zeros((pairs.n, pairs.k, W.shape[2]), sum_dtype(rows.dtype))
            found = torch.from_numpy(out).reshape(-1, W.shape[2])
            order = torch.tensor(pairs.pairs)
            own = order if x.ndim == 3 else order // pairs.k
            for e, of in zip(pairs.adapter_ids, _spans(pairs), strict=True):
                if e != BASE_ONLY:
                    found[order[of]] = (flat[own[of]] @ W[e]).to(found.dtype)
        else:
            out, _ = products_of(rows, name, W, pairs)
        if part := self._parts.get(name):
            known = np.where(np.isin(of_row, part.stack.ids), of_row, BASE_ONLY)
            add_lora(out, rows, part.stack, pairs, known)
        y = torch.from_numpy(out).to(x.dtype).reshape(-1, out.shape[2])
        if base.has_bias:
            y = y + getattr(base, f"{name}_bias")[experts.reshape(-1)]
        return y


def _spans(pairs: Segments) -> list[slice]:
    """The positions of each segment."""
    return [slice(*ends) for ends in zip(pairs.seq_start[:-1], pairs.seq_start[1:], strict=True)]
