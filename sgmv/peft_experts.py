"""Experts in an adapter's file: which tensors are theirs, and how their factors lie in them.

    PEFT's target_parameters   all experts of a parameter in one matrix
        <experts>.lora_A.weight                   A (E * r, h_in), an expert's ranks side by side
        <experts>.lora_B.weight                   B (h_out, r * E), a rank's experts side by side
        <experts>.base_layer.lora_A.weight        the same of the parameter that comes before
    transformers 4, and vLLM   a layer of its own for each expert
        <experts>.<e>.<projection>.lora_A.weight  A (r, h_in)

A ParamWrapper is put around the module for each parameter, in the order in which the module has
them. The names of the tensors do not have the parameter's: the outermost is the last one's.

Source: peft 0.21, src/peft/tuners/lora/layer.py, `ParamWrapper`, `BaseTuner._inject_parameters`.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from sgmv.dtypes import Array
from sgmv.errors import PeftError
from sgmv.files import shown

_OF_ONE = re.compile(r"(?P<place>(?:.+\.)?experts)\.(?P<expert>\d+)\.(?P<projection>.+)")
# The order in which transformers' modules of experts have their parameters.
_ORDER = ("gate_up_proj", "down_proj")
_AGAIN = "save it again with PEFT 0.19 or later"
# What a projection is called in the parameter that holds all experts': the gate's rows first.
JOINED = {
    "gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3")),
    "down_proj": (("down_proj",), ("w2",)),
}


def of_parameter(module: str, depth: int, targets: Collection[str], path: Path) -> str | None:
    """The parameter whose factors a wrapper has; None if the config names none of the module's.

    depth    how many wrappers are around this one
    targets  the config's target_parameters: names, or their ends
    """
    parameters = {target.rpartition(".")[2] for target in targets if _is_of(module, target)}
    if not parameters:
        return None
    for name in sorted(parameters):
        if name.endswith("bias"):
            got = f"those of a bias, {shown(name)}"
            raise PeftError(shown(path), "factors of weights", got, "leave it out")
    if len(parameters) > 1 and not parameters <= {*_ORDER}:
        got = f"{', '.join(sorted(parameters))} of one module"
        expected = f"{' and '.join(_ORDER)}, whose order is known"
        raise PeftError(f"{shown(module)} in {shown(path)}", expected, got, "target one of them")
    ordered = sorted(parameters, key=lambda name: _ORDER.index(name) if name in _ORDER else 0)
    if depth >= len(ordered):
        got = f"{depth + 1} wrappers around {shown(module)}"
        raise PeftError(shown(path), f"{len(ordered)}, as target_parameters says", got, _AGAIN)
    return ordered[-1 - depth]


def check_wrappers(parameters: Mapping[str, str], targets: Iterable[str], path: Path) -> None:
    """Refuse a module of which the file lacks a parameter: the others' names would be wrong.

    parameters  layer -> the parameter that it is
    """
    found = {layer.removesuffix(f".{name}"): set[str]() for layer, name in parameters.items()}
    for layer, name in parameters.items():
        found[layer.removesuffix(f".{name}")].add(name)
    for module, names in found.items():
        named = {target.rpartition(".")[2] for target in targets if _is_of(module, target)}
        if lacking := named - names:
            got = f"none of {', '.join(sorted(lacking))} in {shown(module)}"
            raise PeftError(shown(path), "factors of all target_parameters", got, _AGAIN)


def _is_of(module: str, target: str) -> bool:
    name = f"{module}.{target.rpartition('.')[2]}"
    return name == target or name.endswith(f".{target}")


def of_experts(layers: Iterable[str]) -> dict[str, list[str]]:
    """Layers that are an expert's each, by what they are of: experts.gate_proj -> 0, 1, ...

    >>> of_experts(["experts.0.up", "experts.1.up", "experts.0.down", "experts.7.down", "gate"])
    {'experts.up': ['experts.0.up', 'experts.1.up']}
    """
    found: dict[str, dict[int, str]] = {}
    for layer in layers:
        if match := _OF_ONE.fullmatch(layer):
            name = f"{match['place']}.{match['projection']}"
            found.setdefault(name, {})[int(match["expert"])] = layer
    return {
        name: [numbered[e] for e in range(len(numbered))]
        for name, numbered in found.items()
        if len(numbered) > 1 and max(numbered) < len(numbered)
    }


def unpacked(A: Array, B: Array, experts: int, swapped: bool) -> tuple[Array, Array]:
    """Factors (E, r, h_in) and (E, h_out, r) of a parameter's two matrices.

    swapped  whether the product of both is the transposed weight's: so before PEFT 0.19

    >>> import numpy as np
    >>> A, B = unpacked(np.arange(4).reshape(4, 1), np.arange(4).reshape(1, 4), 2, False)
    >>> A[1].tolist(), B[1].tolist()
    ([[2], [3]], [[1, 3]])
    """
    first = A.reshape(experts, -1, A.shape[1])
    second = B.reshape(B.shape[0], -1, experts)
    if swapped:
        return second.transpose(2, 1, 0), first.transpose(0, 2, 1)
    return first, second.transpose(2, 0, 1)


def is_swapped(
    parameter: str, shapes: dict[str, tuple[int, int]], options: Any, place: str
) -> bool:
    """Whether a parameter's factors are those of the transposed weight.

    shapes   the widths that A and B have, of each parameter
    options  the config's: before 0.19, PEFT took every parameter for (E, h_in, h_out), and most
             are (E, h_out, h_in); which, the widths of both parameters tell

    Raises PeftError where they do not.
    """
    release = re.match(r"(\d+)\.(\d+)", str(options.get("peft_version") or ""))
    if release and (int(release[1]), int(release[2])) >= (0, 19):
        return False
    module = parameter.rpartition(".")[0]
    first, second = (shapes.get(f"{module}.{name}") for name in _ORDER)
    if first and second:
        as_they_are = first[0] == second[1] and first[1] == 2 * second[0]
        turned = first[1] == second[0] and first[0] == 2 * second[1]
        if as_they_are != turned:
            return turned
    raise PeftError(
        place,
        f"widths that tell which is h_in, as those of {' and '.join(_ORDER)} do",
        f"factors of {shown(parameter)} from PEFT before 0.19, or of no known release",
        "set peft_version in the config to the release that wrote it, if that is 0.19 or later",
    )


def joined(layers: Collection[str], known: Collection[str]) -> dict[str, tuple[str, ...]]:
    """For the parameters that a model has, the stacks of an adapter that are its rows.

    >>> joined(["a.experts.gate_proj", "a.experts.up_proj"], ["a.experts.gate_up_proj"])
    {'a.experts.gate_up_proj': ('a.experts.gate_proj', 'a.experts.up_proj')}
    """
    found: dict[str, tuple[str, ...]] = {}
    for module in dict.fromkeys(layer.rpartition(".")[0] for layer in layers):
        for parameter, forms in JOINED.items():
            for form in forms:
                parts = tuple(f"{module}.{name}" for name in form)
                name = f"{module}.{parameter}"
                if name in known and name not in layers and all(part in layers for part in parts):
                    found[name] = parts
    return found
