"""Adapters that PEFT wrote to disk, read without torch and without PEFT.

A directory holds `adapter_config.json` (rank, alpha, options: peft_config.py) and
`adapter_model.safetensors` (names: peft_names.py; values: peft_tensors.py) with two tensors for
each adapted layer, and the parameters that the adapter replaces:

    base_model.model.<module>.lora_A.weight   A (r, h_in)
    base_model.model.<module>.lora_B.weight   B (h_out, r)

With DoRA, a third: its magnitude (h_out,).

Experts are read from two forms, into one: peft_experts.py.
MLX and diffusers write the same in forms of their own: foreign.py.

Another process may write there meanwhile: what is returned is one version of all files.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from sgmv import foreign, forms
from sgmv.dtypes import Array
from sgmv.errors import PeftError
from sgmv.files import Opened, existing, one_version, read_text, shown
from sgmv.foreign import OpenAdapter
from sgmv.peft_config import Config
from sgmv.peft_experts import is_swapped, unpacked
from sgmv.peft_names import MERGE, PREFIX, near_names, sorted_out
from sgmv.peft_tensors import Tensors, damaged
from sgmv.tensors import why_no_pickles

T = TypeVar("T")
_SHARD = (
    "a rank's part, or nothing, as DeepSpeed ZeRO-3 and FSDP leave it",
    "gather the parameters before saving: stage3_gather_16bit_weights_on_model_save with ZeRO-3, "
    "a full state dict with FSDP",
)
_EXPECTED = "a PEFT adapter directory"
_LOCAL = "pass a local directory that save_pretrained wrote (nothing is downloaded)"
FILES = (forms.CONFIG_FILE, forms.WEIGHTS_FILE, forms.PICKLE, forms.MLX, forms.DIFFUSERS)
Parts = tuple[Array, Array, float]  # A (r, h_in), B (h_out, r), scaling; or each for E experts
Layer = tuple[Array, Array, float, Array | None]  # the same of one, and DoRA's magnitude (h_out,)
PathLike = str | bytes | os.PathLike[str] | os.PathLike[bytes]


class Read(NamedTuple):
    """What an adapter's files hold."""

    layers: dict[str, Layer]
    experts: dict[str, Parts]  # A (E, r, h_in), B (E, h_out, r)
    embeddings: frozenset[str]  # which of the layers are embeddings
    saved: dict[str, Array]  # parameters of the model that the adapter replaces
    unknown: str  # options of the config that PEFT does not have


def read_modules(directory: PathLike) -> Read:
    """Every adapted layer of a directory, by the module's name; see `load_peft` in adapter.py."""

    def read(adapter: OpenAdapter) -> Read:
        names, tensors = adapter.names, adapter.tensors
        stacks = stacks_of(adapter)
        of_one = {layer for stack in stacks for layer in names.experts.get(stack, [stack])}
        layers = {module: _read(adapter, module) for module in names.layers if module not in of_one}
        experts = {stack: _read_experts(adapter, stack) for stack in stacks}
        saved = {
            parameter: tensors.value(name, f"{shown(parameter)} in {shown(tensors.path)}", False)
            for parameter, name in names.saved.items()
        }
        return Read(layers, experts, names.embeddings, saved, adapter.config.unknown)

    return read_open(directory, read)


def read_module(directory: PathLike, module: str) -> Read:
    """One adapted layer; the others stay on disk."""

    def read(adapter: OpenAdapter) -> Read:
        names = adapter.names
        if module not in tuple(names.layers):  # it need not be hashable
            expected = f"a layer that the adapter in {shown(adapter.tensors.path.parent)} changes"
            remedy = near_names(str(module), names.layers)
            raise PeftError("module", expected, repr(module), remedy)
        if module in stacks_of(adapter):
            remedy = "take it from load_peft(directory).experts"
            raise PeftError("module", "one linear layer", f"{module!r}, all experts'", remedy)
        layers = {module: _read(adapter, module)}
        return Read(layers, {}, names.embeddings & {module}, {}, adapter.config.unknown)

    return read_open(directory, read)


