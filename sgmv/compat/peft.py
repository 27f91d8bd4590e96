"""PEFT's mixed batches through `add_lora`: one call per layer, where PEFT makes one per adapter.

    with accelerate(model):
        model(input_ids, adapter_names=["fr", "de", "__base__", "fr"])

    PEFT   for each adapter of the batch:  result[its] += lora_B(lora_A(x[its])) * scaling
    here   once:                           add_lora(result, x, stack, segments)

Two methods are replaced, on the model's own objects and until the context ends: each
`lora.Linear._mixed_batch_forward`, and `LoraModel._enable_peft_forward_hooks`, which still runs
PEFT's code but no longer walks through every module of the model at every step. All else is PEFT's:
its checks, its refusals, its hooks, the base layers, and every layer that is not plain LoRA. But
hooks that PEFT leaves in place, as a call ended with an exception, are removed: they would give the
next plain call the failed batch's adapters.

Neither torch nor PEFT is imported here: the caller has imported them, or there would be no model.
"""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import numpy as np

from sgmv import tensors
from sgmv.adapter import Adapter
from sgmv.backend import kernels
from sgmv.compat.peft_batches import Batch, Batches
from sgmv.compat.peft_hooks import Replacement, hook_id, remove_hooks
from sgmv.compat.peft_weights import Source, is_float, why_odd
from sgmv.dtypes import promote
from sgmv.errors import MemoryLayoutError, PeftError, ShapeError, some
from sgmv.launch import run_both_at
from sgmv.layouts.peft import BASE_NAME
from sgmv.stack import AdapterStack
from sgmv.tensors import float_dtype
from sgmv.warm_up import warm_up
from sgmv.workers import torchs_pool

HOOKS, MIXED = "_enable_peft_forward_hooks", "_mixed_batch_forward"


@contextmanager
def accelerate(model: Any) -> Iterator[Accelerated]:
    """Run a PEFT model's mixed batches through `add_lora` while the context lasts.

    Semantics: in `model(..., adapter_names=names)`, and `generate` alike, at every adapted linear
    layer: `result[i] += scaling * (x[i] @ A.T) @ B.T` for each token of sample i, with A, B and
    scaling of adapter names[i]; "__base__", and an adapter that the layer lacks, add nothing.
    Whatever else the model does, batches of one active adapter included, PEFT does.

    model   a `peft.PeftModel`, or its `LoraModel`, on the CPU and in eval mode
    types   x, result and weights each float32, float16, bfloat16 or float64. Sums are float32
            (float64 if any of them is), rounded once; PEFT rounds x and v to the weights' type, too
    yields  `Accelerated`: the layers taken over, and those left to PEFT, with the reason

    On entry the weights are copied into an AdapterStack per layer, and the kernels compiled: memory
    grows by the adapters' size. What has changed since is copied again when the model is called:
    weights trained, reassigned, cast or hotswapped, scalings, adapters that come and go. Unseen are
    only single values written past torch's count of changes, through `.data` or a numpy view.

    Of a call that ends with an exception, none of PEFT's hooks stay, as they do without; those of
    earlier calls are removed on entry, when no call may be running. A copy of the model, deep or
    pickled, is PEFT's alone.

    PEFT's own path runs, as without the context, for what is more than plain LoRA (DoRA and other
    variants, `lora_bias`), for embeddings, convolutions and layers with a mixed batch of their own
    (bitsandbytes, GPTQ, AWQ), for weights that are
    not on the CPU, and, with a warning, where gradients are recorded.

    Raises PeftError for a model that is no LoRA model, has no layer to take over, is in training
    mode or accelerated already; DtypeError for bfloat16 without ml_dtypes. The model is then as it
    was. As in PEFT, threads must not call one model at the same time with different names.
    Source: peft 0.21, src/peft/tuners/lora/layer.py, `LoraLayer._mixed_batch_forward`.

    >>> with accelerate("llama"):
    ...     pass
    Traceback (most recent call last):
    sgmv.errors.PeftError: model: expected a peft.PeftModel with LoRA adapters, got str; \
load one with PeftModel.from_pretrained
    """
    found = Accelerated(_lora_model(model))
    try:
        try:
            found._start()
            yield found
        finally:
            found._restore()
    except BaseException:
        found._restore()  # again, as an interrupt may have broken the first one off
        raise


