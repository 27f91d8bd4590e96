"""docs/exercises.md's functions, to be filled in.

python -m tests.help.exercises_page my_answers.py    write them into a new file
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "exercises.md"
EXERCISE = re.compile(r"^## (\d+)\. ([^\n]+)\n(.*?)(?=^## |\Z)", re.DOTALL | re.MULTILINE)
CODE = re.compile(r"```python\n(.*?)```", re.DOTALL)
FUNCTION = re.compile(r"^def (\w+)\(", re.MULTILINE)


def functions() -> dict[int, list[str]]:
    """The names of the functions that each exercise asks for."""
    exercises = EXERCISE.findall(PAGE.read_text())
    return {int(number): FUNCTION.findall(text) for number, _, text in exercises}


def skeleton() -> str:
    """A module of all functions of the page, under the titles of their exercises."""
    parts = ['"""Answers to docs/exercises.md."""\n\nimport numpy as np  # noqa: F401\n']
    for number, title, text in EXERCISE.findall(PAGE.read_text()):
        parts.append(f"# {number}. {title}\n" + "\n\n".join(CODE.findall(text)))
    return "\n\n".join(parts)


def main() -> None:
    """Write the file that the command line names."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.help.exercises_page",
        description="Write the functions of docs/exercises.md, to be filled in, into a new file.",
    )
    parser.add_argument("path", type=Path, help="the file to write, such as my_answers.py")
    path = parser.parse_args().path
    try:
        with path.open("x") as file:  # never over somebody's answers
            file.write(skeleton())
    except OSError as error:
        parser.error(f"path: expected a new file, got {path} ({error.strerror}); name another")


if __name__ == "__main__":
    main()
