"""The suite itself: a short run says what it left out."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.help.planting import ROOT

pytestmark = pytest.mark.once


def test_slow_tests_that_were_left_out_are_counted() -> None:
    """By the processes of pytest-xdist, for the one that reports."""
    arguments = ["-q", "-n", "2", "-m", "not compiles", "tests/kernels/test_jit.py"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *arguments, "-k", "written or next"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "2 slow tests were left out (browser, compiles, oracle)" in done.stdout, done.stdout
