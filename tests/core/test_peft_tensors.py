"""Values of tensors: every type, by torch's loader too, and shapes that are no layer's."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from sgmv.adapter import Adapter, load_peft
from tests.help.peft_files import (
    FIXTURES,
    Q_PROJ,
    Array,
    copy_of,
    halves,
    needs_torch,
    refusal,
    write_adapter,
)

pytestmark = pytest.mark.once
PICKLE = FIXTURES / "forms" / "pickle"


def test_float64_is_read(tmp_path: Path) -> None:
    directory = write_adapter(tmp_path, halves("up", np.ones((2, 3)), np.ones((5, 2))))
    assert Adapter.from_peft(directory, "up").dtype == np.float64


def test_a_and_b_may_be_of_two_types(tmp_path: Path) -> None:
    A, B = np.full((2, 3), 0.1, np.float16), np.full((5, 2), 0.1, np.float32)
    adapter = load_peft(write_adapter(tmp_path, halves("up", A, B)))["up"]
    assert (adapter.A.dtype, adapter.B.dtype, adapter.dtype) == (np.float16, np.float32, np.float32)
    assert adapter.A[0, 0] == A[0, 0]
    assert adapter.B[0, 0] == B[0, 0]


@pytest.mark.parametrize(
    ("name", "stored"), [("F8_E4M3", "float8_e4m3fn"), ("F8_E5M2", "float8_e5m2")]
)
def test_every_8_bit_float_is_read_exactly(name: str, stored: str, tmp_path: Path) -> None:
    """As ml_dtypes has it: infinities, NaN, both zeros and subnormal numbers included."""
    dtype = getattr(ml_dtypes, stored)
    every = np.arange(256, dtype=np.uint8).view(dtype).reshape(2, 128)
    directory = write_adapter(tmp_path, halves("up", every, every.T.copy()))
    assert name.encode() in (directory / "adapter_model.safetensors").read_bytes()
    adapter = load_peft(directory)["up"]
    assert adapter.dtype == np.float16
    for read, expected in ((adapter.A, every), (adapter.B, every.T)):
        exact = expected.astype(np.float32)
        np.testing.assert_array_equal(read.astype(np.float32), exact)
        np.testing.assert_array_equal(np.signbit(read), np.signbit(exact))


def test_what_is_saved_beside_may_count(tmp_path: Path) -> None:
    """A module that is replaced has buffers, too."""
    tensors = halves("up", np.ones((2, 3), np.float32), np.ones((5, 2), np.float32))
    tensors |= {"norm.weight": np.ones(3, np.float32), "norm.num_batches": np.array(7)}
    directory = write_adapter(tmp_path, tensors, modules_to_save=["norm"])
    saved = load_peft(directory).saved
    assert sorted(saved) == ["norm.num_batches", "norm.weight"]
    assert saved["norm.num_batches"] == 7


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
    ],
)
def test_shapes_and_types_that_disagree(
    A: Array, B: Array, parts: tuple[str, ...], tmp_path: Path
) -> None:
    refusal(write_adapter(tmp_path, halves(Q_PROJ, A, B)), Q_PROJ, str(tmp_path), *parts)


# adapter_model.bin


def test_a_pickle_is_not_opened_without_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    refusal(PICKLE, "adapter_model.bin", "pickle", "torch is not installed", "safe_serialization")


@needs_torch
def test_a_pickle_is_not_opened_by_a_loader_that_may_run_code(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import torch

    monkeypatch.setattr(torch, "__version__", "2.5.1+cpu")
    refusal(PICKLE, "torch 2.5.1+cpu may run code", "install torch 2.6")


@needs_torch
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64", "float8_e4m3fn"])
def test_a_pickle_has_the_values_of_the_safetensors_file(dtype: str, tmp_path: Path) -> None:
    """Views of a larger storage, transposed, too."""
    import torch
    from safetensors.torch import save_file as save_tensors

    tensors = {
        f"base_model.model.up.lora_{half}.weight": torch.randn(shape).T.to(getattr(torch, dtype))
        for half, shape in (("A", (3, 2)), ("B", (2, 5)))
    }
    for name in ("safe", "pickled"):
        (tmp_path / name).mkdir()
        write_adapter(tmp_path / name, {})
    whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_tensors(whole, tmp_path / "safe" / "adapter_model.safetensors")
    (tmp_path / "pickled" / "adapter_model.safetensors").unlink()
    torch.save(tensors, tmp_path / "pickled" / "adapter_model.bin")
    expected, found = (load_peft(tmp_path / name)["up"] for name in ("safe", "pickled"))
    assert found.A.dtype == expected.A.dtype
    np.testing.assert_array_equal(found.A, expected.A)
    np.testing.assert_array_equal(found.B, expected.B)


class Code:
    """What unpickling runs."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path(CODE_RAN),)


CODE_RAN = "/nowhere"


@needs_torch
@pytest.mark.parametrize(
    ("content", "part"),
    [
        ("code", "Weights only"),
        ("numbers", "tensors by name"),
        ("half", "damaged"),
        ("empty", "empty"),
        ("pointer", "Git LFS"),
        ("sparse", "dense"),
    ],
)
def test_a_pickle_of_anything_else_is_refused(
    content: str, part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    path = tmp_path / "adapter" / "adapter_model.bin"
    shutil.copytree(PICKLE, path.parent)
    monkeypatch.setattr("tests.core.test_peft_tensors.CODE_RAN", str(tmp_path / "ran"))
    whole = torch.load(path, weights_only=True)
    if content == "code":
        torch.save(whole | {"x": Code()}, path)
    elif content == "numbers":
        torch.save(whole | {"step": 3}, path)
    elif content == "half":
        path.write_bytes(path.read_bytes()[:1500])
    elif content == "sparse":
        torch.save({name: tensor.to_sparse() for name, tensor in whole.items()}, path)
    else:
        start = b"version https://git-lfs.github.com/spec/v1\n" if content == "pointer" else b""
        path.write_bytes(start)
    refusal(path.parent, str(path), part)
    assert not (tmp_path / "ran").exists()


@needs_torch
def test_safetensors_come_before_a_pickle(tmp_path: Path) -> None:
    """As in PEFT."""
    directory = copy_of("llama/attention-f32", tmp_path)
    (directory / "adapter_model.bin").write_bytes(b"PK\x03\x04")
    assert load_peft(directory)


def test_a_file_that_says_nothing_about_itself(tmp_path: Path) -> None:
    """MLX writes a header with no metadata, as null."""
    directory = copy_of("llama/attention-f32", tmp_path)
    path = directory / "adapter_model.safetensors"
    save_file(load_file(path), path)
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = b'{"__metadata__":null,' + data[9 : 8 + length].strip()
    header += b" " * (-len(header) % 8)
    path.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + length :])
    assert load_peft(directory).keys() == load_peft(FIXTURES / "llama" / "attention-f32").keys()
