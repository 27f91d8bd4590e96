"""Write tests/fixtures/peft with the real PEFT: adapters, and what PEFT computed with them.

Run by hand when the fixtures are to change; the tests only read its output. In an environment of
its own, from the repository's root:

    python -m venv peftenv
    peftenv/bin/pip install torch==2.13.0 peft==0.21.2 transformers==5.23.0
    PYTHONHASHSEED=0 peftenv/bin/python tests/make_peft_fixtures.py

The hash seed fixes the order in which PEFT writes sets, so that a second run writes the same bytes.
No download: the models are built from their configs with random weights.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.other import get_pattern_key

SEED = 20231128
TOKENS = 5  # per sample
FIXTURES = Path(__file__).parent / "fixtures" / "peft"

LLAMA = {
    "attention-f32": (
        torch.float32,
        LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]),
    ),
    "rslora-f32": (
        torch.float32,
        LoraConfig(r=4, lora_alpha=6, use_rslora=True, target_modules="all-linear"),
    ),
    # The first key that matches decides: layer 0's v_proj gets 5 (not 3), its q_proj alpha 7.
    "patterns-bf16": (
        torch.bfloat16,
        LoraConfig(
            r=16,
            lora_alpha=12,
            target_modules=["q_proj", "k_proj", "v_proj", "down_proj"],
            rank_pattern={
                r"layers\.0\.self_attn\.v_proj": 5,
                "q_proj|v_proj": 3,
                "^model.layers.1.mlp.down_proj": 5,
                "^self_attn.k_proj": 2,
            },
            alpha_pattern={"^model.layers.0.self_attn.q_proj": 7, "down_proj": 24},
        ),
    ),
    "mlp-bf16": (
        torch.bfloat16,
        LoraConfig(r=6, lora_alpha=9, target_modules=["gate_proj", "up_proj", "down_proj"]),
    ),
    "mlp-f16": (
        torch.float16,
        LoraConfig(r=17, lora_alpha=-5, target_modules=["gate_proj", "down_proj"]),
    ),
}
LLAMA_LAYERS = [
    "model.layers.0.self_attn.q_proj",
    "model.layers.0.self_attn.v_proj",
    "model.layers.1.self_attn.k_proj",
    "model.layers.1.mlp.gate_proj",
    "model.layers.0.mlp.down_proj",
    "model.layers.1.mlp.down_proj",
]
BASE = "__base__"

# Keys of a rank_pattern or alpha_pattern, in order, against a module's name.
PATTERN_CASES = [
    (["q_proj"], "model.layers.0.self_attn.q_proj"),
    (["attn.q_proj"], "model.layers.0.self_attn.q_proj"),
    (["self_attn.q_proj"], "model.layers.0.self_attn.q_proj"),
    (["self.attn.q_proj"], "model.layers.0.self_attn.q_proj"),
    (["proj", "q_proj"], "model.layers.0.self_attn.q_proj"),
    (["q_proj", "model.layers.0.self_attn.q_proj"], "model.layers.0.self_attn.q_proj"),
    (["^self_attn.q_proj", "^model.layers.0.self_attn.q_proj"], "model.layers.0.self_attn.q_proj"),
    (["^q_proj"], "q_proj"),
    (["k_proj|q_proj"], "model.layers.0.self_attn.q_proj"),
    ([r"layers\.1\d\..*q_proj", r"layers\.\d+\..*q_proj"], "model.layers.1.self_attn.q_proj"),
    ([r"layers\.1\d\..*q_proj", r"layers\.\d+\..*q_proj"], "model.layers.11.self_attn.q_proj"),
    (["layers.0", "model.layers"], "model.layers.0.self_attn.q_proj"),
    (["(?:q|k)_proj$"], "model.layers.0.self_attn.k_proj"),
    (["lin+1", "block.lin+1"], "block.lin+1"),
    ([], "model.layers.0.self_attn.q_proj"),
]


def tiny_llama(layers: int = 2) -> torch.nn.Module:
    torch.manual_seed(SEED)
    config = transformers.LlamaConfig(
        vocab_size=32,
        hidden_size=48,
        intermediate_size=112,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=16,
        initializer_range=0.15,
    )
    return transformers.LlamaForCausalLM(config).eval()


def tiny_gpt2() -> torch.nn.Module:
    torch.manual_seed(SEED)
    config = transformers.GPT2Config(
        vocab_size=32, n_embd=24, n_layer=1, n_head=2, n_positions=16, initializer_range=0.2
    )
    return transformers.GPT2LMHeadModel(config).eval()


def tiny_convolution() -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Conv2d(2, 3, 2), torch.nn.ReLU())


def randomise(model: torch.nn.Module) -> None:
    """PEFT starts B at zero, where no fault could show."""
    for name, parameter in model.named_parameters():
        if "lora_" in name and parameter.dim() >= 2:
            torch.nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)


def save_adapter(
    make_model: Callable[[], torch.nn.Module],
    config: Any,
    directory: Path,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Attach, randomise and save one adapter; its tensors have type dtype."""
    model = get_peft_model(make_model().to(dtype), config, autocast_adapter_dtype=False)
    randomise(model)
    with tempfile.TemporaryDirectory() as scratch:
        model.save_pretrained(scratch)
        directory.mkdir(parents=True)
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            shutil.copyfile(Path(scratch) / name, directory / name)


