"""Every study is in the registry, files import in no circle, and what is missing is told."""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

import benchmarks
from benchmarks.registry import DEFAULT, STUDIES
from benchmarks.study import Study

pytestmark = pytest.mark.once

FOLDER = Path(benchmarks.__file__).parent


def modules() -> dict[str, Path]:
    found = {}
    for path in FOLDER.rglob("*.py"):
        parts = path.relative_to(FOLDER.parent).with_suffix("").parts
        found[".".join(parts).removesuffix(".__init__")] = path
    return found


def imported(path: Path) -> set[str]:
    """The package's modules that a file imports, in its functions, too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = {f"{node.module}.{alias.name}" for alias in node.names} & modules().keys()
            found |= names or {node.module}
    return found & modules().keys()


def test_no_file_imports_in_a_circle() -> None:
    graph = {name: imported(path) - {name} for name, path in modules().items()}
    assert "benchmarks.record" in graph["benchmarks.clock"]
    list(graphlib.TopologicalSorter(graph).static_order())


def test_every_study_is_registered_and_named_once() -> None:
    files = {path.stem for path in (FOLDER / "studies").glob("*.py")} - {"__init__"}
    assert set(STUDIES) == files | {DEFAULT.name}
    for name, study in STUDIES.items():
        assert isinstance(study, Study)
        assert ("" if study is DEFAULT else name) == study.record.STUDY
        assert f"python -m benchmarks {name}".removesuffix(" grid") in study.about


@pytest.mark.parametrize("name", ["rich", "matplotlib", "msgspec", "threadpoolctl"])
def test_a_missing_package_is_told(name: str) -> None:
    program = (
        f"import runpy, sys; sys.modules[{name!r}] = None; sys.argv = ['benchmarks', 'pages']; "
        "runpy.run_module('benchmarks', run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 2
    told = f"benchmarks: error: {name} is not installed; pip install -e '.[bench]'\n"
    assert done.stderr == told