def read_open(directory: object, read: Callable[[OpenAdapter], T]) -> T:
    """What `read` makes of the adapter: one version of its files, which are open meanwhile."""
    path = _path(directory)
    if path.suffix == ".safetensors" and path.name not in FILES and os.path.isfile(path):
        names: tuple[str, ...] = (path.name,)

        def open_one(file: Opened) -> T:
            return read(foreign.diffusers(Tensors(path, file)))

        return one_version(path.parent, names, open_one)

    def open_all(*files: Opened) -> T:
        return read(_open(path, *files))

    return one_version(path, FILES, open_all)


def _open(
    path: Path, config_file: Opened, weights: Opened, pickle: Opened, mlx: Opened, diffusers: Opened
) -> OpenAdapter:
    _check_is_directory(path)
    if isinstance(config_file, FileNotFoundError) and not isinstance(diffusers, OSError):
        return foreign.diffusers(Tensors(path / forms.DIFFUSERS, diffusers))
    config_path = path / forms.CONFIG_FILE
    options = _read_json(config_path, config_file)
    if foreign.is_mlx(options):
        return foreign.mlx(config_path, options, Tensors(path / forms.MLX, mlx))
    config = Config(config_path, options)
    if isinstance(weights, FileNotFoundError) and not isinstance(pickle, OSError):
        if why := why_no_pickles():
            got, remedy = forms.pickled(path / forms.PICKLE, why)
            raise PeftError("directory", forms.WEIGHTS_FILE, got, remedy)
        tensors = Tensors(path / forms.PICKLE, pickle)
    else:
        tensors = Tensors(path / forms.WEIGHTS_FILE, weights)
    if program := forms.program_of(tensors.entries):
        raise PeftError(shown(tensors.path), "names as PEFT gives them", program, forms.CONVERT)
    wanted = config.to_save, config.targets, config.is_dora
    names = sorted_out(tensors.entries, tensors.path, *wanted)
    return OpenAdapter("PEFT", config, tensors, names)


def _path(directory: object) -> Path:
    if not isinstance(directory, (str, bytes, os.PathLike)):
        raise PeftError("directory", _EXPECTED, type(directory).__name__, _LOCAL)
    name = os.fsdecode(directory)
    if not name or "\0" in name:
        raise PeftError("directory", _EXPECTED, f"{name!r} (no path)", _LOCAL)
    return Path(name)


def _check_is_directory(path: Path) -> None:
    try:
        mode = path.stat().st_mode
    except OSError as error:
        missing = isinstance(error, FileNotFoundError)
        got = f"{shown(path)} ({'no such directory' if missing else error.strerror})"
        raise PeftError("directory", _EXPECTED, got, _LOCAL) from error
    if not stat.S_ISDIR(mode):
        got = f"{shown(path)} ({'a file' if stat.S_ISREG(mode) else 'not a directory'})"
        raise PeftError("directory", _EXPECTED, got, _LOCAL)


class Shape(NamedTuple):
    """What a layer's A (r, h_in) and B (h_out, r) are, of each of its experts."""

    r: int
    h_in: int
    h_out: int
    scaling: float
    experts: int = 0  # of a stack of them


