"""docs/exercises.md's functions, to be filled in.

python -m tests.exercises_page my_answers.py    write them into a new file
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

PAGE = Path(__file__).parent.parent / "docs" / "exercises.md"
EXERCISE = re.compile(r"^## (\d+)\. ([^\n]+)\n(.*?)(?=^## |\Z)", re.DOTALL | re.MULTILINE)
CODE = re.compile(r"```python\n(.*?)```", re.DOTALL)


def skeleton() -> str:
    """A module of all functions of the page, under the titles of their exercises."""
    parts = ['"""Answers to docs/exercises.md."""\n\nimport numpy as np  # noqa: F401\n']
    for number, title, text in EXERCISE.findall(PAGE.read_text()):
        parts.append(f"# {number}. {title}\n" + "\n\n".join(CODE.findall(text)))
    return "\n\n".join(parts)


if __name__ == "__main__":
    with open(sys.argv[1], "x") as file:  # never over somebody's answers
        file.write(skeleton())