def load_model(
    make_model: Callable[[], torch.nn.Module], directories: list[Path], dtype: torch.dtype
) -> PeftModel:
    """The base model in dtype with all adapters; float32 holds a 16-bit adapter exactly."""
    base = make_model().to(dtype)
    first, *others = directories
    model = PeftModel.from_pretrained(base, first, adapter_name=first.name)
    for directory in others:
        model.load_adapter(directory, adapter_name=directory.name)
    if dtype != torch.float32:
        model = model.to(dtype)
    return model.eval()


def storable(tensor: torch.Tensor) -> np.ndarray:
    """numpy has no bfloat16: its bits travel as uint16."""
    tensor = tensor.detach()
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy().copy()


def capture(
    model: PeftModel, layers: list[str], samples: int, names: list[str] | None
) -> dict[str, torch.Tensor]:
    """Run one batch; each layer's x (n, h_in), W (h_out, h_in) and y (n, h_out)."""
    found: dict[str, torch.Tensor] = {}
    handles = []
    for layer in layers:
        module = model.base_model.model.get_submodule(layer)

        def keep(module: Any, inputs: Any, output: Any, layer: str = layer) -> None:
            base = module.get_base_layer()
            is_transposed = isinstance(base, transformers.pytorch_utils.Conv1D)
            if getattr(base, "bias", None) is not None:
                assert not base.bias.any(), "y would hold more than x @ W.T and the delta"
            found[f"{layer}/x"] = inputs[0].flatten(0, -2)
            found[f"{layer}/W"] = base.weight.T.contiguous() if is_transposed else base.weight
            found[f"{layer}/y"] = output.flatten(0, -2)

        handles.append(module.register_forward_hook(keep))
    generator = torch.Generator().manual_seed(SEED)
    tokens = torch.randint(0, 32, (samples, TOKENS), generator=generator)
    with torch.no_grad():
        model(input_ids=tokens, **({"adapter_names": names} if names else {}))
    for handle in handles:
        handle.remove()
    return found


class Outputs:
    """What PEFT made of the adapters: ranks and scalings per module, inputs and outputs per run."""

    def __init__(self) -> None:
        self.arrays: dict[str, np.ndarray] = {}
        self.runs: dict[str, Any] = {}
        self.adapters: dict[str, Any] = {}

    def describe(self, model: PeftModel, folder: str) -> None:
        """Record the rank and the scaling that PEFT itself works with."""
        for layer, module in model.base_model.model.named_modules():
            for name in getattr(module, "lora_A", ()):
                modules = self.adapters.setdefault(f"{folder}/{name}", {})
                modules[layer] = {"r": module.r[name], "scaling": module.scaling[name]}

    def run(
        self, title: str, model: PeftModel, folder: str, layers: list[str], names: list[str]
    ) -> None:
        is_mixed = len(set(names)) > 1
        if not is_mixed:
            model.set_adapter(names[0])
        found = capture(model, layers, len(names), names if is_mixed else None)
        dtype = str(found[f"{layers[0]}/x"].dtype).removeprefix("torch.")
        for key, tensor in found.items():
            # All runs of a model share its weights, so W is stored once per model and type.
            owner = f"{folder}-{dtype}" if key.endswith("/W") else title
            self.arrays[f"{owner}/{key}"] = storable(tensor)
        self.runs[title] = {
            "adapters": folder,
            "dtype": dtype,
            "layers": layers,
            "adapter_of_sample": names,
        }


