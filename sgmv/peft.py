"""Adapters that PEFT wrote to disk, read without torch and without PEFT.

A directory holds `adapter_config.json` (rank, alpha, options) and `adapter_model.safetensors` with
two tensors per adapted layer:

    base_model.model.<module>.lora_A.weight   A (r, h_in)
    base_model.model.<module>.lora_B.weight   B (h_out, r)

What wrappers add to names (torch.compile, FSDP, DDP, checkpointing, a PeftModel in a PeftModel) is
taken away; a name without the prefix, or with the adapter's own name after lora_A, is read alike.

Another process may write there meanwhile: what is returned is one version of both files.

Whatever would make PEFT compute something else than `y + scaling * (x @ A.T) @ B.T` is refused by
name, never ignored.
"""

from __future__ import annotations

import difflib
import json
import math
import os
import re
import stat
import sys
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from sgmv import forms
from sgmv.dtypes import Array
from sgmv.errors import PeftError
from sgmv.extras import load
from sgmv.files import Opened, TensorFile, beginning, existing, one_version, read_text, shown

_TENSOR_PREFIX = "base_model.model."
_TENSOR = re.compile(r"(?P<module>.+)\.lora_(?P<half>[AB])(?:\.(?P<adapter>[^.]+))?\.weight")
_WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
_PREFIXES = re.compile(r"^(?:base_model\.model\.|module\.(?!lora_))+")
_FLOAT_TYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64"}
_MERGE = "run it with PEFT, or merge it into the base weights where PEFT can (merge_and_unload)"
_SHARD = (
    "a rank's part, or nothing, as DeepSpeed ZeRO-3 and FSDP leave it",
    "gather the parameters before saving: stage3_gather_16bit_weights_on_model_save with ZeRO-3, "
    "a full state dict with FSDP",
)
_INSTALL = "pip install ml_dtypes"
_LOCAL = "pass a local directory that save_pretrained wrote (nothing is downloaded)"
Parts = tuple[Array, Array, float]  # A (r, h_in), B (h_out, r), scaling
_PathLike = str | bytes | os.PathLike[str] | os.PathLike[bytes]

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


def read_modules(directory: _PathLike) -> dict[str, Parts]:
    """Every adapted layer of a directory, by the module's name; see `load_peft` in adapter.py."""
    return _load(directory, lambda weights: weights.modules)


def read_module(directory: _PathLike, module: str) -> Parts:
    """One adapted layer; the others stay on disk."""

    def pick(weights: _Weights) -> list[str]:
        if module not in tuple(weights.modules):  # it need not be hashable
            expected = f"a layer that the adapter in {shown(weights.path.parent)} changes"
            remedy = near_names(str(module), weights.modules)
            raise PeftError("module", expected, repr(module), remedy)
        return [module]

    return _load(directory, pick)[module]


def _load(directory: object, pick: Callable[[_Weights], Iterable[str]]) -> dict[str, Parts]:
    path = _path(directory)

    def read(config_file: Opened, weights_file: Opened) -> dict[str, Parts]:
        _check_is_directory(path)
        config = _Config(path / forms.CONFIG_FILE, config_file)
        weights = _Weights(path / forms.WEIGHTS_FILE, weights_file)
        return {module: _read(weights, module, config) for module in pick(weights)}

    return one_version(path, [forms.CONFIG_FILE, forms.WEIGHTS_FILE], read)


def _path(directory: object) -> Path:
    expected = "a PEFT adapter directory"
    if not isinstance(directory, (str, bytes, os.PathLike)):
        raise PeftError("directory", expected, type(directory).__name__, _LOCAL)
    name = os.fsdecode(directory)
    if not name or "\0" in name:
        raise PeftError("directory", expected, f"{name!r} (no path)", _LOCAL)
    return Path(name)


