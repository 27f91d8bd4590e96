"""Adapted layers of a PEFT model: their adapters in stacks, their mixed batches by sgmv's calls.

    LinearLayer     lora.Linear, torchao's and bitsandbytes' layers; lora_bias and aLoRA, too
    EmbeddingLayer  lora.Embedding

The delta is the same whatever the base layer is: it is called, and its result added to.
"""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from sgmv import tensors
from sgmv.adapter import Adapter
from sgmv.backend import kernels
from sgmv.compat.peft_batches import Batch, Batches
from sgmv.compat.peft_dora import home_of
from sgmv.compat.peft_graphs import Node
from sgmv.compat.peft_hooks import Replacement
from sgmv.compat.peft_weights import (
    ALORA,
    Now,
    Source,
    embedding_now,
    is_float,
    linear_now,
    why_odd,
    why_odd_embedding,
)
from sgmv.dtypes import promote
from sgmv.embedding import add_lora_embedding
from sgmv.errors import MemoryLayoutError, ShapeError
from sgmv.expand import expand
from sgmv.launch import run_both_at
from sgmv.layouts.peft import BASE_NAME
from sgmv.segment import Segments
from sgmv.shrink import shrink
from sgmv.stack import AdapterStack
from sgmv.tensors import as_array, float_dtype
from sgmv.workers import torchs_pool

MIXED, CALL, CHECK = "_mixed_batch_forward", "forward", "_check_forward_args"
KEYWORD = "adapter_names"


def kind_of(module: Any) -> type[Layer] | None:
    """The class for a layer of PEFT's that mixes batches as is known here."""
    lora: Any = sys.modules["peft"].tuners.lora
    method = getattr(type(module), MIXED, None)
    if isinstance(module, lora.Embedding):
        return EmbeddingLayer if method is lora.Embedding._mixed_batch_forward else None
    known = [lora.Linear]  # torchao's mixes by the same method; bitsandbytes' by ones of their own
    quantised = sys.modules.get("peft.tuners.lora.bnb")
    known += [
        getattr(quantised, name)
        for name in ("Linear8bitLt", "Linear4bit")
        if hasattr(quantised, name)
    ]
    is_known = isinstance(module, tuple(known)) and method in [getattr(k, MIXED) for k in known]
    return LinearLayer if is_known else None


