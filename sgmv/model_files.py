"""What a model's directory says of its layers: names and shapes, from headers or from its config.

*.safetensors   the header alone: each weight's name and shape, as the model has them
config.json     where there are no such files: a Llama-like model's widths, and its depth
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sgmv.errors import SgmvError
from sgmv.files import TensorFile, shown
from sgmv.peft_experts import JOINED
from sgmv.peft_names import near_names

Shape = tuple[int, ...]
_FLOATS = re.compile(r"(F|BF)\d+")


@dataclass(frozen=True)
class ModelFiles:
    """The layers of a model on disk.

    shapes  module -> its weight's shape (h_out, h_in); None where it is quantised
    ends    the same by the end of the name, where config.json alone tells
    depth   how many numbered layers there are, if config.json tells
    """

    path: Path
    shapes: Mapping[str, Shape | None]
    ends: Mapping[str, Shape]
    depth: int | None = None

    def name_of(self, module: str) -> str | None:
        """The file's name of a module: PEFT's, or without or with a part in front; None if none."""
        if self.ends:
            number = re.search(r"\.(?:layers|h|blocks)\.(\d+)\.", f".{module}")
            is_inside = not number or self.depth is None or int(number[1]) < self.depth
            return module if module.rpartition(".")[2] in self.ends and is_inside else None
        without = module.partition(".")[2]
        fronts = {name.partition(".")[0] for name in self.shapes}
        candidates = [module, without, *(f"{front}.{module}" for front in sorted(fronts))]
        return next((name for name in candidates if name in self.shapes), None)

    def problem(
        self, module: str, h_in: int, h_out: int, is_transposed: bool, experts: int = 0
    ) -> str:
        """Why a layer of an adapter does not fit; "" if it does.

        is_transposed  whether the weight is (h_in, h_out): an embedding's, or a Conv1D's
        experts        how many the layer has, if it is all experts' in one parameter
        """
        if experts:
            return self._problem_of_experts(module, h_in, h_out, experts)
        name = self.name_of(module)
        if name is None:
            end = module.rpartition(".")[2]
            near = near_names(end, self.ends) if self.ends else near_names(module, self.shapes)
            return f"the model has no {module!r}; {near}"
        shape = self.ends[name.rpartition(".")[2]] if self.ends else self.shapes[name]
        widths = (h_in, h_out) if is_transposed else (h_out, h_in)
        if shape is None or shape == widths:
            return ""
        return f"{module!r} is for a weight of shape {widths}, and the model's has {shape}"

    def _problem_of_experts(self, parameter: str, h_in: int, h_out: int, experts: int) -> str:
        """Of a parameter of all experts; on disk it is that, or a layer for each expert."""
        known = None if self.ends else self.name_of(parameter)
        if known is not None:
            shape = self.shapes[known]
            fits = [(experts, h_out, h_in), (experts, h_in, h_out)]
            if shape is None or shape in fits:
                return ""
            return f"{parameter!r} is for weights of shape {fits[0]}, and the model's has {shape}"
        place, _, name = parameter.rpartition(".")
        for parts in JOINED.get(name, ()):
            problems = [
                self.problem(f"{place}.{e}.{part}", h_in, h_out // len(parts), False)
                for e in (0, experts - 1)
                for part in parts
            ]
            if self.name_of(f"{place}.0.{parts[0]}") is not None:
                return next(filter(None, problems), "")
        near = near_names(name, self.ends) if self.ends else near_names(parameter, self.shapes)
        return f"the model has no {parameter!r}; {near}"


def model_files(directory: str) -> ModelFiles:
    """The layers of the model in a directory; raises SgmvError where there is none."""
    path = Path(directory)
    if not os.path.isdir(directory):  # which takes any text
        raise SgmvError(
            "against", "a directory of a model", repr(directory), "pass a local directory"
        )
    config = _config(path / "config.json")
    shapes = _shapes(path)
    if shapes:
        if config.get("tie_word_embeddings") and "lm_head" not in shapes:
            embedding = next((s for n, s in shapes.items() if n.endswith("embed_tokens")), None)
            shapes["lm_head"] = embedding
        return ModelFiles(path, shapes, {})
    ends = _llamas(config)
    if not ends:
        raise SgmvError(
            "against",
            "a model's safetensors files, or config.json of a Llama-like model",
            f"none in {shown(path)}",
            "pass the directory that the base model is loaded from",
        )
    return ModelFiles(path, {}, ends, config.get("num_hidden_layers"))


def _shapes(path: Path) -> dict[str, Shape | None]:
    shapes: dict[str, Shape | None] = {}
    for file in sorted(path.glob("*.safetensors")):
        if not file.is_file() or file.name.startswith("adapter"):
            continue
        try:
            with file.open("rb", buffering=0) as opened:
                entries = TensorFile(opened).entries
        except (OSError, ValueError) as error:
            raise SgmvError(
                "against", "safetensors files", f"{shown(file)} ({error})", "copy it again"
            ) from error
        for name, entry in entries.items():
            module, _, part = name.rpartition(".")
            if len(entry.shape) == 3:  # all experts in one parameter
                shapes[name.removesuffix(".weight")] = entry.shape
            elif part in ("weight", "qweight") and module:
                is_plain = len(entry.shape) == 2 and _FLOATS.fullmatch(entry.dtype)
                shapes[module] = entry.shape if is_plain and part == "weight" else None
    return shapes


def _config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        got = f"{shown(path)} ({error})"
        raise SgmvError("against", "a config.json in JSON", got, "copy it again") from error
    if not isinstance(config, dict):
        got = type(config).__name__
        raise SgmvError("against", "an object in config.json", got, "copy it again")
    inner = config.get("text_config")
    return {**config, **inner} if isinstance(inner, dict) else config


def _llamas(config: Mapping[str, Any]) -> dict[str, Shape]:
    """Shapes of the layers that Llama and its many kin have, by the ends of their names."""
    names = ("hidden_size", "intermediate_size", "num_attention_heads", "vocab_size")
    values = [config.get(name) for name in names]
    if not all(type(value) is int and value > 0 for value in values):
        return {}
    hidden, inner, heads, vocabulary = map(int, values)  # type: ignore[arg-type]
    head = config.get("head_dim") or hidden // heads
    kv = (config.get("num_key_value_heads") or heads) * head
    return {
        "q_proj": (heads * head, hidden),
        "k_proj": (kv, hidden),
        "v_proj": (kv, hidden),
        "o_proj": (hidden, heads * head),
        "gate_proj": (inner, hidden),
        "up_proj": (inner, hidden),
        "down_proj": (hidden, inner),
        "lm_head": (vocabulary, hidden),
        "embed_tokens": (vocabulary, hidden),
    }