def _lora_model(model: Any) -> Any:
    """The model's LoraModel, once nothing about it is refused."""
    peft: Any = sys.modules.get("peft")
    tuner = model.base_model if peft and isinstance(model, peft.PeftModel) else model
    if peft is None or not isinstance(tuner, peft.tuners.lora.LoraModel):
        raise PeftError(
            "model",
            "a peft.PeftModel with LoRA adapters",
            type(tuner).__name__,
            "load one with PeftModel.from_pretrained",
        )
    if tuner.training:
        raise PeftError("model", "eval mode", "training mode", "call model.eval() first")
    if isinstance(vars(tuner).get(HOOKS), Replacement):
        raise PeftError("model", "one accelerate at a time", "a second", "leave the first one")
    return tuner


class Accelerated:
    """What `accelerate` has taken over in a model, and what it leaves to PEFT."""

    def __init__(self, tuner: Any) -> None:
        self._tuner = tuner
        self._own_hooks: Callable[..., AbstractContextManager[None]] = getattr(type(tuner), HOOKS)
        self._batches = Batches()
        self._layers: dict[Any, _Layer] = {}
        self._others: dict[str, str] = {}
        self._wrappers: list[Any] = []
        self._configs: dict[str, Any] = {}
        self._replacement = Replacement(tuner, HOOKS, self._enable_hooks)
        self._left: list[tuple[list[Any], range]] = []  # modules, and ids of hooks to remove there

    @property
    def layers(self) -> list[str]:
        """The layers that have `add_lora` for mixed batches, under `load_peft`'s names."""
        return [layer.name for layer in self._layers.values() if layer.sources]

    @property
    def fallbacks(self) -> dict[str, str]:
        """What PEFT computes itself, and why: layers, and adapters of layers."""
        odd = {
            f"{layer.name}, {name}": why
            for layer in self._layers.values()
            for name, why in layer.odd.items()
        }
        return {**self._others, **odd}

    def __str__(self) -> str:
        lines = [f"{len(self.layers)} layers through add_lora"]
        return "\n".join(lines + [f"{name}: {why}" for name, why in self.fallbacks.items()])

    def _start(self) -> None:
        self._replacement.take()
        self._find()
        self._left.append((self._wrappers, range(hook_id())))
        self._remove_left()
        if not self.layers:
            raise PeftError(
                "model",
                "a linear layer with a plain LoRA adapter",
                some((f"{name}: {why}" for name, why in self.fallbacks.items()), 4),
                "run this model with PEFT alone",
            )
        warm_up({mix for layer in self._layers.values() if (mix := layer.types())})

    def _restore(self) -> None:
        self._remove_left()
        for layer in self._layers.values():
            layer.restore()
        self._replacement.restore()

    def _find(self) -> None:
        """Find the adapted layers, and load what is new there, or gone."""
        lora = sys.modules["peft"].tuners.lora
        configs = dict(self._tuner.peft_config)
        found: dict[Any, _Layer] = {}
        others, wrappers = {}, []
        for path, module in self._tuner.named_modules():
            name = path.removeprefix("model.")
            is_lora = isinstance(module, lora.LoraLayer)
            if is_lora or type(module).__module__.startswith("peft."):
                wrappers.append(module)
            if isinstance(module, lora.Linear) and _is_plain_method(module, lora.Linear):
                found[module] = self._layers.get(module) or _Layer(name, module, self._batches)
            elif is_lora:
                others[name] = f"a LoRA layer of type {type(module).__qualname__}"
        for module, layer in self._layers.items():
            if module not in found:
                layer.restore()
        self._layers, self._others, self._wrappers = found, others, wrappers
        for layer in found.values():
            layer.take()
        for name in self._batches.names - configs.keys():
            if not any(layer.has(name) for layer in found.values()):
                adapter_id = self._batches.forget(name)
                for layer in found.values():
                    layer.forget(name, adapter_id)
        for layer in found.values():
            layer.refresh({*layer.sources, *layer.odd, *configs})
        self._configs = configs

    def _is_current(self) -> bool:
        """Whether no adapter, and with it perhaps a layer, has come or gone since `_find`."""
        now = self._tuner.peft_config
        same = (now.get(name) is config for name, config in self._configs.items())
        return len(now) == len(self._configs) and all(same)

    @contextmanager
    def _enable_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """In place of `LoraModel._enable_peft_forward_hooks`: PEFT's own, over fewer modules."""
        names, batches = kwargs.get("adapter_names"), self._batches
        before = batches.here.are_fresh
        modules: list[Any] = []
        first = end = 0
        try:
            # Under the lock, the hooks of these ids are this call's, not another thread's.
            with batches.changing:
                self._remove_left()
                if names is not None and not self._is_current():
                    self._find()
                modules, first = self._wrappers, hook_id()
                own = self._own_hooks(_Wrappers(self._tuner, modules), *args, **kwargs)
                own.__enter__()
                end = hook_id()
                if names is not None:
                    used = {*names} - {BASE_NAME}
                    for layer in self._layers.values():
                        layer.refresh(used)
            batches.here.are_fresh = names is not None
            yield
            own.__exit__(None, None, None)
        except BaseException:
            self._left.append((modules, range(first, end or hook_id())))
            self._remove_left()
            raise
        finally:
            batches.here.are_fresh = before

    def _remove_left(self) -> None:
        """Remove PEFT's hooks of calls that ended with an exception.

        An interrupt may break this off too: the next call, or the end of the context, goes on.
        """
        while self._left:
            with self._batches.changing:
                for modules, ids in self._left[:1]:
                    remove_hooks(modules, ids)
                del self._left[:1]