class Layer:
    """One adapted layer: the adapters that are served in a stack, and the rest, with the reason."""

    def __init__(self, name: str, module: Any, batches: Batches) -> None:
        self.name, self.module = name, module
        self.sources: dict[str, Source] = {}  # what the stack holds, by adapter name
        self.odd: dict[str, str] = {}  # adapters that PEFT computes, and why
        self.biased: set[str] = set()  # adapters with a bias of B's
        self.stack = AdapterStack(*self._widths(), slots=0)
        self._batches = batches
        self._own_forward: Callable[..., Any] = getattr(module, MIXED)
        self._own_kwargs = getattr(sys.modules["peft"].tuners.lora.layer, "VARIANT_KWARG_KEYS", ())
        self._own_call: Callable[..., Any] = module.forward
        self._own_check: Callable[..., None] = getattr(module, CHECK)
        self._replacements = [
            Replacement(module, MIXED, self._forward),
            Replacement(module, CALL, self._call),
            Replacement(module, CHECK, self._check),
        ]
        self._node, self._outside = Node(self), tensors.torch().compiler.disable(self._call)

    def _widths(self) -> tuple[int, int]:
        return self.module.in_features, self.module.out_features

    def _now(self, name: str) -> Now | None:
        """An adapter's tensors and scaling as PEFT has them now; None if the layer lacks it."""
        return linear_now(self.module, name)

    def _why_odd(self, name: str) -> str:
        return why_odd(self.module, name)

    def _add(self, y: Any, x: Any, batch: Batch, offsets: Sequence[int | None] | None) -> None:
        """Add each row's own delta to y, the base layer's result."""
        raise NotImplementedError

    def take(self) -> None:
        for replacement in self._replacements:
            replacement.take()

    def restore(self) -> None:
        for replacement in self._replacements:
            replacement.restore()

    def has(self, name: str) -> bool:
        """Whether the layer has this adapter in PEFT."""
        return self._now(name) is not None

    def forget(self, name: str, adapter_id: int) -> None:
        """Have nothing of an adapter that PEFT has deleted."""
        self.sources.pop(name, None)
        self.odd.pop(name, None)
        if adapter_id in self.stack:
            self.stack.unload(adapter_id)

    def _call(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        """In place of the layer's own `forward`: the batch's names, which PEFT has hooks for.

        A layer has names of its own where an encoder's batch is not its decoder's, with beams.
        """
        if not self._batches.is_mixed or KEYWORD in kwargs:
            return self._own_call(x, *args, **kwargs)
        if tensors.torch().compiler.is_compiling():
            return self._trace(x, *args, **kwargs)
        return self._own_call(x, *args, adapter_names=self._batches.names_now, **kwargs)

    def _trace(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        """`_call` as torch.compile reads it: what it asks here is asked again for each batch.

        Not whose batch it is: the node finds that out as it runs. What PEFT may compute, or refuse,
        interrupts the graph, and is called as without torch.compile.
        """
        module = self.module
        is_plain = not (self.odd or kwargs or module.lora_variant or module.disable_adapters)
        if not is_plain or module.merged_adapters or self._would_record(x):
            return self._outside(x, *args, **kwargs)
        y = module.base_layer(x, *args).contiguous()
        self._node(y, x.contiguous())
        return y

    def add_now(self, y: Any, x: Any) -> None:
        """Add each row's own delta to y, the base layer's result: the node of a graph, as it runs.

        A graph outlives its batch, and the context: torch runs it again for batches like it.
        """
        names = self._batches.names_now
        if not self._batches.here.are_fresh:
            self.refresh({*names} - {BASE_NAME})
        self._add(y, x, self._batches.of(names), None)

    def _check(self, x: Any, *args: Any, **kwargs: Any) -> None:
        """In place of PEFT's own: it refuses names of DoRA adapters, as it does not mix them."""
        names = kwargs.get(KEYWORD)
        if names is not None and self.module._modules.get("lora_magnitude_vector"):
            kwargs[KEYWORD] = [BASE_NAME if home_of(self.module, n) else n for n in names]
        self._own_check(x, *args, **kwargs)

    def _forward(self, x: Any, *args: Any, adapter_names: Sequence[str], **kwargs: Any) -> Any:
        """In place of the layer's own `_mixed_batch_forward`."""
        if not self._batches.here.are_fresh:
            # Names that no model's call has checked get no id: the layer lacks them.
            known = self._batches.names | {name for name in adapter_names if self.has(name)}
            self.refresh(known.intersection(adapter_names))
            batch = self._batches.of([n if n in known else BASE_NAME for n in adapter_names])
        else:
            batch = self._batches.of(adapter_names)
        if not self._serves(batch, x):
            self._own_check(x, *args, adapter_names=adapter_names, **kwargs)
            return self._own_forward(x, *args, adapter_names=adapter_names, **kwargs)
        offsets = kwargs.get("alora_offsets")
        for name in self._own_kwargs:  # of the adapters' forward, not of the base layer's
            kwargs.pop(name, None)
        result = self.module.base_layer(x, *args, **kwargs).contiguous()
        self._add(result, x.contiguous(), batch, offsets)
        return result

    def _serves(self, batch: Batch, x: Any) -> bool:
        """Whether nothing about this batch is PEFT's own to compute."""
        if not self.odd.keys().isdisjoint(batch.used) or self.module.training:
            return False
        torch = tensors.torch()
        # By its address: no subclass, and not torch's lazy negation, which is in no byte of it.
        if type(x) is not torch.Tensor or not x.is_cpu or not self._takes(x) or x.is_neg():
            return False
        if self._would_record(x):
            warnings.warn(
                "sgmv.compat.peft: gradients are recorded, so PEFT's own path runs; for inference, "
                "call the model under torch.inference_mode() or torch.no_grad()",
                stacklevel=2,
            )
            return False
        return True

    def _would_record(self, x: Any) -> bool:
        """Whether torch records gradients of this layer's call."""
        if not tensors.torch().is_grad_enabled():
            return False
        return x.requires_grad or any(weight.requires_grad for weight in self.module.parameters())

    def _takes(self, x: Any) -> bool:
        return is_float(x.dtype)

    def refresh(self, names: Iterable[str]) -> None:
        """Have these adapters in the stack as they are now."""
        if all(map(self._is_current, names)):
            return
        with self._batches.changing:
            self._load([name for name in names if not self._is_current(name)])

    def _is_current(self, name: str) -> bool:
        source, now = self.sources.get(name), self._now(name)
        if now is None:
            return source is None and name not in self.odd and self._batches.id(name) in self.stack
        return source is not None and source.is_current(now)

    def _load(self, names: Sequence[str]) -> None:
        made: dict[str, Source] = {}
        for name in names:
            self.sources.pop(name, None)
            self.odd.pop(name, None)
            if now := self._now(name):
                if why := self._why_odd(name):
                    self.odd[name] = why
                else:
                    made[name] = Source(now)
        # Base only in the stack: what the layer lacks, and what PEFT computes.
        loaded: dict[int, Adapter | None] = {self._batches.id(name): None for name in names}
        loaded |= {self._batches.id(name): source.adapter for name, source in made.items()}
        stack = self.stack
        for adapter_id in loaded:
            if adapter_id in stack:
                stack.unload(adapter_id)
        held = [source.adapter for source in (*self.sources.values(), *made.values())]
        dtype = promote(*(adapter.dtype for adapter in held)) if held else stack.dtype
        rank = max((adapter.r for adapter in held), default=0)
        if dtype != stack.dtype or rank > stack.max_rank or len(held) > stack.slots:
            kept = {self._batches.id(name): source.adapter for name, source in self.sources.items()}
            loaded = {**dict.fromkeys(stack), **kept, **loaded}
            stack = AdapterStack(stack.h_in, stack.h_out, 2 * len(held), rank, dtype)
        for adapter_id, adapter in loaded.items():
            stack.load(adapter_id, adapter)
        self.stack = stack
        self.sources.update(made)
        self.biased = {name for name, source in self.sources.items() if source.is_biased}

    def types(self) -> tuple[np.dtype[Any], ...]:
        """The float types of x, weights and y, as the base layer's own type foretells them."""
        # Not `base_layer.weight`: torch.ao's is a method, others' a list, or made when asked for.
        weight = self.module.get_base_layer()._parameters.get("weight")
        if weight is None or not is_float(weight.dtype):
            return (self.stack.dtype,) * 3
        dtype = float_dtype("weight", weight.dtype)
        return dtype, self.stack.dtype, dtype

    def _check_shapes(self, x: Any, y: Any, batch: Batch, *width: int) -> None:
        """Refuse what is not an x of this width, or without one, and a row of y for each token."""
        tokens = len(batch.names), *x.shape[1 : x.dim() - len(width)]
        shapes = (*tokens, *width), (*tokens, self.stack.h_out)
        if (x.shape, y.shape) != shapes:
            raise ShapeError(
                f"{self.name}: x and result",
                f"(samples, ...) = {shapes[0]} and {shapes[1]}",
                f"{tuple(x.shape)} and {tuple(y.shape)}",
                "give one name in adapter_names per sample, and keep the base layer's widths",
            )


class LinearLayer(Layer):
    """A linear layer, in one call for all rows."""

    def _add(self, y: Any, x: Any, batch: Batch, offsets: Sequence[int | None] | None) -> None:
        self._check_shapes(x, y, batch, self.stack.h_in)
        tokens = math.prod(x.shape[1:-1])
        active = self._active(batch, tokens, offsets)
        segments = batch.segments(tokens, active)
        if self.biased.isdisjoint(batch.used):
            self._add_lora(y, x, segments)
        else:
            self._add_biased(y, x, segments, {self._batches.id(name) for name in self.biased})

    def _active(
        self, batch: Batch, tokens: int, offsets: Sequence[int | None] | None
    ) -> tuple[int, ...] | None:
        """How many of each sample's last tokens have its adapter; None if all tokens of all have.

        An aLoRA's begin with its invocation, which is `offset` tokens before the end, or missing.
        """
        variants = self.module.lora_variant
        activated = {name for name in variants if type(variants[name]).__name__ == ALORA}
        if activated.isdisjoint(batch.used):
            return None
        begins = [None] * len(batch.names) if offsets is None else offsets
        return tuple(
            min(int(offset or 0), tokens) if name in activated else tokens
            for name, offset in zip(batch.names, begins, strict=True)
        )

    def _add_lora(self, y: Any, x: Any, segments: Segments) -> None:
        """`add_lora` of contiguous tensors, by their addresses.

        On caches that the base layer has just emptied, to make an array of a tensor took 30 us.
        """
        stack = self.stack
        x_dtype, y_dtype = float_dtype("x", x.dtype), float_dtype("result", y.dtype)
        x_row_bytes, y_row_bytes = stack.h_in * x_dtype.itemsize, stack.h_out * y_dtype.itemsize
        x_at, y_at = x.data_ptr(), y.data_ptr()
        if x_at < y_at + segments.n * y_row_bytes and y_at < x_at + segments.n * x_row_bytes:
            raise MemoryLayoutError(
                f"{self.name}: result", "memory apart from x", "its base layer's own input",
                "have the base layer return a new tensor",
            )  # fmt: skip
        table, compiled = stack.table, kernels(None, x_dtype, stack.dtype, y_dtype)
        x_rows, y_rows = (x_at, x_row_bytes), (y_at, y_row_bytes)
        run_both_at(compiled, table, segments, torchs_pool(), x_rows, y_rows)

    def _add_biased(self, y: Any, x: Any, segments: Segments, biased: set[int]) -> None:
        """B's bias is one more column of B, for which v is 1: added before y is rounded."""
        rows = as_array("x", x.detach()).reshape(-1, self.stack.h_in)
        v = shrink(rows, self.stack, segments)
        for s, adapter_id in enumerate(segments.adapter_ids.tolist()):
            if adapter_id in biased:
                adapter = self.stack[adapter_id]
                first, end = segments.seq_start[s : s + 2]
                if adapter is not None:
                    v[first:end, adapter.r - 1] = 1
        expand(v, self.stack, segments, as_array("result", y).reshape(-1, self.stack.h_out))


class EmbeddingLayer(Layer):
    """An embedding: the first product of a token is a look-up."""

    def _widths(self) -> tuple[int, int]:
        base = self.module.get_base_layer()
        return base.num_embeddings, base.embedding_dim

    def _now(self, name: str) -> Now | None:
        return embedding_now(self.module, name)

    def _why_odd(self, name: str) -> str:
        return why_odd_embedding(self.module, name)

    def _takes(self, x: Any) -> bool:
        torch = tensors.torch()
        return x.dtype in (torch.int64, torch.int32)

    def _add(self, y: Any, x: Any, batch: Batch, offsets: Sequence[int | None] | None) -> None:
        self._check_shapes(x, y, batch)
        segments = batch.segments(math.prod(x.shape[1:]))
        rows = as_array("result", y).reshape(-1, self.stack.h_out)
        add_lora_embedding(rows, x.reshape(-1).numpy(), self.stack, segments)