def _check_is_directory(path: Path) -> None:
    try:
        mode = path.stat().st_mode
    except OSError as error:
        missing = isinstance(error, FileNotFoundError)
        got = f"{shown(path)} ({'no such directory' if missing else error.strerror})"
        raise PeftError("directory", "a PEFT adapter directory", got, _LOCAL) from error
    if not stat.S_ISDIR(mode):
        got = f"{shown(path)} ({'a file' if stat.S_ISREG(mode) else 'not a directory'})"
        raise PeftError("directory", "a PEFT adapter directory", got, _LOCAL)


class _Config:
    """What `adapter_config.json` says about ranks and scalings, once nothing in it is refused."""

    def __init__(self, path: Path, file: Opened) -> None:
        self.path = path
        options = _read_json(path, file)
        self._refuse(options)
        self._default_rank = options.get("r")
        self._default_alpha = options.get("lora_alpha")
        self._ranks = self._pattern(options, "rank_pattern")
        self._alphas = self._pattern(options, "alpha_pattern")
        self._use_rslora = bool(options.get("use_rslora"))

    def rank(self, module: str, saved: str) -> int:
        """Of a module, which its file may call otherwise: `saved`."""
        rank = self._match("rank_pattern", self._ranks, module, saved, self._default_rank)
        if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
            raise self._bad_value("r, rank_pattern", "a positive integer", module, rank)
        return rank

    def scaling(self, module: str, saved: str) -> float:
        alpha = self._match("alpha_pattern", self._alphas, module, saved, self._default_alpha)
        is_number = isinstance(alpha, (int, float)) and not isinstance(alpha, bool)
        if not is_number or not abs(alpha) <= sys.float_info.max:
            raise self._bad_value("lora_alpha, alpha_pattern", "a finite number", module, alpha)
        rank = self.rank(module, saved)
        return float(alpha / (math.sqrt(rank) if self._use_rslora else rank))

    def _match(
        self, option: str, pattern: Mapping[str, Any], module: str, saved: str, default: Any
    ) -> Any:
        """Which name PEFT saw depends on which wrapper came first, its own or the other."""
        value, other = (_match(pattern, name, default) for name in (module, saved))
        if value is not other and value != other:
            expected = f"one value for {module!r} and {saved!r}, as its file calls it"
            remedy = "change the keys that match one of these names alone"
            raise self._error(option, expected, f"{value!r} and {other!r}", remedy)
        return value

    def _bad_value(self, option: str, expected: str, module: str, got: object) -> PeftError:
        return self._error(option, f"{expected} for {module!r}", repr(got), "correct the file")

    def _error(self, option: str, expected: str, got: str, remedy: str) -> PeftError:
        return PeftError(f"{option} in {shown(self.path)}", expected, got, remedy)

    def _pattern(self, options: Mapping[str, Any], name: str) -> Mapping[str, Any]:
        pattern = options.get(name) or {}
        remedy = "correct the file"
        if not isinstance(pattern, dict):
            raise self._error(name, "an object of pattern: value", repr(pattern), remedy)
        for key in pattern:
            try:
                _expression(key)
            except (re.error, OverflowError, RecursionError) as error:
                raise self._error(
                    name, "regular expressions", f"{key!r} ({error})", remedy
                ) from error
        return pattern

    def _refuse(self, options: Mapping[str, Any]) -> None:
        peft_type = options.get("peft_type")
        if peft_type != "LORA":
            raise self._error("peft_type", "'LORA'", repr(peft_type), _MERGE)
        for name, why in _REFUSED_OPTIONS.items():
            if options.get(name):
                got = f"{name}={_short(options[name])} ({why})"
                raise self._error(name, "plain LoRA", got, _MERGE)
        bias = options.get("bias", "none")
        if bias != "none":
            got = f"bias={bias!r} (replaces biases of the base model)"
            raise self._error("bias", "'none'", got, _MERGE)
        self._refuse_init(options.get("init_lora_weights"))
        known = _KNOWN_OPTIONS | _REFUSED_OPTIONS.keys()
        unknown = {name: value for name, value in options.items() if value and name not in known}
        if unknown:
            got = ", ".join(f"{name}={_short(value)}" for name, value in unknown.items())
            remedy = "if an option does not change the adapter's output, take it out of the file"
            raise PeftError(shown(self.path), "options known to sgmv", got, remedy)

    def _refuse_init(self, init: object) -> None:
        if (init.lower() if isinstance(init, str) else init) not in _HARMLESS_INITS:
            raise self._error(
                "init_lora_weights",
                "an initialisation that leaves the base weights alone",
                f"{init!r} (the adapter belongs to changed base weights)",
                "save it with PEFT's path_initial_model_for_weight_conversion, or " + _MERGE,
            )


