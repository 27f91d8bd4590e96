"""PEFT's mixed batches through add_lora, held to the reference and to PEFT itself.

Most of it needs torch, peft and transformers (extra `torch`) and is skipped without them.
"""

from __future__ import annotations

import _thread
import contextlib
import copy
import pickle
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from itertools import count
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import sgmv
from benchmarks.studies import peft as benchmark
from reference import bounds, by_row, compare
from sgmv.compat import peft as compat
from sgmv.compat import peft_batches, peft_hooks
from sgmv.compat.peft import accelerate
from sgmv.errors import MemoryLayoutError, PeftError, ShapeError, ValueRangeError
from sgmv.tensors import as_array

pytestmark = [
    pytest.mark.once,
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # PEFT's use of transformers
]

WANTED = ("torch", "peft", "transformers")
MISSING = [name for name in WANTED if find_spec(name) is None]
needs_peft = pytest.mark.skipif(
    bool(MISSING), reason=f"not installed: {', '.join(MISSING)} (pip install -e '.[torch]')"
)
NAMES = ["de", "en", "__base__", "de", "fr", "en", "de"]
TOKENS = 3
ALL_ROWS = 10_000


@pytest.fixture(scope="module")
def lib() -> SimpleNamespace:
    """The three packages; what they warn of when imported is theirs."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import peft
        import torch
        import transformers
    return SimpleNamespace(torch=torch, peft=peft, transformers=transformers)


def net(torch: Any) -> Any:
    """Three linear layers, two of them side by side; widths that no tile divides."""

    class Net(torch.nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.gate = torch.nn.Linear(20, 33, bias=False)
            self.up = torch.nn.Linear(20, 33)
            self.down = torch.nn.Linear(33, 20)

        def forward(self, x: Any) -> Any:
            return x + self.down(self.gate(x) * self.up(x))

    return Net()


def lora(lib: SimpleNamespace, *targets: str, r: int = 4, **options: Any) -> Any:
    return lib.peft.LoraConfig(r=r, target_modules=list(targets), **options)


def adapted(
    lib: SimpleNamespace, base: Any, configs: dict[str, Any], adapters_as_base: bool = False
) -> Any:
    """The base with these adapters, random and frozen, in eval mode."""
    (first, config), *others = configs.items()
    cast = {"autocast_adapter_dtype": not adapters_as_base}
    model = lib.peft.get_peft_model(base, config, adapter_name=first, **cast)
    for name, config in others:
        model.add_adapter(name, config, **cast)
    randomise(lib, model)
    return model.eval().requires_grad_(False)


def randomise(lib: SimpleNamespace, model: Any) -> None:
    """PEFT starts B at zero, where no fault could show."""
    for name, weight in model.named_parameters():
        if "lora_" in name:
            lib.torch.nn.init.normal_(weight, std=0.3)


@pytest.fixture
def model(lib: SimpleNamespace) -> Any:
    """Adapters of unequal ranks and scalings; none adapts every layer."""
    lib.torch.manual_seed(0)
    configs = {
        "de": lora(lib, "gate", "up", r=4, lora_alpha=8),
        "en": lora(lib, "up", "down", r=7, lora_alpha=5, use_rslora=True),
        "fr": lora(lib, "gate", "down", r=1, rank_pattern={"down": 9}, alpha_pattern={"down": -3}),
    }
    model = adapted(lib, net(lib.torch), configs)
    model.set_adapter("fr", inference_mode=True)
    return model


@pytest.fixture
def x(lib: SimpleNamespace) -> Any:
    generator = lib.torch.Generator().manual_seed(1)
    return lib.torch.randn(len(NAMES), TOKENS, 20, generator=generator)


@pytest.fixture(autouse=True)
def _inference(request: pytest.FixtureRequest) -> Iterator[None]:
    """What users do; a test of gradients asks for them itself."""
    if "lib" not in request.fixturenames:
        yield
        return
    with request.getfixturevalue("lib").torch.no_grad():
        yield


def check(model: Any, x: Any, names: list[str] = NAMES) -> None:
    benchmark.check(model, partial(model, x, adapter_names=names), names, "net", most=ALL_ROWS)


# without torch


def test_what_is_no_peft_model_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)  # type: ignore[arg-type]  # as if never imported
    with (
        pytest.raises(PeftError, match=r"model: expected a peft\.PeftModel.*got dict"),
        accelerate({}),
    ):
        pass


def test_samples_become_rows_of_their_adapters() -> None:
    batches = peft_batches.Batches()
    batch = batches.of(["x", "__base__", "y", "x"])
    assert batch.used == ["x", "y"]
    segments = batch.segments(2)
    assert segments.adapter_ids.tolist() == [-1, batches.id("x"), batches.id("y")]
    assert segments.rows.tolist() == [2, 3, 0, 1, 6, 7, 4, 5]
    assert batches.of(["x", "__base__", "y", "x"]).segments(2) is segments
    assert batch.segments(1).rows.tolist() == [1, 0, 3, 2]
    assert batch.segments(0).n == 0


def test_names_changed_in_place_are_another_batch() -> None:
    batches, names = peft_batches.Batches(), ["x", "y"]
    before = batches.of(names)
    names[0] = "y"
    after = batches.of(names)
    assert (before.used, after.used) == (["x", "y"], ["y"])


# results


@needs_peft
def test_every_layer_is_right(model: Any, x: Any) -> None:
    with accelerate(model) as taken:
        assert sorted(taken.layers) == ["down", "gate", "up"]
        assert taken.fallbacks == {}
        check(model, x)
        check(model, x[:, 0])
        check(model, x[:1], ["en"])
        check(model, x[:2], ["__base__", "__base__"])


@needs_peft
@pytest.mark.parametrize(
    ("dtype", "adapters_as_base"),
    [("float32", True), ("bfloat16", False), ("bfloat16", True), ("float16", True)],
)
def test_a_layer_equals_pefts(dtype: str, adapters_as_base: bool, lib: SimpleNamespace) -> None:
    lib.torch.manual_seed(2)
    base = net(lib.torch).to(getattr(lib.torch, dtype))
    configs = {"de": lora(lib, "down", r=5, lora_alpha=4), "en": lora(lib, "down", r=16)}
    model = adapted(lib, base, configs, adapters_as_base)
    layer = model.base_model.model.down
    names = ["en", "de", "__base__", "en"]
    x = lib.torch.randn(len(names), 9, 33).to(getattr(lib.torch, dtype))
    theirs = layer(x, adapter_names=names)
    with accelerate(model):
        ours = layer(x, adapter_names=names)
    assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)

    rows, y = (as_array("x", t).reshape(-1, t.shape[-1]) for t in (x, layer.base_layer(x)))
    adapters = {i: benchmark.adapter_of(layer, names[i]) for i in range(len(names))}
    ids = np.repeat(np.arange(len(names)), 9)
    expected = by_row.add_lora(y, rows, adapters, ids)
    bound = bounds.add_lora_bound(y, rows, adapters, ids, expected=expected)
    results = [as_array("y", t).reshape(-1, t.shape[-1]) for t in (ours, theirs)]
    compare.check(results[0], expected, bound)
    if dtype == "float32":
        compare.check(results[1], expected, bound)
        assert (np.abs(results[0] - results[1]) <= 2 * bound).all()
    else:  # PEFT rounds on the way, where the bound does not reach
        compare.check_no_worse(results[0], results[1], expected)


@needs_peft
def test_layers_of_other_tokens_share_no_segments(model: Any, x: Any) -> None:
    """As in an encoder-decoder model, whose cross attention reads what the encoder wrote."""
    with accelerate(model):
        for part in (x, x[:, :1], x, x[:, :2]):
            check(model, part)


@needs_peft
def test_x_and_result_may_have_any_strides(model: Any, x: Any) -> None:
    with accelerate(model):
        check(model, x.transpose(0, 1).contiguous().transpose(0, 1))
        check(model, x.repeat(1, 1, 2)[..., ::2])


@needs_peft
def test_x_may_be_negated_lazily(lib: SimpleNamespace, model: Any, x: Any) -> None:
    """Its bytes have the other sign."""
    layer, negated = model.base_model.model.up, lib.torch._neg_view(x)
    assert negated.is_neg()
    assert negated.is_contiguous()
    with accelerate(model):
        difference = layer(negated, adapter_names=NAMES) - layer(-x, adapter_names=NAMES)
    assert difference.abs().max() < 1e-4


@needs_peft
def test_a_base_layer_that_returns_what_it_should_not_is_refused(model: Any, x: Any) -> None:
    """The kernels take addresses: what they would read or write amiss is told before."""
    gate, n = model.base_model.model.gate, len(NAMES)
    memory = x.new_ones(n, 1, 33)
    x = memory.flatten()[: n * 20].view(n, 1, 20)
    with accelerate(model):
        with pytest.raises(ShapeError, match="gate: x and result"):
            gate._mixed_batch_forward(x, adapter_names=NAMES[:2])
        for returned, error, message in (
            (memory[..., :5], ShapeError, r"gate: x and result.*33\).*5\)"),
            (memory, MemoryLayoutError, "gate: result.*apart from x"),
        ):
            hook = gate.base_layer.register_forward_hook(lambda *_, its=returned: its)
            with pytest.raises(error, match=message):
                gate(x, adapter_names=NAMES)
            hook.remove()
    assert (memory == 1).all()


@needs_peft
def test_no_samples_and_no_tokens_are_fine(model: Any, x: Any) -> None:
    with accelerate(model):
        assert model(x[:0], adapter_names=[]).shape == (0, TOKENS, 20)
        assert model(x[:, :0], adapter_names=NAMES).shape == (len(NAMES), 0, 20)


@needs_peft
def test_a_step_makes_its_segments_once(
    model: Any, x: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []

    def counted(ids: Any) -> Any:
        made.append(len(ids))
        return sgmv.segment(ids)

    with accelerate(model):
        monkeypatch.setattr(peft_batches, "segment", counted)
        model(x, adapter_names=NAMES)
    assert made == [0, len(NAMES) * TOKENS]


@needs_peft
def test_entry_copies_and_compiles(model: Any, x: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step finds all adapters in their stacks."""
    with accelerate(model):
        monkeypatch.setattr(compat._Layer, "_load", must_not_run)
        check(model, x)


