"""Layers and adapters of every kind: those that are served, and those that PEFT computes."""

from __future__ import annotations

import warnings
from functools import partial
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import sgmv
from benchmarks.studies import peft as benchmark
from reference import bounds, by_row, compare
from sgmv.compat.peft import accelerate
from sgmv.compat.peft_layers import LinearLayer
from sgmv.dtypes import Array
from sgmv.errors import ShapeError
from sgmv.tensors import as_array
from tests.help.peft_models import (
    NAMES,
    adapted,
    check,
    lora,
    needs_peft,
    net,
)

pytestmark = [
    pytest.mark.once,
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # PEFT's use of transformers
]


ODD = "a forward hook, or another forward, of its lora_A or lora_B"


def listened_to(half: Any) -> Any:
    """Somebody's hook, which changes what the half puts out."""
    return half.register_forward_hook(lambda _module, _inputs, output: 3 * output)


@needs_peft
def test_odd_adapters_take_pefts_path(model: Any, x: Any) -> None:
    layer, names = model.base_model.model.up, ["de", "en"]
    listened_to(layer.lora_A["de"])
    theirs = layer(x[:2], adapter_names=names)
    with accelerate(model) as taken:
        assert taken.fallbacks == {"up, de": ODD}
        assert str(taken) == f"3 layers through add_lora\nup, de: {ODD}"
        assert layer(x[:2], adapter_names=names).equal(theirs)
        check(model, x[:2], ["fr", "en"])


@needs_peft
@pytest.mark.parametrize("half", ["lora_A", "lora_B"])
def test_a_hook_of_a_half_is_heard_while_it_is_there(half: str, model: Any, x: Any) -> None:
    """add_lora does not call the halves: what their hooks do was passed over."""
    layer = model.base_model.model.up
    plain = layer(x, adapter_names=NAMES)
    with accelerate(model) as taken:
        check(model, x)
        part = getattr(layer, half)["de"]
        for plant in (part.register_forward_hook, part.register_forward_pre_hook):
            heard: list[Any] = []
            handle = plant(lambda *args, heard=heard: heard.append(len(args)))
            assert model(x, adapter_names=NAMES) is not None
            assert len(heard) == 1
            assert taken.fallbacks == {"up, de": ODD}
            handle.remove()
            check(model, x)
            assert taken.fallbacks == {}
        part.forward = lambda given, own=part.forward: 2 * own(given)
        model(x, adapter_names=NAMES)
        assert taken.fallbacks == {"up, de": ODD}
    assert not layer(x, adapter_names=NAMES).equal(plain)


