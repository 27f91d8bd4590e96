"""Names of tensors and of layers: whose they are, and those that nothing has."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

import sgmv
from sgmv.adapter import Adapter, load_peft
from sgmv.errors import PeftError
from tests.help.peft_files import (
    FIXTURES,
    Q_PROJ,
    V_PROJ,
    Array,
    copy_of,
    halves,
    named,
    refusal,
    write_adapter,
)

pytestmark = pytest.mark.once


# Of each adapter saved from a wrapped model, one tensor's name
WRAPPED = {
    directory: name.replace("*", "model.layers.0")
    for directory, name in {
        "plain": "base_model.model.*.self_attn.q_proj.lora_A.weight",
        "bare": "*.self_attn.q_proj.lora_A.default.weight",
        "state-dict": "base_model.model.*.self_attn.q_proj.lora_A.default.weight",
        "data-parallel": "module.base_model.model.*.self_attn.q_proj.lora_A.default.weight",
        "compiled": "_orig_mod.base_model.model.*.self_attn.q_proj.lora_A.default.weight",
        "compiled-base": "base_model.model._orig_mod.*.self_attn.q_proj.lora_A.weight",
        "compiled-layers": "base_model.model.*._orig_mod.self_attn.q_proj.lora_A.weight",
        "checkpointed": "base_model.model.*._checkpoint_wrapped_module.self_attn.q_proj"
        ".lora_A.default.weight",
        "peft-in-peft": "base_model.model.base_model.model.*.self_attn.q_proj.lora_A.weight",
    }.items()
}


@pytest.mark.parametrize("directory", sorted(WRAPPED))
def test_names_of_wrapped_models_are_the_models(directory: str) -> None:
    """As torch and PEFT write them: PEFT's own save of the same adapter stands beside."""
    root = FIXTURES / "wrapped"
    assert WRAPPED[directory] in load_file(root / directory / "adapter_model.safetensors")
    plain, found = load_peft(root / "plain"), load_peft(root / directory)
    assert found.keys() == plain.keys()
    for module, adapter in found.items():
        assert adapter.scaling == plain[module].scaling
        np.testing.assert_array_equal(adapter.A, plain[module].A)
        np.testing.assert_array_equal(adapter.B, plain[module].B)
        assert Adapter.from_peft(root / directory, module).scaling == adapter.scaling


def test_every_wrapped_fixture_is_tested() -> None:
    assert {path.name for path in (FIXTURES / "wrapped").iterdir()} == WRAPPED.keys()


def test_tensors_under_unknown_names(tmp_path: Path) -> None:
    for name in ("up.lora_?.bits", "base_model.model.lora_?.weight", "lora_?.weight", "x.?"):
        refusal(named(tmp_path, name), "base_model.model.<module>.lora_A/B", name.replace("?", "A"))


@pytest.mark.parametrize(
    "name",
    [
        "up.lora_?.weight",
        "base_model.model.up.lora_?.default.weight",
        "module.base_model.model.up.lora_?.weight",
        "_orig_mod.module.base_model.model.module._orig_mod.up.lora_?.weight",
        "_fsdp_wrapped_module.base_model.model._fsdp_wrapped_module.up.lora_?.x.weight",
        "base_model.model._checkpoint_wrapped_module.up._fsdp_wrapped_module.lora_?.weight",
        "base_model.model.up.lora_?.default._orig_mod.weight",
        "base_model.model.base_model.model.up.lora_?.weight",
    ],
)
def test_what_wrappers_add_is_taken_away(name: str, tmp_path: Path) -> None:
    assert list(load_peft(named(tmp_path, name))) == ["up"]


def test_a_models_own_names_stay(tmp_path: Path) -> None:
    names = ["module", "x.module.y", "model", "x.base_model.model.y", "my_orig_mod.x"]
    directory = named(tmp_path, *(f"base_model.model.{name}.lora_?.weight" for name in names))
    assert sorted(load_peft(directory)) == sorted(names)


def test_two_tensors_of_one_layer(tmp_path: Path) -> None:
    names = ["base_model.model.up.lora_?.weight", "base_model.model._orig_mod.up.lora_?.weight"]
    refusal(named(tmp_path, *names), "one lora_A of up", *(n.replace("?", "A") for n in names))


