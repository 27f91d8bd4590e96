"""docs/examples.md: each script of examples/, what it prints, and its code.

python -m tests.help.examples_page    run the scripts and write the page anew
"""

from __future__ import annotations

import ast
import os
import re
import shlex
import subprocess
import sys

from tests.help.planting import ROOT

FOLDER = ROOT / "examples"
PAGE = ROOT / "docs" / "examples.md"
ORDER = (
    "mixed_batch",
    "peft_directories",
    "server_step",
    "own_kernel",
    "emulate_launch",
    "experts_waste",
    "compare_timings",
)
TIMED = {"compare_timings"}  # prints other figures at each run
ELSEWHERE = {"ray_serve"}  # on a page of its own; tests/cluster/test_serve.py runs it
COMMAND = re.compile(r"^python (?:-m )?(?:examples|reference)\S*.*$", re.MULTILINE)

HEAD = """\
# Examples

Seven scripts, each read in a minute, to be run in a clone with its environment active
([install](../README.md#install)) and the extra `peft` in it: `pip install -e '.[peft]'`.

And a notebook, [`examples/student.ipynb`](../examples/student.ipynb), from the textbook form in
numpy to segments, to sgmv, and to the picture: `pip install -e '.[notebook]'`, then
`jupyter lab examples/student.ipynb`.

Another script, [`examples/ray_serve.py`](../examples/ray_serve.py), serves vLLM on a cluster and is
explained [there](cluster.md#replicas-of-vllm).
"""


def source(name: str) -> str:
    return (FOLDER / f"{name}.py").read_text()


def docstring(name: str) -> str:
    return ast.get_docstring(ast.parse(source(name))) or ""


def command(name: str) -> str:
    """The first command that the script's docstring names, without its optional arguments."""
    found = COMMAND.search(docstring(name))
    assert found is not None, f"{name}'s docstring has no command"
    return re.sub(r" \[.*", "", found[0])


def output(name: str) -> str:
    """What the command prints, any warning being an error."""
    _, *arguments = shlex.split(command(name))
    done = subprocess.run(
        [sys.executable, "-W", "error", *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
    )
    if done.returncode:
        raise RuntimeError(f"{command(name)}: {done.stderr}")
    return done.stdout


def section(name: str) -> str:
    """One script on the page."""
    title = docstring(name).splitlines()[0].rstrip(".")
    if name in TIMED:
        shown = f"```sh\n{command(name)}\n```"
    else:
        shown = f"```console\n$ {command(name)}\n{output(name)}```"
    return f"\n## {title}\n\n{shown}\n\n```python\n{source(name)}```\n"


def rendered() -> str:
    return HEAD + "".join(map(section, ORDER))


if __name__ == "__main__":
    PAGE.write_text(rendered())
