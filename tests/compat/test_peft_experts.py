"""`accelerate` on experts' parameters: mixed batches, held to PEFT with one adapter at a time."""

from __future__ import annotations

import warnings
from types import SimpleNamespace
from typing import Any

import pytest

from sgmv.compat.peft import accelerate
from tests.help.peft_models import needs_peft

pytestmark = [
    needs_peft,
    pytest.mark.once,
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # PEFT's use of transformers
    pytest.mark.filterwarnings("ignore:.*did not match any targeted module"),
]
BOTH = ["experts.gate_up_proj", "experts.down_proj"]
NAMES = ["de", "__base__", "en", "de"]


@pytest.fixture(scope="module")
def lib() -> SimpleNamespace:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import peft
        import torch
        import transformers
    return SimpleNamespace(torch=torch, peft=peft, transformers=transformers)


SIZES: dict[str, Any] = {
    "vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "num_experts_per_tok": 2, "intermediate_size": 24,
}  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "Qwen3Moe": {"moe_intermediate_size": 8, "head_dim": 8, "num_experts": 4},
    "Mixtral": {"num_local_experts": 3},
    "GptOss": {"head_dim": 8, "num_local_experts": 3},  # parameters (E, h_in, h_out), biases
}


def model_of(lib: Any, kind: str, targets: list[str], **options: Any) -> Any:
    """Two adapters of different ranks, with B other than zero."""
    lib.torch.manual_seed(7)
    config = getattr(lib.transformers, f"{kind}Config")(**{**SIZES, **KINDS[kind]})
    model = getattr(lib.transformers, f"{kind}ForCausalLM")(config).eval()
    settings = {"target_modules": ["q_proj"], "target_parameters": targets} | options
    model = lib.peft.get_peft_model(model, lib.peft.LoraConfig(r=4, **settings), adapter_name="de")
    model.add_adapter("en", lib.peft.LoraConfig(r=2, lora_alpha=5, **settings))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            lib.torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def tokens(lib: Any) -> Any:
    return lib.torch.arange(len(NAMES) * 5).reshape(len(NAMES), 5) % 32


def one_at_a_time(lib: Any, model: Any, names: list[str]) -> Any:
    """Each sample's logits by PEFT with its adapter alone."""
    found, x = [], tokens(lib)
    with lib.torch.inference_mode():
        for i, name in enumerate(names):
            if name == "__base__":
                with model.disable_adapter():
                    found.append(model(x[i : i + 1]).logits)
            else:
                model.set_adapter(name)
                found.append(model(x[i : i + 1]).logits)
    return lib.torch.cat(found)


def mixed(lib: Any, model: Any, names: list[str]) -> Any:
    with lib.torch.inference_mode():
        return model(tokens(lib), adapter_names=names).logits


@pytest.mark.parametrize("targets", [BOTH, BOTH[:1], BOTH[1:]], ids=["both", "gate_up", "down"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_mixed_batch_is_one_adapter_at_a_time(lib: Any, kind: str, targets: list[str]) -> None:
    model = model_of(lib, kind, targets)
    expected = one_at_a_time(lib, model, NAMES)
    base = one_at_a_time(lib, model, ["__base__"] * 4)
    assert (expected - base).abs().amax(dim=(1, 2))[[0, 2, 3]].min() > 1e-2
    with pytest.raises(ValueError, match="mixed"):
        mixed(lib, model, NAMES)
    with accelerate(model) as taken:
        assert [name for name in taken.layers if name.endswith("experts")] == [
            f"model.layers.{i}.mlp.experts" for i in range(2)
        ]
        assert not taken.fallbacks
        # Float32 of models of this size: each of some hundred roundings is at most 6e-8 of it.
        assert (mixed(lib, model, NAMES) - expected).abs().max() < 2e-5 * expected.abs().max()
        lib.torch.testing.assert_close(one_at_a_time(lib, model, NAMES), expected, rtol=0, atol=0)
    with pytest.raises(ValueError, match="mixed"):
        mixed(lib, model, NAMES)


def test_weights_that_change_are_seen(lib: Any) -> None:
    model = model_of(lib, "Qwen3Moe", BOTH)
    with accelerate(model):
        before = mixed(lib, model, NAMES)
        with lib.torch.no_grad():
            for name, parameter in model.named_parameters():
                if "experts" in name and "lora_B.de" in name:
                    parameter.mul_(2)
        after = mixed(lib, model, NAMES)
        expected = one_at_a_time(lib, model, NAMES)
        assert (after - expected).abs().max() < 2e-5 * expected.abs().max()
        assert (after - before)[1:3].abs().max() == 0
        assert (after - before)[[0, 3]].abs().amax(dim=(1, 2)).min() > 1e-3


def test_an_adapter_that_comes_and_goes(lib: Any) -> None:
    model = model_of(lib, "Mixtral", BOTH)
    settings = {"target_modules": ["q_proj"], "target_parameters": BOTH}
    with accelerate(model):
        model.add_adapter("fr", lib.peft.LoraConfig(r=6, **settings))
        for name, parameter in model.named_parameters():
            if "lora_" in name and ".fr." in name:
                lib.torch.nn.init.normal_(parameter, std=0.3)
        names = ["fr", "de", "__base__", "en"]
        expected = one_at_a_time(lib, model, names)
        assert (mixed(lib, model, names) - expected).abs().max() < 2e-5 * expected.abs().max()
        model.delete_adapter("fr")
        names = ["en", "de", "__base__", "en"]
        expected = one_at_a_time(lib, model, names)
        assert (mixed(lib, model, names) - expected).abs().max() < 2e-5 * expected.abs().max()


def test_bfloat16_rounds_as_peft_does_and_no_more(lib: Any) -> None:
    model = model_of(lib, "Qwen3Moe", BOTH).to(lib.torch.bfloat16)
    expected = one_at_a_time(lib, model, NAMES).float()
    wide = one_at_a_time(lib, model.float(), NAMES)
    model.to(lib.torch.bfloat16)
    with accelerate(model):
        ours = mixed(lib, model, NAMES).float()
    theirs = (expected - wide).abs().max()
    assert (ours - wide).abs().max() < 2 * theirs


def test_with_gradients_it_is_left_to_peft(lib: Any) -> None:
    model = model_of(lib, "Qwen3Moe", BOTH)
    with accelerate(model), lib.torch.enable_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ValueError, match="mixed"):
            model(tokens(lib), adapter_names=NAMES)


def test_generated_tokens_are_those_of_one_adapter_at_a_time(lib: Any) -> None:
    model = model_of(lib, "Qwen3Moe", BOTH)
    options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    x = tokens(lib)
    alone = []
    for i, name in enumerate(NAMES):
        if name == "__base__":
            with model.disable_adapter():
                alone.append(model.generate(x[i : i + 1], **options))
        else:
            model.set_adapter(name)
            alone.append(model.generate(x[i : i + 1], **options))
    with accelerate(model):
        assert model.generate(x, adapter_names=NAMES, **options).equal(lib.torch.cat(alone))
