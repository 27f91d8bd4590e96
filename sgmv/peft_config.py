"""`adapter_config.json`: the rank and the scaling of each layer, once no option is refused.

Whatever would make PEFT compute something else than `y + scaling * (x @ A.T) @ B.T`, or DoRA of it,
is refused by name. An option that PEFT does not have is none of those: PEFT passes over it, too.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sgmv.errors import PeftError
from sgmv.files import shown
from sgmv.peft_names import MERGE

# Options that are read here, and options that leave the delta as it is.
_KNOWN_OPTIONS = (
    {"peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora"}
    | {"bias", "init_lora_weights", "fan_in_fan_out", "modules_to_save"}
    | {"peft_version", "auto_mapping", "base_model_name_or_path", "revision", "task_type"}
    # Which modules were adapted: the tensors say that themselves.
    | {"target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"}
    | {"ensure_weight_tying", "target_parameters"}
    # How it was trained, or is to be run by PEFT.
    | {"lora_dropout", "velora_config", "inference_mode", "runtime_config", "merge_weights"}
    # Settings of what init_lora_weights, megatron_config and use_qalora switch on.
    | {"loftq_config", "eva_config", "corda_config", "lora_ga_config"}
    | {"megatron_core", "qalora_group_size"}
)

_REFUSED_OPTIONS = {
    "lora_bias": "adds a bias to B",
    "use_qalora": "QALoRA pools x in groups before A",
    "alora_invocation_tokens": "aLoRA acts only on the tokens after its invocation",
    "use_bdlora": "BD-LoRA makes A or B block diagonal",
    "arrow_config": "Arrow routes each token among several adapters",
    "kasa_config": "KaSA changes the base weight and puts a diagonal between A and B",
    "monteclora_config": "MonteCLoRA adds sampled perturbations to A and B",
    "trainable_token_indices": "replaces rows of the base model's embedding",
    "layer_replication": "repeats layers of the base model, so that module names mean others",
    "megatron_config": "Megatron may hold only a shard of each layer",
}

# Any other way to initialise (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA) also changes the base weight.
_HARMLESS_INITS = (None, True, False, "gaussian", "eva", "orthogonal", "mica")


class Config:
    """What a config of PEFT's says about ranks and scalings, once nothing in it is refused.

    path     the file, for messages; name, its last part
    unknown  the options that are set and that PEFT does not have, for a warning
    is_dora  use_dora: layers have magnitudes
    to_save  modules_to_save: ends of the names of modules that the adapter replaces
    targets  target_parameters: ends of the names of parameters, of experts say
    """

    def __init__(self, path: Path, options: Mapping[str, Any]) -> None:
        self.path, self.name, self.options = path, path.name, options
        self._refuse(options)
        self.to_save = self._names(options, "modules_to_save")
        self.targets = self._names(options, "target_parameters")
        self._default_rank = options.get("r")
        self._default_alpha = options.get("lora_alpha")
        self._ranks = self._pattern(options, "rank_pattern")
        self._alphas = self._pattern(options, "alpha_pattern")
        self._use_rslora = bool(options.get("use_rslora"))
        self.is_dora = bool(options.get("use_dora"))
        known = _KNOWN_OPTIONS | _REFUSED_OPTIONS.keys()
        unknown = {name: value for name, value in options.items() if value and name not in known}
        self.unknown = ", ".join(f"{name}={short(value)}" for name, value in unknown.items())

    def rank(self, module: str, saved: str, _shape: int) -> int:
        """Of a module, which its file may call otherwise: `saved`."""
        rank = self._match("rank_pattern", self._ranks, module, saved, self._default_rank)
        if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
            raise self._bad_value("r, rank_pattern", "a positive integer", module, rank)
        return rank

    def alpha(self, module: str, saved: str) -> float:
        """lora_alpha of a module."""
        alpha = self._match("alpha_pattern", self._alphas, module, saved, self._default_alpha)
        is_number = isinstance(alpha, (int, float)) and not isinstance(alpha, bool)
        if not is_number or not abs(alpha) <= sys.float_info.max:
            raise self._bad_value("lora_alpha, alpha_pattern", "a finite number", module, alpha)
        return float(alpha)

    def scaling(self, module: str, saved: str, shape: int) -> float:
        """What the product of a module is multiplied by."""
        rank = self.rank(module, saved, shape)
        return self.alpha(module, saved) / (math.sqrt(rank) if self._use_rslora else rank)

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

    def _names(self, options: Mapping[str, Any], name: str) -> tuple[str, ...]:
        values = options.get(name) or ()
        if not isinstance(values, list | tuple) or not all(isinstance(v, str) for v in values):
            raise self._error(name, "a list of names", short(values), "correct the file")
        return tuple(values)

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
            raise self._error("peft_type", "'LORA'", repr(peft_type), MERGE)
        for name, why in _REFUSED_OPTIONS.items():
            if options.get(name):
                got = f"{name}={short(options[name])} ({why})"
                raise self._error(name, "plain LoRA", got, MERGE)
        bias = options.get("bias", "none")
        if bias != "none":
            got = f"bias={bias!r} (replaces biases of the base model)"
            raise self._error("bias", "'none'", got, MERGE)
        init = options.get("init_lora_weights")
        if (init.lower() if isinstance(init, str) else init) not in _HARMLESS_INITS:
            raise self._error(
                "init_lora_weights",
                "an initialisation that leaves the base weights alone",
                f"{init!r} (the adapter belongs to changed base weights)",
                "save it with PEFT's path_initial_model_for_weight_conversion, or " + MERGE,
            )


def _match(pattern: Mapping[str, Any], module: str, default: Any) -> Any:
    for key, value in pattern.items():
        if _expression(key).match(module):
            return value
    return pattern.get(module, default)


def _expression(key: str) -> re.Pattern[str]:
    # PEFT's rule: the key is the module's whole name, or its end after a dot.
    return re.compile(rf"(.*\.)?({key})$")


def short(value: object, limit: int = 60) -> str:
    """A value of a config, for a message."""
    text = json.dumps(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."
