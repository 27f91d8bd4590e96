"""Names of tensors in an adapter's file: which layer each belongs to, and what it is there.

    base_model.model.<module>.lora_A.weight          A (r, h_in) of a linear layer
    base_model.model.<module>.lora_embedding_A       A (r, vocabulary) of an embedding
    base_model.model.<module>.lora_magnitude_vector  m (h_out,), with DoRA
    base_model.model.<module>.<parameter>            what the adapter replaces, if it says so

Experts have names of their own: peft_experts.py.

What wrappers add is taken away: torch.compile, FSDP, DDP, checkpointing, a PeftModel in a
PeftModel, and the layers that PEFT itself puts around a module that has adapted parts.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from sgmv.errors import PeftError
from sgmv.files import shown
from sgmv.peft_experts import check_wrappers, of_experts, of_parameter

PREFIX = "base_model.model."
MERGE = "run it with PEFT, or merge it into the base weights where PEFT can (merge_and_unload)"

_LINEAR = re.compile(r"(?P<module>.+)\.lora_(?P<half>[AB])(?:\.(?P<adapter>[^.]+))?\.weight")
_EMBEDDING = re.compile(r"(?P<module>.+)\.lora_embedding_(?P<half>[AB])(?:\.(?P<adapter>[^.]+))?")
_MAGNITUDE = re.compile(
    r"(?P<module>.+)\.lora_magnitude_vector(?:\.(?P<adapter>(?!weight$)[^.]+))?(?:\.weight)?"
)
_REPLACED = re.compile(r"(?P<module>.+?)(?:\.modules_to_save(?:\.[^.]+)?)?\.(?P<parameter>[^.]+)")
_NAMES = {"A": "lora_A", "B": "lora_B", "m": "lora_magnitude_vector"}
_WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
_PREFIXES = re.compile(r"^(?:base_model\.model\.|module\.(?!lora_))+")
# What transformers' models call their embeddings and heads, which PEFT saves beside the adapter if
# they were adapted or resized.
VOCABULARY = (
    "embed_tokens",
    "lm_head",
    "wte",
    "word_embeddings",
    "embed_in",
    "embed_out",
    "shared",
)


class Names(NamedTuple):
    """The tensors of a file by what they are; each under the name that it has in the file."""

    layers: dict[str, dict[str, str]]  # module -> "A", "B", with DoRA "m" -> tensor
    embeddings: frozenset[str]  # those of the modules that are embeddings
    saved: dict[str, str]  # parameter of the model -> tensor that replaces it
    parameters: Mapping[str, str] = MappingProxyType({})  # layer -> its parameter, if targeted so
    experts: Mapping[str, list[str]] = MappingProxyType({})  # stack -> layers, an expert's each


def sorted_out(
    names: Iterable[str],
    path: Path,
    to_save: Collection[str] = (),
    targets: Collection[str] = (),
    is_dora: bool = False,
) -> Names:
    """What each tensor of a file is; raises PeftError for one that belongs to no plain LoRA.

    path     the file, for messages
    to_save  the config's modules_to_save: ends of the names of modules that the adapter replaces
    targets  the config's target_parameters: names of parameters, or their ends
    is_dora  the config's use_dora: each layer has magnitudes
    """
    layers: dict[str, dict[str, str]] = {}
    adapters, embeddings, others = set(), set(), []
    parameters: dict[str, str] = {}
    for name in sorted(names):
        plain = unwrapped(name)
        match = _LINEAR.fullmatch(plain) or _EMBEDDING.fullmatch(plain)
        if is_dora:
            match = match or _MAGNITUDE.fullmatch(plain)
        if not match:
            others.append(name)
            continue
        adapters.add(match["adapter"])
        module = _without(match["module"], "base_layer")
        if match.re is _EMBEDDING:
            embeddings.add(module)
        if parameter := of_parameter(module, _wraps(match["module"]), targets, path):
            module = module if parameter == "weight" else f"{module}.{parameter}"
            parameters[module] = parameter
        halves = layers.setdefault(module, {})
        half = "m" if match.re is _MAGNITUDE else match["half"]
        first = halves.setdefault(half, name)
        if first != name and len(adapters) == 1:
            expected = f"one {_NAMES[half]} of {shown(module)}"
            got = few([first, name])
            raise PeftError(shown(path), expected, got, "save one of them alone")
    saved = _replaced(others, path, layers, to_save)
    _check_one(adapters, path)
    _check_whole(layers, path, "ABm" if is_dora else "AB")
    check_wrappers(parameters, targets, path)
    return Names(layers, frozenset(embeddings), saved, parameters, of_experts(layers))


def _wraps(name: str) -> int:
    """How many wrappers are around the module of this name.

    >>> _wraps("mlp.experts.base_layer")
    1
    """
    parts = name.split(".")
    return next((i for i, part in enumerate(reversed(parts)) if part != "base_layer"), len(parts))


def _replaced(
    names: Iterable[str], path: Path, layers: Collection[str], to_save: Collection[str]
) -> dict[str, str]:
    """The tensors that are neither A nor B, as parameters that the adapter replaces."""
    saved, unmatched = {}, []
    for name in names:
        plain = unwrapped(name)
        if ".original_module." in plain:
            continue  # the base model's own, kept by PEFT beside what replaces it
        match = _REPLACED.fullmatch(plain)
        module = _without(match["module"], "base_layer") if match else ""
        is_saved = any(module.endswith(end) for end in to_save)
        is_vocabulary = module.rpartition(".")[2] in VOCABULARY
        is_beside = plain.endswith(".base_layer.weight") and module in layers
        if match and ".lora_" not in plain and (is_saved or is_vocabulary or is_beside):
            saved[f"{module}.{match['parameter']}"] = name
        else:
            unmatched.append(name)
    if unmatched:
        what = _what_is(unmatched[0])
        expected = f"only {PREFIX}<module>.lora_A/B, and modules that the config names"
        raise PeftError(shown(path), expected, f"{few(unmatched)} ({what})", MERGE)
    return saved


def _check_one(adapters: Collection[str | None], path: Path) -> None:
    if len(adapters) > 1:
        got = few(sorted(f"lora_A.{name}" if name else "lora_A" for name in adapters))
        raise PeftError(
            shown(path),
            "one adapter's tensors",
            f"those of several: {got}",
            "save each with save_pretrained(..., selected_adapters=[name])",
        )


def _check_whole(layers: dict[str, dict[str, str]], path: Path, parts: str) -> None:
    for module, halves in layers.items():
        if len(halves) < len(parts):
            expected, got = (
                " and ".join(_NAMES[part] for part in parts if part in there)
                for there in (parts, halves)
            )
            raise PeftError(
                shown(path), f"{expected} of {shown(module)}", f"{got} alone", "save it again"
            )
    if not layers:
        raise PeftError(
            shown(path),
            "LoRA tensors",
            "none: a header without data, as is saved from an empty state dict",
            "check target_modules, and save the PeftModel itself, with its own state dict",
        )


def _what_is(name: str) -> str:
    """A tensor that is not plain LoRA's."""
    if "lora_magnitude_vector" in name:
        return "DoRA's magnitudes"
    if name.endswith(".bias"):
        return "a bias"
    if ".lora_" in name:
        return "not plain LoRA"
    return "a weight of the base model, or another method's"


