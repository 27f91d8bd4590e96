"""What changes while the context lasts is seen: weights, scalings, adapters, layers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks.studies import peft as benchmark
from sgmv.compat import peft_layers
from sgmv.compat.peft import accelerate
from tests.help.peft_models import (
    ALL_ROWS,
    NAMES,
    adapted,
    check,
    halves_of,
    in_place,
    lora,
    needs_peft,
    net,
    randomise,
    reassigned,
    rescaled,
    written_through_data,
)

pytestmark = [
    pytest.mark.once,
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # PEFT's use of transformers
]


def under_inference_mode(lib: SimpleNamespace, model: Any) -> None:
    with lib.torch.inference_mode():
        halves_of(model)[1].weight.mul_(-2)


def hotswapped(lib: SimpleNamespace, model: Any) -> None:
    from peft.utils.hotswap import hotswap_adapter_from_state_dict

    its = [(name, weight) for name, weight in model.named_parameters() if ".fr." in name]
    state = {name: lib.torch.randn(weight.shape) for name, weight in its}
    hotswap_adapter_from_state_dict(model, state, "fr", model.peft_config["fr"])


def another_parameter(lib: SimpleNamespace, model: Any) -> None:
    """Over the same memory, with a count of its own that stands where the old one stood."""
    for half in halves_of(model):
        old = half.weight
        half.weight = lib.torch.nn.Parameter(old.data, requires_grad=False)
        while half.weight._version < old._version:
            half.weight.mul_(1.5)
        half.weight.data[-1, -1] += 1


def cast(lib: SimpleNamespace, model: Any) -> None:
    for half in halves_of(model):
        half.to(lib.torch.float16)


def longer(lib: SimpleNamespace, model: Any) -> None:
    """A higher rank under the same name, which the stack has no room for."""
    model.delete_adapter("de")
    model.add_adapter("de", lora(lib, "gate", "up", r=12))
    randomise(lib, model)


def fewer_layers(lib: SimpleNamespace, model: Any) -> None:
    model.delete_adapter("de")
    model.add_adapter("de", lora(lib, "down", r=2))
    randomise(lib, model)


def deleted_from_a_layer(_lib: SimpleNamespace, model: Any) -> None:
    model.base_model.model.up.delete_adapter("de")


CHANGES = [
    in_place, under_inference_mode, reassigned, written_through_data, hotswapped,
    another_parameter, rescaled, cast, longer, fewer_layers, deleted_from_a_layer,
]  # fmt: skip


@needs_peft
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: str(change.__name__))
def test_a_change_is_seen(
    change: Callable[..., None], lib: SimpleNamespace, model: Any, x: Any
) -> None:
    with accelerate(model):
        check(model, x)
        change(lib, model)
        check(model, x)
        check(model, x)


@needs_peft
def test_a_layer_called_by_itself_sees_changes(lib: SimpleNamespace, model: Any, x: Any) -> None:
    layer = model.base_model.model.up
    forward = partial(layer, x, adapter_names=NAMES)
    with accelerate(model):
        check(model, x)
        for change in (in_place, reassigned, written_through_data, rescaled):
            change(lib, model)
            benchmark.check(layer, forward, NAMES, "up", most=ALL_ROWS)


@needs_peft
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: str(change.__name__))
def test_stale_weights_would_be_found(
    change: Callable[..., None],
    lib: SimpleNamespace,
    model: Any,
    x: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The test above can fail: here nothing looks for changes."""
    with accelerate(model):
        check(model, x)
        monkeypatch.setattr(peft_layers.Layer, "_is_current", lambda *_: True)
        change(lib, model)
        with pytest.raises(AssertionError, match="elements wrong"):
            check(model, x)


@needs_peft
def test_new_adapters_and_their_layers_are_found(lib: SimpleNamespace, x: Any) -> None:
    model = adapted(lib, net(lib.torch), {"de": lora(lib, "up")})
    with accelerate(model) as taken:
        check(model, x[:3], ["de", "__base__", "de"])
        assert taken.layers == ["up"]
        for i in range(5):
            model.add_adapter(f"n{i}", lora(lib, "down", "up", r=2 + i))
            randomise(lib, model)
            check(model, x[:3], ["de", f"n{i}", "n0"])
        assert taken.layers == ["up", "down"]
        stacks = [layer.stack for layer in taken._layers.values()]
        model.delete_adapter("n3")
        check(model, x[:3], ["de", "n4", "n0"])
        assert all(len([i for i in stack if stack[i]]) < 6 for stack in stacks)


@needs_peft
def test_names_that_are_gone_leave_nothing(lib: SimpleNamespace, x: Any) -> None:
    """A server loads and deletes adapters under ever new names."""
    model = adapted(lib, net(lib.torch), {"de": lora(lib, "up", "down")})
    with accelerate(model) as taken:
        for i in range(8):
            model.add_adapter(f"n{i}", lora(lib, "down", "up", r=2 + i))
            randomise(lib, model)
            check(model, x[:3], ["de", f"n{i}", f"n{i}"])
            if i:
                model.delete_adapter(f"n{i - 1}")
                check(model, x[:3], [f"n{i}", "__base__", "de"])
            assert taken._batches.names == {"de", f"n{i}"}
            for layer in taken._layers.values():
                assert set(layer.sources) <= {"de", f"n{i}"}
                assert len(layer.stack) <= 2


@needs_peft
def test_memory_of_what_was_copied_is_not_reused(lib: SimpleNamespace, model: Any) -> None:
    """Else another tensor could stand at the address that tells whether this one still does."""
    weight = halves_of(model)[0].weight
    address = weight.data_ptr()
    with accelerate(model):
        weight.data = weight.data.clone()
        tensors = [lib.torch.empty_like(weight) for _ in range(50)]
        assert all(tensor.data_ptr() != address for tensor in tensors)