@pytest.mark.parametrize("module", ["up", "down"])
def test_tensors_of_several_adapters(module: str, tmp_path: Path) -> None:
    names = ["up.lora_?.default.weight", f"{module}.lora_?.fr.weight"]
    refusal(named(tmp_path, *names), "one adapter's", "'lora_A.default', 'lora_A.fr'", "selected")


@pytest.mark.parametrize("half", ["A", "B"])
def test_a_missing_half(half: str, tmp_path: Path) -> None:
    tensors = halves(Q_PROJ, np.ones((2, 3), np.float32), np.ones((5, 2), np.float32))
    left = {name: tensor for name, tensor in tensors.items() if f"lora_{half}" in name}
    refusal(write_adapter(tmp_path, left), f"lora_{half} alone", Q_PROJ)


def test_no_adapted_layer(tmp_path: Path) -> None:
    refusal(write_adapter(tmp_path, {}), "LoRA tensors, got none", "target_modules")


# The same, when the config does not admit it: the tensors tell
@pytest.mark.parametrize(
    ("directory", "options", "part"),
    [
        ("../dora/llama-f32", {"use_dora": False}, "DoRA's magnitudes"),
        ("lora-bias", {"lora_bias": False}, "a bias"),
        ("bias-all", {"bias": "none"}, "a bias"),
        ("../forms/norm", {"modules_to_save": None}, "a weight of the base model"),
        ("trainable-tokens", {"trainable_token_indices": None}, "trainable_tokens_delta"),
        ("ia3", {"peft_type": "LORA"}, "ia3_l"),
        ("adalora", {"peft_type": "LORA", "r": 3}, "not plain LoRA"),
    ],
)
def test_foreign_tensors_are_refused_by_name(
    directory: str, options: dict[str, Any], part: str, tmp_path: Path
) -> None:
    keep = {"peft_type": "LORA", "r": 2, "lora_alpha": 4} | options
    source = json.loads((FIXTURES / "refused" / directory / "adapter_config.json").read_text())
    target = copy_of(f"refused/{directory}", tmp_path)
    plain = {key: source[key] for key in keep if key in source} | keep
    (target / "adapter_config.json").write_text(json.dumps(plain))
    refusal(target, "adapter_model.safetensors", part)


# What is refused: names that match nothing


@pytest.mark.parametrize(
    ("module", "near"),
    [
        ("model.layers.0.self_attn.q_porj", Q_PROJ),
        ("q_proj", Q_PROJ),
        ("self_attn.v_proj", V_PROJ),
        (f"base_model.model.{Q_PROJ}", Q_PROJ),
        ("model.layers.7.self_attn.q_proj", Q_PROJ),
    ],
)
def test_an_unknown_module_lists_near_names(module: str, near: str) -> None:
    directory = FIXTURES / "llama" / "attention-f32"
    with pytest.raises(PeftError) as caught:
        sgmv.Adapter.from_peft(directory, module)
    for part in ("module", str(directory), repr(module)):
        assert part in str(caught.value)
    assert repr(near) in str(caught.value).partition("did you mean ")[2]


def test_a_module_unlike_all_others_lists_what_there_is() -> None:
    with pytest.raises(PeftError, match=f"'lm_head'; there are .*{V_PROJ!r}"):
        Adapter.from_peft(FIXTURES / "llama" / "attention-f32", "lm_head")


def test_a_longer_name_finds_its_end(tmp_path: Path) -> None:
    directory = write_adapter(tmp_path, halves("up", np.ones((2, 3)), np.ones((5, 2))))
    with pytest.raises(PeftError, match=r"did you mean 'up'\?"):
        Adapter.from_peft(directory, "base_model.model.decoder.up")


def test_many_near_names_are_cut_short(tmp_path: Path) -> None:
    tensors: dict[str, Array] = {}
    for index in range(9):
        name = f"model.layers.{index}.self_attn.q_proj"
        tensors |= halves(name, np.ones((2, 3), np.float32), np.ones((5, 2), np.float32))
    with pytest.raises(PeftError, match=r"did you mean .* and 4 more\?"):
        Adapter.from_peft(write_adapter(tmp_path, tensors), "q_proj")


def test_a_module_that_is_no_string_is_refused() -> None:
    with pytest.raises(PeftError, match=r"module: expected a layer .* got 3;"):
        Adapter.from_peft(FIXTURES / "llama" / "attention-f32", 3)  # type: ignore[arg-type]
