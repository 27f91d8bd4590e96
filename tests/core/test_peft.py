"""Reading what PEFT wrote: what the files say, and what is refused (tests/fixtures/peft)."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import sgmv
from sgmv.adapter import Adapter, load_peft
from sgmv.errors import PeftError
from tests.help.peft_files import (
    DTYPES,
    FIXTURES,
    Q_PROJ,
    RECORD,
    V_PROJ,
    Array,
    copy_of,
    halves,
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


# What the files say, against what PEFT's own layers held


@pytest.mark.parametrize("directory", RECORD["adapters"])
def test_modules_ranks_scalings_and_types_are_pefts(directory: str) -> None:
    adapters = load_peft(FIXTURES / directory)
    expected = RECORD["adapters"][directory]
    assert adapters.keys() == expected.keys()
    dtype = DTYPES[directory.rpartition("-")[2]]
    for module, adapter in adapters.items():
        assert adapter.r == expected[module]["r"]
        assert adapter.scaling == expected[module]["scaling"]
        assert adapter.A.dtype == adapter.B.dtype == dtype


@pytest.mark.parametrize("directory", RECORD["adapters"])
def test_values_are_those_on_disk(directory: str) -> None:
    tensors = load_file(FIXTURES / directory / "adapter_model.safetensors")
    for module, adapter in load_peft(FIXTURES / directory).items():
        np.testing.assert_array_equal(
            adapter.A, tensors[f"base_model.model.{module}.lora_A.weight"]
        )
        np.testing.assert_array_equal(
            adapter.B, tensors[f"base_model.model.{module}.lora_B.weight"]
        )


@pytest.mark.parametrize("directory", RECORD["adapters"])
def test_one_module_is_read_like_all_of_them(directory: str) -> None:
    for module, adapter in load_peft(FIXTURES / directory).items():
        for single in (
            Adapter.from_peft(FIXTURES / directory, module),
            sgmv.Adapter.from_peft(FIXTURES / directory, module),
        ):
            np.testing.assert_array_equal(single.A, adapter.A)
            np.testing.assert_array_equal(single.B, adapter.B)
            assert single.scaling == adapter.scaling


@pytest.mark.parametrize(
    "case", RECORD["patterns"], ids=lambda case: f"{case['keys']}-{case['module']}"
)
def test_pattern_keys_match_as_in_peft(case: dict[str, Any], tmp_path: Path) -> None:
    weights = halves(case["module"], np.ones((2, 3), np.float32), np.ones((5, 2), np.float32))
    alphas = {key: 10 * (index + 1) for index, key in enumerate(case["keys"])}
    directory = write_adapter(tmp_path, weights, alpha_pattern=alphas, lora_alpha=4)
    adapter = Adapter.from_peft(directory, case["module"])
    assert adapter.scaling == alphas.get(case["decides"], 4) / 2


def test_float64_is_read(tmp_path: Path) -> None:
    directory = write_adapter(tmp_path, halves("up", np.ones((2, 3)), np.ones((5, 2))))
    assert Adapter.from_peft(directory, "up").dtype == np.float64


def test_neither_torch_nor_peft_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("torch", "peft", "transformers"):
        monkeypatch.setitem(sys.modules, package, None)
    assert load_peft(FIXTURES / "llama" / "patterns-bf16")


# What is refused: adapters that PEFT wrote


REFUSED_BY_PEFT = {
    "dora": ("use_dora", "DoRA"),
    "lora-bias": ("lora_bias", "bias to B"),
    "bias-all": ("bias='all'", "'none'"),
    "pissa": ("init_lora_weights", "'pissa'", "path_initial_model_for_weight_conversion"),
    "olora": ("init_lora_weights", "'olora'"),
    "modules-to-save": ("modules_to_save", '["norm"]'),
    "trainable-tokens": ("trainable_token_indices", "[1, 3]"),
    "layer-replication": ("layer_replication",),
    "alora": ("alora_invocation_tokens", "aLoRA"),
    "embedding": ("embed_tokens", "tensors", "an embedding's adapter"),
    "lm-head": ("'base_model.model.lm_head.base_layer.weight'", "save_embedding_layers=False"),
    "ia3": ("peft_type", "'LORA'", "'IA3'"),
    "adalora": ("peft_type", "'ADALORA'"),
    "loha": ("peft_type", "'LOHA'"),
    "convolution": ("linear layer", "(2, 2, 2, 2)", "(3, 2, 1, 1)"),
}


@pytest.mark.parametrize("directory", REFUSED_BY_PEFT)
def test_other_than_plain_lora_is_refused_by_name(directory: str) -> None:
    with pytest.raises(PeftError) as caught:
        load_peft(FIXTURES / "refused" / directory)
    for part in REFUSED_BY_PEFT[directory]:
        assert part in str(caught.value)


def test_what_the_remedy_for_lm_head_leaves_is_read(tmp_path: Path) -> None:
    """PEFT with save_embedding_layers=False writes the same file without the base weight."""
    target = copy_of("refused/lm-head", tmp_path)
    tensors = load_file(target / "adapter_model.safetensors")
    del tensors["base_model.model.lm_head.base_layer.weight"]
    save_file(tensors, target / "adapter_model.safetensors")
    assert list(load_peft(target)) == ["lm_head"]


def test_every_refused_fixture_is_tested() -> None:
    on_disk = {path.name for path in (FIXTURES / "refused").iterdir()}
    assert on_disk == REFUSED_BY_PEFT.keys()


# The same, when the config does not admit it: the tensors tell
@pytest.mark.parametrize(
    ("directory", "options", "part"),
    [
        ("dora", {"use_dora": False}, "DoRA's magnitudes"),
        ("lora-bias", {"lora_bias": False}, "a bias"),
        ("bias-all", {"bias": "none"}, "a bias"),
        ("modules-to-save", {"modules_to_save": None}, "a weight of the base model"),
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


@pytest.mark.parametrize(
    ("option", "value", "part"),
    [
        ("use_qalora", True, "QALoRA"),
        ("use_bdlora", {"nblocks": 2}, "block diagonal"),
        ("arrow_config", {"top_k": 2}, "Arrow"),
        ("kasa_config", {"beta": 1e-4}, "KaSA"),
        ("monteclora_config", {"num_samples": 4}, "MonteCLoRA"),
        ("target_parameters", ["experts.gate_up_proj"], "experts"),
        ("megatron_config", {"hidden_size": 64}, "shard"),
        ("init_lora_weights", "pissa_niter_16", "base weights"),
        ("init_lora_weights", "corda", "base weights"),
        ("init_lora_weights", "loftq", "base weights"),
        ("init_lora_weights", "lora_ga", "base weights"),
        ("init_lora_weights", "not yet invented", "base weights"),
        ("bias", "lora_only", "bias='lora_only'"),
        ("peft_type", "XLORA", "'XLORA'"),
        ("peft_type", None, "None"),
        ("use_tomorrows_lora", True, "use_tomorrows_lora=true"),
        ("r", 0, "positive integer"),
        ("r", "8", "positive integer"),
        ("r", True, "positive integer"),
        ("r", None, "positive integer"),
        ("lora_alpha", "16", "finite number"),
        ("lora_alpha", None, "finite number"),
        ("lora_alpha", float("nan"), "finite number"),
        ("lora_alpha", float("inf"), "finite number"),
        ("lora_alpha", 10**400, "finite number"),
        ("rank_pattern", ["q_proj"], "pattern: value"),
        ("rank_pattern", {"q_proj": -1}, "positive integer"),
        ("alpha_pattern", {"q_proj[": 4}, "regular expressions"),
        ("alpha_pattern", {"q_proj)": 4}, "regular expressions"),
        ("alpha_pattern", {"q_proj{99999999999}": 4}, "regular expressions"),
        ("alpha_pattern", {"q_proj": []}, "finite number"),
    ],
)
def test_options_are_refused_by_name(option: str, value: Any, part: str, tmp_path: Path) -> None:
    directory = copy_of("llama/attention-f32", tmp_path, **{option: value})
    refusal(directory, option, part, str(directory))


@pytest.mark.parametrize("init", [True, False, None, "gaussian", "eva", "Orthogonal", "mica"])
def test_harmless_initialisations_are_read(init: object, tmp_path: Path) -> None:
    assert load_peft(copy_of("llama/attention-f32", tmp_path, init_lora_weights=init))


@pytest.mark.parametrize("option", ["unknown_a", "unknown_b", "enable_lora"])
@pytest.mark.parametrize("value", [None, False, [], {}])
def test_unknown_options_that_are_off_are_read(option: str, value: object, tmp_path: Path) -> None:
    assert load_peft(copy_of("llama/attention-f32", tmp_path, **{option: value}))


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


# What is refused: directories and files that are not as PEFT wrote them


def test_a_missing_directory(tmp_path: Path) -> None:
    refusal(tmp_path / "nowhere", "directory", "nowhere", "no such directory", "save_pretrained")


def test_a_file_for_a_directory() -> None:
    path = FIXTURES / "llama" / "attention-f32" / "adapter_model.safetensors"
    refusal(path, "directory", "a file")


def test_no_path_at_all() -> None:
    with pytest.raises(PeftError, match="directory: expected a PEFT adapter directory, got int"):
        load_peft(3)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_missing_file(name: str, tmp_path: Path) -> None:
    directory = copy_of("llama/attention-f32", tmp_path)
    (directory / name).unlink()
    refusal(directory, "directory", name, str(directory), "save_pretrained")


def test_a_pickle_is_not_opened(tmp_path: Path) -> None:
    directory = copy_of("llama/attention-f32", tmp_path)
    (directory / "adapter_model.safetensors").rename(directory / "adapter_model.bin")
    refusal(directory, "adapter_model.bin", "pickle", "safe_serialization=True")


@pytest.mark.parametrize("text", [b"", b"{", b'{"r": 8', b"\xff\xfe{}", b"{'r': 8}"])
def test_a_damaged_config(text: bytes, tmp_path: Path) -> None:
    directory = copy_of("llama/attention-f32", tmp_path)
    (directory / "adapter_config.json").write_bytes(text)
    refusal(directory, "adapter_config.json", "JSON", "damaged")


def test_a_config_that_is_no_object(tmp_path: Path) -> None:
    directory = copy_of("llama/attention-f32", tmp_path)
    (directory / "adapter_config.json").write_text("[8, 16]")
    refusal(directory, "adapter_config.json", "JSON object", "list")


@pytest.mark.parametrize("kept", [0, 4, 100, 5000, -1])
def test_a_truncated_weights_file(kept: int, tmp_path: Path) -> None:
    directory = copy_of("llama/attention-f32", tmp_path)
    path = directory / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    refusal(directory, "adapter_model.safetensors", "damaged")


def test_a_weights_file_of_something_else(tmp_path: Path) -> None:
    directory = copy_of("llama/attention-f32", tmp_path)
    (directory / "adapter_model.safetensors").write_bytes(b"\xff" * 400)
    refusal(directory, "adapter_model.safetensors", "damaged")


def named(to: Path, *names: str, **options: Any) -> Path:
    """An adapter of these tensors' names; "?" is A in one and B in another tensor."""
    A, B = np.ones((2, 3), np.float32), np.ones((5, 2), np.float32)
    halves = {"A": A, "B": B}
    tensors = {name.replace("?", half): halves[half] for name in names for half in halves}
    write_adapter(to, {}, **options)
    save_file(tensors, to / "adapter_model.safetensors")
    return to


