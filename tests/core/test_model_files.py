"""A model's layers by its files: headers, or config.json where there are none."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from sgmv.errors import SgmvError
from sgmv.model_files import model_files
from tests.help.peft_files import needs_torch

pytestmark = [
    pytest.mark.once,
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # transformers' own
]
LLAMA: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 112,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "vocab_size": 32,
}
Q_PROJ = "model.layers.1.self_attn.q_proj"


def write(to: Path, config: object = None, **weights: tuple[int, ...]) -> str:
    if config is not None:
        (to / "config.json").write_text(json.dumps(config))
    if weights:
        tensors = {f"{name}.weight": np.zeros(shape) for name, shape in weights.items()}
        save_file(tensors, to / "model.safetensors")
    return str(to)


@pytest.mark.parametrize(
    ("module", "widths", "is_transposed", "problem"),
    [
        (Q_PROJ, (48, 48), False, ""),
        ("model.layers.0.self_attn.k_proj", (48, 24), False, ""),
        ("model.layers.0.mlp.down_proj", (112, 48), False, ""),
        ("model.embed_tokens", (32, 48), True, ""),
        ("lm_head", (48, 32), False, ""),
        ("lm_head", (48, 33), False, "(33, 48), and the model's has (32, 48)"),
        ("model.layers.2.mlp.up_proj", (48, 112), False, "the model has no"),
        ("model.layers.0.mlp.up_prj", (48, 112), False, "did you mean 'up_proj'"),
    ],
)
@pytest.mark.parametrize("nested", [False, True])
def test_a_config_alone_tells_widths_and_depth(
    nested: bool,
    module: str,
    widths: tuple[int, int],
    is_transposed: bool,
    problem: str,
    tmp_path: Path,
) -> None:
    model = model_files(write(tmp_path, {"text_config": LLAMA} if nested else LLAMA))
    found = model.problem(module, *widths, is_transposed)
    assert (problem in found) if problem else not found


def test_names_with_and_without_a_part_in_front(tmp_path: Path) -> None:
    """GPT-2's files are of its inner model."""
    model = model_files(write(tmp_path, **{"h.0.attn.c_attn": (24, 72), "wte": (32, 24)}))
    assert model.problem("transformer.h.0.attn.c_attn", 24, 72, True) == ""
    assert "shape (72, 24)" in model.problem("transformer.h.0.attn.c_attn", 24, 72, False)
    whole = model_files(write(tmp_path, **{"transformer.h.0.attn.c_attn": (24, 72)}))
    assert whole.problem("h.0.attn.c_attn", 24, 72, True) == ""


def test_quantised_weights_have_names_alone(tmp_path: Path) -> None:
    save_file({"up.weight": np.zeros((9, 1), np.uint8)}, tmp_path / "a.safetensors")
    save_file({"down.qweight": np.zeros((9, 3), np.int32)}, tmp_path / "b.safetensors")
    model = model_files(str(tmp_path))
    assert model.problem("up", 5, 7, False) == model.problem("down", 5, 7, False) == ""
    assert model.problem("gate", 5, 7, False)


@pytest.mark.parametrize(
    ("config", "part"),
    [
        (None, "none in"),
        ({"hidden_size": 8}, "config.json of a Llama-like model"),
        ([1], "an object in config.json"),
    ],
)
def test_directories_that_are_no_models(config: object, part: str, tmp_path: Path) -> None:
    with pytest.raises(SgmvError, match=r"^against: ") as caught:
        model_files(write(tmp_path, config))
    assert part in str(caught.value)


def test_damaged_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"version https://git-lfs")
    with pytest.raises(SgmvError, match=r"model\.safetensors"):
        model_files(str(tmp_path))
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(SgmvError, match=r"config\.json"):
        model_files(str(tmp_path))


@needs_torch
@pytest.mark.parametrize("tied", [False, True])
def test_a_real_models_files_and_config_agree(tied: bool, tmp_path: Path) -> None:
    """All of its linear layers, by both ways, in shards."""
    pytest.importorskip("transformers")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import torch
        import transformers
    config = transformers.LlamaConfig(**LLAMA, tie_word_embeddings=tied)
    model = transformers.LlamaForCausalLM(config)
    model.save_pretrained(tmp_path / "model", max_shard_size="40KB")
    (tmp_path / "config").mkdir()
    config.save_pretrained(tmp_path / "config")
    for kind in ("model", "config"):
        found = model_files(str(tmp_path / kind))
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.Linear):
                widths = module.in_features, module.out_features
                assert found.problem(name, *widths, False) == ""
                assert found.problem(name, widths[0] + 1, widths[1], False)
            elif isinstance(module, torch.nn.Embedding):
                assert found.problem(name, 32, 48, True) == ""
