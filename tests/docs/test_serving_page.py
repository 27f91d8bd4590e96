"""docs/serving.md and docs/simulation.md: their commands and Python print what they say."""

from __future__ import annotations

import doctest
import os
import re
from pathlib import Path

import pytest

from sgmv.__main__ import main

DOCS = Path(__file__).parents[2] / "docs"
PAGE = DOCS / "serving.md"


@pytest.mark.once
@pytest.mark.parametrize(("name", "count"), [("serving.md", 2), ("simulation.md", 7)])
def test_the_page_tells_what_the_commands_print(
    name: str, count: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`SGMV_WRITE_PAGE=1 pytest -k the_page` writes it anew."""
    monkeypatch.setenv("COLUMNS", "80")
    page = (DOCS / name).read_text()

    def shown(block: re.Match[str]) -> str:
        text = ""
        for command in re.findall(r"^\$ sgmv (.*)$", block[0], re.MULTILINE):
            main(command.split())
            text += f"$ sgmv {command}\n{capsys.readouterr().out}"
        return f"```console\n{text}```\n"

    expected, blocks = re.subn(r"```console\n\$ .*?```\n", shown, page, flags=re.DOTALL)
    assert blocks == count
    if os.environ.get("SGMV_WRITE_PAGE"):
        (DOCS / name).write_text(expected)
    assert page == expected


@pytest.mark.once
def test_the_page_tells_what_python_prints(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(PAGE.parent.parent)
    found = doctest.testfile(str(PAGE), module_relative=False)
    assert found.attempted > 10
    assert found.failed == 0