def must_not_run(*_args: object) -> None:
    raise AssertionError("ran")


# what changes while the context lasts


def halves(model: Any) -> tuple[Any, Any]:
    """A and B of adapter de in layer up."""
    layer = model.base_model.model.up
    return layer.lora_A["de"], layer.lora_B["de"]


def in_place(_lib: SimpleNamespace, model: Any) -> None:
    halves(model)[0].weight[1, 2] += 3


def under_inference_mode(lib: SimpleNamespace, model: Any) -> None:
    with lib.torch.inference_mode():
        halves(model)[1].weight.mul_(-2)


def reassigned(_lib: SimpleNamespace, model: Any) -> None:
    weight = halves(model)[1].weight
    weight.data = weight.data * 2


def written_through_data(lib: SimpleNamespace, model: Any) -> None:
    """As PEFT's hotswap does: torch does not count it."""
    weight = halves(model)[0].weight
    count = weight._version
    weight.data.copy_(lib.torch.randn(weight.shape))
    assert weight._version == count


def hotswapped(lib: SimpleNamespace, model: Any) -> None:
    from peft.utils.hotswap import hotswap_adapter_from_state_dict

    its = [(name, weight) for name, weight in model.named_parameters() if ".fr." in name]
    state = {name: lib.torch.randn(weight.shape) for name, weight in its}
    hotswap_adapter_from_state_dict(model, state, "fr", model.peft_config["fr"])


