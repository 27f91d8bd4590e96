"""Adapters that PEFT wrote to disk, read without torch and without PEFT.

A directory holds `adapter_config.json` (rank, alpha, options) and `adapter_model.safetensors` with
two tensors per adapted layer:

    base_model.model.<module>.lora_A.weight   A (r, h_in)
    base_model.model.<module>.lora_B.weight   B (h_out, r)

Whatever would make PEFT compute something else than `y + scaling * (x @ A.T) @ B.T` is refused by
name, never ignored.
"""

from __future__ import annotations

import difflib
import json
import math
import os
import re
import sys
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from sgmv.adapters import Adapter
from sgmv.errors import PeftError

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"

_TENSOR_PREFIX = "base_model.model."
_FLOAT_TYPES = ("F32", "F16", "BF16", "F64")
_MERGE = "run it with PEFT, or merge it into the base weights where PEFT can (merge_and_unload)"
_INSTALL = "pip install safetensors ml_dtypes"

# Options that are read here, and options that leave the delta as it is.
_KNOWN_OPTIONS = (
    {"peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora"}
    | {"bias", "init_lora_weights", "fan_in_fan_out"}
    | {"peft_version", "auto_mapping", "base_model_name_or_path", "revision", "task_type"}
    # Which modules were adapted: the tensors say that themselves.
    | {"target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"}
    | {"ensure_weight_tying"}
    # How it was trained, or is to be run by PEFT.
    | {"lora_dropout", "velora_config", "inference_mode", "runtime_config", "merge_weights"}
    # Settings of what init_lora_weights, megatron_config and use_qalora switch on.
    | {"loftq_config", "eva_config", "corda_config", "lora_ga_config"}
    | {"megatron_core", "qalora_group_size"}
)

_REFUSED_OPTIONS = {
    "use_dora": "DoRA rescales every output by a learned magnitude",
    "lora_bias": "adds a bias to B",
    "use_qalora": "QALoRA pools x in groups before A",
    "alora_invocation_tokens": "aLoRA acts only on the tokens after its invocation",
    "use_bdlora": "BD-LoRA makes A or B block diagonal",
    "arrow_config": "Arrow routes each token among several adapters",
    "kasa_config": "KaSA changes the base weight and puts a diagonal between A and B",
    "monteclora_config": "MonteCLoRA adds sampled perturbations to A and B",
    "modules_to_save": "replaces whole layers of the base model",
    "trainable_token_indices": "replaces rows of the base model's embedding",
    "layer_replication": "repeats layers of the base model, so that module names mean others",
    "target_parameters": "keeps the factors of all experts of a parameter in one matrix",
    "megatron_config": "Megatron may hold only a shard of each layer",
}

# Any other way to initialise (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA) also changes the base weight.
_HARMLESS_INITS = (None, True, False, "gaussian", "eva", "orthogonal", "mica")


