"""vLLM's CPU engine on sgmv: the wrapper that its layers call, in the place of its own.

vLLM makes the wrapper by a name that its platform tells; `sgmv_vllm` at the top of the installed
package has the platform tell this one. Where vLLM's interface is not as it is here, vLLM keeps its
own. Metadata, classification heads and MoE layers are vLLM's in any case: the wrapper made here is
vLLM's CPU wrapper, with other products.

Source: vLLM 0.32, lora/punica_wrapper/punica_cpu.py, lora/layers/base.py, lora/model_manager.py.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import cache, partial, wraps
from typing import Any

from sgmv import workers
from sgmv.compat.operator import handle_of, operation
from sgmv.compat.vllm.packed import Batch, Packed, Tensor, can_add, can_pack, identity
from sgmv.compat.vllm.wrapper import PunicaWrapper
from sgmv.extras import load
from sgmv.ids import as_ids
from sgmv.settings import NUM_THREADS
from sgmv.tensors import as_array, torch

OWN = "vllm.lora.punica_wrapper.punica_cpu.PunicaWrapperCPU"
LAYER = "vllm.lora.layers.base"
# What vLLM's methods must take: an interface with other names is another interface.
TAKES = {
    "update_metadata": ("mapping", "lora_index_to_id", "max_loras", "vocab_size"),
    "add_shrink": ("y", "x", "lora_a_stacked", "scale"),
    "add_expand": ("y", "x", "lora_b_stacked", "output_slices", "offset_start", "add_inputs"),
    "add_lora_embedding": ("y", "x", "lora_b_stacked", "add_inputs"),
    "add_lora_linear": (
        *("y", "x", "lora_a_stacked", "lora_b_stacked", "scale", "output_slices"),
        "buffer",
    ),
    "add_lora_logits": ("y", "x", "lora_a_stacked", "lora_b_stacked", "scale", "buffer"),
}
LAYER_TAKES = {
    "set_mapping": ("punica_wrapper",),
    "set_lora": ("index", "lora_a", "lora_b"),
    "reset_lora": ("index",),
}


def unlike(own: str) -> str:
    """How vLLM's interface differs from what is expected here; "" if it does not.

    own  the name of the wrapper that vLLM's platform tells by itself
    """
    if own != OWN:
        return f"its wrapper is {own}, not {OWN}"
    try:
        load("ml_dtypes")
    except ImportError:
        return "ml_dtypes, which gives numpy bfloat16, is not installed; pip install ml_dtypes"
    for owner, expected in ((_own_wrapper(), TAKES), (_base_layer(), LAYER_TAKES)):
        for name, arguments in expected.items():
            method = getattr(owner, name, None)
            if method is None:
                return f"{owner.__name__} has no {name}"
            taken = [
                parameter.name
                for parameter in inspect.signature(method).parameters.values()
                if parameter.name != "self" and parameter.kind is not parameter.VAR_KEYWORD
            ]
            if tuple(taken) != arguments:
                return f"{owner.__name__}.{name} takes {taken}, not {list(arguments)}"
    for name in ("token_lora_indices", "sampler_indices"):
        if not isinstance(getattr(_own_wrapper(), name, None), property):
            return f"{OWN} has no property {name}"
    return ""


def _own_wrapper() -> Any:
    return getattr(load(OWN.rpartition(".")[0]), OWN.rpartition(".")[2])


def _base_layer() -> Any:
    return load(LAYER).BaseLayerWithLoRA


def sgmv_punica_wrapper(*args: Any, **kwargs: Any) -> Any:
    """The wrapper of one engine; arguments are vLLM's."""
    if NUM_THREADS.read() is None:  # vLLM binds its threads to cores, and this one to one core
        workers.set_num_threads(torch().get_num_threads())
    _have_layers_tell()
    return _wrapper_class()(*args, **kwargs)


@cache
def _wrapper_class() -> Any:
    return type("SgmvPunicaWrapper", (PackedProducts, _own_wrapper()), {})


class _Stored(PunicaWrapper):
    """The products over weights where they are stored, of a step that vLLM has described."""

    def take(self, tokens: Batch, sampled: Batch) -> None:
        """These are the step's rows, and those that logits are computed for."""
        self._tokens, self._sampled = tokens.segments, sampled.segments


