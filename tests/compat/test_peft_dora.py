"""Mixed batches with DoRA, which PEFT refuses: held to PEFT with one adapter at a time."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from reference import add_lora
from reference.arguments import Adapter as Reference
from reference.bounds import add_lora_bound
from reference.compare import check
from sgmv.compat.peft import accelerate
from sgmv.compat.peft_dora import Norms
from sgmv.compat.peft_layers import LinearLayer
from sgmv.tensors import as_array
from tests.help.dora import peft_bound
from tests.help.peft_models import NAMES, adapted, lora, needs_peft, net

pytestmark = [
    pytest.mark.once,
    needs_peft,
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # PEFT's use of transformers
]


def magnitudes(lib: SimpleNamespace, model: Any) -> None:
    """They start as the norms themselves, where every gain is 1."""
    for name, weight in model.named_parameters():
        if "lora_magnitude_vector" in name:
            weight.data = weight.data.abs() * (lib.torch.rand_like(weight) + 0.5) + 0.1


@pytest.fixture
def model(lib: SimpleNamespace) -> Any:
    """Adapters de and fr with DoRA, en without."""
    lib.torch.manual_seed(0)
    layers = "gate", "up", "down"
    configs = {
        "de": lora(lib, *layers, use_dora=True),
        "en": lora(lib, *layers, r=3),
        "fr": lora(lib, "up", r=5, use_dora=True, lora_alpha=3),
    }
    model = adapted(lib, net(lib.torch), configs)
    magnitudes(lib, model)
    return model


def one_at_a_time(model: Any, run: Callable[[Any], Any], x: Any, names: list[str]) -> Any:
    """PEFT's result for each sample, with its adapter active."""
    found = []
    for i, name in enumerate(names):
        if name == "__base__":
            with model.disable_adapter():
                found.append(run(x[i : i + 1]))
        else:
            model.set_adapter(name)
            found.append(run(x[i : i + 1]))
    return found


def hold(lib: SimpleNamespace, model: Any, layer: Any, x: Any, names: list[str] = NAMES) -> None:
    """The layer's mixed batch is right, and as near to PEFT's own as both may be to that."""
    torch = lib.torch
    with torch.no_grad():
        base_layer = layer.get_base_layer()
        y = layer(x, adapter_names=names)
        base = as_array("y", base_layer(x)).reshape(-1, y.shape[-1])
        theirs = torch.cat(one_at_a_time(model, layer, x, names))
    tokens = x[0].numel() // x.shape[-1]
    rows = as_array("x", x).reshape(-1, x.shape[-1])
    W = base_layer.weight.detach()
    W = as_array("W", W.T if getattr(layer, "fan_in_fan_out", False) else W)
    bias = None if base_layer.bias is None else as_array("bias", base_layer.bias)
    used, ids = {}, []
    for name in names:
        if name not in layer.lora_A:
            ids += [-1] * tokens
            continue
        A, B = (as_array("A", half[name].weight) for half in (layer.lora_A, layer.lora_B))
        m = None
        if name in layer.lora_magnitude_vector:
            m = as_array("m", layer.lora_magnitude_vector[name].weight)
        one = Reference(A, B, layer.scaling[name], m)
        i = [*used, name].index(name)
        used[name] = one
        ids += [i] * tokens
    adapters = list(used.values())
    exact = add_lora(base, rows, adapters, ids, W=W, bias=bias)
    bound = add_lora_bound(base, rows, adapters, ids, W=W, bias=bias, expected=exact)
    ours, theirs = (as_array("y", each).reshape(base.shape) for each in (y, theirs))
    check(ours, exact, bound, "sgmv")
    for i, one in enumerate(adapters):
        if one.magnitude is not None:
            its = np.flatnonzero(np.array(ids) == i)
            wide = peft_bound(rows[its], W, bias, one, exact[its], base.dtype)
            check(theirs[its], exact[its], wide, "PEFT")
            assert (np.abs(exact[its] - base[its]) > bound[its] + wide).any()


def hold_all(lib: SimpleNamespace, model: Any, x: Any) -> None:
    inner = model.base_model.model
    hold(lib, model, inner.up, x)
    hold(lib, model, inner.gate, x)
    hold(lib, model, inner.down, lib.torch.randn(len(x), 2, 33))


