"""examples/: every script runs, docs/examples.md shows it, and the notebook runs in Jupyter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import nbclient
import nbformat
import pytest

import reference
from tests.help import examples_page
from tests.help.planting import ROOT, replaced

pytestmark = pytest.mark.once

NOTEBOOK = examples_page.FOLDER / "student.ipynb"
LONGEST = 60  # lines: a script is read in a minute


def test_every_script_is_on_the_page() -> None:
    scripts = {path.stem for path in examples_page.FOLDER.glob("*.py")}
    assert scripts == {*examples_page.ORDER, *examples_page.ELSEWHERE}


@pytest.mark.parametrize("name", examples_page.ORDER)
def test_each_script_runs_and_the_page_shows_what_it_prints(name: str) -> None:
    """Remedy: python -m tests.help.examples_page."""
    assert examples_page.section(name) in examples_page.PAGE.read_text()


def test_what_a_gpu_wastes_on_experts_is_what_the_script_prints() -> None:
    page = (examples_page.ROOT / "docs" / "group-by-id.md").read_text()
    assert examples_page.output("experts_waste").rstrip() in page


def test_the_page_holds_nothing_else() -> None:
    page = examples_page.PAGE.read_text()
    assert page.startswith(examples_page.HEAD)
    assert page.count("\n## ") == len(examples_page.ORDER)


def test_timings_are_printed_for_every_popularity() -> None:
    table = examples_page.output("compare_timings").splitlines()[2:]
    assert [line.split()[:2] for line in table] == [
        ["distinct", "64"], ["uniform", "8"], ["skewed", "9"], ["identical", "1"],
    ]  # fmt: skip


@pytest.mark.parametrize("name", examples_page.ORDER)
def test_a_script_is_read_in_a_minute(name: str) -> None:
    assert len(examples_page.source(name).splitlines()) <= LONGEST


def test_peft_directories_reads_what_peft_wrote(capsys: pytest.CaptureFixture[str]) -> None:
    from examples import peft_directories

    fixtures = ROOT / "tests" / "fixtures" / "peft" / "llama"
    peft_directories.main([fixtures / "attention-f32", fixtures / "mlp-f16"])
    printed = capsys.readouterr().out
    assert "adapter 1: mlp-f16, 4 layers" in printed
    assert "model.layers.1.mlp.down_proj: 112 -> 48, rows changed [1, 4]" in printed


def test_a_faulty_own_kernel_fails() -> None:
    """The check that passes the script refuses its copy without the scaling."""
    source = examples_page.source("own_kernel")
    fault = replaced(source, "scalings[adapter_id] * ", "")
    module: dict[str, Any] = {}
    exec(compile(fault, "own_kernel.py", "exec"), module)
    report = reference.check(module["add_lora"], max_elements=5_000)
    assert "the scaling is dropped" in report.diagnosis


def test_the_notebook_is_committed_without_outputs() -> None:
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    assert len(cells) > 15
    for cell in cells:
        assert not cell.get("outputs")
        assert cell.get("execution_count") is None


def test_the_notebook_runs_and_draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own cells assert that the textbook form, segments and sgmv agree to the bit."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # of the kernel's process
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbclient.NotebookClient(notebook, timeout=240, kernel_name="python3").execute(cwd=str(tmp_path))
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 2
    assert not [output for output in outputs if output.output_type in ("stream", "error")
                and output.get("name") == "stderr"]  # fmt: skip