def another_parameter(lib: SimpleNamespace, model: Any) -> None:
    """Over the same memory, with a count of its own that stands where the old one stood."""
    for half in halves(model):
        old = half.weight
        half.weight = lib.torch.nn.Parameter(old.data, requires_grad=False)
        while half.weight._version < old._version:
            half.weight.mul_(1.5)
        half.weight.data[-1, -1] += 1


def rescaled(_lib: SimpleNamespace, model: Any) -> None:
    model.base_model.model.up.set_scale("de", 3.0)


def cast(lib: SimpleNamespace, model: Any) -> None:
    for half in halves(model):
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
        monkeypatch.setattr(compat._Layer, "_is_current", lambda *_: True)
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
    weight = halves(model)[0].weight
    address = weight.data_ptr()
    with accelerate(model):
        weight.data = weight.data.clone()
        tensors = [lib.torch.empty_like(weight) for _ in range(50)]
        assert all(tensor.data_ptr() != address for tensor in tensors)


# what is PEFT's


@needs_peft
def test_exit_leaves_nothing_behind(model: Any, x: Any) -> None:
    modules = [model.base_model, *model.base_model.model.children()]
    before = [dict(vars(module)) for module in modules]
    theirs = model(x, adapter_names=NAMES)
    with contextlib.suppress(KeyError), accelerate(model):
        assert compat.HOOKS in vars(modules[0])
        assert all(compat.MIXED in vars(module) for module in modules[1:])
        raise KeyError
    assert [dict(vars(module)) for module in modules] == before
    assert model(x, adapter_names=NAMES).equal(theirs)


