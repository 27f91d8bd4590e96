"""The names and widths of a model's layers, and an adapter's layers found among them.

The names of an adapter that an older release of transformers saved are not those of today's model.
transformers has the rules from the one to the other, by which PEFT goes too; they are asked there.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from sgmv.checks import check_several
from sgmv.errors import DtypeError, PeftError
from sgmv.extras import load
from sgmv.files import shown
from sgmv.peft_experts import joined, of_experts
from sgmv.peft_names import matched, unwrapped

Widths = tuple[int, int]  # h_in, h_out
Stack = tuple[int, int, int]  # E, h_in, h_out
_KINDS = "a torch module, a mapping name -> (h_in, h_out), or names of modules"


def in_model(
    model: object, layers: Mapping[str, Widths], parameters: Iterable[str], directory: str
) -> dict[str, str]:
    """The model's own name of each layer, and of each parameter that the adapter replaces.

    Raises PeftError for a layer that the model lacks, with near names, and for other widths.
    """
    known, rename = _layers_of(model), _renaming(model)
    place = shown(directory)
    names = matched(layers, known, rename, place)
    for module, name in names.items():
        widths = known[name]
        if widths is not None and widths != layers[module]:
            raise PeftError(
                "model",
                f"{name!r} of widths {layers[module]}, as the adapter in {place} has it",
                f"(h_in, h_out) = {widths}",
                "load it for the model that it was trained for",
            )
    owners = {name: name.rpartition(".")[0] for name in parameters}
    found = matched([*{*owners.values()}], known, rename, place)
    return names | {
        name: f"{found[owner]}.{name.rpartition('.')[2]}" for name, owner in owners.items()
    }


def experts_in_model(
    model: object, stacks: Mapping[str, Stack], directory: str
) -> dict[str, tuple[str, ...]]:
    """By the model's own names, the stacks of an adapter that each is of: one, or a gate and an up.

    stacks  name -> (E, h_in, h_out)

    The model has a parameter for all experts, or a layer for each, of whatever widths.
    Raises PeftError as `in_model` does.
    """
    if not stacks:
        return {}
    known, rename, place = _stacks_of(model), _renaming(model), shown(directory)
    containers = {name: name.rpartition(".")[0] for name in stacks}
    own = {
        stack: f"{rename(containers[stack])}{stack.removeprefix(containers[stack])}"
        for stack in stacks
    }
    parts = joined(own.values(), known)
    of_joined = {name for names in parts.values() for name in names}
    alone = [name for name in own.values() if name not in of_joined]
    found: dict[str, tuple[str, ...]] = {
        name: (old,) for old, name in matched(alone, known, rename, place).items()
    } | parts
    shape_of = {own[stack]: shape for stack, shape in stacks.items()}
    for name, of in found.items():
        shapes = [shape_of[each] for each in of]
        E, h_in, _ = shapes[0]
        shape = E, h_in, sum(h_out for *_, h_out in shapes)
        if known[name] and shape not in known[name]:
            raise PeftError(
                "model",
                f"{name!r} of (experts, h_in, h_out) = {shape}, as the adapter in {place} has it",
                " or ".join(map(str, known[name])),
                "load it for the model that it was trained for",
            )
    old_name = {name: stack for stack, name in own.items()}
    return {name: tuple(old_name[each] for each in of) for name, of in found.items()}


def _stacks_of(model: Any) -> dict[str, list[Stack]]:
    """What may be experts, and the shapes that each may be for; none where they are not known."""
    layers = _layers_of(model)
    found: dict[str, list[Stack]] = {name: [] for name in layers}
    for stack, of_one in of_experts(layers).items():
        widths = layers[of_one[0]]
        found[stack] = [(len(of_one), *widths)] if widths else []
    if callable(getattr(model, "named_parameters", None)):
        for name, parameter in model.named_parameters():
            if parameter.ndim == 3:  # (E, h_out, h_in), or as GPT-OSS has it (E, h_in, h_out)
                E, first, second = map(int, parameter.shape)
                module = unwrapped(name).replace(".base_layer", "").removesuffix(".weight")
                found[module] = [(E, second, first), (E, first, second)]
    return found


def _layers_of(model: Any) -> dict[str, Widths | None]:
    """Each module's widths, where they are known."""
    if isinstance(model, Mapping):
        return {_name(name): _pair(name, widths) for name, widths in model.items()}
    if callable(getattr(model, "named_modules", None)):
        return {_plain(name): _widths(module) for name, module in model.named_modules()}
    check_several("model", model, _KINDS)
    return {_name(name): None for name in model}


def _name(name: object) -> str:
    if not isinstance(name, str):
        raise DtypeError("model", _KINDS, f"the name {name!r}", "name modules by text")
    return name


def _pair(name: str, widths: object) -> Widths | None:
    if isinstance(widths, tuple | list):
        if len(widths) != 2 or not all(isinstance(width, int) for width in widths):
            raise DtypeError("model", _KINDS, f"{widths!r} for {name!r}", "give each two widths")
        return int(widths[0]), int(widths[1])
    return _widths(widths)


def _plain(name: str) -> str:
    """A module's name in the base model, of a model that PEFT or another wrapper is around."""
    return unwrapped(name + ".").removesuffix(".").removesuffix(".base_layer")


def _widths(module: Any) -> Widths | None:
    """h_in and h_out of a torch module, if it is one that has them."""
    for names in (
        ("in_features", "out_features"),
        ("num_embeddings", "embedding_dim"),
        ("nx", "nf"),
    ):
        h_in, h_out = (getattr(module, name, None) for name in names)
        if isinstance(h_in, int) and isinstance(h_out, int):
            return h_in, h_out
    return None


def _renaming(model: Any) -> Callable[[str], str]:
    """From a module's name in an older release to that in this model, as transformers renames."""
    base = model.get_base_model() if callable(getattr(model, "get_base_model", None)) else model
    rules = getattr(base, "_checkpoint_conversion_mapping", None)  # transformers 4
    if isinstance(rules, dict) and rules:
        return lambda name: _by_patterns(rules, name)
    if not hasattr(getattr(base, "config", None), "model_type"):
        return lambda name: name
    try:
        mapping: Any = load("transformers.conversion_mapping")  # transformers 5
        loading: Any = load("transformers.core_model_loading")
        found = mapping.get_model_conversion_mapping(base)
        renamings = [rule for rule in found if isinstance(rule, loading.WeightRenaming)]
    except (ImportError, AttributeError):
        return lambda name: name
    if not renamings:
        return lambda name: name

    def rename(name: str) -> str:
        renamed, _ = loading.rename_source_key(f"{name}.weight", renamings, [])
        return str(renamed).removesuffix(".weight")

    return rename


def _by_patterns(rules: Mapping[str, str], name: str) -> str:
    for pattern, replacement in rules.items():
        renamed, count = re.subn(pattern, replacement, name)
        if count:
            return renamed
    return name
