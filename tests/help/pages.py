"""README.md and docs/: their code blocks, and the commands in their prose.

python -m tests.help.pages PAGE    run the page's Python blocks in order, as a reader would

Needs the standard library alone: it also runs in an environment that has no pytest.
"""

from __future__ import annotations

import doctest
import re
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]
FOR_DEVELOPERS = [ROOT / "ARCHITECTURE.md", ROOT / "CONTRIBUTING.md"]
# sh: commands. console: a command and what it prints. text: nothing that runs. pycon, on the
# page of the API alone: a docstring's example, which runs where it is written.
LANGUAGES = {"python", "sh", "console", "text", "pycon"}
LARGE = {
    "torch",
    "peft",
    "transformers",
}  # a block that imports one is left out where it is missing

_BLOCK = re.compile(r"^```([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_SPAN = re.compile(r"`([^`]+)`")
_COMMAND = re.compile(r"(?:[A-Z_]+=\S+ )*(?:python3?|make|pip|sgmv|jupyter|source)\s")


class Block(NamedTuple):
    """A fenced block: the line where its text begins, its language, its text."""

    line: int
    language: str
    text: str


def blocks(page: Path) -> list[Block]:
    """All blocks of the page."""
    text = page.read_text()
    return [
        Block(text.count("\n", 0, found.start()) + 2, found[1], found[2])
        for found in _BLOCK.finditer(text)
    ]


def commands_in_prose(page: Path) -> list[str]:
    """The code spans that are commands; one that is wrapped is joined."""
    spans = (" ".join(span.split()) for span in _SPAN.findall(_BLOCK.sub("", page.read_text())))
    return list(dict.fromkeys(span for span in spans if _COMMAND.match(span)))


def commands(page: Path, language: str) -> list[str]:
    """The commands of the blocks in this language, sh or console, without their comments."""
    lines = [line for block in blocks(page) if block.language == language
             for line in block.text.splitlines()]  # fmt: skip
    if language == "console":
        lines = [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
    return [line.split("  #")[0].split(" # ")[0].rstrip() for line in lines if line.strip()]


def extra(page: Path) -> str | None:
    """What the page has installed first: ".[peft]", or None where the core is enough."""
    found = re.search(r"pip install -e '(\.\[[\w,]+\])'", page.read_text())
    return found[1] if found and page.name != "README.md" else None


def missing(source: str) -> set[str]:
    """The large packages that a block imports and that are not installed."""
    names = set(re.findall(r"^(?:>>> )?(?:import|from) (\w+)", source, re.MULTILINE))
    return {name for name in names & LARGE if not find_spec(name)}


def run(page: Path) -> int:
    """Run every Python block in one namespace; the number of those that ran."""
    namespace: dict[str, object] = {"__name__": "__main__"}
    ran = 0
    for block in blocks(page):
        if block.language != "python":
            continue
        if ">>> " in block.text and not block.text.startswith("def "):
            test = doctest.DocTestParser().get_doctest(
                block.text, namespace, page.name, str(page), block.line - 1
            )
            if doctest.DocTestRunner().run(test, clear_globs=False).failed:
                raise SystemExit(f"{page.name}:{block.line}: an example fails")
            namespace = test.globs
        elif lacking := missing(block.text):
            print(f"{page.name}:{block.line}: left out, needs {', '.join(sorted(lacking))}")
            continue
        else:
            source = "\n" * (block.line - 1) + block.text  # so that a traceback names the line
            exec(compile(source, str(page), "exec"), namespace)
        ran += 1
    return ran


if __name__ == "__main__":
    name = Path(sys.argv.pop(1))  # an example reads the rest of the arguments
    print(f"{run(name)} Python blocks of {name.name} ran")