@needs_peft
def test_layers_that_are_gone_are_restored(lib: SimpleNamespace, model: Any) -> None:
    layer = model.base_model.model.up
    with accelerate(model) as taken:
        model.base_model.model.up = layer.base_layer
        model.add_adapter("z", lora(lib, "down"))
        model(lib.torch.zeros(1, 20), adapter_names=["z"])
        assert compat.MIXED not in vars(layer)
        assert "up" not in taken.layers


@needs_peft
def test_all_but_mixed_batches_is_as_ever(model: Any, x: Any) -> None:
    def others() -> list[Any]:
        outputs = [model(x)]
        model.set_adapter("en")
        outputs.append(model(x))
        with model.disable_adapter():
            outputs += [model(x), model(x, adapter_names=NAMES)]
        model.set_adapter("fr")
        return outputs

    theirs = others()
    with accelerate(model):
        assert all(ours.equal(its) for ours, its in zip(others(), theirs, strict=True))


@needs_peft
def test_odd_adapters_take_pefts_path(lib: SimpleNamespace, model: Any, x: Any) -> None:
    model.add_adapter("biased", lora(lib, "up", r=3, lora_bias=True))
    randomise(lib, model)
    model.requires_grad_(False).eval()
    names = ["biased", "de"]
    layer = model.base_model.model.up
    theirs = layer(x[:2], adapter_names=names)
    with accelerate(model) as taken:
        assert taken.fallbacks == {"up, biased": "lora_bias adds a bias to B"}
        assert str(taken) == "3 layers through add_lora\nup, biased: lora_bias adds a bias to B"
        assert layer(x[:2], adapter_names=names).equal(theirs)
        check(model, x[:2], ["de", "en"])