def test_tensors_under_unknown_names(tmp_path: Path) -> None:
    for name in ("up.lora_?.bits", "base_model.model.lora_?.weight", "lora_?.weight", "x.?"):
        refusal(named(tmp_path, name), "base_model.model.<module>.lora_A/B", name.replace("?", "A"))


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


def test_a_pattern_that_tells_wrapped_names_apart(tmp_path: Path) -> None:
    name = f"base_model.model._orig_mod.{Q_PROJ}.lora_?.weight"
    named(tmp_path, name, alpha_pattern={f"^{Q_PROJ}": 4}, lora_alpha=8)
    refusal(tmp_path, "alpha_pattern", f"{Q_PROJ!r} and '_orig_mod.{Q_PROJ}'", "4 and 8")
    named(tmp_path, name, alpha_pattern={"q_proj": 4}, lora_alpha=8)
    assert load_peft(tmp_path)[Q_PROJ].scaling == 2


@pytest.mark.parametrize("half", ["A", "B"])
def test_a_missing_half(half: str, tmp_path: Path) -> None:
    tensors = halves(Q_PROJ, np.ones((2, 3), np.float32), np.ones((5, 2), np.float32))
    left = {name: tensor for name, tensor in tensors.items() if f"lora_{half}" in name}
    refusal(write_adapter(tmp_path, left), f"lora_{half} alone", Q_PROJ)


