"""ARCHITECTURE.md and CONTRIBUTING.md against the code: the map, the recipes, the way of a call."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.help.planting import ROOT

pytestmark = pytest.mark.once

PAGE, CONTRIBUTING = ROOT / "ARCHITECTURE.md", ROOT / "CONTRIBUTING.md"
SPAN = re.compile(r"`([^`]+)`")
ENDINGS = (".py", ".js", ".md", ".html", ".css", ".toml", ".ipynb", ".json", ".typed")
# Folders that the map lists file by file; of tests/ it lists the folders.
MAPPED = ("sgmv", "reference", "benchmarks", "docs", "examples")
KINDS = {".py", ".js", ".html", ".css", ".typed", ".md", ".ipynb"}
# The second call: the kernels are made, and the threads counted.
TRACED = """
import sys
from pathlib import Path

import numpy as np

import sgmv

root, files = Path(sgmv.__file__).parent, {}

def trace(frame, event, argument):
    path = Path(frame.f_code.co_filename)
    if path.is_relative_to(root):
        files[f"sgmv/{path.relative_to(root).as_posix()}"] = None

stack = sgmv.AdapterStack.from_adapters({4: (np.ones((2, 3), "f"), np.ones((4, 2), "f"))})
x, y = np.ones((3, 3), "f"), np.zeros((3, 4), "f")
sgmv.add_lora(y, x, stack, [4, -1, 4], backend="loops")
sys.settrace(trace)
sgmv.add_lora(y, x, stack, [4, -1, 4], backend="loops")
sys.settrace(None)
print(*files, sep="\\n")
"""


def section(page: Path, title: str) -> str:
    """The text below a heading of level 2, as far as the next."""
    return page.read_text().split(f"\n## {title}\n")[1].split("\n## ")[0]


def first_cells(text: str) -> list[str]:
    """The code spans in the first column of the tables, from the top."""
    rows = re.findall(r"^\|([^|]+)\|", text, re.MULTILINE)
    return [span for row in rows for span in SPAN.findall(row)]


def mapped() -> dict[str, list[str]]:
    """The files that the map names, by the folder of their heading."""
    parts = section(PAGE, "The map").split("\n### ")[1:]
    found = {SPAN.findall(part.partition("\n")[0])[0]: first_cells(part) for part in parts}
    return {folder.rstrip("/"): files for folder, files in found.items()}


def there() -> dict[str, set[str]]:
    """The files that the map is to name, by folder."""
    found: dict[str, set[str]] = {}
    for top in MAPPED:
        for path in (ROOT / top).rglob("*"):
            if path.is_file() and path.suffix in KINDS:
                folder = path.parent.relative_to(ROOT).as_posix()
                found.setdefault(folder, set()).add(path.name)
    return found


def test_the_map_names_every_file_and_no_other() -> None:
    """An `__init__.py` is its folder's own line."""
    names = mapped()
    del names["tests"]
    assert names.keys() == there().keys()
    for folder, files in there().items():
        assert len(names[folder]) == len(set(names[folder])), folder
        assert set(names[folder]) == files - {"__init__.py"}, folder


def test_the_map_names_every_folder_of_tests() -> None:
    folders = {path.relative_to(ROOT / "tests").as_posix() for path in ROOT.glob("tests/**/*.py")}
    tops = {f"{folder.split('/')[0]}/" for folder in folders if "/" in folder}
    assert set(mapped()["tests"]) == tops


def named_paths(text: str) -> list[str]:
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    return [
        span for span in SPAN.findall(prose) if span.endswith((*ENDINGS, "/")) and " " not in span
    ]


@pytest.mark.parametrize("page", [PAGE, CONTRIBUTING], ids=lambda page: page.name)
def test_what_the_pages_name_is_there(page: Path) -> None:
    """NAME stands for that of the new thing: its folder is there."""
    text = page.read_text()
    if page == PAGE:
        text = text.replace(section(PAGE, "The map"), "")
    names = named_paths(text)
    assert ("sgmv/lora.py" if page == PAGE else "tests/house/test_mirror.py") in names
    for name in names:
        known = name if "NAME" not in name else name.partition("NAME")[0].rpartition("/")[0]
        assert (ROOT / known).exists(), name
    for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
        assert (ROOT / link).exists(), link


def recipes() -> dict[str, list[str]]:
    """The numbered steps of each recipe, each on one line."""
    found = {}
    for part in section(PAGE, "Recipes").split("\n### ")[1:]:
        title, _, text = part.partition("\n")
        steps = re.findall(r"^\d+\. (.+(?:\n   .+)*)", text, re.MULTILINE)
        found[title] = [" ".join(step.split()) for step in steps]
    return found


def lost_names(step: str) -> list[str]:
    """The identifiers of a step that none of the files that it names has."""
    paths = [ROOT / name for name in named_paths(step) if "NAME" not in name]
    text = "\n".join(path.read_text() for path in paths if path.is_file())
    spans = [span for span in SPAN.findall(step) if re.fullmatch(r"[A-Za-z_]\w*", span)]
    if not text:
        return []
    return [span for span in spans if "NAME" not in span and not re.search(rf"\b{span}\b", text)]


@pytest.mark.parametrize("title", recipes())
def test_steps_of_recipes_name_what_their_files_have(title: str) -> None:
    assert len(recipes()[title]) >= 3
    for step in recipes()[title]:
        assert named_paths(step), step
        assert not lost_names(step), step


def test_a_name_that_is_gone_is_seen() -> None:
    assert lost_names("`sgmv/dtypes.py`: `BITS` and `BITES`.") == ["BITES"]


def test_the_way_of_a_call_is_that_of_a_call() -> None:
    """Files in the order in which a real call enters them, of a process without the jit."""
    done = subprocess.run(
        [sys.executable, "-c", TRACED],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "NUMBA_DISABLE_JIT": "1"},
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert first_cells(section(PAGE, "The way of one call")) == done.stdout.split()