def load_peft(directory: str | os.PathLike[str]) -> dict[str, Adapter]:
    """Read every adapted layer of a directory that PEFT's `save_pretrained` wrote.

    Semantics: `{module: Adapter(A, B, scaling)}`, where
        scaling = alpha / r, or alpha / sqrt(r) with use_rslora;
        r, alpha = those of the first key in rank_pattern, alpha_pattern that matches the module,
        else the config's r, lora_alpha. A key is a regular expression for the module's whole name
        or its end after a dot; with "^" in front, for the whole name alone.

    directory  local path; holds adapter_config.json and adapter_model.safetensors
    module     the layer's name in the base model, as in "model.layers.0.self_attn.q_proj"
    A (r, h_in), B (h_out, r)  as on disk: float32, float16, ml_dtypes.bfloat16 or float64

    fan_in_fan_out says that the base layer keeps its weight as (h_in, h_out), as GPT-2's Conv1D
    does. PEFT writes A and B alike in both cases; pass that layer's weight as `W = weight.T`.

    Raises PeftError: a file is missing or damaged; config and tensors disagree; the adapter is
    more than plain LoRA (DoRA, biases, other peft types, changed base weights); an option is
    unknown; safetensors, or ml_dtypes for bfloat16, is not installed.
    Source: peft 0.21, LoraConfig, get_pattern_key, LoraLayer.update_layer; rsLoRA (arXiv
    2312.03732).

    >>> import json, pathlib, tempfile
    >>> import numpy as np
    >>> from safetensors.numpy import save_file
    >>> scratch = tempfile.TemporaryDirectory()
    >>> directory = pathlib.Path(scratch.name)
    >>> config = {"peft_type": "LORA", "r": 2, "lora_alpha": 8}
    >>> _ = (directory / "adapter_config.json").write_text(json.dumps(config))
    >>> A, B = np.ones((2, 3), "float32"), np.ones((5, 2), "float32")
    >>> name = "base_model.model.mlp.up_proj"
    >>> tensors = {f"{name}.lora_A.weight": A, f"{name}.lora_B.weight": B}
    >>> save_file(tensors, directory / "adapter_model.safetensors")
    >>> load_peft(directory)
    {'mlp.up_proj': Adapter(r=2, h_in=3, h_out=5, float32, scaling=4.0)}
    >>> scratch.cleanup()
    """
    config, weights = _open(directory)
    return {module: _read(weights, module, config) for module in weights.modules}


def read_adapter(directory: str | os.PathLike[str], module: str) -> Adapter:
    """Read one adapted layer; the others stay on disk.

    Semantics: `load_peft(directory)[module]`.

    directory, module  as in `load_peft`; the module's exact name
    A (r, h_in), B (h_out, r)  in the type on disk

    Raises PeftError as `load_peft`, and for a module that the adapter does not change, with near
    names. Source: as `load_peft`.

    >>> read_adapter("no-such-place", "model.layers.0.mlp.up_proj")
    Traceback (most recent call last):
    sgmv.errors.PeftError: directory: expected a PEFT adapter directory, got no-such-place \
(no such directory); pass a local directory that save_pretrained wrote (nothing is downloaded)
    """
    config, weights = _open(directory)
    if module not in weights.modules:
        expected = f"a layer that the adapter in {directory} changes"
        raise PeftError("module", expected, repr(module), near_names(str(module), weights.modules))
    return _read(weights, module, config)


def _open(directory: str | os.PathLike[str]) -> tuple[_Config, _Weights]:
    expected = "a PEFT adapter directory"
    remedy = "pass a local directory that save_pretrained wrote (nothing is downloaded)"
    if not isinstance(directory, (str, os.PathLike)):
        raise PeftError("directory", expected, type(directory).__name__, remedy)
    path = Path(directory)
    if not path.is_dir():
        got = "a file" if path.exists() else "no such directory"
        raise PeftError("directory", expected, f"{path} ({got})", remedy)
    return _Config(path / CONFIG_FILE), _Weights(path / WEIGHTS_FILE)