class _Weights:
    """The tensors of `adapter_model.safetensors`: names and shapes now, values when asked."""

    def __init__(self, path: Path, file: Opened) -> None:
        self.path = path
        self.opened = file
        self.file = _tensor_file(path, file)
        self.modules = self._pair(sorted(self.file.entries))

    def tensor(self, name: str, dtype: str) -> Any:
        try:
            return self.file.tensor(name, dtype)
        except (OSError, ValueError) as error:
            raise _damaged(self.path, "a safetensors file", error, self.opened) from error

    def _pair(self, names: list[str]) -> dict[str, dict[str, str]]:
        """Of each module, the names of the tensors A and B."""
        modules: dict[str, dict[str, str]] = {}
        adapters, unmatched = set(), []
        for name in names:
            match = _TENSOR.fullmatch(_unwrapped(name))
            if not match:
                unmatched.append(name)
                continue
            adapters.add(match["adapter"])
            halves = modules.setdefault(match["module"], {})
            first = halves.setdefault(match["half"], name)
            if first != name and len(adapters) == 1:
                expected = f"one lora_{match['half']} of {shown(match['module'])}"
                got = _few([first, name])
                raise PeftError(shown(self.path), expected, got, "save one of them alone")
        if unmatched:
            # A base weight is saved beside an embedding's adapter, and is not why that is refused.
            cause = min(unmatched, key=lambda name: ".base_layer." in name)
            what, remedy = _what_is(cause)
            expected = f"only {_TENSOR_PREFIX}<module>.lora_A/B"
            raise PeftError(shown(self.path), expected, f"{_few(unmatched)} ({what})", remedy)
        if len(adapters) > 1:
            got = _few(sorted(f"lora_A.{name}" if name else "lora_A" for name in adapters))
            raise PeftError(
                shown(self.path),
                "one adapter's tensors",
                f"those of several: {got}",
                "save each with save_pretrained(..., selected_adapters=[name])",
            )
        for module, halves in modules.items():
            if len(halves) == 1:
                (half,) = halves
                got = f"lora_{half} alone"
                raise PeftError(
                    shown(self.path), f"lora_A and lora_B of {shown(module)}", got, "save it again"
                )
        if not modules:
            raise PeftError(
                shown(self.path),
                "LoRA tensors",
                "none: a header without data, as is saved from an empty state dict",
                "check target_modules, and save the PeftModel itself, with its own state dict",
            )
        return modules


def _unwrapped(name: str) -> str:
    """A tensor's name without PEFT's prefix and without what wrappers add."""
    name = ".".join(part for part in name.split(".") if part not in _WRAPPERS)
    return _PREFIXES.sub("", name)