@needs_peft
def test_other_layers_take_pefts_path(lib: SimpleNamespace) -> None:
    torch = lib.torch

    class Net(torch.nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.embed = torch.nn.Embedding(10, 6)
            self.conv = torch.nn.Conv1d(6, 6, 3, padding=1)
            self.linear = torch.nn.Linear(6, 5)

        def forward(self, tokens: Any) -> Any:
            return self.linear(self.conv(self.embed(tokens).mT).mT)

    config = lora(lib, "embed", "conv", "linear", r=2)
    model = adapted(lib, Net(), {"de": config, "en": config})
    tokens, names = torch.arange(8).reshape(4, 2), ["en", "de", "__base__", "en"]
    inner: list[Any] = []
    model.base_model.model.conv.register_forward_hook(lambda *its: inner.append(its[-1].clone()))
    model(tokens, adapter_names=names)
    with accelerate(model) as taken:
        assert taken.layers == ["linear"]
        assert taken.fallbacks == {
            "embed": "a LoRA layer of type Embedding",
            "conv": "a LoRA layer of type Conv1d",
        }
        model(tokens, adapter_names=names)
    assert inner[0].equal(inner[1])


class Computed:
    """A base weight that is made when asked for, and may not be asked for."""

    @property
    def weight(self) -> Any:
        raise RuntimeError("on disk")


@needs_peft
@pytest.mark.parametrize("kind", ["int8", "float16", "list", "property", "meta"])
def test_unusual_base_layers_are_served(
    kind: str, lib: SimpleNamespace, model: Any, x: Any
) -> None:
    """The delta is the same, whatever the base layer keeps in place of a weight."""
    torch, children = lib.torch, model.base_model.model
    for layer in (children.gate, children.up, children.down):
        base = layer.base_layer
        if kind in ("int8", "float16"):
            dtype = getattr(torch, "qint8" if kind == "int8" else kind)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                quantised = torch.ao.quantization.quantize_dynamic(
                    torch.nn.Sequential(base), {torch.nn.Linear}, dtype
                )
            layer.base_layer = quantised[0]
            assert callable(layer.base_layer.weight)
            continue
        weight = base._parameters.pop("weight").data
        base.forward = partial(torch.nn.functional.linear, weight=weight, bias=base.bias)
        if kind == "list":
            base.weight = [weight]
        elif kind == "property":
            base.__class__ = type("Odd", (Computed, torch.nn.Linear), {})
        else:  # as offloading leaves it
            base.weight = torch.nn.Parameter(weight.to("meta"), requires_grad=False)
    theirs = model(x, adapter_names=NAMES)
    with accelerate(model) as taken:
        assert (sorted(taken.layers), taken.fallbacks) == (["down", "gate", "up"], {})
        check(model, x)
    assert model(x, adapter_names=NAMES).equal(theirs)


@needs_peft
def test_halves_of_unusual_layers_take_pefts_path(lib: SimpleNamespace, model: Any, x: Any) -> None:
    """Quantised after PEFT: A and B of layer up are torch.ao's too, or have no weight."""
    up = model.base_model.model.up
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantise = lib.torch.ao.quantization.quantize_dynamic
        up.lora_A = quantise(up.lora_A, {lib.torch.nn.Linear}, lib.torch.qint8)
    up.lora_B["en"] = lib.torch.nn.Sequential(up.lora_B["en"])
    up.lora_B["en"].dtype = up.lora_B["en"][0].weight.dtype
    with accelerate(model) as taken:
        assert sorted(taken.fallbacks) == ["up, de", "up, en"]
        assert all("half is a Linear" in why for why in taken.fallbacks.values())
        check(model, x, ["fr"] * len(NAMES))


@needs_peft
@pytest.mark.skipif(find_spec("torchao") is None, reason="not installed: torchao")
@pytest.mark.filterwarnings("ignore::UserWarning")  # of merging, which is not tried
def test_torchaos_layers_are_served(lib: SimpleNamespace, x: Any) -> None:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    base = net(lib.torch)
    quantize_(base, Int8WeightOnlyConfig())
    model = adapted(lib, base, {"de": lora(lib, "gate", "down", r=3), "en": lora(lib, "up")})
    model.requires_grad_(False).eval()
    assert type(model.base_model.model.gate).__name__ == "TorchaoLoraLinear"
    with accelerate(model) as taken:
        assert sorted(taken.layers) == ["down", "gate", "up"]
        check(model, x[:3], ["en", "de", "__base__"])


@needs_peft
def test_dora_is_refused_by_peft(lib: SimpleNamespace, model: Any, x: Any) -> None:
    model.add_adapter("dora", lora(lib, "up", use_dora=True))
    model.requires_grad_(False).eval()
    with accelerate(model) as taken:
        assert taken.fallbacks == {"up, dora": "DoraLinearVariant"}
        with pytest.raises(ValueError, match="DoRA"):
            model.base_model.model.up(x, adapter_names=["dora"] * len(x))
        check(model, x)


@needs_peft
def test_gradients_take_pefts_path_and_say_so(model: Any, x: Any, lib: SimpleNamespace) -> None:
    layer, weight = model.base_model.model.up, halves(model)[0].weight.requires_grad_()
    with lib.torch.enable_grad():
        layer(x, adapter_names=NAMES).sum().backward()
        theirs, weight.grad = weight.grad, None
        with accelerate(model):
            with pytest.warns(UserWarning, match="inference_mode"):
                layer(x, adapter_names=NAMES).sum().backward()
            assert weight.grad.equal(theirs)
            weight.requires_grad_(False)
            check(model, x)  # nothing to record, nothing to lose


@needs_peft
def test_pefts_refusals_stay(lib: SimpleNamespace, model: Any, x: Any) -> None:
    with accelerate(model):
        with pytest.raises(ValueError, match="non-existing adapter"):
            model(x, adapter_names=["nobody"] * len(x))
        with pytest.raises(ValueError, match="Length of `adapter_names`"):
            model.base_model.model.up(x, adapter_names=["de"])
        model.train()
        with pytest.raises(ValueError, match="training mode"):
            model(x, adapter_names=NAMES)
        model.eval()
        model.merge_adapter()
        with pytest.raises(ValueError, match="merged"):
            model.base_model.model.gate(x, adapter_names=NAMES)


@needs_peft
def test_accelerate_refuses(lib: SimpleNamespace, model: Any, x: Any) -> None:
    def refused(model: Any, words: str) -> None:
        with pytest.raises(PeftError, match=words), accelerate(model):
            pass

    refused(net(lib.torch), "peft.PeftModel with LoRA adapters, got Net")
    ia3 = lib.peft.IA3Config(target_modules=["up"], feedforward_modules=[])
    refused(lib.peft.get_peft_model(net(lib.torch), ia3), "got IA3Model")
    refused(model.train(), "training mode.*model.eval")
    model.eval()
    with accelerate(model):
        refused(model, "one accelerate at a time")
        check(model, x)
    odd = adapted(lib, net(lib.torch), {"de": lora(lib, "up", lora_bias=True)})
    refused(odd, "up, de: lora_bias")
    assert compat.HOOKS not in vars(odd.base_model)
    assert compat.MIXED not in vars(odd.base_model.model.up)


# calls that fail


def hooks(model: Any) -> list[Any]:
    """PEFT's hooks on the model's modules, which it removes after a call that went well."""
    found = [hook for module in model.modules() for hook in module._forward_pre_hooks.values()]
    return [hook for hook in found if isinstance(hook, partial)]


def raiser(error: type[BaseException]) -> Callable[..., None]:
    def fail(*_args: object) -> None:
        raise error("planted")

    return fail


@needs_peft
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit, GeneratorExit])
@pytest.mark.parametrize("where", ["", "gate", "up.base_layer", "down"])
def test_a_failed_batch_leaves_nothing(
    where: str, error: type[BaseException], model: Any, x: Any
) -> None:
    """A plain call of as many samples would use the failed batch's adapters, and say nothing."""
    plain = model(x)
    with accelerate(model):
        module = model.base_model.model.get_submodule(where)
        for plant in (module.register_forward_pre_hook, module.register_forward_hook):
            handle = plant(raiser(error))
            with pytest.raises(error, match="planted"):
                model(x, adapter_names=NAMES)
            handle.remove()
            assert hooks(model) == []
            assert model(x).equal(plain)
            check(model, x)
    assert model(x).equal(plain)