class PackedProducts:
    """The products over packed weights; what cannot be packed is read where it is stored."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._layers: dict[int, Packed | None] = {}  # by the address of a layer's first B
        self._held: list[object] = []  # so that no address is used again
        self._handle, self._operation = handle_of(self), operation()
        self._is_traced = torch().compiler.is_compiling
        self._batch = self._sample = Batch.of(as_ids(()))
        self._stored = _Stored(0, 0)
        self.add_shrink, self.add_expand = self._stored.add_shrink, self._stored.add_expand

    def update_metadata(self, *args: Any, **kwargs: Any) -> None:
        """Make a step's metadata, vLLM's own and that of the products here."""
        super().update_metadata(*args, **kwargs)  # type: ignore[misc]
        own: Any = self
        self._batch = Batch.of(as_array("token_lora_indices", own.token_lora_indices))
        self._sample = Batch.of(as_array("sampler_indices", own.sampler_indices))
        self._stored.take(self._batch, self._sample)

    def add_lora_embedding(
        self, y: Tensor, x: Tensor, lora_b_stacked: Tensor, add_inputs: bool = True, **kwargs: Any
    ) -> None:
        """The second product of the embedding: see `PunicaWrapper`."""
        if self._is_traced() and add_inputs:
            self._operation(y, x, [lora_b_stacked], [], self._handle)
            return
        if not self._batch.slots:
            return
        packed = self.packed((), (lora_b_stacked,))
        if packed is not None and add_inputs and can_add(y, x):
            packed.add(y, x, self._batch, [lora_b_stacked.shape[-2]])
            return
        self._stored.add_lora_embedding(y, x, lora_b_stacked, add_inputs)

    def add_lora_linear(
        self,
        y: Tensor,
        x: Tensor,
        lora_a_stacked: Sequence[Tensor],
        lora_b_stacked: Sequence[Tensor],
        scale: float,
        output_slices: Sequence[int],
        *,
        buffer: Any = None,
        **kwargs: Any,
    ) -> None:
        """Both products of a linear layer's slices: see `PunicaWrapper`."""
        if self._is_traced() and scale == 1.0 and buffer is None:
            weights = [*lora_a_stacked, *lora_b_stacked]
            self._operation(y, x, weights, output_slices, self._handle)
            return
        if not self._batch.slots:
            return
        packed = self.packed(lora_a_stacked, lora_b_stacked)
        if packed is not None and scale == 1.0 and buffer is None and can_add(y, x):
            packed.add(y, x, self._batch, output_slices)
            return
        self._stored.add_lora_linear(
            y, x, lora_a_stacked, lora_b_stacked, scale, output_slices, buffer=buffer
        )

    def add_lora_logits(
        self,
        y: Tensor,
        x: Tensor,
        lora_a_stacked: Tensor,
        lora_b_stacked: Tensor,
        scale: float,
        *,
        buffer: Any = None,
        **kwargs: Any,
    ) -> None:
        """Both products of the output layer: see `PunicaWrapper`."""
        if not self._sample.slots:
            return
        packed = self.packed((lora_a_stacked,), (lora_b_stacked,))
        width = lora_b_stacked.shape[-2]
        if (
            packed is not None and scale == 1.0 and buffer is None
            and can_add(y, x) and width <= y.shape[1]
        ):  # fmt: skip
            packed.add(y, x, self._sample, [width])
            return
        self._stored.add_lora_logits(y, x, lora_a_stacked, lora_b_stacked, scale, buffer=buffer)

    def add_in_graph(
        self, y: Tensor, x: Tensor, weights: Sequence[Tensor], widths: Sequence[int]
    ) -> None:
        """`add_lora_linear` from a compiled graph: the weights are A of each slice, then B.

        Without widths it is `add_lora_embedding`, of a single B.
        """
        if not widths:
            self.add_lora_embedding(y, x, weights[0])
            return
        A, B = tuple(weights[: len(widths)]), tuple(weights[len(widths) :])
        self.add_lora_linear(y, x, A, B, 1.0, widths)

    def packed(self, A: Sequence[Tensor], B: Sequence[Tensor]) -> Packed | None:
        """A layer's packed weights, made on first use; None if they cannot be packed.

        Of an embedding there is no A.
        """
        key = B[0].data_ptr()
        try:
            return self._layers[key]
        except KeyError:
            self._held.append(B)
            A = A or [identity(b) for b in B]
            found = self._layers[key] = Packed(A, B) if can_pack(*A, *B) else None
            return found

    def watch(self, layer: Any) -> None:
        """Have a layer tell which slot it writes."""
        for name in ("set_lora", "reset_lora"):
            setattr(layer, name, partial(self._write, layer, getattr(layer, name)))

    def _write(self, layer: Any, write: Callable[..., Any], index: int, *args: Any) -> Any:
        B = layer.lora_b_stacked
        packed = self._layers.get((B[0] if isinstance(B, tuple) else B).data_ptr())
        if packed is None:
            return write(index, *args)
        with packed.writing(index):
            return write(index, *args)


@cache
def _have_layers_tell() -> None:
    """From now on a layer that is given a wrapper made here is watched by it."""
    base = _base_layer()
    own = base.set_mapping

    @wraps(own)
    def set_mapping(layer: Any, punica_wrapper: Any) -> None:
        own(layer, punica_wrapper)
        if isinstance(punica_wrapper, PackedProducts) and hasattr(layer, "lora_b_stacked"):
            punica_wrapper.watch(layer)

    base.set_mapping = set_mapping
