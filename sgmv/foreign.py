"""Adapters in the forms of other libraries than PEFT: the same two factors, under other names.

    MLX        adapter_config.json, adapters.safetensors
               <module>.lora_a (h_in, r), <module>.lora_b (r, h_out)
    diffusers  pytorch_lora_weights.safetensors
               <component>.<module>.lora_A.weight as PEFT, or as before it .lora.down.weight

Source: mlx_lm/tuner/lora.py and utils.py, `load_adapters`; diffusers, utils/state_dict_utils.py and
utils/peft_utils.py, `get_peft_kwargs`.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from sgmv import forms
from sgmv.errors import PeftError
from sgmv.files import shown
from sgmv.peft_config import Config, short
from sgmv.peft_names import MERGE, VOCABULARY, Names, few, sorted_out
from sgmv.peft_tensors import Tensors

_FUSE = "fuse it into the model with mlx_lm.fuse"
_LORA = re.compile(r"(?P<module>.+)\.lora_(?P<half>[ab])")
# diffusers' older names: those of the text encoders' layers differ from those of the others.
_HALVES = {"down": "A", "up": "B"}
_OLDEST = re.compile(r"\.to_(q|k|v|out)_lora\.(down|up)\.weight$")
_OLDER = re.compile(r"\.(?:lora|lora_linear_layer)\.(down|up)\.weight$")


class Scalings(Protocol):
    """What a config says of a layer.

    module, saved  its name, and the name that it has in the file
    shape          the rank that its A has
    """

    name: str  # of the file
    unknown: str  # options that are set and mean nothing

    def rank(self, module: str, saved: str, shape: int) -> int:
        """The rank that the layer should have."""

    def scaling(self, module: str, saved: str, shape: int) -> float:
        """What its product is multiplied by."""


class OpenAdapter(NamedTuple):
    """An adapter of which names, shapes and types are known, and values can be read."""

    form: str  # the library that wrote it
    config: Scalings
    tensors: Tensors
    names: Names
    is_transposed: bool = False  # whether A and B are stored as A.T and B.T


def is_mlx(options: Mapping[str, Any]) -> bool:
    """Whether a config is one of mlx_lm's, which has no peft_type."""
    return "peft_type" not in options and not {"fine_tune_type", "lora_parameters"}.isdisjoint(
        options
    )


def mlx(path: Path, options: Mapping[str, Any], tensors: Tensors) -> OpenAdapter:
    """An adapter of mlx_lm; raises PeftError for DoRA, a whole model and other tensors."""
    config = MlxConfig(path, options)
    layers: dict[str, dict[str, str]] = {}
    others = []
    for name in sorted(tensors.entries):
        match = _LORA.fullmatch(name)
        if match:
            layers.setdefault(match["module"], {})[match["half"].upper()] = name
        else:
            others.append(name)
    if others or not layers or any(len(halves) < 2 for halves in layers.values()):
        got = few(others or sorted(tensors.entries)) or "none"
        what = " (DoRA's magnitudes)" if others and others[0].endswith(".m") else ""
        expected = "<module>.lora_a and <module>.lora_b for each layer"
        raise PeftError(shown(tensors.path), expected, got + what, _FUSE)
    ends = {module: module.rpartition(".")[2] for module in layers}
    embeddings = {module for module, end in ends.items() if end in VOCABULARY and end != "lm_head"}
    return OpenAdapter("MLX", config, tensors, Names(layers, frozenset(embeddings), {}), True)


class MlxConfig:
    """`lora_parameters` of a config of mlx_lm's: one rank and scale for all layers."""

    def __init__(self, path: Path, options: Mapping[str, Any]) -> None:
        self.name, self.unknown = path.name, ""
        self._path = path
        kind = options.get("fine_tune_type", "lora")
        if kind != "lora" or options.get("use_dora"):
            got = "DoRA" if options.get("use_dora") else repr(kind)
            raise self._error("fine_tune_type", "'lora'", got, _FUSE)
        parameters = options.get("lora_parameters")
        if not isinstance(parameters, dict):
            got = short(parameters)
            raise self._error("lora_parameters", "an object", got, forms.COPY)
        if "alpha" in parameters:
            got = f"alpha={short(parameters['alpha'])}"
            remedy = (
                "take alpha out if a newer mlx_lm trained it, which passes over it; else put "
                "scale * alpha / rank in the place of scale first"
            )
            raise self._error("lora_parameters", "scale without alpha", got, remedy)
        rank: Any = parameters.get("rank")
        scale: Any = parameters.get("scale")
        if type(rank) is not int or rank < 1:
            expected, option = "a positive integer", "lora_parameters.rank"
            raise self._error(option, expected, short(rank), forms.COPY)
        is_number = isinstance(scale, int | float) and not isinstance(scale, bool)
        if not is_number or not abs(scale) <= sys.float_info.max:
            expected, option = "a finite number", "lora_parameters.scale"
            raise self._error(option, expected, short(scale), forms.COPY)
        self._rank, self._scale = rank, float(scale)

    def _error(self, option: str, expected: str, got: str, remedy: str) -> PeftError:
        return PeftError(f"{option} in {shown(self._path)}", expected, got, remedy)

    def rank(self, module: str, saved: str, shape: int) -> int:
        """The same for all layers."""
        return self._rank

    def scaling(self, module: str, saved: str, shape: int) -> float:
        """The same for all layers: mlx_lm has no alpha."""
        return self._scale