def _read(weights: _Weights, module: str, config: _Config) -> Parts:
    names = [weights.modules[module][half] for half in "AB"]
    saved = names[0].rpartition(".lora_A")[0]
    saved = saved.partition(_TENSOR_PREFIX)[2] or saved
    (type_a, shape_a, *_), (type_b, shape_b, *_) = (weights.file.entries[name] for name in names)
    source = f"{shown(module)} in {shown(weights.path)}"
    rank = config.rank(module, saved)
    shapes = f"lora_A {shape_a} and lora_B {shape_b}"
    if len(shape_a) != 2 or len(shape_b) != 2 or 0 in shape_a + shape_b:
        is_shard = any(len(shape) < 2 or 0 in shape for shape in (shape_a, shape_b))
        what, remedy = _SHARD if is_shard else ("a convolution's or an expert stack's", _MERGE)
        expected = "a linear layer's A (r, h_in) and B (h_out, r)"
        raise PeftError(source, expected, f"{shapes} ({what})", remedy)
    if shape_a[0] != rank or shape_b[1] != rank:
        expected = f"A ({rank}, h_in) and B (h_out, {rank}), as {config.path.name} says"
        raise PeftError(source, expected, shapes, "take config and tensors from the same save")
    if type_a != type_b or type_a not in _FLOAT_TYPES:
        got = f"lora_A {type_a} and lora_B {type_b}"
        raise PeftError(source, f"one of {', '.join(_FLOAT_TYPES)} for both", got, "save it again")
    if type_a == "BF16":
        _need_bfloat16(source)
    A, B = (weights.tensor(name, _FLOAT_TYPES[type_a]) for name in names)
    return A, B, config.scaling(module, saved)


def _match(pattern: Mapping[str, Any], module: str, default: Any) -> Any:
    for key, value in pattern.items():
        if _expression(key).match(module):
            return value
    return pattern.get(module, default)


def _expression(key: str) -> re.Pattern[str]:
    # PEFT's rule: the key is the module's whole name, or its end after a dot.
    return re.compile(rf"(.*\.)?({key})$")


def _read_json(path: Path, file: Opened) -> Mapping[str, Any]:
    try:
        options = json.loads(read_text(existing(file)).decode("utf-8"))
    except FileNotFoundError as error:
        got, remedy = forms.without_config(path.parent)
        raise PeftError("directory", path.name, got, remedy) from error
    except (OSError, ValueError, RecursionError) as error:
        raise _damaged(path, "JSON", error, file) from error
    if not isinstance(options, dict):
        raise PeftError(shown(path), "a JSON object", type(options).__name__, forms.COPY)
    return options


def _tensor_file(path: Path, file: Opened) -> TensorFile:
    try:
        return TensorFile(existing(file))
    except FileNotFoundError as error:
        got, remedy = forms.without_weights(path.parent)
        raise PeftError("directory", path.name, got, remedy) from error
    except (OSError, ValueError) as error:
        raise _damaged(path, "a safetensors file", error, file) from error


def _damaged(path: Path, expected: str, error: Exception, file: Opened) -> PeftError:
    if not isinstance(error, OSError):
        try:
            start = beginning(existing(file))
        except OSError as caught:
            error = caught
        else:
            remedy = "copy or save it again; if it is being written, try again"
            what = forms.of_start(start) or (f"damaged data ({error})", remedy)
            return PeftError(shown(path), expected, *what)
    got = error.strerror or str(error)
    return PeftError(shown(path), expected, got, "try again, or copy the file again")


def _need_bfloat16(source: str) -> None:
    try:
        load("ml_dtypes")  # which teaches numpy the type's name
    except ImportError as error:
        raise PeftError(source, "ml_dtypes, to hold bfloat16", "none", _INSTALL) from error


def _what_is(name: str) -> tuple[str, str]:
    """A tensor that is not plain LoRA's, and what to do about it."""
    if "lora_magnitude_vector" in name:
        return "DoRA's magnitudes", _MERGE
    if "lora_embedding_" in name:
        return "an embedding's adapter", _MERGE
    if name.endswith(".bias"):
        return "a bias", _MERGE
    if name.endswith(".base_layer.weight"):
        what = (
            "a weight of the base model, saved because the adapter changes that embedding or head"
        )
        return what, (
            "if it is the base model's own, save the adapter without it: "
            "save_pretrained(..., save_embedding_layers=False)"
        )
    if ".lora_" in name:
        return "not plain LoRA", _MERGE
    return "a weight of the base model, or another method's", _MERGE


def near_names(module: str, modules: Collection[str]) -> str:
    """A remedy for a module that is not in `modules`: those of near names, or the first few."""

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
