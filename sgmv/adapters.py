"""`sgmv adapters`: what adapters on disk are, what would be refused, and whether they fit a model.

Headers and configs alone are read, not the values: hundreds take a moment.
"""

from __future__ import annotations

import json
import math
import os
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from sgmv import forms
from sgmv.errors import SgmvError
from sgmv.files import shown
from sgmv.foreign import OpenAdapter
from sgmv.model_files import ModelFiles, model_files
from sgmv.peft import read_open, shape_of, stacks_of
from sgmv.peft_tensors import bytes_of
from sgmv.terminal import Terminal, plural


@dataclass
class Described:
    """An adapter on disk, as its headers have it; or why it cannot be read."""

    path: str
    form: str = ""  # the library that wrote it, and whether it is DoRA
    layers: int = 0
    ranks: list[int] = field(default_factory=list)
    alphas: list[float] = field(default_factory=list)
    scalings: list[float] = field(default_factory=list)
    types: list[str] = field(default_factory=list)
    bytes: int = 0
    modules: list[str] = field(default_factory=list)
    embeddings: list[str] = field(default_factory=list)
    experts: dict[str, int] = field(default_factory=dict)  # how many, by their stack's name
    saved: list[str] = field(default_factory=list)  # what it replaces in the model
    unknown: str = ""  # options that PEFT does not have
    base: str = ""  # the model that it was trained on
    refused: str = ""
    misfits: list[str] = field(default_factory=list)  # against the model


def describe(path: str, model: ModelFiles | None = None) -> Described:
    """What the adapter in a directory is, and where it does not fit the model."""
    try:
        return read_open(path, lambda adapter: _described(path, adapter, model))
    except SgmvError as error:
        return Described(path, refused=str(error))


def _described(path: str, adapter: OpenAdapter, model: ModelFiles | None) -> Described:
    names, entries, config = adapter.names, adapter.tensors.entries, adapter.config
    is_dora = any("m" in parts for parts in names.layers.values())
    form = f"{adapter.form}, DoRA" if is_dora else adapter.form
    found = Described(path, form, len(names.layers), unknown=config.unknown)
    found.embeddings, found.saved = sorted(names.embeddings), sorted(names.saved)
    stacks = stacks_of(adapter)
    found.experts = {stack: shape.experts for stack, shape in stacks.items()}
    found.modules = sorted(names.layers)
    found.bytes = sum(map(bytes_of, entries.values()))
    options = getattr(config, "options", {})
    found.base = str(options.get("base_model_name_or_path") or "")
    used = [entries[name] for halves in names.layers.values() for name in halves.values()]
    found.types = sorted({entry.dtype for entry in used})
    ranks, alphas, scalings = set(), set(), set()
    for module in found.modules:
        rank, h_in, h_out, scaling, experts = shape_of(adapter, module)
        ranks.add(rank)
        scalings.add(scaling)
        alphas.add(scaling * (math.sqrt(rank) if options.get("use_rslora") else rank))
        if model is not None:
            of_columns = module in names.embeddings or bool(options.get("fan_in_fan_out"))
            problem = model.problem(module, h_in, h_out, of_columns, experts)
            found.misfits += filter(None, [problem])
    found.ranks, found.scalings = sorted(ranks), sorted(scalings)
    found.alphas = sorted(round(alpha, 6) for alpha in alphas)
    if model is not None:
        owners = {name.rpartition(".")[0] for name in names.saved}
        found.misfits += [
            f"the model has no {owner!r}, which the adapter replaces"
            for owner in sorted(owners)
            if not model.ends and model.name_of(owner) is None
        ]
    return found


def command(parser: ArgumentParser) -> Callable[[Namespace], str]:
    """Add the arguments, and return what runs them."""
    parser.add_argument(
        "directories", nargs="*", metavar="DIR", help="an adapter, or a directory of adapters"
    )
    parser.add_argument(
        "--against", metavar="MODEL_DIR", help="check names and widths against this model's files"
    )
    parser.add_argument("--json", action="store_true", help="all figures, and the names of layers")
    return _run


def _run(given: Namespace) -> str:
    model = None if given.against is None else model_files(given.against)
    if not given.directories:
        remedy = "name some, as in sgmv adapters adapters/*"
        raise SgmvError("DIR", "directories of adapters", "none", remedy)
    paths = [path for directory in given.directories for path in _expanded(directory)]
    found = [describe(path, model) for path in paths]
    if given.json:
        return json.dumps([asdict(one) for one in found])
    return text(found, model, Terminal.of_stdout())


def _expanded(directory: str) -> list[str]:
    """The directory itself, or those of the adapters in it."""
    path = Path(directory)
    if not os.path.isdir(directory):  # which takes any text
        return [directory]
    if any((path / name).exists() for name in (forms.CONFIG_FILE, forms.DIFFUSERS)):
        return [directory]
    return [str(path / name) for name in forms.adapters_in(path)] or [directory]


def text(found: Sequence[Described], model: ModelFiles | None, terminal: Terminal) -> str:
    """A table of the adapters that can be read, and below it what is to be said of each."""
    head = ("adapter", "form", "layers", "rank", "alpha", "type", "MB")
    rows = [
        (
            shown(one.path), one.form, str(one.layers), _span(one.ranks), _span(one.alphas),
            ", ".join(one.types), f"{one.bytes / 1e6:.3g}",
        )
        for one in found
        if not one.refused
    ]  # fmt: skip
    lines = terminal.table(head, rows) if rows else []
    for one in found:
        for note in _notes(one, model):
            lines += terminal.note(f"{shown(one.path)}: {note}", "  ")
    refused = sum(bool(one.refused) for one in found)
    misfits = sum(bool(one.misfits) for one in found)
    summary = f"{plural(len(found), 'adapter')}, {refused} refused"
    if model is not None:
        summary += f", {misfits} that do not fit {shown(model.path)}"
    return terminal.text([*lines, "", summary])


def _notes(one: Described, model: ModelFiles | None) -> list[str]:
    if one.refused:
        return [f"refused: {one.refused}"]
    notes = []
    if one.embeddings:
        notes.append(f"embeddings among its layers: {_first(one.embeddings)}")
    if one.experts:
        counts = [f"{name} ({experts})" for name, experts in one.experts.items()]
        notes.append(f"experts among its layers: {_first(counts)}")
    if one.saved:
        notes.append(f"replaces in the model: {_first(one.saved)}")
    if one.unknown:
        notes.append(f"options that PEFT does not have, passed over: {one.unknown}")
    if one.misfits:
        more = f" (and {len(one.misfits) - 1} more)" if one.misfits[1:] else ""
        notes.append(f"does not fit: {one.misfits[0]}{more}")
    return notes


def _span(values: Sequence[Any]) -> str:
    """One value, or the least and the greatest.

    >>> _span([8]), _span([1.5, 16.0, 32.0]), _span([])
    ('8', '1.5..32', '-')
    """
    if not values:
        return "-"
    ends = [f"{value:g}" for value in (values[0], values[-1])]
    return ends[0] if len(values) == 1 else "..".join(ends)


def _first(names: Sequence[str], limit: int = 4) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