@needs_peft
def test_other_layers_take_pefts_path(lib: SimpleNamespace) -> None:
    torch = lib.torch

    class Net(torch.nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.embed = torch.nn.Embedding(10, 6, max_norm=1.0)
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
    why = "max_norm of its base layer, which PEFT applies to A, too"
    with accelerate(model) as taken:
        assert taken.layers == ["linear"]
        assert taken.fallbacks == {
            "conv": "a LoRA layer of type Conv1d",
            "embed, de": why,
            "embed, en": why,
        }
        model(tokens, adapter_names=names)
    assert inner[0].equal(inner[1])


# held to the reference: PEFT's result and ours are within one bound of it


def both(
    model: Any, layer: Any, x: Any, names: list[str], **options: Any
) -> tuple[Array, Array, Array]:
    """A layer's result without the adapters, PEFT's own, and ours; as rows."""
    base = layer(x, adapter_names=["__base__"] * len(names))
    theirs = layer(x, adapter_names=names, **options)
    with accelerate(model) as taken:
        ours = layer(x, adapter_names=names, **options)
        assert taken.fallbacks == {}
    found = (as_array("y", result).reshape(-1, result.shape[-1]) for result in (base, theirs, ours))
    return tuple(found)  # type: ignore[return-value]


def hold(results: tuple[Array, Array, Array], x: Array, adapters: Any, ids: Any) -> None:
    """PEFT's result and ours are base + delta of these adapters, and differ from base alone."""
    base, *found = results
    expected = by_row.add_lora(base, x, adapters, ids)
    bound = bounds.add_lora_bound(base, x, adapters, ids, expected=expected)
    for result, title in zip(found, ("PEFT", "sgmv"), strict=True):
        compare.check(result, expected, bound, title)
    assert (np.abs(expected - base) > bound).any(axis=1).sum() == np.count_nonzero(
        np.array(ids) >= 0
    )


def embedded(lib: SimpleNamespace, base: Any) -> Any:
    """A net of one embedding with two adapters."""
    configs = {name: lora(lib, "embed", r=r) for name, r in (("de", 3), ("en", 5))}
    model = adapted(lib, lib.torch.nn.ModuleDict({"embed": base}), configs)
    for name, weight in model.named_parameters():
        if "lora_embedding" in name:
            lib.torch.nn.init.normal_(weight, std=0.3)
    return model


@needs_peft
@pytest.mark.parametrize("scale", [1.0, 3.5])
def test_embeddings_are_served(scale: float, lib: SimpleNamespace) -> None:
    torch = lib.torch
    base = torch.nn.Embedding(10, 6)
    if scale != 1:  # Gemma 3's multiplies its own result
        from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

        base = Gemma3TextScaledWordEmbedding(10, 6, padding_idx=0, embed_scale=scale)
    model = embedded(lib, base)
    layer, names = model.base_model.model.embed, ["en", "de", "__base__", "en"]
    tokens = torch.randint(0, 10, (4, 5), generator=torch.Generator().manual_seed(2))
    x = np.eye(10, dtype=np.float32)[tokens.numpy().ravel()]

    def adapters() -> dict[int, sgmv.Adapter]:
        return {
            i: sgmv.Adapter(
                as_array("A", layer.lora_embedding_A[name]),
                as_array("B", layer.lora_embedding_B[name]),
                layer.scaling[name] * scale,
            )
            for i, name in enumerate(("de", "en"))
        }

    ids = np.repeat([1, 0, -1, 1], 5)
    hold(both(model, layer, tokens, names), x, adapters(), ids)
    hold(both(model, layer, tokens[:, 0], names), x[::5], adapters(), ids[::5])
    with accelerate(model) as taken:
        assert taken.layers == ["embed"]
        layer(tokens, adapter_names=names)
        layer.lora_embedding_B["en"].mul_(-2)
        changed = layer(tokens, adapter_names=names)
    base_rows = as_array("y", layer.base_layer(tokens)).reshape(-1, 6)
    hold((base_rows, *[as_array("y", changed).reshape(-1, 6)] * 2), x, adapters(), ids)


@needs_peft
def test_an_embedding_told_wrong_is_refused(lib: SimpleNamespace) -> None:
    model = embedded(lib, lib.torch.nn.Embedding(10, 6))
    layer = model.base_model.model.embed
    with accelerate(model), pytest.raises(ShapeError, match="embed: x and result"):
        layer._mixed_batch_forward(lib.torch.zeros(3, 2).long(), adapter_names=["de"])


def biased_model(lib: SimpleNamespace) -> Any:
    configs = {"de": lora(lib, "up", r=4, lora_alpha=8), "en": lora(lib, "up", r=7, lora_bias=True)}
    return adapted(lib, net(lib.torch), configs)


@needs_peft
def test_a_bias_of_lora_b_is_added(lib: SimpleNamespace, x: Any) -> None:
    model = biased_model(lib)
    layer, names = model.base_model.model.up, ["en", "__base__", "de", "en"]
    x = x[:4]

    def adapters() -> dict[int, sgmv.Adapter]:
        """With x one wider, and 1 there: the bias is then a column of B."""
        made = {}
        for i, name in enumerate(("de", "en")):
            A, B = layer.lora_A[name].weight.numpy(), layer.lora_B[name].weight.numpy()
            bias = layer.lora_B[name].bias
            wide = np.zeros((len(A) + 1, A.shape[1] + 1), np.float32)
            wide[:-1, :-1], wide[-1, -1] = A, 1
            column = np.zeros(len(B)) if bias is None else bias.numpy()
            wider = np.concatenate([B, column[:, None]], 1).astype(np.float32)
            made[i] = sgmv.Adapter(wide, wider, layer.scaling[name])
        return made

    rows = np.concatenate([x.reshape(-1, 20).numpy(), np.ones((12, 1), np.float32)], 1)
    ids = np.repeat([1, -1, 0, 1], 3)
    hold(both(model, layer, x, names), rows, adapters(), ids)
    with accelerate(model):
        layer(x, adapter_names=names)
        layer.lora_B["en"].bias.add_(2)
        changed = layer(x, adapter_names=names)
    base = as_array("y", layer.base_layer(x)).reshape(-1, 33)
    hold((base, *[as_array("y", changed).reshape(-1, 33)] * 2), rows, adapters(), ids)


@needs_peft
def test_a_bias_that_is_left_out_would_be_found(
    lib: SimpleNamespace, x: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        LinearLayer, "_add_biased", lambda self, y, x, segments, _: self._add_lora(y, x, segments)
    )
    with pytest.raises(AssertionError, match="sgmv"):
        test_a_bias_of_lora_b_is_added(lib, x)


OFFSETS = [None, 2, 9, 1, 3, 2]  # None: no invocation there; 9: before the first token


def activated(lib: SimpleNamespace) -> tuple[Any, list[str], Any]:
    """aLoRA, plain LoRA and base only in one batch; the adapter of each token."""
    alora = lora(lib, "up", r=3, alora_invocation_tokens=[7, 8])
    model = adapted(lib, net(lib.torch), {"al": alora, "de": lora(lib, "up", r=5)})
    names = ["al", "al", "al", "de", "__base__", "al"]
    ids = [[-1] * 4, [-1, -1, 0, 0], [0] * 4, [1] * 4, [-1] * 4, [-1, -1, 0, 0]]
    return model, names, np.array(ids).ravel()


@needs_peft
@pytest.mark.filterwarnings("ignore:aLoRA is currently only supported")  # by PEFT's own models
def test_alora_acts_from_its_invocation_on(lib: SimpleNamespace) -> None:
    model, names, ids = activated(lib)
    layer = model.base_model.model.up
    x = lib.torch.randn(6, 4, 20, generator=lib.torch.Generator().manual_seed(3))
    adapters = {i: benchmark.adapter_of(layer, name) for i, name in enumerate(("al", "de"))}
    rows = x.reshape(-1, 20).numpy()
    hold(both(model, layer, x, names, alora_offsets=OFFSETS), rows, adapters, ids)
    # One token, as in decoding: those that have been invoked go on.
    last = both(model, layer, x[:, -1:].contiguous(), names, alora_offsets=OFFSETS)
    hold(last, rows[3::4], adapters, ids[3::4])
    # No offsets at all: PEFT has not seen the tokens, and nothing was invoked.
    never = np.where(ids == 0, -1, ids)
    hold(both(model, layer, x, names), rows, adapters, never)


@needs_peft
@pytest.mark.filterwarnings("ignore:aLoRA is currently only supported")
def test_alora_that_acts_on_all_tokens_would_be_found(
    lib: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LinearLayer, "_active", lambda *_: None)
    with pytest.raises(AssertionError, match="sgmv"):
        test_alora_acts_from_its_invocation_on(lib)


@needs_peft
def test_a_model_finds_invocations_and_generates_what_peft_does(lib: SimpleNamespace) -> None:
    lib.torch.manual_seed(3)
    config = lib.transformers.LlamaConfig(
        vocab_size=64, hidden_size=48, intermediate_size=112, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, initializer_range=0.15, pad_token_id=0,
    )  # fmt: skip
    base = lib.transformers.LlamaForCausalLM(config)
    options = {"task_type": "CAUSAL_LM", "alora_invocation_tokens": [7, 8]}
    configs = {
        "al": lora(lib, "q_proj", "up_proj", **options),
        "de": lora(lib, "q_proj", "down_proj", "embed_tokens", "lm_head", task_type="CAUSAL_LM"),
    }
    model, names = adapted(lib, base, configs), ["al", "de", "__base__", "al"]
    tokens = lib.torch.randint(9, 64, (4, 6), generator=lib.torch.Generator().manual_seed(4))
    tokens[0, 2:4] = lib.torch.tensor([7, 8])
    generate = partial(
        model.generate, input_ids=tokens, adapter_names=names, max_new_tokens=4, do_sample=False
    )
    theirs, logits = generate(), model(tokens, adapter_names=names).logits
    plain = model(tokens, adapter_names=["__base__"] * 4).logits
    with accelerate(model) as taken:
        assert taken.fallbacks == {}
        assert generate().equal(theirs)
        ours = model(tokens, adapter_names=names).logits
    # Two computations of float32: they part by far less than the adapters do from the base model.
    assert (ours - logits).abs().max() < 1e-4 * (logits - plain).abs().max()
    assert (ours[0, :2] - plain[0, :2]).abs().max() < 1e-4


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


BITS = {
    "int8": lambda bnb, torch, *widths: bnb.nn.Linear8bitLt(*widths, has_fp16_weights=False),
    "nf4": lambda bnb, torch, *widths: bnb.nn.Linear4bit(
        *widths, quant_type="nf4", compute_dtype=torch.float32
    ),
}


@needs_peft
@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="not installed: bitsandbytes")
@pytest.mark.filterwarnings("ignore::UserWarning")  # of casts to float16 inside
@pytest.mark.parametrize("kind", BITS)
def test_bitsandbytes_layers_are_served(kind: str, lib: SimpleNamespace) -> None:
    """Their classes mix batches by methods of their own; the delta is the same.

    Where the CPU has AVX512_BF16, bitsandbytes packs 4 bits in blocks of 32 rows and 64 columns.
    """
    import bitsandbytes as bnb

    base = net(lib.torch, 64, 128)
    x = lib.torch.randn(3, 4, 64, generator=lib.torch.Generator().manual_seed(1))
    for name in ("gate", "up", "down"):
        plain = getattr(base, name)
        made = BITS[kind](bnb, lib.torch, plain.in_features, plain.out_features)
        made.load_state_dict(plain.state_dict(), strict=False)
        setattr(base, name, made.to("cpu"))
    setattr(base, f"is_loaded_in_{8 if kind == 'int8' else 4}bit", True)
    configs = {"de": lora(lib, "gate", "down", r=3), "en": lora(lib, "up", lora_bias=False)}
    model = adapted(lib, base, configs)
    assert type(model.base_model.model.gate).__module__ == "peft.tuners.lora.bnb"
    names = ["en", "de", "__base__"]
    theirs = model(x, adapter_names=names)
    with accelerate(model) as taken:
        assert sorted(taken.layers) == ["down", "gate", "up"]
        assert taken.fallbacks == {}
        check(model, x, names)
    assert model(x, adapter_names=names).equal(theirs)