def _is_plain_method(module: Any, plain: type) -> bool:
    """Whether a layer, as torchao's, mixes batches by the plain layer's own method."""
    return bool(getattr(type(module), MIXED) is getattr(plain, MIXED))


class _Wrappers:
    """Stands in for a LoraModel in its own method; `modules` has only those that it acts on."""

    def __init__(self, tuner: Any, wrappers: list[Any]) -> None:
        self._tuner, self._wrappers = tuner, wrappers

    def modules(self) -> Iterator[Any]:
        return iter(self._wrappers)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tuner, name)


class _Layer:
    """One `lora.Linear`: its plain adapters in a stack, its mixed batches through `add_lora`."""

    def __init__(self, name: str, module: Any, batches: Batches) -> None:
        self.name, self.module = name, module
        self.sources: dict[str, Source] = {}  # what the stack holds, by adapter name
        self.odd: dict[str, str] = {}  # adapters that PEFT computes, and why
        self.stack = AdapterStack(module.in_features, module.out_features, slots=0)
        self._batches = batches
        self._own_forward: Callable[..., Any] = getattr(module, MIXED)
        self._own_kwargs = getattr(sys.modules["peft"].tuners.lora.layer, "VARIANT_KWARG_KEYS", ())
        self._replacement = Replacement(module, MIXED, self._forward)

    def take(self) -> None:
        self._replacement.take()

    def restore(self) -> None:
        self._replacement.restore()

    def has(self, name: str) -> bool:
        """Whether the layer has this adapter in PEFT."""
        return self._now(name) is not None

    def forget(self, name: str, adapter_id: int) -> None:
        """Have nothing of an adapter that PEFT has deleted."""
        self.sources.pop(name, None)
        self.odd.pop(name, None)
        if adapter_id in self.stack:
            self.stack.unload(adapter_id)

    def _forward(self, x: Any, *args: Any, adapter_names: Sequence[str], **kwargs: Any) -> Any:
        """In place of `lora.Linear._mixed_batch_forward`."""
        if not self._batches.here.are_fresh:
            # Names that no model's call has checked get no id: the layer lacks them.
            known = self._batches.names | {name for name in adapter_names if self.has(name)}
            self.refresh(known.intersection(adapter_names))
            batch = self._batches.of([n if n in known else BASE_NAME for n in adapter_names])
        else:
            batch = self._batches.of(adapter_names)
        if not self._serves(batch, x):
            return self._own_forward(x, *args, adapter_names=adapter_names, **kwargs)
        for name in self._own_kwargs:  # of the adapters' forward, not of the base layer's
            kwargs.pop(name, None)
        result = self.module.base_layer(x, *args, **kwargs).contiguous()
        self._add_lora(result, x.contiguous(), batch)
        return result

    def _add_lora(self, y: Any, x: Any, batch: Batch) -> None:
        """`add_lora` of contiguous tensors, by their addresses.

        On caches that the base layer has just emptied, to make an array of a tensor took 30 us.
        """
        stack, shape = self.stack, x.shape
        expected = len(batch.names), *shape[1:-1]
        if shape != (*expected, stack.h_in) or y.shape != (*expected, stack.h_out):
            raise ShapeError(
                f"{self.name}: x and result",
                f"(samples, ..., width) = {(*expected, stack.h_in)} and {(*expected, stack.h_out)}",
                f"{tuple(shape)} and {tuple(y.shape)}",
                "give one name in adapter_names per sample, and keep the base layer's widths",
            )
        x_dtype, y_dtype = float_dtype("x", x.dtype), float_dtype("result", y.dtype)
        x_row_bytes, y_row_bytes = stack.h_in * x_dtype.itemsize, stack.h_out * y_dtype.itemsize
        segments = batch.segments(math.prod(shape[1:-1]))
        x_at, y_at = x.data_ptr(), y.data_ptr()
        if x_at < y_at + segments.n * y_row_bytes and y_at < x_at + segments.n * x_row_bytes:
            raise MemoryLayoutError(
                f"{self.name}: result", "memory apart from x", "its base layer's own input",
                "have the base layer return a new tensor",
            )  # fmt: skip
        table, compiled = stack.table, kernels(None, x_dtype, stack.dtype, y_dtype)
        x_rows, y_rows = (x_at, x_row_bytes), (y_at, y_row_bytes)
        run_both_at(compiled, table, segments, torchs_pool(), x_rows, y_rows)

    def _serves(self, batch: Batch, x: Any) -> bool:
        """Whether nothing about this batch is PEFT's own to compute."""
        if not self.odd.keys().isdisjoint(batch.used) or self.module.training:
            return False
        torch = tensors.torch()
        # By its address: no subclass, and not torch's lazy negation, which is in no byte of it.
        if type(x) is not torch.Tensor or not x.is_cpu or not is_float(x.dtype) or x.is_neg():
            return False
        if not torch.is_grad_enabled():
            return True
        if x.requires_grad or any(weight.requires_grad for weight in self.module.parameters()):
            warnings.warn(
                "sgmv.compat.peft: gradients are recorded, so PEFT's own path runs; for inference, "
                "call the model under torch.inference_mode() or torch.no_grad()",
                stacklevel=2,
            )
            return False
        return True

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
        return source is not None and source.is_current(*now)

    def _now(self, name: str) -> tuple[Any, Any, float] | None:
        """A, B and scaling of an adapter as PEFT has them now; None if the layer lacks it."""
        # Not `lora_A[name].weight`: nn.Module's own look-up took 4 of 5 us per layer and adapter.
        halves = self.module._modules
        A, B = halves["lora_A"]._modules.get(name), halves["lora_B"]._modules.get(name)
        if A is None or B is None:
            return None
        scaling = float(self.module.scaling[name])  # a tensor, where prepared for PEFT's hotswap
        return A._parameters.get("weight"), B._parameters.get("weight"), scaling

    def _load(self, names: Sequence[str]) -> None:
        made: dict[str, Source] = {}
        for name in names:
            self.sources.pop(name, None)
            self.odd.pop(name, None)
            if now := self._now(name):
                if why := why_odd(self.module, name):
                    self.odd[name] = why
                else:
                    made[name] = Source(*now)
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

    def types(self) -> tuple[np.dtype[Any], ...]:
        """The float types of x, weights and y, as the base layer's own type foretells them."""
        # Not `base_layer.weight`: torch.ao's is a method, others' a list, or made when asked for.
        weight = self.module.get_base_layer()._parameters.get("weight")
        if weight is None or not is_float(weight.dtype):
            return (self.stack.dtype,) * 3
        dtype = float_dtype("weight", weight.dtype)
        return dtype, self.stack.dtype, dtype
