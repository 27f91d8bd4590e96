"""MLX's and diffusers' adapters: what is refused; what is read is held in test_peft_outputs.py."""

from __future__ import annotations

import json
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from sgmv.adapter import Adapter, load_peft
from sgmv.errors import PeftError
from sgmv.foreign import _peft_name
from tests.help.peft_files import Array, form

pytestmark = pytest.mark.once
A, B = np.ones((2, 3), np.float32), np.ones((5, 2), np.float32)
DIFFUSERS = "pytorch_lora_weights.safetensors"


def refused(directory: Path, *parts: str) -> None:
    with pytest.raises(PeftError) as caught:
        load_peft(directory)
    for part in ("expected", "got", ";", str(directory), *parts):
        assert part in str(caught.value)


def mlx(to: Path, tensors: dict[str, Array] | None = None, **options: Any) -> Path:
    """A copy of mlx_lm's adapter in which some options, or its tensors, are others."""
    shutil.copytree(form("mlx"), to, dirs_exist_ok=True)
    config = to / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | options))
    if tensors is not None:
        save_file(tensors, to / "adapters.safetensors")
    return to


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"fine_tune_type": "dora"}, ("fine_tune_type", "'dora'", "mlx_lm.fuse")),
        ({"fine_tune_type": "full"}, ("fine_tune_type", "'full'")),
        ({"use_dora": True}, ("fine_tune_type", "DoRA")),
        ({"lora_parameters": None}, ("lora_parameters", "an object", "null")),
        ({"lora_parameters": {"rank": 3}}, ("lora_parameters.scale", "a finite number", "null")),
        ({"lora_parameters": {"rank": 0, "scale": 1.0}}, ("lora_parameters.rank", "positive")),
        ({"lora_parameters": {"rank": True, "scale": 1.0}}, ("lora_parameters.rank", "positive")),
        ({"lora_parameters": {"rank": 2, "scale": 1.0}}, ("A (2, h_in)", "lora_A (3, ")),
        (
            {"lora_parameters": {"rank": 3, "scale": 10.0, "alpha": 16}},
            ("lora_parameters", "scale without alpha", "scale * alpha / rank"),
        ),
    ],
)
def test_options_of_mlx_that_are_refused(
    options: dict[str, Any], parts: tuple[str, ...], tmp_path: Path
) -> None:
    refused(mlx(tmp_path, **options), *parts)


@pytest.mark.parametrize(
    ("tensors", "parts"),
    [
        ({}, ("lora_a and <module>.lora_b", "got none")),
        ({"up.lora_a": A.T.copy()}, ("'up.lora_a'",)),
        ({"up.weight": A}, ("'up.weight'",)),
        (
            {"up.lora_a": A.T.copy(), "up.lora_b": B.T.copy(), "up.m": A[0].copy()},
            ("'up.m'", "DoRA"),
        ),
        (
            {"experts.lora_a": np.ones((4, 2, 3)), "experts.lora_b": np.ones((4, 5, 2))},
            ("a convolution's or an expert stack's",),
        ),
    ],
)
def test_tensors_of_mlx_that_are_refused(
    tensors: dict[str, Array], parts: tuple[str, ...], tmp_path: Path
) -> None:
    refused(mlx(tmp_path, tensors, lora_parameters={"rank": 2, "scale": 1.0}), *parts)


def test_mlx_without_weights(tmp_path: Path) -> None:
    (mlx(tmp_path) / "adapters.safetensors").unlink()
    refused(tmp_path, "adapters.safetensors", "no such file")


def test_one_module_of_another_librarys_adapter() -> None:
    for name in ("mlx", "diffusers"):
        for module, adapter in load_peft(form(name)).items():
            single = Adapter.from_peft(form(name), module)
            np.testing.assert_array_equal(single.A, adapter.A)
            assert single.scaling == adapter.scaling


def write_diffusers(
    to: Path, metadata: object = None, name: str = DIFFUSERS, **also: Array
) -> Path:
    """A file of diffusers' with one layer, what else it is given, and this metadata."""
    tensors = {"unet.up.lora_A.weight": A, "unet.up.lora_B.weight": B, **also}
    text = metadata if isinstance(metadata, str) else json.dumps(metadata)
    given = None if metadata is None else {"lora_adapter_metadata": text}
    to.mkdir(exist_ok=True)
    save_file(tensors, to / DIFFUSERS, metadata=given)
    return to


def test_a_file_of_diffusers_by_its_own_path(tmp_path: Path) -> None:
    by_directory = load_peft(form("diffusers"))
    shutil.copy(form("diffusers") / DIFFUSERS, tmp_path / "style.safetensors")
    by_path = load_peft(tmp_path / "style.safetensors")
    assert by_path.keys() == by_directory.keys()
    refused(tmp_path, "style.safetensors", "a file of diffusers", "the file itself")


