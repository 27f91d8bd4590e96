"""PEFT's mixed batches through `add_lora`: one call per layer, where PEFT makes one per adapter.

    with accelerate(model):
        model(input_ids, adapter_names=["fr", "de", "__base__", "fr"])

    PEFT   for each adapter of the batch:  result[its] += lora_B(lora_A(x[its])) * scaling
    here   once:                           add_lora(result, x, stack, segments)

Three methods are replaced, on the model's own objects and until the context ends: each layer's
`_mixed_batch_forward` and `forward` (peft_layers.py), and `LoraModel._enable_peft_forward_hooks`,
which still runs PEFT's code but no longer walks through every module of the model at every step:
layers taken over need no hook to know their names. All else is PEFT's: its checks, its refusals,
its hooks on other layers, the base layers, and layers that are not plain LoRA.
But hooks that PEFT leaves in place, as a call ended with an exception, are removed: they would give
the next plain call the failed batch's adapters.

Neither torch nor PEFT is imported here: the caller has imported them, or there would be no model.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from sgmv.compat.peft_batches import Batches
from sgmv.compat.peft_experts import ExpertsLayer, is_outermost
from sgmv.compat.peft_hooks import Outside, Replacement, hook_id, listener, remove_hooks, untraced
from sgmv.compat.peft_layers import Layer, kind_of
from sgmv.errors import PeftError, some
from sgmv.layouts.peft import BASE_NAME
from sgmv.warm_up import warm_up

HOOKS = "_enable_peft_forward_hooks"


@contextmanager
def accelerate(model: Any) -> Iterator[Accelerated]:
    """Run a PEFT model's mixed batches through `add_lora` while the context lasts.

    Semantics: in `model(..., adapter_names=names)`, and `generate` alike, at every adapted linear
    layer: `result[i] += scaling * (x[i] @ A.T) @ B.T` for each token of sample i, with A, B and
    scaling of adapter names[i]; "__base__", and an adapter that the layer lacks, add nothing. With
    `lora_bias` its bias, times scaling, is added, too; aLoRA adds to the tokens from its invocation
    on; at an embedding A's column of the token is in the place of x[i] @ A.T.
    Whatever else the model does, batches of one active adapter included, PEFT does.

    model   a `peft.PeftModel`, or its `LoraModel`, on the CPU and in eval mode
    types   x, result and weights each float32, float16, bfloat16 or float64. Sums are float32
            (float64 if any of them is), rounded once; PEFT rounds x and v to the weights' type, too
    yields  `Accelerated`: the layers taken over, and those left to PEFT, with the reason

    On entry the weights are copied into an AdapterStack per layer, and the kernels compiled: memory
    grows by the adapters' size. What has changed since is copied again when the model is called:
    weights trained, reassigned, cast or hotswapped, scalings, adapters that come and go. Unseen are
    only single values written past torch's count of changes, through `.data` or a numpy view.

    Inside torch.compile each layer is one node of the graph, whatever the batch: no mix needs a
    graph of its own. Names are read where the model is called, outside of the graph. What PEFT
    computes itself breaks the graph there. Each context makes graphs of its own.

    Of a call that ends with an exception, none of PEFT's hooks stay, as they do without; those of
    earlier calls are removed on entry, when no call may be running. A copy of the model, deep or
    pickled, is PEFT's alone.

    The base layer may be quantised (bitsandbytes, torchao) or offloaded: it is called as PEFT calls
    it. PEFT's own path runs, as without the context, for other variants, for convolutions, for
    weights on another device, for A and B with forward hooks of somebody's, and, with a warning,
    where gradients are recorded.

    DoRA, of which PEFT refuses mixed batches, has them here: rows of its adapters get
    `gain * (y + delta) + (1 - gain) * bias`. Gains are taken when the adapter is copied, and again
    when the base layer's weight or bias has changed; a quantised weight is dequantised for that, as
    PEFT does it at each call.

    Experts' parameters (`target_parameters`), of which PEFT refuses mixed batches, have them here:
    gate_up_proj and down_proj of transformers 5's modules of experts, each token with its own
    adapter on its own experts.

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
    dynamo: Any = sys.modules.get("torch._dynamo")
    if dynamo is not None and isinstance(model, dynamo.OptimizedModule):
        model = model._orig_mod
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
        self._layers: dict[Any, Layer | ExpertsLayer] = {}
        self._others: dict[str, str] = {}
        self._wrappers: list[Any] = []  # of base layers: what PEFT may give hooks
        self._names: dict[str, None] = {}  # the adapters of the layers taken over
        self._configs: dict[str, Any] = {}
        # torch.compile looks into neither, nor into what they call.
        self._begin, self._end = untraced("__enter__"), untraced("__exit__")
        self._replacement = Replacement(tuner, HOOKS, self._hooks)
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
        found: dict[Any, Layer | ExpertsLayer] = {}
        others, wrappers = {}, []
        inside: set[Any] = set()  # wrappers of experts that the outermost one stands for
        for path, module in self._tuner.named_modules():
            name = path.removeprefix("model.")
            is_lora = isinstance(module, lora.LoraLayer)
            if is_lora or type(module).__module__.startswith("peft."):
                wrappers.append(module)
            if kind := kind_of(module):
                found[module] = self._layers.get(module) or kind(name, module, self._batches)
            elif is_outermost(module) and module not in inside:
                experts = self._layers.get(module) or ExpertsLayer(name, module, self._batches)
                found[module] = experts
                inside.update(getattr(experts, "inside", ()))
            elif is_lora and module not in inside:
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
        held = ((*layer.sources, *layer.odd) for layer in found.values())
        self._names = dict.fromkeys(name for names in held for name in names)

    def _is_current(self) -> bool:
        """Whether no adapter, and with it perhaps a layer, has come or gone since `_find`."""
        now = self._tuner.peft_config
        same = (now.get(name) is config for name, config in self._configs.items())
        return len(now) == len(self._configs) and all(same)

    def _hooks(self, *args: Any, **kwargs: Any) -> AbstractContextManager[None]:
        return Outside(self._enable_hooks(*args, **kwargs), self._begin, self._end)

    @contextmanager
    def _enable_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """In place of `LoraModel._enable_peft_forward_hooks`: PEFT's own, over fewer modules.

        Plain layers are told the names by `Batches`. Hooks would cost each of them time, and
        torch.compile, which does not ask whether hooks have changed, would take one batch's graph
        for another batch.
        """
        names, batches = kwargs.get("adapter_names"), self._batches
        before = batches.here.are_fresh
        modules: list[Any] = []
        first = end = 0
        batch = listener()()
        try:
            # Under the lock, the hooks of these ids are this call's, not another thread's.
            with batches.changing:
                self._remove_left()
                if names is not None and not self._is_current():
                    self._find()
                modules, first = self._wrappers, hook_id()
                batch.lora_A = self._names
                others = (m for m in modules if not isinstance(self._layers.get(m), Layer))
                own = self._own_hooks(_Wrappers(self._tuner, [batch, *others]), *args, **kwargs)
                own.__enter__()
                end = hook_id()
                if names is not None:
                    batches.begin(batch)
                    used = {*names} - {BASE_NAME}
                    for layer in self._layers.values():
                        layer.refresh(used)
            batches.here.are_fresh = names is not None
            yield
            own.__exit__(None, None, None)
            batch.is_over = True
        except BaseException:
            batch.is_over = True  # again, as an interrupt may have come first
            self._left.append((modules, range(first, end or hook_id())))
            raise
        finally:
            batches.here.are_fresh = before
            self._remove_left()

    def _remove_left(self) -> None:
        """Forget calls that are over, and remove PEFT's hooks of those that failed.

        An interrupt may break this off too: the next call, or the end of the context, goes on.
        """
        with self._batches.changing:
            self._batches.settle()
        while self._left:
            with self._batches.changing:
                for modules, ids in self._left[:1]:
                    remove_hooks(modules, ids)
                del self._left[:1]


class _Wrappers:
    """Stands in for a LoraModel in its own method; `modules` has only those that it acts on."""

    def __init__(self, tuner: Any, wrappers: list[Any]) -> None:
        self._tuner, self._wrappers = tuner, wrappers

    def modules(self) -> Iterator[Any]:
        return iter(self._wrappers)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tuner, name)
