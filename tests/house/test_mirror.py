"""The tests mirror the package: sgmv/a/b.py has tests/a/test_b.py, or is listed with the reason."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from tests.help.planting import ROOT

pytestmark = pytest.mark.once

TESTS = ROOT / "tests"
# Where the tests of a folder are; others have its name. The files of sgmv/ itself are the core.
FOLDERS = {"": "core", "explorer": "page"}
# What has no test file of its own name: where its tests are, and why they are there.
ELSEWHERE = {
    "__main__.py": ("core/test_console.py", "the command is tried with its console"),
    "checks.py": ("core/test_errors.py", "every refusal is in one table"),
    "ids.py": ("core/test_segment.py", "ids are read where they are sorted"),
    "interpreter.py": ("core/test_threads.py", "a subinterpreter is refused at import"),
    "launch.py": ("core/test_workers.py", "a launch is seen by the threads that join it"),
    "models.py": ("benchmarks/test_grid.py", "the widths are held to those of the benchmark"),
    "table.py": ("core/test_stack.py", "a table is seen through the stack that keeps it"),
    "products.py": ("compat/vllm/test_ops.py", "products are seen through the calls"),
    "compat/vllm/engine.py": (
        "vllm/test_engine.py",
        "vLLM's real engine makes it",
    ),
    "emulator/bgmv.py": ("emulator/test_vllm.py", "one batch goes through all BGMV kernels"),
    "emulator/sglang.py": ("emulator/test_launch.py", "one batch goes through all kernels"),
    "explain/question.py": ("explain/test_command.py", "the command's flags are the question"),
    "kernels/amx_instructions.py": ("kernels/test_amx.py", "instructions are seen in their kernel"),
    "kernels/call.py": ("core/test_workers.py", "a call is seen by the threads that join it"),
    "kernels/emit.py": ("kernels/test_tiles.py", "what is emitted is a tile"),
    "kernels/loops.py": ("kernels/test_tiles.py", "loops go through the checks of tiles"),
    "kernels/panels.py": ("compat/vllm/test_slices.py", "panels are gathered for engines' weights"),
    "kernels/tile_kernels.py": ("kernels/test_tiles.py", "tiles are seen through their kernels"),
    "kernels/pool.py": ("core/test_workers.py", "a pool is seen by the threads that join a call"),
    "layouts/exam.py": ("layouts/test_check.py", "the exam is what `check` runs"),
    "layouts/finding.py": ("layouts/test_check.py", "findings are what `check` returns"),
    "layouts/repairs.py": ("layouts/test_check.py", "repairs are told with the findings"),
    "html.py": ("page/test_write.py", "a page is assembled by what writes one"),
    "replicas/records.py": ("replicas/test_events.py", "records are seen through the loop"),
    "replicas/replica.py": ("replicas/test_events.py", "one replica is held to the simulator"),
    "replicas/scheduler.py": ("replicas/test_events.py", "so is what it admits"),
    "serving/residency.py": ("serving/test_planted_faults.py", "plain forms drive it with slots"),
}
MOST_LINES = 600
TOO_LONG = {
    "help/refusals.py": "one table of every refusal of the core",
    "help/surface.py": "one table of every public call",
}


def modules() -> list[str]:
    files = (path.relative_to(ROOT / "sgmv").as_posix() for path in ROOT.glob("sgmv/**/*.py"))
    return sorted(name for name in files if not name.endswith("__init__.py"))


def mirror(name: str) -> Path:
    """The test file that the module asks for."""
    folder, _, file = name.rpartition("/")
    return TESTS / FOLDERS.get(folder, folder) / f"test_{file}"


@pytest.mark.parametrize("name", modules())
def test_a_module_has_a_test_file_or_a_reason(name: str) -> None:
    """Remedy: write the file, or say in ELSEWHERE where its tests are, and why."""
    assert mirror(name).is_file() != (name in ELSEWHERE), mirror(name)


def test_reasons_are_of_files_that_there_are() -> None:
    assert set(ELSEWHERE) <= set(modules())
    for name, (tests, why) in ELSEWHERE.items():
        assert (TESTS / tests).is_file(), f"{name}: no {tests}"
        assert why
    assert all((TESTS / folder).is_dir() for folder in FOLDERS.values())


def sources() -> list[str]:
    return sorted(path.relative_to(TESTS).as_posix() for path in TESTS.rglob("*.py"))


@pytest.mark.parametrize("name", sources())
def test_no_test_module_is_imported(name: str) -> None:
    """By another, or by a program that it runs: what several use is in tests/help."""
    text = (TESTS / name).read_text()
    assert not imported_tests(text)


def imported_tests(text: str) -> list[str]:
    nodes = list(ast.walk(ast.parse(text)))
    programs = [node.value for node in nodes if isinstance(node, ast.Constant)]
    lines = [ast.unparse(node) for node in nodes if isinstance(node, ast.Import | ast.ImportFrom)]
    lines += [program for program in programs if isinstance(program, str)]
    named = re.compile(
        r"\b(?:from|import) tests\.(?:[\w.]+\.)?test_\w+|from tests[\w.]* import [^\n;]*\btest_"
    )
    return [line for line in lines if named.search(line)]


@pytest.mark.parametrize(
    "line",
    [
        "from tests.core.NAME import CASE",
        "import tests.core.NAME",
        "from tests.core import NAME",
        "program = 'import sys; from tests.core.NAME import CASE'",
        "program = 'from tests.core import helpers, NAME'",
    ],
)
def test_an_import_of_a_test_module_is_seen(line: str) -> None:
    assert imported_tests(line.replace("NAME", "test_lora"))
    assert not imported_tests(line.replace("NAME", "lora"))


def test_test_files_are_short() -> None:
    long = {name for name in sources() if len((TESTS / name).read_text().splitlines()) > MOST_LINES}
    assert long == set(TOO_LONG)
