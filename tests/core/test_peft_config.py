"""What a config says of ranks and scalings, and the options that are refused by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sgmv.adapter import Adapter, load_peft
from sgmv.errors import PeftError
from tests.help.peft_files import (
    FIXTURES,
    Q_PROJ,
    RECORD,
    copy_of,
    halves,
    named,
    refusal,
    write_adapter,
)

pytestmark = pytest.mark.once


@pytest.mark.parametrize(
    "case", RECORD["patterns"], ids=lambda case: f"{case['keys']}-{case['module']}"
)
def test_pattern_keys_match_as_in_peft(case: dict[str, Any], tmp_path: Path) -> None:
    weights = halves(case["module"], np.ones((2, 3), np.float32), np.ones((5, 2), np.float32))
    alphas = {key: 10 * (index + 1) for index, key in enumerate(case["keys"])}
    directory = write_adapter(tmp_path, weights, alpha_pattern=alphas, lora_alpha=4)
    adapter = Adapter.from_peft(directory, case["module"])
    assert adapter.scaling == alphas.get(case["decides"], 4) / 2


# What is refused: adapters that PEFT wrote


REFUSED_BY_PEFT = {
    "lora-bias": ("lora_bias", "bias to B"),
    "bias-all": ("bias='all'", "'none'"),
    "pissa": ("init_lora_weights", "'pissa'", "path_initial_model_for_weight_conversion"),
    "olora": ("init_lora_weights", "'olora'"),
    "trainable-tokens": ("trainable_token_indices", "[1, 3]"),
    "layer-replication": ("layer_replication",),
    "alora": ("alora_invocation_tokens", "aLoRA"),
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


def test_every_refused_fixture_is_tested() -> None:
    on_disk = {path.name for path in (FIXTURES / "refused").iterdir()}
    assert on_disk == REFUSED_BY_PEFT.keys()


@pytest.mark.parametrize(
    ("option", "value", "part"),
    [
        ("use_qalora", True, "QALoRA"),
        ("use_bdlora", {"nblocks": 2}, "block diagonal"),
        ("arrow_config", {"top_k": 2}, "Arrow"),
        ("kasa_config", {"beta": 1e-4}, "KaSA"),
        ("monteclora_config", {"num_samples": 4}, "MonteCLoRA"),
        ("target_parameters", "experts.gate_up_proj", "a list of names"),
        ("megatron_config", {"hidden_size": 64}, "shard"),
        ("init_lora_weights", "pissa_niter_16", "base weights"),
        ("init_lora_weights", "corda", "base weights"),
        ("init_lora_weights", "loftq", "base weights"),
        ("init_lora_weights", "lora_ga", "base weights"),
        ("init_lora_weights", "not yet invented", "base weights"),
        ("bias", "lora_only", "bias='lora_only'"),
        ("peft_type", "XLORA", "'XLORA'"),
        ("peft_type", None, "None"),
        ("modules_to_save", "score", "a list of names"),
        ("modules_to_save", [1], "a list of names"),
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


@pytest.mark.parametrize("read", [load_peft, lambda path: Adapter.from_peft(path, Q_PROJ)])
def test_options_that_peft_does_not_have_are_passed_over_with_a_warning(
    read: Callable[[Path], Any], tmp_path: Path
) -> None:
    """As PEFT passes over them; ms-swift writes the first two."""
    options = {"lorap_lr_ratio": 16, "lora_dtype": "float32", "enable_lora": [True, False]}
    directory = copy_of("llama/attention-f32", tmp_path, **options)
    with pytest.warns(UserWarning, match="options that PEFT does not have") as caught:
        assert read(directory)
    assert len(caught) == 1
    text = str(caught[0].message)
    assert str(directory) in text
    for part in ("lorap_lr_ratio=16", 'lora_dtype="float32"', "enable_lora=[true, false]"):
        assert part in text
    assert caught[0].filename == __file__


def test_a_pattern_that_tells_wrapped_names_apart(tmp_path: Path) -> None:
    name = f"base_model.model._orig_mod.{Q_PROJ}.lora_?.weight"
    named(tmp_path, name, alpha_pattern={f"^{Q_PROJ}": 4}, lora_alpha=8)
    refusal(tmp_path, "alpha_pattern", f"{Q_PROJ!r} and '_orig_mod.{Q_PROJ}'", "4 and 8")
    named(tmp_path, name, alpha_pattern={"q_proj": 4}, lora_alpha=8)
    assert load_peft(tmp_path)[Q_PROJ].scaling == 2


def test_a_rank_pattern_that_the_tensors_deny(tmp_path: Path) -> None:
    directory = copy_of("llama/patterns-bf16", tmp_path, rank_pattern={})
    refusal(directory, Q_PROJ, "A (16, h_in)", "lora_A (3, 48)", "lora_B (48, 3)")