class _Config:
    """What `adapter_config.json` says about ranks and scalings, once nothing in it is refused."""

    def __init__(self, path: Path) -> None:
        self.path = path
        options = _read_json(path)
        self._refuse(options)
        self._default_rank = options.get("r")
        self._default_alpha = options.get("lora_alpha")
        self._ranks = self._pattern(options, "rank_pattern")
        self._alphas = self._pattern(options, "alpha_pattern")
        self._use_rslora = bool(options.get("use_rslora"))

    def rank(self, module: str) -> int:
        rank = _match(self._ranks, module, self._default_rank)
        if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
            raise self._bad_value("r, rank_pattern", "a positive integer", module, rank)
        return rank

    def scaling(self, module: str) -> float:
        alpha = _match(self._alphas, module, self._default_alpha)
        is_number = isinstance(alpha, (int, float)) and not isinstance(alpha, bool)
        if not is_number or not abs(alpha) <= sys.float_info.max:
            raise self._bad_value("lora_alpha, alpha_pattern", "a finite number", module, alpha)
        rank = self.rank(module)
        return float(alpha / (math.sqrt(rank) if self._use_rslora else rank))

    def _bad_value(self, option: str, expected: str, module: str, got: object) -> PeftError:
        return PeftError(option, f"{expected} for {module!r}", repr(got), f"correct {self.path}")

    def _pattern(self, options: Mapping[str, Any], name: str) -> Mapping[str, Any]:
        pattern = options.get(name) or {}
        remedy = f"correct {self.path}"
        if not isinstance(pattern, dict):
            raise PeftError(name, "an object of pattern: value", repr(pattern), remedy)
        for key in pattern:
            try:
                _expression(key)
            except re.error as error:
                raise PeftError(
                    name, "regular expressions", f"{key!r} ({error})", remedy
                ) from error
        return pattern

    def _refuse(self, options: Mapping[str, Any]) -> None:
        peft_type = options.get("peft_type")
        if peft_type != "LORA":
            raise PeftError("peft_type", "'LORA'", repr(peft_type), _MERGE)
        for name, why in _REFUSED_OPTIONS.items():
            if options.get(name):
                got = f"{name}={_short(options[name])} ({why})"
                raise PeftError(name, "plain LoRA", got, _MERGE)
        bias = options.get("bias", "none")
        if bias != "none":
            got = f"bias={bias!r} (replaces biases of the base model)"
            raise PeftError("bias", "'none'", got, _MERGE)
        self._refuse_init(options.get("init_lora_weights"))
        known = _KNOWN_OPTIONS | _REFUSED_OPTIONS.keys()
        unknown = {name: value for name, value in options.items() if value and name not in known}
        if unknown:
            got = ", ".join(f"{name}={_short(value)}" for name, value in unknown.items())
            remedy = "if an option does not change the adapter's output, take it out of the file"
            raise PeftError(str(self.path), "options known to sgmv", got, remedy)

    @staticmethod
    def _refuse_init(init: object) -> None:
        if (init.lower() if isinstance(init, str) else init) not in _HARMLESS_INITS:
            raise PeftError(
                "init_lora_weights",
                "an initialisation that leaves the base weights alone",
                f"{init!r} (the adapter belongs to changed base weights)",
                "save it with PEFT's path_initial_model_for_weight_conversion, or " + _MERGE,
            )


