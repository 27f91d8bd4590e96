"""What is there where an adapter was expected is told by its name."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from sgmv.adapter import load_peft
from tests.help.peft_files import FIXTURES, copy_of, refusal

pytestmark = pytest.mark.once


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
@pytest.mark.parametrize(
    ("data", "parts"),
    [
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 13648688\n",
            ("a Git LFS pointer", "git lfs pull"),
        ),
        (b"/annex/objects/SHA256E-s13--ab.safetensors\n", ("git-annex", "git annex get")),
        (b"\n<!doctype html>\n<html>", ("a web page", "download")),
        (b"PK\x03\x04\x00\x00\x08\x08", ("torch.save", "safe_serialization=True")),
        (b"GGUF\x03\x00\x00\x00", ("a GGUF file",)),
        (b"", ("an empty file", "full disk")),
        (bytes(5000), ("zeros", "crash")),
    ],
)
def test_a_file_of_other_content(
    data: bytes, parts: tuple[str, ...], name: str, tmp_path: Path
) -> None:
    directory = copy_of("llama/attention-f32", tmp_path)
    (directory / name).write_bytes(data)
    refusal(directory, str(directory / name), *parts)


def test_a_file_of_40_bytes(tmp_path: Path) -> None:
    directory = copy_of("llama/attention-f32", tmp_path)
    path = directory / "adapter_model.safetensors"
    save_file({}, path, metadata={"format": "pt"})
    assert path.stat().st_size == 40
    refusal(directory, str(path), "a header without data", "state dict", "target_modules")


def test_a_sharded_save(tmp_path: Path) -> None:
    directory = copy_of("llama/attention-f32", tmp_path)
    path = directory / "adapter_model.safetensors"
    path.rename(directory / "adapter_model-00001-of-00002.safetensors")
    (directory / "adapter_model.safetensors.index.json").write_text("{}")
    refusal(directory, str(directory), "a sharded save", "max_shard_size")


def test_weights_under_another_name(tmp_path: Path) -> None:
    directory = copy_of("llama/attention-f32", tmp_path)
    path = directory / "adapter_model.safetensors"
    path.rename(directory / "adapters.safetensors")
    refusal(directory, str(path), "no such file; there is adapters.safetensors")


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_link_to_nothing(name: str, tmp_path: Path) -> None:
    """As a Hub cache has when its blobs were deleted, or git-annex before `get`."""
    directory = copy_of("llama/attention-f32", tmp_path)
    path = directory / name
    path.unlink()
    path.symlink_to("../blobs/4d7a")
    refusal(directory, str(path), "a link to ../blobs/4d7a, which is not there", "download")


@pytest.mark.parametrize(
    ("names", "kind", "chosen"),
    [
        (["french", "greek"], "named adapters: french, greek", "greek"),
        (
            ["checkpoint-500", "checkpoint-1000"],
            "checkpoint-500, checkpoint-1000",
            "checkpoint-1000",
        ),
        (["checkpoint-9", "final"], "named adapters: checkpoint-9, final", "final"),
        ([f"a{i}" for i in range(9)], "a0, a1, a2, a3, a4, ...", "a8"),
    ],
)
def test_a_root_of_adapters(names: list[str], kind: str, chosen: str, tmp_path: Path) -> None:
    root = tmp_path / "root"
    for name in names:
        copy_of("llama/attention-f32", root / name).rename(root / "moved")
        (root / name).rmdir()
        (root / "moved").rename(root / name)
    refusal(root, "adapter_config.json", kind, f"as in {root / chosen}")
    assert load_peft(root / chosen)


@pytest.mark.parametrize("main", ["aaaa", "bbbb", None])
def test_a_hub_cache_folder(main: str | None, tmp_path: Path) -> None:
    cache = tmp_path / "models--somebody--french"
    for revision in ("aaaa", "bbbb"):
        shutil.copytree(FIXTURES / "llama" / "attention-f32", cache / "snapshots" / revision)
    if main:
        (cache / "refs").mkdir()
        (cache / "refs" / "main").write_text(main)
    chosen = cache / "snapshots" / (main or "bbbb")
    refusal(cache, str(cache), "a Hub cache folder", f"pass {chosen}")
    assert load_peft(chosen)
    shutil.rmtree(cache / "snapshots")
    (cache / "snapshots").mkdir()
    refusal(cache, "a Hub cache folder without an adapter", "download")


def test_a_whole_model(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model-00001-of-00002.safetensors").write_bytes(b"")
    refusal(tmp_path, str(tmp_path), "a whole model", "the directory of an adapter")


@pytest.mark.parametrize(
    ("name", "tensors", "parts"),
    [
        ("a.gguf", (), ("a GGUF file",)),
        ("a.safetensors", ("lora_unet_up.lora_down.weight",), ("kohya's", "load_lora_weights")),
        ("a.safetensors", ("diffusion_model.up.lora_A.weight",), ("ComfyUI's",)),
        ("a.safetensors", ("up.hada_w1_a",), ("LyCORIS",)),
        ("a.safetensors", ("unet.up.lora.down.weight",), ("a file of diffusers", "file itself")),
        ("a.safetensors", ("model.up.weight",), ("no such file",)),
        ("a.safetensors", (), ("no such file",)),
    ],
)
def test_an_adapter_of_another_program(
    name: str, tensors: tuple[str, ...], parts: tuple[str, ...], tmp_path: Path
) -> None:
    path = tmp_path / name
    if name.endswith(".gguf"):
        path.write_bytes(b"GGUF" + bytes(60))
    else:
        save_file({tensor: np.ones(3, np.float32) for tensor in tensors}, path)
    refusal(tmp_path, "adapter_config.json", str(tmp_path), *parts)


def test_kohyas_names_in_a_directory_of_pefts(tmp_path: Path) -> None:
    """They were returned, under names that no model has."""
    directory = copy_of("llama/attention-f32", tmp_path)
    tensors = {f"lora_unet_up.lora_{half}.weight": np.ones((8, 8)) for half in "AB"}
    save_file(tensors, directory / "adapter_model.safetensors")
    refusal(directory, str(directory), "kohya's")


def test_weights_without_a_config(tmp_path: Path) -> None:
    directory = copy_of("llama/attention-f32", tmp_path)
    (directory / "adapter_config.json").unlink()
    refusal(directory, "adapter_config.json", "no such file; the weights are there", "copy")
