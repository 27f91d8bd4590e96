"""Words that must not come back: names and phrases that hide what a thing is."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

pytestmark = pytest.mark.once

ROOT = Path(__file__).parents[2]
NAMES = {"its", "told", "who", "whose", "stands", "_instead"}
PHRASES = re.compile(r"\bso many\b|\bthe course\b")
FILES = sorted((ROOT / "sgmv").rglob("*.py"))


def names_of(source: str) -> set[str]:
    """The names that a file gives: of variables, arguments and functions."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.arg):
            found.add(node.arg)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
    return found


def docstrings_of(source: str) -> str:
    kinds = ast.Module | ast.ClassDef | ast.FunctionDef
    nodes = (node for node in ast.walk(ast.parse(source)) if isinstance(node, kinds))
    return "\n".join(ast.get_docstring(node) or "" for node in nodes)


def test_names_say_what_they_hold() -> None:
    found = {path: names_of(path.read_text()) & NAMES for path in FILES}
    assert not {path: words for path, words in found.items() if words}


def test_docstrings_count_in_plain_words() -> None:
    found = [path.name for path in FILES if PHRASES.search(docstrings_of(path.read_text()))]
    assert not found


def test_a_bad_word_is_seen() -> None:
    source = 'def told(its):\n    """At most so many rows."""\n    whose = its\n'
    assert names_of(source) & NAMES == {"told", "its", "whose"}
    assert PHRASES.search(docstrings_of(source))


def test_words_of_the_glossary_are_those_of_the_code() -> None:
    """A word that the code gave up leaves the glossary; so does one that has moved."""
    glossary = (ROOT / "CONTRIBUTING.md").read_text().partition("## Glossary")[2]
    rows = re.findall(r"^\| ([a-z ]+) \| .* \| `([^`]+)` \|$", glossary, re.MULTILINE)
    assert len(rows) > 20
    for word, file in rows:
        text = (ROOT / file).read_text().lower()
        assert all(part in text for part in word.split()), f"{file} has no {word}"