def unwrapped(name: str) -> str:
    """A tensor's name without PEFT's prefix and without what wrappers add.

    >>> unwrapped("_orig_mod.base_model.model.up._fsdp_wrapped_module.lora_A.weight")
    'up.lora_A.weight'
    """
    return _PREFIXES.sub("", _without(name, *_WRAPPERS))


def _without(name: str, *parts: str) -> str:
    return ".".join(part for part in name.split(".") if part not in parts)


def matched(
    found: Collection[str], names: Collection[str], rename: Callable[[str], str], place: str
) -> dict[str, str]:
    """For each layer of an adapter the model's own name for it.

    found   the adapter's layers
    names   the model's modules
    rename  from an older release's name of a module to this model's
    place   the adapter, for messages

    Raises PeftError for a layer that the model lacks, with near names, and where two of the
    adapter's layers are one of the model's.
    """
    chosen: dict[str, str] = {}
    unknown = []
    for module in found:
        name = module if module in names else rename(module)
        if name in names:
            chosen[module] = name
        else:
            unknown.append(module)
    if unknown:
        raise PeftError(
            "model",
            f"the layers of the adapter in {place}",
            f"none called {few(unknown)}",
            near_names(unknown[0], names),
        )
    if len({*chosen.values()}) < len(chosen):
        twice = [module for module in chosen if list(chosen.values()).count(chosen[module]) > 1]
        raise PeftError(
            "model", f"one name for each layer in {place}", few(twice), "save one of them alone"
        )
    return chosen


def near_names(module: str, modules: Collection[str]) -> str:
    """A remedy for a module that is not in `modules`: those of near names, or the first few."""

    def same_end(name: str) -> bool:
        return name.endswith("." + module) or module.endswith("." + name)

    same = [name for name in modules if name and same_end(name)]
    alike = difflib.get_close_matches(module, modules, n=5, cutoff=0.6)
    near = list(dict.fromkeys(same + alike))
    if near:
        return f"did you mean {few(near)}?"
    return f"there are {few(list(modules))}" if modules else "there are none"


def few(names: list[str], limit: int = 5) -> str:
    """The first names, for a message."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(repr(name) for name in names[:limit]) + more
