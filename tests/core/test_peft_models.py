"""An adapter's layers found among a model's: names, renamed ones, near ones, widths."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest

from sgmv.adapter import Adapter, load_peft
from sgmv.errors import DtypeError, PeftError
from tests.help.peft_files import FIXTURES, form, halves, named, needs_torch, write_adapter

pytestmark = [
    pytest.mark.once,
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # PEFT's use of transformers
]
LLAMA = FIXTURES / "llama" / "attention-f32"
NAMES = [f"model.layers.{i}.self_attn.{end}_proj" for i in range(2) for end in "qkvo"]


def test_names_that_the_model_has(tmp_path: Path) -> None:
    alone = load_peft(LLAMA)
    assert load_peft(LLAMA, NAMES).keys() == alone.keys()
    assert load_peft(LLAMA, model=dict.fromkeys(NAMES)).keys() == alone.keys()
    widths = {name: (one.h_in, one.h_out) for name, one in alone.items()}
    assert load_peft(LLAMA, widths).keys() == alone.keys()


def test_a_name_that_the_model_lacks_is_refused_with_near_names() -> None:
    names = [name.replace("self_attn", "attention") for name in NAMES]
    with pytest.raises(PeftError) as caught:
        load_peft(LLAMA, names)
    for part in ("model: ", str(LLAMA), "none called", "did you mean"):
        assert part in str(caught.value)
    assert "'model.layers.0.attention.q_proj'" in str(caught.value).partition("did you mean")[2]


def test_what_an_adapter_replaces_is_a_part_of_the_model(tmp_path: Path) -> None:
    q_proj = "model.layers.0.self_attn.q_proj"
    assert list(load_peft(form("head"), [q_proj, "score"]).saved) == ["score.weight"]
    with pytest.raises(PeftError, match="none called 'score'; there are"):
        load_peft(form("head"), [q_proj])


def test_other_widths_are_refused() -> None:
    widths = {name: (48, 24) for name in NAMES}
    expected = r"model: expected 'model.layers.0.self_attn.q_proj' of widths \(48, 48\).*\(48, 24\)"
    with pytest.raises(PeftError, match=expected):
        load_peft(LLAMA, widths)


def test_two_layers_of_an_adapter_are_not_one_of_the_model(tmp_path: Path) -> None:
    class Model:
        """As transformers 4 has the rules of a model whose modules have moved."""

        _checkpoint_conversion_mapping: ClassVar = {"^language_model": "model"}

        def named_modules(self) -> list[tuple[str, None]]:
            return [("model.up", None)]

    directory = named(tmp_path, "language_model.up.lora_?.weight")
    assert list(load_peft(directory, Model())) == ["model.up"]
    named(tmp_path, "language_model.up.lora_?.weight", "model.up.lora_?.weight")
    with pytest.raises(PeftError, match="one name for each layer"):
        load_peft(directory, Model())


@pytest.mark.parametrize("model", [3, "model", [3], {3: (1, 2)}, {"up": (1,)}, {"up": (1, "2")}])
def test_what_is_no_model_is_refused(model: Any) -> None:
    with pytest.raises(DtypeError, match="model: expected a torch module, a mapping"):
        load_peft(LLAMA, model)


# real models


@pytest.fixture(scope="module")
def lib() -> SimpleNamespace:
    pytest.importorskip("peft")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import peft
        import torch
        import transformers
    return SimpleNamespace(torch=torch, peft=peft, transformers=transformers)


def tiny_llama(lib: SimpleNamespace) -> Any:
    config = lib.transformers.LlamaConfig(
        vocab_size=32, hidden_size=48, intermediate_size=112, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    return lib.transformers.LlamaForCausalLM(config)


def tiny_llava(lib: SimpleNamespace) -> Any:
    text = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "vocab_size": 32}
    text |= {"num_attention_heads": 2, "num_key_value_heads": 2, "model_type": "llama"}
    vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "image_size": 8}
    vision |= {"num_attention_heads": 2, "patch_size": 4, "model_type": "clip_vision_model"}
    config = lib.transformers.LlavaConfig(text_config=text, vision_config=vision)
    return lib.transformers.LlavaForConditionalGeneration(config)


def tiny_qwen2_vl(lib: SimpleNamespace) -> Any:
    text = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "vocab_size": 32}
    text |= {"num_attention_heads": 2, "num_key_value_heads": 2}
    text |= {"rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}}
    vision = {"depth": 1, "embed_dim": 16, "hidden_size": 16, "num_heads": 2, "mlp_ratio": 2}
    config = lib.transformers.Qwen2VLConfig(text_config=text, vision_config=vision)
    return lib.transformers.Qwen2VLForConditionalGeneration(config)


@needs_torch
def test_a_models_own_names_and_widths(lib: SimpleNamespace) -> None:
    model = tiny_llama(lib)
    alone = load_peft(LLAMA)
    assert load_peft(LLAMA, model).keys() == alone.keys()
    wrapped = lib.peft.get_peft_model(
        model, lib.peft.LoraConfig(target_modules=["q_proj", "o_proj"])
    )
    assert load_peft(LLAMA, wrapped).keys() == alone.keys()
    assert load_peft(form("embedding-alone"), model)["model.embed_tokens"].h_in == 32
    model.lm_head = lib.torch.nn.Linear(48, 33)
    with pytest.raises(PeftError, match="'lm_head' of widths"):
        load_peft(form("embedding-alone"), model)


# The rules of transformers 4.52, by which PEFT went there: in transformers 5, where a rule begins
# with "^", PEFT 0.21 passes over it, and warns of missing keys.
RULES = {
    "tiny_llava": {
        "^language_model.model": "model.language_model",
        "^vision_tower": "model.vision_tower",
        "^multi_modal_projector": "model.multi_modal_projector",
        "^language_model.lm_head": "lm_head",
    },
    "tiny_qwen2_vl": {
        "^visual": "model.visual",
        r"^model(?!\.(language_model|visual))": "model.language_model",
    },
}


@needs_torch
@pytest.mark.parametrize(
    ("make", "old", "new"),
    [
        (tiny_llava, "language_model.model.layers.0.", "model.language_model.layers.0."),
        (tiny_llava, "language_model.lm_head", "lm_head"),
        (tiny_llava, "multi_modal_projector.linear_1", "model.multi_modal_projector.linear_1"),
        (tiny_qwen2_vl, "model.layers.0.", "model.language_model.layers.0."),
        (tiny_qwen2_vl, "visual.blocks.0.attn.qkv", "model.visual.blocks.0.attn.qkv"),
    ],
)
def test_names_of_older_releases_are_pefts(
    make: Any, old: str, new: str, lib: SimpleNamespace, tmp_path: Path
) -> None:
    """The layer that PEFT's own load puts the weights into."""
    model = make(lib)
    if old.endswith("."):
        old, new = old + "self_attn.q_proj", new + "self_attn.q_proj"
    layer = model.get_submodule(new)
    rng = np.random.default_rng(3)
    A, B = rng.standard_normal((2, layer.in_features)), rng.standard_normal((layer.out_features, 2))
    A, B = A.astype(np.float32), B.astype(np.float32)
    write_adapter(tmp_path, halves(old, A, B), target_modules=rf"(.*\.)?{re.escape(new)}")
    found = load_peft(tmp_path, model)
    assert list(found) == [new]
    rules = RULES[make.__name__]
    peft_model = lib.peft.PeftModel.from_pretrained(model, tmp_path, key_mapping=rules)
    theirs = peft_model.base_model.model.get_submodule(new)
    np.testing.assert_array_equal(theirs.lora_A["default"].weight.detach().numpy(), A)
    np.testing.assert_array_equal(theirs.lora_B["default"].weight.detach().numpy(), B)
    assert isinstance(found[new], Adapter)


