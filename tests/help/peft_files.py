"""What PEFT wrote, and how to write the like of it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
from safetensors.numpy import save_file

from sgmv.adapter import Adapter, load_peft
from sgmv.errors import PeftError

FIXTURES = Path(__file__).parents[1] / "fixtures" / "peft"
RECORD = json.loads((FIXTURES / "outputs.json").read_text())
RUNS: dict[str, Any] = RECORD["runs"]
FORMS: dict[str, Any] = json.loads((FIXTURES / "forms.json").read_text())["forms"]
DTYPES = {"f32": np.float32, "f16": np.float16, "bf16": ml_dtypes.bfloat16}
Q_PROJ = "model.layers.0.self_attn.q_proj"
V_PROJ = "model.layers.0.self_attn.v_proj"
DOWN_PROJ = "model.layers.1.mlp.down_proj"

needs_torch = pytest.mark.skipif(
    find_spec("torch") is None, reason="not installed: torch (pip install -e '.[torch]')"
)

Array = npt.NDArray[Any]
Float64 = npt.NDArray[np.float64]


def form(name: str) -> Path:
    """The directory of a form that a real library wrote."""
    return FIXTURES / "forms" / name


def outputs_in(name: str) -> dict[str, Array]:
    """The arrays of a file beside the fixtures; numpy's files know no bfloat16."""
    with np.load(FIXTURES / name) as file:
        return {
            key: array.view(ml_dtypes.bfloat16) if array.dtype == np.uint16 else array
            for key, array in file.items()
        }


def copy_of(directory: str, to: Path, **options: Any) -> Path:
    """A copy of an adapter of PEFT's in which some options say something else."""
    target = to / Path(directory).name
    shutil.copytree(FIXTURES / directory, target)
    config = target / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | options))
    return target


def write_adapter(to: Path, tensors: Mapping[str, Array], **options: Any) -> Path:
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4} | options
    (to / "adapter_config.json").write_text(json.dumps(config))
    save_file(
        {f"base_model.model.{name}": tensor for name, tensor in tensors.items()},
        to / "adapter_model.safetensors",
    )
    return to


def halves(module: str, A: Array, B: Array) -> dict[str, Array]:
    return {f"{module}.lora_A.weight": A, f"{module}.lora_B.weight": B}


def refusal(directory: Path, *parts: str) -> None:
    """Loading is refused, in both ways, and the message has these parts."""
    for read in (load_peft, lambda path: Adapter.from_peft(path, Q_PROJ)):
        with pytest.raises(PeftError) as caught:
            read(directory)
        for part in ("expected", "got", ";", *parts):
            assert part in str(caught.value)


def named(to: Path, *names: str, **options: Any) -> Path:
    """An adapter of these tensors' names; "?" is A in one and B in another tensor."""
    A, B = np.ones((2, 3), np.float32), np.ones((5, 2), np.float32)
    halves = {"A": A, "B": B}
    tensors = {name.replace("?", half): halves[half] for name in names for half in halves}
    write_adapter(to, {}, **options)
    save_file(tensors, to / "adapter_model.safetensors")
    return to