class _Weights:
    """The tensors of `adapter_model.safetensors`: names and shapes now, values when asked."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = _open_safetensors(path)
        self.modules = self._pair(sorted(self._file.keys()))

    def header(self, name: str) -> tuple[tuple[int, ...], str]:
        view = self._file.get_slice(name)
        return tuple(view.get_shape()), view.get_dtype()

    def tensor(self, name: str) -> Any:
        return self._file.get_tensor(name)

    def _pair(self, names: list[str]) -> tuple[str, ...]:
        halves: dict[str, set[str]] = {}
        others = []
        for name in names:
            match = re.fullmatch(rf"{re.escape(_TENSOR_PREFIX)}(.+)\.lora_([AB])\.weight", name)
            if match:
                halves.setdefault(match[1], set()).add(match[2])
            else:
                others.append(name)
        if others:
            got = f"{_few(others)} ({_what_is(others[0])})"
            raise PeftError(str(self.path), f"only {_TENSOR_PREFIX}<module>.lora_A/B", got, _MERGE)
        for module, found in halves.items():
            if len(found) == 1:
                (half,) = found
                got = f"lora_{half} alone"
                raise PeftError(
                    str(self.path), f"lora_A and lora_B of {module}", got, "save it again"
                )
        if not halves:
            remedy = "check target_modules: this adapter changes nothing"
            raise PeftError(str(self.path), "LoRA tensors", "none", remedy)
        return tuple(halves)


def _read(weights: _Weights, module: str, config: _Config) -> Adapter:
    names = [f"{_TENSOR_PREFIX}{module}.lora_{half}.weight" for half in "AB"]
    (shape_a, type_a), (shape_b, type_b) = (weights.header(name) for name in names)
    rank = config.rank(module)
    shapes = f"lora_A {shape_a} and lora_B {shape_b}"
    if len(shape_a) != 2 or len(shape_b) != 2:
        got = f"{shapes} (a convolution's or an expert stack's)"
        raise PeftError(module, "a linear layer's A (r, h_in) and B (h_out, r)", got, _MERGE)
    if shape_a[0] != rank or shape_b[1] != rank:
        expected = f"A ({rank}, h_in) and B (h_out, {rank}), as {config.path.name} says"
        raise PeftError(module, expected, shapes, "take config and tensors from the same save")
    if type_a != type_b or type_a not in _FLOAT_TYPES:
        got = f"lora_A {type_a} and lora_B {type_b}"
        raise PeftError(module, f"one of {', '.join(_FLOAT_TYPES)} for both", got, "save it again")
    if type_a == "BF16":
        _need_bfloat16(module)
    A, B = (weights.tensor(name) for name in names)
    return Adapter(A, B, scaling=config.scaling(module))


def _match(pattern: Mapping[str, Any], module: str, default: Any) -> Any:
    for key, value in pattern.items():
        if _expression(key).match(module):
            return value
    return pattern.get(module, default)


def _expression(key: str) -> re.Pattern[str]:
    # PEFT's rule: the key is the module's whole name, or its end after a dot.
    return re.compile(rf"(.*\.)?({key})$")


def _read_json(path: Path) -> Mapping[str, Any]:
    remedy = "copy the whole directory that save_pretrained wrote"
    try:
        options = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise PeftError("directory", path.name, f"{path} ({error.strerror})", remedy) from error
    except ValueError as error:
        raise PeftError(str(path), "JSON", f"damaged text ({error})", remedy) from error
    if not isinstance(options, dict):
        raise PeftError(str(path), "a JSON object", type(options).__name__, remedy)
    return options


def _open_safetensors(path: Path) -> Any:
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise PeftError("safetensors", "an installed package", "none", _INSTALL) from error
    if not path.is_file():
        pickled = path.with_suffix(".bin")
        if pickled.exists():
            remedy = "load it with PEFT and save_pretrained(..., safe_serialization=True)"
            raise PeftError(
                "directory", path.name, f"{pickled} (a pickle, which can run code)", remedy
            )
        remedy = "copy the whole directory that save_pretrained wrote"
        raise PeftError("directory", path.name, f"{path} (no such file)", remedy)
    try:
        return safe_open(str(path), framework="numpy")
    except (SafetensorError, OSError) as error:
        remedy = "copy or save it again"
        raise PeftError(
            str(path), "a safetensors file", f"damaged data ({error})", remedy
        ) from error


def _need_bfloat16(module: str) -> None:
    try:
        import ml_dtypes  # noqa: F401  (importing it teaches numpy the type's name)
    except ImportError as error:
        raise PeftError(module, "ml_dtypes, to hold bfloat16", "none", _INSTALL) from error


def _what_is(name: str) -> str:
    if "lora_magnitude_vector" in name:
        return "DoRA's magnitudes"
    if "lora_embedding_" in name:
        return "an embedding's adapter"
    if name.endswith(".bias"):
        return "a bias"
    if ".lora_" in name:
        return "not plain LoRA"
    return "a weight of the base model, or another method's"


def near_names(module: str, modules: Collection[str]) -> str:
    """What to do about a module that none of these is: those whose names are near, or the first."""

    def same_end(name: str) -> bool:
        return name.endswith("." + module) or module.endswith("." + name)

    same = [name for name in modules if same_end(name)]
    alike = difflib.get_close_matches(module, modules, n=5, cutoff=0.6)
    near = list(dict.fromkeys(same + alike))
    if near:
        return f"did you mean {_few(near)}?"
    return f"there are {_few(list(modules))}" if modules else "there are none"


def _few(names: list[str], limit: int = 5) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(repr(name) for name in names[:limit]) + more


def _short(value: object, limit: int = 60) -> str:
    text = json.dumps(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."
