"""Adapters as PEFT writes them: read directories, then run one batch through every layer.

python examples/peft_directories.py [DIRECTORY ...]    without one, it writes two small ones

Needs the extra peft (safetensors, ml_dtypes).
"""

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

import sgmv


def write_adapter(directory: Path, r: int, lora_alpha: int, modules: dict[str, tuple[int, int]]):
    """What `save_pretrained` of a PEFT model leaves behind, for layers of (h_in, h_out)."""
    rng = np.random.default_rng(r)
    tensors = {}
    for module, (h_in, h_out) in modules.items():
        key = f"base_model.model.{module}"
        tensors[f"{key}.lora_A.weight"] = rng.standard_normal((r, h_in), "float32")
        tensors[f"{key}.lora_B.weight"] = rng.standard_normal((h_out, r), "float32")
    config = {"peft_type": "LORA", "r": r, "lora_alpha": lora_alpha}
    directory.mkdir()
    (directory / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, directory / "adapter_model.safetensors")


def main(directories: list[Path]) -> None:
    adapters = {i: sgmv.load_peft(directory) for i, directory in enumerate(directories)}
    for i, directory in enumerate(directories):
        print(f"adapter {i}: {directory.name}, {len(adapters[i])} layers")
    adapter_ids = [*adapters, -1, *adapters]  # a batch: every adapter twice, one row of the base
    segments = sgmv.segment(adapter_ids)
    for module in sorted({module for layers in adapters.values() for module in layers}):
        # None: this adapter leaves this layer alone, so its rows are base only here.
        stack = sgmv.AdapterStack.from_adapters({i: adapters[i].get(module) for i in adapters})
        x = np.ones((segments.n, stack.h_in), "float32")
        y = np.zeros((segments.n, stack.h_out), "float32")
        sgmv.add_lora(y, x, stack, segments)
        changed = [i for i in range(segments.n) if y[i].any()]
        print(f"{module}: {stack.h_in} -> {stack.h_out}, rows changed {changed}")


if __name__ == "__main__":
    if sys.argv[1:]:
        main([Path(argument) for argument in sys.argv[1:]])
    else:
        q, up = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj"
        with tempfile.TemporaryDirectory() as folder:
            german, french = Path(folder, "german"), Path(folder, "french")
            write_adapter(german, r=8, lora_alpha=16, modules={q: (64, 64)})
            write_adapter(french, r=4, lora_alpha=16, modules={q: (64, 64), up: (64, 172)})
            main([german, french])