@needs_peft
def test_peft_alone_leaves_its_hooks(model: Any, x: Any) -> None:
    """The test above can fail; and what PEFT left before is gone on entry."""
    plain = model(x)
    handle = model.base_model.model.down.register_forward_hook(raiser(RuntimeError))
    with pytest.raises(RuntimeError, match="planted"):
        model(x, adapter_names=NAMES)
    handle.remove()
    assert len(hooks(model)) == 3
    assert not model(x).equal(plain)
    with accelerate(model):
        assert hooks(model) == []
        assert model(x).equal(plain)


@needs_peft
def test_a_failed_batch_within_a_batch_leaves_the_outer_ones_hooks(model: Any, x: Any) -> None:
    with accelerate(model):
        expected = model(x, adapter_names=NAMES)
    failing = model.base_model.model.down.register_forward_hook(raiser(RuntimeError))

    def call_again(*_args: object) -> None:
        outer.remove()
        with pytest.raises(RuntimeError, match="planted"):
            model(x, adapter_names=["en"] * len(NAMES))
        failing.remove()

    with accelerate(model):
        outer = model.base_model.model.up.base_layer.register_forward_pre_hook(call_again)
        assert model(x, adapter_names=NAMES).equal(expected)
        assert hooks(model) == []


@needs_peft
def test_a_call_that_peft_refuses_half_way_leaves_nothing(lib: SimpleNamespace, llama: Any) -> None:
    """PEFT has given each layer its hook for aLoRA's offsets when it refuses beams, or a name."""
    tokens = lib.torch.ones(2, 3, dtype=lib.torch.long)
    plain = llama(tokens).logits
    offsets = {"alora_offsets": [1, 2]}
    with accelerate(llama):
        with pytest.raises(ValueError, match="Beam search"):
            llama.base_model._enable_peft_forward_hooks(num_beams=2, **offsets).__enter__()
        assert hooks(llama) == []
        with pytest.raises(ValueError, match="non-existing"):
            llama(tokens, adapter_names=["nobody", "de"], **offsets)
        assert hooks(llama) == []
        assert llama(tokens).logits.equal(plain)


@needs_peft
@pytest.mark.parametrize("beams", [1, 2])
def test_a_failed_generate_leaves_nothing(beams: int, lib: SimpleNamespace, llama: Any) -> None:
    tokens = lib.torch.ones(3, 3, dtype=lib.torch.long)
    plain = llama(tokens).logits
    generate = partial(llama.generate, input_ids=tokens, max_new_tokens=3, num_beams=beams)
    with accelerate(llama):
        theirs = generate(do_sample=False)
        for error in (RuntimeError, KeyboardInterrupt):
            with pytest.raises(error, match="planted"):
                generate(adapter_names=["en", "__base__", "de"], logits_processor=[raiser(error)])
            assert hooks(llama) == []
            assert llama(tokens).logits.equal(plain)
        assert generate(do_sample=False).equal(theirs)


@needs_peft
def test_a_failed_batch_of_an_encoder_and_beams_leaves_nothing(lib: SimpleNamespace) -> None:
    """PEFT gives an encoder's layers a second hook."""
    lib.torch.manual_seed(5)
    config = lib.transformers.T5Config(
        vocab_size=32, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2,
        decoder_start_token_id=0,
    )  # fmt: skip
    base = lib.transformers.T5ForConditionalGeneration(config)
    configs = {name: lora(lib, "q", "v", r=2, task_type="SEQ_2_SEQ_LM") for name in ("de", "en")}
    model = adapted(lib, base, configs)
    tokens = lib.torch.ones(2, 3, dtype=lib.torch.long)
    with accelerate(model), pytest.raises(KeyboardInterrupt):
        model.generate(
            input_ids=tokens, adapter_names=["en", "de"], num_beams=2, max_new_tokens=2,
            logits_processor=[raiser(KeyboardInterrupt)],
        )  # fmt: skip
    assert hooks(model) == []