@needs_torch
def test_an_adapter_of_the_vision_part_is_not_the_texts(
    lib: SimpleNamespace, tmp_path: Path
) -> None:
    """The ends of the names are the same, and so may be the widths."""
    directory = named(tmp_path, "model.vision_tower.layers.0.self_attn.q_proj.lora_?.weight")
    with pytest.raises(PeftError, match=r"none called 'model\.vision_tower"):
        load_peft(directory, tiny_llama(lib))


@needs_torch
@pytest.mark.filterwarnings("ignore:.*did not match any targeted module")  # which they did
@pytest.mark.parametrize("form", ["mixtral", "mixtral-4", "gpt-oss"])
def test_experts_of_a_real_model(lib: SimpleNamespace, form: str) -> None:
    """Names of an older release, too; and inside of PEFT's own wrappers."""
    sizes = {
        "vocab_size": 16, "hidden_size": 12, "intermediate_size": 20, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 3,
    }  # fmt: skip
    of = {"gpt-oss": ("GptOssConfig", "GptOssForCausalLM")}
    config, causal = of.get(form, ("MixtralConfig", "MixtralForCausalLM"))
    model = getattr(lib.transformers, causal)(getattr(lib.transformers, config)(**sizes))
    names = {f"model.layers.0.mlp.experts.{end}_proj" for end in ("gate_up", "down")}
    directory = FIXTURES / "experts" / form
    assert load_peft(directory, model).experts.keys() == names
    wrapped = lib.peft.PeftModel.from_pretrained(model, directory)
    assert load_peft(directory, wrapped).experts.keys() == names
    sizes["num_local_experts"] = 4
    other = getattr(lib.transformers, causal)(getattr(lib.transformers, config)(**sizes))
    with pytest.raises(PeftError, match=r"\(experts, h_in, h_out\) = \(3, "):
        load_peft(directory, other)