def run_models(root: Path) -> Outputs:
    outputs = Outputs()
    for name, (dtype, config) in LLAMA.items():
        save_adapter(tiny_llama, config, root / "llama" / name, dtype)
    directories = [root / "llama" / name for name in LLAMA]
    model = load_model(tiny_llama, directories, torch.float32)
    outputs.describe(model, "llama")
    mixed = [*LLAMA, BASE, "rslora-f32", "patterns-bf16", BASE, "attention-f32", "rslora-f32"]
    outputs.run("llama-mixed", model, "llama", LLAMA_LAYERS, mixed)
    for name in LLAMA:
        layers = [
            layer
            for layer in LLAMA_LAYERS
            if name in model.base_model.model.get_submodule(layer).lora_A
        ]
        outputs.run(f"llama-single-{name}", model, "llama", layers, [name, name])

    sixteen_bit = [root / "llama" / name for name in LLAMA if name.endswith("-bf16")]
    model = load_model(tiny_llama, sixteen_bit, torch.bfloat16)
    mixed = ["mlp-bf16", "patterns-bf16", BASE, "patterns-bf16", "mlp-bf16"]
    attention = [layer for layer in LLAMA_LAYERS if "gate" not in layer]
    outputs.run("llama-mixed-bf16", model, "llama", attention, mixed)

    gpt2 = {
        "conv1d-f32": LoraConfig(
            r=3, lora_alpha=4, target_modules=["c_attn", "mlp.c_proj"], fan_in_fan_out=True
        ),
        "conv1d-rslora-f32": LoraConfig(
            r=7, lora_alpha=5, target_modules=["c_attn"], fan_in_fan_out=True, use_rslora=True
        ),
    }
    for name, config in gpt2.items():
        save_adapter(tiny_gpt2, config, root / "gpt2" / name)
    model = load_model(tiny_gpt2, [root / "gpt2" / name for name in gpt2], torch.float32)
    outputs.describe(model, "gpt2")
    layers = ["transformer.h.0.attn.c_attn", "transformer.h.0.mlp.c_proj"]
    outputs.run("gpt2-mixed", model, "gpt2", layers, [*gpt2, BASE, *gpt2])
    return outputs


def write_refused(root: Path) -> None:
    """Adapters that hold more, or something else, than plain LoRA."""
    q_proj = {"r": 2, "target_modules": ["q_proj"]}
    llama = {
        "dora": LoraConfig(**q_proj, use_dora=True),
        "lora-bias": LoraConfig(**q_proj, lora_bias=True),
        "pissa": LoraConfig(**q_proj, init_lora_weights="pissa"),
        "olora": LoraConfig(**q_proj, init_lora_weights="olora"),
        "modules-to-save": LoraConfig(**q_proj, modules_to_save=["norm"]),
        "trainable-tokens": LoraConfig(**q_proj, trainable_token_indices=[1, 3]),
        "layer-replication": LoraConfig(**q_proj, layer_replication=[[0, 1], [0, 1]]),
        "alora": LoraConfig(**q_proj, alora_invocation_tokens=[1, 2], task_type="CAUSAL_LM"),
        "embedding": LoraConfig(r=2, target_modules=["embed_tokens"]),
        "lm-head": LoraConfig(r=2, target_modules=["lm_head"]),  # saved with the base weight
        "ia3": peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[]),
        "adalora": peft.AdaLoraConfig(target_modules=["q_proj"], init_r=3, total_step=10),
        "loha": peft.LoHaConfig(r=2, target_modules=["q_proj"]),
    }
    for name, config in llama.items():
        save_adapter(lambda: tiny_llama(layers=1), config, root / "refused" / name)
    bias = LoraConfig(r=2, target_modules=["c_attn"], bias="all", fan_in_fan_out=True)
    save_adapter(tiny_gpt2, bias, root / "refused" / "bias-all")
    convolution = LoraConfig(r=2, target_modules=["0"])
    save_adapter(tiny_convolution, convolution, root / "refused" / "convolution")


def main() -> None:
    warnings.filterwarnings("ignore", module="peft")
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    for folder in ("llama", "gpt2", "refused"):
        shutil.rmtree(FIXTURES / folder, ignore_errors=True)
    outputs = run_models(FIXTURES)
    write_refused(FIXTURES)
    np.savez_compressed(FIXTURES / "outputs.npz", **outputs.arrays)
    versions = {
        "torch": torch.__version__,
        "peft": peft.__version__,
        "transformers": transformers.__version__,
        "numpy": np.__version__,
    }
    patterns = [
        {"keys": keys, "module": module, "decides": get_pattern_key(keys, module)}
        for keys, module in PATTERN_CASES
    ]
    record = {
        "versions": versions,
        "seed": SEED,
        "tokens_per_sample": TOKENS,
        "runs": outputs.runs,
        "adapters": outputs.adapters,
        "patterns": patterns,
    }
    (FIXTURES / "outputs.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