@needs_peft
def test_an_interrupt_at_any_line_leaves_nothing(model: Any, x: Any) -> None:
    """Of ours and of PEFT's: hooks half made, half removed, layers half taken over."""
    modules = [model.base_model, *model.base_model.model.children()]
    before = [dict(vars(module)) for module in modules]
    plain = model(x)
    theirs = sys.modules[type(model.base_model).__module__]
    files = [module.__file__ for module in (compat, peft_batches, peft_hooks, theirs)]

    def call(interrupt: int, entered: bool) -> int:
        """Lines passed; the interrupt comes as Ctrl-C's does, after the line of this number."""
        lines = 0

        def trace(frame: Any, event: str, _arg: object) -> Any:
            nonlocal lines
            if frame.f_code.co_filename not in files:
                return None
            if event == "line":
                lines += 1
                if lines == interrupt:
                    _thread.interrupt_main()
            return trace

        sys.settrace(trace)
        try:
            if entered:
                model(x, adapter_names=NAMES)
            else:
                with accelerate(model):
                    model(x, adapter_names=NAMES)
        except KeyboardInterrupt:
            pass
        finally:
            sys.settrace(None)
        return lines

    for number in count(1):
        with accelerate(model):
            passed = call(number, entered=True)
            assert model(x).equal(plain), number
            assert hooks(model) == [], number
        if passed < number:
            break
    assert number > 30
    for number in count(1):
        passed = call(number, entered=False)
        assert [dict(vars(module)) for module in modules] == before, number
        if passed < number:
            break
    assert number > 100


@needs_peft
def test_a_model_that_cannot_be_taken_over_is_as_it_was(lib: SimpleNamespace, x: Any) -> None:
    model = adapted(lib, net(lib.torch), {"de": lora(lib, "gate", "down")})
    with accelerate(model):
        model.add_adapter("en", lora(lib, "up", "down"))
        model.base_model.model.up.out_features = 0
        with pytest.raises(ValueRangeError, match="h_out"):
            model(x, adapter_names=["en"] * len(x))
    for module in (model.base_model, *model.base_model.model.children()):
        assert not {compat.HOOKS, compat.MIXED} & vars(module).keys()


@needs_peft
def test_one_threads_failed_batch_is_not_anothers(model: Any, x: Any) -> None:
    """Both name the same adapters, as PEFT demands: hooks, and who has looked for changes."""
    down = model.base_model.model.down
    errors: list[BaseException] = []
    second_is_in, first_has_failed = threading.Event(), threading.Event()

    def meet(*_args: object) -> None:
        if threading.current_thread() is first:
            assert second_is_in.wait(60)
            raise RuntimeError("planted")
        second_is_in.set()
        assert first_has_failed.wait(60)

    def fail() -> None:
        with lib_no_grad(), pytest.raises(RuntimeError, match="planted"):
            model(x, adapter_names=NAMES)
        first_has_failed.set()

    def succeed() -> None:
        with lib_no_grad():
            try:
                assert model(x, adapter_names=NAMES).equal(expected)
            except BaseException as error:
                errors.append(error)

    lib_no_grad = sys.modules["torch"].no_grad
    with accelerate(model):
        expected = model(x, adapter_names=NAMES)
        handle = model.base_model.model.gate.base_layer.register_forward_pre_hook(meet)
        first, second = threading.Thread(target=fail), threading.Thread(target=succeed)
        first.start()
        second.start()
        first.join()
        second.join()
        handle.remove()
        assert errors == hooks(model) == []
        model.base_model.model.down.lora_A["en"].weight.data.mul_(2)
        h = x.repeat(1, 1, 2)[..., :33]
        benchmark.check(down, partial(down, h, adapter_names=NAMES), NAMES, "down", most=ALL_ROWS)