def test_every_layer_is_right(lib: SimpleNamespace, model: Any, x: Any) -> None:
    with pytest.raises(ValueError, match="DoRA"):
        model(x, adapter_names=NAMES)
    with lib.torch.no_grad(), accelerate(model) as taken:
        assert taken.fallbacks == {}
        hold_all(lib, model, x)
        mixed = model(x, adapter_names=NAMES)
    theirs = lib.torch.cat(one_at_a_time(model, model, x, NAMES))
    assert lib.torch.allclose(mixed, theirs, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="DoRA"):
        model(x, adapter_names=NAMES)


def test_in_bfloat16(lib: SimpleNamespace) -> None:
    torch = lib.torch
    torch.manual_seed(0)
    configs = {"de": lora(lib, "up", use_dora=True), "en": lora(lib, "up")}
    model = adapted(lib, net(torch).bfloat16(), configs, adapters_as_base=True)
    magnitudes(lib, model)
    with accelerate(model):
        x = torch.randn(5, 3, 20).bfloat16()
        hold(lib, model, model.base_model.model.up, x, ["de", "en", "__base__", "de", "en"])


def in_A(lib: SimpleNamespace, layer: Any) -> None:
    layer.lora_A["de"].weight[0] += 3


def in_the_magnitude(lib: SimpleNamespace, layer: Any) -> None:
    layer.lora_magnitude_vector["de"].weight *= 2


def in_W(lib: SimpleNamespace, layer: Any) -> None:
    layer.get_base_layer().weight[3] += 1


def in_W_through_data(lib: SimpleNamespace, layer: Any) -> None:
    layer.get_base_layer().weight.data *= 2


def in_the_bias(lib: SimpleNamespace, layer: Any) -> None:
    layer.get_base_layer().bias += 1


def by_a_merge(lib: SimpleNamespace, layer: Any) -> None:
    layer.merge(adapter_names=["en"])
    layer.merged_adapters.clear()  # as if it were the base model's own


def another_parameter(lib: SimpleNamespace, layer: Any) -> None:
    base = layer.get_base_layer()
    base.weight = lib.torch.nn.Parameter(2 * base.weight, requires_grad=False)


CHANGES = [in_A, in_the_magnitude, in_W, in_W_through_data, in_the_bias, by_a_merge,
           another_parameter]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=[each.__name__ for each in CHANGES])
def test_a_change_is_seen(
    change: Callable[..., None], lib: SimpleNamespace, model: Any, x: Any
) -> None:
    layer = model.base_model.model.up
    with lib.torch.no_grad(), accelerate(model):
        hold(lib, model, layer, x)
        before = model(x, adapter_names=NAMES)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(LinearLayer, "_load", must_not_run)
            assert model(x, adapter_names=NAMES).equal(before), "nothing has changed"
        change(lib, layer)
        after = model(x, adapter_names=NAMES)
        assert not after.equal(before)
        hold(lib, model, layer, x)


