"""docs/api.md: every public call, from its docstring.

python -m tests.help.api_page    write the page anew
"""

from __future__ import annotations

import enum
import importlib
import inspect
import re
import textwrap
from collections.abc import Iterator
from types import ModuleType
from typing import Any

from sgmv.settings import SETTINGS
from tests.help.pages import ROOT

PAGE = ROOT / "docs" / "api.md"
MODULES = {
    "sgmv": "the kernel: segments, stacks of adapters, and the calls on them",
    "sgmv.experts": "layers of experts (MoE), with adapters on the experts",
    "sgmv.serving": "which adapters are in memory, which requests run, one step of a model",
    "sgmv.layouts": "one batch in every engine's metadata, and back",
    "sgmv.compat.peft": "a PEFT model's mixed batches through `add_lora`",
    "sgmv.compat.punica": "Punica's own calls",
    "sgmv.compat.vllm": "vLLM's own calls",
    "sgmv.emulator": "what a GPU would do with a batch, in figures and as execution",
    "sgmv.explorer": "the page that shows it",
    "sgmv.popularity": "who uses which adapter, as in Punica's paper",
    "sgmv.models": "the layers of real models",
    "reference": "what the results must be, in numpy alone; `check` for somebody's own kernel",
    "reference.workloads": "seeded batches, and the corpus",
    "reference.mixtures": "the same of rows with several adapters",
    "reference.experts": "layers of experts in float64",
}
HEAD = """\
# The API

Made from the docstrings, which `help(sgmv.add_lora)` prints as well. `help(sgmv)` defines the words
n, S, h_in, r, h_out, x, W, y, A, B, v. Every refusal is an `sgmv.SgmvError`, a `ValueError`.
"""
NUMBAS = """\
Of numba's own, `NUMBA_CACHE_DIR` is the folder of compiled kernels, and `NUMBA_DISABLE_JIT=1` runs
them as plain Python.
"""


def names_of(module: ModuleType) -> list[str]:
    """What the module offers: its __all__, or what is defined in it."""
    listed: list[str] | None = getattr(module, "__all__", None)
    if listed is not None:
        return list(listed)
    return [
        name
        for name, value in vars(module).items()
        if getattr(value, "__module__", None) == module.__name__ and not name.startswith("_")
    ]


def methods_of(value: Any) -> Iterator[tuple[str, Any]]:
    """The public attributes of a class, in the order of their definition: its own, then those of
    classes of sgmv's that it is made of.
    """
    of_ours = [] if not inspect.isclass(value) else value.__mro__
    seen: set[str] = set()
    for each in of_ours:
        if each is value or each.__module__.startswith("sgmv."):
            for name, method in vars(each).items():
                if not name.startswith("_") and name not in seen:
                    seen.add(name)
                    yield name, method


def signature(name: str, value: Any) -> str:
    """The call without annotations: shapes and types are in the docstring."""
    parts = []
    for parameter in inspect.signature(value).parameters.values():
        bare = parameter.replace(annotation=inspect.Parameter.empty)
        if inspect.isroutine(bare.default) or "object at" in repr(bare.default):
            bare = bare.replace(default=inspect.Parameter.empty)  # its repr is an address
            parts.append(f"{bare}={getattr(parameter.default, '__name__', '...')}")
        else:
            parts.append(bare)
    shown = [str(part) for part in parts if getattr(part, "name", "") not in ("self", "cls")]
    keywords = [
        i for i, part in enumerate(inspect.signature(value).parameters.values())
        if part.kind is part.KEYWORD_ONLY
    ]  # fmt: skip
    if keywords:
        shown.insert(len(shown) - len(keywords), "*")
    return "\n".join(textwrap.wrap(f"{name}({', '.join(shown)})", 96, subsequent_indent=" " * 4))


def entry(title: str, call: str, doc: str) -> str:
    """A heading, the docstring's first line, the call with the rest, and the example."""
    first, _, rest = inspect.cleandoc(doc).partition("\n")
    before, prompt, example = rest.partition(">>> ")
    text = f"\n### {title}\n\n{first}\n\n```text\n{call}\n"
    text += f"\n{before.strip()}\n" if before.strip() else ""
    text += "```\n"
    return text + (f"\n```pycon\n{prompt}{example.strip()}\n```\n" if prompt else "")


def entries(module: ModuleType) -> Iterator[str]:
    """Every function and class of the module, and the methods that say what they do."""
    others = []
    for name in names_of(module):
        value = getattr(module, name)
        if not (inspect.isroutine(value) or inspect.isclass(value)):
            others.append(f"`{name}`")
            continue
        doc = value.__doc__ or ""
        full = f"{module.__name__}.{name}"
        plain = inspect.isclass(value) and issubclass(value, (Exception, enum.Enum))
        yield entry(full, name if plain else signature(name, value), doc)
        for method, function in methods_of(value):
            function = getattr(function, "__func__", function)
            if inspect.isfunction(function) and function.__doc__:
                yield entry(f"{full}.{method}", signature(method, function), function.__doc__)
    if others:
        yield f"\nAnd: {', '.join(others)}.\n"


def rendered() -> str:
    """The whole page."""
    parts = [HEAD, "\n", *(f"- {link(name)}: {about}\n" for name, about in MODULES.items())]
    for name in MODULES:
        found = list(entries(importlib.import_module(name)))
        titles = re.findall(r"^### (.+)$", "".join(found), re.MULTILINE)
        contents = ", ".join(link(title, title.removeprefix(f"{name}.")) for title in titles)
        parts += [f"\n## {name}\n\n{contents}\n", *found]
    return "".join([*parts, environment()])


def environment() -> str:
    """The variables that sgmv reads."""
    rows = ["variable | may be | if not set | decides", "--- | --- | --- | ---"]
    for name, *others in SETTINGS:
        rows.append(" | ".join([f"`{name}`", *others]))
    table = "".join(f"| {row} |\n" for row in rows)
    return f"\n## Environment variables\n\n{table}\n{NUMBAS}"


def link(title: str, shown: str | None = None) -> str:
    """To a heading of the page."""
    return f"[`{shown or title}`](#{title.replace('.', '').lower()})"


if __name__ == "__main__":
    PAGE.write_text(rendered())