@needs_peft
def test_threads_see_a_change_at_once(lib: SimpleNamespace, model: Any, x: Any) -> None:
    errors: list[BaseException] = []

    def call(barrier: threading.Barrier) -> None:
        try:
            with lib.torch.no_grad():
                barrier.wait(60)
                model(x, adapter_names=NAMES)
        except BaseException as error:
            errors.append(error)

    with accelerate(model):
        for i in range(20):
            in_place(lib, model)
            model.add_adapter(f"n{i}", lora(lib, "gate", "up", "down", r=i + 1))
            model.requires_grad_(False).eval()
            barrier = threading.Barrier(4)
            threads = [threading.Thread(target=call, args=(barrier,)) for _ in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert errors == []
            check(model, x)
            model.delete_adapter(f"n{i}")


@needs_peft
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copy_made_inside_is_pefts_alone(how: str, lib: SimpleNamespace, x: Any) -> None:
    def copied(model: Any) -> Any:
        return copy.deepcopy(model) if how == "deepcopy" else pickle.loads(pickle.dumps(model))

    linear = lib.torch.nn.Linear
    configs = {name: lora(lib, "0", "1", r=r) for name, r in (("de", 3), ("en", 5), ("fr", 1))}
    model = adapted(lib, lib.torch.nn.Sequential(linear(20, 9), linear(9, 20)), configs)
    theirs, plain = model(x, adapter_names=NAMES), model(x)
    with accelerate(model):
        twin = copied(model)
        twins = copied(twin)
        check(twin, x)
    for one in (twin, twins):
        assert one(x, adapter_names=NAMES).equal(theirs)
        assert one(x).equal(plain)
        with accelerate(one) as taken:
            assert taken.layers == ["0", "1"]
            one.base_model.model[0].lora_B["de"].weight.mul_(2)
            check(one, x)
        one.base_model.model[0].lora_B["de"].weight.div_(2)
        assert one(x, adapter_names=NAMES).equal(theirs)
    assert model(x, adapter_names=NAMES).equal(theirs)


@needs_peft
def test_names_that_no_adapter_has_leave_nothing(model: Any, x: Any) -> None:
    """PEFT's layers take any name, and its model refuses what no layer has."""
    up = model.base_model.model.up
    with accelerate(model) as taken:
        for i in range(20):
            names = [f"nobody{i}", "de", "fr"]
            benchmark.check(up, partial(up, x[:3], adapter_names=names), names, "up", most=ALL_ROWS)
            with pytest.raises(ValueError, match="non-existing"):
                model(x[:3], adapter_names=names)
        assert taken._batches.names == {"de", "en", "fr"}
        assert {len(layer.stack) for layer in taken._layers.values()} == {3}
        check(model, x)


# planted faults


def last_sample_wrong(batch: Any, tokens: int) -> Any:
    return sgmv.segment(np.repeat(np.roll(batch._ids, 1), tokens))


def tokens_interleaved(batch: Any, tokens: int) -> Any:
    return sgmv.segment(np.tile(batch._ids, tokens))


@needs_peft
@pytest.mark.parametrize("fault", [last_sample_wrong, tokens_interleaved])
def test_wrong_rows_would_be_found(
    fault: Callable[..., Any], model: Any, x: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peft_batches.Batch, "segments", fault)
    with accelerate(model), pytest.raises(AssertionError, match="elements wrong"):
        check(model, x)


# whole models


@pytest.fixture(scope="module")
def llama(lib: SimpleNamespace) -> Any:
    lib.torch.manual_seed(3)
    config = lib.transformers.LlamaConfig(
        vocab_size=64, hidden_size=48, intermediate_size=112, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=32,
        initializer_range=0.15, pad_token_id=0,
    )  # fmt: skip
    base = lib.transformers.LlamaForCausalLM(config)
    configs = {
        name: lib.peft.LoraConfig(r=r, target_modules="all-linear", task_type="CAUSAL_LM")
        for name, r in (("de", 3), ("en", 16))
    }
    return adapted(lib, base, configs)


@needs_peft
@pytest.mark.parametrize("beams", [1, 2])
def test_generate_writes_what_peft_writes(beams: int, lib: SimpleNamespace, llama: Any) -> None:
    names = ["en", "__base__", "de"]
    tokens = lib.torch.randint(
        1, 64, (len(names), 5), generator=lib.torch.Generator().manual_seed(4)
    )
    options = {"max_new_tokens": 4, "do_sample": False, "num_beams": beams}
    generate = partial(llama.generate, input_ids=tokens, adapter_names=names, **options)
    theirs = generate()
    repeated = [name for name in names for _ in range(beams)]
    with accelerate(llama) as taken:
        assert len(taken.layers) == 14
        benchmark.check(llama, generate, repeated, "llama", most=ALL_ROWS)
        assert generate().equal(theirs)