def test_no_adapted_layer(tmp_path: Path) -> None:
    refusal(write_adapter(tmp_path, {}), "LoRA tensors, got none", "target_modules")


@pytest.mark.parametrize(
    ("A", "B", "parts"),
    [
        (np.ones((4, 3)), np.ones((5, 4)), ("A (2, h_in)", "lora_A (4, 3)", "config")),
        (np.ones((2, 3)), np.ones((5, 4)), ("B (h_out, 2)", "lora_B (5, 4)")),
        (np.ones((4, 3)), np.ones((5, 2)), ("A (2, h_in)", "lora_A (4, 3)")),
        (np.ones((2, 3, 1)), np.ones((5, 2)), ("linear layer", "(2, 3, 1)")),
        (np.ones((2, 3, 1, 1)), np.ones((5, 2, 1, 1)), ("a convolution's or an expert stack's",)),
        # ZeRO-3 leaves nothing of a tensor, FSDP a rank's flat part of it.
        (np.ones(0), np.ones(0), ("linear layer", "lora_A (0,)", "ZeRO-3", "stage3_gather_16bit")),
        (np.ones((2, 0)), np.ones((5, 2)), ("lora_A (2, 0)", "ZeRO-3")),
        (np.ones((2, 3)), np.ones((0, 2)), ("lora_B (0, 2)", "ZeRO-3")),
        (np.ones(2), np.ones((5, 2)), ("linear layer", "(2,)", "FSDP", "full state dict")),
        (np.ones((2, 3), np.int8), np.ones((5, 2), np.int8), ("F32, F16, BF16, F64", "I8")),
        (np.ones((2, 3), np.float16), np.ones((5, 2), np.float32), ("lora_A F16", "lora_B F32")),
    ],
)
def test_shapes_and_types_that_disagree(
    A: Array, B: Array, parts: tuple[str, ...], tmp_path: Path
) -> None:
    refusal(write_adapter(tmp_path, halves(Q_PROJ, A, B)), Q_PROJ, str(tmp_path), *parts)


def test_a_rank_pattern_that_the_tensors_deny(tmp_path: Path) -> None:
    directory = copy_of("llama/patterns-bf16", tmp_path, rank_pattern={})
    refusal(directory, Q_PROJ, "A (16, h_in)", "lora_A (3, 48)", "lora_B (48, 3)")


def test_a_missing_package_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    refusal(FIXTURES / "llama" / "patterns-bf16", "ml_dtypes", "pip install ml_dtypes")


@pytest.mark.parametrize("package", ["ml_dtypes", "safetensors"])
def test_float32_needs_no_package(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    assert load_peft(FIXTURES / "llama" / "attention-f32")