def diffusers(tensors: Tensors) -> OpenAdapter:
    """An adapter of diffusers; raises PeftError for those of other programs, and names them."""
    names = {_peft_name(name): name for name in tensors.entries}
    if program := forms.program_of(tensors.entries):
        raise PeftError(shown(tensors.path), "an adapter of diffusers", program, forms.CONVERT)
    alphas = [name for name in tensors.entries if name.endswith(".alpha")]
    if alphas:
        got = f"{few(alphas)} (alphas, which not all of diffusers' pipelines read)"
        raise PeftError(shown(tensors.path), "ranks alone", got, forms.CONVERT)
    found = sorted_out(names, tensors.path)
    layers = {
        module: {half: names[name] for half, name in halves.items()}
        for module, halves in found.layers.items()
    }
    config = DiffusersConfig(tensors)
    return OpenAdapter("diffusers", config, tensors, found._replace(layers=layers))


def _peft_name(name: str) -> str:
    """The name that PEFT would give to a tensor of diffusers'.

    >>> _peft_name("unet.mid.attn1.processor.to_out_lora.down.weight")
    'unet.mid.attn1.to_out.0.lora_A.weight'
    """
    is_text = name.startswith("text_encoder")
    name = name.replace(".processor.", ".")

    def oldest(match: re.Match[str]) -> str:
        which = match[1]
        layer = f"{which}_proj" if is_text else f"to_{which}{'.0' if which == 'out' else ''}"
        return f".{layer}.lora_{_HALVES[match[2]]}.weight"

    name = _OLDEST.sub(oldest, name)
    return _OLDER.sub(lambda match: f".lora_{_HALVES[match[1]]}.weight", name)


class DiffusersConfig:
    """PEFT's config of each component in the file's metadata; without one, the scaling is 1."""

    def __init__(self, tensors: Tensors) -> None:
        self.name = "its metadata"
        self._configs: dict[str, Config] = {}
        text = tensors.metadata.get("lora_adapter_metadata")
        if text is None:
            self.unknown = ""
            return
        try:
            options: dict[str, dict[str, Any]] = {}
            for key, value in json.loads(text).items():
                component, _, option = key.rpartition(".")
                options.setdefault(component, {})[option] = value
        except (AttributeError, ValueError, RecursionError) as error:
            got = f"{text[:60]!r} ({error})"
            expected = "lora_adapter_metadata in JSON"
            raise PeftError(shown(tensors.path), expected, got, forms.CONVERT) from error
        for component, found in options.items():
            if found.get("use_dora"):  # of convolutions, too, most of them
                got = "use_dora (DoRA)"
                raise PeftError(shown(tensors.path), "plain LoRA of diffusers'", got, MERGE)
            self._configs[component] = Config(tensors.path, found)
        self.unknown = ", ".join(c.unknown for c in self._configs.values() if c.unknown)

    def _config(self, module: str) -> tuple[Config | None, str]:
        """The config of a module's component, and the module's name in it."""
        component, _, rest = module.partition(".")
        if component in self._configs:
            return self._configs[component], rest
        return self._configs.get(""), module

    def rank(self, module: str, saved: str, shape: int) -> int:
        """Without metadata, the rank that A has."""
        config, name = self._config(module)
        return config.rank(name, name, shape) if config else shape

    def scaling(self, module: str, saved: str, shape: int) -> float:
        """Without metadata, 1: diffusers takes alpha to be the rank."""
        config, name = self._config(module)
        return config.scaling(name, name, shape) if config else 1.0