@needs_peft
@pytest.mark.skipif(find_spec("accelerate") is None, reason="not installed: accelerate")
@pytest.mark.parametrize("to", ["cpu", "disk"])
def test_offloaded_weights_are_served(to: str, lib: SimpleNamespace, model: Any, x: Any) -> None:
    """Base layers, A and B are empty but while they run; A and B are in the stacks."""
    import tempfile

    from accelerate import cpu_offload, disk_offload

    device = lib.torch.device("cpu")
    halves = [
        (half, half.weight)
        for layer in model.base_model.model.children()
        for part in (layer.lora_A, layer.lora_B)
        for half in part.values()
    ]
    expected = model(x, adapter_names=NAMES)
    if to == "cpu":
        cpu_offload(model, execution_device=device)
    else:
        disk_offload(model, tempfile.mkdtemp(), execution_device=device)
    assert all(half.weight.is_meta for half, _ in halves)
    theirs = model(x, adapter_names=NAMES)
    assert theirs.equal(expected)
    with accelerate(model) as taken:
        assert (sorted(taken.layers), taken.fallbacks) == (["down", "gate", "up"], {})
        ours = model(x, adapter_names=NAMES)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(LinearLayer, "_load", must_not_run)
            model(x, adapter_names=NAMES)
    assert (ours - theirs).abs().max() < 1e-4
    assert not ours.equal(model(x, adapter_names=["__base__"] * len(NAMES)))


def must_not_run(*_args: object) -> None:
    raise AssertionError("ran")
