"""vLLM's real engine over models and adapters made on the spot, each in a process of its own.

    Llama.write, write_adapter   directories as Hugging Face and PEFT write them
    serve                        a process that makes an engine and runs jobs in it

The process is `benchmarks/engine_process.py`. It must not import sgmv: whether vLLM does is what is
tested. Weights are drawn from seeds; nothing is downloaded.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sgmv.extras import load
from sgmv.models import Model

ROOT = Path(__file__).parents[1]
Job = Mapping[str, Any]
PRODUCTS = ("base", "stock", "sgmv")  # an engine without LoRA, with vLLM's own, with sgmv's


@dataclass(frozen=True)
class Llama(Model):
    """A whole Llama: a layer's widths, its depth, and its vocabulary."""

    layers: int
    vocabulary: int

    def linears(self) -> dict[str, tuple[int, int]]:
        """(h_in, h_out) of a layer's linear modules, by their names in it."""
        q = self.layer("q")
        return {
            "self_attn.q_proj": q,
            "self_attn.k_proj": self.layer("kv"),
            "self_attn.v_proj": self.layer("kv"),
            "self_attn.o_proj": q[::-1],
            "mlp.gate_proj": self.layer("gate/up"),
            "mlp.up_proj": self.layer("gate/up"),
            "mlp.down_proj": self.layer("down"),
        }

    def config(self) -> dict[str, Any]:
        """What is in config.json."""
        return {
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
            "hidden_size": self.hidden, "intermediate_size": self.intermediate,
            "num_attention_heads": self.heads, "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim, "num_hidden_layers": self.layers,
            "vocab_size": self.vocabulary, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0, "tie_word_embeddings": False, "torch_dtype": "float32",
            "bos_token_id": 1, "eos_token_id": 2,
        }  # fmt: skip

    def write(self, folder: Path, weights: bool = True) -> Path:
        """A model's directory; without weights vLLM is to draw them (load_format="dummy")."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(self.config()))
        if weights:
            _save(folder / "model.safetensors", self._weights(np.random.default_rng(0)))
        return folder

    def _weights(self, rng: np.random.Generator) -> dict[str, NDArray[Any]]:
        found = {
            "model.embed_tokens.weight": drawn(rng, self.vocabulary, self.hidden, 1.0),
            "lm_head.weight": drawn(rng, self.vocabulary, self.hidden),
            "model.norm.weight": np.ones(self.hidden, np.float32),
        }
        for i in range(self.layers):
            layer = f"model.layers.{i}"
            for name, (h_in, h_out) in self.linears().items():
                found[f"{layer}.{name}.weight"] = drawn(rng, h_out, h_in)
            for norm in ("input_layernorm", "post_attention_layernorm"):
                found[f"{layer}.{norm}.weight"] = np.ones(self.hidden, np.float32)
        return found

    def modules(self) -> dict[str, tuple[int, int]]:
        """(h_in, h_out) of all linear modules, by their full names."""
        return {
            f"model.layers.{i}.{name}": widths
            for i in range(self.layers)
            for name, widths in self.linears().items()
        }


TINY = Llama(64, 160, heads=4, kv_heads=2, head_dim=32, layers=2, vocabulary=256)


def drawn(
    rng: np.random.Generator, rows: int, columns: int, std: float | None = None
) -> NDArray[Any]:
    """A random matrix, by default of values that keep a row's length; bfloat16 holds them."""
    values = rng.standard_normal((rows, columns), np.float32)
    values *= columns**-0.5 if std is None else std
    return (values.view(np.uint32) & 0xFFFF0000).view(np.float32)


def write_adapter(
    folder: Path, modules: Mapping[str, tuple[int, int]], r: int, seed: int, alpha: int = 16
) -> Path:
    """An adapter's directory as PEFT writes it; of an embedding, h_in is the vocabulary."""
    folder.mkdir(parents=True, exist_ok=True)
    rng, tensors = np.random.default_rng(seed), {}
    for name, (h_in, h_out) in modules.items():
        embeds = name.endswith("embed_tokens")
        A, B = ("embedding_A", "embedding_B") if embeds else ("A.weight", "B.weight")
        key = f"base_model.model.{name}.lora_"
        tensors[key + A] = drawn(rng, r, h_in, 1.0 if embeds else None)
        tensors[key + B] = drawn(rng, h_out, r, r / alpha * 0.5)
    _save(folder / "adapter_model.safetensors", tensors)
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": r, "lora_alpha": alpha, "bias": "none",
        "target_modules": sorted({name.rpartition(".")[2] for name in modules}),
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def _save(path: Path, tensors: dict[str, NDArray[Any]]) -> None:
    load("safetensors.numpy").save_file(tensors, path)


@dataclass(frozen=True)
class Served:
    """What a process has answered: a result for each job, and what it printed."""

    results: list[Any]
    printed: str
    facts: dict[str, Any] = field(default_factory=dict)


def serve(
    products: str,
    model: Path,
    jobs: Sequence[Job],
    environment: Mapping[str, str] | None = None,
    timeout: float = 1800,
    **engine: Any,
) -> Served:
    """Make an engine in a process of its own, and run these jobs in it; see engine_process.py.

    Raises RuntimeError with what the process printed if it fails.
    """
    asked = {"model": str(model), "jobs": list(jobs), "engine": engine}
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.engine_process"],
        input=json.dumps(asked),
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=timeout,
        env={
            **os.environ,
            "SGMV_VLLM": "1" if products == "sgmv" else "0",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_LOGGING_LEVEL": "INFO", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1",
            **(environment or {}),
        },
    )  # fmt: skip
    printed = done.stdout + done.stderr
    answers = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not answers:
        raise RuntimeError(f"vLLM's process ended with {done.returncode}:\n{printed[-6000:]}")
    return Served(printed=printed, **json.loads(answers[-1]))


def widths(shape: Llama) -> dict[str, int]:
    """A shape as records hold it."""
    return asdict(shape)
