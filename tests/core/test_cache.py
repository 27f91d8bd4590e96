"""`sgmv cache` tells of the folder of compiled kernels, and empties it."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from sgmv import cache
from tests.conftest import JITTED
from tests.help.planting import run_python

pytestmark = pytest.mark.once


@pytest.mark.skipif(not JITTED, reason="nothing is compiled")
def test_the_command_tells_and_empties_the_folder(tmp_path: Path) -> None:
    """Only what sgmv keeps there; a process that runs keeps what it has loaded."""
    program = (
        "import sys\nfrom sgmv.__main__ import main\nfrom sgmv import cache\n"
        "main(['cache'])\nimport sgmv\nsgmv.segment([1, 1])\nmain(['cache'])\n"
        "(cache.folder() / 'other.txt').touch()\nmain(['cache', '--clear'])\nmain(['cache'])\n"
        "sgmv.segment([2, 2])\nprint([path.suffix for path in cache.folder().iterdir()])"
    )
    done = run_python(program, NUMBA_CACHE_DIR=str(tmp_path))
    empty, filled, cleared, again, left = done.stdout.splitlines()
    assert str(tmp_path) in empty
    assert empty.endswith(": 0 files, 0.0 MB")
    assert re.search(r": [1-9]\d* files, \d+\.\d MB$", filled)
    assert re.match(r"[1-9]\d* files removed from ", cleared)
    assert again == empty
    assert sorted(ast.literal_eval(left)) == [".lock", ".txt"]


def test_a_file_that_is_removed_while_the_folder_is_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is listed, and not there any more, as a link to nothing is."""
    (tmp_path / "whole.sgmv").write_bytes(bytes(500_000))
    (tmp_path / "gone.sgmv").symlink_to(tmp_path / "nothing")
    monkeypatch.setattr(cache, "folder", lambda: tmp_path)
    assert cache.state() == f"{tmp_path}: 1 files, 0.5 MB"