def test_without_metadata_the_scaling_is_1(tmp_path: Path) -> None:
    assert load_peft(write_diffusers(tmp_path))["unet.up"].scaling == 1


@pytest.mark.parametrize("component", ["", "unet."])
def test_metadata_are_a_config_of_pefts(component: str, tmp_path: Path) -> None:
    options = {"peft_type": "LORA", "r": 2, "lora_alpha": 8, "alpha_pattern": {"^up": 6}}
    metadata = {component + name: value for name, value in options.items()}
    if not component:
        metadata["alpha_pattern"] = {"^unet.up": 6}
    assert load_peft(write_diffusers(tmp_path, metadata))["unet.up"].scaling == 3


@pytest.mark.parametrize(
    ("metadata", "parts"),
    [
        ("{", ("lora_adapter_metadata in JSON",)),
        ("[1]", ("lora_adapter_metadata in JSON",)),
        (
            {"unet.peft_type": "LORA", "unet.r": 3, "unet.lora_alpha": 3},
            ("A (3, h_in)", "metadata"),
        ),
        ({"unet.peft_type": "LORA", "unet.use_dora": True}, ("use_dora", "DoRA")),
        ({"unet.peft_type": "IA3"}, ("peft_type", "'IA3'")),
    ],
)
def test_metadata_that_are_refused(
    metadata: object, parts: tuple[str, ...], tmp_path: Path
) -> None:
    refused(write_diffusers(tmp_path, metadata), DIFFUSERS, *parts)


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("unet.up.alpha", ("'unet.up.alpha'", "alphas", "save_lora_weights")),
        ("unet.up.lora_magnitude_vector", ("DoRA's magnitudes",)),
        ("lora_unet_up.lora_down.weight", ("kohya's",)),
        ("lora_te1_up.lora_down.weight", ("kohya's",)),
        ("diffusion_model.up.lora_A.weight", ("ComfyUI's",)),
        ("unet.up.lokr_w1", ("LyCORIS",)),
        ("unet.up.weight", ("a weight of the base model",)),
    ],
)
def test_files_of_other_programs(name: str, parts: tuple[str, ...], tmp_path: Path) -> None:
    directory = write_diffusers(tmp_path, **{name: np.ones(3, np.float32)})
    refused(directory, DIFFUSERS, *parts)


OLDER = {
    "unet.mid.attn1.to_q.lora.down.weight": "unet.mid.attn1.to_q.lora_A.weight",
    "unet.mid.attn1.to_out.0.lora.up.weight": "unet.mid.attn1.to_out.0.lora_B.weight",
    "unet.mid.attn1.processor.to_q_lora.down.weight": "unet.mid.attn1.to_q.lora_A.weight",
    "unet.mid.attn1.processor.to_out_lora.up.weight": "unet.mid.attn1.to_out.0.lora_B.weight",
    "text_encoder.layers.0.self_attn.to_q_lora.up.weight": (
        "text_encoder.layers.0.self_attn.q_proj.lora_B.weight"
    ),
    "text_encoder.layers.0.self_attn.to_out_lora.down.weight": (
        "text_encoder.layers.0.self_attn.out_proj.lora_A.weight"
    ),
    "text_encoder.layers.0.self_attn.k_proj.lora_linear_layer.up.weight": (
        "text_encoder.layers.0.self_attn.k_proj.lora_B.weight"
    ),
    "unet.mid.attn1.to_q.lora_A.weight": "unet.mid.attn1.to_q.lora_A.weight",
}


def test_older_names_of_diffusers() -> None:
    assert {name: _peft_name(name) for name in OLDER} == OLDER


@pytest.mark.skipif(find_spec("diffusers") is None, reason="not installed: diffusers")
def test_older_names_are_what_diffusers_makes_of_them() -> None:
    from diffusers.utils import state_dict_utils as theirs

    of_unet = {name: ours for name, ours in OLDER.items() if name.startswith("unet")}
    assert theirs.convert_unet_state_dict_to_peft(dict.fromkeys(of_unet, 0)).keys() == {
        *of_unet.values()
    }
    for kind in ("_lora.", ".lora_linear_layer."):  # which it tells by all names of a file
        of_text = {n: ours for n, ours in OLDER.items() if n.startswith("text") and kind in n}
        converted = theirs.convert_state_dict_to_diffusers(dict.fromkeys(of_text, 0))
        assert theirs.convert_state_dict_to_peft(converted).keys() == {*of_text.values()}


def test_names_without_a_component(tmp_path: Path) -> None:
    data = load_file(form("diffusers-plain") / DIFFUSERS)
    save_file(
        {name.replace("unet.", ""): value for name, value in data.items()}, tmp_path / DIFFUSERS
    )
    assert len(load_peft(tmp_path)) == len(data) // 2
