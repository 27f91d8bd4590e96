"""The cache on disk: hit by the next process, missed after an edit of any kernel file."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import sgmv
from tests.conftest import JITTED

PROGRAM = """
import numpy as np, sgmv
from sgmv.kernels import loops
A, B = np.ones((1, 2), np.float16), np.ones((1, 1), np.float16)
print(sgmv.lora_delta(np.ones((1, 2), np.float16), A, B, 1.0)[0, 0])
print(sum(loops.shrink.stats.cache_hits.values()), sum(loops.shrink.stats.cache_misses.values()))
"""


def run(folder: Path) -> list[str]:
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    environment.pop("NUMBA_CACHE_DIR", None)
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.mark.skipif(not JITTED, reason="nothing is compiled")
def test_hit_by_the_next_process_and_missed_after_an_edit(tmp_path: Path) -> None:
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(Path(sgmv.__file__).parent, tmp_path / "sgmv", ignore=ignore)
    assert run(tmp_path) == ["2.0", "0", "1"]
    assert run(tmp_path) == ["2.0", "1", "0"]
    # x, A and B all read twice as large; the loops' own file stays as it is.
    floats = tmp_path / "sgmv" / "kernels" / "floats.py"
    text = floats.read_text()
    assert text.count("np.float32(2.0**112)") == 1
    floats.write_text(text.replace("np.float32(2.0**112)", "np.float32(2.0**113)"))
    assert run(tmp_path) == ["16.0", "0", "1"]


@pytest.mark.skipif(not JITTED, reason="nothing is compiled")
def test_works_where_nothing_can_be_written(tmp_path: Path) -> None:
    """numba, as if no folder would take a cache, refuses; the kernels compile all the same."""
    program = (
        "import numba.core.caching as c\n"
        "c.CacheImpl._locator_classes = []\n"
        "c.CompileResultCacheImpl._locator_classes = []\n" + PROGRAM.split("print(sum")[0]
    )
    environment = {**os.environ, "NUMBA_CACHE_LOCATOR_CLASSES": ""}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.split() == ["2.0"], done.stderr
