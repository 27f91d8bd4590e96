"""Reading what PEFT wrote: layers, ranks, scalings, values; and directories that are none."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

import sgmv
from sgmv.adapter import Adapter, load_peft
from sgmv.errors import PeftError
from tests.help.peft_files import (
    DTYPES,
    FIXTURES,
    RECORD,
    copy_of,
    refusal,
)

pytestmark = pytest.mark.once


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


def test_neither_torch_nor_peft_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("torch", "peft", "transformers"):
        monkeypatch.setitem(sys.modules, package, None)
    assert load_peft(FIXTURES / "llama" / "patterns-bf16")


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


def test_a_missing_package_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    refusal(FIXTURES / "llama" / "patterns-bf16", "ml_dtypes", "pip install ml_dtypes")


@pytest.mark.parametrize("package", ["ml_dtypes", "safetensors"])
def test_float32_needs_no_package(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    assert load_peft(FIXTURES / "llama" / "attention-f32")
