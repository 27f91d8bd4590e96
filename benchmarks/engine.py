"""vLLM's real engine over models and adapters made on the spot, each in a process of its own.

    Llama.write, write_adapter   directories as Hugging Face and PEFT write them
    Engine, serve                a process that makes an engine and runs jobs in it

The process is `benchmarks/engine_process.py`. It must not import sgmv: whether vLLM does is what is
tested. Weights are drawn from seeds; nothing is downloaded.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sgmv.extras import load
from sgmv.models import Model

ROOT = Path(__file__).parents[1]
Job = Mapping[str, Any]
ANSWER = "answer: "  # what a line begins with that is not vLLM's
PRODUCTS = ("base", "stock", "sgmv")  # an engine without LoRA, with vLLM's own, with sgmv's


@dataclass(frozen=True)
class Llama(Model):
    """A whole Llama: a layer's widths, its depth, and its vocabulary.

    With experts it is a Qwen3-MoE: this number of them in place of each gate, up and down.
    """

    layers: int
    vocabulary: int
    experts: int = 0

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
        kind: dict[str, Any] = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
        if self.experts:
            kind = {
                "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe",
                "num_experts": self.experts, "num_experts_per_tok": 2, "norm_topk_prob": True,
                "moe_intermediate_size": self.intermediate, "decoder_sparse_step": 1,
                "mlp_only_layers": [],
            }  # fmt: skip
        return {
            **kind, "hidden_act": "silu",
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
        found: dict[str, NDArray[Any]] = {
            "model.embed_tokens.weight": drawn(rng, self.vocabulary, self.hidden, 1.0),
            "lm_head.weight": drawn(rng, self.vocabulary, self.hidden),
            "model.norm.weight": np.ones(self.hidden, np.float32),
        }
        for i in range(self.layers):
            layer = f"model.layers.{i}"
            for name, (h_in, h_out) in self.linears().items():
                if not (self.experts and name.startswith("mlp.")):
                    found[f"{layer}.{name}.weight"] = drawn(rng, h_out, h_in)
            found |= self._experts(f"{layer}.mlp", rng) if self.experts else {}
            for norm in ("input_layernorm", "post_attention_layernorm"):
                found[f"{layer}.{norm}.weight"] = np.ones(self.hidden, np.float32)
        return found

    def _experts(self, mlp: str, rng: np.random.Generator) -> dict[str, NDArray[Any]]:
        """Those of a layer of experts, and the norms that Qwen3 has beside them."""
        found = {f"{mlp}.gate.weight": drawn(rng, self.experts, self.hidden)}
        for e in range(self.experts):
            for part in ("gate_proj", "up_proj", "down_proj"):
                h_in, h_out = self.linears()[f"mlp.{part}"]
                found[f"{mlp}.experts.{e}.{part}.weight"] = drawn(rng, h_out, h_in)
        for norm in ("q_norm", "k_norm"):
            name = f"{mlp.removesuffix('mlp')}self_attn.{norm}.weight"
            found[name] = np.ones(self.head_dim, np.float32)
        return found

    def modules(self) -> dict[str, tuple[int, int]]:
        """(h_in, h_out) of all linear modules but experts, by their full names."""
        return {
            f"model.layers.{i}.{name}": widths
            for i in range(self.layers)
            for name, widths in self.linears().items()
            if not (self.experts and name.startswith("mlp."))
        }


TINY = Llama(64, 160, heads=4, kv_heads=2, head_dim=32, layers=2, vocabulary=256)
TINY_EXPERTS = replace(TINY, intermediate=64, experts=8)


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


def put_out_of_cache(folder: Path) -> None:
    """Have the next reading of a directory's files come from disk, and not from the page cache."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _save(path: Path, tensors: dict[str, NDArray[Any]]) -> None:
    load("safetensors.numpy").save_file(tensors, path)


@dataclass(frozen=True)
class Served:
    """What a process has answered: a result for each job, and what it printed."""

    results: list[Any]
    printed: str
    facts: dict[str, Any] = field(default_factory=dict)


class Engine:
    """An engine in a process of its own, which runs one job after the other: engine_process.py.

    products  of PRODUCTS
    seconds   until the process is ended
    options   of vLLM's `LLM`
    """

    def __init__(
        self,
        products: str,
        model: Path,
        environment: Mapping[str, str] | None = None,
        seconds: float = 1800,
        **options: Any,
    ) -> None:
        self._lines: list[str] = []
        self._folder = tempfile.TemporaryDirectory()
        self._errors = Path(self._folder.name) / "stderr"
        with self._errors.open("w") as errors:
            self._process = self._started(products, environment or {}, errors)
        self._clock = threading.Timer(seconds, self._process.kill)
        self._clock.daemon = True
        self._clock.start()
        self._write({"model": str(model), "engine": options})

    def _started(self, products: str, environment: Mapping[str, str], errors: Any) -> Any:
        return subprocess.Popen(
            [sys.executable, "-m", "benchmarks.engine_process"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            cwd=ROOT,
            env={
                **os.environ,
                "SGMV_VLLM": "1" if products == "sgmv" else "0",
                "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1",
                "VLLM_LOGGING_LEVEL": "INFO", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1",
                **environment,
            },
        )  # fmt: skip

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_raised: object) -> None:
        self._clock.cancel()
        self._process.kill()
        with self._folder, self._process:  # waits, and closes the pipes
            pass

    def run(self, job: Job) -> Any:
        """The job's result. Raises RuntimeError with what the process printed if it fails."""
        self._write(job)
        return self._answer()

    def facts(self) -> dict[str, Any]:
        """What the process knows of itself after its last job; it ends."""
        self._process.stdin.close()
        found: dict[str, Any] = self._answer()
        if status := self._process.wait():
            raise self._failure(status)
        return found

    @property
    def printed(self) -> str:
        """All that the process has printed."""
        return "".join(self._lines) + self._errors.read_text()

    def _write(self, line: Mapping[str, Any]) -> None:
        try:
            self._process.stdin.write(json.dumps(line) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError as error:
            raise self._failure(self._process.wait()) from error

    def _answer(self) -> Any:
        for line in self._process.stdout:
            self._lines.append(line)
            if line.startswith(ANSWER):
                return json.loads(line.removeprefix(ANSWER))
        raise self._failure(self._process.wait())

    def _failure(self, status: int) -> RuntimeError:
        return RuntimeError(f"vLLM's process ended with {status}:\n{self.printed[-6000:]}")


def serve(
    products: str,
    model: Path,
    jobs: Sequence[Job],
    environment: Mapping[str, str] | None = None,
    timeout: float = 1800,
    **options: Any,
) -> Served:
    """Make an engine, and run these jobs in it.

    Raises RuntimeError with what the process printed if it fails.
    """
    with Engine(products, model, environment, timeout, **options) as engine:
        results = [engine.run(job) for job in jobs]
        facts = engine.facts()
        return Served(results, engine.printed, facts)


def widths(shape: Llama) -> dict[str, int]:
    """A shape as records hold it."""
    return asdict(shape)
