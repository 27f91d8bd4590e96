"""Adapters with DoRA that PEFT wrote give what PEFT itself computed: fixtures/make_dora.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import sgmv
from reference import add_lora
from reference.arguments import Adapter as Reference
from reference.bounds import add_lora_bound
from reference.compare import check
from sgmv.adapter import load_peft
from sgmv.adapters import describe
from tests.help.dora import peft_bound
from tests.help.peft_files import FIXTURES, Q_PROJ, copy_of, outputs_in, refusal

pytestmark = pytest.mark.once
CASES = json.loads((FIXTURES / "dora.json").read_text())["cases"]
LAYERS = [(name, layer) for name, case in CASES.items() for layer in case["layers"]]


@pytest.fixture(scope="module")
def outputs() -> dict[str, Any]:
    return outputs_in("dora.npz")


@pytest.mark.parametrize(("name", "layer"), LAYERS)
def test_what_peft_computed(outputs: dict[str, Any], name: str, layer: str) -> None:
    x, W, y = (outputs[f"{name}/{layer}/{part}"] for part in ("x", "W", "y"))
    bias = outputs.get(f"{name}/{layer}/bias")
    found = load_peft(FIXTURES / "dora" / name)
    adapter = found[layer]
    assert adapter.magnitude is not None
    stack = sgmv.AdapterStack.from_adapters({0: adapter, 1: None}, W=W, bias=bias)
    one_hot = np.eye(W.shape[1], dtype=W.dtype)[x] if layer in found.embeddings else x
    base = one_hot.astype(np.float32) @ W.astype(np.float32).T
    base = base if bias is None else base + bias
    ids = np.zeros(len(x), np.int64)
    reference = Reference(adapter.A, adapter.B, adapter.scaling, adapter.magnitude)
    exact = add_lora(base, one_hot, [reference], ids, W=W, bias=bias)
    if layer in found.embeddings:
        ours = sgmv.add_lora_embedding(base.copy(), x, stack, ids)
    else:
        ours = sgmv.add_lora(base.copy(), x, stack, ids)
    bound = add_lora_bound(base, one_hot, [reference], ids, W=W, bias=bias, expected=exact)
    check(ours, exact, bound, "sgmv's y against by_row")
    its = peft_bound(one_hot, W, bias, reference, exact, y.dtype)
    check(y, exact, its, "PEFT's y against by_row")
    check(ours, y.astype(np.float64), its + bound, "sgmv's y against PEFT's")
    again = sgmv.Adapter.from_peft(FIXTURES / "dora" / name, layer)
    assert again.magnitude is not None
    assert again.magnitude.tobytes() == adapter.magnitude.tobytes()


def test_magnitudes_that_are_not_whole_are_refused(tmp_path: Path) -> None:
    """A config that says so and tensors that have none, and the other way round."""
    for options in ({"use_dora": False}, {}):
        directory = "dora/llama-f32" if options else "llama/attention-f32"
        target = copy_of(directory, tmp_path, **(options or {"use_dora": True}))
        refusal(target, "DoRA's magnitudes" if options else "lora_magnitude_vector of")


def test_the_command_names_it() -> None:
    assert describe(str(FIXTURES / "dora" / "llama-f32")).form == "PEFT, DoRA"
    assert describe(str(FIXTURES / "llama" / "attention-f32")).form == "PEFT"


def test_magnitudes_of_another_width_are_refused(tmp_path: Path) -> None:
    target = copy_of("dora/llama-f32", tmp_path)
    file = target / "adapter_model.safetensors"
    tensors = load_file(file)
    name = f"base_model.model.{Q_PROJ}.lora_magnitude_vector"
    for changed, part in (
        ({**tensors, name: tensors[name][1:]}, "lora_magnitude_vector (48,), as lora_B has"),
        ({key: value for key, value in tensors.items() if key != name}, "lora_A and lora_B alone"),
    ):
        save_file(changed, file)
        refusal(target, part)