@pytest.mark.parametrize("change", [in_W, in_the_bias, in_the_magnitude])
def test_stale_gains_would_be_found(
    change: Callable[..., None], lib: SimpleNamespace, model: Any, x: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    layer = model.base_model.model.up
    with lib.torch.no_grad(), accelerate(model):
        monkeypatch.setattr(Norms, "are_current", lambda *_: True)
        change(lib, layer)
        with pytest.raises(AssertionError, match="sgmv"):
            hold(lib, model, layer, x)


def must_not_run(*_args: object) -> None:
    raise AssertionError("ran")


def test_plain_adapters_beside_it_keep_their_bits(lib: SimpleNamespace, model: Any, x: Any) -> None:
    up = model.base_model.model.up
    plain = ["en", "__base__"] * 3 + ["en"]
    with lib.torch.no_grad(), accelerate(model):
        alone, beside = (up(x, adapter_names=names) for names in (plain, ["en", "de"] * 3 + ["en"]))
    assert alone[::2].equal(beside[::2])


def test_what_is_left_to_peft_is_refused_by_it(lib: SimpleNamespace, model: Any, x: Any) -> None:
    """Its own path would pass over magnitudes."""
    up = model.base_model.model.up
    up.lora_A["de"].register_forward_hook(lambda *its: None)
    with lib.torch.no_grad(), accelerate(model) as taken:
        assert "up, de" in taken.fallbacks
        with pytest.raises(ValueError, match="DoRA"):
            up(x, adapter_names=["de"] * len(x))
        hold(lib, model, up, x, ["fr", "en"] * 3 + ["fr"])
        up.merge(adapter_names=["en"])
        with pytest.raises(ValueError, match="merged"):
            up(x, adapter_names=["fr"] * len(x))
        up.unmerge()
        hold(lib, model, up, x, ["fr", "en"] * 3 + ["fr"])


def test_layers_of_gpt2_keep_their_weight_transposed(lib: SimpleNamespace) -> None:
    torch, conv = lib.torch, lib.transformers.pytorch_utils.Conv1D

    class Net(torch.nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.up = conv(33, 20)

        def forward(self, x: Any) -> Any:
            return self.up(x)

    base = Net()
    torch.nn.init.normal_(base.up.bias)
    torch.nn.init.normal_(base.up.weight)
    config = lora(lib, "up", use_dora=True, fan_in_fan_out=True)
    model = adapted(lib, base, {"de": config, "en": config})
    magnitudes(lib, model)
    with accelerate(model):
        names = ["de", "en", "__base__", "de"]
        hold(lib, model, model.base_model.model.up, torch.randn(4, 3, 20), names)


def test_a_quantised_base_is_dequantised(lib: SimpleNamespace) -> None:
    """By PEFT's own function: here as HQQ's layers are."""
    torch = lib.torch

    class Quantised(torch.nn.Linear):  # type: ignore[misc]
        def __init__(self, h_in: int, h_out: int) -> None:
            super().__init__(h_in, h_out)
            values = (self.weight * 400).round().to(torch.int8)
            self.weight = self.W_q = torch.nn.Parameter(values, requires_grad=False)

        def dequantize(self) -> Any:
            return self.W_q.float() / 400

        def forward(self, x: Any) -> Any:
            return torch.nn.functional.linear(x, self.dequantize(), self.bias)

    torch.manual_seed(0)
    base = torch.nn.ModuleDict({"up": Quantised(20, 33)})
    config = lora(lib, "up", use_dora=True)
    model = adapted(lib, base, {"de": config, "en": config})
    magnitudes(lib, model)
    layer, x, names = model.base_model.model["up"], torch.randn(4, 3, 20), ["de", "en"] * 2
    with torch.no_grad(), accelerate(model) as taken:
        assert taken.fallbacks == {}
        ours = layer(x, adapter_names=names)
        theirs = torch.cat(one_at_a_time(model, layer, x, names))
        assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-5)
        layer.get_base_layer().W_q[1] += 9
        changed = layer(x, adapter_names=names)
        theirs = torch.cat(one_at_a_time(model, layer, x, names))
        assert torch.allclose(changed, theirs, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(ours, changed, rtol=1e-3, atol=1e-3)


def test_embeddings_are_served(lib: SimpleNamespace) -> None:
    torch = lib.torch

    class Net(torch.nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.embed = torch.nn.Embedding(10, 6)
            self.linear = torch.nn.Linear(6, 5)

        def forward(self, tokens: Any) -> Any:
            return self.linear(self.embed(tokens))

    torch.manual_seed(0)
    config = lora(lib, "embed", "linear", r=2, use_dora=True)
    model = adapted(lib, Net(), {"de": config, "en": config})
    magnitudes(lib, model)
    tokens, names = torch.arange(8).reshape(4, 2), ["en", "de", "__base__", "en"]
    embed = model.base_model.model.embed
    with torch.no_grad(), accelerate(model) as taken:
        assert taken.fallbacks == {}
        ours = model(tokens, adapter_names=names)
        vectors = embed(tokens, adapter_names=names)
        inner = torch.cat(one_at_a_time(model, embed, tokens, names))
    theirs = torch.cat(one_at_a_time(model, model, tokens, names))
    assert torch.allclose(vectors, inner, rtol=1e-5, atol=1e-5)
    assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="DoRA"):
        embed(tokens, adapter_names=names)