def shape_of(adapter: OpenAdapter, module: str) -> Shape:
    """Rank, widths and scaling of a layer, once its shapes are those of its config.

    Raises PeftError for what is no linear layer's, or a save that disagrees with its config.
    """
    parameter = adapter.names.parameters.get(module)
    name, source = adapter.names.layers[module]["A"], _source(adapter, module)
    shape_a, shape_b = _shapes(adapter, module)
    saved = module if parameter else name.rpartition(".lora_")[0]
    saved = saved.partition(PREFIX)[2] or saved
    shapes = f"lora_A {shape_a} and lora_B {shape_b}"
    if len(shape_a) != 2 or len(shape_b) != 2 or 0 in shape_a + shape_b:
        is_shard = any(len(shape) < 2 or 0 in shape for shape in (shape_a, shape_b))
        what, remedy = _SHARD if is_shard else ("a convolution's or an expert stack's", MERGE)
        expected = "a linear layer's A (r, h_in) and B (h_out, r)"
        raise PeftError(source, expected, f"{shapes} ({what})", remedy)
    rank = adapter.config.rank(module, saved, shape_a[0])
    experts = max(shape_a[0] // rank, 1) if parameter else 1
    if shape_a[0] != rank * experts or shape_b[1] != rank * experts:
        times = f"{rank} * E" if parameter else str(rank)
        expected = f"A ({times}, h_in) and B (h_out, {times}), as {adapter.config.name} says"
        raise PeftError(source, expected, shapes, "take config and tensors from the same save")
    _check_magnitude(adapter, module, shape_b[0])
    scaling = adapter.config.scaling(module, saved, rank)
    if not parameter or (experts == 1 and parameter == "weight"):
        return Shape(rank, shape_a[1], shape_b[0], scaling)
    h_in, h_out = shape_a[1], shape_b[0]
    if _is_swapped(adapter, module):
        h_in, h_out = h_out, h_in
    return Shape(rank, h_in, h_out, scaling, experts)


def _check_magnitude(adapter: OpenAdapter, module: str, h_out: int) -> None:
    if name := adapter.names.layers[module].get("m"):
        shape = adapter.tensors.entries[name].shape
        if shape != (h_out,):
            expected = f"lora_magnitude_vector ({h_out},), as lora_B has"
            raise PeftError(_source(adapter, module), expected, str(shape), "save it again")


def stacks_of(adapter: OpenAdapter) -> dict[str, Shape]:
    """The stacks of experts: parameters of all, and layers of one each that are alike."""
    names = adapter.names
    stacks = {module: shape_of(adapter, module) for module in sorted(names.parameters)}
    stacks = {module: shape for module, shape in stacks.items() if shape.experts}
    for stack, layers in names.experts.items():
        shapes = {shape_of(adapter, layer) for layer in layers}
        is_dora = any("m" in names.layers[layer] for layer in layers)
        if len(shapes) == 1 and stack not in names.layers and not is_dora:
            stacks[stack] = shapes.pop()._replace(experts=len(layers))
    return stacks


def _shapes(adapter: OpenAdapter, module: str) -> list[tuple[int, ...]]:
    """The shapes of A and of B."""
    halves = adapter.names.layers[module]
    shapes = [adapter.tensors.entries[halves[half]].shape for half in "AB"]
    return [shape[::-1] for shape in shapes] if adapter.is_transposed else shapes


def _source(adapter: OpenAdapter, module: str) -> str:
    return f"{shown(module)} in {shown(adapter.tensors.path)}"


def _read(adapter: OpenAdapter, module: str) -> Layer:
    scaling, source = shape_of(adapter, module).scaling, _source(adapter, module)
    found = {
        part: adapter.tensors.value(name, source)
        for part, name in adapter.names.layers[module].items()
    }
    A, B = found["A"], found["B"]
    return (*((A.T, B.T) if adapter.is_transposed else (A, B)), scaling, found.get("m"))


def _read_experts(adapter: OpenAdapter, stack: str) -> Parts:
    if layers := adapter.names.experts.get(stack):
        parts = [_read(adapter, layer)[:3] for layer in layers]
        A, B = (np.stack([part[half] for part in parts]) for half in (0, 1))
        return A, B, parts[0][2]
    A, B, scaling, _ = _read(adapter, stack)
    experts = shape_of(adapter, stack).experts
    return *unpacked(A, B, experts, _is_swapped(adapter, stack)), scaling


def _is_swapped(adapter: OpenAdapter, module: str) -> bool:
    names = adapter.names.parameters
    shapes = {name: _shapes(adapter, name) for name in names}
    widths = {name: (a[-1], b[0]) for name, (a, b) in shapes.items() if a and b}
    options = getattr(adapter.config, "options", {})
    return is_swapped(module, widths, options, _source(adapter, module))


def _read_json(path: Path, file: Opened) -> Mapping[str, Any]:
    try:
        options = json.loads(read_text(existing(file)).decode("utf-8"))
    except FileNotFoundError as error:
        got, remedy = forms.without_config(path.parent)
        raise PeftError("directory", path.name, got, remedy) from error
    except (OSError, ValueError, RecursionError) as error:
        raise damaged(path, "JSON", error, file) from error
    if not isinstance(options, dict):
        raise PeftError(shown(path), "a JSON object", type(options).__name__, forms.COPY)
    return options
